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

_OLDEST, _NEWEST = (3, 10), (3, 13)  # the versions of setup.py
# Package -> module, where the names differ.
_NAMES = {"hydra-core": "hydra", "opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}


def require_packages(file: str) -> None:
    """Exit with one line and code 2 if this Python is of another version or lacks packages.

    ``file`` is the tool or script that was started, in a folder of a checkout. Also disables the
    traceback of Ctrl-C during the imports that follow, until ``cli.run``.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    path = Path(file).resolve()
    root, version = path.parents[1], sys.version_info[:2]
    missing = missing_packages(root)
    is_supported = _OLDEST <= version <= _NEWEST
    if is_supported and not missing:
        return
    problem = "has no " + ", ".join(missing)
    if not is_supported:
        problem = "is {}.{}, and {}.{} to {}.{} work".format(*version, *_OLDEST, *_NEWEST)
    environment = root / ".venv"
    is_active = os.path.realpath(sys.prefix) == os.path.realpath(str(environment))
    remedy = f"source {shlex.quote(str(environment / 'bin' / 'activate'))}"
    if is_supported and is_active:
        requirements = shlex.quote(str(root / "requirements.txt"))
        remedy = f"{shlex.quote(sys.executable)} -m pip install -r {requirements}"
    elif is_active or not (environment / "bin" / "activate").is_file():
        choice = "" if is_supported else "PYTHON=python3.12 "
        remedy = f"{choice}bash {shlex.quote(str(root / 'scripts' / 'install.sh'))} && {remedy}"
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
    return [name for name in names if importlib.util.find_spec(_NAMES.get(name, name)) is None]
