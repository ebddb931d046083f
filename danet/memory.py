"""Memory of the host that a process may still take."""

from contextlib import suppress
from pathlib import Path


def available_memory() -> int | None:
    """Return the bytes available in RAM and within the limit of a container; None if unknown."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        found.append(int(kib) * 1024)
    with suppress(OSError, ValueError):  # ValueError: the limit is "max", which is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found.append(max(0, limit - used))
    return min(found, default=None)
