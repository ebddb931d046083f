"""The tools from the command line to their files: in this process, except where there are two."""

import csv
import hashlib
import io
import json
from contextlib import redirect_stdout

import pytest
import torch
from conftest import ROOT, TINY, call, tool

import danet
from danet.checkpoint import format as checkpoint_format


def fingerprint(path):
    """SHA-256 over weights and optimizer, tensor by tensor."""
    saved, digest = checkpoint_format.load(path), hashlib.sha256()

    def feed(node):
        if isinstance(node, dict):
            for key in sorted(node, key=str):
                digest.update(str(key).encode())
                feed(node[key])
        elif isinstance(node, (list, tuple)):
            for item in node:
                feed(item)
        elif isinstance(node, torch.Tensor):
            digest.update(node.contiguous().numpy().tobytes())
        else:
            digest.update(repr(node).encode())

    feed([saved["model"], saved["ema"], saved["optimizer"], saved["scaler"], saved["step"]])
    return digest.hexdigest()


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


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["trainer.accumulate=2", "trainer.ema_decay=0.9"]], ids=str)
def test_a_run_cut_short_ends_like_a_whole_one(tmp_path, extra):
    settings = [*TINY, "trainer.steps=8", "data.num_workers=1", "loss=ohem", *extra]
    call("train", *settings, "run.dir=whole")
    call("train", *settings, "run.dir=cut", "trainer.stop_at=5")
    assert checkpoint_format.load(tmp_path / "cut/last.pt")["step"] == 5
    call("train", "resume=cut/last.pt")
    assert fingerprint(tmp_path / "cut/last.pt") == fingerprint(tmp_path / "whole/last.pt")
    ends = (
        [x["loss"] for x in lines_of(tmp_path / f) if "loss" in x][-1] for f in ("cut", "whole")
    )
    assert len(set(ends)) == 1


def pixels_in(text):
    rows = list(csv.reader(io.StringIO(text)))[1:]
    return sum(int(cell) for row in rows for cell in row[1:])


def test_load_model_gives_the_network_of_a_checkpoint(run):
    model = danet.load_model(run[0] / "last.pt")
    assert not model.training
    assert model.classes[0] == "sky"
    image = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    assert model(image).logits.shape == (1, 16, 50, 70)


@pytest.mark.slow
def test_two_processes_make_one_run_and_count_each_image_once(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    settings = [*TINY, "trainer.steps=4", "run.name=two"]
    done = tool("train", *settings, cwd=tmp_path, launcher=launcher)
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    assert done.stdout.count("steps 0 to 4 of 4 images") == 1
    settings = [f"checkpoint={folder / 'last.pt'}", "device=cpu"]
    tool("eval", *settings, "output=two", cwd=tmp_path, launcher=launcher)
    call("eval", *settings, "output=one")
    matrices = {(tmp_path / n / "confusion.csv").read_text() for n in ("one", "two")}
    assert pixels_in(*matrices) == 5 * 48 * 96
    one = json.loads((tmp_path / "one/metrics.json").read_text())
    assert lines_of(folder)[-1]["miou"] == one["miou"]


def test_the_two_commands_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text()
    assert text.index("bash scripts/quickstart.sh") < text.index("bash scripts/test.sh")
