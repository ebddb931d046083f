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
from conftest import TINY, call, write_pair
from PIL import Image
from starts import plant

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.weights import initialise, read_state_dict, without_wrappers
from danet.errors import InputError
from danet.evaluation.inference import Sliding
from danet.filesystem import folder_of
from danet.prediction.predict import predict
from danet.visualization.attention import queries_and_keys
from danet.visualization.overlay import as_tensor
from danet.visualization.viewer import compute_view


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
def network(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint in a folder of its own."""
    (tmp_path / "run").mkdir()
    return shutil.copy(tiny_checkpoint, tmp_path / "run" / "best.pt")


def changed(network, **fields):
    """Changes fields of the checkpoint."""
    checkpoint_format.save(network, {**checkpoint_format.load(network), **fields})


def scaled(network):
    """Returns the weights of the checkpoint, each 1.5 times as large."""
    weights = checkpoint_format.load(network)["model"]
    return {k: v * 1.5 if v.is_floating_point() else v for k, v in weights.items()}


def mask_of(path):
    return np.array(Image.open(path))


def predicted(network, images, *settings):
    call("predict", f"checkpoint={network}", f"images={images}", "write=[index]", *settings)


def test_R01_two_folders_with_pictures_of_one_name_and_time(two, network, capsys):
    predicted(network, two / "x/images")
    predicted(network, two / "y/images")
    assert "1 images in" in capsys.readouterr().out.splitlines()[-1]
    model = danet.load_model(network)
    for name, folder in (("x", "predict_images"), ("y", "predict_images-2")):
        expected = predict(model, two / name / "images" / "p.png")
        assert np.array_equal(mask_of(network.parent / folder / "index/p.png"), expected)
    predicted(network, two / "y/images")  # again, and it is known which folder is whose
    assert "1 were there already" in capsys.readouterr().out
    assert len(list(network.parent.glob("predict_*"))) == 2


def test_R01_one_output_for_two_folders_is_refused(two, network, tmp_path, capsys):
    predicted(network, two / "x/images", f"output={tmp_path / 'o'}")
    before = (tmp_path / "o/index/p.png").read_bytes()
    capsys.readouterr()
    call(
        *("predict", f"checkpoint={network}", f"images={two / 'y/images'}"),
        f"output={tmp_path / 'o'}",
        code=2,
    )
    reported = capsys.readouterr().err
    assert f"results of {two / 'x/images/p.png'} are there under the name" in reported
    assert (tmp_path / "o/index/p.png").read_bytes() == before
    predicted(network, two / "y/images", f"output={tmp_path / 'another'}")  # as it says


def test_R01_lists_and_patterns_with_one_name(two, network, monkeypatch, capsys):
    for name in "xy":
        predicted(network, two / name / "images" / "*.png")
        capsys.readouterr()
    folders = sorted(p.name for p in network.parent.glob("predict_*"))
    assert len(folders) == 2
    for name in "xy":
        monkeypatch.setattr("sys.stdin", [f"{two / name / 'images/p.png'}\n"])
        code = 0 if name == "x" else 2
        call("predict", f"checkpoint={network}", "images=-", "write=[index]", code=code)
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["content", "replaced", "touched back"])
def test_R02_a_picture_that_changed_under_its_name(two, network, change, capsys):
    path = two / "x/images/p.png"
    stat = path.stat()
    predicted(network, path.parent)
    other = np.zeros((48, 96, 3), np.uint8)
    other[:, 40:] = 255
    if change == "replaced":
        Image.fromarray(other).save(path.with_name("q.png"))
        path.with_name("q.png").replace(path)
    else:
        Image.fromarray(other).save(path)
    if change == "touched back":  # a tool that keeps the time, as rsync and cp -p do
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    capsys.readouterr()
    predicted(network, path.parent)
    assert "1 images in" in capsys.readouterr().out
    expected = predict(danet.load_model(network), path)
    assert np.array_equal(mask_of(network.parent / "predict_images/index/p.png"), expected)


def test_R03_another_checkpoint_gets_a_folder_of_its_own(two, network, capsys):
    predicted(network, two / "x/images")
    changed(network, model=scaled(network))
    predicted(network, two / "x/images")
    assert "written to " + str(network.parent / "predict_images-2") in capsys.readouterr().out
    call(
        *("predict", f"checkpoint={network}", f"images={two / 'x/images'}"),
        f"output={network.parent / 'predict_images'}",
        code=2,
    )
    assert "results of another checkpoint" in capsys.readouterr().err


def write_video(path, count, code="MJPG"):
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (96, 48))
    assert writer.isOpened()
    for _ in range(count):
        writer.write(rng.integers(0, 256, (48, 96, 3), dtype=np.uint8))
    writer.release()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_R04_a_video_that_was_cut_is_reported_and_what_was_read_is_kept(
    network, tmp_path, share, capsys
):
    path = tmp_path / "clip.avi"
    write_video(path, 20)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    arguments = [f"checkpoint={network}", f"images={path}"]
    for _ in range(2):  # the second start is no more content with it
        call("predict", *arguments, code=2)
        reported = capsys.readouterr().err
        assert f"{path}: " in reported
        assert (
            "of 20 frames could be read, which are done; the file is cut off or damaged" in reported
        )
    masks = list((network.parent / "predict_clip/index/clip").iterdir())
    assert 0 < len(masks) < 20
    assert f"{path}: {len(masks)} of 20" in reported
    drawn = cv2.VideoCapture(str(network.parent / "predict_clip/overlay/clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == len(masks)
    path.write_bytes(whole)
    call("predict", *arguments)
    assert "20 images in" in capsys.readouterr().out


@pytest.mark.parametrize(("suffix", "code"), [("avi", "MJPG"), ("mp4", "mp4v"), ("mkv", "MJPG")])
def test_R04_a_whole_video_is_whole(network, tmp_path, suffix, code):
    path = tmp_path / f"clip.{suffix}"
    write_video(path, 20, code)
    call("predict", f"checkpoint={network}", f"images={path}", "write=[]")


def test_R05_scores_of_another_step_or_other_data_are_not_replaced(network, capsys):
    settings = [f"checkpoint={network}", "device=cpu"]
    call("eval", *settings)
    first = network.parent / "eval_val_whole"
    before = (first / "metrics.json").read_bytes()
    changed(network, step=9)
    call("eval", *settings)
    changed(network, model=scaled(network))  # of the same step, and still another network
    call("eval", *settings)
    assert (first / "metrics.json").read_bytes() == before
    folders = sorted(p.name for p in network.parent.glob("eval_*"))
    assert folders == ["eval_val_whole", *(f"eval_val_whole-{n}" for n in (2, 3))]
    call("eval", *settings)  # the same again goes to the same place
    assert sorted(p.name for p in network.parent.glob("eval_*")) == folders


def test_R05_a_folder_is_that_of_its_facts(tmp_path):
    facts = [{"a": 1, "b": (1, 2)}, {"a": 2, "b": (1, 2)}, {"a": 1, "b": None}]
    wanted = tmp_path / "wanted"
    folders = []
    for reported in facts:
        folders.append(folder_of(wanted, "facts.json", reported))
        folders[-1].mkdir()
        (folders[-1] / "facts.json").write_text(json.dumps(reported))
    assert [folder.name for folder in folders] == ["wanted", "wanted-2", "wanted-3"]
    assert [folder_of(wanted, "facts.json", reported) for reported in facts] == folders
    (wanted / "facts.json").write_text('{"a": ')
    assert folder_of(wanted, "facts.json", facts[1]) == wanted, "half a file is of nobody"
    (wanted / "facts.json").write_text("[]")
    assert folder_of(wanted, "facts.json", facts[1]) == folders[1]


def test_R05_an_export_keeps_no_program_of_another_step(network, capsys):
    pytest.importorskip("safetensors")
    output = network.parent / "exported"
    call("export", f"checkpoint={network}", "formats=[]")
    (output / "model.pt2").write_bytes(b"a program of this step")
    changed(network, step=9)
    capsys.readouterr()
    call("export", f"checkpoint={network}", "formats=[]", f"output={output}", code=2)
    assert "model.pt2 of another step is there and would stay" in capsys.readouterr().err
    call("export", f"checkpoint={network}", "formats=[]")
    assert json.loads((network.parent / "exported-2/config.json").read_text())["step"] == 9
    assert json.loads((output / "config.json").read_text())["step"] == 6


RUN = [*TINY, "data.num_workers=0", "trainer.eval_every=2"]


def test_R06_the_best_score_is_not_that_of_other_pictures(tmp_path, capsys):
    run = tmp_path / "run"
    call("train", *RUN, "trainer.steps=4", "trainer.stop_at=2", f"run.dir={run}")
    saved = checkpoint_format.load(run / "last.pt")
    assert saved["validation_set"] == "Scenes val, 5 samples"
    checkpoint_format.save(run / "last.pt", {**saved, "best_miou": 0.99, "best": [[0.99, 2]]})
    shutil.copy(run / "last.pt", run / "best.pt")
    again = [*RUN, "trainer.steps=4", f"run.dir={run}", "resume=auto", "data.val_split=test"]
    capsys.readouterr()
    call("train", *again, code=2)
    assert "data.val_split: val in the checkpoint, test now" in capsys.readouterr().err
    call("train", *again, "allow_changes=true")
    reported = capsys.readouterr().out
    aside = run / "abandoned/best_before_step_000000002.pt"
    assert f"the best checkpoint so far is now {aside}" in reported
    assert checkpoint_format.load(aside)["best_miou"] == 0.99, "nothing is lost"
    ended = checkpoint_format.load(run / "last.pt")
    assert ended["best_miou"] == checkpoint_format.load(run / "best.pt")["best_miou"] < 0.99
    assert ended["validation_set"] == "Scenes test, 5 samples"


def test_R06_another_protocol_begins_the_best_score_anew(tmp_path, capsys):
    run = tmp_path / "run"
    call("train", *RUN, "trainer.steps=4", "trainer.stop_at=2", f"run.dir={run}")
    again = [*RUN, "trainer.steps=4", f"run.dir={run}", "resume=auto", "evaluation.flip=true"]
    call("train", *again, "allow_changes=true")
    assert "so the best score begins anew" in capsys.readouterr().out
    assert (run / "abandoned/best_before_step_000000002.pt").exists()


def test_R06_another_root_is_said(pictures, capsys):
    command("train", pictures, code=0)
    run = pictures.parent / "r"
    capsys.readouterr()
    moved = shutil.copytree(pictures, pictures.parent / "moved")
    again = ["trainer.stop_at=2", "trainer.device=cpu"]
    call("train", f"resume={run / 'last.pt'}", *again)
    assert "resume: data.root" not in capsys.readouterr().out
    call("train", f"resume={run / 'last.pt'}", f"data.root={moved}", *again)
    reported = capsys.readouterr().out
    assert f"resume: data.root={moved} instead of {pictures}" in reported


SLIDING = {
    "_target_": "danet.evaluation.inference.Sliding",
    "crop": [32, 32],
    "stride": [16, 16],
    "flip": True,
}


def test_R07_pictures_and_viewer_are_of_the_protocol_that_scores(network, tmp_path):
    config = checkpoint_format.load(network)["config"]
    changed(network, config={**config, "evaluation": SLIDING})
    model = danet.load_model(network)
    infer = Sliding(crop=[32, 32], stride=[16, 16], flip=True)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (48, 96, 3), dtype=np.uint8)
    expected, whole = predict(model, image, infer=infer), predict(model, image)
    assert (expected != whole).any(), "else this test could not fail"
    seen = compute_view(model, "x", image, infer)
    assert np.array_equal(seen.picture.prediction, expected)
    keys = queries_and_keys(model, as_tensor(image, model))[1]
    assert np.allclose(seen.keys, keys, atol=1e-5 * float(keys.abs().max())), "of the whole picture"
    Image.fromarray(image).save(tmp_path / "p.png")
    call("visualize", f"checkpoint={network}", f"images={tmp_path / 'p.png'}", "attention=false")
    drawn = mask_of(network.parent / "pictures_own/p.png")[18 : 18 + 48, 100 : 100 + 96]
    from danet.visualization.overlay import overlay

    assert np.array_equal(drawn, overlay(image, expected, model.palette))
    # Another file gets a folder of its own, so that no picture stands for another.
    Image.fromarray(image[::-1]).save(tmp_path / "sub.png")
    call("visualize", f"checkpoint={network}", f"images={tmp_path / 'sub.png'}", "attention=false")
    assert (network.parent / "pictures_own-2/sub.png").exists()


@pytest.mark.slow
def test_R07_the_report_says_by_which_protocol_it_was_made(network, capsys):
    config = checkpoint_format.load(network)["config"]
    changed(network, config={**config, "evaluation": SLIDING})
    call("visualize", f"checkpoint={network}", "report=true", "count=1", "device=cpu")
    page = (network.parent / "pictures_val/report.html").read_text()
    values = "crop=[32, 32], stride=[16, 16], flip=true, precision=float32"
    assert f"Scored and drawn by sliding ({values})" in page


@pytest.fixture
def pictures(tmp_path):
    """A data set of the kind ``folder`` with six pairs and a list of all."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for i in range(6):
        image = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        write_pair(
            root, ".", f"p{i}", image, rng.integers(0, 2, (40, 48), dtype=np.uint8), labels="masks"
        )
    (root / "all.txt").write_text("".join(f"p{i}\n" for i in range(6)))
    shutil.copy(root / "all.txt", root / "copy.txt")
    return root


def command(name, root, *settings, code):
    small = [s for s in RUN if not s.startswith(("data.size", "data.lengths", "data.cue"))]
    arguments = [
        "data=folder",
        f"data.root={root}",
        "data.classes=[a,b]",
        "data.val_share=0.5",
        *settings,
    ]
    if name == "train":
        arguments += [*small, "data.crop=[32,32]", "debug=one_step", f"run.dir={root.parent / 'r'}"]
    else:
        arguments += ["data.num_workers=0", f"output={root.parent / 'checked'}"]
    call(name, *arguments, code=code)


@pytest.mark.parametrize("name", ["train", "check_data"])
@pytest.mark.parametrize(
    "settings",
    [
        ["data.lists={train: all.txt, val: all.txt}"],
        ["data.lists={train: all.txt, val: copy.txt}"],
        ["data.train_split=val"],
        ["data.val_split=train"],
    ],
    ids=["one list", "two lists", "val", "train"],
)
def test_R08_training_on_what_is_scored_is_refused_by_both(pictures, name, settings, capsys):
    command(name, pictures, *settings, code=2)
    reported = capsys.readouterr().err
    assert "data.allow_overlap=true" in reported
    command(name, pictures, *settings, "data.allow_overlap=true", code=0)  # as it says


@pytest.mark.parametrize("name", ["train", "check_data"])
def test_R08_copies_under_other_names_are_refused_by_both(pictures, name, capsys):
    (pictures / "train.txt").write_text("p0\np1\np2\n")
    (pictures / "val.txt").write_text("p3\np4\n")
    shutil.copy(pictures / "images/p1.png", pictures / "images/p4.png")
    lists = "data.lists={train: train.txt, val: val.txt}"
    command(name, pictures, lists, code=2)
    reported = capsys.readouterr().err
    assert "p1.png" in reported
    assert "p4.png" in reported
    command(name, pictures, lists, "data.allow_overlap=true", code=0)


def test_R08_data_that_is_drawn_is_held_to_the_same(capsys):
    call("train", *RUN, "debug=one_step", "data.train_split=val", code=2)
    reported = capsys.readouterr().err
    assert "data.train_split=val and data.val_split=val are the same images" in reported


def test_R09_a_network_that_predicts_one_class_for_all_is_reported(network, two, tmp_path, capsys):
    saved = checkpoint_format.load(network)
    for name, value in saved["model"].items():
        if name.startswith("head.classify") and name.endswith("bias"):
            value[3] += 1e6
    checkpoint_format.save(network, saved)
    said = f"every pixel was predicted as class 3 ({saved['classes'][3]})"
    call("eval", f"checkpoint={network}", "device=cpu")
    assert f"warning: {said}" in capsys.readouterr().err
    call("visualize", f"checkpoint={network}", "report=true", "count=1", "attention=false")
    assert f"warning: {said}" in capsys.readouterr().err
    assert said in (network.parent / "pictures_val/report.html").read_text()
    call(
        *("train", *RUN, "debug=one_step", f"init_from={network}", "optimizer.lr=1e-12"),
        f"run.dir={tmp_path / 'r'}",
    )
    assert f"warning: step 1: {said}" in capsys.readouterr().err
    call("predict", f"checkpoint={network}", f"images={two / '[xy]/images/p.png'}", "write=[]")
    assert (
        f"of these 2 images was predicted as class {saved['classes'][3]}" in capsys.readouterr().err
    )


def test_R09_a_network_that_separates_classes_is_not(network, capsys):
    call("eval", f"checkpoint={network}", "device=cpu")
    assert "every pixel" not in capsys.readouterr().err


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
    danet.load_model(network)
    torch.save({"state_dict": wrapped}, tmp_path / "plain.pt")
    assert "of the backbone all" in initialise(danet.load_model(network), tmp_path / "plain.pt")[-1]


def test_R10_the_counter_of_a_moving_average_is_left_out(network, tmp_path):
    model = danet.load_model(network)
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.save(average.state_dict(), tmp_path / "ema.pt")
    assert list(read_state_dict(tmp_path / "ema.pt")) == list(model.state_dict())


def test_R10_two_names_of_one_tensor_are_refused():
    pair = {"_orig_mod.a": torch.zeros(1), "a": torch.ones(1)}
    with pytest.raises(InputError, match=r"a and _orig_mod\.a both stand for the tensor a"):
        without_wrappers(pair, "x")
    own = {"backbone.a": torch.zeros(1), "module.b": torch.ones(1)}
    assert list(without_wrappers(own, "x")) == list(own), "not in front of every name"


def test_R05_reports_of_two_trees_lie_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        plant(tmp_path / name, "camvid")
    for name in "aab":
        call("check_data", "data=camvid", f"data.root={tmp_path / name}", "samples=2")
    for name, folder in (("a", "camvid"), ("b", "camvid-2")):
        found = json.loads((tmp_path / "runs/check" / folder / "report.json").read_text())
        assert found["root"] == str(tmp_path / name)
    assert len(list((tmp_path / "runs/check").iterdir())) == 2


def test_R05_scores_stay_beside_their_data(tmp_path):
    """Two trees with pictures of the same names: their scores do not share a folder."""
    for name in "ab":
        plant(tmp_path / name, "camvid")
    small = [s for s in RUN if not s.startswith(("data.size", "data.lengths", "data.cue"))]
    run = tmp_path / "run"
    call(
        *("train", "data=camvid", f"data.root={tmp_path / 'a'}", *small, "data.crop=[32,32]"),
        *("debug=one_step", f"run.dir={run}"),
    )
    for name in "ab":
        call("eval", f"checkpoint={run / 'last.pt'}", f"data.root={tmp_path / name}", "device=cpu")
    assert sorted(p.name for p in run.glob("eval_*")) == ["eval_val_whole", "eval_val_whole-2"]
