"""Starting processes with torchrun, and the variables by which a launcher numbers them."""

import sys
from collections.abc import Mapping, Sequence

from danet.errors import InputError, ProcessError

_LOW = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}
_REMEDY = "start the processes with torchrun, or unset the variable"


def start(count: int, command: Sequence[str]) -> None:
    """Run a Python program in several processes under torchrun, and wait for them.

    Args:
        count: Of processes, all on this machine.
        command: File and arguments of the program.

    Raises:
        ProcessError: A process failed, and has reported why.
    """
    # Late, since a misspelt setting is reported before torch is imported.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--standalone", f"--nproc-per-node={count}", *command])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        raise ProcessError(f"run.processes={count}: a process ended with code {code}") from error
    except SignalException as error:  # the processes were sent the signal, too, and have ended
        raise ProcessError(f"run.processes={count}: ended by {error.sigval.name}") from error


def require_sound(environment: Mapping[str, str]) -> None:
    """Refuse variables that cannot be right, for which processes would wait for one another.

    Args:
        environment: As ``os.environ``.

    Raises:
        InputError: A variable is no number, out of range, or missing beside another.
    """
    values = {name: _number(environment, name, _LOW[name]) for name in _LOW if name in environment}
    for name, limit, less in (
        ("RANK", "WORLD_SIZE", 1),  # ranks count from 0
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE", 1),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE", 0),
    ):
        most = values.get(limit, sys.maxsize) - less
        if values.get(name, 0) > most:
            raise _wrong(
                f"{name}={values[name]} of {limit}={values[limit]}: expected at most {most}"
            )
    if "RANK" in values and "WORLD_SIZE" not in values:
        raise _wrong(f"RANK={values['RANK']} and no WORLD_SIZE")
    size = values.get("WORLD_SIZE", 1)
    if size == 1:  # no rendezvous; a cluster may use the other names for something else
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise _wrong(f"WORLD_SIZE={size} and no {name}")
    if (port := _number(environment, "MASTER_PORT", 1)) > 65535:
        raise _wrong(f"MASTER_PORT={port}: expected 1 to 65535")


def _number(environment: Mapping[str, str], name: str, low: int) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit() and int(text) >= low):
        raise _wrong(f"{name}={text}: expected a whole number of at least {low}")
    return int(text)


def _wrong(text: str) -> InputError:
    error = InputError(f"{text}; {_REMEDY}")
    error.is_reported = False  # each process reports its own variables, see error_reporting.py
    return error
