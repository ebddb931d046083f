"""scripts/install.sh: PyTorch for CPUs from an index of its own, and without that index."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def write_wheel(folder, name, version, code=""):
    """Writes the smallest wheel that pip installs, into the folder that an index has for it."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    (folder / name).mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)


def write_index(folder, *, cuda):
    code = f"class version:\n    cuda = {cuda!r}\n"
    write_wheel(folder, "torch", "98.0+cpu" if cuda is None else "98.0", code)
    write_wheel(folder, "torchvision", "99.0")
    return folder


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose package is empty and needs torch and torchvision alone."""
    place = tmp_path / "checkout"
    (place / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "install.sh", place / "scripts")
    wanted = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in wanted if line.startswith("torch")]
    assert len(lines) == 2
    (place / "requirements.txt").write_text("\n".join(lines))
    (place / "pyproject.toml").write_text("")
    (place / "setup.py").write_text(
        "from setuptools import setup\n"
        f"setup(name='empty', version='1', py_modules=[], install_requires={lines})\n"
    )
    return place


def install(checkout, default, torch_index, cpu="1"):
    """Runs the script; the packages in a folder ``default`` are newer than those of any index."""
    nothing = checkout / "nothing"  # of what pip's settings on this machine name
    nothing.touch()
    environment = {
        **os.environ,
        "PIP_FIND_LINKS": " ".join(str(path) for path in default.iterdir()),
        "PIP_EXTRA_INDEX_URL": nothing.as_uri(),
        "PIP_CONSTRAINT": str(nothing),
        "PYTHON": sys.executable,
        "TORCH_INDEX": torch_index,
    }
    done = subprocess.run(
        ["bash", "scripts/install.sh"],
        cwd=checkout,
        env={**environment, "CPU": cpu},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    code = "import torch; print(torch.version.cuda)"
    python = checkout / ".venv" / "bin" / "python"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, found.stdout.strip()


@pytest.fixture
def torch_index(tmp_path):
    """The address of an index that has PyTorch for CPUs alone."""
    folder = write_index(tmp_path / "index", cuda=None)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_with_an_index_for_cpus_no_cuda_is_installed(checkout, tmp_path, torch_index):
    # In the test both are of one version, as on the real indexes: +cpu is the higher one.
    default = write_index(tmp_path / "default", cuda="13.0")
    said, cuda = install(checkout, default, torch_index)
    assert cuda == "None"
    assert "1.3 GB" in said
    assert "CUDA" not in said
    assert install(checkout, default, torch_index) == ("", "None")  # it was done before


def test_without_the_index_one_line_says_so_and_the_default_is_installed(checkout, tmp_path):
    default = write_index(tmp_path / "default", cuda="13.0")
    said, cuda = install(checkout, default, "http://127.0.0.1:9")
    assert cuda == "13.0"
    # pip may find the default right away, or fail: either way it is said at the end.
    *_, last = said.splitlines()
    assert last.startswith("CPU=1: PyTorch in .venv has CUDA. To replace it: rm -r .venv")


def test_by_default_the_size_and_the_smaller_choice_are_named(checkout, tmp_path, torch_index):
    default = write_index(tmp_path / "default", cuda="13.0")
    said, cuda = install(checkout, default, torch_index, cpu="")
    assert cuda == "13.0"
    assert said.count("\n") == 1
    assert "5.9 GB with CUDA, or 1.3 with CPU=1" in said
