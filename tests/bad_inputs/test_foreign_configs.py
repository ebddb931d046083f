"""A config in somebody else's file calls nothing outside the trusted classes and reads nothing.

Every slot of a config is filled with interpolations and nodes that would call a function, print a
variable of the environment or a file: as they are, escaped once and twice, inside lists, mappings
and keys. Each file is then used in every way a file can be. DANET_MUTATIONS says how many are
tried: 2,000, or 50,000 for the long form.
"""

# ruff: noqa: F811
import copy
import importlib
import os
import random
import sys
from contextlib import suppress

import pytest
import torch
from foreign import HEARD, SECRET, SETTINGS, WAYS, outcome, place, saved  # noqa: F401

from danet import cli
from danet.checkpoint import format as checkpoint_format
from danet.config.build import make
from danet.config.targets import TRUSTED, locate
from danet.errors import InputError
from danet.plain import DEEPEST, MOST_VALUES, printable, problem_with

MUTATIONS = int(os.environ.get("DANET_MUTATIONS", "2000"))


def texts(root):
    """Returns interpolations that read, call or build something when they are resolved."""
    call = "{_target_: canary.fire, a: 1}"
    return [
        "${oc.env:SECRET_TOKEN}",
        "${oc.env:SECRET_TOKEN,default}",
        f"${{oc.create:{call}}}",
        '${oc.create:{_target_: os.system, command: "true"}}',
        "${oc.create:{_target_: sympy.sympify, a: \"__import__('os').system('true')\"}}",
        "${oc.decode:${oc.env:SECRET_TOKEN}}",
        "${oc.dict.keys:data}",
        "${oc.dict.values:trainer}",
        "${oc.deprecated:seed}",
        f"${{class_names:{root}/secret.txt}}",
        "${count:${data.dataset.lengths}}",
        "${seed}",
        "${hydra:runtime.cwd}",
        "$" + "{" * 30,
    ]


def nodes():
    """Returns nodes that would call something that configs may not name."""
    function, resnet = "danet.checkpoint.reading.read", "danet.models.resnet.ResNet"
    fire = {"_target_": "canary.fire"}
    calls = [
        *(("canary.fire", {}), ("canary.Fire", {"a": 1}), ("canary.fire", {"_partial_": True})),
        *(("os.system", {"_args_": ["true"]}), ("os.system", {"command": "true"})),
        *(("builtins.eval", {"_args_": ["1"], "_convert_": "all"}), ("canary.fire\n", {})),
        *((function, {"path": "secret.txt", "key": "x"}), (resnet, {"depth": 18, "_args_": [1]})),
        ("danet.datasets.submission.SubmissionWriter", {"_recursive_": False}),
        *(("danet.models.resnet.load_backbone", {}), ("danet.losses...x", {}), (None, {})),
        *(("danet.losses.CrossEntropy", {"_recursive_": True}), ("../canary.fire", {})),
        *(("hydra.utils.instantiate", {"config": fire}), (fire, {}), (["canary", "fire"], {})),
    ]
    others = [{"_partial_": "canary.fire"}, {"_args_": ["a"], "_kwargs_": {"b": 1}}]
    return [{"_target_": path, **arguments} for path, arguments in calls] + others


def odd():
    """Returns values that no setting has."""
    deep: object = 1
    for _ in range(DEEPEST + 5):
        deep = [deep]
    return [
        *(10**30, -1, 0, 2**62, 1e308, float("nan"), float("inf"), True, None, "", "???", [], {}),
        *("\x1b[2J", "a\nerror: b", "\u202eabc", "\ud800", "x" * 20_000, deep, {1: 2}, [[]]),
        *("danet.losses.OHEM", "${", "$", "/dev/zero", "~nobody/x", "%s%n", "{0.__class__}"),
    ]


def slots(node, path=()):
    """Yields every place of a config: of each value, and of a new key in each mapping."""
    if path:
        yield path
    if isinstance(node, dict):
        yield (*path, "extra")
        for name, value in node.items():
            yield from slots(value, (*path, name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from slots(value, (*path, index))


def wrapped(draw, value):
    """Returns a value as it is, escaped, or inside of others."""
    if isinstance(value, str) and draw.random() < 0.5:
        value = draw.choice(["\\", "\\\\", "\\\\\\", "a ", "a\\"]) + value
    for _ in range(draw.choice([0, 0, 1, 2])):
        value = draw.choice([lambda v: [v], lambda v: {"a": v}, lambda v: [1, {"b": [v]}]])(value)
    return value


def mutated(draw, config, root):
    """Returns a config with one or two slots filled with something hostile, and what was done."""
    config = copy.deepcopy(config)
    done = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        path = draw.choice(list(slots(config)))
        value = draw.choice([draw.choice(texts(root)), draw.choice(nodes()), draw.choice(odd())])
        value = wrapped(draw, copy.deepcopy(value))
        node = config
        for part in path[:-1]:
            node = node[part]
        is_key = isinstance(value, str) and isinstance(node, dict) and draw.random() < 0.2
        node[value if is_key else path[-1]] = 1 if is_key else value
        done.append((path, value, is_key))
    return config, done


@pytest.mark.slow
@pytest.mark.bad_input("K19")
def test_no_config_of_a_file_calls_or_reads_what_it_may_not(
    saved, place, monkeypatch, capsys, record_property
):
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    draw = random.Random(int(os.environ.get("DANET_MUTATIONS_SEED", "0")))
    counts = dict.fromkeys(("used", "refused"), 0)
    for number in range(MUTATIONS):
        way = draw.choice(WAYS)
        config, done = mutated(draw, saved["config"], place)
        # The way of a config through a file is the same for all; a tenth of them take it.
        reported = outcome(way, {**saved, "config": config}, place, is_file=number % 10 == 0)
        said = "".join(capsys.readouterr()) + (reported or "")
        context = f"mutation {number}, {way}, {done}\n{reported}"
        assert not HEARD, f"{context}\n{HEARD}"
        assert SECRET not in said, context
        assert reported is None or len(reported.splitlines()) <= 21, context
        assert printable(said, keep="\n\r") == said, context
        counts["refused" if reported else "used"] += 1
    assert min(counts.values()) > MUTATIONS / 20
    record_property(
        "figure", f"{MUTATIONS} mutations: {counts['refused']} refused, no call, no secret"
    )


@pytest.mark.bad_input("K19")
@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("escape", ["", "\\", "\\\\"])
def test_an_interpolation_is_refused_before_anything_resolves_it(
    saved, place, monkeypatch, way, escape
):
    monkeypatch.setenv("SECRET_TOKEN", SECRET)
    for text in (text for text in texts(place) if "${" in text):
        for key in ("auxiliary_head", "x"):
            config = copy.deepcopy(saved["config"])
            config["model"][key] = [{"a": escape + text}]
            reported = outcome(way, {**saved, "config": config}, place, is_file=False)
            assert not HEARD
            assert f"its config is refused: config.model.{key}.0.a=" in reported
            assert "has ${" in reported
            assert SECRET not in reported
            assert len(reported.splitlines()) == 1


@pytest.mark.bad_input("K19")
def test_a_class_is_held_against_the_list_when_it_is_called(saved, place):
    """Whatever came between the check and the call: the walk asks once more."""
    for node in nodes():
        if "_target_" in node:
            with pytest.raises(InputError):
                make({"a": [node]}, "model")
    assert not HEARD
    # A text is a text, however much it looks like a node or an interpolation.
    assert make({"a": ["${oc.env:HOME}"]}, "model") == {"a": ["${oc.env:HOME}"]}


@pytest.mark.bad_input("K19")
def test_the_modes_of_evaluation_may_be_named_and_nothing_else_of_their_modules():
    accepted = set()
    for module in (*TRUSTED["evaluation"], "danet.evaluation.evaluate", "danet.evaluation.fuse"):
        for name in dir(importlib.import_module(module)):
            with suppress(InputError):
                accepted.add(locate(f"{module}.{name}", "evaluation").__name__)
    assert accepted == {"Whole", "Sliding", "MultiScale", "AuthorsProtocol", "MMSegProtocol"}


@pytest.mark.bad_input("K19")
def test_a_group_names_its_own_parts_only():
    anywhere = """os.system builtins.eval torch.load danet.checkpoint.weights.torch.load
        danet.models.resnet.load_backbone danet.models.resnet.BasicBlock
        danet.checkpoint.format.save danet.datasets.base.Path albumentations.Compose
        albumentations.os danet.models.nothing.Here danetx.models.resnet.ResNet
        danet.datasets.submission.SubmissionWriter
        danet.checkpoint.pickle_scan.Inert danet.datasets.cache.Cache"""
    for key, path in (
        *((group, path) for group in TRUSTED for path in anywhere.split()),
        ("model", "danet.losses.OHEM"),
        ("loss", "danet.models.resnet.ResNet"),
        ("optimizer", "danet.datasets.folder.Folder"),
        ("evaluation", "albumentations.HorizontalFlip"),
        ("schedule", "danet.engine.optimizer.SGD"),
    ):
        with pytest.raises(InputError, match=r"is refused|has no class|there is no module"):
            make({"_target_": path}, key)
    for path in ("danet.data.transforms.ScaleCrop", "albumentations.HorizontalFlip"):
        assert locate(path, "data").__name__ == path.rpartition(".")[2]


@pytest.mark.bad_input("K19")
def test_plain_data_is_separated_from_the_rest():
    assert problem_with({"a": [1, 2.5, None, True, "x", {"b": ()}], 3: 4}, "c") == ""
    many = [0] * 1000
    bomb = [many] * 1000  # a few bytes a line in a pickle, a million values when walked
    loop: list[object] = []
    loop.append(loop)
    for value, text in (
        ({"a": {"b": "x${y}"}}, "c.a.b=x${y}: has ${"),
        ({"${y}": 1}, "c: the key ${y}: has ${"),
        ({"a\n": 1}, "c: the key a\\n: has characters that cannot be printed"),
        ({(1, 2): 1}, "c: a key of type tuple"),
        ({"a": torch.zeros(1)}, "c.a: Tensor is not plain data"),
        ({"a": b"x"}, "c.a: bytes is not plain data"),
        ([2**63], "c[0]: a number of more than 64 bits"),
        (bomb, f"c: more than {MOST_VALUES} values"),
        (loop, f": more than {DEEPEST} levels"),
        ("x" * 10_001, "has 10001 characters"),
    ):
        assert text in problem_with(value, "c")


OTHERS = {
    "classes": ["abc", [1] * 16, ["a"] * 15],
    "palette": [
        [[0, 0, 0]] * 15,
        # Each is written into a page as a colour.
        *([color] * 16 for color in ([0, 0, 256], ["red"], [0.5, 0, 0], [True, 0, 0], [0, 0], "a")),
        [["0;background:url(//x)", 0, 0]] * 16,
    ],
    "step": ["3", -1, True],
    "processes": [0],
    "best_score": ["x"],
    "best_step": [-1],
    "evaluations_since_best": [0.5],
    "scores": [{"miou": "x"}],
    "scaler": [{"scale": 1.0}],
    "run_id": ["a' or 1=1"],
    "training_set": ["a\nb"],
    "version": [["1"]],
    "ema": [{"module.x": 1}],
    "optimizer": [[1]],
    "model": [{"a\x1b": torch.zeros(1)}],
    "config": ["x", {}, {"data": {}}],
    "best": [[[1]]],
    "format": [torch.tensor([2, 2])],
}
"""Field of a checkpoint -> values of another type."""


@pytest.mark.bad_input("K20")
@pytest.mark.parametrize("field", OTHERS)
def test_K20_fields_of_a_file_that_are_of_another_type(saved, place, field):
    for value in OTHERS[field]:
        reported = outcome("resume", {**saved, field: value}, place)
        assert reported
        assert len(reported.splitlines()) == 1
        assert field in reported
        assert printable(reported) == reported


@pytest.mark.bad_input("K20")
def test_K20_numbers_of_another_kind_and_files_that_are_gone_are_taken(saved, place):
    config = copy.deepcopy(saved["config"])
    config["optimizer"]["betas"] = [0, 0.999]  # torch takes floats alone
    config["model"]["backbone"]["weights"] = "/nowhere/weights.pth"
    assert outcome("checkpoint", {**saved, "config": config}, place) is None
    assert outcome("resume", {**saved, "config": config}, place) is None
    config["data"]["batch_size"] = {"a": 1}
    reported = outcome("resume", {**saved, "config": config}, place)
    assert "data.batch_size={'a': 1}: expected a whole number" in reported
    config["data"] |= {"batch_size": 2, "root": True}
    reported = outcome("resume", {**saved, "config": config}, place)
    assert "data.root=True: expected a folder, or null" in reported


@pytest.mark.bad_input("K20")
def test_K20_fields_that_a_file_lacks(saved, place):
    for field in checkpoint_format.FOR_RESUME:
        reported = outcome("resume", {k: v for k, v in saved.items() if k != field}, place)
        assert f"there is no {field} in it" in reported


def test_the_printed_error_cannot_steer_the_terminal(monkeypatch, capsys):
    def work(_):
        raise InputError("a\x1b[2Jb\nc\u202e")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli.run(work, "train")
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\nc\\u202e\n"
