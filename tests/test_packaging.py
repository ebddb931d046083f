"""A wheel carries loaders, configs and tools, and works far from the checkout."""

import functools
import shutil
import subprocess
import sys
import venv

import pytest
from conftest import ROOT, TINY, output_of

python = functools.partial(output_of, sys.executable)


@pytest.mark.slow
def test_an_installed_wheel_trains_evaluates_and_draws(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    for link in ("datasets", "configs", "tools"):  # as on a system that lost the links
        (source / "danet" / link).unlink()
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    python(*build, cwd=source)
    (wheel,) = tmp_path.glob("danet-*.whl")
    site, away = tmp_path / "site", tmp_path / "away"
    away.mkdir()
    python("-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=away)
    where = python("-c", "import danet; print(danet.__file__)", cwd=away, path=str(site))
    assert str(site) in where
    assert (site / "danet" / "py.typed").exists()
    run = ["debug=one_step", *TINY, "run.dir=r"]
    python("-m", "danet.tools.train", *run, cwd=away, path=str(site))
    last = "checkpoint=r/last.pt"
    assert "miou=" in python("-m", "danet.tools.eval", last, cwd=away, path=str(site))
    drawing = [last, "count=1", "report=true"]
    python("-m", "danet.tools.visualize", *drawing, cwd=away, path=str(site))
    assert "viewer" in (away / "r" / "pictures_val" / "report.html").read_text()
    assert (away / "r" / "pictures_val" / "val_000000.png").exists()
    for file in ("export/card.md.j2", "export/runtime.yaml", "visualization/templates/demo.html"):
        assert (site / "danet" / file).is_file()
    scripts = {path.name for path in (site / "bin").iterdir()}
    tools = {"train", "eval", "visualize", "predict", "export", "check-data"}
    assert {f"danet-{tool}" for tool in tools} <= scripts


PROGRAM = """
from pathlib import Path

import numpy as np
import torch

import danet

model = danet.load_model("best.pt")
mask: np.ndarray = danet.predict(model, "a.jpg")
batch: np.ndarray = danet.predict(model, np.zeros((2, 4, 4, 3)))
masks: list[np.ndarray] = danet.predict(model, ["a.jpg", Path("b.jpg")])
paths: list[str] = ["a.jpg"]
more: list[np.ndarray] = danet.predict(model, paths) + danet.predict(model, Path().glob("*.jpg"))
sure: danet.Prediction = danet.predict(model, "a.jpg", maps=["confidence"])
every: list[danet.Prediction] = danet.predict(model, ["a.jpg"], maps=["entropy"])
names: list[str] = [model.classes[i] for i in mask.flatten()]
red, green, blue = model.palette[0]
device: torch.nn.Module = model.to("cpu").eval()
"""


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """An environment into which the checkout is installed as pip does it with -e."""
    place = tmp_path_factory.mktemp("outside")
    venv.create(place / "env")
    (site,) = (place / "env").glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "all.pth").write_text("\n".join([str(ROOT), *others]))
    return place


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("", None),
        ('wrong: list[np.ndarray] = danet.predict(model, "a.jpg")', "[assignment]"),
        ('wrong: np.ndarray = danet.predict(model, ["a.jpg"])', "[assignment]"),
        ("danet.predict(model, 7)", "[call-overload]"),
        ("danet.predicted(model, 7)", "[attr-defined]"),
        ("danet.load_model(3)", "[arg-type]"),
    ],
)
def test_a_program_of_a_user_is_checked_by_the_types_of_the_package(outside, line, error):
    (outside / "program.py").write_text(f"{PROGRAM}{line}\n")
    command = [sys.executable, "-m", "mypy", "--strict", "program.py"]
    command += ["--python-executable", str(outside / "env" / "bin" / "python")]
    done = subprocess.run(command, cwd=outside, capture_output=True, text=True, check=False)
    lines = [text for text in done.stdout.splitlines() if ": error:" in text]
    if error is None:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        number = PROGRAM.count("\n") + 1
        assert [text.startswith(f"program.py:{number}: ") for text in lines] == [True], done.stdout
        assert lines[0].endswith(error)


def test_the_module_shows_its_functions():
    """In a new process, since other tests have used them."""
    program = "import danet; print(dir(danet)); from danet import *; print(predict, load_model)"
    shown, imported = python("-c", program, cwd=ROOT).splitlines()
    assert "'load_model'" in shown
    assert "'predict'" in shown
    assert imported.count("<function ") == 2
