"""A Python that cannot run the project says so in one line, and what that line advises works."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv

import pytest
from conftest import ROOT

from danet import interpreter

STARTED = [
    *sorted((ROOT / "tools").glob("*.py")),
    *(path for path in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in path.read_text()),
]
ALONE = ROOT / "scripts" / "reliability.py"
"""Needs no package, and says nothing where there are none."""
NAMES = [path.relative_to(ROOT).as_posix() for path in STARTED if path != ALONE]
BARE = [getattr(sys, "_base_executable", sys.executable), "-S", "-E", "-B"]
"""Python without the folders that packages are in, as outside of any environment."""
OLD = [
    *(sys.executable, "-B", "-c"),
    "import runpy, sys; sys.version_info = (3, 9, 1, 'final', 0);"
    "runpy.run_path(sys.argv[1], run_name='__main__')",
]
"""This Python, which says that it is 3.9."""
LINE = re.compile(r"error: (\S+): this Python \((.+)\) (.+); (.+)\n")


def start(command, cwd, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return subprocess.run(
        command, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
    )


def refused(command, cwd, **variables):
    """Returns the file, the fault and the remedy that the one line names."""
    done = start(command, cwd, **variables)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    found = LINE.fullmatch(done.stderr)
    assert found is not None, done.stderr
    return found[1], found[3], found[4]


@pytest.fixture
def checkout(tmp_path):
    """Makes a checkout of what is needed to be refused; its path has a blank."""
    root = tmp_path / "a checkout"
    for name in ("requirements.txt", "danet/__init__.py", "danet/interpreter.py", *NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_or_old_python_is_reported_in_one_line_where_the_packages_are(name, tmp_path):
    file, fault, _ = refused([*BARE, str(ROOT / name)], tmp_path)
    assert file == name
    assert fault.startswith("has no torch, torchvision, numpy, ")
    file, fault, _ = refused([*OLD, str(ROOT / name)], tmp_path)
    assert (file, fault) == (name, "is 3.9, and 3.10 to 3.13 work")


@pytest.mark.parametrize(
    "path",
    [*STARTED, ROOT / "danet/__init__.py", ROOT / "danet/interpreter.py"],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_what_is_read_first_is_readable_to_python_3_7(path):
    """Else it would end in a SyntaxError: no walrus, no match, no with in parentheses."""
    ast.parse(path.read_text(), feature_version=(3, 7))


def test_the_check_needs_no_package_and_a_module_no_check():
    code = "import sys, danet.interpreter; print(*sorted(sys.modules))"
    done = start([*BARE, "-c", code], ROOT)
    assert done.returncode == 0, done.stderr
    ours = {name for name in done.stdout.split() if name.split(".")[0] == "danet"}
    assert ours == {"danet", "danet.interpreter"}
    code = "import sys, danet.tools.compare; assert 'danet.interpreter' not in sys.modules"
    assert start([sys.executable, "-c", code], ROOT).returncode == 0


def test_the_versions_are_those_of_the_packaging():
    old, new = interpreter._OLDEST[1], interpreter._NEWEST[1]
    assert f'python_requires=">=3.{old},<3.{new + 1}"' in (ROOT / "setup.py").read_text()
    text = (ROOT / "scripts" / "install.sh").read_text()
    assert f"(3, {old}) <= sys.version_info < (3, {new + 1})" in text


def test_no_requirement_is_missed_where_all_are_installed():
    """Each is looked for under the name that is imported: opencv-python-headless is cv2."""
    assert interpreter.missing_packages(ROOT) == []


@pytest.mark.parametrize("place", ["tools", "/"])
def test_the_advice_leads_to_a_tool_that_runs(place):
    if not (ROOT / ".venv" / "bin" / "activate").is_file():
        pytest.skip("this checkout has no .venv; bash scripts/install.sh makes it")
    place = ROOT / place
    tool = os.path.relpath(ROOT / "tools" / "train.py", place)
    *_, remedy = refused([*BARE, tool], place)
    assert remedy.startswith("source ")
    done = start(["bash", "-c", f"{remedy} && python {shlex.quote(tool)} --help"], place)
    assert done.returncode == 0, done.stderr
    assert "trainer" in done.stdout


def test_without_an_environment_it_is_to_be_installed_first(checkout, tmp_path):
    (checkout / "scripts" / "install.sh").write_text(
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."\n'
        "mkdir -p .venv/bin && echo active=yes > .venv/bin/activate\n"
    )
    tool = str(checkout / "tools" / "train.py")
    *_, remedy = refused([*OLD, tool], tmp_path)
    assert remedy.startswith("PYTHON=python3.12 bash ")
    for start_of_remedy in ("bash ", "source "):  # there is an environment after the first
        *_, remedy = refused([*BARE, tool], tmp_path)  # whose folder has a blank in its name
        assert remedy.startswith(start_of_remedy)
        done = start(["bash", "-c", f"{remedy} && echo $active"], tmp_path)
        assert done.stdout == "yes\n", done.stderr


def test_an_environment_that_lacks_packages_is_shown_all_of_them(checkout):
    # Without pip, which would take seconds.
    venv.create(checkout / ".venv", with_pip=False, symlinks=True)
    python = checkout / ".venv" / "bin" / "python"
    for name in ("torch", "yaml", "PIL"):
        (checkout / "danet" / "site" / name).mkdir(parents=True)
    present = str(checkout / "danet" / "site")
    _, fault, remedy = refused([str(python), "tools/eval.py"], checkout, PYTHONPATH=present)
    assert fault == (
        "has no torchvision, numpy, scipy, albumentations, opencv-python-headless, hydra-core, "
        "omegaconf, tensorboard, tqdm, jinja2, pydantic, safetensors, pycocotools"
    )
    words = shlex.split(remedy)
    assert words == [str(python), "-m", "pip", "install", "-r", str(checkout / "requirements.txt")]
