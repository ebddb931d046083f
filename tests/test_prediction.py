"""Pictures of any size and place become masks, once each, and a start goes on from the last."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import danet
from danet.errors import InputError
from danet.evaluation.inference import Sliding
from danet.prediction import predict as predict_module
from danet.prediction.sources import find_sources
from danet.visualization.overlay import Legend, colorize

SIZES = [(48, 96), (48, 96), (7, 300), (1, 1), (33, 20), (300, 7), (48, 96)]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return danet.load_model(tiny_checkpoint)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture
def folder(tmp_path, images):
    for number, image in enumerate(images):
        path = tmp_path / "pictures" / ("" if number % 2 else "sub") / f"图 {number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def start(tiny_checkpoint, tmp_path, capsys):
    """Predicts into the folder "out" and returns what is printed."""

    def started(images, *settings, code=0):
        typed = [f"checkpoint={tiny_checkpoint}", f"images={images}", f"output={tmp_path / 'out'}"]
        call("predict", *typed, "device=cpu", *settings, code=code)
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return started


def direct(model, image):
    """The network called by hand."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits
    return logits.argmax(dim=1)[0].to(torch.uint8).numpy()


def count_frames(path):
    return cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)


@pytest.fixture
def clip(tmp_path):
    """A video of six grey frames, ten a second."""
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 48))
    for value in range(0, 240, 40):
        writer.write(np.full((48, 96, 3), value, np.uint8))
    writer.release()
    return path


def lines(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_predict_gives_the_classes_of_the_network_for_every_size(model, images, batch_size):
    # In float64: with its norms folded a network rounds otherwise, which may turn near ties.
    precise = copy.deepcopy(model).double()
    found = danet.predict(precise, images, batch_size=batch_size)
    assert [classes.dtype for classes in found] == [np.uint8] * len(images)
    for image, classes in zip(images, found, strict=True):
        assert np.array_equal(classes, direct(precise, image))


def test_predict_takes_paths_arrays_tensors_and_pillow_images(model, images, tmp_path):
    image, path = images[0], tmp_path / "a.png"
    Image.fromarray(image).save(path)
    expected = danet.predict(model, image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for other in (path, str(path), Image.fromarray(image), tensor):
        assert np.array_equal(danet.predict(model, other), expected)
    grey = image[..., 0]
    repeated = danet.predict(model, np.stack([grey] * 3, axis=2))
    assert np.array_equal(danet.predict(model, grey), repeated)
    assert danet.predict(model, []) == []
    sliding = danet.predict(model, image, infer=Sliding(crop=(32, 32), stride=(16, 16)))
    assert sliding.shape == expected.shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 4, 3)), r"image 0: found float64 \(4, 4, 3\), expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"found uint8 \(4, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"found torch.uint8 \(1, 3, 4, 4\)"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"found torch.uint8 \(4, 4\)"),
        (7, "image 0: int is no path, array, tensor or Pillow image"),
        ("nowhere.png", "nowhere.png: not a readable image"),
    ],
    ids=["float", "alpha", "batch", "flat tensor", "number", "path"],
)
def test_predict_refuses_what_is_no_image(model, wrong, message):
    with pytest.raises(InputError, match=message):
        danet.predict(model, wrong)


def test_batches_hold_neighbours_of_one_size_and_no_more_than_fit(model, monkeypatch, images):
    class Recorder:
        def predict(self, model, image):
            sizes.append(len(image))
            return torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8)

    sizes = []
    danet.predict(model, images, infer=Recorder(), batch_size=8)
    assert sizes == [2, 1, 1, 1, 1, 1]
    sizes.clear()
    monkeypatch.setattr(predict_module, "PIXELS_PER_PASS", 48 * 96)
    danet.predict(model, images, infer=Recorder(), batch_size=8)
    assert sizes == [1] * 7


def test_a_folder_becomes_masks_colours_and_overlays(start, model, folder, tmp_path):
    output = tmp_path / "out"
    (folder / "broken.png").write_bytes(b"not a picture")
    error = start(folder, "write=[index,color,overlay]", "batch_size=2", code=2)
    assert "error: 1 of 8 files could not be read whole, the others are done" in error
    assert "broken.png: not a readable image" in error
    named = {line["name"]: line for line in lines(output)}
    assert set(named) == {f"图 {n}" if n % 2 else f"sub/图 {n}" for n in range(7)}
    for name, line in named.items():
        classes = np.array(Image.open(output / "index" / f"{name}.png"))
        image = np.array(Image.open(line["source"]))
        assert classes.shape == image.shape[:2] == (line["height"], line["width"])
        assert (classes == direct(model, image)).mean() > 0.99  # other rounding, no other network
        color = np.array(Image.open(output / "color" / f"{name}.png"))
        assert np.array_equal(color, colorize(classes, model.palette))
        drawn = np.array(Image.open(output / "overlay" / f"{name}.png"))
        assert np.array_equal(drawn, Legend((), model.palette).over(image, classes))
        values, counts = np.unique(classes, return_counts=True)
        shares = {model.classes[v]: n / classes.size for v, n in zip(values, counts, strict=True)}
        assert line["shares"] == shares


def test_a_second_start_does_only_what_is_missing(start, folder, tmp_path):
    output = tmp_path / "out"
    start(folder, "write=[index]")
    (output / "index" / "图 1.png").unlink()
    with (output / "predictions.jsonl").open("ab") as journal:
        journal.write(b'{"name": "half a li\xff')
    Image.new("RGB", (20, 20)).save(folder / "sub" / "图 2.png")
    kept = (output / "index" / "图 3.png").stat().st_mtime_ns
    printed = start(folder, "write=[index]")
    assert "2 images in" in printed
    assert "5 were there already" in printed
    assert (output / "index" / "图 3.png").stat().st_mtime_ns == kept
    assert np.array(Image.open(output / "index" / "sub" / "图 2.png")).shape == (20, 20)
    assert len({line["name"] for line in lines(output)}) == 7
    again = (folder, "write=[index]", "evaluation=whole")
    assert "another checkpoint or another protocol" in start(*again, "evaluation.flip=true", code=2)
    (output / "predictions.json").write_text("{")  # it is not known whose results these are
    assert "another checkpoint or another protocol" in start(*again, code=2)


def test_a_video_becomes_frames_and_a_video(start, clip, tmp_path):
    drawn, masks = tmp_path / "out/overlay/clip.mp4", tmp_path / "out/index/clip"
    assert "6 images in" in start(clip, "batch_size=2")
    assert count_frames(drawn) == 6
    assert cv2.VideoCapture(str(drawn)).get(cv2.CAP_PROP_FPS) == 10
    assert sorted(p.name for p in masks.iterdir()) == [f"{n:06d}.png" for n in range(6)]
    printed = start(clip)
    assert "0 images in" in printed
    assert "6 were there already" in printed
    # A video file cannot be gone on with, so without it or the mask of one frame none is done.
    for lost in (drawn, masks / "000003.png"):
        lost.unlink()
        assert "6 images in" in start(clip)
        assert count_frames(drawn) == 6
    # As if this call, which wants colours, too, had been left after two frames.
    (tmp_path / "out/color/clip").mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (96, 48)).save(tmp_path / f"out/color/clip/{number:06d}.png")
    assert "6 images in" in start(clip, "write=[index,color,overlay]")
    assert count_frames(drawn) == 6


def test_patterns_and_lists_name_files_and_equal_names_are_kept_apart(tmp_path):
    names = ("a.png", "a.jpg", "a.png.png", "clip.mp4", "clip/000000.png", "clip/b.png", "c.PNG")
    for path in (tmp_path / name for name in (*names, "note.txt")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(wanted, *listed):
        return [source.name for source in find_sources(wanted, listed)]

    alike = ["a.jpg", "a.png", "a.png.png", "c", "clip", "clip/000000.png", "clip/b.png"]
    assert sorted(found(str(tmp_path))) == alike
    assert found(str(tmp_path / "**" / "*.png")) == ["a", "a.png.png", "clip/000000", "clip/b"]
    listed = [f"{tmp_path / name}\n" for name in ("clip/b.png", "c.PNG")]
    assert found("-", listed[0], "\n", listed[1]) == ["clip/b", "c"]
    assert found("-", listed[0], listed[0]) == ["b"]
    for wanted, listed, message in (
        ("-", ["nowhere.png"], "nowhere.png: there is no such file"),
        (str(tmp_path / "*.tga"), [], "no pictures or videos there"),
        ("nowhere", [], "images=nowhere: there is no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            find_sources(wanted, listed)
