"""Predictions reach a test server in its own form, complete and checked, or not at all."""

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import save_picture
from PIL import Image

from danet.datasets.camvid import CamVid
from danet.datasets.cityscapes import Cityscapes
from danet.datasets.labels import voc_palette
from danet.datasets.pascal_voc import PascalVOC
from danet.datasets.scenes import Scenes
from danet.datasets.submission import SubmissionWriter, require_labels
from danet.errors import InputError, StorageError

CITIES = {"berlin_000000_000019": (8, 16), "bonn_000003_000019": (8, 16)}
PHOTOS = {"2008_000006": (9, 14), "2008_000011": (12, 7), "2008_000012": (5, 5)}
IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Class index -> label id of Cityscapes, written down from the publication."""


def save(path, size):
    save_picture(path, np.full((*size, 3), 90, np.uint8))


@pytest.fixture
def cityscapes(tmp_path):
    """Two of the 1,525 images of Cityscapes' test, without the dummies of the labels."""
    root = tmp_path / "cityscapes"
    for name, size in CITIES.items():
        city = name.split("_")[0]
        save(root / f"leftImg8bit/test/{city}/{name}_leftImg8bit.png", size)
    return Cityscapes(root=root, split="test")


@pytest.fixture
def voc(tmp_path):
    """Three of the 1,456 images of VOC's test, of different sizes."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name, size in PHOTOS.items():
        save(root / f"JPEGImages/{name}.jpg", size)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "test.txt").write_text("\n".join(PHOTOS))
    return PascalVOC(root=tmp_path, split="test")


def predictions_of(sizes, num_classes):
    rng = np.random.default_rng(0)
    return {n: rng.integers(0, num_classes, size, dtype=np.uint8) for n, size in sizes.items()}


def written(dataset, folder, predictions):
    writer = SubmissionWriter(folder, dataset)
    writer.begin()
    for name, prediction in predictions.items():
        writer.write(name, prediction)
    return writer


def send(dataset, folder, predictions):
    writer = written(dataset, folder, predictions)
    return writer, writer.finish()


def header(content):
    """Returns width, height, bits per channel and colour type of a PNG, from its first bytes."""
    return struct.unpack(">IIBB", content[16:26])


def test_cityscapes_gets_a_zip_of_label_ids_named_as_its_rule_says(cityscapes, tmp_path):
    predictions = predictions_of(CITIES, 19)
    writer, lines = send(cityscapes, tmp_path / "sent", predictions)
    assert writer.archive == tmp_path / "sent" / "cityscapes_test.zip"
    with zipfile.ZipFile(writer.archive) as archive:
        assert archive.testzip() is None
        contents = {Path(n).name: archive.read(n) for n in archive.namelist() if n[-1] != "/"}
    assert sorted(contents) == [f"{name}_pred_labelIds.png" for name in sorted(CITIES)]
    for name, prediction in predictions.items():
        content = contents[f"{name}_pred_labelIds.png"]
        assert header(content) == (16, 8, 8, 0)  # 8 bits, one channel of grey
        found = np.array(Image.open(io.BytesIO(content)))
        assert found.tolist() == [[IDS[value] for value in row] for row in prediction.tolist()]
    assert "2 predictions, checked and packed" in lines[0]
    assert "the server wants 1,525 files for the split 'test'; this folder" in lines[1]
    assert "only 2 images" in lines[1]
    assert {path.name for path in (tmp_path / "sent").iterdir()} == {
        "predictions",
        "cityscapes_test.zip",
    }


@pytest.mark.parametrize("competition", ["comp5", "comp6"])
def test_voc_gets_a_tgz_of_palette_images_in_the_folders_of_its_kit(voc, tmp_path, competition):
    dataset = PascalVOC(root=voc.root, split="test", competition=competition)
    predictions = predictions_of(PHOTOS, 21)
    writer, lines = send(dataset, tmp_path / "sent", predictions)
    assert writer.archive.name == "pascalvoc_test.tgz"
    folder = f"results/VOC2012/Segmentation/{competition}_test_cls"
    with tarfile.open(writer.archive, "r:gz") as archive:
        contents = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}
        assert {member.uname for member in archive} == {"root"}, "no user's name is sent"
    assert sorted(contents) == [f"{folder}/{name}.png" for name in sorted(PHOTOS)]
    for name, prediction in predictions.items():
        content = contents[f"{folder}/{name}.png"]
        assert header(content) == (*PHOTOS[name][::-1], 8, 3)  # 8 bits, palette
        with Image.open(io.BytesIO(content)) as picture:
            np.testing.assert_array_equal(np.array(picture), prediction)
            colors = np.array(picture.convert("RGB"))
        np.testing.assert_array_equal(colors, np.array(voc_palette(256))[prediction])
    assert "1,456" in lines[1]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "berlin_000000_000019_pred_labelIds.png: missing"),
        (lambda p: save(p, (16, 8)), "the prediction is 8 x 16 and its image .* is 16 x 8"),
    ],
    ids=["missing", "size"],
)
def test_what_the_server_would_refuse_is_not_packed(cityscapes, tmp_path, harm, message):
    writer = written(cityscapes, tmp_path / "sent", predictions_of(CITIES, 19))
    harm(next((tmp_path / "sent").rglob("berlin*.png")))
    with pytest.raises(InputError, match=message):
        writer.finish()
    assert [path.name for path in (tmp_path / "sent").iterdir()] == [".unfinished"]


def test_what_an_interrupted_submission_left_is_no_part_of_the_next(
    cityscapes, tmp_path, monkeypatch
):
    monkeypatch.setattr(Cityscapes, "expected", {"test": (2,)})
    written(cityscapes, tmp_path / "sent", {"berlin_000009_000019": np.zeros((8, 16), np.uint8)})
    writer, lines = send(cityscapes, tmp_path / "sent", predictions_of(CITIES, 19))
    assert len(lines) == 1, "no warning of a whole split"
    with zipfile.ZipFile(writer.archive) as archive:
        assert len([name for name in archive.namelist() if name.endswith(".png")]) == 2


def test_an_earlier_submission_is_never_mixed_with_another(cityscapes, tmp_path):
    writer, _ = send(cityscapes, tmp_path / "sent", predictions_of(CITIES, 19))
    before = writer.archive.read_bytes()
    with pytest.raises(InputError, match=r"predictions is there from an earlier submission"):
        SubmissionWriter(tmp_path / "sent", cityscapes)
    SubmissionWriter(tmp_path / "other", cityscapes)
    assert not (tmp_path / "other").exists(), "making a writer touches nothing"
    assert writer.archive.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_a_problem_of_storage(cityscapes, tmp_path):
    (tmp_path / "file").write_text("")
    writer = SubmissionWriter(tmp_path / "file" / "sent", cityscapes)
    with pytest.raises(StorageError, match="sent: cannot be written"):
        writer.begin()


def test_a_data_set_without_a_server_is_refused(camvid_tree, tmp_path):
    scenes = Scenes(split="val", size=[48, 96], lengths={"train": 1, "val": 1, "test": 1})
    for dataset in (CamVid(root=camvid_tree, split="val"), scenes):
        name = type(dataset).__name__
        with pytest.raises(InputError, match=f"sent: {name} has no test server whose form is"):
            SubmissionWriter(tmp_path / "sent", dataset)


def test_a_split_without_labels_is_refused_where_labels_are_needed(cityscapes, camvid_tree):
    message = "data.val_split=test: Cityscapes has no labels for this split, its .*; choose val"
    with pytest.raises(InputError, match=message):
        require_labels(cityscapes, "data.val_split", "choose val")
    labelled = CamVid(root=camvid_tree, split="test")
    assert labelled.is_labelled
    require_labels(labelled, "split", "")
