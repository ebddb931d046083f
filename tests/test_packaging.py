"""A wheel carries loaders, configs and tools, and works far from the checkout."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY


def python(*arguments, cwd, path=""):
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
