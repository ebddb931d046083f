"""However a run ends, its work is kept, and what a user sees of it is a line."""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, call, save_picture

from danet import console
from danet.distributed import signals
from danet.errors import StorageError
from danet.filesystem import explain_storage, require_writable
from danet.tools import eval as evaluation
from faults.toy import TOY, all_end, errors, fingerprint, pictures, until

LIMIT = 50


def shell(start, command, **env):
    """Runs a line of the shell with the tools of this checkout, which must end well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PY": sys.executable, **env}
    run = start.execute(["bash", "-c", command], {**environment, "T": str(ROOT / "tools")})
    run.ends(0, within=100)
    assert "Traceback" not in run.stderr()
    return run


# SIGHUP


@pytest.mark.slow
@pytest.mark.fault("T61", "SIGHUP, as of an ssh session that is closed")
def test_sighup_that_nohup_ignores_changes_nothing(start, straight, tmp_path):
    ignore = {"place": "signal.signal", "arguments": [signal.SIGHUP, signal.SIG_IGN]}
    plants = {"call": ignore, "signal_after": {"step": 5, "name": "SIGHUP"}}
    start.train(*TOY, "run.dir=run", plants=plants)
    assert fingerprint(tmp_path / "run/last.pt") == straight()[0]


@pytest.mark.fault("T61", "SIGHUP, as of an ssh session that is closed")
@pytest.mark.parametrize(
    ("names", "launched", "ends"),
    [
        (("SIGTERM", "SIGHUP"), False, False),  # systemd sends both
        (("SIGHUP", "SIGTERM"), False, False),
        (("SIGHUP", "SIGHUP"), False, False),
        (("SIGINT", "SIGINT"), True, False),  # a terminal and torchrun send one each
        (("SIGINT", "SIGINT"), False, True),
        (("SIGHUP", "SIGINT"), False, True),
    ],
)
def test_signals_that_come_together_are_one_request(names, launched, ends, monkeypatch):
    gone = []
    monkeypatch.setattr(signals.os, "_exit", gone.append)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGHUP, signal.SIGINT)}
    try:
        with signals.Signals() as requests:
            for name in names:
                os.kill(os.getpid(), signal.Signals[name])
            assert requests.take() == signals.STOP
            assert ends or requests.name == names[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert bool(gone) is ends


# The console


RUN = '"$PY" "$T/train.py" ' + " ".join(f"'{setting}'" for setting in TOY)


@pytest.mark.slow
@pytest.mark.fault("T62", "a console that cannot be written: full disk, closed pipe, closed stream")
@pytest.mark.parametrize(
    ("console_", "reason"),
    [
        ("> /dev/full", "standard output could not be written (No space left on device)"),
        ("2> /dev/full", "standard error could not be written (No space left on device)"),
        ("> /dev/full 2>&1", "No space left on device"),
        ("| true; exit ${PIPESTATUS[0]}", "standard output could not be written (Broken pipe)"),
        ("2>&1 | head -n 3; exit ${PIPESTATUS[0]}", "could not be written (Broken pipe)"),
        (">&-", "standard output was closed at the start"),
        ("2>&-", "standard error was closed at the start"),
        ("<&- >&- 2>&-", "standard output was closed at the start; standard error was closed"),
    ],
)
def test_a_console_that_cannot_be_written_ends_no_training(
    start, straight, tmp_path, console_, reason
):
    done = shell(start, f"{RUN} run.dir=run {console_}")
    assert "Exception ignored" not in done.stderr()
    assert fingerprint(tmp_path / "run/last.pt") == straight()[0]
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (warning,) = (line["text"] for line in lines if line["kind"] == "warning")
    assert reason in warning
    assert sum(line["kind"] == "train" for line in lines) == 12


@pytest.mark.slow
@pytest.mark.fault("T62", "a console that cannot be written: full disk, closed pipe, closed stream")
@pytest.mark.parametrize(
    ("command", "console_", "result"),
    [
        ("eval.py checkpoint=$C output=out", "> /dev/full 2>&1", "metrics.json"),
        ("eval.py checkpoint=$C output=out", "2> /dev/null | true", "metrics.json"),
        ("visualize.py checkpoint=$C output=out count=1", ">&- 2>&-", "contact_sheet.png"),
        ("predict.py checkpoint=$C images=$I output=out", "| true", "index/train_0.png"),
        ("predict.py checkpoint=$C images=$I output=out", ">&- 2>&-", "index/train_0.png"),
        ("export.py checkpoint=$C output=out formats=[]", "> /dev/full 2>&1", "README.md"),
        ("compare.py $D --page out.html", "> /dev/full", "../out.html"),
    ],
)
def test_tools_write_their_results_whatever_the_console_does(
    start, tiny_checkpoint, tmp_path, console_, command, result
):
    pictures(tmp_path / "data", train=1, val=1)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("a: 1\n")
    env = {"C": str(tiny_checkpoint), "I": str(tmp_path / "data/images/train"), "D": str(folder)}
    shell(start, f'"$PY" "$T/"{command} {console_}; exit ${{PIPESTATUS[0]}}', **env)
    assert (tmp_path / "out" / result).resolve().exists()


def test_the_console_escapes_what_its_encoding_lacks_and_forgives_failures(tmp_path):
    path = tmp_path / "x.txt"
    with open(path, "w", encoding="ascii") as file:
        stream = console.Console(file, "a file")
        assert stream.write("über\n") == 5
        stream.flush()
    assert path.read_text() == "\\xfcber\n"
    assert stream.failure == ""
    stream.write("closed by now")
    assert stream.failure == "a file could not be written (I/O operation on closed file.)"
    assert stream.name == str(path)  # all else is the stream's own


# Results that could not be written


@pytest.mark.fault("T63", "an output that cannot be written is found before the work")
@pytest.mark.parametrize("kind", ["below a file", "a file", "a name that is too long"])
@pytest.mark.parametrize(
    ("name", "settings", "work"),
    [
        ("eval", ["device=cpu"], "danet.tools.eval.predict_split"),
        ("visualize", ["device=cpu", "count=1"], "danet.tools.visualize.draw"),
        ("predict", ["device=cpu", "images=pictures"], "danet.tools.predict.predictions"),
        ("export", ["formats=[]"], "danet.export.folder.save"),
        ("convert", ["source=torchvision", "input=x.pt"], "danet.tools.convert.read_state_dict"),
        ("check_data", ["data=folder", "data.classes=[a,b]"], "danet.tools.check_data.scan_splits"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tiny_checkpoint, tmp_path, monkeypatch, capsys, name, settings, work, kind
):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures", train=1, val=1)
    (tmp_path / "file").touch()
    monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it began to work"))
    output = {"below a file": "file/out", "a file": "file", "a name that is too long": "a" * 300}
    wanted = output[kind] + (".pt" if kind != "a file" else "/x.pt") * (name == "convert")
    if name == "check_data":
        settings = [*settings, f"data.root={tmp_path}/pictures"]
    elif name != "convert":
        settings = [f"checkpoint={tiny_checkpoint}", *settings]
    call(name, *settings, f"output={wanted}", code=4)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: output=")
    if kind == "a name that is too long":
        assert "a part of it has 30" in error
        assert "take 255 and 4096; give a shorter one" in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pictures"]


@pytest.mark.fault("T63", "an output that cannot be written is found before the work")
def test_a_full_disk_is_found_before_the_work(tiny_checkpoint, monkeypatch, capsys, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(evaluation, "predict_split", lambda *_: pytest.fail("it began to work"))
    call("eval", f"checkpoint={tiny_checkpoint}", f"output={tmp_path}/a/b", code=4)
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    require_writable(tmp_path / "a/b/c")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").touch()
    require_writable(tmp_path / "a")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "x"]


# Ctrl-C


@pytest.mark.slow
@pytest.mark.fault("T64", "Ctrl-C before the first step")
@pytest.mark.parametrize("module", ["omegaconf", "hydra", "torch", "torch.nn", "torchvision"])
def test_ctrl_c_during_the_imports_leaves_no_traceback(start, tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}:\n"
        "            pathlib.Path('here').touch()\n"
        "            for _ in range(1200):\n"
        "                time.sleep(0.05)\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    command = [sys.executable, str(ROOT / "tools/train.py"), *TOY, "run.dir=run"]
    run = start.execute(command, {**os.environ, "PYTHONPATH": str(tmp_path)})
    until((tmp_path / "here").exists, run, what="the import")
    run.kill(signal.SIGINT)
    all_end([run], within=LIMIT)
    assert run.code() in (-signal.SIGINT, 130)
    assert "Traceback" not in run.stderr()
    assert len(run.stderr().splitlines()) <= 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.fault("T64", "Ctrl-C before the first step")
@pytest.mark.parametrize(
    "place",
    [
        "danet.config.resume.resolve",
        "danet.config.build.make_dataset",
        "danet.config.build.make_model",
        "danet.data_check.sample.check_sample",
        "danet.checkpoint.run_folder.prepare",
    ],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_before_the_first_step_leaves_no_traceback(start, tmp_path, place, processes):
    plants = {"hold": {"place": place, "path": str(tmp_path / "here")}}
    runs = start.fork_group(*TOY, "run.dir=run", processes=processes, plants=plants)
    until(lambda: (tmp_path / "here").exists(), *runs, what=place)
    time.sleep(1.0 if processes > 1 else 0.0)  # until the other one is there, too
    for run in runs:
        run.kill(signal.SIGINT)
    for run in runs:
        run.ends(130, within=LIMIT)
    assert errors(runs).strip() == "stopped by Ctrl-C"
    assert not (tmp_path / "run").exists()


# Names and shared memory


@pytest.mark.fault("T65", "a name that the file system refuses")
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("train", "run.dir="),
        ("train", "run.name="),
        ("train", "resume="),
        ("train", "init_from="),
        ("train", "data=folder data.classes=[a,b] data.root="),
        ("train", "model.backbone.weights="),
        ("eval", "checkpoint="),
        ("predict", "images=. checkpoint="),
        ("predict", "checkpoint=x images="),
        ("visualize", "checkpoint=x images="),
        ("visualize", "checkpoint=x other="),
        ("export", "checkpoint=x metrics="),
        ("eval", "checkpoint=x submission="),
    ],
)
@pytest.mark.parametrize("long", ["a" * 300, "a/" * 2500], ids=["a part", "all of it"])
def test_a_name_that_is_too_long_is_refused_with_its_length(
    monkeypatch, tmp_path, capsys, name, setting, long
):
    monkeypatch.chdir(tmp_path)
    *others, last = setting.split()
    call(name, *others, f"{last}{long}", code=4)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {last}aa" if long[1] == "a" else f"error: {last}a/")
    assert f"all of it {len(long)}" in line
    assert "give a shorter one" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("T65", "a name that the file system refuses")
def test_what_a_file_system_refuses_is_explained():
    for number, text in (
        (errno.EINVAL, "refuses this name (Invalid argument); use letters"),
        (errno.EILSEQ, "refuses this name"),
        (errno.ENOSPC, "a:b: No space left on device"),
        (errno.EROFS, "a:b: Read-only file system"),
    ):
        explained = explain_storage(OSError(number, os.strerror(number), "a:b"))
        assert isinstance(explained, StorageError)
        assert text in str(explained)
    assert explain_storage(OSError(errno.ECONNREFUSED, "no")) is None


@pytest.mark.slow
@pytest.mark.fault("T65", "a name that the file system refuses")
def test_a_picture_whose_result_has_too_long_a_name_is_reported(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_picture(tmp_path / f"own/{'a' * 250}.png", np.zeros((64, 64, 3), np.uint8))
    call("visualize", f"checkpoint={tiny_checkpoint}", "images=own", "device=cpu", code=4)
    assert "a part of it has 264 bytes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.fault("T66", "a full /dev/shm, by which loader processes hand over batches")
def test_a_full_shared_memory_is_reported_with_its_size_and_the_remedy(start, tmp_path):
    data = pictures(tmp_path / "data")
    settings = [*data, "data.num_workers=2", "run.dir=run"]
    run = start.train(*settings, plants={"full_shared_memory": {}}, code=4)
    assert "Traceback" not in run.stderr()
    (line,) = (x for x in run.stderr().splitlines() if x.startswith("error: "))
    assert "no room for the batches of data.num_workers: /dev/shm has " in line
    assert "data.num_workers=0 needs none, or enlarge it: docker run --shm-size=2g" in line
