"""Cityscapes is scored as its benchmark scores it, from a network or a folder of predictions."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from conftest import TINY, call, tool
from PIL import Image
from test_cityscapes import NAMES, SIZE, truth_of, write_tree
from test_reproduce import script

from danet.datasets.cityscapes import LABEL_IDS, LABELS, Cityscapes
from danet.errors import InputError
from danet.evaluation.cityscapes import OfficialScorer, OfficialScores
from danet.types import IGNORE

scoring = script("score_cityscapes")

CATEGORIES = {
    "flat": (7, 8), "construction": (11, 12, 13), "object": (17, 19, 20), "nature": (21, 22),
    "sky": (23,), "human": (24, 25), "vehicle": (26, 27, 28, 31, 32, 33),
}  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "cityscapes")


def prediction_of(truth, rng):
    """Disturbs a truth: some pixels get other ids, ignored ones and caravans among them."""
    prediction = truth.copy()
    other = rng.random(truth.shape) < 0.4
    prediction[other] = rng.choice([7, 8, 11, 24, 25, 26, 29, 30, 33, 0, 4, 9], other.sum())
    return prediction


def literal_scores(images, sizes):
    """The scores as the publication words them, of pixels and of instances.

    Args:
        images: Of (prediction, truth, instances).
        sizes: Label id -> average size of its instances.
    """
    known = [np.isin(truth, list(NAMES)) for _, truth, _ in images]
    predicted, true = (
        np.concatenate([image[k][mask] for image, mask in zip(images, known, strict=True)])
        for k in (0, 1)
    )
    things = [  # (label id, predictions of the pixels)
        (int(number) // 1000, prediction[instances == number])
        for prediction, _, instances in images
        for number in np.unique(instances)
        if number > 1000 and number // 1000 in NAMES
    ]

    def iou(ids):
        is_true, is_predicted = np.isin(true, ids), np.isin(predicted, ids)
        union = (is_true | is_predicted).sum()
        return (is_true & is_predicted).sum() / union if union else math.nan

    def iiou(ids, hit_ids):
        mine = [(sizes[label] / len(found), found) for label, found in things if label in ids]
        tp = sum(weight * np.isin(found, hit_ids).sum() for weight, found in mine)
        fn = sum(weight * (~np.isin(found, hit_ids)).sum() for weight, found in mine)
        fp = (~np.isin(true, ids) & np.isin(predicted, hit_ids)).sum()
        return tp / (tp + fn + fp) if tp + fn + fp else math.nan

    groups = {"human": (24, 25), "vehicle": (26, 27, 28, 29, 30, 31, 32, 33)}
    return (
        {name: iou((i,)) for i, name in NAMES.items()},
        {name: iiou((i,), (i,)) for i, name in NAMES.items() if i >= 24},
        {name: iou(ids) for name, ids in CATEGORIES.items()},
        {name: iiou(CATEGORIES[name], ids) for name, ids in groups.items()},
    )


@pytest.fixture
def images():
    """Three images (prediction, truth, instances); trains occur nowhere, walls only wrongly."""
    rng, made = np.random.default_rng(5), []
    for _ in range(3):
        truth, instances = truth_of(rng)
        for absent in (31, 12):
            truth[truth == absent] = 7
            instances[(instances == absent) | (instances // 1000 == absent)] = 7
        prediction = prediction_of(truth, rng)
        prediction[0, :3] = 12
        instances[0, 4] = 1000  # the script takes only what is above for an instance
        made.append((prediction, truth, instances))
    return made


def official(images):
    scorer = OfficialScorer(LABELS)
    for prediction, truth, instances in images:
        scorer.update(prediction, truth)
        scorer.update_instances(prediction, instances)
    return scorer.scores()


SIZES = {label.id: label.average_size for label in LABELS}


def test_scores_are_those_of_the_definition_written_out(images):
    scores = official(images)
    for fast, slow in zip(scores, literal_scores(images, SIZES), strict=True):
        assert fast == pytest.approx(slow, rel=1e-12, abs=0, nan_ok=True)
    assert math.isnan(scores.iou_classes["train"])
    assert scores.iou_classes["wall"] == 0
    assert [len(values) for values in scores] == [19, 8, 7, 2]
    mean = np.nanmean(list(scores.iou_classes.values()))
    assert scores.averages()["iou_classes"] == pytest.approx(mean, rel=1e-14)


def test_scores_are_those_of_the_publishers_script(images, tmp_path, monkeypatch):
    pytest.importorskip("cityscapesscripts", reason="cityscapesScripts is not installed")
    if not hasattr(np, "in1d"):  # numpy 2.4 dropped what the script calls
        monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script

    paths = []
    for i, (prediction, truth, instances) in enumerate(images):
        truth_path = tmp_path / f"a_00000{i}_000000_gtFine_labelIds.png"
        Image.fromarray(truth).save(truth_path)
        Image.fromarray(instances).save(tmp_path / truth_path.name.replace("label", "instance"))
        Image.fromarray(prediction).save(tmp_path / f"{i}_prediction.png")
        paths.append((str(tmp_path / f"{i}_prediction.png"), str(truth_path)))
    script.args.quiet, script.args.JSONOutput = True, False
    result = script.evaluateImgLists(*map(list, zip(*paths, strict=True)), script.args)
    scores = official(images)
    for kind, mine in scores._asdict().items():
        inst = "Inst" * kind.startswith("iiou")
        is_class = kind.endswith("classes")
        one, many = ("class", "Classes") if is_class else ("category", "Categories")
        theirs, mean = result[f"{one}{inst}Scores"], result[f"averageScore{inst}{many}"]
        assert mine == pytest.approx({name: theirs[name] for name in mine}, abs=1e-12, nan_ok=True)
        assert all(math.isnan(theirs[name]) for name in theirs.keys() - mine.keys())
        assert scores.averages()[kind] == pytest.approx(mean, abs=1e-12)


def test_counting_classes_of_a_network_gives_the_scores_of_the_pixels(tree):
    dataset = Cityscapes(root=tree, split="val")
    counter, scorer = dataset.official_counter(), OfficialScorer(LABELS)
    matrix = np.zeros((19, 19), np.int64)
    rng = np.random.default_rng(0)
    for i, item in enumerate(dataset.items):
        classes = rng.integers(0, 19, SIZE, dtype=np.uint8)
        mask = dataset.read(i)[1]
        np.add.at(matrix, (mask[mask != IGNORE], classes[mask != IGNORE]), 1)
        counter.update(classes, item.name)
        ids = np.array(list(NAMES), np.uint8)[classes]
        scorer.update(ids, np.array(Image.open(item.mask)))
        scorer.update_instances(ids, np.array(Image.open(dataset.instance_path(item))))
    assert tuple(NAMES) == LABEL_IDS
    for mine, theirs in zip(counter.scores(matrix), scorer.scores(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-15, nan_ok=True)
    assert not counter.note


def test_iiou_is_left_out_and_said_where_it_cannot_be_had(tree):
    matrix = np.ones((19, 19), np.int64)
    coarse = Cityscapes(root=tree, split="val", annotation="coarse").official_counter()
    assert coarse.note == "iIoU is left out: it is defined for fine labels"
    next(tree.glob("gtFine/val/lindau/*instanceIds*")).unlink()
    counter = Cityscapes(root=tree, split="val").official_counter()
    assert counter.note == "iIoU is left out: 1 of 3 images have no instanceIds"
    counter.update(np.zeros(SIZE, np.uint8), "lindau_000002_000019")
    scores = counter.scores(matrix)
    assert scores.iiou_classes == scores.iiou_categories == {}
    assert len(scores.iou_categories) == 7


@pytest.mark.parametrize("number", [34001, 7001])
def test_instances_of_other_labels_are_refused(number):
    prediction, instances = np.full(SIZE, 7, np.uint8), np.full(SIZE, number, np.uint16)
    with pytest.raises(InputError, match=f"{number}: label id {number // 1000} has no instances"):
        OfficialScorer(LABELS).update_instances(prediction, instances)


# A folder of predictions


def with_nan(values):
    """Reads a mapping from JSON, where null is a class that is absent."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def write_predictions(tree, folder):
    rng = np.random.default_rng(1)
    images = []
    for path in sorted(tree.glob("gtFine/val/*/*_labelIds.png")):
        truth = np.array(Image.open(path))
        prediction = prediction_of(truth, rng)
        instances = np.array(Image.open(str(path).replace("labelIds", "instanceIds")))
        images.append((prediction, truth, instances))
        target = folder / path.parent.name / path.name.replace("_gtFine_labelIds", "_mine")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(prediction).save(target)
    return images


def test_a_folder_of_predictions_gets_the_official_scores(tree, tmp_path, capsys):
    images = write_predictions(tree, tmp_path / "mine")
    output = tmp_path / "scores.json"
    scoring.main([f"predictions={tmp_path / 'mine'}", f"root={tree}", f"output={output}"])
    written, printed = json.loads(output.read_text()), capsys.readouterr().out
    for kind, slow in zip(OfficialScores._fields, literal_scores(images, SIZES), strict=True):
        assert with_nan(written[kind]) == pytest.approx(slow, rel=1e-12, nan_ok=True)
        assert f"  {kind}={written['averages'][kind]}\n" in printed


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: p.unlink(), r"1 of 3 images of split 'val' have no file lindau_000002_000019\*"),
        (lambda p: shutil.copy(p, p.with_name(p.stem + "2.png")), "are both for lindau"),
        (lambda p: Image.new("L", (3, 5)).save(p), r"3 x 5, but .* is 40 x 24"),
        (lambda p: Image.new("RGB", (40, 24)).save(p), "must have one channel"),
        (lambda p: Image.new("L", (40, 24), 99).save(p), r"mine\.png: prediction: value 99 on 960"),
    ],
    ids=["missing", "two", "size", "colour", "value"],
)
def test_predictions_that_cannot_be_scored_are_reported_in_one_line(tree, tmp_path, harm, message):
    write_predictions(tree, tmp_path / "mine")
    harm(next((tmp_path / "mine").glob("lindau/*.png")))
    with pytest.raises(InputError, match=message) as error:
        scoring.main([f"predictions={tmp_path / 'mine'}", f"root={tree}"])
    assert "\n" not in str(error.value)


# The tools


@pytest.mark.slow
def test_a_network_is_trained_and_scored_as_the_benchmark_does(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = ["data=cityscapes", f"data.root={tree}", "data.crop=[32,32]", "data.num_workers=0"]
    settings += ["model/backbone=resnet18_narrow", "trainer.steps=2", "run.dir=run"]
    call("train", *settings, *(x for x in TINY if not re.match(r"data\.(size|lengths|cue)", x)))
    call("eval", "checkpoint=run/last.pt", "output=scores")
    assert "iIoU" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert metrics["official"]["averages"]["iou_classes"] == pytest.approx(metrics["miou"])
    assert set(metrics["official"]["iou_categories"]) == set(CATEGORIES)
    assert set(metrics["official"]["iiou_categories"]) == {"human", "vehicle"}
    # The same numbers from the files of a submission of the same split.
    call("eval", "checkpoint=run/last.pt", "submission=sent", "output=again")
    assert json.loads((tmp_path / "again/metrics.json").read_text()) == metrics
    scores, _ = scoring.score(tmp_path / "sent", tree, "val")
    for kind, values in scores._asdict().items():
        found = with_nan(metrics["official"][kind])
        assert found == pytest.approx(values, rel=1e-12, nan_ok=True)
    call("eval", "checkpoint=run/last.pt", "split=test", code=2)
    message = r"split=test: Cityscapes has no labels.*submission=<folder>"
    assert re.search(message, capsys.readouterr().err)
    # For a test server, one process and two send the same files.
    sent = ["checkpoint=run/last.pt", "split=test", "device=cpu"]
    call("eval", *sent, "submission=one")
    out = capsys.readouterr().out
    assert "2 predictions, checked and packed: one/cityscapes_test.zip" in out
    assert "miou" not in out
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = tool("eval", *sent, "submission=two", cwd=tmp_path, launcher=launcher)
    assert done.stdout.count("checked and packed") == 1
    one, two = ((tmp_path / way / "predictions").iterdir() for way in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one} == {p.name: p.read_bytes() for p in two}
