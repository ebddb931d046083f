"""A network that knows the truth finds what was changed in the labels, and nothing else."""

import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call, make_folder, rewrite, save_picture, write_pair
from torch import nn

from danet.bands import bands_of
from danet.checkpoint import format as checkpoint_format
from danet.data_check import suspects
from danet.data_check.suspects import find_regions, find_suspects, page
from danet.datasets.base import Reading
from danet.errors import InputError
from danet.tools.check_data import refuse_misfit
from danet.types import IGNORE, SegmentationOutput
from danet.visualization.overlay import Legend

CLASSES = ["road", "car", "sky", "<tree>"]
SIZE = (90, 120)


class Oracle(nn.Module):
    """Reads the class of a pixel from its red value, and how sure it is from its green one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        classes = image[:, 0].long() // 60
        sure = image[:, 1:2].float() / 10  # logit
        logits = nn.functional.one_hot(classes, len(CLASSES)).movedim(3, 1) * sure
        return SegmentationOutput(logits + self.weight, {})


def scene(*, sure=120):
    """Returns an image that the oracle reads, and its truth: a car, a tree, a road and the sky."""
    truth = np.zeros(SIZE, np.uint8)
    truth[:40] = 2
    truth[5:80, 90:100] = 3
    truth[50:70, 30:60] = 1
    return np.stack((truth * 60, np.full_like(truth, sure), truth), axis=2), truth


@pytest.fixture
def make_dataset(tmp_path):
    """Makes a data set of scenes from changes of their masks, by the names of the pictures."""

    def make(changes):
        for name, change in changes.items():
            image, mask = scene()
            write_pair(tmp_path, "train", name, image, change(mask), labels="masks")
        return make_folder(root=tmp_path, split="train", classes=CLASSES)

    return make


def paint(label, rows, columns):
    """Returns a change of a mask: a rectangle with another label."""

    def change(mask):
        mask = mask.copy()
        mask[slice(*rows), slice(*columns)] = label
        return mask

    return change


CLEAN = {f"clean{i}": lambda mask: mask for i in range(4)}


def shift(mask):
    moved = np.full_like(mask, IGNORE)
    moved[12:, 14:] = mask[:-12, :-14]
    return moved


def test_a_region_has_the_box_the_pair_and_the_score_of_a_slow_count():
    _, truth = scene()
    mask = paint(3, (45, 75), (10, 80))(truth)
    loss = np.random.default_rng(0).uniform(0, 9, SIZE)
    whole, region = find_regions(4, truth, mask, loss)
    assert whole == region
    wrong = {(y, x) for y in range(90) for x in range(120) if mask[y, x] != truth[y, x]}
    crosses = [
        {(y, x), (y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)}
        for y in range(90)
        for x in range(120)
    ]
    inside = set().union(*(cross for cross in crosses if cross <= wrong))
    assert region.pixels == len(inside) == 70 * 30 - 4, "its corners are thinner than the cross"
    assert region.box == (10, 45, 70, 30)
    assert region.pair == (3, 0)  # it has more of the road than of the car
    mean = sum(loss[place] for place in inside) / len(inside)
    assert region.score == pytest.approx(mean * (len(inside) / (90 * 120)) ** (1 / 4))


def test_what_is_thin_small_or_ignored_is_no_region():
    _, truth = scene()
    loss = np.full(SIZE, 9.0)
    # The radius of the disc is 1 here, so a strip of three pixels is the thinnest region.
    assert find_regions(4, truth, paint(3, (20, 22), (0, 120))(truth), loss) == []
    assert find_regions(4, truth, paint(3, (20, 23), (0, 120))(truth), loss)[1].pixels > 250
    assert find_regions(4, truth, paint(IGNORE, (0, 60), (0, 80))(truth), loss) == []
    # The least region of 1600 x 1600 has 1600 pixels, and the disc a radius of 10.
    large, other = np.zeros((2, 1600, 1600), np.uint8)
    other[:39, :41] = 1
    assert find_regions(2, large, other, np.ones(large.shape)) == []
    other[:50, :40] = 1
    assert find_regions(2, large, other, np.ones(large.shape))[1].pixels > 1600
    other[:] = 0
    other[100:120] = 1
    assert find_regions(2, large, other, np.ones(large.shape)) == [], "a long strip of 20 rows"
    other[100:122] = 1
    assert len(find_regions(2, large, other, np.ones(large.shape))) == 2
    assert find_regions(2, large, large + 1, np.ones(large.shape))[1].share == 1


def test_the_region_of_the_highest_loss_comes_first():
    _, truth = scene()
    mask = paint(3, (60, 80), (20, 40))(paint(3, (40, 60), (0, 20))(truth))
    loss = np.where(np.arange(90)[:, None] < 60, 1.0, 5.0) * np.ones(SIZE)
    whole, first, second = find_regions(4, truth, mask, loss)
    assert (first.box, second.box) == ((20, 60, 20, 20), (0, 40, 20, 20))
    assert whole.box == (0, 40, 40, 40)
    assert whole.pixels == first.pixels + second.pixels


def test_planted_mistakes_come_first_and_a_shifted_mask_once(make_dataset):
    changes = {
        "swapped": paint(3, (50, 70), (30, 60)),
        "missing": paint(0, (50, 70), (30, 60)),
        "shifted": shift,
        "spots": lambda mask: paint(3, (75, 85), (5, 25))(
            paint(1, (5, 15), (5, 20))(
                paint(1, (5, 15), (40, 60))(paint(0, (5, 35), (62, 86))(mask))
            )
        ),
    }
    dataset = make_dataset({**CLEAN, **changes})
    found = find_suspects(Oracle(), dataset, range(len(dataset)))
    assert [suspect[2].score for suspect in found] == sorted(
        (suspect[2].score for suspect in found), reverse=True
    )
    by_name = {}
    for of, index, region in found:
        assert of is dataset
        by_name.setdefault(dataset.items[index].name, []).append(region)
    assert {name: len(regions) for name, regions in by_name.items()} == {
        "swapped": 1,
        "missing": 1,
        "shifted": 1,
        "spots": 3,  # of four
    }
    assert by_name["swapped"][0].box == by_name["missing"][0].box == (30, 50, 30, 20)
    assert (by_name["swapped"][0].pair, by_name["missing"][0].pair) == ((3, 1), (0, 1))
    assert by_name["shifted"][0].pair is None
    assert (20, 5) not in {region.box[2:] for region in by_name["spots"]}


def test_a_confident_contradiction_comes_before_an_unsure_one(make_dataset, tmp_path):
    change = paint(3, (50, 70), (30, 60))
    dataset = make_dataset({"a": change, "b": change})
    save_picture(tmp_path / "images/train/a.png", scene(sure=20)[0])
    first, second = find_suspects(Oracle(), dataset, [0, 1])
    assert [dataset.items[suspect[1]].name for suspect in (first, second)] == ["b", "a"]
    # -log of 1 / (3 + e^2), by the logits 2, 0, 0, 0
    share = (600 - 4) / (90 * 120)
    assert second[2].score == pytest.approx(np.log(3 + np.e**2) * share**0.25, rel=1e-5)
    assert first[2].score == pytest.approx(np.log(1e4) * share**0.25, rel=1e-5), "no cap"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_pair_is_left_out_and_only_the_worst_pictures_are_kept(
    num_workers, make_dataset, tmp_path, monkeypatch
):
    changes = {f"p{i}": paint(3, (50, 60 - i), (30, 60)) for i in range(5)}
    dataset = make_dataset(changes)
    (tmp_path / "masks/train/p0.png").write_bytes(b"no picture")
    monkeypatch.setattr(suspects, "_KEPT", 2)
    found = find_suspects(Oracle(), dataset, range(5), num_workers=num_workers)
    assert [dataset.items[suspect[1]].name for suspect in found] == ["p1", "p2"]


def test_the_page_shows_each_region_and_escapes_all_names(make_dataset):
    dataset = make_dataset({**CLEAN, "a&b": paint(3, (50, 70), (30, 60)), "whole": shift})
    found = find_suspects(Oracle(), dataset, range(len(dataset)))
    text = page(Oracle(), found, Legend(CLASSES, dataset.palette))
    assert text.count("data:image/webp") == 4 * len(found) == 8
    assert "<tree>" not in text
    assert re.search(
        r"label <span[^>]*></span><b>&lt;tree&gt;</b>, network <span[^>]*></span>", text
    )
    assert "1. whole" in text
    assert "2. a&amp;b" in text
    assert "is the mask shifted" in text
    assert text.count("masks/train/whole.png") == 1


@pytest.mark.parametrize(
    ("rows", "columns", "corners"),
    [((50, 70), (30, 60), (90, 120, 270, 240)), ((70, 90), (100, 120), (180, 180, 360, 360))],
    ids=["in the middle", "in a corner"],
)
def test_the_box_is_around_the_region_in_all_pictures(
    make_dataset, monkeypatch, rows, columns, corners
):
    dataset = make_dataset({"a": paint(3, rows, columns)})
    found = find_suspects(Oracle(), dataset, [0])
    panels = []
    monkeypatch.setattr(suspects, "data_uri", lambda panel: str(panels.append(panel)))
    page(Oracle(), found, Legend(CLASSES, dataset.palette))
    assert len(panels) == 4
    left, top, right, bottom = corners
    for panel in panels:
        assert panel.shape == (360, 360, 3)
        assert (panel[top + 20 : bottom - 20, left] == 255).all()
        assert (panel[top, left + 20 : right - 20] == 255).all()
        assert not (panel[top + 20 : bottom - 20, left + 20 : right - 20] == 255).all(2).any()
    differs = (panels[3] == (220, 40, 40)).all(axis=2)
    assert differs[top + 20 : bottom - 20, left + 20 : right - 20].all()
    differs[top:bottom, left:right] = False
    assert not differs.any()


def test_a_page_without_entries_says_so(make_dataset):
    dataset = make_dataset(CLEAN)
    found = find_suspects(Oracle(), dataset, range(len(dataset)))
    assert found == []
    assert "There is none" in page(Oracle(), found, Legend(CLASSES, dataset.palette))


# The tool


@pytest.fixture
def own(network, tmp_path):
    """Settings of a folder with the classes of a tiny network; its masks are blocks of noise."""
    names = [f"class {i}" for i in range(len(checkpoint_format.load(network)["classes"]))]
    names[0] = "=1+1"
    rewrite(network, classes=names)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            blocks = rng.integers(0, len(names), (3, 4)).astype(np.uint8)
            image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            mask = np.kron(blocks, np.ones((16, 16), np.uint8))
            write_pair(tmp_path / "own", split, f"{split}{i}", image, mask, labels="masks")
    return [
        *("data=folder", f"data.root={tmp_path / 'own'}", "data.num_workers=0", "device=cpu"),
        *(f"output={tmp_path / 'out'}", f"checkpoint={network}", "samples=0"),
        f"data.classes=[{','.join(map(repr, names))}]",
    ]


@pytest.mark.slow
def test_the_tool_writes_the_list_and_the_page(own, tmp_path, capsys):
    call("check_data", *own, "suspects=3")
    seen = capsys.readouterr().out
    with open(tmp_path / "out/suspects.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 3
    assert [row["rank"] for row in rows] == [str(i + 1) for i in range(len(rows))]
    assert {row["split"] for row in rows} == {"train", "val"}
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(
        (tmp_path / "own" / "masks" / row["split"]).samefile((tmp_path / row["label"]).parent)
        for row in rows
    )
    assert not any(row[key].startswith("=") for row in rows for key in row)
    text = (tmp_path / "out/suspects.html").read_text()
    assert text.count("<h2>") == 3
    assert f"suspicious labels: {len(rows)} places" in seen
    assert str(tmp_path / "out/suspects.html") in seen
    assert "no problems" in seen


@pytest.mark.slow
def test_a_network_of_other_classes_or_bands_is_refused(own, capsys):
    *settings, classes = own
    swapped = classes.replace("class 1'", "x").replace("'x", "'other'")
    call("check_data", *settings, swapped, code=2)
    error = capsys.readouterr().err
    assert "class 1 is class 1 there and other here" in error
    call("check_data", *settings, classes.replace("]", ",more]"), code=2)
    assert "is missing there and more here" in capsys.readouterr().err
    call("check_data", *own, "suspects=0", code=2)
    assert "suspects=0: expected at least 1" in capsys.readouterr().err
    call("check_data", *own, "device=gpu", code=2)
    assert "device=gpu: expected auto, cpu or cuda" in capsys.readouterr().err
    call("check_data", *own, "data.channels=3", code=2)
    assert "it reads other bands" in (message := capsys.readouterr().err)
    assert message.rstrip().endswith("leave data.channels out")


@pytest.mark.parametrize("limits", [None, [[0, 9000], [5, 7.5]]])
def test_the_bands_that_are_advised_are_those_of_the_network(make_dataset, limits):
    dataset = make_dataset({"a": paint(3, (50, 70), (30, 60))})
    network = SimpleNamespace(classes=CLASSES, bands=bands_of([2, 5], limits, [5, 2, 2]))
    with pytest.raises(InputError, match="it reads other bands") as refused:
        refuse_misfit(network, dataset, "x.pt")
    settings = dict(text.split("=") for text in re.findall(r"'data\.([^']+)'", str(refused.value)))
    given = {key: json.loads(value) for key, value in settings.items()}
    reading = Reading(**given)
    assert reading.bands == network.bands
    dataset.reading = reading
    refuse_misfit(network, dataset, "x.pt")
