"""Images that are not as they must be: each is refused or accepted as promised, by both tools.

I03 and I04 stand in tests/faults/test_loading.py, I06 in tests/test_evaluation.py, marked
``bad_input``.
"""

import struct
import zlib

import numpy as np
import pytest
from conftest import highest_memory, tool, write_pair
from PIL import Image
from starts import CLASSES, KINDS, LABELS, accepted, plant, refused

from danet.data.loader import eval_batches, train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets.folder import Folder
from danet.errors import InputError
from danet.types import IGNORE

both = pytest.mark.parametrize("kind", list(KINDS))


def image(root, name="train_2", suffix=".png"):
    return root / "images" / "train" / f"{name}{suffix}"


def own(root, split="train", **settings):
    return Folder(root=root, split=split, classes=list("abcdefghijk"), **settings)


@both
@pytest.mark.parametrize("lost", [2, 300, 2000])
def test_I01_truncated_jpeg(kind, lost, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    path = image(root, suffix=".jpg")
    with Image.open(image(root)) as picture:
        picture.convert("RGB").save(path, quality=95)
    image(root).unlink()
    path.write_bytes(path.read_bytes()[:-lost])
    refused(kind, root, tmp_path, monkeypatch, f"{path}: not a readable image", "cut off")


@both
@pytest.mark.parametrize("content", [None, b"", b"no picture"], ids=["cut", "empty", "text"])
def test_I02_truncated_png_or_no_image(kind, content, tmp_path, monkeypatch):
    root = plant(tmp_path / "data", kind)
    path = image(root)
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    reason = {None: "cut off", b"": "the file is empty", b"no picture": "begins with b'no picture'"}
    message = refused(
        kind, root, tmp_path, monkeypatch, f"{path}: not a readable image", reason[content]
    )
    assert "NoneType" not in message


def bomb(path, side=14000):
    """Writes a small PNG of side x side black pixels, without ever having them in memory."""
    rows = bytes(100 * (side + 1))
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(rows) + packer.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    check = 1
    for _ in range(side // 100):
        check = zlib.adler32(rows, check)
    data = b"\x78\xda" + block * (side // 100) + packer.flush() + struct.pack(">I", check)

    def chunk(kind, content):
        code = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + code

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("what", ["images", "masks"])
def test_I05_small_file_that_unpacks_to_195_million_pixels(what, tmp_path, monkeypatch):
    root = plant(tmp_path / "data")
    path = root / what / "train/train_2.png"
    bomb(path)
    assert path.stat().st_size < 210_000
    parts = (path, "14000 x 14000", "data.max_pixels=178956970")
    before = highest_memory(anew=True)
    refused("folder", root, tmp_path, monkeypatch, *parts)
    assert highest_memory() - before < 150, "MiB; as pixels they are 187 to 561"


def test_I05_the_limit_is_a_setting(tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data")
    limit = ["data.max_pixels=2639"]
    parts = ("60 x 44", "data.max_pixels=2639")
    refused("folder", root, tmp_path, monkeypatch, *parts, settings=limit)
    accepted("folder", root, tmp_path, monkeypatch, capsys, settings=["data.max_pixels=2640"])


@both
def test_I07_tiny_and_thin_images(kind, tmp_path, monkeypatch, capsys):
    root, rng = plant(tmp_path / "data", kind), np.random.default_rng(0)
    shapes = {"y": (1, 1), "z": (7, 3000)}
    for name, shape in shapes.items():
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        write_pair(root, "train", name, pixels, np.zeros(shape, np.uint8), labels=LABELS[kind])
    accepted(kind, root, tmp_path, monkeypatch, capsys)
    if kind == "folder":
        crop = Pipeline({"crop": ScaleCrop((32, 32), (1, 1))})
        batch = next(train_batches(own(root, transform=crop), batch_size=6, seed=0))
        counted = {n: int((m != IGNORE).sum()) for n, m in zip(batch.name, batch.mask, strict=True)}
        assert counted["y"] == 1, "padding does not count"
        assert counted["z"] == 7 * 32
        sizes = [b.mask.shape[1:] for group in eval_batches(own(root), batch_size=1) for b in group]
        assert sizes[4:] == [(1, 1), (7, 3000)]


MODES = ["L", "LA", "RGBA", "P", "I;16", "1"]


@both
@pytest.mark.parametrize("mode", [*MODES, "CMYK"])
def test_I08_images_of_other_kinds(kind, mode, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    path = image(root)
    if mode == "CMYK":
        path.unlink()
        path = image(root, suffix=".jpg")
    Image.new(mode, (60, 44)).save(path)
    out = accepted(kind, root, tmp_path, monkeypatch, capsys, "8-bit RGB", mode)
    assert out.count("8-bit RGB") == 1
    if kind == "folder":
        assert own(root)[2].image.shape == (44, 60, 3)


def test_I08_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    root = plant(tmp_path / "data")
    Image.fromarray(np.full((44, 60), 257 * 77, np.uint16)).save(image(root))
    assert (own(root)[2].image == 77).all()


@both
@pytest.mark.parametrize("name", ["two words", "中文 图", "-rf", "a'b\"c", "#1 & $2"])
def test_I09_names_in_any_letters(kind, name, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / name, kind)
    for folder in ("images", LABELS[kind]):
        (root / folder / "train/train_2.png").rename(root / folder / f"train/{name}.png")
    accepted(kind, root, tmp_path, monkeypatch, capsys)
    assert (tmp_path / "report/train.png").exists(), "the overlay, too"


@both
def test_I10_capital_suffix(kind, tmp_path, monkeypatch, capsys):
    root = plant(tmp_path / "data", kind)
    Image.new("RGB", (60, 44)).save(image(root, suffix=".JPG"), format="JPEG")
    image(root).unlink()
    accepted(kind, root, tmp_path, monkeypatch, capsys, settings=["data.batch_size=4"])


def test_I11_file_that_vanishes_or_appears_during_training(tmp_path):
    root = plant(tmp_path / "data")
    data = own(root)
    batches = train_batches(data, batch_size=4, seed=0)
    next(batches)
    Image.new("RGB", (60, 44)).save(image(root, "train_9"))
    assert len(next(batches).name) == 4, "what appears is of the next run"
    image(root).unlink()
    with pytest.raises(InputError, match=r"train_2.png: .*the file does not exist"):
        next(batches)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "check_data"])
def test_I01_and_I09_as_processes(name, tmp_path):
    root = plant(tmp_path / "My Bilder 图")
    path = image(root)
    path.write_bytes(path.read_bytes()[:200])
    small = ["data.num_workers=1", "data.batch_size=2"]
    settings = ["data=folder", CLASSES, f"data.root={root}", *small]
    done = tool(name, *settings, cwd=tmp_path, code=2)
    assert f"{path}: not a readable image" in done.stderr.split("error: ")[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/folder/*"))
