"""Optional dependencies: how to install them, for the way the package was installed."""

import importlib
import importlib.metadata
import re
import shlex
from pathlib import Path

from danet.errors import InputError

_EXTRAS = {"huggingface_hub": "hub", "timm": "timm", "rasterio": "geo"}
_EXTRAS |= {"tifffile": "tiff", "imagecodecs": "tiff"}


def how_to_install(extra: str) -> str:
    """Return the command that installs the dependencies of an extra of setup.py.

    This package is on no index, so the command names the checkout or the dependencies themselves.
    """
    root = Path(__file__).resolve().parents[1]
    if (root / "setup.py").is_file():
        path = "." if root == Path.cwd().resolve() else str(root)
        return f"pip install -e {shlex.quote(f'{path}[{extra}]')}"
    needed = (line.partition(";") for line in importlib.metadata.requires("danet") or ())
    packages = [name.strip() for name, _, mark in needed if extra in re.split(r"\W", mark)]
    return f"pip install {' '.join(map(shlex.quote, packages))}"


def require(module: str) -> None:
    """Raise InputError if an optional module cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        extra = _EXTRAS.get(module, "export")
        raise InputError(f"{module} is not installed: {how_to_install(extra)}") from error
