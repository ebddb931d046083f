"""Starting processes with torchrun, and the variables by which a launcher numbers them."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from danet.distributed import signals
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
    # As a module: a torchrun on PATH may be that of another environment.
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    with subprocess.Popen([sys.executable, *launcher, *command]) as child:

        def forward(number: int, _: object) -> None:
            # A terminal sends SIGINT to the child as well.
            if number == signal.SIGTERM or not signals.is_in_foreground():
                child.send_signal(number)

        with signals.handled(forward, signals.STOP):
            code = child.wait()
    if code:
        raise ProcessError(f"run.processes={count}: the processes ended with code {code}")


def require_sound(environment: Mapping[str, str]) -> None:
    """Refuse variables that cannot be right, for which processes would wait for one another.

    Args:
        environment: As ``os.environ``.

    Raises:
        InputError: A variable is no number, out of range, or missing beside another.
    """
    values = {name: _number(environment, name, low) for name, low in _LOW.items()}
    # A rank out of range would leave the others waiting until TIMEOUT.
    for name, world in (
        ("RANK", values["WORLD_SIZE"]),
        ("LOCAL_RANK", values["LOCAL_WORLD_SIZE"]),
    ):
        rank = values[name]
        if rank is not None and world is not None and rank >= world:
            raise _wrong(
                f"{name}={rank} of {name.replace('RANK', 'WORLD_SIZE')}={world}: ranks count from "
                f"0 to {world - 1}"
            )
    if values["RANK"] is not None and values["WORLD_SIZE"] is None:
        raise _wrong(f"RANK={values['RANK']} and no WORLD_SIZE")
    size = values["WORLD_SIZE"] or 1
    if (values["LOCAL_WORLD_SIZE"] or 1) > size and values["WORLD_SIZE"] is not None:
        raise _wrong(f"LOCAL_WORLD_SIZE={values['LOCAL_WORLD_SIZE']} of WORLD_SIZE={size}")
    if size == 1:  # no rendezvous; a cluster may use the other names for something else
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise _wrong(f"WORLD_SIZE={size} and no {name}")
    if (port := _number(environment, "MASTER_PORT", 1) or 0) > 65535:
        raise _wrong(f"MASTER_PORT={port}: expected 1 to 65535")


def _number(environment: Mapping[str, str], name: str, low: int) -> int | None:
    """Return a variable as a number; None where it is not set."""
    text = environment.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= low):
        raise _wrong(f"{name}={text}: expected a whole number of at least {low}")
    return int(text)


def _wrong(text: str) -> InputError:
    error = InputError(f"{text}; {_REMEDY}")
    error.is_reported = False  # each process reports its own variables, see error_reporting.py
    return error
