"""Whether this Python can run the project; where it cannot, one line says which one can.

It is asked before anything is imported that it may lack. So this file, ``danet/__init__.py`` and
the head of every tool and script run on Python 3.7, and tools and scripts are readable to it.
"""

import importlib.util
import os
import re
import shlex
import signal
import sys
from pathlib import Path

_OLDEST, _NEWEST = (3, 10), (3, 13)
"""As in setup.py."""
_MODULES = {
    "hydra-core": "hydra",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pyyaml": "yaml",
}
"""What is imported of a package, where that is not its name."""
_NAMED = 3
"""How many missing packages are named where another Python has them."""


def require_packages(file: str) -> None:
    """End the process with one line and code 2 if this Python lacks what the project needs.

    From here on Ctrl-C leaves no traceback of the imports that follow; ``cli.run`` takes over.

    Args:
        file: The tool or script that was started, in a folder of a checkout.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    path = Path(file).resolve()
    root, version = path.parents[1], sys.version_info[:2]
    if _OLDEST <= version <= _NEWEST:
        missing = _missing(root)
        if not missing:
            return
        if _is_meant(root, missing):
            fault = "has no " + ", ".join(missing)
            remedy = f"{_told(sys.executable)} -m pip install -r {_told(root / 'requirements.txt')}"
        else:  # another Python has them all, so there is no need to name them all
            further = len(missing) - _NAMED
            fault = "has no " + ", ".join(missing[:_NAMED])
            fault += f" and {further} more" if further > 0 else ""
            remedy = _way_to_environment(root)
    else:
        fault = "is {}.{}, and {}.{} to {}.{} work".format(*version, *_OLDEST, *_NEWEST)
        remedy = _way_to_environment(root, "PYTHON=python3.12 ")
    name = path.relative_to(root).as_posix()
    print(f"error: {name}: this Python ({sys.executable}) {fault}; {remedy}", file=sys.stderr)
    sys.exit(2)


def _missing(root: Path) -> "list[str]":
    """Return the packages of requirements.txt that cannot be imported; imports none of them."""
    path = root / "requirements.txt"
    if not path.is_file():  # installed from a wheel, whose installer saw to them
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[^\w.-]", line)[0] for line in lines if line and not line.startswith("#")]
    return [name for name in names if importlib.util.find_spec(_MODULES.get(name, name)) is None]


def _is_meant(root: Path, missing: "list[str]") -> bool:
    """Return whether this is the Python to use: the environment's, or one that somebody fitted."""
    if _has_environment(root):
        return os.path.realpath(sys.prefix) == os.path.realpath(root / ".venv")
    return "torch" not in missing


def _has_environment(root: Path) -> bool:
    folder = root / ".venv" / "bin"
    return (folder / "activate").is_file() and os.access(folder / "python", os.X_OK)


def _way_to_environment(root: Path, choice: str = "") -> str:
    """Return what to type, from the current folder, for a Python that has the packages."""
    activate = f"source {_told(root / '.venv' / 'bin' / 'activate')}"
    if not _has_environment(root):
        return f"{choice}bash {_told(root / 'scripts' / 'install.sh')} && {activate}"
    active = os.environ.get("VIRTUAL_ENV")
    if active and os.path.realpath(active) == os.path.realpath(root / ".venv"):
        return f"start it with {_told(root / '.venv' / 'bin' / 'python')}"
    return activate


def _told(path: "str | Path") -> str:
    """Return a path as one word of a shell: from the current folder, unless that is longer."""
    absolute = str(path)
    try:
        relative = os.path.relpath(absolute)
    except (OSError, ValueError):  # the current folder was deleted; another drive
        return shlex.quote(absolute)
    if os.sep not in relative:  # such a name is looked up in PATH
        relative = os.path.join(".", relative)
    return shlex.quote(min(absolute, relative, key=lambda text: (len(text), text == absolute)))
