"""Errors that are the user's to mend: one plain line and an exit code, no traceback."""


class UserError(Exception):
    """Base of the errors below. ``str(error)`` is all that the user is shown."""

    exit_code = 1
    is_reported: bool | None = None
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


def first_line(error: BaseException, key: str | None = None) -> str:
    """Returns the first line of an error's text, with the key in front where it is known."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return f"{key}: {text}" if key else text
