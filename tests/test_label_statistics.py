"""Pixels of each class are those of a slow count, kept in a file and never stale."""

import os

import numpy as np
import pytest
from conftest import make_folder, plant, save_picture
from PIL import Image

from danet.datasets.base import Reading
from danet.datasets.folder import Folder
from danet.datasets.label_statistics import label_pixels
from danet.errors import InputError
from danet.types import IGNORE


@pytest.fixture
def root(tmp_path):
    return plant(tmp_path / "data", values=(0, 1, 2, 4, IGNORE), splits=(("train", 9),))


@pytest.fixture
def data(root, tmp_path):
    """Returns a function that opens the data set anew."""

    def make(**settings):
        reading = Reading(cache_dir=str(tmp_path / "cache"))
        settings = {"classes": list("abcde"), "reading": reading, **settings}
        return make_folder(root=root, split="train", **settings)

    return make


def count(data, num_workers=0, skip=False):
    return label_pixels(data, num_workers=num_workers, skip=skip)


def slow_count(data):
    masks = [data.read(i)[1] for i in range(len(data))]
    return [[int((mask == c).sum()) for c in range(5)] for mask in masks]


@pytest.fixture
def reads(monkeypatch):
    """The labels that were decoded since it was cleared."""
    paths, read = [], Folder.labels_of

    def labels_of(self, item):
        paths.append(item.mask)
        return read(self, item)

    monkeypatch.setattr(Folder, "labels_of", labels_of)
    return paths


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_are_those_of_a_slow_count(data, num_workers):
    pixels = count(data(), num_workers)
    assert pixels.dtype == np.int32
    assert pixels.tolist() == slow_count(data())
    assert (pixels[:, 3] == 0).all()


def test_the_next_start_reads_no_label(data, reads):
    first = count(data())
    assert len(reads) == 9
    reads.clear()
    assert np.array_equal(count(data()), first)
    assert not reads


def replace_label(root):
    """Puts another label of the same size and time of writing in place of one."""
    path = root / "masks/train/train_4.png"
    before = path.stat()
    mask = np.array(Image.open(path))
    save_picture(path, np.roll(np.where(mask == 4, 0, mask), 1).astype(np.uint8))
    with open(path, "ab") as file:
        file.write(bytes(max(0, before.st_size - path.stat().st_size)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_label_that_changed_is_counted_anew_and_the_old_file_goes(data, reads, root, tmp_path):
    first = count(data())
    replace_label(root)
    now = count(data())
    assert not np.array_equal(now, first)
    assert now.tolist() == slow_count(data())
    assert len(list(tmp_path.glob("cache/label_statistics/*"))) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"values": {0: 0, 1: 1, 2: 2, 4: 3}},
        {"values": {0: 4, 1: 3, 2: 2, 4: 1}},
        {"classes": list("abcdef")},
    ],
    ids=str,
)
def test_another_meaning_of_the_labels_is_counted_anew(data, settings):
    first = count(data())
    assert not np.array_equal(count(data(**settings)), first)
    assert np.array_equal(count(data()), first)


@pytest.mark.parametrize("damage", [b"", b"PK\3\4", "flipped", "cut"])
def test_a_damaged_file_is_counted_anew(data, reads, tmp_path, damage):
    first = count(data())
    (path,) = tmp_path.glob("cache/label_statistics/*")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[-30:]
    path.write_bytes(damage if isinstance(damage, bytes) else bytes(content))
    reads.clear()
    assert np.array_equal(count(data()), first)
    assert len(reads) == 9
    reads.clear()
    count(data())
    assert not reads, "it was mended"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_label_without_a_meaning_is_the_error_of_a_training(data, root, num_workers):
    save_picture(root / "masks/train/train_4.png", np.full((44, 60), 9, np.uint8))
    with pytest.raises(InputError) as error:
        count(data(), num_workers)
    with pytest.raises(InputError) as wanted:
        data().read(4)
    assert str(error.value) == str(wanted.value)


def test_a_label_that_is_skipped_has_no_pixels_and_is_not_forgotten(data, root, tmp_path):
    (root / "masks/train/train_4.png").write_bytes(b"no picture")
    pixels = count(data(), skip=True)
    assert pixels.sum(axis=1).tolist().index(0) == 4
    assert (pixels >= 0).all()
    assert not list(tmp_path.glob("cache/label_statistics/*"))
    with pytest.raises(InputError, match=r"train_4\.png"):
        count(data())


def test_a_cache_folder_that_cannot_be_written_is_a_warning(data, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert count(data()).tolist() == slow_count(data())
    assert "label_statistics: Not a directory; the next start counts" in capsys.readouterr().err


def test_nothing_is_written_below_the_data(data, root):
    below = Reading(cache_dir=str(root / "cache"))
    with pytest.raises(InputError, match=rf"^data.cache_dir={root}/cache: it lies below {root}$"):
        count(data(reading=below))
    assert not (root / "cache").exists()
