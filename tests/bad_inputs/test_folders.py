"""Folders that are not as they must be: each is refused or accepted as promised, by both tools.

F12 and F13 stand with the tests of Cityscapes and PASCAL VOC, F16 to F18 in tests/test_prepare.py,
marked ``bad_input``.
"""

import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tool, write_pair
from starts import CLASSES, KINDS, LABELS, accepted, plant, refused, start_training

from danet.data.loader import eval_batches
from danet.datasets.camvid import CamVid
from danet.errors import InputError

both = pytest.mark.parametrize("kind", list(KINDS))


@both
def test_F01_empty_folder(kind, tmp_path, monkeypatch):
    root = tmp_path / "empty"
    root.mkdir()
    message = refused(
        kind,
        root,
        tmp_path,
        monkeypatch,
        "no images for split 'train'",
        root,
        "images/",
        "<name>.png",
    )
    assert len(message.splitlines()) <= 4


@both
@pytest.mark.parametrize("where", ["in/side", "inside", "images", "images/train"])
def test_F02_root_one_or_two_levels_off(kind, where, tmp_path, monkeypatch):
    if where.startswith("in"):  # an archive that was unpacked inside itself
        root = tmp_path / "data"
        right = plant(root / where, kind)
    else:
        right = plant(tmp_path / "data", kind)
        root = right / where
        shutil.rmtree(root / "train", ignore_errors=True) if where == "images" else None
        (right / "images" / "train").mkdir(exist_ok=True)
    refused(kind, root, tmp_path, monkeypatch, f"set data.root={right}\n".strip())


@both
def test_F03_images_without_labels(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind, splits=(("train", 7), ("val", 2)))
    shutil.rmtree(root / LABELS[kind])
    names = ", ".join(f"train_{i}.png" for i in range(5))
    wanted = root / LABELS[kind] / "train/train_0.png"
    message = refused(kind, root, tmp_path, monkeypatch, "7 of 7 images of split 'train' have no")
    assert f"{names}; the first was looked for at {wanted}" in message


@both
def test_F04_labels_without_images(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind, splits=(("train", 9), ("val", 2)))
    for i in range(6):
        (root / f"images/train/train_{i}.png").unlink()
    names = ", ".join(f"train_{i}.png" for i in range(5))
    text = f"6 label files have no image and are not used: {names}"
    out = accepted(kind, root, tmp_path, monkeypatch, capsys, text)
    assert "3 training and" not in out, "the network was not made"


@both
def test_F05_more_images_than_labels(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind, splits=(("train", 6), ("val", 2)))
    for i in (1, 4):
        (root / LABELS[kind] / f"train/train_{i}.png").unlink()
    parts = ("2 of 6 images of split 'train' have no label file: train_1.png, train_4.png",)
    message = refused(kind, root, tmp_path, monkeypatch, *parts)
    assert "data.allow_missing_labels=true" in message
    on_purpose = ["data.allow_missing_labels=true"]
    accepted(kind, root, tmp_path, monkeypatch, capsys, "left out: 2 of 6", settings=on_purpose)


# Lists


def with_lists(root, train, val="val_0\nval_1\n"):
    """Writes pairs into one folder, and two lists; returns the settings that name them."""
    plant(root)
    for folder, split in itertools.product(("images", "masks"), ("train", "val")):
        for path in (root / folder / split).iterdir():
            path.rename(root / folder / path.name)
        (root / folder / split).rmdir()
    for name, text in (("train.txt", train), ("val.txt", val)):
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return ["data.lists={train: train.txt, val: val.txt}"]


def test_F06_list_names_a_file_that_is_not_there(tmp_path, monkeypatch):
    settings = with_lists(tmp_path / "data", "train_0\n\ntrain_9.png\n")
    parts = (
        f"{tmp_path}/data/train.txt, line 3",
        f"there is no image {tmp_path}/data/images/train_9",
    )
    refused("folder", tmp_path / "data", tmp_path, monkeypatch, *parts, settings=settings)
    settings = with_lists(tmp_path / "two", "images/train_0.png masks/lost.png\n")
    parts = ("have no label file", f"{tmp_path}/two/masks/lost.png")
    refused("folder", tmp_path / "two", tmp_path, monkeypatch, *parts, settings=settings)
    settings = ["data.lists={train: nowhere.txt, val: val.txt}"]
    parts = (f"{tmp_path}/two/nowhere.txt: the list cannot be read",)
    refused("folder", tmp_path / "two", tmp_path, monkeypatch, *parts, settings=settings)


def test_F07_list_with_blank_lines_marks_and_windows_ends_or_empty(tmp_path, monkeypatch, capsys):
    text = "\ufefftrain_0\r\n\r\n  train_1.png \t\r\n\n".encode()
    settings = with_lists(tmp_path / "data", text)
    out = accepted("folder", tmp_path / "data", tmp_path, monkeypatch, capsys, settings=settings)
    assert out == ""
    settings = with_lists(tmp_path / "empty", " \r\n\n")
    parts = (f"{tmp_path}/empty/train.txt: the list is empty",)
    refused("folder", tmp_path / "empty", tmp_path, monkeypatch, *parts, settings=settings)


def test_F08_image_twice_in_one_list(tmp_path, monkeypatch, capsys):
    settings = with_lists(tmp_path / "data", "train_0\ntrain_1\ntrain_0.png\ntrain_2\n")
    text = "train.txt: 1 images stand there more than once and count once: train_0.png"
    accepted("folder", tmp_path / "data", tmp_path, monkeypatch, capsys, text, settings=settings)


def test_F09_image_in_two_lists(tmp_path, monkeypatch, capsys):
    root = tmp_path / "data"
    settings = with_lists(root, "train_0\nval_1\n", "val_0.png\nval_1.png\n")
    parts = (
        "1 images stand in the lists of two splits: val_1.png",
        f"{root}/train.txt, line 2, and {root}/val.txt, line 2",
        "data.allow_overlap=true",
    )
    refused("folder", root, tmp_path, monkeypatch, *parts, settings=settings)
    settings.append("data.allow_overlap=true")
    accepted("folder", root, tmp_path, monkeypatch, capsys, settings=settings)


@both
def test_F09_same_picture_in_two_splits_is_found_by_the_check(kind, tmp_path):
    root = plant(tmp_path / "data", kind)
    shutil.copy(root / "images/train/train_2.png", root / "images/val/val_0.png")
    settings = [*KINDS[kind], f"data.root={root}", "data.num_workers=0"]
    from starts import composed, examine

    with pytest.raises(
        InputError, match=r"train_2.png and .*val_0.png: the same image in train and"
    ):
        examine(composed("check_data", settings), [], tmp_path / "report")


@pytest.mark.parametrize(
    "line", ["../x", "/etc/passwd", "a/../../x.png", "images/train_0.png ../x.png", "C:\\x.png"]
)
def test_F10_list_entry_that_leaves_the_root(line, tmp_path, monkeypatch):
    settings = with_lists(tmp_path / "data", f"train_0\n{line}\n")
    parts = ("train.txt", "line 2", "leaves")
    refused("folder", tmp_path / "data", tmp_path, monkeypatch, *parts, settings=settings)


@both
def test_F11_links(kind, tmp_path, monkeypatch, capsys):
    real = plant(tmp_path / "real", kind)
    root = tmp_path / "data"
    root.mkdir()
    for folder in ("images", LABELS[kind]):
        (root / folder).symlink_to(real / folder)
    accepted(kind, root, tmp_path, monkeypatch, capsys)
    link = real / "images/train/train_0.png"
    link.unlink()
    link.symlink_to(tmp_path / "gone.png")
    parts = (
        f"{root}/images/train/train_0.png: this link leads to {tmp_path}/gone.png, which does",
    )
    refused(kind, root, tmp_path, monkeypatch, *parts)
    link.unlink()
    (real / "images/train/round").symlink_to(real / "images")
    parts = (f"{root}/images/train/round: this link leads back to",)
    refused(kind, root, tmp_path, monkeypatch, *parts)


@both
def test_F14_folder_that_may_not_be_read(kind, tmp_path, monkeypatch):
    root, scandir = plant(tmp_path / "data", kind), os.scandir

    def forbidden(path="."):  # the tests may run as root, who may read anything
        if Path(path) == root / "images/train":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    parts = (f"{root}/images/train: this folder cannot be read (Permission denied)",)
    refused(kind, root, tmp_path, monkeypatch, *parts)


def state_of(folder):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in folder.rglob("*")}


@both
def test_F15_read_only_folder(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    before = state_of(root)
    for folder in folders:
        folder.chmod(0o555)
    try:
        accepted(kind, root, tmp_path, monkeypatch, capsys)
        assert state_of(root) == before  # root may write anywhere, and must not
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_F19_fewer_validation_images_than_processes(tmp_path):
    data = CamVid(root=plant(tmp_path / "data", "camvid", splits=(("val", 3),)), split="val")
    parts = [eval_batches(data, batch_size=2, rank=rank, world=5) for rank in range(5)]
    names = [name for part in parts for group in part for batch in group for name in batch.name]
    assert sorted(names) == ["val_0", "val_1", "val_2"]


@both
def test_F20_fewer_training_images_than_a_batch(kind, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    settings = [*KINDS[kind], f"data.root={root}", "data.batch_size=5"]
    with pytest.raises(InputError, match=r"4 samples do not fill one batch: data.batch_size=5"):
        start_training(settings, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", ["train", "check_data"])
def test_F01_to_F03_as_processes(kind, name, tmp_path):
    empty, lonely = tmp_path / "empty", plant(tmp_path / "lonely", kind)
    empty.mkdir()
    shutil.rmtree(lonely / LABELS[kind] / "val")
    for root, text in ((empty, "no images for split"), (lonely, "2 of 2 images of split 'val'")):
        settings = [*KINDS[kind], f"data.root={root}"]
        done = tool(name, *settings, cwd=tmp_path, code=2)
        assert text in done.stderr.split("error: ")[-1]
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("runs/*/*/*.pt"))
        assert name == "check_data" or not (tmp_path / "runs").exists()


def test_folders_with_classes_from_a_file_start(tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data")
    (tmp_path / "names.txt").write_text("\n".join("abcdefghijk"))
    settings = [f"data.classes={tmp_path}/names.txt"]
    assert CLASSES in KINDS["folder"]
    accepted("folder", root, tmp_path, monkeypatch, capsys, settings=settings)
    missing = [f"data.classes={tmp_path}/none.txt"]
    message = refused("folder", root, tmp_path, monkeypatch, settings=missing)
    assert message.startswith(f"data.classes={tmp_path}/none.txt: neither a list")
    write_pair(root, "train", "z", *np.zeros((2, 4, 4, 3), np.uint8), labels="masks")
    refused("folder", root, tmp_path, monkeypatch, "z.png: a label must have one channel")
