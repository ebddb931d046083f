"""The variables by which a launcher such as torchrun says which process this is."""

from collections.abc import Mapping

from danet.errors import InputError

_LOW = {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_PORT": 1}
_REMEDY = "start the processes with torchrun, or unset the variable"


def require_sound(environment: Mapping[str, str]) -> None:
    """Refuse variables that cannot be right, for which processes would wait for one another.

    Args:
        environment: As ``os.environ``.

    Raises:
        InputError: A variable is no number, out of range, or missing beside another.
    """
    values = {}
    for name, low in _LOW.items():
        text = environment.get(name)
        if text is None:
            continue
        if not (text.isascii() and text.isdigit() and int(text) >= low):
            raise _wrong(f"{name}={text}: expected a whole number of at least {low}")
        values[name] = int(text)
    if values.get("MASTER_PORT", 1) > 65535:
        raise _wrong(f"MASTER_PORT={values['MASTER_PORT']}: expected 1 to 65535")
    if "RANK" in values and "WORLD_SIZE" not in values:
        raise _wrong(f"RANK={values['RANK']} and no WORLD_SIZE")
    for rank, world in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if rank in values and values[rank] >= values.get(world, values[rank] + 1):
            raise _wrong(
                f"{rank}={values[rank]} of {world}={values[world]}: ranks count from 0 to "
                f"{values[world] - 1}"
            )
    if values.get("LOCAL_WORLD_SIZE", 1) > values.get(
        "WORLD_SIZE", values.get("LOCAL_WORLD_SIZE", 1)
    ):
        raise _wrong(
            f"LOCAL_WORLD_SIZE={values['LOCAL_WORLD_SIZE']} of WORLD_SIZE={values['WORLD_SIZE']}"
        )
    if values.get("WORLD_SIZE", 1) > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if not environment.get(name):
                raise _wrong(f"WORLD_SIZE={values['WORLD_SIZE']} and no {name}")


def _wrong(text: str) -> InputError:
    error = InputError(f"{text}; {_REMEDY}")
    error.is_told = False  # no process waits for another one to say it
    return error
