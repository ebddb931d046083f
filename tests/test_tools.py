"""The tools, run as a user runs them: as processes, with their output read."""

import csv
import hashlib
import io
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, tool
from PIL import Image

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


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One small training, shared by the tests that only look at it."""
    folder = tmp_path_factory.mktemp("run")
    done = tool("train", *TINY, "trainer.steps=6", "trainer.eval_every=3", "run.dir=a", cwd=folder)
    return folder / "a", done


def test_a_run_leaves_what_it_promises(run):
    folder, done = run
    names = {p.name for p in folder.iterdir() if not p.name.startswith(".")}
    steps = {"step_000000003.pt", "step_000000006.pt"}
    assert names == {"best.pt", "last.pt", "config.yaml", "metrics.jsonl", "tensorboard"} | steps
    assert "0 to 6 of 2 images; cpu, float32" in done.stdout
    assert "booth" in done.stdout
    assert "checkpoint=a/last.pt" in done.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [
        *((2, "train"), (3, "train"), (3, "val"), (4, "train"), (6, "train"), (6, "val"))
    ]
    assert {"loss_main", "loss_position", "loss_channel", "lr", "lr_head", "data_waiting"} <= set(
        lines[0]
    )
    assert {"miou", "iou/bus", "pixel_accuracy"} <= set(lines[-1])


def test_a_checkpoint_holds_only_plain_values(run):
    saved = torch.load(run[0] / "last.pt", weights_only=True)
    assert saved["classes"][-1] == "booth"
    assert len(saved["palette"]) == 16
    assert saved["step"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["trainer.accumulate=2", "trainer.ema_decay=0.9"]], ids=str)
def test_a_run_cut_short_ends_like_a_whole_one(tmp_path, extra):
    settings = [*TINY, "trainer.steps=8", "data.num_workers=1", "loss=ohem", *extra]
    tool("train", *settings, "run.dir=whole", cwd=tmp_path)
    tool("train", *settings, "run.dir=cut", "trainer.stop_at=5", cwd=tmp_path)
    assert checkpoint_format.load(tmp_path / "cut/last.pt")["step"] == 5
    tool("train", "resume=cut/last.pt", cwd=tmp_path)
    assert fingerprint(tmp_path / "cut/last.pt") == fingerprint(tmp_path / "whole/last.pt")
    assert losses(tmp_path / "cut")[8] == losses(tmp_path / "whole")[8]


@pytest.mark.slow
def test_two_equal_commands_and_the_saved_config_give_equal_weights(run, tmp_path):
    tool("train", *TINY, "trainer.steps=6", "trainer.eval_every=3", "run.dir=b", cwd=tmp_path)
    same = ["--config-dir", str(run[0]), "--config-name", "config"]
    tool("train", *same, "run.dir=c", cwd=tmp_path)
    expected = fingerprint(run[0] / "last.pt")
    assert fingerprint(tmp_path / "b/last.pt") == expected
    assert fingerprint(tmp_path / "c/last.pt") == expected


@pytest.mark.slow
def test_resuming_is_refused_with_other_settings_and_ends_when_finished(run, tmp_path):
    path = run[0] / "last.pt"
    done = tool("train", f"resume={path}", cwd=tmp_path)
    assert "finished, at step 6 of 6" in done.stdout
    refused = tool("train", f"resume={path}", *TINY, "optimizer.lr=0.5", cwd=tmp_path, code=2)
    assert "optimizer.lr: 0.002 in the checkpoint, 0.5 now" in refused.stderr
    started = tool("train", *TINY, "debug=one_step", "resume=auto", "run.dir=x", cwd=tmp_path)
    assert "starting from step 0" in started.stdout
    refused = tool("train", *TINY, "debug=one_step", "run.dir=x", cwd=tmp_path, code=2)
    assert "run.dir=x: another run is there" in refused.stderr


@pytest.mark.slow
def test_eval_prints_the_last_validation_score_to_every_digit(run, tmp_path):
    last = json.loads((run[0] / "metrics.jsonl").read_text().splitlines()[-1])
    matrices = []
    for batch_size in (1, 3):
        output = tmp_path / str(batch_size)
        done = tool(
            "eval",
            f"checkpoint={run[0] / 'last.pt'}",
            f"output={output}",
            f"batch_size={batch_size}",
            "device=cpu",
            cwd=tmp_path,
        )
        assert f"miou={last['miou']}" in done.stdout
        metrics = json.loads((output / "metrics.json").read_text())
        assert metrics["miou"] == last["miou"]
        assert metrics["per_class"]["bus"]["iou"] == last["iou/bus"]
        matrices.append((output / "confusion.csv").read_text())
    assert matrices[0] == matrices[1]
    rows = list(csv.reader(io.StringIO(matrices[0])))[1:]
    assert sum(int(cell) for row in rows for cell in row[1:]) == 5 * 48 * 96


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol",
    [
        ["evaluation=sliding", "evaluation.crop=[48,48]", "evaluation.stride=[24,24]"],
        ["evaluation=multi_scale", "evaluation.scales=[0.5,1.0]"],
    ],
    ids=["sliding", "multi_scale"],
)
def test_eval_takes_other_protocols_and_splits(run, tmp_path, protocol):
    checkpoint_ = f"checkpoint={run[0] / 'best.pt'}"
    tool("eval", checkpoint_, "split=test", *protocol, "output=o", "device=cpu", cwd=tmp_path)
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["split"] == "test"
    assert metrics["evaluation"]["_target_"].split(".")[-1].lower() == protocol[0][11:].replace(
        "_", ""
    )
    assert 0 <= metrics["miou"] <= 1


@pytest.mark.slow
def test_visualize_draws_predictions_and_attention(run, tmp_path):
    checkpoint_ = f"checkpoint={run[0] / 'last.pt'}"
    done = tool("visualize", checkpoint_, "count=2", "output=p", "device=cpu", cwd=tmp_path)
    names = sorted(p.name for p in (tmp_path / "p").iterdir())
    drawn = [f"val_00000{i}{kind}.png" for i in (0, 4) for kind in ("", "_attention")]
    assert names == ["contact_sheet.png", *drawn]
    assert "p/val_000000.png" in done.stdout
    # One's own picture, with a name in another alphabet, and points by hand.
    own = tmp_path / "图 片.png"
    Image.fromarray(np.full((70, 90, 3), 128, np.uint8)).save(own)
    settings = [f"images={own}", "points=[[3,60],[80,5]]", "output=q", "device=cpu"]
    tool("visualize", checkpoint_, *settings, cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == [
        "contact_sheet.png",
        "图 片.png",
        "图 片_attention.png",
    ]
    refused = tool("visualize", checkpoint_, "classes=[buss]", cwd=tmp_path, code=2)
    assert "no class buss; did you mean bus?" in refused.stderr


def test_load_model_gives_the_network_of_a_checkpoint(run):
    model = danet.load_model(run[0] / "last.pt")
    assert not model.training
    assert model.classes[0] == "sky"
    image = torch.randint(0, 256, (1, 3, 50, 70), dtype=torch.uint8)
    assert model(image).logits.shape == (1, 16, 50, 70)


def test_a_hostile_config_in_a_checkpoint_is_refused(run, tmp_path):
    saved = checkpoint_format.load(run[0] / "last.pt")
    saved["config"]["model"]["head"] = {"_target_": "os.system", "command": "touch hit"}
    checkpoint_format.save(tmp_path / "bad.pt", saved)
    with pytest.raises(ValueError, match=r"bad.pt: its config is refused: .*os.system"):
        danet.load_model(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["trainer.stepz=3"], "trainer.stepz: there is no such key; did you mean trainer.steps?"),
        (["trainer.steps=many"], "trainer.steps=many: expected a whole number"),
        (["model/head=tripple"], "choices: cbam, channel, deeplab_v2, deeplab_v3, dual, fcn"),
        (["loss=ohemm"], "did you mean ohem?; choices: cross_entropy"),
        (["data=camvid"], "data.root: no value is given; set data.root=<folder>"),
        (["--steps", "3"], "--steps: settings are given without dashes, as in trainer.steps=300"),
        (["data.crop=512,512"], "a list data.crop=[512,512]"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_bad_override_ends_in_one_line_and_code_2(tmp_path, settings, message):
    done = tool("train", *settings, cwd=tmp_path, code=2)
    line = done.stderr.strip()
    assert line.startswith("error: ")
    assert message in line
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_help_shows_choices_settings_and_examples(tmp_path):
    text = tool("train", "--help", cwd=tmp_path).stdout
    for part in ("model/head: cbam, channel, deeplab_v2", "ema_decay: null", "torchrun"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def distributed(name, *settings, cwd, processes=2):
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return tool(name, *settings, cwd=cwd, launcher=launcher)


@pytest.mark.slow
def test_two_processes_make_one_run_and_count_each_image_once(tmp_path):
    done = distributed("train", *TINY, "trainer.steps=4", "run.name=two", cwd=tmp_path)
    (folder,) = (tmp_path / "runs" / "two").iterdir()
    assert done.stdout.count("steps 0 to 4 of 4 images") == 1
    settings = [f"checkpoint={folder / 'last.pt'}", "device=cpu"]
    distributed("eval", *settings, "output=two", cwd=tmp_path)
    tool("eval", *settings, "output=one", cwd=tmp_path)
    one, two = ((tmp_path / n / "confusion.csv").read_text() for n in ("one", "two"))
    assert one == two
    rows = list(csv.reader(io.StringIO(one)))[1:]
    assert sum(int(cell) for row in rows for cell in row[1:]) == 5 * 48 * 96
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["miou"] == json.loads((tmp_path / "one/metrics.json").read_text())["miou"]


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path):
    settings = [*TINY, "trainer.steps=6"]
    distributed("train", *settings, "run.dir=whole", cwd=tmp_path)
    distributed("train", *settings, "run.dir=cut", "trainer.stop_at=3", cwd=tmp_path)
    distributed("train", "resume=cut/last.pt", cwd=tmp_path)
    assert fingerprint(tmp_path / "cut/last.pt") == fingerprint(tmp_path / "whole/last.pt")

    refused = tool("train", "resume=cut/last.pt", cwd=tmp_path, code=2)
    assert "the run had 4 images a step" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_an_error_under_torchrun_is_reported_once_wherever_it_occurs(camvid_tree, tmp_path, bad):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = tool("train", "trainer.steps=0", cwd=tmp_path, launcher=launcher, code=1)
    assert done.stderr.count("error: trainer.steps=0") == 1
    # Of three validation images one process has the first and the third, the other the second.
    (camvid_tree / "images" / "val" / f"val_{bad}.png").write_bytes(b"not a picture")
    data = ["data=camvid", f"data.root={camvid_tree}", "data.crop=[32,32]", "data.batch_size=1"]
    data += ["data.num_workers=1", "trainer.device=cpu"]
    settings = [*data, "model.backbone.width=8", "debug=one_step"]
    done = tool("train", *settings, cwd=tmp_path, launcher=launcher, code=1)
    assert done.stderr.count(f"val_{bad}.png: not a readable image") == 1


@pytest.mark.slow
def test_camvid_trains_and_evaluates(camvid, tmp_path):
    settings = ["data.crop=[64,96]", "data.batch_size=2", "data.num_workers=1"]
    small = ["model.backbone.width=8", "trainer.steps=2", "trainer.log_every=1"]
    experiment = ["experiment=camvid_quick", f"data.root={camvid}"]
    # The test split is larger than needed: three of its pictures are enough for a look.
    for kind in ("images", "labels"):
        for split in ("train", "val"):
            target = tmp_path / "few" / kind / split
            target.mkdir(parents=True)
            for path in sorted((camvid / kind / split).iterdir())[:4]:
                (target / path.name).symlink_to(path)
    experiment[1] = f"data.root={tmp_path / 'few'}"
    done = tool("train", *experiment, *settings, *small, "run.dir=c", cwd=tmp_path)
    assert "Bicyclist" in done.stdout


def test_the_two_commands_of_the_readme_are_there():
    text = (ROOT / "README.md").read_text()
    assert text.index("bash scripts/quickstart.sh") < text.index("bash scripts/test.sh")
