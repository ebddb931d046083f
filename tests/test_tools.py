"""The tools from the command line to their files: in this process, except where there are two."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, call, save_picture

import danet
from danet.checkpoint import format as checkpoint_format
from danet.engine.trainer import Trainer
from danet.errors import Interrupted


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
    saved = torch.load(folder / "best.pt", weights_only=True)
    best = f"best: a/best.pt, mIoU {100 * saved['best_score']:.2f} at step {saved['step']}\n"
    for part in ("0 to 6 of 2 images; cpu, float32", "booth", f"checkpoint=a/last.pt\n{best}"):
        assert part in printed
    lines = lines_of(folder)
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((2, "train"), (3, "train"), (3, "attention"), (3, "val")),
        *((4, "train"), (6, "train"), (6, "attention"), (6, "val")),
    ]
    assert {"loss_main", "loss_position", "loss_channel", "lr", "lr_head", "data_waiting"} <= set(
        lines[0]
    )
    assert {"miou", "iou/bus", "pixel_accuracy"} <= set(lines[-1])
    saved = torch.load(folder / "last.pt", weights_only=True)
    assert (saved["classes"][-1], len(saved["palette"]), saved["step"]) == ("booth", 16, 6)


def test_the_progress_bar_comes_after_the_first_line(capsys):
    call("train", *TINY, "trainer.steps=1", "run.log_to=[]")
    seen = capsys.readouterr()
    assert seen.out.index("steps 0 to 1 of") < seen.out.index("step 1: validation")
    assert seen.err.startswith("\rtrain:   0%")


def test_tools_take_the_folder_of_a_run_for_its_best_checkpoint(run, capsys):
    folder, _ = run
    said = f"checkpoint={folder}: using best.pt\n"
    for name, *settings in (("eval", "device=cpu"), ("export", "formats=[]")):
        capsys.readouterr()
        call(name, f"checkpoint={folder}", f"output={name}", *settings)
        assert capsys.readouterr().out.startswith(said)
    metrics = json.loads(Path("eval/metrics.json").read_text())
    assert metrics["checkpoint"] == str(folder / "best.pt")
    one, other = (danet.load_model(path).state_dict() for path in (folder, folder / "best.pt"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    call("train", *TINY, "trainer.steps=1", "run.dir=b", f"init_from={folder}")
    assert f"init_from={folder / 'best.pt'}: " in capsys.readouterr().out


def test_ctrl_c_ends_a_sweep_and_is_no_error(monkeypatch, capsys):
    started = []

    def stop(trainer, _):
        started.append(trainer)
        raise Interrupted("stopped by SIGINT at step 0 of 1")

    monkeypatch.setattr(Trainer, "fit", stop)
    call("train", "-m", *TINY, "run.log_to=[]", "seed=1,2", code=Interrupted.exit_code)
    assert len(started) == 1
    said = capsys.readouterr().err
    assert said.endswith("stopped by SIGINT at step 0 of 1\n")
    assert "error" not in said


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
