"""Check of the Python version and its packages, before anything else is imported.

This file, ``danet/__init__.py`` and the head of every tool and script therefore run on Python 3.7,
and the rest of tools and scripts compiles on it.
"""

import importlib.util
import os
import re
import shlex
import signal
import sys
from pathlib import Path

_OLDEST, _NEWEST = (3, 10), (3, 13)
"""The versions of setup.py."""
_MODULES = {
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
"""Package -> module, where the names differ."""
_NAMED = 3
"""How many missing packages are listed where another Python has them."""


def require_packages(file: str) -> None:
    """Exit with one line and code 2 if this Python is of another version or lacks packages.

    Also disables the traceback of Ctrl-C during the imports that follow, until ``cli.run``.

    Args:
        file: The tool or script that was started, in a folder of a checkout.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    path = Path(file).resolve()
    root, version = path.parents[1], sys.version_info[:2]
    if _OLDEST <= version <= _NEWEST:
        missing = missing_packages(root)
        if not missing:
            return
        if _is_meant(root, missing):
            problem = "has no " + ", ".join(missing)
            requirements = shell_path(root / "requirements.txt")
            remedy = f"{shell_path(sys.executable)} -m pip install -r {requirements}"
        else:  # another Python has them all, so some names are enough
            further = len(missing) - _NAMED
            problem = "has no " + ", ".join(missing[:_NAMED])
            problem += f" and {further} more" if further > 0 else ""
            remedy = _way_to_environment(root)
    else:
        problem = "is {}.{}, and {}.{} to {}.{} work".format(*version, *_OLDEST, *_NEWEST)
        remedy = _way_to_environment(root, "PYTHON=python3.12 ")
    name = path.relative_to(root).as_posix()
    print(f"error: {name}: this Python ({sys.executable}) {problem}; {remedy}", file=sys.stderr)
    sys.exit(2)


def missing_packages(root: Path) -> "list[str]":
    """Return the packages of requirements.txt that are not installed, without importing any."""
    path = root / "requirements.txt"
    if not path.is_file():  # installed from a wheel, whose installer checked them
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if line and not line.startswith("#")]
    return [name for name in names if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def _is_meant(root: Path, missing: "list[str]") -> bool:
    """Return whether packages belong into this Python: that of .venv, or else one with torch."""
    if _has_environment(root):
        return os.path.realpath(sys.prefix) == os.path.realpath(root / ".venv")
    return "torch" not in missing


def _has_environment(root: Path) -> bool:
    folder = root / ".venv" / "bin"
    return (folder / "activate").is_file() and os.access(folder / "python", os.X_OK)


def _way_to_environment(root: Path, choice: str = "") -> str:
    """Return the command that leads to a Python with the packages, from the current folder."""
    activate = f"source {shell_path(root / '.venv' / 'bin' / 'activate')}"
    if not _has_environment(root):
        return f"{choice}bash {shell_path(root / 'scripts' / 'install.sh')} && {activate}"
    active = os.environ.get("VIRTUAL_ENV")
    if active and os.path.realpath(active) == os.path.realpath(root / ".venv"):
        return f"start it with {shell_path(root / '.venv' / 'bin' / 'python')}"
    return activate


def shell_path(path: "str | Path") -> str:
    """Return a path quoted for a shell, relative to the current folder unless that is longer."""
    absolute = str(path)
    try:
        relative = os.path.relpath(absolute)
    except (OSError, ValueError):  # the current folder was deleted; another drive
        return shlex.quote(absolute)
    if os.sep not in relative:  # a shell would search PATH for it
        relative = os.path.join(".", relative)
    return shlex.quote(min(absolute, relative, key=lambda text: (len(text), text == absolute)))
