"""Images that are not as they must be: each is refused or accepted as promised, by both tools.

I03 and I04 stand in tests/faults/test_loading.py, I06 in tests/test_evaluation.py, marked
``bad_input``.
"""

import numpy as np
import pytest
from conftest import highest_memory, write_pair
from PIL import Image
from starts import KINDS, LABELS

from danet.data.loader import eval_batches, train_batches
from danet.data.transforms import Pipeline, ScaleCrop
from danet.datasets.folder import Folder
from danet.errors import InputError
from danet.types import IGNORE

both = pytest.mark.parametrize("site", list(KINDS), indirect=True)


def own(root, split="train", **settings):
    return Folder(root=root, split=split, classes=list("abcdefghijk"), **settings)


@both
@pytest.mark.parametrize("lost", [2, 300, 2000])
def test_I01_truncated_jpeg(site, lost):
    path = site.image(suffix=".jpg")
    with Image.open(site.image()) as picture:
        picture.convert("RGB").save(path, quality=95)
    site.image().unlink()
    path.write_bytes(path.read_bytes()[:-lost])
    site.refused(f"{path}: not a readable image", "cut off")


@both
@pytest.mark.parametrize("content", [None, b"", b"no picture"], ids=["cut", "empty", "text"])
def test_I02_truncated_png_or_no_image(site, content):
    path = site.image()
    path.write_bytes(path.read_bytes()[:-400] if content is None else content)
    reason = {None: "cut off", b"": "the file is empty", b"no picture": "begins with b'no picture'"}
    message = site.refused(f"{path}: not a readable image", reason[content])
    assert "NoneType" not in message


@pytest.mark.fault("T48", "a small picture or archive that unpacks to gigabytes")
@pytest.mark.parametrize("what", ["images", "masks"])
def test_I05_small_file_that_unpacks_to_195_million_pixels(site, what):
    path = site.root / what / "train/train_2.png"
    Image.new("L", (14000, 14000)).save(path)
    assert path.stat().st_size < 210_000
    before = highest_memory(anew=True)
    site.refused(path, "14000 x 14000", "data.max_pixels=178956970")
    assert highest_memory() - before < 150, "MiB; as pixels they are 187 to 561"


def test_I05_the_limit_is_a_setting(site):
    site.refused("60 x 44", "data.max_pixels=2639", settings=["data.max_pixels=2639"])
    site.accepted(settings=["data.max_pixels=2640"])
    site.refused("data.max_pixels=0: expected a whole number", settings=["data.max_pixels=0"])


@both
def test_I07_tiny_and_thin_images(site):
    rng = np.random.default_rng(0)
    for name, shape in (("y", (1, 1)), ("z", (7, 3000))):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        labels = LABELS[site.kind]
        write_pair(site.root, "train", name, pixels, np.zeros(shape, np.uint8), labels=labels)
    site.accepted()
    if site.kind == "folder":
        crop = Pipeline({"crop": ScaleCrop((32, 32), (1, 1))})
        batch = next(train_batches(own(site.root, transform=crop), batch_size=6, seed=0))
        counted = {n: int((m != IGNORE).sum()) for n, m in zip(batch.name, batch.mask, strict=True)}
        assert counted["y"] == 1, "padding does not count"
        assert counted["z"] == 7 * 32
        batches = eval_batches(own(site.root), batch_size=1)
        assert [b.mask.shape[1:] for group in batches for b in group][4:] == [(1, 1), (7, 3000)]


@both
@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1", "CMYK"])
def test_I08_images_of_other_kinds(site, mode):
    path = site.image()
    if mode == "CMYK":
        path.unlink()
        path = site.image(suffix=".jpg")
    Image.new(mode, (60, 44)).save(path)
    assert site.accepted("8-bit RGB", mode).count("8-bit RGB") == 1
    if site.kind == "folder":
        assert own(site.root)[2].image.shape == (44, 60, 3)


def test_I08_sixteen_bits_are_scaled_and_not_clipped(site):
    Image.fromarray(np.full((44, 60), 257 * 77, np.uint16)).save(site.image())
    assert (own(site.root)[2].image == 77).all()


@both
@pytest.mark.parametrize("name", ["two words", "中文 图", "-rf", "a'b\"c", "#1 & $2"])
def test_I09_names_in_any_letters(site, name):
    root = site.root.rename(site.folder / name)
    for folder in ("images", LABELS[site.kind]):
        (root / folder / "train/train_2.png").rename(root / folder / f"train/{name}.png")
    site.accepted(root=root)
    assert (site.folder / "report/train.png").exists(), "the overlay, too"


@both
def test_I10_capital_suffix(site):
    Image.new("RGB", (60, 44)).save(site.image(suffix=".JPG"), format="JPEG")
    site.image().unlink()
    site.accepted(settings=["data.batch_size=4"])


def test_I11_file_that_vanishes_or_appears_during_training(site):
    batches = train_batches(own(site.root), batch_size=4, seed=0)
    next(batches)
    Image.new("RGB", (60, 44)).save(site.image("train_9"))
    assert len(next(batches).name) == 4, "what appears is of the next run"
    site.image().unlink()
    with pytest.raises(InputError, match=r"train_2.png: .*the file does not exist"):
        next(batches)
