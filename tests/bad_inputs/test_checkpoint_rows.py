"""Checkpoints that are not as they must be: each is refused or accepted as promised.

K01 to K12 are met by evaluation, by going on and by starting from weights; K13 to K17 are of going
on. The files are made here, of a network of a few thousand weights.
"""

import copy
import functools
import os
import pickle

import pytest
import torch
import torchvision
from conftest import TINY
from foreign import content
from starts import eval_command, train_command
from test_config import compose

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.weights import initialise, load_backbone
from danet.config.build import make_model
from danet.config.validate import check
from danet.errors import InputError
from danet.models.resnet import ResNet

SETTINGS = ["data=scenes", *TINY, "trainer.steps=6", "data.num_workers=0"]


@functools.cache
def whole():
    """Returns the state of a run of six steps at the third."""
    return content(SETTINGS)


def saved(path, **changes):
    """Writes a checkpoint with other parts; returns its path."""
    checkpoint_format.save(path, {**copy.deepcopy(whole()), **changes})
    return path


@pytest.fixture
def evaluated(capsys):
    return functools.partial(eval_command, capsys)


@pytest.fixture
def trained(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return functools.partial(train_command, capsys)


def weights(**changes):
    """Returns the tensors of the network with some replaced."""
    return {**copy.deepcopy(whole()["model"]), **changes}


def test_K01_path_that_does_not_exist(evaluated, trained, tmp_path):
    for name in ("last.pt", "step_000000003.pt"):
        saved(tmp_path / name)
    there = f"there are {tmp_path}/last.pt, {tmp_path}/step_000000003.pt"
    evaluated(f"checkpoint={tmp_path}/lost.pt").refused(f"checkpoint={tmp_path}/lost.pt", there)
    (tmp_path / "last.pt").rename(tmp_path / "other.pt")
    (tmp_path / "step_000000003.pt").rename(tmp_path / "older.pt")
    there = f"there are {tmp_path}/older.pt, {tmp_path}/other.pt"
    evaluated(f"checkpoint={tmp_path}").refused("a folder without a checkpoint of a run", there)
    trained(f"resume={tmp_path}/lost.pt").refused(f"resume={tmp_path}/lost.pt", there)
    evaluated(f"checkpoint={tmp_path}/no/x.pt").refused(f"no folder {tmp_path}/no")


@pytest.mark.parametrize("kept", [0, 1, 2000, -1])
def test_K02_file_that_is_cut(kept, tmp_path):
    older = saved(tmp_path / "step_000000003.pt")
    path = saved(tmp_path / "step_000000006.pt", step=6)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError) as error:
        checkpoint_format.load(path)
    text = str(error.value)
    assert text.startswith(f"checkpoint={path}: ")
    assert "damaged or incomplete" in text or "not a checkpoint: 1 bytes that begin" in text
    assert kept == 1 or text.endswith(f"; {older} is whole")


def test_K03_flipped_byte(evaluated, trained, tmp_path):
    path = saved(tmp_path / "last.pt")
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    for start, key in ((evaluated, "checkpoint"), (trained, "resume")):
        start(f"{key}={path}").refused(f"{key}={path}: damaged", "the checksum at its end")
    with pytest.raises(InputError, match=r"init_from=.*: damaged: .* checksum"):
        initialise(torch.nn.Linear(1, 1), path)


def test_K04_text_saved_as_checkpoint(evaluated, tmp_path):
    path, text = tmp_path / "x.pth", b"<html>Not found</html>"
    path.write_bytes(text)
    message = f"{path}: not a checkpoint: {len(text)} bytes that begin with {text!r}"
    evaluated(f"checkpoint={path}").refused(f"checkpoint={message}")
    with pytest.raises(InputError, match=r"not a checkpoint: .* bytes that begin with"):
        initialise(torch.nn.Linear(1, 1), path)


class Command(str):
    """Is run as a command when it is unpickled."""

    def __reduce__(self):
        return os.system, (str(self),)


@pytest.mark.fault("T22", "a checkpoint that would run a command when it is read")
@pytest.mark.parametrize("protocol", [0, 4, "zip"])
def test_K05_pickle_that_would_run_a_command(evaluated, trained, protocol, tmp_path):
    path = tmp_path / "x.pth"
    harmful = {"format": 2, "model": Command(f"touch {tmp_path}/ran")}
    if protocol == "zip":
        torch.save(harmful, path)
    else:
        path.write_bytes(pickle.dumps(harmful, protocol=protocol))
    parts = ("it asks to call posix.system", "nothing of it was run")
    for start, key in ((evaluated, "checkpoint"), (trained, "resume")):
        start(f"{key}={path}").refused(f"{key}={path}", *parts)
    with pytest.raises(InputError, match=r"it asks to call posix\.system"):
        initialise(torch.nn.Linear(1, 1), path)
    assert not (tmp_path / "ran").exists()


def test_K06_weights_for_another_number_of_classes(evaluated, tmp_path):
    name = "head.classify.1"
    width = whole()["model"][f"{name}.weight"].shape[1]
    other = {f"{name}.weight": torch.zeros(5, width, 1, 1), f"{name}.bias": torch.zeros(5)}
    path = saved(tmp_path / "last.pt", model=weights(**other))
    evaluated(f"checkpoint={path}", "device=cpu").refused(
        f"checkpoint={path}: the weights do not fit its own config",
        "it has 5 classes and this network 16",
        f"{name}.weight is (5, {width}, 1, 1) in the file and (16, {width}, 1, 1) here",
    )


def test_K07_fine_tuning_with_another_number_of_classes(tmp_path):
    path = saved(tmp_path / "last.pt")
    settings = ["data=folder", "data.root=/data", "data.classes=[a,b,c]", *TINY[4:]]
    model = make_model(check(compose(*settings)))
    lines = initialise(model, path)
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, whole()["model"][f"backbone.{name}"])
    assert f"of the backbone all {len(model.backbone.state_dict())}" in lines[0]
    left = [name for name in model.state_dict() if "classify" in name]
    assert len(left) == 6
    assert lines[1].startswith(
        f"init_from={path}: the rest is left out, or random as before: it has 16 classes and this "
        f"network 3; shape: {left[0]} is ("
    )
    assert [name for name in model.state_dict() if f"{name} is (" in lines[1]] == left[:3]
    assert lines[1].endswith(" and 3 more")
    assert len(lines) == 2


def test_K08_backbone_of_another_depth(tmp_path):
    path = tmp_path / "resnet50.pth"
    with torch.device("meta"):
        names = torchvision.models.resnet50().state_dict()
        backbone = ResNet(depth=101)
    torch.save({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(InputError, match="has a ResNet-50 and this network a ResNet-101; set ano"):
        load_backbone(backbone, 101, str(path))
    own = saved(tmp_path / "last.pt")
    deeper = make_model(check(compose(*SETTINGS, "model.backbone.depth=34")))
    with pytest.raises(InputError, match="has a ResNet-18 and this network a ResNet-34"):
        initialise(deeper, own)


def test_K09_module_in_front_of_every_name(evaluated, tmp_path):
    named = {f"module.{name}": value for name, value in whole()["model"].items()}
    path = saved(tmp_path / "last.pt", model=named)
    text = f"checkpoint={path}: module. was taken off the names"
    evaluated(f"checkpoint={path}", "device=cpu").accepted(text)


def test_K10_plain_weights_given_to_resume(trained, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(whole()["model"], path)
    trained(f"resume={path}").refused(
        f"resume={path}: not a checkpoint of this project", "state of an optimizer", "init_from"
    )


def test_K11_weights_that_are_no_numbers(evaluated, tmp_path):
    bad = whole()["model"]["backbone.conv1.weight"].clone()
    bad[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    path = saved(tmp_path / "last.pt", model=weights(**{"backbone.conv1.weight": bad}))
    text = f"3 of {bad.numel()} values of backbone.conv1.weight are NaN or infinite"
    evaluated(f"checkpoint={path}").refused(f"checkpoint={path}: {text}")
    with pytest.raises(InputError, match=text):
        initialise(torch.nn.Linear(1, 1), path)


def test_K12_newer_format(evaluated, tmp_path):
    path = saved(tmp_path / "last.pt", format=checkpoint_format.FORMAT + 1, version="9.0")
    evaluated(f"checkpoint={path}").refused("format 4 of danet 9.0", "which reads format 3")


def test_K13_another_number_of_processes(trained, tmp_path):
    path = saved(tmp_path / "last.pt", processes=2)
    trained(f"resume={path}", "data.batch_size=4").accepted(
        "1 process(es) instead of 2", "same samples as before", "weights are not bit-equal"
    )


def test_K14_C28_another_batch_crop_or_network(trained, tmp_path):
    path = saved(tmp_path / "last.pt")
    trained(f"resume={path}", "data.batch_size=4").refused(
        "the run had 2 images a step", "now it would have 4", "allow_changes=true"
    )
    trained(f"resume={path}", *SETTINGS, "data.size=[64,64]").refused(
        "data.size: [48, 96] in the checkpoint, [64, 64] now", "allow_changes=true"
    )
    trained(f"resume={path}", "model.backbone.depth=34", "optimizer.weight_decay=0").refused(
        "  model.backbone.depth: 18 in the checkpoint, 34 now", "init_from"
    )


def test_K15_finished_run(trained, tmp_path):
    path = saved(tmp_path / "last.pt", step=6, evaluated_at=6)
    before = path.read_bytes()
    seen = trained(f"resume={path}", until="make_model")
    assert (seen.code, seen.err) == (0, "")
    assert "this run is finished, at step 6 of 6" in seen.out
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_K16_newest_checkpoint_damaged(trained, tmp_path):
    saved(tmp_path / "run_step").rename(tmp_path / "step_000000003.pt")
    (tmp_path / "last.pt").write_bytes(b"PK")
    trained("resume=auto", f"run.dir={tmp_path}").accepted(
        f"resume={tmp_path}/last.pt: damaged or incomplete",
        f"going on from {tmp_path}/step_000000003.pt instead, at step 3; the steps after it",
    )


@pytest.mark.fault("T24", "all checkpoints of a run are damaged")
def test_K17_all_checkpoints_damaged(trained, tmp_path):
    for name in ("last.pt", "step_000000003.pt"):
        (tmp_path / name).write_bytes(b"PK")
    trained("resume=auto", f"run.dir={tmp_path}").refused(
        f"{tmp_path}/last.pt", f"no checkpoint in {tmp_path} is whole", "another run.dir"
    )
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"PK"}


def test_K18_evaluation_without_a_checkpoint(evaluated):
    evaluated().refused("checkpoint: no value is given; set checkpoint=<file>")
