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
from danet.evaluation.inference import Sliding, Whole
from danet.prediction import predict as predict_module
from danet.prediction.results import class_shares
from danet.prediction.sources import find_sources
from danet.visualization.overlay import colorize, overlay

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


def direct(model, image):
    """The network called by hand."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits
    return logits.argmax(dim=1)[0].to(torch.uint8).numpy()


def write_video(path, *grey):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 48))
    for value in grey:
        writer.write(np.full((48, 96, 3), value, np.uint8))
    writer.release()


def count_frames(path):
    return cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)


def lines(output):
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


def test_predict_gives_the_classes_of_the_network_for_every_size(model, images):
    # In float64: with its norms folded a network rounds otherwise, which may turn near ties.
    precise = copy.deepcopy(model).double()
    found = danet.predict(precise, images)
    assert isinstance(found, list)
    for image, classes in zip(images, found, strict=True):
        assert classes.dtype == np.uint8
        assert np.array_equal(classes, direct(precise, image))


def test_predict_takes_paths_arrays_tensors_and_pillow_images(model, images, tmp_path):
    image = images[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = danet.predict(model, image)
    same = (
        *(tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image)),
        torch.from_numpy(image).permute(2, 0, 1),
    )
    for other in same:
        assert np.array_equal(danet.predict(model, other), expected)
    grey = image[..., 0]
    assert np.array_equal(
        danet.predict(model, grey), danet.predict(model, np.stack([grey] * 3, axis=2))
    )
    assert danet.predict(model, []) == []
    sliding = danet.predict(model, image, infer=Sliding(crop=(32, 32), stride=(16, 16)))
    assert sliding.shape == expected.shape


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((4, 4, 3)), r"image 0: found float64 \(4, 4, 3\), expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), r"found uint8 \(4, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"found torch.uint8 \(1, 3, 4, 4\)"),
        (7, "image 0: int is no path, array, tensor or Pillow image"),
        ("nowhere.png", "nowhere.png: not a readable image"),
    ],
    ids=["float", "alpha", "batch", "number", "path"],
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


def test_a_batch_gives_what_single_images_give(model, images):
    alike = [images[0], images[1], images[6]]
    for one, many in zip(
        danet.predict(model, alike), danet.predict(model, alike, batch_size=3), strict=True
    ):
        assert (one == many).mean() > 0.999  # kernels may round otherwise


def test_a_folder_becomes_masks_colours_and_overlays(
    tiny_checkpoint, model, folder, tmp_path, capsys
):
    output = tmp_path / "out"
    settings = [f"checkpoint={tiny_checkpoint}", f"images={folder}", f"output={output}"]
    call("predict", *settings, "write=[index,color,overlay]", "batch_size=2", "device=cpu")
    assert "7 images in" in capsys.readouterr().out
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
        assert np.array_equal(drawn, overlay(image, classes, model.palette))
        assert sum(line["shares"].values()) == pytest.approx(1)
        first = model.classes[int(classes[0, 0])]
        assert line["shares"][first] == (classes == classes[0, 0]).mean()


def test_a_second_start_does_only_what_is_missing(tiny_checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "out"
    settings = [f"checkpoint={tiny_checkpoint}", f"images={folder}", f"output={output}"]
    settings += ["write=[index]", "device=cpu"]
    call("predict", *settings)
    (output / "index" / "图 1.png").unlink()
    with (output / "predictions.jsonl").open("a") as journal:
        journal.write('{"name": "half a li')
    Image.new("RGB", (20, 20)).save(folder / "sub" / "图 2.png")
    kept = (output / "index" / "图 3.png").stat().st_mtime_ns
    capsys.readouterr()
    call("predict", *settings)
    assert "2 images in" in (reported := capsys.readouterr().out)
    assert "5 were there already" in reported
    assert (output / "index" / "图 3.png").stat().st_mtime_ns == kept
    assert np.array(Image.open(output / "index" / "sub" / "图 2.png")).shape == (20, 20)
    assert len({line["name"] for line in lines(output)}) == 7
    call("predict", *settings, "evaluation=whole", "evaluation.flip=true", code=2)
    assert "another checkpoint or another protocol" in capsys.readouterr().err


def test_a_damaged_file_is_reported_and_the_others_are_done(
    tiny_checkpoint, folder, tmp_path, capsys
):
    (folder / "broken.png").write_bytes(b"not a picture")
    output = tmp_path / "out"
    settings = [f"checkpoint={tiny_checkpoint}", f"images={folder}", f"output={output}"]
    call("predict", *settings, "write=[]", "device=cpu", code=2)
    error = capsys.readouterr().err
    assert "error: 1 of 8 files could not be read whole, the others are done" in error
    assert "broken.png: not a readable image" in error
    assert len(lines(output)) == 7


def test_a_video_becomes_frames_and_a_video(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    write_video(tmp_path / "clip.mp4", *range(0, 250, 50))
    settings = [f"checkpoint={tiny_checkpoint}", f"images={tmp_path / 'clip.mp4'}"]
    settings += [f"output={output}", "device=cpu"]
    drawn, masks = output / "overlay/clip.mp4", output / "index/clip"
    call("predict", *settings, "batch_size=2")
    assert "5 images in" in capsys.readouterr().out
    assert count_frames(drawn) == 5
    assert cv2.VideoCapture(str(drawn)).get(cv2.CAP_PROP_FPS) == 10
    assert sorted(p.name for p in masks.iterdir()) == [f"{n:06d}.png" for n in range(5)]
    call("predict", *settings)
    assert "0 images in" in (reported := capsys.readouterr().out)
    assert "5 were there already" in reported
    # A video file cannot be gone on with, so without it or the mask of one frame none is done.
    for lost in (drawn, masks / "000003.png"):
        lost.unlink()
        call("predict", *settings)
        assert "5 images in" in capsys.readouterr().out
        assert count_frames(drawn) == 5


def test_a_video_that_was_left_among_its_frames_is_written_whole(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "out"
    write_video(tmp_path / "clip.mp4", *range(0, 240, 40))
    settings = [f"checkpoint={tiny_checkpoint}", f"images={tmp_path / 'clip.mp4'}"]
    settings += [f"output={output}", "device=cpu"]
    call("predict", *settings, "write=[overlay]")
    # As if a second call, which wants masks, too, had been left after two frames.
    (output / "index" / "clip").mkdir(parents=True)
    for number in range(2):
        Image.new("L", (96, 48)).save(output / "index" / "clip" / f"{number:06d}.png")
    capsys.readouterr()
    call("predict", *settings, "write=[index,overlay]")
    assert "6 images in" in capsys.readouterr().out
    assert count_frames(output / "overlay/clip.mp4") == 6
    assert len(list((output / "index" / "clip").iterdir())) == 6


def test_patterns_and_lists_name_files_and_equal_names_are_kept_apart(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(folder / "图 0.png")
    Image.new("RGB", (4, 4)).save(folder / "sub" / "图 0.jpg")
    names = [s.name for s in find_sources(str(folder / "**" / "图 0.*"))]
    assert sorted(names) == ["sub/图 0.jpg", "sub/图 0.png", "图 0"]
    listed = [f"{folder / 'sub' / '图 2.png'}\n", "\n", f"{folder / '图 1.png'}\n"]
    assert [s.name for s in find_sources("-", listed)] == ["sub/图 2", "图 1"]
    assert [s.name for s in find_sources("-", [listed[0]] * 2)] == ["图 2"]
    names = ("a.png", "a.jpg", "a.png.png", "clip.mp4", "clip/000000.png", "clip/b.png", "c.PNG")
    for path in (tmp_path / "alike" / name for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [source.name for source in find_sources(str(tmp_path / "alike"))]
    alike = ["a.jpg", "a.png", "a.png.png", "c", "clip", "clip/000000.png", "clip/b.png"]
    assert sorted(found) == alike
    with pytest.raises(InputError, match=r"nowhere.png: there is no such file"):
        find_sources("-", ["nowhere.png"])
    with pytest.raises(InputError, match="no pictures or videos there"):
        find_sources(str(tmp_path / "*.tga"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["images=nowhere"], "images=nowhere: there is no such file or folder"),
        ([], "images: no value is given"),
    ],
    ids=["images", "missing"],
)
def test_mistakes_are_reported_in_one_line(tiny_checkpoint, folder, capsys, settings, message):
    settings = [setting.format(folder=folder) for setting in settings]
    call("predict", f"checkpoint={tiny_checkpoint}", *settings, code=2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")


def test_shares_are_exact_for_large_masks():
    classes = np.zeros((3000, 1000), np.uint8)
    classes[1234, 567] = 2
    assert class_shares(classes, 3) == [1 - 1 / 3e6, 0, 1 / 3e6]


def test_a_wide_image_in_strips_is_what_its_bands_say(model, monkeypatch):
    monkeypatch.setattr("danet.evaluation.sliding_window.STRIP", 100)
    monkeypatch.setattr("danet.evaluation.sliding_window.TILE", 32)
    image = torch.randint(0, 256, (1, 3, 40, 260), dtype=torch.uint8)
    infer = Whole(max_pixels=1024)
    model = copy.deepcopy(model).double()  # kernels may round otherwise for fewer windows at once
    with torch.inference_mode():
        expected = infer(model, image).argmax(dim=1)
        assert torch.equal(infer.predict(model, image).long(), expected)
