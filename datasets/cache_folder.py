"""The folder of the cache of decoded pairs: on a disk, or in memory.

``data.cache=ram`` means files in /dev/shm rather than a dictionary in each process: workers, and
the ranks of a machine, share one copy. The last process that ends removes the folder; one that a
killed process left is removed by the next that starts.
"""

import atexit
import os
import shutil
from pathlib import Path

from danet.errors import InputError
from danet.filesystem import file_lock
from danet.memory import available_memory

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
        if file_lock(hold, wait=False):  # nobody has the folder: left by one that was killed
            shutil.rmtree(folder, ignore_errors=True)
        file_lock(hold, exclusive=False)
        _held[os.getpid()] = hold
        atexit.register(leave, folder, os.getpid())
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise InputError(f"data.cache=ram: {folder} is somebody else's; use data.cache=disk")
    return folder


def leave(folder: Path, process: int) -> None:
    """Remove the folder in memory if no other process uses it."""
    hold = _held.pop(process, None)
    if process != os.getpid() or hold is None:  # a forked process inherits this atexit handler
        return
    if file_lock(hold, wait=False):
        shutil.rmtree(folder, ignore_errors=True)
    os.close(hold)


def free(folder: Path) -> int:
    """Return how many bytes may still be written, to the disk or to the memory behind a folder."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if not folder.is_relative_to(_SHARED_MEMORY):
        return free
    # Batches travel through the same place, and the network needs memory, too: an eighth stays.
    free -= state.f_blocks * state.f_frsize // 8
    available = available_memory()
    return free if available is None else min(free, available)
