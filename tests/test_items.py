"""Items come back as they were given, and 600,000 of them start soon, in little memory.

Times are those of the CPU, held against those of plain Python for the same in the same run.
"""

import os
import pickle
import random
import subprocess
import sys

import pytest
from conftest import ROOT

from danet.datasets.base import Item
from danet.datasets.items import Items

ODD = [
    Item("/d/images/train/a.png", "/d/masks/train/a.png", "a"),
    Item("/d/images/train/deep/c.jpg", "/d/masks/train/deep/c.png", "deep/c"),
    Item("/d/leftImg8bit/val/x/x_1_leftImg8bit.png", "/d/gtFine/val/x/x_1_labelIds.png", "x_1"),
    Item("/p/p.png", "/p/p.png", "p"),  # the name is in the folder and the suffix, too
    Item("/d/one.jpg", None, "one"),
    Item("/d/elsewhere.jpg", "/d/labels.json", "no part of any path"),
    Item("/d/bilder/größe 日本.jpg", "/d/masken/größe 日本.png", "größe 日本"),
    Item(os.fsdecode(b"/d/\xff.jpg"), os.fsdecode(b"/d/\xff.png"), os.fsdecode(b"\xff")),
    Item("/d/x", "/d/y", ""),
]
SAME_NAME = [Item(f"/{i}/a.png", f"/{i}/a.png", "a") for i in range(5)]


@pytest.mark.parametrize("given", [ODD, SAME_NAME, []], ids=["odd", "of one name", "none"])
def test_items_come_back_as_they_were_given_sorted_by_name(given):
    items = Items(iter(given))
    wanted = sorted(given, key=lambda item: os.fsencode(item.name))
    assert list(items) == list(pickle.loads(pickle.dumps(items))) == wanted
    assert [items[i] for i in range(-len(given), 0)] == wanted
    assert len(items) == len(given)
    for index in (len(given), -len(given) - 1):
        with pytest.raises(IndexError):
            items[index]


def test_the_order_given_changes_neither_the_items_nor_their_fingerprint():
    shuffled = Items(random.Random(0).sample(ODD, len(ODD)))
    assert list(shuffled) == list(Items(ODD))
    assert shuffled.fingerprint() == Items(ODD).fingerprint() == "292fa820cb02f2b9"
    assert Items(ODD[1:]).fingerprint() != shuffled.fingerprint()


def test_missing_labels_are_found_by_listing_folders(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    items = []
    for i in range(20):
        path = tmp_path / ("one" if i % 2 else "two") / f"{i:02}.png"
        items.append(Item("x", str(path), f"{i:02}"))
        if i not in (3, 8):
            path.touch()
    for name, target in (("05.png", "nowhere"), ("07.png", "one/01.png")):
        (tmp_path / "one" / name).unlink()
        (tmp_path / "one" / name).symlink_to(tmp_path / target)
    items += [Item("x", str(tmp_path / "no folder" / "z.png"), "zz"), Item("x", None, "zzz")]
    assert Items(items).without_label() == [3, 5, 8, 20]


PROGRAM = """
import pickle, sys, time
sys.path.insert(0, {root!r})
import torch
from danet.data.loader import train_batches
from danet.datasets.base import FileDataset, Item

class Long(FileDataset):
    classes, palette = ("a", "b"), ((0, 0, 0), (1, 1, 1))
    def find_items(self):
        for i in range(600_000):
            name = f"{{i * 7919 % 600_000:012d}}"
            folder = "/data/images/train2017"
            yield Item(f"{{folder}}/{{name}}.jpg", None, name)

def high():  # that of getrusage begins with what the parent had
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024

start = time.process_time()
for _ in Long.find_items(None):
    pass
plain = time.process_time() - start
before, start = high(), time.process_time()
data = Long(root={folder!r}, split="train")
print((time.process_time() - start) / plain, high() - before, len(pickle.dumps(data)) / 2**20)
sampler = train_batches(data, batch_size=16, seed=0)
print(data.items[5].image)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_600000_entries_start_in_seconds_and_take_little_memory(tmp_path):
    program = PROGRAM.format(root=str(ROOT), folder=str(tmp_path))
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    first, last = out.stdout.splitlines()
    ratio, memory, pickled = map(float, first.split())
    assert last == "/data/images/train2017/000000000005.jpg"
    assert ratio < 15, "usually 3 times what making the paths takes"
    assert memory < 180, "MiB, at its highest; usually 126"
    assert pickled < 25, "MiB"
