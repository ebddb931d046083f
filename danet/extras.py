"""How an optional part of the package is added, for the way the package was installed."""

import importlib
import importlib.metadata
import json
import os
import shlex
from pathlib import Path
from urllib.parse import unquote, urlparse

from danet.errors import InputError


def how_to_install(extra: str) -> str:
    """Return the command that installs the packages of an extra of setup.py.

    No index has this package, so a checkout is named, or the packages themselves.
    """
    root = _checkout()
    if root is not None:
        path = "." if os.path.realpath(root) == os.path.realpath(".") else str(root)
        return f"pip install -e {shlex.quote(f'{path}[{extra}]')}"
    marks = f'extra == "{extra}"', f"extra == '{extra}'"
    packages = [
        needed.partition(";")[0].strip()
        for needed in importlib.metadata.requires("danet") or ()
        if needed.endswith(marks)
    ]
    return f"pip install {' '.join(map(shlex.quote, packages))}"


def _checkout() -> "Path | None":
    """Return the checkout that runs; None where a built package was installed."""
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
    """Raises InputError where an optional package is missing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        extra = "hub" if module == "huggingface_hub" else "export"
        raise InputError(f"{module} is not installed: {how_to_install(extra)}") from error
