"""Pictures of any size and place become masks, once each, and a start goes on from the last."""

import copy
import json
import os

import cv2
import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image

import danet
from danet.datasets.image_io import to_rgb
from danet.errors import InputError
from danet.evaluation.inference import MultiScale, Sliding
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


def test_predict_takes_an_image_in_every_form(model, images, tmp_path):
    image, path = images[0], tmp_path / "a.png"
    Image.fromarray(image).save(path)
    expected = danet.predict(model, image)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    alpha = np.dstack([image, image[..., 0]])
    read_only = image.copy()
    read_only.setflags(write=False)
    for other in (
        *(path, str(path), os.fspath(path), Image.fromarray(image), tensor, read_only),
        *(image / 255, (image / 255).astype(np.float32), image.astype(np.float64)),
        *(image.astype(np.int32), image.astype(np.uint16) * 257, alpha, Image.fromarray(alpha)),
        *(tensor / 255, tensor.float(), tensor.to(torch.bfloat16), torch.from_numpy(alpha.T).mT),
        *(tensor.long(), (tensor / 255).requires_grad_(), image[:, ::-1][:, ::-1]),
    ):
        assert np.array_equal(danet.predict(model, other), expected)
    grey = image[..., 0]
    expected = danet.predict(model, np.stack([grey] * 3, axis=2))
    for other in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(danet.predict(model, other), expected)
    sliding = danet.predict(model, image, infer=Sliding(crop=(32, 32), stride=(16, 16)))
    assert sliding.shape == expected.shape


def test_the_value_of_white_follows_from_the_type():
    levels = np.arange(256)
    of_16_bits = np.arange(65536, dtype=np.uint16)
    file = Image.fromarray(of_16_bits.reshape(256, 256))  # mode I;16
    for values, expected in (
        (of_16_bits.reshape(256, 256), to_rgb(file, "a")[..., 0]),
        (np.array([[False, True]]), [[0, 255]]),
        (levels[None] / 255, levels[None]),
        (levels[None] / np.float32(255), levels[None]),
        ((levels[None] / 255).astype(np.float16), levels[None]),
        (levels[None].astype(np.float32), levels[None]),
        (levels[None].astype(np.int64), levels[None]),
        (np.zeros((1, 2)), [[0, 0]]),
    ):
        found = predict_module._as_array(values, "a")
        assert found.dtype == np.uint8
        assert (found == np.asarray(expected)[..., None]).all()
    with pytest.warns(UserWarning, match="all becomes black; use .astype"):
        assert not predict_module._as_array(levels[None].astype(np.uint16), "a").any()


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"],
)
def test_predict_takes_pillow_images_of_every_mode(model, images, mode):
    picture = Image.fromarray(images[0])
    steps = {"PA": ("P",), "F": ("L",), "RGBa": ("RGBA",), "LAB": ()}.get(mode, ())
    if mode == "LAB":  # Pillow converts to it by colour profiles alone
        picture = Image.frombytes("LAB", picture.size, picture.tobytes())
    else:
        for step in (*steps, mode):
            picture = picture.convert(step)
    as_file = np.array(picture.convert("L" if mode in "IF" else "RGB"))
    assert np.array_equal(danet.predict(model, picture), danet.predict(model, as_file))


def test_a_transparent_palette_and_an_orientation_are_treated_as_in_files(model, images, tmp_path):
    picture = Image.fromarray(images[0])
    exif = picture.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    picture.convert("P").save(tmp_path / "palette.png", transparency=3)
    for name in ("turned.jpg", "palette.png"):
        with Image.open(tmp_path / name) as opened:
            found = danet.predict(model, opened)
        assert found.shape == images[0].shape[:2]
        assert np.array_equal(found, danet.predict(model, tmp_path / name))


def test_a_batch_gives_a_batch_and_an_iterable_a_list(model, images, tmp_path):
    alike = [image for image in images if image.shape == images[0].shape]
    expected = danet.predict(model, alike)
    assert isinstance(expected, list)
    batch = np.stack(alike)
    for given in (batch, torch.from_numpy(batch).permute(0, 3, 1, 2), batch / 255):
        for batch_size in (1, 2):
            found = danet.predict(model, given, batch_size=batch_size)
            assert isinstance(found, np.ndarray)
            assert np.array_equal(found, expected)
    for number, image in enumerate(alike):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    for many in (tuple(alike), iter(alike), sorted(tmp_path.glob("*.png"))):
        assert np.array_equal(danet.predict(model, many), expected)
    assert danet.predict(model, []) == []
    assert danet.predict(model, (path for path in ())) == []


def test_only_so_many_images_of_an_iterable_are_held(model, images):
    def given():
        for number in range(5):
            asked.append(number)
            yield images[0]

    class Recorder:
        def predict(self, model, image):
            seen.append(len(asked))
            return torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8)

    asked, seen = [], []
    danet.predict(model, given(), infer=Recorder())
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            np.zeros((3, 4, 5), np.uint8),
            r"found uint8 \(3, 4, 5\), .*; use np.moveaxis\(image, -3, -1",
        ),
        (torch.zeros(6, 5, 3), r"found torch.float32 \(6, 5, 3\), .*; use image.movedim\(-1, -3\)"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"images: found uint8 \(2, 3, 4, 5\).*moveaxis"),
        (torch.zeros(2, 6, 5, 3), r"images: found torch.float32 \(2, 6, 5, 3\).*movedim"),
        (np.zeros((4, 5, 2), np.uint8), r"found uint8 \(4, 5, 2\), expected an array \(H, W, 3\)"),
        (np.zeros((0, 4, 5, 3), np.uint8), r"found uint8 \(0, 4, 5, 3\)"),
        (np.zeros(7, np.uint8), r"found uint8 \(7,\)"),
        (np.array(["a.png"]), r"found <U5 \(1,\)"),
        ([np.zeros((2, 4, 5, 3), np.uint8)], r"image 0: found uint8 \(2, 4, 5, 3\)"),
        (np.full((4, 5, 3), np.nan), r"found float64 in nan..nan, expected numbers in 0..255"),
        (np.full((4, 5, 3), 1.02), r"found float64 in 1.02..1.02, expected .* or floats in 0..1"),
        (torch.full((3, 4, 5), -0.5), r"found float32 in -0.5..-0.5, .* does the normalisation"),
        (np.full((4, 5, 3), 256), r"found int64 in 256..256"),
        (Image.new("La", (5, 4)), r"image: not a readable picture \(conversion from La"),
        (7, "image: int is no path, array, tensor or Pillow image"),
        (b"\x89PNG", "image: bytes is no path"),
        ([[0, 1], [2, 3]], "image 0: list is no path"),
        ("nowhere.png", "nowhere.png: not a readable image"),
        ("https://u:p@a.org/b.jpg", "image: https://a.org/b.jpg: addresses are not read; download"),
    ],
    ids=[
        *("array chw", "tensor hwc", "batch bchw", "batch bhwc", "two channels", "empty", "flat"),
        *(
            "names",
            "batch in a list",
            "nan",
            "beyond 1",
            "negative",
            "beyond 255",
            "mode",
            "number",
        ),
        *("bytes", "lists", "path", "address"),
    ],
)
def test_predict_refuses_what_is_no_image(model, wrong, message):
    with pytest.raises(InputError, match=message) as error:
        danet.predict(model, wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["multi_scale", MultiScale])
def test_predict_takes_inference_modes_and_whole_batches(model, images, wrong):
    with pytest.raises(InputError, match=r"^infer=.*: expected an inference mode of danet.eval"):
        danet.predict(model, images[0], infer=wrong)
    with pytest.raises(InputError, match=r"^batch_size=0: expected at least 1$"):
        danet.predict(model, images, batch_size=0)


def test_a_folder_is_answered_with_its_pictures(model, tmp_path):
    with pytest.raises(InputError, match=r"^image: .*: a folder; pass sorted\(") as caught:
        danet.predict(model, str(tmp_path))
    assert f"Path({str(tmp_path)!r}).glob('*.jpg'))" in str(caught.value)


@pytest.mark.parametrize("wrong", [{}, None, 3])
def test_load_model_asks_for_a_path(wrong):
    with pytest.raises(InputError, match=rf"expected a path, found {type(wrong).__name__}$"):
        danet.load_model(wrong)


def test_predict_asks_for_a_network(tiny_checkpoint, images):
    with pytest.raises(InputError, match=r"model: PosixPath is no network; use danet.load_model"):
        danet.predict(tiny_checkpoint, images[0])


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
    assert "another checkpoint, protocol" in start(*again, "evaluation.flip=true", code=2)
    (output / "predictions.json").write_text("{")  # it is not known whose results these are
    assert "another checkpoint, protocol" in start(*again, code=2)


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
