"""The classes that a config may name in ``_target_``."""

import importlib
import inspect
import os
import re
from collections.abc import Mapping
from typing import Any

from danet.config.schema import did_you_mean
from danet.errors import InputError
from danet.plain import printable

TRUSTED: Mapping[str, Mapping[str, str]] = {
    "data": {"danet.datasets.": "fingerprint", "danet.data.transforms": "__call__"},
    "model": {"danet.models.": "forward"},
    "loss": {"danet.losses": "forward"},
    "optimizer": {"danet.engine.optimizer": "__call__"},
    "schedule": {"danet.engine.schedule": "__call__"},
    "evaluation": {
        "danet.evaluation.inference": "predict",
        "danet.evaluation.protocols": "predict",
    },
}
"""Group of a config -> the modules whose own classes it may name, with what such a class defines.

A checkpoint may come from anybody, and its config chooses which classes are called with which
arguments. Nodes of ``data`` may name transforms of albumentations, too."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def locate(path: Any, group: str) -> Any:
    """Return the class that a ``_target_`` names, if configs may name it.

    Args:
        path: Module and class, as in ``danet.losses.OHEM``.
        group: First part of the key of the node, such as ``loss``.

    Raises:
        InputError: The class is not trusted, or does not exist.
    """
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise InputError(
            f"{printable(str(path)[:60])} is no path of a class, as in danet.losses.OHEM"
        )
    module_name, _, name = path.rpartition(".")
    own = (name.strip() for name in os.environ.get("DANET_TRUST", "").split(","))
    trusted = {**TRUSTED.get(group, {}), **{name: "" for name in own if name}}
    needed = next(
        (trusted[m] for m in trusted if f"{module_name}.".startswith(m.rstrip(".") + ".")), None
    )
    is_transform = module_name == "albumentations" and group == "data"
    if needed is None and not is_transform:
        raise InputError(
            f"{path} is refused: {group} may name classes of "
            f"{', '.join(prefix.rstrip('.') for prefix in trusted)}"
            f"{' and transforms of albumentations' * (group == 'data')} only; "
            "name modules of your own in the environment variable DANET_TRUST"
        )
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"there is no module {module_name}") from error
    target = getattr(module, name, None)
    # Only what the module itself defines: getattr finds what it imports, too (danet.losses.Tensor).
    defined = [
        n
        for n, v in vars(module).items()
        if inspect.isclass(v)
        and not n.startswith("_")
        and (is_transform or v.__module__ == module_name)
        and (not needed or needed in dir(v))
    ]
    if name not in defined:
        raise InputError(f"{module_name} has no class {name}{did_you_mean(name, defined)}")
    if is_transform:
        import albumentations  # late: it takes two seconds

        if not issubclass(target, albumentations.BasicTransform):  # type: ignore[arg-type]
            raise InputError(f"{path} is refused: it is not a transform")
    return target
