"""A training meets what is not healthy by rule: skips it, names it, goes on, or stops."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, batch, no_waiting
from conftest import make_trainer as make
from test_config import compose
from torch import nn
from torch.utils.data import get_worker_info

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import run_folder
from danet.config import resume
from danet.config.schema import DataConfig
from danet.config.validate import check
from danet.data import bad_samples, workers
from danet.data.bad_samples import BadSamples, SkipBadSamples
from danet.data.loader import eval_batches, train_batches
from danet.data.sampler import StepSampler
from danet.distributed import collectives
from danet.distributed.agreement import wait_patiently
from danet.distributed.device import choose_device
from danet.distributed.failures import is_alive
from danet.distributed.rendezvous import process_group
from danet.engine.log import RunLog
from danet.engine.nonfinite import NonFiniteGuard
from danet.engine.throughput import Throughput
from danet.engine.trackers import TensorBoard
from danet.engine.train_step import TrainStep
from danet.errors import DivergedError, InputError, ProcessError, StorageError
from danet.preflight import out_of_memory
from danet.seeds import mix
from danet.types import Sample, SampleKey

# Bad samples


class Pictures:
    """Samples that show their key; some cannot be read."""

    def __init__(self, length=40, bad=()):
        self.length = length
        self.bad = set(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, draw):
        item, seed = draw if isinstance(draw, tuple) else (draw, 0)
        if item in self.bad:
            raise InputError(f"picture_{item}.png: not a readable image")
        image = np.full((4, 4, 3), seed % 251, np.uint8)
        return Sample(image, np.zeros((4, 4), np.uint8), f"picture_{item}")


def content(batches, count):
    return [(b.name, b.image.flatten().tolist()) for b in itertools.islice(batches, count)]


def skipped(bad, *, length=40, told=None, **settings):
    settings = {"batch_size": 4, "seed": 7, "max_bad_share": 1.0, **settings}
    told = [] if told is None else told
    data = Pictures(length, bad)
    return train_batches(data, on_bad_sample="skip", warn=told.append, **settings)


def literally(bad, length, count):
    """Draws and replacements as the documentation says them, one by one."""
    batches = []
    for draws in itertools.islice(StepSampler(length, 4, seed=7), count):
        names = []
        for item, seed in draws:
            while item in bad:
                item, seed = mix(seed, 2) % length, mix(seed, 3)
            names.append(f"picture_{item}")
        batches.append(tuple(names))
    return batches


def test_a_bad_sample_is_replaced_by_one_that_follows_from_the_draw():
    bad = {3, 11, 12, 30}
    found = [names for names, _ in content(skipped(bad), 25)]
    assert found == literally(bad, 40, 25)
    assert found != literally(set(), 40, 25)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_skips_can_be_resumed_with_any_number_of_workers(num_workers):
    whole = content(skipped({3, 11}), 14)
    assert content(skipped({3, 11}, start=6, num_workers=num_workers), 8) == whole[6:]


def test_other_samples_and_other_processes_notice_nothing():
    with_bad = content(skipped({3}), 10)
    without = content(train_batches(Pictures(), batch_size=4, seed=7), 10)
    touched = ["picture_3" in names for names, _ in without]
    assert 0 < sum(touched) < 10
    for (found, _), (wanted, _), is_touched in zip(with_bad, without, touched, strict=True):
        kept = [f == w for f, w in zip(found, wanted, strict=True)]
        assert sum(kept) == 4 - is_touched


@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_bad_sample_is_told_once_and_counted_every_time(num_workers):
    told = []
    batches = skipped({3, 11}, told=told, num_workers=num_workers)
    assert batches.count() == {"bad_samples": 0}
    content(batches, 30)  # three epochs
    assert sorted(told) == [
        f"skipped, another sample takes its place: picture_{i}.png: not a readable image"
        for i in (11, 3)
    ]
    assert batches.count()["bad_samples"] >= 6
    assert sorted(batches.bad.reasons) == [3, 11]


def test_three_bad_samples_are_forgiven_and_then_the_share_counts():
    told = []
    bad = BadSamples(1000, 0.01, told.append)
    one = [bad_samples.BadSample(i, f"file {i}") for i in range(12)]
    bad.record(10, tuple(one[:3]))
    bad.record(10, (one[0],) * 50)  # the same again is no further one
    with pytest.raises(InputError) as error:
        bad.record(10, (one[3],))
    assert "4 of 30 samples seen cannot be read, more than data.max_bad_share=0.01" in str(
        error.value
    )
    assert str(error.value).endswith("file 0\n  file 1\n  file 2\n  file 3")
    many = BadSamples(1000, 0.01, told.append)
    many.record(900, tuple(one[:9]))
    many.record(100, (one[9],))
    with pytest.raises(InputError):
        many.record(5000, (one[10],))  # epochs do not make the data set larger


def test_too_many_bad_samples_stop_a_loader():
    batches = skipped(set(range(0, 100, 20)), length=100, max_bad_share=0.01)
    with pytest.raises(InputError, match=r"samples seen cannot be read(.|\n)*picture_40.png"):
        content(batches, 25)


def test_storage_that_is_gone_stops_at_once_and_says_so():
    with pytest.raises(InputError, match="21 samples in a row cannot be read; is the storage"):
        SkipBadSamples(Pictures(bad=range(40)))[SampleKey(0, 1)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_without_skipping_a_bad_sample_is_an_error(num_workers):
    batches = train_batches(Pictures(bad={3}), batch_size=4, seed=7, num_workers=num_workers)
    with pytest.raises(InputError, match=r"^picture_3.png: not a readable image$"):
        content(batches, 10)
    assert batches.count() == {}


def test_evaluation_never_skips():
    with pytest.raises(InputError, match=r"^picture_3.png: not a readable image$"):
        list(eval_batches(Pictures(8, bad={3}), batch_size=2))


def test_the_summary_names_each_once():
    assert bad_samples.summary([{}, {}]) == []
    assert bad_samples.summary([{5: "e", 2: "b"}, {5: "e"}]) == [
        "2 sample(s) could not be read and were replaced by others:",
        "  b",
        "  e",
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"on_bad_sample": "ignore"}, "data.on_bad_sample=ignore: expected error or skip"),
        ({"max_bad_share": 1.5}, "data.max_bad_share=1.5: expected a share between 0 and 1"),
        ({"max_bad_share": "x"}, "data.max_bad_share=x: expected a share between 0 and 1"),
        ({"timeout": -1}, "data.timeout=-1: expected seconds, or 0 to wait for ever"),
        ({"timeout": math.nan}, "data.timeout=nan: expected seconds, or 0 to wait for ever"),
    ],
)
def test_a_wrong_setting_of_loading_is_named(change, line):
    node = {"dataset": {}, "transforms": {}, "num_classes": 2}
    good = DataConfig(**node, train_split="a", val_split="b", on_bad_sample="skip", timeout=0)
    assert good.errors() == []
    assert dataclasses.replace(good, **change).errors() == [line]


# Workers


class Hurting(Pictures):
    """Does something to the worker that reads item 5."""

    def __init__(self, action):
        super().__init__(8)
        self.action = action

    def __getitem__(self, draw):
        item = draw[0] if isinstance(draw, tuple) else draw
        if item == 5 and get_worker_info() is not None:
            self.action()
        return super().__getitem__(draw)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(60)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_worker_that_is_killed_is_told_with_what_it_read(kind):
    since = time.monotonic()
    if kind == "training":
        batches = train_batches(Hurting(die), batch_size=2, seed=0, num_workers=2)
    else:
        batches = iter(eval_batches(Hurting(die), batch_size=2, num_workers=2))
    with pytest.raises(ProcessError) as error:
        list(itertools.islice(batches, 8))
    assert time.monotonic() - since < 60, "usually 1 s; else it would wait for ever"
    assert "is killed by signal: Killed; if nobody did that, the memory was full" in str(
        error.value
    )
    assert "being read were " in str(error.value)
    assert "sample 5" in str(error.value)
    # The others end at once, too, although ``error`` still refers to the loader.
    for reader in multiprocessing.active_children():
        reader.join(20)
        assert not reader.is_alive()


def test_a_worker_that_died_unheard_is_noticed_at_the_next_batch():
    """What torch raises may be lost, in a destructor or where errors of others are forgiven."""
    others = set(multiprocessing.active_children())
    batches = train_batches(Pictures(8), batch_size=2, seed=0, num_workers=1, timeout=100)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - others
    with contextlib.suppress(RuntimeError):
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
        time.sleep(0.1)
    with pytest.raises(ProcessError, match=f"process {reader.pid}.* is killed by signal: Killed"):
        list(itertools.islice(batches, 20))


@pytest.mark.slow
def test_a_worker_that_hangs_is_told_when_the_time_is_up():
    batches = train_batches(Hurting(hang), batch_size=2, seed=0, num_workers=1, timeout=5)
    with pytest.raises(ProcessError, match=r"within data.timeout=5 seconds.*waited for .*sample 5"):
        list(itertools.islice(batches, 8))


class Asking(Pictures):
    """Names its samples after the state of the process that reads them."""

    def __getitem__(self, draw):
        found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1), os.getpgrp()
        return super().__getitem__(draw)._replace(name=repr(tuple(map(int, found))))


def test_a_worker_ignores_signals_meant_for_the_trainer():
    batch_ = next(train_batches(Asking(), batch_size=2, seed=0, num_workers=1))
    interrupt, user, group = eval(batch_.name[0])
    assert (interrupt, user) == (signal.SIG_IGN, signal.SIG_IGN)
    assert group != os.getpgrp(), "a signal to the trainer's group does not reach it"


def test_errors_about_other_things_are_not_taken_for_a_worker_s():
    assert workers.explain(RuntimeError("mat1 and mat2 shapes"), [], 0) is None
    several = RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly")
    assert "(process 12, 13) exited unexpectedly; being read were a, b" in str(
        workers.explain(several, ["a", "b"], 0)
    )
    unknown = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    told = workers.explain(unknown, [], 0, {12: -9, 13: None})
    assert "(process 12) is killed by signal: Killed; if nobody" in str(told)
    bus = RuntimeError("DataLoader worker (pid 12) is killed by signal: Bus error. It is possible")
    assert "killed by signal: Bus error; shared memory was full" in str(workers.explain(bus, [], 0))


_ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_health import Pictures
from danet.data.loader import train_batches
batches = train_batches(Pictures(), batch_size=2, seed=0, num_workers=2)
next(batches)
print("ready", flush=True)
time.sleep(60)
"""


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_worker_outlives_its_trainer():
    process = subprocess.Popen(
        [sys.executable, "-c", _ORPHANS, str(ROOT / "tests")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    process.stdout.readline()
    readers = children(process.pid)
    assert len(readers) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_alive, readers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in readers if is_alive(pid)] == []


# Losses and weights


def test_the_first_loss_that_is_not_finite_is_named_with_its_samples(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    for step, value in ((4, 1.0), (5, math.inf), (6, math.nan), (7, 1.0)):
        with no_waiting():
            guard.append(step, [f"{step}_{i}" for i in range(10)], {"main": torch.full((), value)})
    with pytest.raises(DivergedError) as error:
        guard.check()
    assert str(error.value) == (
        "step 5: the loss is not finite (inf) on process 0 of 1; its samples: 5_0, 5_1, 5_2, 5_3, "
        "5_4, 5_5, 5_6, 5_7 and 2 more; to see it again: python tools/train.py "
        f"--config-dir {tmp_path} --config-name config run.dir=null trainer.stop_at=5"
    )


def test_a_look_returns_the_latest_terms_and_forgets(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    for step in range(3):
        guard.append(step, ["a"], {"main": torch.tensor(float(step)), "aux": torch.tensor(0.5)})
    assert guard.check() == {"main": 2.0, "aux": 0.5}
    guard.append(3, ["a"], {"main": torch.tensor(9.0)})
    assert guard.check() == {"main": 9.0}


def poisoned(run, at):
    """Lets the loss of a step be NaN."""
    parts = run.train_step.criterion.parts

    def poison(output, mask):
        terms = parts(output, mask)
        factor = math.nan if run.step == at else 1.0
        return {k: [p._replace(total=p.total * factor) for p in v] for k, v in terms.items()}

    run.train_step.criterion.parts = poison
    return run


def test_a_run_that_diverges_between_two_logs_names_the_step_and_saves_nothing(tmp_path):
    run = poisoned(make(tmp_path, steps=20, log_every=20, save_every=3, eval_every=20), at=3)
    with pytest.raises(DivergedError, match=r"step 4: the loss is not finite \(nan\).*a, b, a, b"):
        run.fit(map(batch, itertools.count()))
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == 3
    assert run.step == 6, "noticed before the next checkpoint"
    named = f"resume={tmp_path / 'last.pt'} trainer.stop_at=4"
    guard = NonFiniteGuard(tmp_path)
    assert guard.replay(4).endswith(named)


@pytest.mark.parametrize("place", ["weight", "running_var"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_never_saved_nor_scored(tmp_path, place, value):
    run = make(tmp_path)
    getattr(run.train_step.model.backbone.first[1], place).data[1] = value
    with pytest.raises(DivergedError) as error:
        run.save()
    named = f"step 0: 1 of 4 values of backbone.first.1.{place} are not finite on process 0 of 1"
    assert str(error.value).startswith(named)
    assert list(tmp_path.glob("*.pt")) == []


def test_large_weights_are_finite(tmp_path):
    model = nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    NonFiniteGuard(tmp_path).require_finite(model, 1, on_all=True)


# Storage


class Steps(set):
    """Steps whose checkpoints fail; ``failed`` has those that have failed."""

    def __init__(self):
        super().__init__()
        self.failed = []


@pytest.fixture
def full_disk(monkeypatch):
    """Returns the steps whose checkpoints fail."""
    failing, save = Steps(), checkpoint_format.save

    def fail(path, content):
        if content["step"] in failing:
            failing.failed.append(content["step"])
            raise StorageError(f"{path}: the disk is full")
        save(path, content)

    monkeypatch.setattr(checkpoint_format, "save", fail)
    return failing


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_checkpoint_stops_the_run_at_the_next_step(
    tmp_path, full_disk, in_background, monkeypatch
):
    full_disk.add(2)
    run = make(tmp_path, steps=30, eval_every=30, save_every=2, save_in_background=in_background)
    update = TrainStep.__call__

    def slowly(self, group, step):
        deadline = time.monotonic() + 60
        while step == 2 and not full_disk.failed and time.monotonic() < deadline:
            time.sleep(0.01)  # the thread is not slower than a step
        return update(self, group, step)

    monkeypatch.setattr(TrainStep, "__call__", slowly)
    with pytest.raises(StorageError, match=r"step_000000002.pt: the disk is full"):
        run.fit(map(batch, itertools.count()))
    assert run.step <= 3


def test_a_failed_checkpoint_may_be_only_told(tmp_path, full_disk, capfd):
    full_disk |= {2, 6}
    run = make(tmp_path, steps=8, save_every=2, on_storage_error="warn")
    run.fit(map(batch, itertools.count()))
    said = capfd.readouterr().err
    assert said.count("the disk is full; the training goes on") == 2
    assert checkpoint_format.load(tmp_path / "last.pt")["step"] == 8


@pytest.mark.parametrize("policy", ["stop", "warn"])
def test_the_last_checkpoint_must_be_written(tmp_path, full_disk, policy):
    full_disk.add(4)
    run = make(tmp_path, steps=4, on_storage_error=policy)
    with pytest.raises(StorageError, match=r"step_000000004.pt: the disk is full"):
        run.fit(map(batch, itertools.count()))


def test_a_log_on_a_full_disk_warns_once_and_goes_on(tmp_path, monkeypatch, capfd):
    log = RunLog(tmp_path, step=0, steps=9)
    log.scalars(1, "train", {"loss": 1.0})

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("builtins.open", refuse)
        full.setattr(TensorBoard, "scalars", refuse)
        log.scalars(2, "train", {"loss": 1.0})
        log.scalars(3, "train", {"loss": 1.0})
    log.scalars(4, "train", {"loss": 1.0})
    log.close()
    assert capfd.readouterr().err.count("the log cannot be written (No space left on device)") == 1
    lines = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if line]
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_half_lines_within_a_log_are_dropped_when_it_goes_on(tmp_path):
    good = '{"step": 1, "kind": "train"}\n{"step": 2, "ki\n{"step": 3, "kind": "train"}\n[1]\n'
    (tmp_path / "metrics.jsonl").write_text(good)
    RunLog(tmp_path, step=5, steps=9).close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


# Resuming


def test_another_number_of_threads_is_told():
    assert resume.compare_threads({"threads": torch.get_num_threads()}, "cpu") == []
    assert resume.compare_threads({}, "cpu") == []
    (line,) = resume.compare_threads({"threads": 7}, "cpu")
    assert "1 thread(s) instead of 7" in line


@pytest.mark.parametrize("key", ["training_set", "validation_set"])
def test_other_data_are_refused_and_allowed_on_purpose(key):
    before = {"training_set": "Folder train, 9 samples, x", "validation_set": "Folder val, 5, abc"}
    saved = {**before, "best_miou": 0.5, "best": [[0.5, 3]], "scores": {"miou": 0.4}}
    assert resume.compare_data(saved, before, allowed=False) == []
    assert resume.compare_data({}, before, allowed=False) == []
    now = {**before, key: "Folder, 6, abd"}
    told = (
        rf"{key.replace('_', ' ')} was {before[key]}, now it is Folder, 6, abd; allow_changes=true"
    )
    with pytest.raises(InputError, match=told):
        resume.compare_data(saved, now, allowed=False)
    (line,) = resume.compare_data(saved, now, allowed=True)
    assert "allow_changes=true" in line
    # A score on other pictures is no best to be beaten.
    assert (saved["best_miou"] is None) is (key == "validation_set")
    assert (saved["best"] == []) is (key == "validation_set")


def test_changes_are_allowed_but_for_network_and_optimizer():
    old = {"loss": {"a": 1}, "optimizer": {"lr": 1.0}, "trainer": {"ema_decay": None}}
    new = {"loss": {"a": 2}, "optimizer": {"lr": 1.0}, "trainer": {"ema_decay": None}}
    compare = functools.partial(resume.compare_settings, Path("x.pt"), old)
    with pytest.raises(InputError, match=r"loss.a: 1 in the checkpoint, 2 now\nallow_changes=true"):
        compare({**new, "allow_changes": False})
    (line,) = compare({**new, "allow_changes": True})
    assert "loss.a: 1 in the checkpoint, 2 now" in line
    for fixed in ({"optimizer": {"lr": 2.0}}, {"trainer": {"ema_decay": 0.9}}):
        with pytest.raises(InputError, match="init_from"):
            compare({**new, **fixed, "allow_changes": True})


def test_a_folder_keeps_the_name_of_its_run(tmp_path):
    prepare = functools.partial(run_folder.prepare, fallback=tmp_path / "x", config={"seed": 1})
    names = [run_folder.id_of(prepare(str(tmp_path / n), resuming=False)) for n in "ab"]
    assert len(set(names)) == 2
    assert all(len(name) == 32 for name in names)
    prepare(str(tmp_path / "a"), resuming=True)
    assert run_folder.id_of(tmp_path / "a") == names[0]
    saved = {"run_id": names[0], "step": 3}
    run_folder.refuse_foreign(tmp_path / "a", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "new", tmp_path / "a/last.pt", saved)
    run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", {"step": 3})  # an old one
    with pytest.raises(
        InputError, match=f"of run {names[0]}, but run.dir=.*/b is of run {names[1]}"
    ):
        run_folder.refuse_foreign(tmp_path / "b", tmp_path / "b/last.pt", saved)
    prepare(str(tmp_path / "new"), resuming=True, saved=saved)
    assert run_folder.id_of(tmp_path / "new") not in ("", *names), "another run from there on"


# Memory and pace


def test_a_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**52, dtype=torch.uint8)
    assert out_of_memory.is_shortage(error.value)
    assert out_of_memory.is_shortage(MemoryError())
    assert out_of_memory.is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory.is_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_lack_of_memory_is_told_with_sizes_that_would_fit():
    config = check(compose(*TINY))
    device = torch.device("cpu")
    message = str(out_of_memory.explain(config, device, 2**50, training=True))
    assert "a step of data.batch_size=2 with 48 x 96 needs about" in message
    assert "largest batch of this size that would fit: 1," in message, "however much was free"
    message = str(out_of_memory.explain(config, device, 2**20, training=True))
    assert "would fit: none, largest crop of this batch: none" in message
    assert "evaluation=sliding" in str(out_of_memory.explain(config, device, 0, training=False))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_more_processes_than_devices_are_refused_by_all_of_them(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"3 processes on a machine with 2 CUDA device"):
        choose_device("auto")
    if number < 2:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert choose_device("auto") == torch.device("cuda", number)


def test_pace_counts_the_images_of_all_processes_and_the_wait(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    throughput = Throughput(torch.device("cpu"))
    for _ in range(4):
        throughput.update(0.5, 6)
        clock[0] += 2.0
    values = throughput.reset()
    assert values["images_per_second"] == pytest.approx(3 * 24 / 8)
    assert values["data_waiting"] == pytest.approx(0.25)
    assert 0.05 < values["memory_gib"] < 100
    clock[0] += 1.0
    assert throughput.reset()["images_per_second"] == 0


def test_every_line_of_the_log_has_pace_memory_and_counters(tmp_path):
    run = make(tmp_path, steps=2, log_every=1, count=lambda: {"bad_samples": 2})
    run.fit(map(batch, itertools.count()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["kind"] == "train"):
        assert line["images_per_second"] > 0
        assert line["memory_gib"] > 0
        assert line["bad_samples"] == 2


# Several processes


def join(rank, folder, work):
    """Is one of two processes; writes down what it was told in the end."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()},
    }
    try:
        with process_group(torch.device("cpu")):
            work(rank, Path(folder))
    except (DivergedError, ProcessError) as error:
        (Path(folder) / f"told {rank}").write_text(str(error))


@pytest.fixture
def two(tmp_path):
    """Returns a function that runs work in two processes; it returns what both were told."""

    def run(work):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (tmp_path / "port").write_text(str(free.getsockname()[1]))
        context = torch.multiprocessing.get_context("spawn")
        both = [context.Process(target=join, args=(r, str(tmp_path), work)) for r in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
            assert process.exitcode is not None, "it hangs"
        told = [tmp_path / f"told {rank}" for rank in range(2)]
        return [path.read_text() if path.exists() else "" for path in told]

    return run


def diverge(rank, folder):
    run = make(folder, steps=20, log_every=10, eval_every=20)
    if rank == 1:
        poisoned(run, at=3)
    run.fit(map(batch, itertools.count(100 * rank)))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_ends_both_with_one_message(two):
    told = two(diverge)
    assert told[0] == told[1]
    assert told[0].startswith("step 4: the loss is not finite (nan) on process 1 of 2; its samples")


def dawdle(rank, folder):
    if rank == 1:
        time.sleep(8)
    wait_patiently("the slow one")
    counts = torch.ones(2)
    collectives.sum_in_place(counts)
    (folder / f"sum {rank}").write_text(str(counts.tolist()))


def dawdle_within_five_seconds(rank, folder):
    collectives.dist.distributed_c10d._get_default_group()._get_backend(
        torch.device("cpu")
    )._set_default_timeout(timedelta(seconds=5))
    dawdle(rank, folder)


@pytest.mark.slow
def test_a_process_may_evaluate_longer_than_an_exchange_waits(two, tmp_path):
    assert two(dawdle_within_five_seconds) == ["", ""]
    assert [(tmp_path / f"sum {rank}").read_text() for rank in range(2)] == ["[2.0, 2.0]"] * 2


def die_or_sum(rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.sum_in_place(torch.ones(2))


def die_or_wait(rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_patiently("the dead one")


@pytest.mark.slow
@pytest.mark.parametrize("work", [die_or_sum, die_or_wait])
def test_a_process_that_died_is_named(two, work):
    told = two(work)
    assert "process 0 of 2: the exchange" in told[0]
    assert "failed: process 1 of this machine has died" in told[0]
