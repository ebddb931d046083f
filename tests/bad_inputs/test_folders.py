"""Folders that are not as they must be: each is refused or accepted as promised, by both tools.

F09 stands in test_results.py, F12 and F13 with the tests of Cityscapes and PASCAL VOC, F16 to F18
in tests/test_prepare.py, F19 in tests/test_data.py, marked ``bad_input``.
"""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from starts import KINDS, LABELS, start_training

from danet.errors import InputError

both = pytest.mark.parametrize("site", list(KINDS), indirect=True)


@both
def test_F01_empty_folder(site):
    (site.folder / "empty").mkdir()
    parts = ("no images for split 'train'", site.folder / "empty", "images/", "<name>.png")
    assert len(site.refused(*parts, root=site.folder / "empty").splitlines()) <= 4


@both
@pytest.mark.parametrize("where", ["in/side", "inside", "images", "images/train"])
def test_F02_root_one_or_two_levels_off(site, where):
    right, root = site.root, site.root / where
    if where.startswith("in"):  # an archive that was unpacked inside itself
        root = site.folder / "outer"
        (root / where).parent.mkdir(parents=True)
        right = site.root.rename(root / where)
    elif where == "images":
        shutil.rmtree(root / "train")
        (root / "train").mkdir()
    site.refused(f"set data.root={right}", root=root)


@both
def test_F03_images_without_labels(site):
    site.plant(splits=(("train", 7), ("val", 2)))
    shutil.rmtree(site.root / LABELS[site.kind])
    names = ", ".join(f"train_{i}.png" for i in range(5))
    place = f"{names}; the first was looked for at {site.label('train_0')}"
    message = site.refused("7 of 7 images of split 'train' have no", place)
    assert "allow_missing_labels" not in message, "it would not help"


@both
def test_F04_labels_without_images(site):
    site.plant(splits=(("train", 9), ("val", 2)))
    for i in range(6):
        site.image(f"train_{i}").unlink()
    names = ", ".join(f"train_{i}.png" for i in range(5))
    out = site.accepted(f"6 label files have no image and are not used: {names}")
    assert "3 training and" not in out, "the network was not made"


@both
def test_F05_more_images_than_labels(site):
    site.plant(splits=(("train", 6), ("val", 2)))
    for i in (1, 4):
        site.label(f"train_{i}").unlink()
    text = "2 of 6 images of split 'train' have no label file: train_1.png, train_4.png"
    site.refused(text, "data.allow_missing_labels=true")
    site.accepted("left out: 2 of 6", settings=["data.allow_missing_labels=true"])


# Lists


@pytest.fixture
def with_lists(site):
    """Puts all pairs into one folder; writes two lists and returns the settings that name them."""
    for folder, split in itertools.product(("images", "masks"), ("train", "val")):
        for path in (site.root / folder / split).iterdir():
            path.rename(site.root / folder / path.name)
        (site.root / folder / split).rmdir()

    def write(train, val="val_0\nval_1\n"):
        for name, text in (("train.txt", train), ("val.txt", val)):
            (site.root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["data.lists={train: train.txt, val: val.txt}"]

    return write


def test_F06_list_names_a_file_that_is_not_there(site, with_lists):
    settings = with_lists("train_0\n\ntrain_9.png\n")
    parts = ("data/train.txt, line 3", f"there is no image {site.root}/images/train_9")
    site.refused(*parts, settings=settings)
    settings = with_lists("images/train_0.png masks/lost.png\n")
    site.refused("have no label file", f"{site.root}/masks/lost.png", settings=settings)
    settings = ["data.lists={train: nowhere.txt, val: val.txt}"]
    site.refused(f"{site.root}/nowhere.txt: the list cannot be read", settings=settings)


def test_F07_list_with_blank_lines_marks_and_windows_ends_or_empty(site, with_lists):
    text = "\ufefftrain_0\r\n\r\n  train_1.png \t\r\n\n".encode()
    assert site.accepted(settings=with_lists(text)) == ""
    site.refused(f"{site.root}/train.txt: the list is empty", settings=with_lists(" \r\n\n"))


def test_F08_image_twice_in_one_list(site, with_lists):
    text = "train.txt: 1 images stand there more than once and count once: train_0.png"
    site.accepted(text, settings=with_lists("train_0\ntrain_1\ntrain_0.png\ntrain_2\n"))


@pytest.mark.parametrize(
    "line", ["../x", "/etc/passwd", "a/../../x.png", "images/train_0.png ../x.png", "C:\\x.png"]
)
def test_F10_list_entry_that_leaves_the_root(site, with_lists, line):
    site.refused("train.txt", "line 2", "leaves", settings=with_lists(f"train_0\n{line}\n"))


@both
def test_F11_links(site):
    real = site.root.rename(site.folder / "real")
    site.root.mkdir()
    for folder in ("images", LABELS[site.kind]):
        (site.root / folder).symlink_to(real / folder)
    site.accepted()
    site.image().unlink()
    site.image().symlink_to(site.folder / "gone.png")
    site.refused(f"{site.image()}: this link leads to {site.folder}/gone.png, which does")
    site.image().unlink()
    (real / "images/train/round").symlink_to(real / "images")
    site.refused(f"{site.root}/images/train/round: this link leads back to")


@both
def test_F14_folder_that_may_not_be_read(site, monkeypatch):
    scandir = os.scandir

    def forbidden(path="."):  # the tests may run as root, who may read anything
        if Path(path) == site.root / "images/train":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    site.refused(f"{site.root}/images/train: this folder cannot be read (Permission denied)")


def state_of(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


@both
def test_F15_read_only_folder(site):
    folders = [site.root, *(p for p in site.root.rglob("*") if p.is_dir())]
    before = state_of(site.root)
    for folder in folders:
        folder.chmod(0o555)
    try:
        site.accepted()
        assert state_of(site.root) == before  # root may write anywhere, and must not
    finally:
        for folder in folders:
            folder.chmod(0o755)


@both
def test_F20_fewer_training_images_than_a_batch(site, monkeypatch):
    settings = [*KINDS[site.kind], f"data.root={site.root}", "data.batch_size=5"]
    with pytest.raises(InputError, match=r"4 samples do not fill one batch: data.batch_size=5"):
        start_training(settings, monkeypatch)
