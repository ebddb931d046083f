"""What is frozen stays as it is to the last bit and costs nothing; layers learn at their rates."""

import copy
import functools
import itertools
from pathlib import Path

import pytest
import torch
from conftest import TINY, K, batch, call, scored, tiny
from conftest import make_trainer as make
from test_trainer import Idle, assert_equal, saved_by, state, train
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.distributed import sync_batchnorm
from danet.engine.optimizer import SGD, AdamW, layer_factors, misfit, parameter_groups, state_of
from danet.errors import InputError
from danet.models.finetuning import Layer, count_frozen, freeze_stages, keep_in_eval
from danet.models.heads.dual import DualAttentionHead, FCNHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

BatchNorm = nn.modules.batchnorm._BatchNorm
FROZEN = {
    "none": (),
    "stem": ("conv1.", "bn1."),
    2: ("conv1.", "bn1.", "layer1.", "layer2."),
    "all": ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4."),
}
RECIPE = SGD(0.1, momentum=0.9, weight_decay=0.1, layer_decay=0.75)


def network(**settings):
    torch.manual_seed(0)
    head = functools.partial(DualAttentionHead, num_classes=K, reduction=2)
    auxiliary = functools.partial(FCNHead, num_classes=K, channels=8)
    model = Segmentor(ResNet(**{"depth": 18, "width": 8, **settings}), head, auxiliary)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    for module in model.backbone.modules():
        if isinstance(module, BatchNorm):  # as if trained
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def is_frozen(name, freeze):
    return "backbone." in name and name.partition("backbone.")[2].startswith(FROZEN[freeze])


# Layers


@pytest.mark.parametrize("settings", [{}, {"depth": 50, "stem": "64-64-128"}], ids=str)
def test_layers_are_the_stem_and_the_blocks_with_every_parameter_once(settings):
    backbone = network(**settings).backbone
    layers = backbone.layers()
    names = [name for layer in layers for name in layer.parameters]
    assert sorted(names) == sorted(name for name, _ in backbone.named_parameters())
    counts = (3, 4, 6, 3) if settings else (2, 2, 2, 2)
    blocks = [f"layer{n}.{i}" for n, count in enumerate(counts, 1) for i in range(count)]
    assert [layer.stage for layer in layers] == [0, *(int(block[5]) for block in blocks)]
    assert {name.split(".")[0] for name in layers[0].parameters} == {"conv1", "bn1"}
    found = [{".".join(name.split(".")[:2]) for name in layer.parameters} for layer in layers[1:]]
    assert found == [{block} for block in blocks]


@pytest.mark.parametrize("freeze", [5, -1, "2", "layer2", True, None, [1]], ids=str)
def test_a_stage_that_does_not_exist_is_named(freeze):
    with pytest.raises(ValueError, match=r"^freeze=.* is not one of none, stem, 1, 2, 3, 4, all$"):
        ResNet(depth=18, width=8, freeze=freeze)


# What is frozen


SETTINGS = [
    {},
    {"optimizer": AdamW(0.1, weight_decay=0.5, layer_decay=0.75), "accumulate": 1},
    {"ema_decay": 0.7},
    {"ema_decay": 0.3, "channels_last": True, "norm_eval": True},
    {"precision": "bfloat16", "recompute": [1, 2, 3]},
]
COMPILED = {"compile": True, "recompute": [1, 3], "norm_eval": True}


@pytest.mark.parametrize(
    ("freeze", "settings"),
    [
        *itertools.product(["none", "stem", 2, "all"], SETTINGS),
        pytest.param(2, COMPILED, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_frozen_is_bit_equal_after_training_and_the_rest_has_learnt(
    tmp_path, monkeypatch, freeze, settings
):
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    torch._dynamo.reset()
    settings = {"optimizer": RECIPE, "steps": 3, "eval_every": 2, **settings}
    own = {name: settings.pop(name) for name in ("recompute", "norm_eval") if name in settings}
    keeps_statistics = own.get("norm_eval", False)

    def evaluate(model, step):
        model.eval()
        return scored()

    run = make(tmp_path, network(freeze=freeze, **own), evaluate=evaluate, **settings)
    before = state(run)
    run.fit(map(batch, itertools.count()))
    after = state(run)
    for name, value in before.items():
        if not name.startswith(("model.", "ema.module.")):
            continue
        is_statistic = "running" in name or "tracked" in name
        is_kept = name.split(".")[-1] in ("mean", "std") or is_frozen(name, freeze)
        is_kept = is_kept or (keeps_statistics and is_statistic and "backbone." in name)
        assert torch.equal(after[name], value) == is_kept, name
    model, optimizer = run.train_step.model, run.train_step.optimizer
    learning = {name for name, _ in model.named_parameters() if not is_frozen(name, freeze)}
    states = state_of(optimizer, model)["state"].values()
    assert {entry["name"] for entry in states} == learning
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert count_frozen(model) == sum(n for name, n in sizes.items() if name not in learning)


@pytest.mark.parametrize("freeze", ["none", "stem", 2, "all"])
@pytest.mark.parametrize("recompute", [[], [1, 2, 3, 4]], ids=str)
def test_nothing_of_a_frozen_stage_is_kept_for_a_gradient(freeze, recompute):
    model, kept, frozen_done = network(freeze=freeze, recompute=recompute).train(), [], []
    backbone = model.backbone
    stages = [backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4]
    last = {"none": 0, "stem": 0, 2: 2, "all": 4}[freeze]
    for stage in stages[:last]:
        stage.register_forward_hook(lambda *_: frozen_done.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        maps = backbone(torch.randn(2, 3, 32, 48))
    assert [m.grad_fn is None for m in maps] == [n <= last for n in (1, 2, 3, 4)]
    assert frozen_done == [0] * last
    assert bool(kept) == (freeze != "all")
    output = model(batch(0).image)
    (output.logits.sum() + sum(t.square().sum() for t in output.auxiliary.values())).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, _ in model.named_parameters() if is_frozen(n, freeze)}


@pytest.mark.parametrize("freeze", ["stem", 2, "all"])
def test_other_gradients_are_those_of_a_network_whose_batch_norms_alone_are_in_eval_mode(freeze):
    gradients = []
    for kind in (freeze, "none"):
        model = network(freeze=kind).train()
        for name, module in model.named_modules():
            if kind == "none" and isinstance(module, BatchNorm) and is_frozen(f"{name}.", freeze):
                module.eval()
        torch.manual_seed(1)
        output = model(batch(0).image)
        terms = (output.logits, *output.auxiliary.values())
        sum(t.square().sum() for t in terms).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    some, every = gradients
    assert 0 < len(some) < len(every)
    assert_equal(some, {name: every[name] for name in some})


def test_with_norm_eval_batch_norms_of_the_backbone_normalise_by_their_statistics():
    model = network(norm_eval=True).train()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm)}
    assert {n for n, m in norms.items() if m.training} == {n for n in norms if "head" in n}
    assert count_frozen(model) == 0
    assert model.backbone.layer1.training
    x = torch.randn(2, 3, 32, 48)
    assert_equal(*(dict(enumerate(m.backbone(x))) for m in (model, network().eval())))
    assert network().train().backbone.bn1.training


class Parts(nn.Module):
    """A backbone with dropout in its stages and a part of its own behind them."""

    channels = (4, 4)

    def __init__(self, freeze):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5))
        self.pyramid = nn.Conv2d(4, 4, 1)
        freeze_stages(self, self.layers(), freeze)

    def layers(self):
        places = (("first.0", 0), ("second.0", 4), ("pyramid", 5))
        return [Layer(stage, (f"{name}.weight", f"{name}.bias")) for name, stage in places]

    def train(self, mode=True):
        super().train(mode)
        if mode:
            keep_in_eval(self, norm_eval=False)
        return self


@pytest.mark.parametrize(
    ("freeze", "count"), [("none", 0), ("stem", 1), (3, 1), (4, 2), ("all", 2)]
)
def test_dropout_is_off_in_frozen_parts_and_parts_behind_the_stages_are_never_frozen(freeze, count):
    backbone = Parts(freeze)
    for again in (backbone, copy.deepcopy(backbone).eval().train()):
        parts = [again.first[1], again.second[1], again.pyramid]
        assert [part.training for part in parts] == [count < 1, count < 2, True]
        assert again.training
        grads = [again.first[0], again.second[0], again.pyramid]
        assert [p.weight.requires_grad for p in grads] == [count < 1, count < 2, True]


# Rates


@pytest.mark.parametrize("freeze", ["none", 2])
@pytest.mark.parametrize("recipe", [RECIPE, AdamW(0.1, layer_decay=0.75)], ids=["SGD", "AdamW"])
def test_layers_learn_at_their_rates(recipe, freeze):
    model = network(freeze=freeze)
    rates = {"conv1": 9, "bn1": 9, "layer1.0": 8, "layer1.1": 7, "layer2.0": 6, "layer2.1": 5}
    rates |= {"layer3.0": 4, "layer3.1": 3, "layer4.0": 2, "layer4.1": 1}
    groups, names = parameter_groups(model, recipe), {p: n for n, p in model.named_parameters()}
    seen = []
    for group in groups:
        for name in (names[p] for p in group["params"]):
            seen.append(name)
            if "head" in name:
                expected = 0.1 * recipe.head_multiplier
            else:
                (power,) = (v for k, v in rates.items() if name.startswith(f"backbone.{k}."))
                expected = 0.1 * 0.75**power
            assert group["lr"] == group["base_lr"] == pytest.approx(expected), name
    assert sorted(seen) == sorted(n for n in names.values() if not is_frozen(n, freeze))
    keys = [(group["lr"], group["weight_decay"]) for group in groups]
    assert len(keys) == len(set(keys)) or recipe.head_multiplier == 1


def test_a_part_behind_the_stages_learns_at_the_rate_of_the_heads():
    head = functools.partial(FCNHead, num_classes=K, channels=8)
    factors = layer_factors(Segmentor(Parts("none"), head), SGD(1.0, layer_decay=0.5))
    weights = {name: f for name, f in factors.items() if name.endswith("weight")}
    assert weights == {
        "backbone.first.0.weight": 0.25,
        "backbone.second.0.weight": 0.5,
        "backbone.pyramid.weight": 10.0,
    }


def test_a_backbone_that_does_not_list_its_layers_has_one_rate():
    message = r"^optimizer.layer_decay=0.9: Tiny has no .* layers; set optimizer.layer_decay=1, or"
    with pytest.raises(InputError, match=message):
        SGD(0.1, layer_decay=0.9)(tiny())
    assert {group["lr"] for group in SGD(0.1)(tiny()).param_groups} == {0.1, 1.0}


# Resuming


@pytest.mark.parametrize("recipe", [RECIPE, AdamW(0.1, layer_decay=0.75)], ids=["SGD", "AdamW"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, recipe):
    how = {"optimizer": recipe, "ema_decay": 0.9}
    settings = {"freeze": 2, "norm_eval": True, "recompute": [1, 3]}
    whole = make(tmp_path / "whole", network(**settings), **how)
    train(whole, 4)
    half = make(tmp_path / "half", network(**settings), **how)
    train(half, 2)
    saved = saved_by(half, tmp_path / "half")
    assert misfit(recipe, network(**settings), saved["optimizer"]) == ""
    assert "parameters" in misfit(recipe, network(freeze=3), saved["optimizer"])
    torch.manual_seed(7)
    again = make(tmp_path / "again", network(**settings), resume=saved, **how)
    train(again, 2)
    assert_equal(state(again), state(whole))


@pytest.mark.slow
def test_a_run_says_what_is_frozen_and_an_unfrozen_one_is_a_new_run(tmp_path, capsys):
    settings = [*TINY, "data.num_workers=0", "run.log_to=[]", "trainer.steps=2"]
    first, last = [*settings, f"run.dir={tmp_path / 'a'}"], tmp_path / "a/last.pt"
    call("train", *first, "model.backbone.freeze=2", "trainer.stop_at=1")
    assert " parameters (11,912 frozen); steps 0 to 2" in capsys.readouterr().out
    weights = checkpoint_format.load(last)["model"]
    call("train", *first, "model.backbone.freeze=3", "resume=auto", code=2)
    printed = capsys.readouterr().err
    assert "model.backbone.freeze: 2 in the checkpoint, 3 now" in printed
    assert "to start a new run from these weights use init_from" in printed
    call("train", f"resume={last}")
    assert " parameters (11,912 frozen); steps 1 to 2" in capsys.readouterr().out
    after = checkpoint_format.load(last)["model"]
    same = {name for name, value in after.items() if torch.equal(value, weights[name])}
    assert same == {"mean", "std", *(name for name in after if is_frozen(name, 2))}
    call("train", *settings, f"run.dir={tmp_path / 'b'}", f"init_from={last}")
    assert "201,242 parameters; steps 0 to 2" in capsys.readouterr().out


# Several processes

NETWORKS = {
    "frozen": lambda: network(freeze=2, norm_eval=True),
    "idle": lambda: Segmentor(Idle(), functools.partial(FCNHead, num_classes=K, channels=8)),
}


def seeded(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def work(rank, folder):
    """Is one of two processes: trains two steps; goes on from what a single process left."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    gathered, gather = [], sync_batchnorm._gather
    sync_batchnorm._gather = lambda values: gathered.append(1) or gather(values)
    for name in NETWORKS:
        recipe = SGD(0.1, weight_decay=0.1)
        run = make(Path(folder) / name, seeded(name), optimizer=recipe, ema_decay=0.9)
        before, model = state(run), run.train_step.model
        run.train_step.ddp_model.train()
        gathered.clear()
        run.train_step([batch(rank)], 0)
        learning = [m for m in model.modules() if isinstance(m, BatchNorm) and m.training]
        assert len(gathered) == len(learning) > 0
        torch.save({"before": before, "after": state(run)}, Path(folder) / f"{name} {rank}.pt")
        torch.save(state_of(run.train_step.optimizer, model), Path(folder) / f"{name} {rank} o.pt")
        alone = torch.load(Path(folder) / f"{name} alone.pt")
        assert misfit(recipe, seeded(name), alone["optimizer"]) == ""
        run.load_state({"evaluated_at": 0, "best_miou": None, "scores": None, **alone})
        run.train_step([batch(rank)], 1)
        run.log.close()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_freeze_the_same_and_exchange_states_with_one(tmp_path):
    recipe = SGD(0.1, weight_decay=0.1)
    for name in NETWORKS:
        alone = make(tmp_path / "alone" / name, seeded(name), optimizer=recipe, ema_decay=0.9)
        train(alone, 1)
        torch.save(alone.state(), tmp_path / f"{name} alone.pt")
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for name in NETWORKS:
        first, second = (torch.load(tmp_path / f"{name} {rank}.pt") for rank in (0, 1))
        own = [key for key in first["after"] if "running" not in key or "backbone" in key]
        assert_equal(*({k: of["after"][k] for k in own} for of in (first, second)))
        kept = [key for key in first["before"] if name == "frozen" and is_frozen(key, 2)]
        assert_equal(*({key: first[when][key] for key in kept} for when in ("before", "after")))
        assert bool(kept) == (name == "frozen")
        saved = torch.load(tmp_path / f"{name} 0 o.pt")
        assert misfit(recipe, seeded(name), saved) == ""
