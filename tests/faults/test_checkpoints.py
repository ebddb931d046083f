"""A checkpoint is whole or refused, and never mistaken for another one."""

import lzma
import os
import resource
import shutil
from pathlib import Path

import pytest

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.manager import path_at
from danet.errors import InputError
from faults.toy import TOY, errors, fingerprint, saved_step, step_of

pytestmark = pytest.mark.slow

OFTEN = ["trainer.save_every=3"]
FORMAT = "danet.checkpoint.format"
FORMAT_1 = Path(__file__).parent / "data" / "format1.pt.xz"


@pytest.fixture(scope="session")
def stopped(straight):
    """A run that ended at step 6, with checkpoints of steps 3 and 6."""
    return straight(*OFTEN, "trainer.stop_at=6")[1] / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def damage(path, *, cut=False):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if cut else data)


@pytest.mark.fault("T20", "a truncated checkpoint")
def test_the_run_goes_on_from_the_one_before_to_the_same_end(start, straight, run):
    for path in (run / "last.pt", path_at(run, 6)):
        damage(path, cut=True)
    done = start.train("run.dir=run", "resume=auto")
    assert "going on from run/step_000000003.pt instead, at step 3" in done.stdout()
    assert fingerprint(run / "last.pt") == straight(*OFTEN)[0]


@pytest.mark.fault("T23", "a checkpoint copied from one run into the folder of another")
def test_a_checkpoint_of_another_run_is_refused(start, run, tmp_path):
    start.train(*TOY, "seed=2", "run.dir=other", "trainer.stop_at=3")
    for path in (tmp_path / "other").glob("*.pt"):
        path.unlink()
    shutil.copy(run / "last.pt", tmp_path / "other/last.pt")
    refused = start.train("run.dir=other", "resume=auto", code=2)
    assert "a checkpoint of run" in refused.stderr()
    assert step_of(tmp_path / "other") == 3


@pytest.mark.fault("T25", "the clock was set back")
def test_the_newest_checkpoint_is_the_one_with_the_highest_step(start, run):
    (run / "last.pt").unlink()
    (run / "best.pt").unlink()
    os.utime(path_at(run, 6), (1000, 1000))
    done = start.train("run.dir=run", "resume=auto", "trainer.stop_at=7")
    assert "steps 6 to 12" in done.stdout()


LIMITS = [resource.RLIMIT_FSIZE, (100_000, 100_000)]
QUOTA = {"call": {"place": "resource.setrlimit", "arguments": LIMITS, "step": 5}}
BROKEN = {"full_disk": {"module": FORMAT, "step": 6}}
READ_ONLY = {"full_disk": {"module": FORMAT, "step": 6, "number": 30}}
FULL = "the disk is full, or a quota is reached, while a checkpoint is written"
T17 = pytest.mark.fault("T17", FULL)
T19 = pytest.mark.fault("T19", "the folder becomes read-only while the run is under way")
T27 = pytest.mark.fault("T27", "the background writer fails")


@pytest.mark.parametrize(
    ("plants", "processes", "reported"),
    [
        pytest.param(QUOTA, 1, "step_000000006.pt: the checkpoint could not be written", marks=T17),
        pytest.param(READ_ONLY, 1, "Read-only file system", marks=T19),
        pytest.param(BROKEN, 1, "No space left on device", marks=T27),
        pytest.param(BROKEN, 2, "No space left on device", marks=T27),
    ],
)
def test_a_checkpoint_that_cannot_be_written_ends_the_run(
    start, tmp_path, plants, processes, reported
):
    settings = [*TOY, *OFTEN, "run.dir=run", "trainer.steps=100000"]
    runs = start.train_group(*settings, processes=processes, plants=plants, code=4)
    assert reported in errors(runs)
    assert saved_step(tmp_path / "run/last.pt") == 3
    assert step_of(tmp_path / "run") < 100
    assert not list((tmp_path / "run").glob(".*.tmp"))


@pytest.mark.fault("T55", "a checkpoint of the first format")
def test_a_file_of_the_first_format_is_refused_as_a_run_and_starts_another(start, tmp_path):
    """Written by version 0.1.0, weights rounded afterwards to make it small."""
    path = tmp_path / "old.pt"
    path.write_bytes(lzma.decompress(FORMAT_1.read_bytes()))
    for settings, tool, key in (
        (["checkpoint=old.pt", "device=cpu", "output=e"], "eval", "checkpoint"),
        (["resume=old.pt"], "train", "resume"),
    ):
        (line,) = start.train(*settings, tool=tool, code=2).stderr().splitlines()
        assert line.startswith(f"error: {key}=old.pt: format 1 of danet 0.1.0; this is danet ")
        assert line.endswith("reads format 3; its weights can start a new run with init_from")
    with pytest.raises(InputError, match="format 1 of danet"):
        danet.load_model(path)
    run = start.train(*TOY, "init_from=old.pt", "run.dir=run")
    assert "of the backbone all" in run.stdout()
    assert checkpoint_format.load(tmp_path / "run/last.pt")["format"] == checkpoint_format.FORMAT
