"""Several processes agree, or say why they cannot; jobs do not get into each other's way."""

import json
import signal
import socket
from datetime import timedelta

import pytest
import torch
from torch.nn.functional import cross_entropy

import danet
from danet.checkpoint import format as checkpoint_format
from danet.config.build import checked_config, make_dataset
from faults.toy import TOY, all_end, errors, fingerprint, lines, saved_step, step_of, until

pytestmark = pytest.mark.slow

LIMIT = 30
EVALUATE = "danet.evaluation.evaluate.evaluate"
SHORT = {"place": "danet.distributed.failures.TIMEOUT", "value": timedelta(seconds=5)}


@pytest.mark.fault("T10", "a process dies and nobody restarts it")
@pytest.mark.parametrize(("rank", "during"), [(0, "training"), (1, "training"), (1, "validation")])
def test_the_survivor_ends_soon_and_names_the_dead_process(start, tmp_path, figure, rank, during):
    """The first process keeps the store through which the others find each other."""
    here = tmp_path / "here"
    plants = {"signal_after": {"step": 5, "rank": rank}}
    if during == "validation":
        plants = {"hold": {"place": EVALUATE, "path": str(here), "rank": rank}}
    runs = start.fork_group(*TOY, "run.dir=run", plants=plants)
    if during == "validation":
        until(here.exists, *runs, what="the evaluation")
        runs[rank].kill()
    runs[rank].ends(-signal.SIGKILL)
    survivor = runs[1 - rank]
    seconds = survivor.ends(1, within=LIMIT)
    if rank == 1:
        assert "process 1 of this machine has died" in survivor.stderr()
    assert "the exchange " in survivor.stderr()
    assert "Traceback" not in survivor.stderr()
    figure(f"{seconds:.1f} s")


@pytest.mark.fault("T36", "five pictures for two and for three processes")
@pytest.mark.parametrize("processes", [2, 3])
def test_uneven_shares_are_trained_and_each_counted_once(start, tmp_path, figure, processes):
    data = ["data.lengths={train:5,val:5,test:5}", "data.batch_size=1", "trainer.steps=4"]
    runs = start.train_group(*TOY, *data, "run.name=shares", processes=processes)
    (run,) = (tmp_path / "runs/shares").iterdir()
    assert "".join(r.stdout() for r in runs).count(f"steps 0 to 4 of {processes} images") == 1
    settings = [f"checkpoint={run}/last.pt", "device=cpu"]
    start.train_group(*settings, "output=many", processes=processes, tool="eval")
    start.train(*settings, "output=one", tool="eval")
    one, many = ((tmp_path / n / "confusion.csv").read_text() for n in ("one", "many"))
    assert one == many
    cells = [cell for row in one.splitlines()[1:] for cell in row.split(",")[1:]]
    assert sum(map(int, cells)) == 5 * 64 * 64
    (scored,) = lines(run, "val")
    assert scored["miou"] == json.loads((tmp_path / "one/metrics.json").read_text())["miou"]
    assert scored["loss"] == pytest.approx(validation_loss(run / "last.pt"), rel=1e-5)
    figure(f"confusion matrix of {processes} processes equal to that of one")


def validation_loss(path):
    """Returns the mean of -log p[y] over all pixels of the validation set, in float64."""
    saved, model = checkpoint_format.load(path), danet.load_model(path).double()
    pixels = []
    for image, mask, _ in make_dataset(checked_config(saved, path), "val", training=False):
        with torch.no_grad():
            logits = model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits
        pixels.append(cross_entropy(logits, torch.from_numpy(mask)[None].long(), reduction="none"))
    return float(torch.cat(pixels).mean())


def test_all_processes_end_early_at_the_same_step(start, tmp_path):
    patient = ["trainer.patience=2", "trainer.eval_every=1", "trainer.best_by=loss"]
    runs = start.train_group(*TOY, *patient, "optimizer.lr=0.3", "run.dir=run")
    losses = [line["loss"] for line in lines(tmp_path / "run", "val")]
    best = losses.index(min(losses)) + 1
    step = saved_step(tmp_path / "run/last.pt")
    assert step == len(losses) == best + 2 < 12
    line = f"step {step}: loss did not improve in the last 2 evaluation(s) (best "
    assert "".join(run.stdout() for run in runs).count(line) == 1
    assert saved_step(tmp_path / "run/best.pt") == best
    (again, _) = start.train_group("resume=run/last.pt")
    assert f"this run is finished, at step {step} of 12: loss did not improve" in again.stdout()
    start.train_group("resume=run/last.pt", "trainer.patience=null")
    assert saved_step(tmp_path / "run/last.pt") == 12


@pytest.mark.fault("T37", "validation takes one process longer than exchanges may")
def test_a_slow_validation_is_waited_for(start, tmp_path, figure):
    slow = {"place": EVALUATE, "path": str(tmp_path / "here"), "seconds": 8, "rank": 1}
    plants = {"set_value": SHORT, "hold": slow}
    start.train_group(*TOY, "run.dir=run", "trainer.steps=2", plants=plants)
    assert (tmp_path / "here").exists()
    figure("8 s of validation, 5 s for exchanges")


@pytest.mark.fault("T38", "a process leaves out an exchange")
def test_an_exchange_that_one_does_not_come_to_is_named(start, tmp_path, figure):
    plants = {
        "set_value": {**SHORT, "rank": 0},
        "skip_mean": {"step": 4, "pause": 60.0, "rank": 1},
    }
    first, second = start.fork_group(*TOY, "run.dir=run", plants=plants)
    first.ends(1, within=LIMIT)
    assert "the exchange 'mean of losses' failed" in first.stderr()
    assert "Traceback" not in first.stderr()
    second.kill()
    assert step_of(tmp_path / "run") == 3
    figure("time-out of 5 s; the exchange is named")


@pytest.mark.fault("T38", "a process leaves out an exchange")
def test_processes_that_are_out_of_step_never_go_on(start, tmp_path):
    """The other process takes the next exchange for this one; gloo sees it by the sizes."""
    plants = {"skip_mean": {"step": 4, "rank": 1}}
    runs = start.fork_group(*TOY, "run.dir=run", plants=plants)
    all_end(runs, within=LIMIT)
    assert {run.code() for run in runs} <= {1, -signal.SIGABRT}
    assert step_of(tmp_path / "run") == 3
    assert not (tmp_path / "run/last.pt").exists()


CONFIG = pytest.mark.fault("T39", "another config on one process")
CODE = pytest.mark.fault("T40", "other code or another version on one process")
OTHER_VERSION = {"place": "danet.__version__", "value": "0.0.1"}


@pytest.mark.parametrize(
    ("what", "plant"),
    [
        pytest.param("config", {"extra": {"settings": ["optimizer.lr=0.5"]}}, marks=CONFIG),
        pytest.param("code", {"set_value": OTHER_VERSION}, marks=CODE, id="version"),
        pytest.param("code", {"other_code": {}}, marks=CODE, id="source"),
    ],
)
def test_processes_that_differ_are_refused_at_the_start(start, tmp_path, what, plant):
    plants = {name: {**values, "rank": 1} for name, values in plant.items()}
    runs = start.train_group(*TOY, "run.dir=run", plants=plants, code=2)
    assert errors(runs).count(f"process 1 has another {what} than process 0") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("T41", "the port is taken")
def test_a_port_that_is_taken_is_reported_in_one_line(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}
        run = start.train(*TOY, "run.dir=run", env=env, code=1, within=LIMIT)
    (line,) = run.stderr().strip().splitlines()
    assert line.startswith("error: ")
    assert port in line


BAD_STEPS = {"settings": ["trainer.steps=0"]}
IMPATIENT = {"place": "danet.distributed.error_reporting.REPORT", "value": 1, "rank": 1}


@pytest.mark.fault(
    "T56", "an error of one process alone, or sooner there than in the one that reports it"
)
@pytest.mark.parametrize(
    ("plants", "reported"),
    [
        ({"extra": BAD_STEPS, "hold": {"seconds": 4, "rank": 0}}, "error: trainer.steps=0"),
        ({"extra": BAD_STEPS, "hold": {"seconds": 4, "rank": 1}}, "error: trainer.steps=0"),
        ({"extra": {**BAD_STEPS, "rank": 1}, "set_value": IMPATIENT}, "error: trainer.steps=0"),
        (
            {
                "extra": {"settings": ["optimizer.lr=0.5"], "rank": 1},
                "hold": {"place": "danet.cli.printable", "seconds": 4},
            },
            "process 1 has another config than process 0",
        ),
    ],
    ids=["first late", "second late", "one alone", "slow to tell"],
)
def test_an_error_is_reported_once_by_a_process_that_is_not_ended_before(start, plants, reported):
    run = start.torchrun(*TOY, "run.dir=run", plants=plants)
    run.ends(1, within=LIMIT)
    assert run.stderr().count(reported) == 1


@pytest.mark.fault("T57", "an error of one process, where leaving the group waits for the others")
@pytest.mark.parametrize(
    ("for_users", "reported"), [(True, "error: a planted error"), (False, "LookupError: a planted")]
)
def test_an_error_ends_a_process_that_cannot_leave_the_group(start, for_users, reported):
    fail = {"step": 2, "for_users": for_users, "rank": 1}
    stuck = {"place": "torch.distributed.destroy_process_group", "seconds": 1000, "rank": 1}
    run = start.torchrun(*TOY, "run.dir=run", plants={"fail": fail, "hold": stuck})
    run.ends(1, within=LIMIT)
    assert run.stderr().count(reported) == 1


@pytest.mark.fault("T42", "two jobs at once on one machine")
def test_two_jobs_under_torchrun_do_not_meet(start, straight, tmp_path):
    jobs = [start.torchrun(*TOY, f"run.dir=run{i}") for i in range(2)]
    for job in jobs:
        job.ends(0, within=200)
    expected, _ = straight(processes=2)
    for i in range(2):
        assert fingerprint(tmp_path / f"run{i}/last.pt") == expected


@pytest.mark.fault("T43", "two jobs with the same run.dir")
def test_a_folder_belongs_to_one_job_until_that_ends_in_any_way(start, tmp_path):
    endless = [*TOY, "run.dir=run", "trainer.steps=100000", "data.num_workers=2"]
    first = start.fork(*endless, "trainer.save_every=2")
    until(lambda: (tmp_path / "run/last.pt").exists(), first, what="a checkpoint")
    refused = start.train(*endless, "resume=auto", code=2)
    assert f"run.dir=run: another process trains here (process {first.pid} on" in refused.stderr()
    assert first.code() is None
    first.kill()
    until(lambda: first.code() is not None, what="the end")
    step = saved_step(tmp_path / "run/last.pt")
    start.train("run.dir=run", "resume=auto", f"trainer.stop_at={step + 2}")
    assert saved_step(tmp_path / "run/last.pt") == step + 2


@pytest.mark.fault("T44", "batch statistics that differ between the processes")
def test_all_processes_evaluate_the_network_that_is_saved(start, tmp_path, figure):
    plants = {"record": {"folder": str(tmp_path), "means_after": 11}}
    # With the statistics of all processes there would be no difference.
    start.train_group(*TOY, "trainer.sync_batchnorm=false", "run.dir=run", plants=plants)

    def statistics(moment):
        return [torch.load(tmp_path / f"means-{moment}-{rank}.pt") for rank in (0, 1)]

    first, second = statistics("training")
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert differing
    # They are shared for the evaluation, after which nothing is trained.
    first, second = statistics("end")
    saved = checkpoint_format.load(tmp_path / "run/last.pt")["model"]
    for name in first:
        assert torch.equal(saved[name], first[name])
        assert torch.equal(second[name], first[name])
    start.train("checkpoint=run/last.pt", "device=cpu", "output=one", tool="eval")
    (scored,) = lines(tmp_path / "run", "val")
    assert scored["miou"] == json.loads((tmp_path / "one/metrics.json").read_text())["miou"]
    figure(f"{len(differing)} of {len(first)} differ in training; mIoU equal with 1 process")


@pytest.mark.fault("T45", "the same command twice")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_command_gives_the_same_losses_to_the_bit(
    start, straight, tmp_path, processes, figure
):
    start.train_group(*TOY, "run.dir=run", processes=processes)
    expected, folder = straight(processes=processes)
    mine, others = ([line["loss"] for line in lines(f / "run")] for f in (tmp_path, folder))
    assert len(mine) == 12
    assert mine == others
    assert fingerprint(tmp_path / "run/last.pt") == expected
    figure("12 of 12 losses and SHA-256 equal")
