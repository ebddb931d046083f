"""The doctor counts what a slow count counts, goes on after a problem, and writes nowhere else."""

import json
import types

import numpy as np
import pytest
from conftest import call, make_folder, plant, write_pair
from PIL import Image

from danet.data_check.overlap import find_copies
from danet.data_check.report import (
    class_weights,
    contact_sheet,
    describe,
    notes_of,
    record,
    report_duplicates,
    weights_setting,
)
from danet.data_check.sample import check_sample, sample_indices
from danet.data_check.scan import inspect_pair, scan
from danet.datasets.base import FileDataset, Item
from danet.datasets.camvid import CamVid
from danet.errors import InputError
from danet.types import IGNORE


def slow_report(dataset):
    """Pixels, images and pixels of these images for each class, from whole samples."""
    num_classes = len(dataset.classes)
    pixels, images, pixels_with = np.zeros((3, num_classes), int)
    for i in range(len(dataset)):
        mask = dataset[i].mask
        for index in range(num_classes):
            here = int((mask == index).sum())
            pixels[index] += here
            images[index] += here > 0
            pixels_with[index] += mask.size if here else 0
    return pixels, images, pixels_with


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("full", [False, True])
def test_a_scan_adds_up_what_a_slow_count_adds_up(camvid_tree, num_workers, full):
    dataset = CamVid(root=camvid_tree, split="train")
    # One picture is of another size, and one class is only there.
    write_pair(camvid_tree, "train", "z", np.zeros((9, 20, 3), np.uint8), np.full((9, 20), 3, "u1"))
    dataset = CamVid(root=camvid_tree, split="train")
    report = scan(dataset, full=full, num_workers=num_workers)
    for one, two in zip(
        (report.pixels, report.images_with, report.pixels_with), slow_report(dataset), strict=True
    ):
        assert np.array_equal(one, two)
    assert [pair.size for pair in report.pairs] == [(44, 60)] * 4 + [(9, 20)]
    assert report.ignored == sum(int((dataset[i].mask == IGNORE).sum()) for i in range(5))
    assert report.problems == []
    assert "5 images, but the publisher counts 367" in report.notes


def test_weights_are_those_of_the_paper():
    pixels, pixels_with = np.array([[600, 100, 50, 0], [1000, 1000, 250, 0]])
    report = types.SimpleNamespace(pixels=pixels, pixels_with=pixels_with)
    # freq: 0.6, 0.1, 0.2; their median is 0.2
    assert class_weights(report) == pytest.approx([1 / 3, 2, 1, 0])
    assert weights_setting(report) == "'loss.main.class_weights=[0.3333,2,1,0]'"
    assert class_weights(types.SimpleNamespace(pixels=np.zeros(2, int))).tolist() == [0, 0]


def test_the_quick_look_finds_every_cut_file_that_full_decoding_finds(camvid_tree, tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.kron(
        rng.integers(0, 256, (11, 15, 3), dtype=np.uint8), np.ones((4, 4, 1), np.uint8)
    )
    picture = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9" * 20
    cases = [("png", {}), ("jpg", {}), ("jpg", {"progressive": True}), ("jpg", {"exif": exif})]
    for suffix, settings in [*cases, ("tif", {}), ("webp", {}), ("bmp", {})]:
        path = tmp_path / f"x.{suffix}"
        picture.save(path, **settings)
        whole = path.read_bytes()
        dataset = CamVid(root=camvid_tree, split="train")
        dataset.items = [dataset.items[0]._replace(image=str(path))]
        assert inspect_pair(dataset, 0).problem is None
        assert inspect_pair(dataset, 0).size == (44, 60)
        for share in (0.03, 0.5, 0.9, 0.995):
            path.write_bytes(whole[: int(len(whole) * share)])
            quick, full = inspect_pair(dataset, 0), inspect_pair(dataset, 0, full=True)
            assert (quick.problem is None) == (full.problem is None), (suffix, share)
            if suffix in ("png", "jpg"):
                assert quick.problem == full.problem
                assert f"{path}: not a readable image" in quick.problem


def test_a_scan_goes_on_after_a_problem_and_counts_them_all(camvid_tree):
    for i, value in enumerate((12, 40, 99)):
        mask = np.zeros((44, 60), np.uint8)
        mask[i + 1, i + 2] = value
        Image.fromarray(mask).save(camvid_tree / f"labels/train/train_{i}.png")
    report = scan(CamVid(root=camvid_tree, split="train"))
    assert len(report.problems) == 3
    assert "train_1.png: label value 40 on 1 pixels, first at row 2, column 3" in report.problems[1]
    assert report.images_with[0] == 1, "the good label still counts"
    assert "3 problem(s), listed at the end" in describe("train", record(report, [], show=2))


def test_copies_are_found_within_and_between_splits_whatever_they_are_called(camvid_tree):
    images = camvid_tree / "images"
    copied = (images / "train/train_0.png").read_bytes()
    (images / "train/train_2.png").write_bytes(copied)
    (images / "val/val_1.png").write_bytes(copied)
    (images / "test/test_0.png").write_bytes(copied[:-1] + b"x")  # of the same size
    sets = [CamVid(root=camvid_tree, split=s) for s in ("train", "val", "test")]
    (group,) = find_copies(sets)
    names = ("train/train_0", "train/train_2", "val/val_1")
    assert [path for _, path in group] == [f"{images}/{name}.png" for name in names]
    assert [number for number, _ in group] == [0, 0, 1]
    assert find_copies(sets, read=False) == []
    for allowed in (False, True):
        reports = [scan(CamVid(root=camvid_tree, split=s)) for s in ("train", "val")]
        report_duplicates(reports, allow_overlap=allowed)
        assert "1 images are there more than once: train_0.png = train_2.png" in reports[0].notes
        found, others = reports[0].problems, reports[0].notes
        (text,) = [t for t in (others if allowed else found) if "the same image in" in t]
        assert "the same image in train and val" in text
        assert len(found) == (not allowed)


def test_the_sheet_shows_every_pair_that_can_be_read(camvid_tree):
    dataset = CamVid(root=camvid_tree, split="train")
    (camvid_tree / "images/train/train_1.png").write_bytes(b"x")
    sheet = contact_sheet(dataset, range(4))
    assert sheet.shape[1] == 3 * 320 + 2 * 4
    assert contact_sheet(dataset, [1]) is None
    assert contact_sheet(dataset, []) is None


# The sample


def test_the_sample_is_the_first_the_last_and_thirty_others_always_the_same():
    assert sample_indices(5, 32) == [0, 1, 2, 3, 4]
    assert len(sample_indices(33, 32)) == 32
    chosen = sample_indices(1000, 32)
    assert chosen == sample_indices(1000, 32) == sorted(set(chosen))
    assert (len(chosen), chosen[0], chosen[-1]) == (32, 0, 999)


class Unlabelled(FileDataset):
    """A test split whose labels the publisher keeps."""

    classes = ("a", "b")
    palette = ((0, 0, 0), (1, 1, 1))

    def find_items(self):
        return [Item(str(p), None, p.stem) for p in self.root.iterdir()]


def test_a_split_without_labels_is_looked_at_too(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    dataset = Unlabelled(root=tmp_path, split="test")
    report = scan(dataset)
    assert [pair.size for pair in report.pairs] == [(4, 5)]
    assert notes_of(report, absent="have no score") == []
    assert check_sample(dataset) == []
    (tmp_path / "a.png").write_bytes(b"")
    assert len(scan(dataset).problems) == 1


def test_weights_above_50_come_with_a_caution_and_capped():
    dataset = types.SimpleNamespace(classes=("road", "car", "sign"))
    pixels, pixels_with = np.array([[6000, 1000, 10], [10000, 10000, 10000]])
    report = types.SimpleNamespace(pixels=pixels, pixels_with=pixels_with, dataset=dataset)
    setting, caution = weights_setting(report).splitlines()
    assert setting == "'loss.main.class_weights=[0.1667,1,100]'"
    assert "caution: weights above 50 (sign)" in caution
    assert caution.endswith("capped: 'loss.main.class_weights=[0.1667,1,50]'")


def test_a_problem_of_many_files_is_said_once_with_the_setting_that_all_of_them_show(tmp_path):
    plant(tmp_path, values=(0, 4), splits=(("train", 9),))
    plant(tmp_path / "labels of 2", values=(0, 128, 255), splits=(("train", 3),))
    for root, classes, setting, said in (
        (
            tmp_path,
            "ab",
            "{0:0,4:1}",
            "and 8 more: train_1, train_2, train_3, train_4, train_5, ...",
        ),
        (tmp_path / "labels of 2", "abc", "{0:0,128:1,255:2}", "and 2 more: train_1, train_2"),
    ):
        with pytest.raises(InputError) as error:
            check_sample(make_folder(root=root, split="train", classes=list(classes)))
        first, more, last = str(error.value).splitlines()
        assert "train_0.png: label value" in first
        assert more == said
        assert f"only: set 'data.values={setting}'; tools/check_data.py looks at all" in last


def test_other_problems_and_a_stray_value_do_not_hide_behind_the_first(tmp_path):
    plant(tmp_path, splits=(("train", 4),))
    (tmp_path / "images/train/train_2.png").write_bytes(b"x")
    for name in ("train_0", "train_3"):
        Image.fromarray(np.array([[0, 1, 7]], np.uint8)).save(tmp_path / f"masks/train/{name}.png")
        Image.new("RGB", (3, 1)).save(tmp_path / f"images/train/{name}.png")
    dataset = make_folder(root=tmp_path, split="train", classes=["a", "b", "c"])
    with pytest.raises(InputError) as error:
        check_sample(dataset)
    first, more, other, last = str(error.value).splitlines()
    assert "train_0.png: label value 7" in first
    assert more == "and 1 more: train_3"
    assert "train_2.png: not a readable image" in other
    assert last.startswith("3 of 4 pairs that were looked at have a problem; tools")


# The tool


def test_no_class_weights_are_proposed_while_there_are_problems(tmp_path, capsys):
    root = plant(tmp_path / "data", values=(0, 255))
    settings = ("data=folder", f"data.root={root}", "data.classes=[a,b]", "data.num_workers=0")
    call("check_data", *settings, f"output={tmp_path / 'out'}", code=2)
    assert "median frequency" not in capsys.readouterr().out


def test_a_problem_is_said_once_and_the_report_lies_in_a_folder_of_the_name(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / "cats", values=(0, 200), folder="masks", splits=(("train", 2), ("val", 2)))
    plant(tmp_path / "dogs", values=(0, 1), folder="masks", splits=(("train", 2), ("val", 2)))
    own = ["data=folder", "data.classes=[a,b]", "data.num_workers=0"]
    call("check_data", *own, "data.root=cats", code=2)
    seen = "".join(capsys.readouterr())
    assert seen.count("train_1.png: label value 200 on") == 1
    assert seen.count("data.labels_start_at=1") == 1, "advice for four files"
    call("check_data", *own, "data.root=dogs")
    found = {path.parent.name for path in tmp_path.glob("runs/check/*/report.json")}
    assert found == {"cats", "dogs"}
    monkeypatch.chdir(tmp_path / "dogs")
    call("check_data", *own, "data.root=.")
    assert "check/dogs/report.json" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "dogs").iterdir()} == {"images", "masks"}


def test_the_tool_writes_a_report_and_never_into_the_data(camvid_tree, tmp_path, capsys):
    settings = ["data=camvid", f"data.root={camvid_tree}", "data.num_workers=0"]
    output = tmp_path / "out"
    call("check_data", *settings, "splits=[train,val,test]", f"output={output}")
    assert {path.name for path in output.iterdir()} == {
        *("report.json", "train.png", "val.png", "test.png")
    }
    text = capsys.readouterr().out
    assert "balanced by median frequency: 'loss.main.class_weights=[" in text
    assert text.count("loss.main.class_weights") == 1
    assert "no problems" in text
    found = json.loads((output / "report.json").read_text())
    assert set(found["splits"]) == {"train", "val", "test"}
    call("check_data", *settings, f"output={camvid_tree / 'out'}", code=2)
    assert "lies in data.root, where nothing is ever written" in capsys.readouterr().err
