"""A training on bands of float pictures, and all that is done with its checkpoint."""

import json

import numpy as np
import pytest
import torch
from conftest import call, write_pair
from PIL import Image

import danet
from danet.checkpoint import format as checkpoint_format
from danet.errors import InputError
from danet.types import IGNORE

tifffile = pytest.importorskip("tifffile", reason="the optional extra danet[tiff] is not installed")
pytestmark = pytest.mark.slow

SMALL = (
    *("data=folder", "data.classes=[a,b,c]", "data.crop=[32,32]", "data.batch_size=2"),
    *("data.num_workers=0", "model.backbone.width=8", "model.head.reduction=2", "trainer.steps=4"),
    *("trainer.precision=float32", "trainer.device=cpu", "trainer.eval_every=2", "run.log_to=[]"),
)
BANDS = ("data.channels=[5,3,2,1]", "data.range=auto", "data.rgb=[3,2,1]")


def plant(root):
    """Writes pictures of five bands, in units of their own, with a gap at the top."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            mask = rng.integers(0, 3, (6, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            noise = rng.normal(0, 1, (48, 64, 5))
            raw = 1000 * np.arange(5) + 50 * (mask[..., None] + noise)
            raw[:2] = np.nan
            write_pair(root, split, f"{i}", np.zeros((48, 64, 3), np.uint8), mask, labels="masks")
            (root / f"images/{split}/{i}.png").unlink()
            path = root / f"images/{split}/{i}.tif"
            settings = {"photometric": "minisblack", "planarconfig": "contig"}
            tifffile.imwrite(path, raw.astype(np.float32), **settings)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bands")
    torch.set_num_threads(1)  # as in the tests, which are compared with it
    plant(folder / "data")
    args = (*SMALL, *BANDS, f"data.root={folder / 'data'}", "data.class_mix=0.5")
    call("train", *args, f"run.dir={folder / 'run'}")
    return folder, args


def weights(path):
    return checkpoint_format.load(path)["model"]


def test_the_checkpoint_keeps_the_range_as_numbers_of_the_training_split(run):
    folder, _ = run
    saved = checkpoint_format.load(folder / "run/last.pt")
    found = saved["config"]["data"]["range"]
    assert found == saved["config"]["model"]["range"]
    paths = sorted((folder / "data/images/train").glob("*.tif"))
    pixels = np.concatenate([tifffile.imread(path).reshape(-1, 5) for path in paths])
    expected = np.nanpercentile(pixels[:, [4, 2, 1, 0]], [1, 99], axis=0).T
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_resumed_run_is_the_whole_one_from_a_cache_too(run):
    folder, args = run
    cache = ("data.cache=disk", f"data.cache_dir={folder / 'cache'}")
    for steps in ("trainer.stop_at=2", "trainer.stop_at=null"):
        call("train", *args, *cache, f"run.dir={folder / 'parts'}", "resume=auto", steps)
    whole, parts = weights(folder / "run/last.pt"), weights(folder / "parts/last.pt")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert any((folder / "cache").rglob("*.npy"))


@pytest.mark.parametrize("change", ["data.channels=4", "data.range=[0,9]", "data.rgb=[1,2,3]"])
def test_a_resumed_run_keeps_its_bands(run, capsys, change):
    folder, _ = run
    call("train", f"resume={folder / 'run'}", change, "allow_changes=true", code=2)
    key = change.split("=")[0]
    assert f"\n  {key}: " in capsys.readouterr().err


def test_predict_reads_files_as_the_training_did_and_takes_raw_values(run):
    folder, _ = run
    model = danet.load_model(folder / "run/best.pt")
    path = folder / "data/images/val/0.tif"
    raw = tifffile.imread(path)[..., [4, 2, 1, 0]]
    classes = danet.predict(model, str(path))
    assert np.array_equal(danet.predict(model, raw), classes)
    assert np.array_equal(danet.predict(model, torch.from_numpy(raw).movedim(-1, 0)), classes)
    assert np.array_equal(danet.predict(model, raw[None].astype(np.float64))[0], classes)
    low = np.array(model.bands.limits)[:, 0]
    filled = np.where(np.isfinite(raw), raw, low).astype(np.float32)
    with torch.no_grad():
        logits = model(torch.from_numpy(filled).movedim(-1, 0)[None]).logits
    assert np.array_equal(logits.argmax(dim=1)[0].numpy(), classes)
    for wrong in (raw[..., :3], raw[..., 0], raw.astype(complex)):
        with pytest.raises(InputError, match=r"expected an array \(H, W, 4\) .* of the raw values"):
            danet.predict(model, wrong)


def test_tools_show_score_and_predict_such_pictures(run, capsys):
    folder, _ = run
    checkpoint = f"checkpoint={folder / 'run/best.pt'}"
    call("eval", checkpoint, f"output={folder / 'eval'}", "evaluation=sliding",
         "evaluation.crop=[32,32]", "evaluation.stride=[24,24]")  # fmt: skip
    call("visualize", checkpoint, "count=2", "report=true", f"output={folder / 'drawn'}")
    assert (folder / "drawn/report.html").stat().st_size > 10_000
    images = folder / "data/images/val"
    call("predict", checkpoint, f"images={images}", f"output={folder / 'seen'}", "batch_size=2")
    call("visualize", checkpoint, f"images={images}", f"output={folder / 'own'}")
    found = danet.predict(danet.load_model(folder / "run/best.pt"), images / "1.tif")
    assert np.array_equal(np.asarray(Image.open(folder / "seen/index/1.png")), found)


def test_an_exported_network_takes_raw_values(run, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, _ = run
    checkpoint = f"checkpoint={folder / 'run/best.pt'}"
    call(
        "export", checkpoint, f"output={folder / 'out'}", "sizes=[[40,50]]", "formats=[onnx,torch]"
    )
    model, again = (danet.load_model(folder / place) for place in ("run/best.pt", "out"))
    raw = torch.rand(1, 4, 33, 47) * 4000
    assert again.bands == model.bands
    with torch.no_grad():
        assert torch.equal(model(raw).logits, again(raw).logits)
        session = onnxruntime.InferenceSession(str(folder / "out/model.onnx"))
        (logits,) = session.run(["logits"], {"image": raw.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(logits), model(raw).logits, atol=1e-3, rtol=1e-3
        )
    text = (folder / "out/README.md").read_text()
    assert r"`image` is float32 (B, 4, H, W), raw values of the bands \[5, 3, 2, 1\]" in text
    call("export", checkpoint, f"output={folder / 'demo'}", "demo=true", code=2)
    assert "the page is for RGB of 8 bits" in capsys.readouterr().err


def test_the_check_measures_the_range_and_has_no_remark_on_bits(run, capsys):
    folder, args = run
    data = [setting for setting in args if setting.startswith("data")]
    call("check_data", *data, f"output={folder / 'report'}")
    printed = capsys.readouterr().out
    assert "data.range=auto: 'data.range=[[3" in printed
    assert "5 of 5 images: values are missing" in printed
    assert "8 bits" not in printed
    assert "8-bit" not in printed
    report = json.loads((folder / "report/report.json").read_text())
    assert report["splits"]["val"]["ignored_pixels"] == 0, "of the label file itself"


def test_the_plan_counts_the_bands(run, capsys):
    _, args = run
    peaks = []
    for count in (4, 100):
        call("train", *args, f"data.channels={count}", "data.rgb=null", "dry_run=true")
        printed = capsys.readouterr().out
        peaks.append(float(printed.partition("\npeak ")[2].split()[0]))
    assert peaks[1] > peaks[0] + 2 * 32 * 32 * 96 * 4 / 2**20


def test_a_video_and_pictures_of_fewer_bands_are_refused(run, capsys):
    import cv2

    folder, _ = run
    video, picture = folder / "drive.mp4", folder / "rgb.png"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 5, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    cv2.imwrite(str(picture), np.zeros((48, 64, 3), np.uint8))
    for file, words in ((video, "a video is RGB"), (picture, "3 band(s)")):
        output = f"output={folder / file.stem}"
        call("predict", f"checkpoint={folder / 'run/best.pt'}", f"images={file}", output, code=2)
        assert words in capsys.readouterr().err


def test_gaps_are_ignored_in_the_mask(run):
    from danet.config.build import checked_config, load_saved, make_dataset

    folder, _ = run
    config = checked_config(load_saved(folder / "run/best.pt"), "best.pt")
    for image, mask, _ in (make_dataset(config, "val", training=False)[i] for i in range(3)):
        assert (mask[:2] == IGNORE).all()
        assert (mask[2:] != IGNORE).all()
        assert np.isfinite(image).all()
