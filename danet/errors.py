"""Errors that users can correct: a one-line message and an exit code, no traceback."""


class UserError(Exception):
    """Base of the errors below; users see ``str(error)`` only."""

    exit_code = 1
    is_reported: bool | None = None
    """Whether another process of the group has printed it; None without a process group."""


class InputError(UserError, ValueError):
    """A config, a data set, an image or a checkpoint is not valid."""

    exit_code = 2


class DivergedError(UserError, FloatingPointError):
    """The loss of a training is not finite."""

    exit_code = 3


class StorageError(UserError, OSError):
    """A file or folder cannot be written: disk full, no permission, not a folder."""

    exit_code = 4


class ProcessError(UserError, RuntimeError):
    """Communication failed: a process died, hangs, or executes other code than the rest."""


class Interrupted(UserError):
    """A signal ended the run, after a checkpoint was written; not printed as an error."""

    exit_code = 143


def first_line(error: BaseException, key: str | None = None) -> str:
    """Return the first line of an error's message, prefixed with the key if there is one."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return f"{key}: {text}" if key else text
