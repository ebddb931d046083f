"""Rates follow their formulas, and files of a run are whole, refused by name, or left alone."""

import math
import os
from functools import partial

import pytest
import torch
import yaml
from conftest import tiny

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import run_folder
from danet.engine.optimizer import SGD, AdamW, parameter_groups
from danet.engine.schedule import Cosine, Poly
from danet.engine.settings import TrainSettings
from danet.errors import StorageError
from danet.models.heads.dual import DualAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

# Schedules


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (Poly(0.0), lambda x: 1.0),
        (Poly(2.0), lambda x: (1 - x) ** 2),
        (Cosine(), lambda x: 0.5 * (1 + math.cos(math.pi * x))),
        (Cosine(0.1), lambda x: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * x))),
    ],
    ids=["poly 0", "poly 2", "cosine", "cosine to 0.1"],
)
def test_schedules_equal_their_formulas(schedule, formula):
    for step in range(40):
        assert schedule(step, 40) == pytest.approx(formula(step / 40))


@pytest.mark.parametrize("kind", [Poly, Cosine])
def test_warm_up_rises_in_equal_steps_to_the_curve_and_then_is_the_curve(kind):
    warm, curve = kind(warmup_steps=4), kind()
    shares = [warm(step, 40) / curve(step, 40) for step in range(8)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Poly, power=math.nan), "power=nan is negative"),
        (partial(Cosine, final=math.nan), r"final=nan is not in 0..1"),
        (partial(Cosine, warmup_steps=-3), "warmup_steps=-3 is negative"),
        (partial(AdamW, lr=1, betas=(0.9,)), r"betas=\[0.9\] are not two numbers"),
    ],
)
def test_bad_settings_of_schedules_and_optimizers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Optimizers

RECIPES = [
    SGD(0.01, momentum=0.5, nesterov=True),
    SGD(0.01, decay_norm=False),
    AdamW(0.01, betas=(0.8, 0.95)),
    AdamW(0.01, decay_norm=True),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(recipe):
    danet = Segmentor(
        ResNet(depth=18, width=8), partial(DualAttentionHead, num_classes=3, reduction=2)
    )
    where = {}
    for group in parameter_groups(danet, recipe):
        for parameter in group["params"]:
            assert parameter not in where, "twice"
            where[parameter] = group
    assert len(where) == sum(1 for _ in danet.parameters())
    for name, parameter in danet.named_parameters():
        in_backbone = name.startswith("backbone.")
        rate = 0.01 if in_backbone else 0.01 * recipe.head_multiplier
        plain = "gamma" in name or name.endswith("bias") or parameter.ndim == 1
        decay = 0.0 if plain and not recipe.decay_norm else recipe.weight_decay
        group = where[parameter]
        assert group["lr"] == group["base_lr"] == pytest.approx(rate), name
        assert group["weight_decay"] == decay, name
    optimizer = recipe(tiny())
    assert isinstance(optimizer, getattr(torch.optim, type(recipe).__name__))
    for key in ("momentum", "nesterov", "betas"):
        found = {group.get(key) for group in optimizer.param_groups}
        assert found == {getattr(recipe, key, optimizer.defaults.get(key))}


def test_groups_have_the_order_in_which_checkpoints_number_states():
    groups = parameter_groups(tiny(), SGD(0.01, weight_decay=0.5, decay_norm=False))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        *((0.01, 0.5), (0.01, 0.0), (0.1, 0.5), (0.1, 0.0))
    ]
    model = tiny()
    names = {parameter: name for name, parameter in model.named_parameters()}
    backbone, head = parameter_groups(model, SGD(0.01))
    assert [names[p] for p in (*backbone["params"], *head["params"])] == list(names.values())


# Checkpoints

STATE = {
    "format": checkpoint_format.FORMAT,
    "config": {"seed": 1, "data": {"crop": None, "size": [32, 64]}},
    "classes": ["a", "b"],
    "model": {"weight": torch.arange(6.0).view(2, 3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
    "best_score": None,
    "step": 7,
}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")]
)
def test_a_write_that_fails_midway_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "last.pt"
    checkpoint_format.save(path, STATE)
    before = path.read_bytes()

    def write_half(_, file):
        file.write(before[:100])
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    could_not = "the checkpoint could not be written"
    with pytest.raises(StorageError, match=f"last.pt: {could_not}") as caught:
        checkpoint_format.save(path, {**STATE, "step": 8})
    assert str(error) in str(caught.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pt"]
    for place in ("no folder", "last.pt"):
        with pytest.raises(StorageError, match=f"{place}/x.pt: {could_not}"):
            checkpoint_format.save(tmp_path / place / "x.pt", STATE)


# Folder of a run


def prepare(folder, *, resuming=False, saved=None, **config):
    return run_folder.prepare(folder, config=config, resuming=resuming, saved=saved)


def test_a_run_goes_back_to_its_folder_and_keeps_both_configs_where_they_differ(tmp_path):
    prepare(tmp_path / "a", seed=1)
    assert prepare(tmp_path / "a", resuming=True, seed=1, resume="auto") == tmp_path / "a"
    assert (tmp_path / "a/config.yaml").read_text().endswith("seed: 1\n")
    assert len(list(tmp_path.glob("a/*.yaml"))) == 1
    prepare(tmp_path / "a", resuming=True, saved={"step": 40, "run_id": "x"}, seed=2)
    configs = {p.name: yaml.safe_load(p.read_text())["seed"] for p in tmp_path.glob("a/*.yaml")}
    assert configs == {"config.yaml": 2, "config_until_000000040.yaml": 1}


def test_a_file_in_place_of_the_folder_of_a_run_is_a_storage_error(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(StorageError, match=rf"run.dir={tmp_path}/a/b: not a writable folder"):
        prepare(tmp_path / "a/b")


# Settings


def test_good_settings_have_no_errors_and_all_wrong_ones_are_named_at_once():
    assert TrainSettings(9, stop_at=1, clip_norm=1.0, ema_decay=0.99, device="cpu").errors() == []
    wrong = {"stop_at": 0, "eval_every": -1, "log_every": 0, "accumulate": 0}
    wrong |= dict.fromkeys(["clip_norm", "save_minutes", "ema_decay"], math.nan)
    errors = TrainSettings(9, **wrong).errors()
    stated = {f"trainer.{name}={value}: " for name, value in wrong.items()}
    assert {error.partition("expected")[0] for error in errors} == stated
