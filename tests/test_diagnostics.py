"""What attention does is described as a slow computation finds it, and shown to the user."""

import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY, call
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.config.build import load_model
from danet.engine.optimizer import SGD, AdamW, misfit, parameter_groups, state_of
from danet.models.heads.dual import DualAttentionHead, SingleAttentionHead
from danet.models.heads.serial import SerialAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor
from danet.ops import diagnostics
from danet.ops.attention import ChannelAttention, PositionAttention
from danet.ops.diagnostics import diagnose
from danet.types import Sample
from danet.visualization.attention import (
    Point,
    diagnose_attention,
    explain,
    position_maps,
    queries_and_keys,
    validation_diagnosis,
)

HEIGHT, WIDTH, CHANNELS = 3, 4, 8


def energies_of(attention, x):
    """All energies in float64, one by one, from the weights of the attention."""
    a = x[0].double().flatten(1).T  # (N, C)
    if isinstance(attention, ChannelAttention):
        sign = {"distance": -1, "similarity": 1}[attention.energy]
        return [[sign * float(a[:, i] @ a[:, j]) for j in range(CHANNELS)] for i in range(CHANNELS)]
    query, key = (
        a @ conv.weight[:, :, 0, 0].double().T + conv.bias.double()
        for conv in (attention.query, attention.key)
    )
    if attention.similarity == "cosine":
        query, key = (part / part.norm(dim=1, keepdim=True) for part in (query, key))
    if attention.similarity == "whitened":
        query, key = (part - part.mean(dim=0) for part in (query, key))
    scale = 1.0
    if attention.scale == "sqrt":
        scale = key.shape[1] ** -0.5
    if attention.scale == "learned":
        scale = math.exp(attention.log_scale.item())
    more = attention.register_keys
    keys = [*key, *([] if more is None else more.double())]
    return [[scale * float(q @ k) for k in keys] for q in query]


def figures_of(attention, x):
    """Literal version of ``diagnose``, row by row and pair by pair."""
    energies = energies_of(attention, x)
    size = len(energies)
    weights = []
    for row in energies:
        exponentials = [math.exp(e - max(row)) for e in row]
        weights.append([e / sum(exponentials) for e in exponentials])
    entropies = [-sum(w * math.log(w) for w in row if w > 0) for row in weights]
    within = [row[:size] for row in weights]
    columns = [sum(row[j] for row in within) / size for j in range(size)]
    largest = [row.index(max(row)) for row in within]
    pairs = [
        np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
        for i, a in enumerate(within)
        for j, b in enumerate(within)
        if i != j
    ]
    found = {
        "size": size,
        "effective": np.mean(np.exp(entropies)),
        "on_strongest": max(columns),
        "same_strongest": max(largest.count(j) for j in largest) / size,
        "row_cosine": np.mean(pairs),
        "energy_std": np.mean([np.std(row[:size]) for row in energies]),
        "gamma": attention.gamma.item(),
    }
    a = x[0].double().flatten(1).T.numpy()
    if isinstance(attention, ChannelAttention):
        context = np.array([sum(w * a[:, j] for j, w in enumerate(row)) for row in weights])
    else:
        value = attention.value
        values = [*(a @ value.weight[:, :, 0, 0].double().numpy().T + value.bias.double().numpy())]
        if attention.register_values is not None:
            values += [*attention.register_values.double().numpy()]
            found["on_registers"] = np.mean([sum(row[size:]) for row in weights])
        context = np.array([sum(w * v for w, v in zip(r, values, strict=True)) for r in weights])
        distances = [
            sum(w * math.dist(divmod(i, WIDTH), divmod(j, WIDTH)) for j, w in enumerate(row))
            for i, row in enumerate(within)
        ]
        found["reach"] = np.mean(distances) / math.hypot(HEIGHT, WIDTH)
        if attention.log_scale is not None:
            found["scale"] = math.exp(attention.log_scale.item())
    norm = np.linalg.norm
    found["moved"] = abs(found["gamma"]) * norm(context) / norm(a)
    found["varies"] = norm(context - context.mean(axis=0)) / norm(context)
    return found


ATTENTIONS = [
    partial(PositionAttention, CHANNELS, 2),
    partial(PositionAttention, CHANNELS, 2, registers=3),
    partial(PositionAttention, CHANNELS, 2, similarity="cosine", scale="learned"),
    partial(PositionAttention, CHANNELS, 2, similarity="whitened", scale="sqrt", registers=1),
    ChannelAttention,
    partial(ChannelAttention, "similarity"),
]


@pytest.mark.parametrize("rows_at_once", [1, 5, 1000])
@pytest.mark.parametrize("make", ATTENTIONS)
@torch.no_grad()
def test_a_diagnosis_is_that_of_a_literal_computation(make, rows_at_once, monkeypatch):
    monkeypatch.setattr(diagnostics, "_ELEMENTS", rows_at_once * HEIGHT * WIDTH)
    torch.manual_seed(1)
    attention = make(gamma=-0.4)
    for parameter in attention.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.7)
    x = 0.5 * torch.randn(1, CHANNELS, HEIGHT, WIDTH)
    found, expected = diagnose(attention, x), figures_of(attention, x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-4), key


@torch.no_grad()
def test_keys_that_are_equal_give_an_average():
    attention = PositionAttention(CHANNELS, 2)
    attention.key.weight.zero_()
    found = diagnose(attention, torch.randn(1, CHANNELS, HEIGHT, WIDTH))
    assert found["effective"] == pytest.approx(HEIGHT * WIDTH, rel=1e-5)
    assert found["row_cosine"] == pytest.approx(1, rel=1e-5)
    assert found["on_strongest"] == pytest.approx(1 / (HEIGHT * WIDTH), rel=1e-5)
    assert found["varies"] == pytest.approx(0, abs=1e-5)
    assert "attends to nearly all others alike" in explain("position", found)


@torch.no_grad()
def test_a_key_that_dominates_takes_all_attention():
    attention = PositionAttention(CHANNELS, 2, gamma=1)
    nn.init.zeros_(attention.query.weight)
    nn.init.ones_(attention.query.bias)
    nn.init.ones_(attention.key.weight)
    x = torch.zeros(1, CHANNELS, HEIGHT, WIDTH)
    x[0, :, 1, 2] = 5
    found = diagnose(attention, x)
    assert found["on_strongest"] == found["same_strongest"] == pytest.approx(1)
    assert found["effective"] == pytest.approx(1)
    assert found["row_cosine"] == pytest.approx(1)
    assert "100 % of all attention on a single one" in explain("position", found)


def test_features_of_several_images_are_refused():
    with pytest.raises(ValueError, match=r"found features \(2, 8, 3, 4\), expected those of one"):
        diagnose(ChannelAttention(), torch.zeros(2, CHANNELS, HEIGHT, WIDTH))


# In words

OWN = {"size": 690, "effective": 40, "row_cosine": 0.2, "on_strongest": 0.02}
OWN |= {"gamma": 0.8, "moved": 0.45}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("position", {}, "The positions attend to positions of their own (40 of 690, mean cosine "
         "of two rows 0.20). gamma is 0.8, so the attention moves the features by 45 % of their "
         "norm."),
        ("position", {"row_cosine": 0.5}, "The positions attend in part to the same positions "),
        ("position", {"row_cosine": 0.87, "on_strongest": 0.58}, "All positions attend to nearly "
         "the same positions (40 of 690, mean cosine of two rows 0.87, 58 % of all attention on a "
         "single one): the attention adds nearly the same vector to every position. "),
        ("channel", {"row_cosine": 0.87}, "All channels attend to nearly the same channels "),
        ("channel", {"row_cosine": 0.87}, "adds nearly the same map to every channel. "),
        ("position", {"effective": 547, "row_cosine": 0.95}, "Every position attends to nearly "
         "all others alike (547 of 690, mean cosine of two rows 0.95): it adds an average. "),
        ("position", {"gamma": -0.03, "moved": 0.038}, " gamma is -0.03, so the attention moves "
         "the features by 3.8 % of their norm: the head is nearly one without it."),
        ("channel", {"gamma": 0.0, "moved": 0.0}, " gamma is 0, so the attention adds nothing: "),
        ("position", {"on_registers": 0.61}, " Registers take 61 % of the attention. gamma"),
    ],
)  # fmt: skip
def test_figures_are_put_into_words(name, changes, said):
    assert said in explain(name, {**OWN, **changes})


# Of a network


def network(head=DualAttentionHead, **settings):
    torch.manual_seed(0)
    make = partial(head, num_classes=3, reduction=2, **settings)
    return Segmentor(ResNet(depth=18, width=8), make).eval()


def image(seed, size=(48, 64)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_network_is_described_by_the_mean_over_images(is_shared):
    model = network(shared_input=is_shared, gamma=0.5)
    inputs, expected = {"position": [], "channel": []}, {}
    for name, seen in inputs.items():
        getattr(model.head, name).attention.register_forward_pre_hook(
            lambda _, x, seen=seen: seen.append(x[0])
        )
    for seed in (1, 2):
        model(torch.from_numpy(image(seed)).permute(2, 0, 1)[None])
    for name, seen in inputs.items():
        one, two = (diagnose(getattr(model.head, name).attention, x) for x in seen)
        expected[name] = {key: pytest.approx((one[key] + two[key]) / 2, rel=1e-4) for key in one}
    assert diagnose_attention(model, map(image, (1, 2))) == expected


@torch.no_grad()
@pytest.mark.parametrize(
    "variant",
    [
        {"similarity": "cosine", "scale": "learned"},
        {"similarity": "whitened"},
        {"scale": "sqrt", "registers": 2},
    ],
)
def test_maps_of_variants_are_those_of_the_network_among_the_positions(variant):
    model = network(**variant)
    attention = model.head.position.attention
    seen = []
    attention.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    model(torch.from_numpy(image(0)).permute(2, 0, 1)[None])
    query, key = attention.project(seen[0])
    weights = (query[0] @ key[0].T).softmax(dim=-1)[:, : 6 * 8]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    queries, keys = queries_and_keys(model, image(0))
    assert queries.shape == keys.shape == (8, 6, 8)
    maps = (queries.flatten(1).T @ keys.flatten(1)).softmax(dim=-1)
    torch.testing.assert_close(maps, weights)
    (first,) = position_maps(model, image(0), [Point(0, 0)])
    torch.testing.assert_close(first.flatten(), weights[0])


class Pictures:
    classes, palette = ("a", "b", "c"), ((0, 0, 0),) * 3

    def __init__(self, count, size=(48, 64)):
        self.count, self.size, self.asked = count, size, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.asked.append(index)
        return Sample(image(index, self.size), np.zeros(self.size, np.uint8), str(index))


def test_a_validation_is_diagnosed_on_four_pictures_and_changes_nothing():
    model, pictures = network(), Pictures(10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, numpy_random = torch.get_rng_state(), np.random.get_state()[1].copy()
    sizes = []
    model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[2:]))
    found = validation_diagnosis(model.train(), pictures, max_pixels=48 * 64 // 4)
    assert pictures.asked == [0, 3, 6, 9]
    assert [*map(tuple, sizes)] == [(24, 32)] * 4
    assert {"position/gamma", "position/reach", "channel/row_cosine"} <= found.keys()
    assert not any(name.startswith("channel/reach") for name in found)
    assert torch.equal(torch.get_rng_state(), random)
    assert np.array_equal(np.random.get_state()[1], numpy_random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    single = network(SingleAttentionHead, attention="channel")
    assert {x.split("/")[0] for x in validation_diagnosis(single, pictures, max_pixels=999)} == {
        "channel"
    }
    pictures.asked.clear()
    assert validation_diagnosis(network(SerialAttentionHead), pictures, max_pixels=999) == {}
    assert pictures.asked == []


def test_no_picture_is_larger_than_the_backbone_computes():
    model, sizes = network(), []
    model.backbone.size = (40, 40)
    model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[2:]))
    validation_diagnosis(model, Pictures(1, (48, 96)), max_pixels=10**6)
    assert [*map(tuple, sizes)] == [(20, 40)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed") / "run"
    typed = [*TINY, "trainer.steps=4", "trainer.eval_every=2", "data.num_workers=0"]
    call("train", *typed, "run.log_to=[]", f"run.dir={folder}")
    return folder


def test_each_validation_logs_the_attention_without_a_tracker(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "attention"]
    assert [line["step"] for line in found] == [2, 4]
    weights = torch.load(run / "last.pt", weights_only=True)["model"]
    for name in ("position", "channel"):
        gamma = weights[f"head.{name}.attention.gamma"].item()
        assert gamma != 0
        assert found[-1][f"{name}/gamma"] == pytest.approx(gamma)
    assert found[-1]["position/size"] == 6 * 12


def test_the_report_says_what_the_attention_amounts_to(run, tmp_path):
    typed = (f"checkpoint={run / 'last.pt'}", f"output={tmp_path}", "device=cpu", "count=2")
    call("visualize", *typed, "attention=false", "report=true")
    text = (tmp_path / "report.html").read_text()
    section = text[text.index("<h2>Attention</h2>") : text.index("<h2>What a pixel")]
    section, deletions = section.split("<h3>Deletion test</h3>")
    saved = load_model(run / "last.pt")
    predicted = deletions.count("</tr>") - 1
    assert 1 <= predicted == sum(f"<tr><td>{name}</td>" in deletions for name in saved.classes)
    for name in ("position", "channel"):
        assert f'<th class="number">{name}</th>' in section
    assert section.count("so the attention moves the features by") == 2
    assert section.count("<svg") == 2
    assert section.count("<polyline") == 2 * 2
    rows = section.count("</tr>") - 1
    assert rows == len({key.split("/")[1] for key in diagnosed(run)})


def diagnosed(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["kind"] == "attention" and line["step"] == 4]
    return [key for key in last if "/" in key]


# The rate of gamma


@pytest.mark.parametrize("make", [SGD, AdamW])
def test_gammas_have_a_rate_of_their_own_only_if_asked_for(make):
    model = network()
    model.backbone.gamma = nn.Parameter(torch.ones(1))  # as in ConvNeXt; none of attention
    recipes = (make(0.01, head_multiplier=4, **x) for x in ({}, {"gamma_multiplier": 5.0}))
    usual, own = (parameter_groups(model, recipe) for recipe in recipes)
    # As before there was such a rate: the order numbers the states of stored optimizers.
    expected = {}
    for name, parameter in model.named_parameters():
        decays = make is SGD or parameter.ndim > 1
        expected.setdefault((name.startswith("backbone."), decays), []).append(name)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in usual] == [*expected.values()]
    before, rates = (
        {names[p]: group["base_lr"] for group in groups for p in group["params"]}
        for groups in (usual, own)
    )
    gammas = {"head.position.attention.gamma", "head.channel.attention.gamma"}
    assert {name for name in rates if rates[name] != before[name]} == gammas
    assert all(rates[name] == pytest.approx(0.01 * 4 * 5) for name in gammas)


def test_a_run_from_before_the_rate_of_gamma_is_resumed(run, tmp_path):
    saved = checkpoint_format.load(run / "last.pt")
    assert saved["config"]["optimizer"].pop("gamma_multiplier") == 1
    path = tmp_path / "old" / "last.pt"
    path.parent.mkdir()
    checkpoint_format.save(path, saved)
    shutil.copy(run / "config.yaml", path.parent)
    call("train", f"resume={path}", "trainer.steps=5", f"run.dir={path.parent}")
    assert checkpoint_format.load(path)["step"] == 5


def test_a_state_with_other_groups_of_gammas_is_refused():
    model = network()
    optimizer = SGD(0.01)(model)
    saved = state_of(optimizer, model)
    assert misfit(SGD(0.01), model, saved) == ""
    assert "is not of" in misfit(SGD(0.01, gamma_multiplier=2), model, saved)


@pytest.mark.parametrize("value", [-1.0, math.inf])
def test_a_rate_of_gamma_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=r"gamma_multiplier=.* is not a finite number of at least"):
        SGD(0.01, gamma_multiplier=value)
