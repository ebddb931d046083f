"""Settings ``key=value`` and one-line errors, for scripts with settings of their own."""

import os
import sys
from collections.abc import Callable, Sequence

from danet import console
from danet.errors import InputError, UserError
from danet.plain import printable


def split(arguments: Sequence[str], own: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the command line into a script's own settings and those that it passes on.

    Raises:
        InputError: An argument is not of the form key=value.
    """
    mine, others = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"{argument}: a setting has the form key=value")
        if key in own:
            mine[key] = value
        else:
            others.append(argument)
    return mine, others


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Call ``main`` with the command line; errors end the process as those of the tools do."""
    with console.unbreakable():
        try:
            main(sys.argv[1:])
        except UserError as error:
            if os.environ.get("DANET_TRACEBACK") == "1":
                raise
            # It may quote an archive, which must not steer the terminal.
            print(f"error: {printable(str(error), keep=chr(10))}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("stopped; the same command can be given again", file=sys.stderr, flush=True)
            sys.exit(130)
