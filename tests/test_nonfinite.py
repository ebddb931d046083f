"""The first loss or weight that is not finite is named, and nothing of it is saved."""

import itertools
import math

import pytest
import torch
from conftest import batch, no_waiting, poisoned
from conftest import make_trainer as make
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.engine.nonfinite import NonFiniteGuard
from danet.errors import DivergedError


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
