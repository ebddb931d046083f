"""Weights of others compute here what they compute there, and every tensor is accounted for."""

import collections
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import originals
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, call
from test_config import compose

import danet
from danet.checkpoint.convert import fill_in, network_of, rename
from danet.checkpoint.weights import initialise, read_state_dict
from danet.config import resume
from danet.config.build import make_model
from danet.config.validate import check
from danet.errors import InputError
from danet.tools import convert

pytestmark = pytest.mark.slow

PRECISION = 1e-5
"""Of the spread of logits that were computed in float64 on both sides.

In float32 the rounding of a hundred layers is up to a hundred times what is left here, and another
with every kind of CPU. What is left is about 2e-7: ours keeps mean and std of an image in float32,
and the channel attention computes its energies so.
"""
CITYSCAPES = "data=cityscapes", "data.root=/data"
KEYS = Path(os.environ.get("CHECKPOINT_KEYS", ROOT.parent / "shared/data/checkpoint_keys"))


@pytest.fixture
def run(capsys):
    """Starts the tool in this process; returns what it printed."""

    def start(*arguments, code=0):
        call("convert", *arguments, code=code)
        return "".join(capsys.readouterr())

    return start


def converted(state, source, *settings):
    """Returns the network that is made of a state dict, as the tool makes it."""
    renamed, left_out = rename(state, source)
    assert left_out == {}
    model = make_model(check(compose(*CITYSCAPES, *network_of(renamed, "file")[0], *settings)))
    whole, fresh = fill_in(renamed, model.state_dict(), source, "file")
    assert fresh == []
    model.load_state_dict(whole)
    return model


def all_outputs(model, image):
    """Returns every output at the size of the image; norms and dropout as in evaluation."""
    model.eval()
    for module in (model, model.head):
        module.training = True
    with torch.no_grad():
        output = model(image)
    size = image.shape[-2:]
    return {
        name: F.interpolate(x, size, mode="bilinear", align_corners=model.align_corners)
        for name, x in {"main": output.logits, **output.auxiliary}.items()
    }


@pytest.mark.parametrize("program", ["authors", "mmseg"])
@pytest.mark.parametrize(("depth", "option"), [(50, True), (101, False)])
def test_a_network_computes_what_the_original_code_computes(program, depth, option):
    """The option: a multi-grid of the authors, aligned corners of mmsegmentation."""
    image = torch.randint(0, 256, (1, 3, 73, 96), dtype=torch.uint8)
    if program == "authors":
        state = originals.random_state("official", depth)
        grid = "[4,8,16]" if option else "null"
        model = converted(state, "official", f"model.backbone.multi_grid={grid}").double()
        expected = originals.authors_forward(originals.in_float64(state), image, depth, option)
    else:
        state = originals.random_state("mmsegmentation", depth)
        corners = f"model.align_corners={str(option).lower()}"
        model = converted(state, "mmsegmentation", corners).double()
        expected = originals.mmseg_forward(originals.in_float64(state), image, depth, option)
    found = all_outputs(model, image)
    names = {"main", "position", "channel"} | ({"backbone"} if program == "mmseg" else set())
    assert found.keys() == expected.keys() == names
    for name, logits in expected.items():
        assert found[name].dtype == logits.dtype == torch.float64
        assert logits.std() > 0.1, "a test of zeros would prove nothing"
        assert (found[name] - logits).abs().max() < PRECISION * logits.std()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image).logits, found["main"])


@pytest.mark.parametrize("source", ["official", "mmsegmentation"])
def test_listed_names_and_shapes_are_those_of_our_networks(source):
    if not KEYS.is_dir():
        pytest.skip(f"no lists of keys at {KEYS}; name their folder in CHECKPOINT_KEYS")
    lists = json.loads((KEYS / f"{source}.json").read_text())
    models = lists["models"] if "models" in lists else {n: lists[n] for n in lists if n != "note"}
    for name, model in models.items():
        keys = {key: torch.empty(shape, device="meta") for key, shape, _ in model["keys"]}
        renamed, left_out = rename(keys, source)
        assert (len(renamed), left_out) == (len(keys), {})
        settings, num_classes = network_of(renamed, name)
        assert num_classes == model.get("num_classes", 19)
        data = {19: "cityscapes", 21: "pascal_voc", 150: "ade20k"}[num_classes]
        depth = 101 if "model/backbone=resnet101" in settings else 50
        shapes = {key: tuple(value.shape) for key, value in keys.items()}
        assert dict(originals.shapes(source, depth, data)) == shapes


# Files


@pytest.fixture(scope="module")
def authors_file(tmp_path_factory):
    """One as released: no counters, the classifier of ImageNet, the unused auxiliary layer.

    And as the authors' trainer writes: before zip archives, with a numpy scalar.
    """
    state = {
        name: value
        for name, value in originals.random_state("official", 50).items()
        if not name.endswith("num_batches_tracked")
    }
    state |= {
        "pretrained.fc.weight": torch.zeros(1000, 2048),
        "pretrained.fc.bias": torch.zeros(1000),
        "auxlayer.conv5.0.weight": torch.zeros(4, 4, 3, 3),
        "mystery": torch.zeros(2),
    }
    path = tmp_path_factory.mktemp("official") / "DANet50.pth.tar"
    ordered = collections.OrderedDict((f"module.{name}", value) for name, value in state.items())
    content = {"epoch": 240, "state_dict": ordered, "best_pred": np.float64(0.79)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path, state


def test_an_old_file_of_the_authors_becomes_a_checkpoint(authors_file, tmp_path, run):
    path, state = authors_file
    output = tmp_path / "new" / "danet50.pt"
    out = run("source=official", f"input={path}", f"output={output}")
    assert "module. was taken off the names" in out
    assert "left out, the classifier of ImageNet" in out
    assert "pretrained.fc.weight, pretrained.fc.bias" in out
    assert "never calls: auxlayer.conv5.0.weight" in out
    assert "left out, unknown names: mystery" in out
    assert "assumed, since the file does not specify it: model.backbone.multi_grid=[4,8,16]" in out
    assert f"python tools/eval.py checkpoint={output}" in out
    model = danet.load_model(output)
    assert model.classes[:2] == ("road", "sidewalk")
    image = torch.randint(0, 256, (1, 3, 41, 57), dtype=torch.uint8)
    expected = originals.authors_forward(originals.in_float64(state), image, 50, True)["main"]
    with torch.no_grad():
        logits = model(image).logits
        # float32 rounds these to about 2e-6 of their spread; another CPU, several times as much.
        assert (logits - expected).abs().max() < 1e-4 * expected.std()
    lines = initialise(model, output)
    assert "355 of 355" not in lines[0]
    count = len(model.state_dict()) - 2  # mean and std are those of the config
    assert f"{count} of {count} tensors taken" in lines[0]
    err = run("source=official", f"input={path}", f"output={output}", code=2)
    assert "there is such a file already" in err


def test_a_backbone_of_torchvision_becomes_a_start(tmp_path, run):
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    where = f"input={tmp_path / 'r18.pth'}", f"output={tmp_path / 'start.pt'}"
    err = run("source=torchvision", *where, code=2)
    assert "which classes are meant?" in err
    err = run("source=torchvision", where[0], f"output={tmp_path / 'x'}", code=2)
    assert "expected a name that ends in .pt" in err
    out = run("source=torchvision", *where, "data=camvid", "model/head=fcn")
    assert "left out, the classifier of ImageNet" in out
    assert "not in the file, so random: head.reduce.0.weight" in out
    assert f"train with init_from={tmp_path / 'start.pt'}" in out
    model = danet.load_model(tmp_path / "start.pt")
    assert torch.equal(model.backbone.layer4[1].conv2.weight, network.layer4[1].conv2.weight)
    config = check(compose(*CITYSCAPES, f"resume={tmp_path / 'start.pt'}"))
    with pytest.raises(InputError, match=r"no state of an optimizer.* with init_from"):
        resume.resolve(config, [], world_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=oficial"], "expected one of official, mmsegmentation, torchvision; did you mean"),
        (["source=mmsegmentation"], "tensors has a name of source=mmsegmentation"),
        (["source=official", "data=camvid"], "it has 19 classes, and data=camvid has"),
        (["source=official", "model.backbone.stem=8x8"], "expected one of 7x7"),
    ],
    ids=["unknown program", "another program", "other classes", "no such value"],
)
def test_a_wrong_command_is_reported_in_plain_words(
    authors_file, tmp_path, run, arguments, message
):
    err = run(f"input={authors_file[0]}", f"output={tmp_path / 'x.pt'}", *arguments, code=2)
    assert message in err
    assert not (tmp_path / "x.pt").exists()


def test_a_missing_tensor_is_named():
    model = torch.nn.ModuleDict({"head": torch.nn.Conv2d(3, 4, 1)})
    state = model.state_dict()
    with pytest.raises(InputError, match=r"file does not fit: missing: head\.bias"):
        fill_in({"head.weight": state["head.weight"]}, state, "official", "file")
    with pytest.raises(InputError, match=r"head\.bias is \(5,\) in the file and \(4,\) here"):
        fill_in({**state, "head.bias": torch.zeros(5)}, state, "official", "file")
    with pytest.raises(InputError, match="unexpected: tail"):
        fill_in({**state, "tail": torch.zeros(5)}, state, "official", "file")


# Reading without running


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_objects_of_other_packages_are_passed_over(tmp_path, monkeypatch, zipped):
    """Those of a training toolbox that is not installed where the file is read."""
    module = type(sys)("mmengine.logging.history_buffer")
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    buffer = module.HistoryBuffer()
    buffer.history = np.arange(3.0)
    names = ("mmengine", "mmengine.logging", module.__name__)
    for name in names:
        monkeypatch.setitem(sys.modules, name, module)
    content = {
        "state_dict": {"a.weight": torch.ones(2)},
        "message_hub": {"loss": buffer, "best": np.float32(1.5)},
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(InputError, match="it asks to call mmengine"):
        read_state_dict(tmp_path / "w.pth", "input")
    found = read_state_dict(tmp_path / "w.pth", "input", foreign=convert.FOREIGN)
    assert torch.equal(found["a.weight"], torch.ones(2))
    assert not any(name.startswith("mmengine") for name in sys.modules)


def test_a_numpy_function_is_never_called(tmp_path, monkeypatch):
    """What stands in for a foreign package is empty, whatever the file wants to do with it."""
    monkeypatch.chdir(tmp_path)

    class Saves:
        def __reduce__(self):
            return np.save, ("made.npy", np.zeros(1))

    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Saves()}, "w.pth")
    assert b"numpy" in pickle.dumps(np.save)
    read_state_dict(Path("w.pth"), "input", foreign=convert.FOREIGN)
    assert not Path("made.npy").exists()
