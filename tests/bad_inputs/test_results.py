"""No result is silently another's: each of these once was wrong without a word.

R11 stands in tests/test_global_batch.py, marked ``bad_input``.
"""

import json
import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, call, rewrite
from PIL import Image
from starts import plant

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.weights import initialise, read_state_dict, without_wrappers
from danet.errors import InputError
from danet.evaluation.inference import Sliding
from danet.filesystem import folder_of
from danet.visualization.overlay import Legend, SegmentedImage, resize

pytestmark = pytest.mark.slow


@pytest.fixture
def two(tmp_path):
    """Two folders x/images and y/images with another picture p.png, equal in name and time."""
    rng = np.random.default_rng(0)
    for name in "xy":
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)).save(folder / "p.png")
        os.utime(folder / "p.png", (1577836800, 1577836800))
    return tmp_path


@pytest.fixture
def say(network, capsys):
    """Runs a tool on the network and returns what is printed: errors where it fails."""

    def said(name, *settings, code=0):
        capsys.readouterr()
        call(name, f"checkpoint={network}", "device=cpu", *settings, code=code)
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return said


def scaled(network):
    """Returns the weights of the checkpoint, each 1.5 times as large."""
    weights = checkpoint_format.load(network)["model"]
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in weights.items()}


def folders(network, pattern):
    return sorted(path.name for path in network.parent.glob(pattern))


def assert_mask(network, folder, picture):
    found = np.array(Image.open(network.parent / folder / "index/p.png"))
    assert np.array_equal(found, danet.predict(danet.load_model(network), picture))


INDEX = "write=[index]"


def test_R01_two_folders_with_pictures_of_one_name_and_time(two, network, say):
    say("predict", f"images={two / 'x/images'}", INDEX)
    assert "1 images in" in say("predict", f"images={two / 'y/images'}", INDEX)
    for name, folder in (("x", "predict_images"), ("y", "predict_images-2")):
        assert_mask(network, folder, two / name / "images/p.png")
    # Again, and it is known which folder is whose.
    assert "1 were there already" in say("predict", f"images={two / 'y/images'}", INDEX)
    for name in "xy":
        say("predict", f"images={two / name / 'images' / '*.png'}", INDEX)
    assert len(folders(network, "predict_*")) == 4


@pytest.mark.parametrize("kind", ["folder", "list"])
def test_R01_one_output_for_two_folders_is_refused(two, network, say, kind, monkeypatch):
    Image.new("RGB", (9, 9)).save(two / "y/images/a.png")  # nothing is done of the others, either
    output = network.parent / "predict_list"
    for name, code in (("x", 0), ("y", 2)):
        images = two / name / "images"
        listed = [f"{path}\n" for path in sorted(images.iterdir())]
        monkeypatch.setattr("sys.stdin", listed)
        source = (f"images={images}", f"output={output}") if kind == "folder" else ("images=-",)
        reported = say("predict", *source, INDEX, code=code)
    assert f"results of {two / 'x/images/p.png'} are there under the name" in reported
    assert "name another folder" in reported
    assert_mask(network, "predict_list", two / "x/images/p.png")
    assert not (output / "index/a.png").exists()


@pytest.mark.parametrize("change", ["content", "replaced", "touched back"])
def test_R02_a_picture_that_changed_under_its_name(two, network, change, say):
    path = two / "x/images/p.png"
    stat = path.stat()
    say("predict", f"images={path.parent}", INDEX)
    other = np.zeros((48, 96, 3), np.uint8)
    other[:, 40:] = 255
    written = path.with_name("q.png") if change == "replaced" else path
    Image.fromarray(other).save(written)
    written.replace(path)
    if change == "touched back":  # a tool that keeps the time, as rsync and cp -p do
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert "1 images in" in say("predict", f"images={path.parent}", INDEX)
    assert_mask(network, "predict_images", path)


def test_R03_another_checkpoint_gets_a_folder_of_its_own(two, network, say):
    images, first = f"images={two / 'x/images'}", network.parent / "predict_images"
    say("predict", images, INDEX)
    rewrite(network, model=scaled(network))
    assert f"written to {first}-2" in say("predict", images, INDEX)
    assert "results of another checkpoint" in say("predict", images, f"output={first}", code=2)


def write_video(path, count, code="MJPG"):
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (96, 48))
    assert writer.isOpened()
    for _ in range(count):
        writer.write(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    writer.release()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_R04_a_video_that_was_cut_is_reported_and_what_was_read_is_kept(
    network, tmp_path, share, say
):
    path, results = tmp_path / "clip.avi", network.parent / "predict_clip"
    write_video(path, 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    for _ in range(2):  # the second start is no more content with it
        reported = say("predict", f"images={path}", code=2)
        masks = list((results / "index/clip").iterdir())
        assert 0 < len(masks) < 20
        assert (
            f"{path}: {len(masks)} of 20 frames could be read, which are done; the file is cut off "
            "or damaged" in reported
        )
    drawn = cv2.VideoCapture(str(results / "overlay/clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == len(masks)
    path.write_bytes(whole)
    assert "20 images in" in say("predict", f"images={path}")


@pytest.mark.parametrize(("suffix", "code"), [("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "MJPG")])
def test_R04_a_whole_video_is_whole(tmp_path, suffix, code, say):
    path = tmp_path / f"clip.{suffix}"
    write_video(path, 20, code)
    say("predict", f"images={path}", "write=[]")


def test_R05_scores_of_another_step_or_other_data_are_not_replaced(network, say):
    say("eval")
    before = (network.parent / "eval_val_whole/metrics.json").read_bytes()
    rewrite(network, step=9)
    say("eval")
    rewrite(network, model=scaled(network))  # of the same step, and still another network
    say("eval")
    assert (network.parent / "eval_val_whole/metrics.json").read_bytes() == before
    names = ["eval_val_whole", *(f"eval_val_whole-{n}" for n in (2, 3))]
    assert folders(network, "eval_*") == names
    say("eval")  # the same again goes to the same place
    assert folders(network, "eval_*") == names


def test_R05_a_folder_is_that_of_its_facts(tmp_path):
    facts, wanted = [{"a": 1, "b": (1, 2)}, {"a": 2, "b": (1, 2)}], tmp_path / "wanted"
    for reported, name in zip(facts, ("wanted", "wanted-2"), strict=True):
        folder = folder_of(wanted, "facts.json", reported)
        assert folder.name == name
        folder.mkdir()
        (folder / "facts.json").write_text(json.dumps(reported))
    assert folder_of(wanted, "facts.json", facts[0]) == wanted
    assert folder_of(wanted, "facts.json", facts[1]) == folder
    (wanted / "facts.json").write_text('{"a": ')
    assert folder_of(wanted, "facts.json", facts[1]) == wanted, "half a file is of nobody"
    (wanted / "facts.json").write_text("[]")
    assert folder_of(wanted, "facts.json", facts[1]) == folder


@pytest.mark.parametrize("data", ["reports", "scores"])
def test_R05_results_of_two_trees_lie_apart(data, tmp_path, monkeypatch):
    """Two trees with pictures of the same names: their results do not share a folder."""
    monkeypatch.chdir(tmp_path)
    roots = [f"data.root={plant(tmp_path / name, folder='labels')}" for name in "ab"]
    if data == "reports":
        for root in (roots[0], *roots):
            call("check_data", "data=camvid", root, "samples=2")
        for name, folder in (("a", "camvid"), ("b", "camvid-2")):
            found = json.loads((tmp_path / "runs/check" / folder / "report.json").read_text())
            assert found["root"] == str(tmp_path / name)
        assert len(list((tmp_path / "runs/check").iterdir())) == 2
    else:
        call("train", "data=camvid", roots[0], *SMALL, "debug=one_step", "run.dir=run")
        for root in roots:
            call("eval", "checkpoint=run/last.pt", root, "device=cpu")
        found = sorted(p.name for p in (tmp_path / "run").glob("eval_*"))
        assert found == ["eval_val_whole", "eval_val_whole-2"]


RUN = [*TINY, "data.num_workers=0", "trainer.eval_every=2"]
DRAWN = ("data.size", "data.lengths", "data.cue")
SMALL = [*(s for s in RUN if not s.startswith(DRAWN)), "data.crop=[32,32]"]
"""For pictures that are read from files."""


def test_R06_the_best_score_is_not_that_of_other_pictures_or_another_protocol(tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    call("train", *RUN, "trainer.steps=4", "trainer.stop_at=2", f"run.dir={run}")
    saved = checkpoint_format.load(run / "last.pt")
    assert saved["validation_set"] == "Scenes val, 5 samples"
    checkpoint_format.save(run / "last.pt", {**saved, "best_score": 0.99, "best": [[0.99, 2]]})
    shutil.copy(run / "last.pt", run / "best.pt")
    shutil.copytree(run, again)
    other = ("train", *RUN, "trainer.steps=4", "resume=auto")
    capsys.readouterr()
    call(*other, f"run.dir={run}", "data.val_split=test", code=2)
    assert "data.val_split: val in the checkpoint, test now" in capsys.readouterr().err
    call(*other, f"run.dir={run}", "data.val_split=test", "allow_changes=true")
    aside = run / "abandoned/best_before_step_000000002.pt"
    assert f"the best checkpoint so far is now {aside}" in capsys.readouterr().out
    assert checkpoint_format.load(aside)["best_score"] == 0.99, "nothing is lost"
    ended = checkpoint_format.load(run / "last.pt")
    assert ended["best_score"] == checkpoint_format.load(run / "best.pt")["best_score"] < 0.99
    assert ended["validation_set"] == "Scenes test, 5 samples"
    call(*other, f"run.dir={again}", "evaluation.flip=true", "allow_changes=true")
    assert "so the best score is reset" in capsys.readouterr().out
    assert (again / "abandoned/best_before_step_000000002.pt").exists()


def test_R06_another_root_is_said(pictures, capsys):
    command("train", pictures, code=0)
    again = ("train", f"resume={pictures.parent / 'r/last.pt'}", "trainer.stop_at=2")
    moved = shutil.copytree(pictures, pictures.parent / "moved")
    capsys.readouterr()
    call(*again, "trainer.device=cpu")
    assert "resume: data.root" not in capsys.readouterr().out
    call(*again, f"data.root={moved}", "trainer.device=cpu")
    assert f"resume: data.root={moved} instead of {pictures}" in capsys.readouterr().out


def test_R07_pictures_and_report_are_of_the_protocol_that_scores(network, tmp_path, say):
    place = "danet.evaluation.inference.Sliding"
    sliding = {"_target_": place, "crop": [32, 32], "stride": [16, 16], "flip": True}
    rewrite(network, config={**checkpoint_format.load(network)["config"], "evaluation": sliding})
    model = danet.load_model(network)
    image = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    expected = danet.predict(model, image, infer=Sliding(crop=[32, 32], stride=[16, 16], flip=True))
    assert (expected != danet.predict(model, image)).any(), "else this test could not fail"
    Image.fromarray(image).save(tmp_path / "p.png")
    say("visualize", f"images={tmp_path / 'p.png'}", "attention=false")
    drawn = np.array(Image.open(network.parent / "pictures_own/p.png"))
    double = resize(SegmentedImage("p", image, expected), 2)
    second = Legend((), model.palette).over(double.image, double.prediction)
    assert np.array_equal(drawn[18 : 18 + 96, 196 : 196 + 192], second)
    # Another file gets a folder of its own, so that no picture stands for another.
    Image.fromarray(image[::-1]).save(tmp_path / "sub.png")
    say("visualize", f"images={tmp_path / 'sub.png'}", "attention=false")
    assert (network.parent / "pictures_own-2/sub.png").exists()
    say("visualize", "report=true", "count=1", "attention=false")
    page = (network.parent / "pictures_val/report.html").read_text()
    values = "crop=[32, 32], stride=[16, 16], flip=true, precision=float32"
    assert f"Scored and drawn by sliding ({values})" in page


@pytest.fixture
def pictures(tmp_path):
    """A data set of the kind ``folder`` with six pairs and a list of all."""
    root = plant(tmp_path / "data", splits=((".", 6),))
    for name in ("all.txt", "copy.txt"):
        (root / name).write_text("0\n1\n2\n3\n4\n5\n")
    return root


def command(name, root, *settings, code):
    """Trains on the pictures for a step, or checks them."""
    data = ["data=folder", f"data.root={root}", "data.classes=[a,b]", "data.val_share=0.5"]
    how = [*SMALL, "debug=one_step", f"run.dir={root.parent / 'r'}"]
    if name == "check_data":
        how = ["data.num_workers=0", f"output={root.parent / 'checked'}"]
    call(name, *data, *settings, *how, code=code)


@pytest.mark.bad_input("F09")
@pytest.mark.parametrize("name", ["train", "check_data"])
@pytest.mark.parametrize(
    "settings",
    [
        ["data.lists={train: all.txt, val: all.txt}"],
        ["data.lists={train: all.txt, val: copy.txt}"],
        ["data.train_split=val"],
        ["data.val_split=train"],
        ["data.lists={train: train.txt, val: val.txt}"],
    ],
    ids=["one list", "two lists", "val", "train", "copies under other names"],
)
def test_R08_training_on_what_is_scored_is_refused_by_both(pictures, name, settings, capsys):
    (pictures / "train.txt").write_text("0\n1\n2\n")
    (pictures / "val.txt").write_text("3\n4\n")
    shutil.copy(pictures / "images/1.png", pictures / "images/4.png")
    command(name, pictures, *settings, code=2)
    reported = capsys.readouterr().err
    assert "data.allow_overlap=true" in reported
    assert "the same image in" in reported
    if "train.txt" in settings[0]:
        assert "images/1.png" in reported
        assert "images/4.png" in reported
    command(name, pictures, *settings, "data.allow_overlap=true", code=0)  # as it says


def test_R08_data_that_is_drawn_is_held_to_the_same(capsys):
    call("train", *RUN, "debug=one_step", "data.train_split=val", code=2)
    reported = capsys.readouterr().err
    assert "data.train_split=val and data.val_split=val are the same images" in reported


def test_R09_a_network_that_predicts_one_class_for_all_is_reported(network, two, tmp_path, capsys):
    call("eval", f"checkpoint={network}", "device=cpu")
    assert "every pixel" not in capsys.readouterr().err
    saved = checkpoint_format.load(network)
    for key, value in saved["model"].items():
        if key.startswith("head.classify") and key.endswith("bias"):
            value[3] += 1e6
    checkpoint_format.save(network, saved)
    name, typed = saved["classes"][3], f"checkpoint={network}"
    said = f"every pixel was predicted as class 3 ({name})"
    one_step = (*RUN, "debug=one_step", f"init_from={network}", "optimizer.lr=1e-12")
    some = (f"images={two / '[xy]/images/p.png'}", "write=[]")
    for start, warning in (
        (("eval", typed, "device=cpu"), f"warning: {said}"),
        (("visualize", typed, "report=true", "count=1"), f"warning: {said}"),
        (("train", *one_step, f"run.dir={tmp_path / 'r'}"), f"warning: step 1: {said}"),
        (("predict", typed, *some), f"of these 2 images was predicted as class {name}"),
    ):
        call(*start)
        assert warning in capsys.readouterr().err
    assert said in (network.parent / "pictures_val/report.html").read_text()


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in DDP": lambda name: f"module._orig_mod.{name}",
    "DDP in compiled": lambda name: f"_orig_mod.module.{name}",
    "DDP twice": lambda name: f"module.module.{name}",
    "compiled part": lambda name: name.replace("backbone.", "backbone._orig_mod."),
    "FSDP and recomputing": lambda name: name.replace(
        ".layer1.", "._fsdp_wrapped_module.layer1."
    ).replace(".layer2.", "._checkpoint_wrapped_module.layer2."),
    "a class around it": lambda name: f"model._orig_mod.{name}",
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_R10_names_of_wrappers_are_taken_off(network, tmp_path, kind, capsys):
    saved = checkpoint_format.load(network)
    wrapped = {WRAPPED[kind](name): value for name, value in saved["model"].items()}
    assert wrapped.keys() != saved["model"].keys()
    checkpoint_format.save(network, {**saved, "model": wrapped, "ema": wrapped})
    loaded = checkpoint_format.load(network)
    assert list(loaded["model"]) == list(saved["model"])
    assert list(loaded["ema"]) == [f"module.{name}" for name in saved["model"]]
    assert "was taken off" in capsys.readouterr().out
    torch.save({"state_dict": wrapped}, tmp_path / "plain.pt")
    assert "of the backbone all" in initialise(danet.load_model(network), tmp_path / "plain.pt")[-1]


def test_R10_only_names_of_wrappers_are_taken_off_and_none_twice(network, tmp_path):
    model = danet.load_model(network)
    average = torch.optim.swa_utils.AveragedModel(model).state_dict()
    assert "n_averaged" in average, "the counter of a moving average, which is left out"
    torch.save(average, tmp_path / "ema.pt")
    assert list(read_state_dict(tmp_path / "ema.pt")) == list(model.state_dict())
    own = {"backbone.a": torch.zeros(1), "module.b": torch.ones(1)}
    assert list(without_wrappers(own, "x")) == list(own), "not in front of every name"
    pair = {"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}
    with pytest.raises(InputError, match=r"a and _orig_mod\.a both stand for the tensor a"):
        without_wrappers(pair, "x")
