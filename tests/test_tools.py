"""The tools from the command line to their files: in this process, except where there are two."""

import io
import json
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import TINY, call, save_picture

import danet
from danet.checkpoint import format as checkpoint_format


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small training and what it printed, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        torch.set_num_threads(1)  # as every test has it
        call("train", *TINY, "trainer.steps=6", "trainer.eval_every=3", "run.dir=a")
    return folder / "a", printed.getvalue()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_what_it_promises(run):
    folder, printed = run
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    steps = {"step_000000003.pt", "step_000000006.pt"}
    assert names == {"best.pt", "last.pt", "config.yaml", "metrics.jsonl", "tensorboard"} | steps
    for part in ("0 to 6 of 2 images; cpu, float32", "booth", "checkpoint=a/last.pt"):
        assert part in printed
    lines = lines_of(folder)
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((2, "train"), (3, "train"), (3, "val"), (4, "train"), (6, "train"), (6, "val"))
    ]
    assert {"loss_main", "loss_position", "loss_channel", "lr", "lr_head", "data_waiting"} <= set(
        lines[0]
    )
    assert {"miou", "iou/bus", "pixel_accuracy"} <= set(lines[-1])
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert (saved["classes"][-1], len(saved["palette"]), saved["step"]) == ("booth", 16, 6)


def test_load_model_gives_the_network_of_a_checkpoint(run):
    model = danet.load_model(run[0] / "last.pt")
    assert not model.training
    assert model.classes[0] == "sky"
    image = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    assert model(image).logits.shape == (1, 16, 50, 70)


@pytest.mark.parametrize("tool", ["eval", "predict"])
def test_one_setting_of_the_training_s_protocol_may_be_changed(tool, network, tmp_path, capsys):
    save_picture(tmp_path / "a.png", np.zeros((20, 30, 3), np.uint8))
    images = [f"images={tmp_path / 'a.png'}"] if tool == "predict" else []
    typed = [f"checkpoint={network}", *images, f"output={tmp_path / 'out'}", "device=cpu"]
    call(tool, *typed, "evaluation.flip=true")
    found = tmp_path / "out" / ("metrics.json" if tool == "eval" else "predictions.json")
    whole = checkpoint_format.load(network)["config"]["evaluation"]
    assert whole["flip"] is False
    assert json.loads(found.read_text())["evaluation"] == {**whole, "flip": True}
    capsys.readouterr()
    call(tool, *typed, "evaluation.flipp=true", code=2)
    assert "evaluation.flipp: Whole takes no such argument; did you mean" in capsys.readouterr().err
    call(tool, *typed, "evaluation=sliding", "evaluation.max_pixels=9", code=2)
    assert "max_pixels" in capsys.readouterr().err
