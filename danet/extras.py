"""Optional dependencies: how to install them, for the way the package was installed."""

import importlib
import importlib.metadata
import json
import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlparse

from danet.errors import InputError


def how_to_install(extra: str) -> str:
    """Return the command that installs the dependencies of an extra of setup.py.

    This package is on no index, so the command names the checkout or the dependencies themselves.
    """
    root = _checkout()
    if root is not None:
        path = "." if os.path.realpath(root) == os.path.realpath(".") else str(root)
        return f"pip install -e {shlex.quote(f'{path}[{extra}]')}"
    markers = f'extra == "{extra}"', f"extra == '{extra}'"
    packages = [
        needed.partition(";")[0].strip()
        for needed in importlib.metadata.requires("danet") or ()
        if needed.endswith(markers)
    ]
    return f"pip install {' '.join(map(shlex.quote, packages))}"


def _checkout() -> "Path | None":
    """Return the root of the checkout that runs; None if a built package is installed."""
    here = Path(__file__).resolve().parents[1]
    if (here / "setup.py").is_file():
        return here
    try:
        text = importlib.metadata.distribution("danet").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    origin = json.loads(text or "{}")
    is_editable = origin.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(origin["url"]).path)) if is_editable else None


def require(module: str) -> None:
    """Raise InputError if an optional module cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        extra = {"huggingface_hub": "hub", "timm": "timm"}.get(module, "export")
        raise InputError(f"{module} is not installed: {how_to_install(extra)}") from error
