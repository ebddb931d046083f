"""Resident memory of this process, without torch, whose own would be counted."""


def reset_high_water_mark() -> None:
    """Reset VmHWM of this process to its resident memory (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def status(field: str) -> int:
    """Return a field of /proc/self/status, such as VmRSS, in bytes (Linux)."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
