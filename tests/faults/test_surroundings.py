"""What surrounds a run: memory over time, no network, no home, any language, full log disks."""

import os

import pytest

from danet.checkpoint import format as checkpoint_format
from faults.toy import TOY, fingerprint, lines, pictures, saved_step, step_of

pytestmark = pytest.mark.slow

EMPTY = {"PYTHONDONTWRITEBYTECODE": "1"}
"""As ``env -i``; the one variable keeps bytecode out of the checkout."""


@pytest.mark.fault("T50", "a long run with many evaluations")
def test_memory_does_not_grow(start, tmp_path, figure):
    """DANET_FAULT_SOAK=2000 is the long form: so many steps and as many evaluations."""
    steps = int(os.environ.get("DANET_FAULT_SOAK", "60"))
    every = 1 if steps >= 1000 else 2
    early = steps // 4
    weights = tmp_path / "weights"
    few = ["data.lengths={train:4,val:1,test:1}", "data.batch_size=1"]
    settings = [*TOY, *few, f"trainer.steps={steps}", f"trainer.eval_every={every}", "run.dir=run"]
    plants = {"weigh": {"path": str(weights), "steps": [early, steps]}}
    start.train(*settings, plants=plants, within=1500 if steps >= 1000 else 200)
    before, after = map(float, weights.read_text().split())
    assert after - before < 50
    count = len(lines(tmp_path / "run", "val"))
    figure(f"{steps} steps, {count} evaluations: {after - before:+.1f} MB after step {early}")


@pytest.mark.fault("T51", "no network")
def test_everything_runs_without_a_network(start, tmp_path):
    plants = {"no_network": {}}
    start.start(*TOY, "run.dir=run", "trainer.steps=2", plants=plants).ends(0)
    settings = ["checkpoint=run/last.pt", "device=cpu"]
    start.train(*settings, "output=e", tool="eval", plants=plants)
    start.train(*settings, "count=1", "output=v", tool="visualize", plants=plants)


@pytest.mark.fault("T52", "an empty environment without HOME; a home that may not be written")
@pytest.mark.parametrize("home", ["no HOME", "/proc/nowhere", "home"])
def test_nothing_needs_a_home_or_is_left_in_it(start, straight, tmp_path, home):
    (tmp_path / "home").mkdir()
    where = {} if home == "no HOME" else {"HOME": str(tmp_path / home)}
    run = start.start(*TOY, "run.dir=run", only={**EMPTY, **where, "OMP_NUM_THREADS": "1"})
    run.ends(0)
    assert fingerprint(tmp_path / "run/last.pt") == straight()[0]
    assert list((tmp_path / "home").iterdir()) == []
    left = {p.name for p in tmp_path.iterdir() if not p.name.startswith(".")}
    assert left == {"home", "run"}


LANG_C = {**EMPTY, "LANG": "C", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}


@pytest.mark.fault("T53", "LANG=C, and paths with spaces and Chinese letters")
def test_any_path_serves_in_any_language(start, tmp_path):
    data = pictures(tmp_path / "图 片", train=4, val=2)
    start.start(*data, "run.dir=运 行", "trainer.steps=2", only=LANG_C).ends(0)
    assert saved_step(tmp_path / "运 行/last.pt") == 2
    start.start("resume=运 行/last.pt", only=LANG_C).ends(0)


@pytest.mark.fault("T53", "a Python that is limited to ASCII")
def test_letters_that_python_may_not_read_are_refused_in_one_line(start, tmp_path):
    only = {**LANG_C, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = start.start(*TOY, "run.dir=运 行", only=only)
    run.ends(2)
    (line,) = run.stderr().strip().splitlines()
    assert line.startswith("error: run.dir=\\xe8\\xbf\\x90")
    assert "set PYTHONUTF8=1 in the environment" in line
    assert not (tmp_path / "运 行").exists()


@pytest.mark.fault("T18", "the disk of the log is full")
def test_a_log_that_cannot_be_written_stops_nothing(start, straight, tmp_path):
    full = {"module": "danet.engine.log", "step": 4}
    run = start.train(*TOY, "run.dir=run", plants={"full_disk": full})
    assert run.stderr().count("No space left on device") == 1
    assert fingerprint(tmp_path / "run/last.pt") == straight()[0]


@pytest.mark.fault("T06", "going on with another number of threads")
def test_another_number_of_threads_is_reported_and_changes_little(start, straight, tmp_path):
    start.train(*TOY, "run.dir=run", "trainer.stop_at=6")
    plants = {"call": {"place": "torch.set_num_threads", "arguments": [2]}}
    done = start.train("resume=auto", "run.dir=run", plants=plants)
    assert "resume: 2 thread(s) instead of 1" in done.stdout()
    _, whole = straight()
    one = checkpoint_format.load(whole / "run/last.pt")["model"]
    two = checkpoint_format.load(tmp_path / "run/last.pt")["model"]
    for name, value in one.items():
        # Of a tensor as a whole: where a gradient is nothing but rounding, AdamW moves a weight
        # by its full rate, up or down.
        difference = (two[name].double() - value.double()).norm()
        assert difference <= 1e-3 * value.double().norm(), name
    assert step_of(tmp_path / "run") == 12
