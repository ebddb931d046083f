"""Starting processes with torchrun, and the variables by which a launcher numbers them."""

import sys
from collections.abc import Mapping, Sequence

from danet.errors import InputError, Interrupted, ProcessError

_LOW = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0}


def start(count: int, command: Sequence[str]) -> None:
    """Run a Python program with arguments in several processes under torchrun; wait for them.

    Raises ProcessError if one failed, which has reported why, Interrupted if a signal ended them.
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
        raise Interrupted(f"run.processes={count}: ended by {error.sigval.name}") from error


def require_sound(environment: Mapping[str, str]) -> None:
    """Raise InputError for variables with which processes would wait for one another."""
    values = {name: _number(environment, name, _LOW[name]) for name in _LOW if name in environment}
    for name, limit in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if (most := values.get(limit, sys.maxsize) - 1) < values.get(name, 0):  # ranks count from 0
            wrong = f"{name}={values[name]} of {limit}={values[limit]}"
            raise _refusal(f"{wrong}: expected at most {most}")
    size = values.get("WORLD_SIZE", 1)
    # Of one process a cluster may use the other names for something else.
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ()
    if missing := [name for name in needed if not environment.get(name)]:
        raise _refusal(f"WORLD_SIZE={size} and no {missing[0]}")
    if "RANK" in values and "WORLD_SIZE" not in values:
        raise _refusal(f"RANK={values['RANK']} and no WORLD_SIZE")
    if needed and (port := _number(environment, "MASTER_PORT", 1)) > 65535:
        raise _refusal(f"MASTER_PORT={port}: expected 1 to 65535")


def _number(environment: Mapping[str, str], name: str, low: int) -> int:
    text = environment[name]
    if not (text.isascii() and text.isdigit() and int(text) >= low):
        raise _refusal(f"{name}={text}: expected a whole number of at least {low}")
    return int(text)


def _refusal(text: str) -> InputError:
    error = InputError(f"{text}; start the processes with torchrun, or unset the variable")
    error.is_reported = False  # each process reports its own variables, see error_reporting.py
    return error
