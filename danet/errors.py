"""Errors that are the user's to mend: one plain line and an exit code, no traceback."""

import errno
import os


class UserError(Exception):
    """Base of the errors below. ``str(error)`` is all that the user is shown."""

    exit_code = 1
    is_told: bool | None = None
    """Whether another process of the group has shown it; None where there is no group."""


class InputError(UserError, ValueError):
    """A config, a data set, an image or a checkpoint is not as it must be."""

    exit_code = 2


class DivergedError(UserError, FloatingPointError):
    """Training met a loss that is not finite."""

    exit_code = 3


class StorageError(UserError, OSError):
    """Something could not be written: disk full, no permission, not a folder."""

    exit_code = 4

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ProcessError(UserError, RuntimeError):
    """An exchange between processes failed: one of them died, hangs, or took another path."""


class Interrupted(UserError):
    """A signal ended the run after a checkpoint was written."""

    exit_code = 143


_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says when something cannot be written."""


def explain_storage(error: OSError) -> StorageError | None:
    """Return in one line what the file system refused; None for an error of another kind."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if error.errno == errno.ENAMETOOLONG:
        longest = max((len(os.fsencode(part)) for part in name.split(os.sep)), default=0)
        return StorageError(
            f"{name[:60]}...: the file system refuses this name ({error.strerror}): a part of it "
            f"has {longest} bytes and all of it {len(os.fsencode(name))}, and most file systems "
            "take 255 and 4096; give a shorter one"
        )
    if error.errno in (errno.EINVAL, errno.EILSEQ) and name:
        return StorageError(
            f"{name}: the file system refuses this name ({error.strerror}); use letters, digits, "
            "dots, dashes and underscores"
        )
    if error.errno in _STORAGE:
        return StorageError(f"{name or 'writing'}: {error.strerror}")
    return None
