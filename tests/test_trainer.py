"""A step updates as it says, waits for nothing, and is the same compiled, resumed, recomputed."""

import copy
import functools
import itertools
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, K, Tiny, batch, call, no_waiting, plant, scored, tiny
from conftest import make_trainer as make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from danet.checkpoint import format as checkpoint_format
from danet.distributed import collectives
from danet.distributed.data_parallel import ignore_unused_parameters
from danet.engine.best import how_it_ended
from danet.engine.ema import ModelEMA
from danet.engine.optimizer import SGD, AdamW
from danet.engine.precision import compiled
from danet.engine.settings import TrainSettings
from danet.errors import DivergedError, InputError, Interrupted
from danet.evaluation.metrics import ConfusionMatrix
from danet.models.heads.dual import DualAttentionHead, FCNHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor


def danet(recompute=(), depth=18):
    torch.manual_seed(0)
    head = functools.partial(DualAttentionHead, num_classes=K, reduction=2)
    return Segmentor(ResNet(depth=depth, width=8, recompute=recompute), head)


def train(run, steps):
    """Trains; returns the loss terms of every step."""
    run.train_step.ddp_model.train()
    terms = []
    for _ in range(steps):
        terms.append(run.train_step([batch(2 * run.step), batch(2 * run.step + 1)], run.step))
        run.step += 1
    return terms


def state(run):
    """Returns every number that a checkpoint of the run would hold, by name."""
    average = run.train_step.ema.state_dict() if run.train_step.ema is not None else {}
    moments = run.train_step.optimizer.state_dict()["state"]
    return {
        **{f"model.{k}": v.clone() for k, v in run.train_step.model.state_dict().items()},
        **{f"ema.{k}": v.clone() for k, v in average.items()},
        **{f"{i}.{k}": v.clone() for i, s in moments.items() for k, v in s.items()},
    }


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


def saved_by(run, folder):
    """Saves a checkpoint and reads it."""
    run.save()
    assert run.checkpoints.finish() is None
    return checkpoint_format.load(folder / "last.pt")


# No waiting


def test_what_waits_is_recognised():
    x = torch.arange(3.0)
    for wait in (x.tolist, x.any().__bool__, lambda: x[x > 0], lambda: x + torch.tensor(1.0)):
        with pytest.raises(AssertionError, match="waits for the device"), no_waiting():
            wait()


@pytest.mark.parametrize("recipe", [SGD(0.1), AdamW(0.1)], ids=lambda r: type(r).__name__)
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled as for float16"])
def test_a_step_never_waits_for_the_device(tmp_path, recipe, scaled):
    run = make(tmp_path, danet(recompute=[2]), optimizer=recipe, ema_decay=0.9)
    run.train_step.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(3):
        group = [batch(2 * run.step), batch(2 * run.step + 1)]
        with no_waiting():
            run.train_step(group, run.step)
        run.step += 1


# Optimizers


@pytest.mark.fault("T67", "float16 overflows in every step")
@pytest.mark.parametrize(("steps", "every", "seen"), [(200, 7, 35), (5, 5, 5)])
def test_steps_that_all_overflow_end_the_run_and_change_nothing(tmp_path, steps, every, seen):
    run = make(tmp_path, steps=steps, log_every=every, eval_every=steps, clip_norm=None)
    run.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=math.inf)
    before = state(run)
    reported = f"the gradients of the last {seen} steps were too large"
    with pytest.raises(DivergedError, match=reported):
        run.fit(batch(number) for number in itertools.count())
    assert run.step == seen  # the first look after the thirtieth step, or the last one
    assert DivergedError.exit_code == 3
    for name, value in before.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(value, state(run)[name]), name
    if steps == 200:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["skipped"] for line in lines] == [7, 14, 21, 28]
    assert not list(tmp_path.glob("*.pt"))


def test_a_resumed_run_goes_on_counting_skipped_steps(tmp_path):
    run = make(tmp_path, steps=20, clip_norm=None)
    run.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(8):
        if step in (2, 3, 5):
            run.train_step.scaler._scale = torch.tensor(math.inf)
        train(run, 1)
        run.train_step.scaler._scale = torch.tensor(8.0)
        rate = run.train_step.schedule(step, 20)
        for group in run.train_step.optimizer.param_groups:
            assert group["lr"] == group["base_lr"] * rate
    saved = saved_by(run, tmp_path)
    assert saved["skipped"] == 3
    again = make(tmp_path / "again", steps=20, clip_norm=None)
    again.load_state(saved)
    assert again.train_step.overflows[0] == 3


# Moving average


def test_the_moving_average_is_that_of_torch_under_the_same_names():
    model, decay = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), 0.9
    ours, average = ModelEMA(model, decay), get_ema_multi_avg_fn(decay)
    theirs = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for step in range(4):
        model[0].weight.data.normal_()
        model[1].running_mean.normal_()
        model[1].num_batches_tracked.add_(1)
        ours.update(model, is_first=step == 0)
        theirs.update_parameters(model)
    # torch averages counters as well; ours are copies.
    theirs.module[1].num_batches_tracked.fill_(4)
    assert_equal(dict(ours.state_dict()), dict(theirs.state_dict()))


# Recomputing


@pytest.mark.parametrize(("depth", "stages"), [(18, [1]), (18, [3, 4]), (50, [1, 2, 3, 4])])
def test_recomputing_trains_to_the_same_bits(tmp_path, depth, stages):
    plain, again = (make(tmp_path / str(s), danet(s, depth)) for s in ([], stages))
    train(plain, 2), train(again, 2)
    assert_equal(state(again), state(plain))
    assert again.train_step.model.backbone.bn1.num_batches_tracked == 4


# What is saved when


def test_a_step_is_saved_before_it_is_evaluated(tmp_path):
    run = make(tmp_path, steps=4, eval_every=2)

    def fail(network, step):
        raise InputError("a mask is damaged")

    run.evaluate = fail
    with pytest.raises(InputError, match="a mask is damaged"):
        run.fit(map(batch, itertools.count()))
    saved = checkpoint_format.load(tmp_path / "last.pt")
    assert (saved["step"], saved["evaluated_at"], saved["scores"]) == (2, 0, None)
    again = make(tmp_path, steps=4, eval_every=2, resume=saved)
    again.fit(map(batch, itertools.count(4)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "val"] == [2, 4]
    assert checkpoint_format.load(tmp_path / "last.pt")["evaluated_at"] == 4


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [0, 1, 2, 3, 4]), (60.0, [4]), (None, [4])])
def test_a_run_is_saved_when_it_was_not_for_long(tmp_path, minutes, steps):
    run = make(tmp_path, steps=4, eval_every=4, save_minutes=minutes, keep_last=9)
    run.fit(map(batch, itertools.count()))
    assert [int(p.stem[5:]) for p in sorted(tmp_path.glob("step_*.pt"))] == steps


# Which score is the best, and when a run ends early

NEVER, SEQUENCES = (
    None,
    [
        [5, 4, 3, 2, 1, 0.9, 0.8, 0.7],
        [5, 4, 4, 4, 3, 3.5, 3.5, 3.5],
        [1, 2, 3, 4, 5, 6, 7, 8],
        [math.nan, 3, math.inf, math.nan, 2, 2, 2, 2],
        [math.nan] * 8,
        [4, 5, 3, 3, 4, 2, 3, 3],
    ],
)


def literal_end(losses, patience):
    """Returns the step at which a run ends that evaluates each of its 8 steps, by its losses."""
    for step in range(1, 9):
        known = [x if math.isfinite(x) else math.inf for x in losses[:step]]
        since = step - (known.index(min(known)) + 1 if math.isfinite(min(known)) else 0)
        if since == patience:
            return step
    return 8


def scripted(folder, losses, **settings):
    """Returns a run whose evaluations have these losses, one at each step."""
    settings = {"accumulate": 1, "eval_every": 1, "best_by": "loss", **settings}
    evaluate = lambda network, step: (scored()[0], losses[step - 1])  # noqa: E731
    return make(folder, evaluate=evaluate, **settings)


def ended(folder):
    """Returns the last checkpoint of a run, and the steps that its log says were evaluated."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "val"]
    return checkpoint_format.load(folder / "last.pt"), steps


@pytest.mark.parametrize("patience", [NEVER, 1, 2, 3])
@pytest.mark.parametrize("losses", SEQUENCES, ids=str)
def test_a_run_ends_when_its_patience_does(tmp_path, capsys, losses, patience):
    run = scripted(tmp_path, losses, patience=patience)
    run.fit(map(batch, itertools.count()))
    saved, steps = ended(tmp_path)
    wanted = literal_end(losses, patience)
    assert saved["step"] == run.step == wanted
    assert steps == list(range(1, wanted + 1))
    finite = [x for x in losses[:wanted] if math.isfinite(x)]
    assert saved["best_score"] == min(finite, default=None)
    assert (tmp_path / "best.pt").exists() == bool(finite)
    if finite:
        best = checkpoint_format.load(tmp_path / "best.pt")
        assert best["step"] == saved["best_step"] == losses.index(min(finite)) + 1
    said = capsys.readouterr().out
    assert ("stopped early, trainer.patience" in said) == (wanted < 8)
    if (losses, patience) == (SEQUENCES[1], 2):
        line = "loss did not improve in the last 2 evaluation(s) (best 4.0000 at step 2)"
        assert f"step 4: {line}; stopped early, trainer.patience\n" in said


@pytest.mark.parametrize("signalled", range(1, 7))
def test_a_run_interrupted_after_any_step_ends_early_like_a_whole_one(tmp_path, signalled):
    losses, settings = [9, 3, 9, 4, 9, 5, 9, 6], {"patience": 2, "eval_every": 2, "ema_decay": 0.9}
    whole = scripted(tmp_path / "whole", losses, **settings)
    whole.fit(map(batch, itertools.count()))
    assert whole.step == 6

    def interrupting():
        for number in itertools.count():
            if number == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch(number)

    cut = scripted(tmp_path / "cut", losses, **settings)
    if signalled < 6:
        with pytest.raises(Interrupted):
            cut.fit(interrupting())
    else:
        cut.fit(interrupting())
    saved, _ = ended(tmp_path / "cut")
    assert saved["step"] == min(signalled + 1, 6)
    if not how_it_ended(saved, cut.settings):
        again = scripted(tmp_path / "cut", losses, resume=saved, **settings)
        again.fit(map(batch, itertools.count(saved["step"])))
    (one, evaluated), (other, again) = ended(tmp_path / "whole"), ended(tmp_path / "cut")
    assert evaluated == again == [2, 4, 6]
    for name in ("model", "ema"):
        assert_equal(one[name], other[name])
    same = ("step", "best_score", "best_step", "evaluations_since_best", "scores", "best")
    assert {name: one[name] for name in same} == {name: other[name] for name in same}


@pytest.mark.parametrize("during", ["evaluate", "validation"])
def test_an_evaluation_that_a_signal_ends_or_follows_is_counted_once(tmp_path, during, monkeypatch):
    losses, settings = [3, 4, 5, 6, 7, 8, 9, 9], {"patience": 3, "keep_best": 2, "keep_last": 1}
    run = scripted(tmp_path, losses, **settings)
    place = run if during == "evaluate" else run.log
    before = getattr(place, during)

    def send(*arguments):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments)

    monkeypatch.setattr(place, during, send)
    with pytest.raises(Interrupted, match="at step 3 of 8"):
        run.fit(map(batch, itertools.count()))
    saved, _ = ended(tmp_path)
    assert (saved["evaluated_at"], saved["evaluations_since_best"]) == (
        (2, 1) if during == "evaluate" else (3, 2)
    )
    again = scripted(tmp_path, losses, resume=saved, **settings)
    again.fit(map(batch, itertools.count(3)))
    saved, steps = ended(tmp_path)
    assert (saved["step"], saved["best"], steps) == (4, [[3, 1], [4, 2]], [1, 2, 3, 4])
    assert sorted(int(p.stem[5:]) for p in tmp_path.glob("step_*.pt")) == [1, 2, 4]


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 350])
def test_a_run_has_at_most_five_evaluations_by_default(tmp_path, steps):
    every = TrainSettings(steps).evaluation_interval()
    run = make(tmp_path, steps=steps, eval_every=None)
    evaluated = [run.step for run.step in range(1, steps + 1) if run.evaluation_due()]
    assert evaluated == sorted({*range(every, steps + 1, every), steps})
    assert min(steps, 4) <= len(evaluated) <= 5
    assert TrainSettings(steps, eval_every=3).evaluation_interval() == 3


def test_more_patience_goes_on_with_a_run_that_ended_early_as_if_it_had_had_it(tmp_path):
    losses = [2, 3, 3, 1, 2, 2, 2, 2]
    for name, patience in (("first", 2), ("more", 3)):
        scripted(tmp_path / name, losses, patience=patience).fit(map(batch, itertools.count()))
    saved, _ = ended(tmp_path / "first")
    events = EventAccumulator(str(tmp_path / "first/tensorboard")).Reload()
    assert events.Scalars("final/best_loss")[0].value == 2, "a run that ended early is finished"
    finished = functools.partial(TrainSettings, steps=8, best_by="loss")
    assert how_it_ended(saved, finished(patience=2)) == (
        "at step 3 of 8: loss did not improve in the last 2 evaluation(s) (best 2.0000 at step 1); "
        "trainer.patience=null, or above 2, goes on"
    )
    assert how_it_ended(saved, finished(patience=3)) == how_it_ended(saved, finished()) == ""
    again = scripted(tmp_path / "first", losses, patience=3, resume=saved)
    again.fit(map(batch, itertools.count(3)))
    (one, _), (other, _) = ended(tmp_path / "more"), ended(tmp_path / "first")
    assert one["step"] == other["step"] == 7
    assert_equal(one["model"], other["model"])
    assert how_it_ended({**one, "step": 8, "evaluated_at": 8}, finished()) == (
        "at step 8 of 8; a higher trainer.steps goes on"
    )
    assert how_it_ended({**one, "step": 8}, finished(patience=1)) == "", "not yet evaluated"


@pytest.mark.parametrize("name", ["miou", "mean_accuracy", "iou/b", "loss"])
def test_the_best_is_that_of_the_score_that_is_asked_for(tmp_path, name, capsys):
    def matrix(*rows):
        found = ConfusionMatrix(K)
        found.matrix += torch.tensor(rows)
        return found

    by_step = [
        (matrix([8, 0, 0], [0, 1, 1], [0, 1, 1]), 3.0),  # the most accurate by class
        (matrix([6, 1, 1], [1, 1, 0], [0, 0, 2]), 4.0),
        (matrix([4, 2, 2], [0, 2, 0], [0, 0, 2]), 1.0),
        (matrix([4, 0, 4], [0, 2, 0], [0, 0, 2]), 2.0),
    ]
    run = make(
        tmp_path,
        evaluate=lambda network, step: by_step[step - 1],
        **{"steps": 4, "eval_every": 1, "accumulate": 1, "best_by": name, "keep_best": 2},
    )
    run.fit(map(batch, itertools.count()))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line[name] for line in lines if line["kind"] == "val"}
    ranked = sorted(values, key=lambda step: values[step] * (1 if name == "loss" else -1))
    saved = checkpoint_format.load(tmp_path / "last.pt")
    assert [step for _, step in saved["best"]] == ranked[:2]
    assert (saved["best_score"], saved["best_step"]) == (values[ranked[0]], ranked[0])
    assert checkpoint_format.load(tmp_path / "best.pt")["step"] == ranked[0]
    last = capsys.readouterr().out.splitlines()[-1]
    shown = {"loss": ".4f"}.get(name, ".2f")
    best = values[ranked[0]] * (1 if name == "loss" else 100)
    assert f"(best {best:{shown}})" in last
    assert last.count("best") == 1


def test_a_checkpoint_of_before_other_scores_goes_on_with_its_best(tmp_path):
    run = make(tmp_path, steps=4, eval_every=2)
    run.fit(map(batch, itertools.count()))
    old = checkpoint_format.load(tmp_path / "last.pt")
    for name in ("best_step", "evaluations_since_best"):
        del old[name]
    checkpoint_format.save(tmp_path / "last.pt", {**old, "best_miou": old.pop("best_score")})
    saved = checkpoint_format.load(tmp_path / "last.pt")
    again = make(tmp_path, steps=8, eval_every=2, patience=2, resume=saved)
    again.evaluate = lambda network, step: (by_hand, 1.0)
    by_hand = ConfusionMatrix(K)
    by_hand.matrix += 1
    again.fit(map(batch, itertools.count(8)))
    ended = checkpoint_format.load(tmp_path / "last.pt")
    assert (ended["best_score"], ended["best_step"], ended["step"]) == (1.0, 0, 8)
    assert checkpoint_format.load(tmp_path / "best.pt")["step"] == 2


# A checkpoint of another device


@pytest.mark.parametrize("recipe", [SGD(0.1, momentum=0.9), AdamW(0.01)], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_checkpoint_goes_on_in_another_memory_order(tmp_path, recipe, channels_last):
    how = {"optimizer": recipe}
    first = make(tmp_path, danet(), **how, channels_last=channels_last)
    train(first, 2)
    saved = saved_by(first, tmp_path)
    same, other = (
        make(
            tmp_path / str(order), danet(), resume=copy.deepcopy(saved), **how, channels_last=order
        )
        for order in (channels_last, not channels_last)
    )
    networks = [run.train_step.model for run in (first, same, other)]
    for run in (same, other):
        torch.manual_seed(1)
        for parameter in run.train_step.model.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
        run.train_step.optimizer.step()
    before, now, turned = (dict(network.named_parameters()) for network in networks)
    assert not torch.equal(now["backbone.conv1.weight"], before["backbone.conv1.weight"])
    torch.testing.assert_close(now, turned, rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_scaling_of_the_loss_goes_on_with_it(tmp_path):
    first = make(tmp_path, ema_decay=0.9)
    train(first, 2)
    second = make(tmp_path / "second", ema_decay=0.9)
    second.train_step.scaler = torch.amp.GradScaler("cpu", enabled=True)
    second.load_state(saved_by(first, tmp_path))
    assert second.step == 2
    assert_equal(state(second), state(first))
    assert second.train_step.scaler.get_scale() > 1


# torch.compile. The inductor takes long, so most is shown with the tracers alone.


@pytest.fixture
def tracing(monkeypatch):
    """Lets ``torch.compile`` trace forward and backward, and run what it traced as it is."""
    torch._dynamo.reset()
    compiling = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiling)
    yield
    torch._dynamo.reset()


def test_a_compiled_step_is_the_eager_one(tmp_path, tracing):
    eager, fast = (make(tmp_path / n, compile=n == "b", ema_decay=0.9) for n in "ab")
    torch.testing.assert_close(train(eager, 3), train(fast, 3))
    torch.testing.assert_close(state(fast), state(eager))  # of equal names
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_evaluation_is_not_compiled(tmp_path, tracing):
    run = make(tmp_path, compile=True, steps=2, eval_every=1)
    seen = []

    def look(network, step):
        with torch.no_grad():
            network.eval()(batch(0).image)
        seen.append((network, torch._dynamo.utils.counters["frames"]["ok"]))
        return scored()

    run.evaluate = look
    run.fit(map(batch, itertools.count()))
    assert [network for network, _ in seen] == [run.train_step.model] * 2
    assert seen[0][1] == seen[1][1] > 0, "compiled once, in the first step"


@pytest.mark.slow
def test_the_tools_train_resume_and_score_a_compiled_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    small = ["model/head=fcn", "model/backbone=resnet18", "data.num_workers=0", "run.log_to=[]"]
    typed = [*(s for s in TINY if "reduction" not in s), *small, "trainer.steps=2"]
    call("train", *typed, "trainer.compile=true", "run.dir=cut", "trainer.stop_at=1")
    torch._dynamo.reset()
    call("train", "resume=cut/last.pt")
    torch._dynamo.reset()
    call("train", *typed, "trainer.compile=true", "run.dir=whole")
    cut, whole = (torch.load(tmp_path / name / "last.pt")["model"] for name in ("cut", "whole"))
    assert_equal(cut, whole)
    call("eval", "checkpoint=cut/last.pt", "device=cpu", "output=scores")
    scores = json.loads((tmp_path / "scores/metrics.json").read_text())
    last = json.loads((tmp_path / "cut/metrics.jsonl").read_text().splitlines()[-1])
    assert scores["miou"] == last["miou"]
    # Without dropout, which the inductor draws otherwise, the eager network trains alike.
    torch._dynamo.reset()
    torch.manual_seed(0)  # as ``make`` does before it makes the second one
    eager, fast = (make(tmp_path / n, tiny(dropout=0.0), compile=n == "b") for n in "ab")
    torch.testing.assert_close(train(eager, 2), train(fast, 2), rtol=1e-4, atol=1e-4)


# Without a validation set


@pytest.mark.slow
def test_a_run_without_a_validation_set_trains_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = [*TINY, "data.num_workers=0", "run.log_to=[]", "trainer.steps=4"]
    call("train", *typed, "run.dir=scored")
    capsys.readouterr()
    call("train", *typed, "run.dir=plain", "data.val_split=null", "trainer.stop_at=2")
    assert "no validation set: data.val_split=null; there are no scores" in capsys.readouterr().out
    call("train", "resume=plain/last.pt")
    assert not (tmp_path / "plain/best.pt").exists()
    scored, plain = (torch.load(tmp_path / name / "last.pt") for name in ("scored", "plain"))
    assert_equal(scored["model"], plain["model"])
    assert (plain["step"], plain["best_score"], plain["scores"]) == (4, None, None)
    assert plain["training_set"] == scored["training_set"]
    assert "validation_set" not in plain
    capsys.readouterr()
    call("train", "resume=plain/last.pt")
    assert "this run is finished, at step 4 of 4" in capsys.readouterr().out
    call("eval", "checkpoint=plain/last.pt", "device=cpu", code=2)
    assert "the training had no validation set; set split=" in capsys.readouterr().err
    call("eval", "checkpoint=plain/last.pt", "device=cpu", "split=val")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [("patience", "2"), ("best_by", "loss")])
def test_what_watches_scores_is_refused_without_a_validation_set(key, value, tmp_path, capsys):
    typed = [*TINY, f"run.dir={tmp_path / 'run'}", "data.val_split=null"]
    call("train", *typed, f"trainer.{key}={value}", code=2)
    message = rf"error: trainer.{key}={value}: there is no .*; set (trainer.{key}=\w+), or data"
    advice = re.search(message, capsys.readouterr().err)[1]
    call("train", *typed, advice, "trainer.steps=1", "data.num_workers=0", "run.log_to=[]")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "setting"),
    [(1, "data.val_share=0.2"), (4, "data.val_share=0"), (4, "data.val_split=null")],
)
def test_own_pictures_that_are_not_divided_are_all_trained_on(count, setting, tmp_path, capsys):
    root = plant(tmp_path / "data", values=(0, 1), splits=((".", count),))
    typed = ["data=folder", f"data.root={root}", "data.classes=[a,b]", setting]
    small = [s for s in TINY if not s.startswith(("data.size", "data.lengths", "data.cue"))]
    call("check_data", *typed, "data.num_workers=0", f"output={tmp_path / 'o'}")
    assert "no validation set" in capsys.readouterr().out
    small += ["data.crop=[32,32]", "data.batch_size=1", "data.num_workers=0", "run.log_to=[]"]
    call("train", *typed, *small, "trainer.steps=1", f"run.dir={tmp_path / 'run'}")
    assert f"Folder, {count} training and 0 validation images" in capsys.readouterr().out


@pytest.mark.slow
def test_a_missing_compiler_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}),
        pytest.raises(InputError, match=r"^trainer.compile=true: torch cannot compile .*false$"),
    ):
        compiled(tiny(), torch.device("cpu"))


# Several processes


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_sets_how_cuda_computes_and_restores_it(
    tmp_path, deterministic, monkeypatch, request
):
    """The switches exist without CUDA."""
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    monkeypatch.setattr("danet.ops.arithmetic.has_tf32", lambda device: True)
    cudnn, products, seen = torch.backends.cudnn, torch.backends.cuda.matmul, []

    def look(*_):
        seen.append((cudnn.allow_tf32, products.allow_tf32, cudnn.benchmark))

    look()
    for precision in ("float32", "tf32", "bfloat16"):
        run = make(tmp_path / precision, precision=precision, deterministic=deterministic)
        run.train_step.model.register_forward_hook(look)
        next(run.train_step.model.parameters()).register_hook(look)  # within backward
        run.train_step([batch(0)], 0)
        run.log.close()
    look()
    before, *inside, after = seen
    assert before == after
    fast = not deterministic
    assert (
        inside == [(False, False, fast)] * 2 + [(True, True, fast)] * 2 + [(False, False, fast)] * 2
    )


class Idle(Tiny):
    """Has layers behind its last map."""

    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        maps = super().forward(x)
        self.third(maps[-1])
        return maps


def test_layers_that_no_output_depends_on_are_found(tmp_path):
    run = make(tmp_path, Segmentor(Idle(), functools.partial(FCNHead, num_classes=K, channels=8)))
    before, model = state(run), run.train_step.model
    names = ignore_unused_parameters(model)
    assert names == ["backbone.third.weight", "backbone.third.bias"]
    assert all(p.requires_grad for p in model.parameters()), "that is for what a config freezes"
    assert_equal(state(run), before)
    assert ignore_unused_parameters(danet([1, 2])) == []


VARIANTS = {
    "plain": {},
    "idle": {},
    "broadcasting": {},
    "network": {},
    "network recomputing": {},
    "network compiled recomputing": {"compile": True},
}


def work(rank, folder):
    """Is one of two processes: trains in several ways; the first writes down where each ended."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for name, settings in VARIANTS.items():
        recompute = [1, 2, 3, 4] if "recomputing" in name else []
        model = danet(recompute) if "network" in name else None
        if name == "idle":
            head = functools.partial(FCNHead, num_classes=K, channels=8)
            torch.manual_seed(0)  # as a run does: DDP leaves alone what it ignores
            model = Segmentor(Idle(), head, head)
        run = make(Path(folder) / name, model, ema_decay=0.9, **settings)
        assert not run.train_step.ddp_model.broadcast_buffers
        run.train_step.ddp_model.broadcast_buffers = name == "broadcasting"
        for _ in range(2):
            group = [batch(10 * run.step + rank), batch(10 * run.step + 2 + rank)]
            run.train_step(group, run.step)
            run.step += 1
        if rank == 0:
            torch.save(state(run), Path(folder) / f"{name}.pt")
        collectives.broadcast_buffers(run.train_step.model)
        run.log.close()
        torch.save(run.train_step.model.state_dict(), Path(folder) / f"{name} {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_alike_however_they_compute(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)

    def ended(name):
        return torch.load(tmp_path / f"{name}.pt")

    for name in VARIANTS:
        assert_equal(ended(f"{name} 0"), ended(f"{name} 1"))
    assert_equal(ended("plain"), ended("broadcasting"))
    assert_equal(ended("network"), ended("network recomputing"))
    torch.testing.assert_close(
        ended("network compiled recomputing"), ended("network"), rtol=1e-4, atol=1e-4
    )
