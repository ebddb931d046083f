"""ADE20K: 0 is ignored, 1..150 are the classes, and the other release is reported apart."""

import numpy as np
import pytest
from conftest import save_picture
from PIL import Image

from danet.datasets.ade20k import ADE20K
from danet.errors import InputError
from danet.types import IGNORE

ALL = np.arange(151, dtype=np.uint8)[None]


def write(root, values, *, split="validation", name="ADE_val_00000001"):
    save_picture(root / "images" / split / f"{name}.jpg", np.zeros((*values.shape, 3), np.uint8))
    save_picture(root / "annotations" / split / f"{name}.png", values)


@pytest.mark.parametrize("above", ["", "ADEChallengeData2016"])
def test_every_value_makes_the_round_trip_through_a_submission(tmp_path, above):
    write(tmp_path / above, ALL)
    dataset = ADE20K(root=tmp_path, split="val")
    _, mask, name = dataset.read(0)
    assert name == "ADE_val_00000001"
    assert mask.tolist() == [[IGNORE, *range(150)]]
    form = dataset.submission()
    np.testing.assert_array_equal(form.encode(mask[:, 1:]), ALL[:, 1:])
    assert form.file_name(name) == "ADE_val_00000001.png"


def test_real_pictures_are_read_as_the_table_says(samples):
    root = samples / "ade20k"
    for split, folder, count in (("train", "training", 1), ("val", "validation", 3)):
        dataset = ADE20K(root=root, split=split)
        assert len(dataset) == count
        for i in range(count):
            image, mask, name = dataset.read(i)
            png = root / "ADEChallengeData2016" / "annotations" / folder / f"{name}.png"
            raw = np.array(Image.open(png)).astype(int)
            np.testing.assert_array_equal(mask, np.where(raw == 0, 255, raw - 1))
            assert image.shape == (*mask.shape, 3)
    listing = (root / "ADEChallengeData2016" / "objectInfo150.txt").read_text().splitlines()[1:]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in listing]
    assert list(ADE20K.classes) == names


def test_the_test_split_has_no_labels(tmp_path):
    write(tmp_path, ALL, split="testing", name="ADE_test_00000001")
    dataset = ADE20K(root=tmp_path, split="test")
    assert not dataset.is_labelled
    assert (dataset.read(0)[1] == IGNORE).all()


@pytest.mark.parametrize("value", [151, 254, 255])
def test_a_value_above_150_is_refused(tmp_path, value):
    write(tmp_path, np.where(ALL == 7, np.uint8(value), ALL))
    with pytest.raises(InputError, match=f"label value {value} on 1 pixels, .*has 0 for other"):
        ADE20K(root=tmp_path, split="val").read(0)
