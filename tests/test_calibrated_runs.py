"""From a trained network to one whose confidence can be trusted, by the commands themselves."""

import csv
import io
import json
import math
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from conftest import TINY, call, tool
from PIL import Image

import danet
from danet.checkpoint import format as checkpoint_format
from danet.config.build import checked_config, make_dataset
from danet.evaluation.calibration import LEVELS
from danet.evaluation.fuse import fuse_for_inference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns a run of two steps whose best network is three times too sure, always alike."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    settings = [*TINY, "data.num_workers=0", "run.log_to=[]"]
    with redirect_stdout(io.StringIO()):
        call("train", *settings, "trainer.steps=2", f"run.dir={folder / 'run'}")
    path = folder / "run/last.pt"
    saved = checkpoint_format.load(path)
    dataset = make_dataset(checked_config(saved, path), "val", training=False)
    pixels = sum(
        np.bincount(s.mask.ravel(), minlength=256)[:16] for s in map(dataset.__getitem__, range(5))
    )
    saved["model"]["head.classify.1.weight"].normal_(std=0.2)
    saved["model"]["head.classify.1.bias"][:] = torch.from_numpy(3 * np.log(pixels + 100.0))
    for name in ("last", "best", "step_000000002"):
        checkpoint_format.save(folder / f"run/{name}.pt", saved)
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Returns a copy of the run, with hard links as a training leaves them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    step = tmp_path / "run/step_000000002.pt"
    step.write_bytes((trained / step.name).read_bytes())
    for name in ("last", "best"):
        (tmp_path / f"run/{name}.pt").hardlink_to(step)
    return tmp_path / "run"


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_a_calibrated_checkpoint_is_scored_predicted_exported_and_resumed(run, tmp_path, capsys):
    call("eval", "checkpoint=run", "device=cpu", "output=before")
    call("eval", "checkpoint=run", "device=cpu", "output=after", "calibrate=true")
    printed = capsys.readouterr().out
    before, after = metrics_of(tmp_path / "before"), metrics_of(tmp_path / "after")
    assert after["uncalibrated"] == before["calibration"]
    assert after["calibration"]["temperature"] == pytest.approx(3, rel=0.3)
    assert after["calibration"]["ece"] < before["calibration"]["ece"] / 2
    assert (after["miou"], after["per_class"]) == (before["miou"], before["per_class"])
    shown = f"temperature {after['calibration']['temperature']:.4f}"
    for name in ("best", "last", "step_000000002"):
        assert f"{run.name}/{name}.pt: {shown}" in printed
        assert (run / f"{name}.pt").samefile(run / "last.pt")
    # All levels of the histogram, in pixels.
    with (tmp_path / "after/confidence.csv").open() as file:
        rows = list(csv.DictReader(file))
    level = [float(row["confidence"]) * LEVELS for row in rows]
    wrong, right = (np.array([int(row[k]) for row in rows]) for k in ("wrong", "right"))
    assert np.abs(np.round(level) - level).max() < 0.05
    assert right.sum() / (wrong + right).sum() == pytest.approx(after["pixel_accuracy"])
    # Again: nothing is left to be done.
    call("eval", "checkpoint=run", "device=cpu", "output=again", "calibrate=true")
    again = metrics_of(tmp_path / "again")
    assert again["uncalibrated"] == after["calibration"] == again["calibration"]
    call(
        "export",
        "checkpoint=run/best.pt",
        "formats=[]",
        "output=exported",
        "metrics=after/metrics.json",
    )
    card = (tmp_path / "exported/README.md").read_text()
    assert f"at temperature {after['calibration']['temperature']:.4g}" in card
    models = [danet.load_model(path) for path in ("run", "exported")]
    assert models[0].temperature == models[1].temperature == after["calibration"]["temperature"]
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    found = [danet.predict(model, image, maps=["probability"]) for model in models]
    logits = models[0](torch.from_numpy(image).movedim(-1, 0)[None]).logits[0].detach()
    expected = (logits / models[0].temperature).softmax(dim=0).numpy()
    for prediction in found:
        np.testing.assert_allclose(prediction.probability, expected, rtol=0, atol=1e-4)
        assert np.array_equal(prediction.classes, danet.predict(models[0], image))
    # Its weights change in a training that goes on.
    settings = [*TINY, "data.num_workers=0", "run.log_to=[]", "trainer.device=cpu"]
    call(
        "train",
        *settings,
        "trainer.steps=3",
        "resume=run/last.pt",
        "run.dir=longer",
        "allow_changes=true",
    )
    call("train", *settings, "trainer.steps=1", "init_from=run/last.pt", "run.dir=other")
    assert danet.load_model("longer/last.pt").temperature == 1.0
    assert danet.load_model("other/last.pt").temperature == 1.0


def test_histograms_are_equal_to_the_byte_for_one_two_and_three_processes(run, tmp_path):
    written = []
    for number in (1, 2, 3):
        path = tmp_path / f"net{number}.pt"
        path.write_bytes((run / "last.pt").read_bytes())
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={number}", "--standalone"]
        output = tmp_path / f"scores{number}"
        typed = [f"checkpoint={path}", "device=cpu", f"output={output}", "calibrate=true"]
        done = tool("eval", *typed, cwd=tmp_path, launcher=launcher)
        assert done.stdout.count("before: expected calibration error") == 1
        facts = metrics_of(output)
        written.append(
            {
                **{
                    name: (output / name).read_bytes()
                    for name in ("confusion.csv", "confidence.csv")
                },
                "calibration": facts["calibration"],
                "uncalibrated": facts["uncalibrated"],
                "temperature": checkpoint_format.load(path)["temperature"],
            }
        )
    assert written[0] == written[1] == written[2]
    assert written[0]["confidence.csv"].count(b"\n") > 50


def test_what_cannot_be_calibrated_is_refused_with_advice_that_works(run, capsys):
    def refused(*settings):
        call("eval", "device=cpu", "calibrate=true", *settings, code=2)
        return capsys.readouterr().err

    assert "split=train was trained on" in refused("checkpoint=run", "split=train")
    call("export", "checkpoint=run/best.pt", "formats=[]", "output=exported")
    for name in ("exported", "hf://owner/name"):
        message = refused(f"checkpoint={name}")
        assert "calibrate the checkpoint it was made of, and export that again" in message
    call("eval", "checkpoint=run/best.pt", "device=cpu", "calibrate=true")
    call("export", "checkpoint=run/best.pt", "formats=[]", "output=exported")
    assert danet.load_model("exported").temperature != 1.0


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    for name in ("a", "=b", "c"):
        Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save(
            tmp_path / f"pictures/{name}.png"
        )
    return tmp_path / "pictures"


def test_maps_and_unknown_pixels_are_those_of_predict(run, pictures, tmp_path, capsys):
    # As the tool runs it.
    model = fuse_for_inference(danet.load_model(run / "best.pt"), torch.device("cpu"))
    found = {
        path.stem: danet.predict(model, path, maps=["confidence", "entropy", "probability"])
        for path in pictures.iterdir()
    }
    least = float(np.median(found["a"].confidence))
    wanted = "write=[index,color,overlay,confidence,entropy,probability,coco,labelme]"
    typed = ["checkpoint=run/best.pt", "images=pictures", "device=cpu", wanted]
    for kind, largest in (("uint8", 255), ("uint16", 65535), ("npy", None)):
        call("predict", *typed, f"maps={kind}", f"output={kind}", f"min_confidence={least}")
        printed = capsys.readouterr().out
        folder = tmp_path / kind
        for name, prediction in found.items():
            maps = {}
            for of in ("confidence", "entropy"):
                path = folder / of / name
                maps[of] = (
                    np.asarray(Image.open(f"{path}.png")) if largest else np.load(f"{path}.npy")
                )
            maps["probability"] = np.load(folder / f"probability/{name}.npy")
            for of, stored in maps.items():
                exact = getattr(prediction, of)
                assert stored.dtype == (kind if largest else "float32")
                assert np.abs(stored / (largest or 1) - exact).max() <= 0.51 / (largest or 1e6)
            index = np.asarray(Image.open(folder / f"index/{name}.png"))
            unknown = prediction.confidence < least
            assert np.array_equal(index, np.where(unknown, 255, prediction.classes))
            assert not np.asarray(Image.open(folder / f"color/{name}.png"))[unknown].any()
            drawn = np.asarray(Image.open(folder / f"overlay/{name}.png"))
            image = np.asarray(Image.open(pictures / f"{name}.png"))
            assert np.array_equal(drawn[unknown], image[unknown])
    coco = json.loads((tmp_path / "npy/coco/annotations.json").read_text())
    number = next(i["id"] for i in coco["images"] if i["file_name"] == "a.png")
    covered = sum(a["area"] for a in coco["annotations"] if a["image_id"] == number)
    assert covered <= (found["a"].confidence >= least).sum()
    lines = [json.loads(x) for x in (tmp_path / "npy/predictions.jsonl").read_text().splitlines()]
    for line in lines:
        prediction = found[line["name"]]
        assert line["confidence"] == pytest.approx(prediction.confidence.mean(dtype=np.float64))
        assert line["unknown"] == (prediction.confidence < least).mean()
        assert sum(line["shares"].values()) + line["unknown"] == pytest.approx(1)
    order = sorted(found, key=lambda name: found[name].confidence.mean(dtype=np.float64))
    with (tmp_path / "npy/least_sure.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"].removeprefix("'") for row in rows] == order
    assert "'=b" in {row["name"] for row in rows}
    assert f"least sure: {order[0]} " in printed


def test_results_of_another_temperature_or_threshold_are_not_mixed(run, pictures, capsys):
    typed = ["checkpoint=run/best.pt", "images=pictures", "device=cpu", "output=out"]
    call("predict", *typed)
    # As an earlier version left it.
    origin = json.loads((pictures.parent / "out/predictions.json").read_text())
    kept = {k: v for k, v in origin.items() if k not in ("temperature", "min_confidence", "maps")}
    (pictures.parent / "out/predictions.json").write_text(json.dumps(kept))
    call("predict", *typed)
    assert "3 were there already" in capsys.readouterr().out
    call("eval", "checkpoint=run/best.pt", "device=cpu", "calibrate=true")
    for settings in ((), ("min_confidence=0.5",), ("maps=npy",)):
        call("predict", *typed, *settings, code=2)
        message = capsys.readouterr().err
        assert "temperature, min_confidence or maps are there; name another folder" in message
    call("predict", *typed[:-1], "output=elsewhere")
    assert not math.isnan(danet.load_model("run").temperature)
