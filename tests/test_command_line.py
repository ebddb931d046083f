"""Scripts with settings of their own end as the tools do."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, call
from test_reproduce import script

from danet.errors import InputError, StorageError

command_line = script("command_line")


def test_own_settings_are_parted_from_others():
    own, others = command_line.split(["a=1=2", "b.c=3", "d="], ("a", "d"))
    assert (own, others) == ({"a": "1=2", "d": ""}, ["b.c=3"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("a=1: expected 2"), InputError.exit_code, "error: a=1: expected 2\n"),
        (StorageError("a\x1b[2Jb"), StorageError.exit_code, "error: a\\x1b[2Jb\n"),
        (KeyboardInterrupt(), 130, "stopped; the same command can be given again\n"),
    ],
)
def test_an_end_is_one_line_and_a_code(error, code, text, capsys):
    def work(_):
        raise error

    with pytest.raises(SystemExit) as end:
        command_line.run(work)
    assert end.value.code == code
    assert capsys.readouterr().err == text


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        command_line.run(lambda _: print(1 / 0))
    monkeypatch.setenv("DANET_TRACEBACK", "1")

    def refuse(_):
        raise InputError("a")

    with pytest.raises(InputError):
        command_line.run(refuse)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "reproduce", "results", "score_cityscapes", "study"])
def test_every_script_refuses_in_one_line(name):
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "study=x", "table=x", "data=x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == InputError.exit_code
    assert done.stderr.startswith("error: ")
    assert not done.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("prepare", "dta=ade20k", "dta=ade20k: there is no such setting; did you mean data?"),
        ("prepare", "--data=ade20k", "did you mean data"),
        ("prepare", "data=ade", "did you mean ade20k?"),
        ("prepare", "data=ade20k root=x", "archive: no value is given; data=ade20k needs\n"),
        ("prepare", "data=ade20k data=ade20k", "data: given twice"),
        ("prepare", "data=ade20k archive=x root=y max_gib=0", "max_gib=0: expected a number above"),
        ("prepare", "data=ade20k archive=/no/x root=y", "archive=/no/x: there is no file"),
        ("prepare", "data=ade20k archive=/ root=y", "archive=/: is a folder"),
        ("reproduce", "row=r50", "table=none: expected one of 1, 2, 4, 6, 7"),
        ("reproduce", "table=1 row=r50_pan", "did you mean r50_pam?"),
        ("reproduce", "table=1 launch=mpi data.root=/d", "launch=mpi: expected one of torchrun"),
        ("reproduce", "table=1 launch=torchrun", "data.root: where is the data?"),
        ("study", "level=wide", "study: which one?"),
        ("study", "study=scene", "did you mean scenes?"),
        ("study", "study=scenes level=huge", "level=huge: expected one of near, wide"),
        ("study", "study=scenes seed=4", "seed=4: expected one of 1, 2, 3"),
        ("study", "study=scenes trainer.steps=2", "other settings needs results=<folder>"),
        ("study", "scenes", "a setting has the form key=value"),
    ],
)
def test_a_wrong_command_is_refused_by_name(name, arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        script(name).main(arguments.split())


def test_all_misspelt_settings_are_reported_at_once(capsys):
    call("train", "trainer.stepz=3", "data=folder", "data.rooot=x", "+foo.bar=1", code=2)
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith("trainer.stepz: there is no such key; did you mean trainer.steps?")
    assert second == "data.rooot: there is no such key; did you mean data.root?"
