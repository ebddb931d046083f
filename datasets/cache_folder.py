"""The folder of the cache of decoded pairs: on a disk, or in memory.

``data.cache=ram`` means files in /dev/shm rather than a dictionary in each process: workers, and
the ranks of a machine, share one copy. The last process that ends removes the folder; one that a
killed process left is removed by the next that starts.
"""

import atexit
import os
import shutil
from contextlib import suppress
from pathlib import Path

from danet.errors import InputError

_SHARED_MEMORY = Path("/dev/shm")


def disk_folder(name: str | None) -> Path:
    """Return the absolute path of the disk cache; None is the user's own cache folder."""
    if name is not None:
        return Path(name).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "danet"


# Process -> descriptor of the file that it locks while it uses the folder in memory.
_held: dict[int, int] = {}


def memory_folder() -> Path:
    """Return the folder in memory that the processes of a user share.

    Raises:
        InputError: This system has no such folder, or it belongs to another user.
    """
    if not _SHARED_MEMORY.is_dir():
        raise InputError(f"data.cache=ram: there is no {_SHARED_MEMORY} here; use data.cache=disk")
    folder = _SHARED_MEMORY / f"danet-cache-{os.getuid()}"
    if os.getpid() not in _held:
        # Beside the folder: a lock inside would be removed with it while another one is taken.
        hold = os.open(f"{folder}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        if lock(hold, wait=False):  # no process uses the folder: a killed one left it
            shutil.rmtree(folder, ignore_errors=True)
        lock(hold, alone=False)
        _held[os.getpid()] = hold
        atexit.register(_leave, folder, os.getpid())
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise InputError(f"data.cache=ram: {folder} is somebody else's; use data.cache=disk")
    return folder


def _leave(folder: Path, process: int) -> None:
    """Remove the folder in memory if no other process uses it."""
    hold = _held.pop(process, None)
    if process != os.getpid() or hold is None:  # a forked process inherits this atexit handler
        return
    if lock(hold, wait=False):
        shutil.rmtree(folder, ignore_errors=True)
    os.close(hold)


def lock(file: int, *, alone: bool = True, wait: bool = True) -> bool:
    """Lock an open file, exclusively or shared; return whether that succeeded."""
    import fcntl  # not on every system, and without a cache not needed

    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    try:
        fcntl.flock(file, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free(folder: Path) -> int:
    """Return how many bytes may still be written, to the disk or to the memory behind a folder."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if not folder.is_relative_to(_SHARED_MEMORY):
        return free
    # Batches travel through the same place, and the network needs memory, too: an eighth stays.
    free -= state.f_blocks * state.f_frsize // 8
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = min(free, int(kib) * 1024)
    with suppress(OSError, ValueError):  # of a container; "max" where there is no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return free
