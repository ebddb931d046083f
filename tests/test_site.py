"""The site builds without a warning, and the notebook runs from its first cell to its last."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "api" / "use" / "index.html").read_text()
    for name in ("load_model", "predict", "SegmentationOutput"):
        assert name in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own packages
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    client = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("DANET_NOTEBOOK_STEPS", "3")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the notebook puts its runs
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    notebook = nbformat.read(ROOT / "docs" / "first_hour.ipynb", as_version=4)

    def pictures():
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        return sum("image/jpeg" in output.get("data", {}) for output in outputs)

    assert pictures() == 2, "run and save it"
    place = {"metadata": {"path": str(ROOT / "docs")}}
    client.NotebookClient(notebook, timeout=300, resources=place).execute()
    assert pictures() == 2
