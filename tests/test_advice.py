"""Advice works when it is followed: what a message says to type is taken from it, and done."""

import errno
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import sys
import types
from datetime import timedelta
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
import torchvision
import yaml
from conftest import ROOT, TINY, call, make_trainer, plant, rewrite, save_picture, tiny
from PIL import Image, ImageFilter
from torch.distributed import run as torchrun

from danet import extras
from danet.checkpoint import format as checkpoint_format
from danet.config.build import make_dataset
from danet.config.validate import check
from danet.data import workers
from danet.datasets import cache
from danet.datasets.base import Reading
from danet.datasets.folder import Folder
from danet.distributed import launcher, rendezvous
from danet.distributed.rendezvous import choose_device
from danet.engine.optimizer import SGD
from danet.engine.trainer import Trainer
from danet.errors import DivergedError, InputError, ProcessError
from danet.models.resnet import ResNet
from danet.models.timm_backbone import TimmBackbone
from danet.preflight import advice

pytestmark = [pytest.mark.slow, pytest.mark.bad_input("R30")]


class Door:
    """Starts tools in this process."""

    def __init__(self, capsys, folder):
        self.capsys = capsys
        self.folder = folder
        self._runs = 0

    def call(self, name, *settings, code=0, trains=False):
        """Starts a tool and returns what it printed; a training may end before its first step."""
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            if not trains:
                patch.setattr(Trainer, "fit", lambda *_: None)
                patch.setattr(launcher, "start", lambda *_: None)
            found = call(name, *settings, code=None)
        seen = "".join(self.capsys.readouterr())
        if code not in (None, found):
            shown = f"exit {found}, expected {code}: {name} {' '.join(map(str, settings))}"
            pytest.fail(f"{shown}\n{seen}")
        return seen

    def refused(self, name, *settings, code=2):
        """Returns the message with which a tool refuses; "" if it need not, with the code None."""
        found = self.call(name, *self.defaults(name, settings), code=code)
        return found.partition("error: ")[2].strip()

    def follow(self, name, *settings, trains=False):
        """Starts a tool as a message advises; a training ends before its first step."""
        return self.call(name, *self.defaults(name, settings), trains=trains)

    def defaults(self, name, settings):
        """Returns settings with those before them that make a run short and keep it in place."""
        settings = list(map(str, settings))
        keys = {setting.lstrip("+~").partition("=")[0] for setting in settings}
        self._runs += 1
        if name == "check_data":
            own = [f"output={self.folder / f'check{self._runs}'}", "data.num_workers=0"]
            return [*(s for s in own if s.partition("=")[0] not in keys), *settings]
        if name != "train":
            return settings
        own = [*TINY, "data.num_workers=0", "debug=one_step", "run.log_to=[]"]
        own.append(f"run.dir={self.folder / f'run{self._runs}'}")
        if keys & {"data", "experiment"}:
            own = [s for s in own if not s.startswith(("data.size", "data.lengths", "data.cue"))]
            own.append("data.crop=[32,32]")
        for group in {"model/head", "model/backbone"} & keys:
            own = [s for s in own if not s.startswith(group.replace("/", "."))]
        return [*(s for s in own if s.partition("=")[0] not in keys), *settings]


@pytest.fixture
def door(capsys, tmp_path):
    return Door(capsys, tmp_path)


ENDS = (
    (r"\[(?:height, ?width|long, short)\] of at least (\d+)(?!.*pairs)", "[{0},{0}]"),
    (r"two (?:whole )?numbers of at least (\d+)", "[{0},{0}]"),
    (r"numbers of stages, (\d) to (\d)", "[{0}] [{1}]"),
    (r"must hold [a-z ]+ of at least (\d+)", "[{0}]"),
    (r"list of positive numbers up to ([\d.]+)", "[{0}]"),
    (r"with 0 < low <= high", "[0.5,0.5]"),
    (r"within \[([-\d.]+), ([\d.]+)\]", "[{0},{1}]"),
    (r"three numbers each", "[1,1,1]"),
    (r"two numbers in \[(\d), 1\)", "[{0},0.99]"),
    (r"in \[(\d), 1\)", "{0} 0.99"),
    (r"\(0, (1)\]", "{0}"),
    (r"0 < decay < 1|between 0 and 1", "0.5"),
    (r"as in (0\.\d+)", "{0}"),
    (r"\bin (\d+)\.\.([\d.]+)", "{0} {1}"),
    (r"expected (?:a rate of )?([\d.]+) to ([\d.]+)\b", "{0} {1}"),
    (r"at least (\d+)", "{0}"),
    (r"(\d+) or more\b", "{0}"),
    (r">= (\d+)", "{0}"),
    (r"(?:expected [a-zA-Z ]*|number )above 0", "0.5"),
    (r"is (negative)|a (finite number)|seconds, or (0)|(number of minutes)", "0"),
    (r"expected (?:one of |some of )?((?:[\w:-]+, )*[\w:-]+ or [\w:-]+)(?:$|; CUDA_)", "words"),
    (r"(?:expected |one of |some of |choices: )((?:[\w:-]+, )*[\w:-]+)$", "words"),
    (r"is not (8, 16 or 32)", "words"),
)
"""How a message states a range -> values in it, mostly its ends; the first that fits counts."""
NEEDS_CUDA = ("float16", "cuda")


def ends_of(message):
    """Returns the values that the first line of a message allows, as settings are typed."""
    line = message.splitlines()[0]
    found = ["null"] * bool(re.search(r"[;,] or null\b", line))
    line = re.sub(r"[;,] or null\b.*", "", line)
    for pattern, form in ENDS:
        match = re.search(pattern, line)
        if match and form == "words":
            words = [word.strip("'") for word in re.split(r", | or | nor ", match[1])]
            return found + [word for word in words if word not in NEEDS_CUDA]
        if match:
            return found + form.format(*match.groups()).split()
    return found


TYPED = yaml.safe_load((ROOT / "tests/advice.yaml").read_text())


def settings_of(text, root):
    """Returns the settings of a text of advice.yaml."""
    text = text.replace("ONES", f"[{','.join(['1'] * 16)}]")
    return text.replace("OWN", " ".join(own(root))).split()


@pytest.fixture
def root(tmp_path):
    """The folder of a data set of the kind ``folder`` with two classes, 4 and 2 pairs."""
    return plant(tmp_path / "data")


@pytest.mark.parametrize("name", TYPED["chains"])
def test_stated_ranges_hold_at_their_ends(name, door, root, tmp_path, monkeypatch):
    """Mends one fault after the other by what is said of it, first with one end of its range."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choices = settings_of(TYPED["chains"][name]["choices"], root)
    typed = dict(setting.split("=", 1) for setting in TYPED["chains"][name]["wrong"])
    ends = {}
    while message := door.refused("train", *choices, *map("=".join, typed.items()), code=None):
        mended = len(ends)
        for line in message.splitlines():
            for key in [key for key in typed if key not in ends]:
                if f"{key.lstrip('+').rpartition('.')[2]}=" in line and ends_of(line):
                    ends[key] = ends_of(line)
                    typed[key] = ends[key][0]
                    break
        assert len(ends) > mended, f"nothing to follow in {message}"
    assert set(ends) == set(typed), "each is reported"
    door.follow("train", *choices, *(f"{key}={values[-1]}" for key, values in ends.items()))


# --- Settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPED["answers"])
def test_what_is_said_instead_is_taken(name, door, root, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed, pattern, *forms = TYPED["answers"][name]
    if name == "ignore_index":
        plant(root, values=(0, 1, 2))
    with monkeypatch.context() as patch:
        if name == "sweep":
            world = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
            for variable, value in world.items():
                patch.setenv(variable, value)
        message = door.refused("train", *settings_of(typed, root))
    found = re.search(pattern, message, re.MULTILINE)
    assert found, message
    for form in forms:
        form = form.replace("TYPED", typed)
        parts = (part.format(*found.groups()) for part in settings_of(form, root))
        door.follow("train", *(part.replace(", ", ",") for part in parts))


def test_several_values_are_several_runs(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = door.refused("train", "seed=1,2")
    flag = re.search(r"with (-m) each value is a run", message)[1]
    settings = [s for s in door.defaults("train", ["seed=1,2"]) if not s.startswith("run.dir")]
    monkeypatch.setattr(Trainer, "fit", lambda *_: None)
    call("train", *settings, flag)
    assert len(list(tmp_path.glob("runs/scenes/*/config.yaml"))) == 2


def test_names_of_any_kind_are_taken(door, root):
    for names in ("[背景,物体]", "[it's,b]", "[c(1),b]", "[a&b,c]"):
        door.follow("train", "data=folder", f"data.root={root}", f"data.classes={names}")


def test_a_backslash_belongs_to_the_name(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = r"data.root=x\y"
    message = door.refused("check_data", "data=camvid", wrong)
    assert message == f"data.root={tmp_path}/x\\y: there is no such folder; set data.root=<folder>"
    plant(tmp_path / r"x\y", folder="labels")
    door.follow("check_data", "data=camvid", wrong)


# --- Own pictures -------------------------------------------------------------------------------


def change(folder, turn):
    """Writes all masks below a folder anew."""
    for path in sorted(folder.rglob("*.png")):
        Image.fromarray(turn(np.array(Image.open(path)))).save(path)


def translucent(root):
    """Gives all masks an alpha channel."""
    change(root / "masks", lambda mask: np.stack((mask, np.full_like(mask, 200)), axis=2))


def own(root, classes="[a,b]"):
    return ("data=folder", f"data.root={root}", f"data.classes={classes}")


COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)
TWO_COLORS = "data.colors=[[0,0,0],[128,0,0]]"
ONE = "train/train_0\ntrain/train_1\n"


def colored(root):
    change(root / "masks", lambda mask: COLORS[mask])


def renamed(root):
    (root / "images").rename(root / "Images")
    (root / "masks").rename(root / "labels of it")


def beside_one_another(root):
    """Puts each mask beside its image, below a folder of the split."""
    for split in ("train", "val"):
        (root / split).mkdir()
        for path in sorted((root / "images" / split).iterdir()):
            Image.open(path).save(root / split / f"{path.stem}.jpg")
            (root / "masks" / split / path.name).rename(root / split / f"{path.stem}_mask.png")
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "masks")


def other_files(root):
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(path.with_name(f"gt {path.stem} v2.png"))


def smoothed(root, end=".png"):
    for path in sorted((root / "masks").rglob("*.png")):
        with Image.open(path) as picture:
            shape = np.zeros((picture.height, picture.width, *np.shape(picture)[2:]), np.uint8)
            shape[5:35, 5:50] = np.max(np.asarray(picture), axis=(0, 1))
            soft = Image.fromarray(shape).filter(ImageFilter.GaussianBlur(1))
        path.unlink()
        soft.save(path.with_suffix(end))


def smoothed_colors(root):
    change(root / "masks", lambda mask: mask[..., None] * np.array([240, 0, 0], np.uint8))
    smoothed(root)


def lossy(root):
    smoothed(root, ".jpg")


def sixteen_bits(root):
    change(root / "masks", lambda mask: np.where(mask == 255, 65535, mask.astype(np.uint16)))


def second_suffix(root):
    shutil.copy(root / "images/train/train_0.png", root / "images/train/train_0.jpg")


def two_folders(root):
    for folder in ("images", "masks"):
        shutil.copytree(root / folder / "val", root / folder / "valid")


def with_lists(root, train=ONE, val="val/val_0\n"):
    (root / "train.txt").write_text(train)
    (root / "val.txt").write_text(val)


RED = "data.colors=[[0,0,0],[240,0,0]]"


def nothing(_):
    """Changes nothing."""


MENDED = {
    "one too many": ((0, 1, 2), nothing, (), r"set (data\.labels_start_at=1) if 0 means no"),
    "beside": (
        *((0, 1), beside_one_another, ()),
        r"are found by (data\.images_dir=\.) (data\.masks_dir=\.) (data\.mask_suffix=_mask\.png)",
    ),
    "other names": (
        *((0, 1), renamed, ()),
        r"6 pairs, .*, are found by (data\.images_dir=Images) '(data\.masks_dir=labels of it)'",
    ),
    "other names of files": (*((0, 1), other_files, (), r"are found by '(data\.pairs=[^']*)'"),),
    "soft edges": (
        *(
            (0, 255),
            smoothed,
            (),
            r"edges were smoothed,.* '(data\.values=\S+)' (data\.nearest=true)",
        ),
    ),
    "soft edges of colours": (
        *((0, 1), smoothed_colors, (RED,)),
        *(r"smoothed or the file was a JPEG, set (data\.nearest=true), which", RED, "{0}"),
    ),
    "JPEG": (
        *((0, 255), lossy, ("data.mask_suffix=.jpg",)),
        r"(data\.nearest=true) with '(data\.values=\S+)', value -> class",
        *("data.mask_suffix=.jpg", "{0}", "{1}"),
    ),
    "one split": (
        *((0, 1), lambda root: shutil.rmtree(root / "images/val"), ()),
        r"; (data\.val_split=null) trains without a validation set",
    ),
    "no val": (
        *((0, 1), lambda root: shutil.rmtree(root / "images/val"), ()),
        r"(images)/(train) has 4; .*; a training divides a folder that data.images_dir and data",
        *("data.images_dir={0}/{1}", "data.masks_dir=masks/{1}"),
    ),
    "colours": (
        *((0, 1), colored, (), r"with 2 colours: (\S+), (\S+); data=folder reads colours with"),
        "data.colors=[{0},{1}]",
    ),
    "another colour": (
        *((0, 1, 2), colored, (TWO_COLORS,)),
        r"the colour \[(\d+), (\d+), (\d+)\] .*; add it there or to (data\.ignore_colors)",
        *(TWO_COLORS, "{3}=[[{0},{1},{2}]]"),
    ),
    "a value without class": (
        *((0, 128, 255), nothing, ("data.values={0:0,255:1}",)),
        r"label value (128) .* add it there, with a class or (255) to ignore it",
        "data.values={{0:0,255:1,{0}:{1}}}",
    ),
    "the ignored value of many classes": (
        *((0, 1, 255), sixteen_bits, (), r"65535 is ignored only .*: set '(data\.values=\S+)'"),
    ),
    "not all listed": (
        *((0, 1), with_lists, ("data.lists={train: train.txt, vall: val.txt}",)),
        r"expected some of train, (val), test, and 'val' is needed now",
        "data.lists={{train: train.txt, {0}: val.txt}}",
    ),
    "two folders of one split": (
        *((0, 1), two_folders, (), "rename or move one, or give (data.lists)", with_lists),
        "{0}={{train: train.txt, val: val.txt}}",
    ),
    "two images of one mask": (
        *((0, 1), second_suffix, (), "(names) must differ in more than their suffix"),
        lambda root: (root / "images/train/train_0.jpg").unlink(),
    ),
    "colours with alpha": (
        *((0, 1), translucent, (TWO_COLORS,)),
        "must be (opaque).* save it without alpha",
        lambda root: change(root / "masks", lambda mask: COLORS[mask[..., 0]]),
        TWO_COLORS,
    ),
}
"""Values in the masks, what is done to the tree, settings; the advice; what is done and set then.

Settings are formats for the groups of the advice; without any, the groups are settings."""


@pytest.mark.parametrize("name", MENDED)
def test_own_pictures_are_taken_once_the_advice_is_followed(name, door, tmp_path):
    values, spoil, settings, advice, *mend = MENDED[name]
    root = plant(tmp_path / "data", values=values)
    spoil(root)
    found = re.search(advice, door.refused("check_data", *own(root), *settings))
    assert found, "the advice is not there"
    for step in (step for step in mend if callable(step)):
        step(root)
    typed = [step.format(*found.groups()) for step in mend if isinstance(step, str)]
    typed += [group for group in found.groups() if "=" in group and not mend]
    door.follow("check_data", *own(root), *typed)
    door.follow("train", *own(root), *(s for s in typed if not s.startswith("splits")))


def test_the_check_looks_at_all_pairs(door, tmp_path):
    root = plant(
        tmp_path / "data", values=(0, 1, 7), splits=(("train", 60), ("val", 2)), size=(8, 8)
    )
    message = door.refused("train", *own(root))
    reported = int(re.search(r"(\d+) of \d+ pairs that were looked at have a problem", message)[1])
    name = re.search(r"tools/(\w+)\.py looks at all pairs", message)[1]
    message = door.refused(name, *own(root), f"output={tmp_path / 'o'}")
    count, path = re.search(r"(\d+) problems in all; see (\S+)$", message).groups()
    assert int(count) == 62 > reported
    assert sum(s["num_problems"] for s in json.loads(Path(path).read_text())["splits"].values())


def test_what_the_check_suggests_is_taken(door, root, tmp_path):
    reported = door.follow("check_data", *own(root), "samples=1", f"output={tmp_path / 'o'}")
    assert (tmp_path / "o/train.png").exists()
    setting = re.search(r"balanced by median frequency: '(\S+)'$", reported, re.MULTILINE)[1]
    door.follow("train", *own(root), setting)
    setting = re.search(r"checksums \((\S+) decodes them\)", reported)[1]
    assert "images: decoded" in door.follow("check_data", *own(root), setting)


def test_a_data_set_with_files_is_named(door, root):
    message = door.refused("check_data", "data=scenes")
    key = re.search(r"set (data)=NAME", message)[1]
    door.follow("check_data", f"{key}=folder", *own(root)[1:])


def test_the_root_that_is_meant_is_named(door, tmp_path):
    names = ("one", "two")
    for name in names:
        plant(tmp_path / "up" / name)
    message = door.refused("check_data", *own(tmp_path / "up"))
    settings = shlex.split(re.search(r"is elsewhere: set (.*)", message)[1])
    assert settings[::2] == [f"data.root={tmp_path / 'up' / name}" for name in names]
    for setting in settings[::2]:
        door.follow("check_data", *own(tmp_path / "up"), setting)


def test_masks_get_the_names_of_their_images_or_stand_in_lists(door, root):
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(path.with_name(f"gt_{path.name.rpartition('_')[2]}"))
    message = door.refused("check_data", *own(root))
    assert "give them the names of their images, or name pairs in data.lists" in message
    line = re.search(r"a line each: (\S+/<name> \S+/<name>)$", message, re.MULTILINE)[1]
    for split, count in (("train", 4), ("val", 2)):
        pairs = [(f"{split}_{i}.png", f"gt_{i}.png") for i in range(count)]
        lines = [line.replace("<name>", "{}").format(*pair) for pair in pairs]
        (root / f"{split}.txt").write_text("\n".join(lines).replace("/train/", f"/{split}/"))
    door.follow("check_data", *own(root), "data.lists={train: train.txt, val: val.txt}")
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("gt", path.parent.name)))
    door.follow("check_data", *own(root))


# Names of classes

NAMES = {
    "json ids": '{"a": 0, "b": 1}',
    "json records": '[\n  {"id": 1, "name": "a"},\n  {"id": 2, "name": "b"}\n]',
    "yaml": "- a\n- b\n",
    "yolo": "names:\n  0: a\n  1: b\n",
    "name, r, g, b": "name,r,g,b\na,0,0,0\nb,128,0,0\n",
    "numbered": "0 a\n1 b\n",
    "marks": "id;name\n0;it's [a]\n1;b, or c\n",
    "markup": "<classes>\n<a/>\n<b/>\n</classes>\n",
    "missing": None,
}
"""Files of names that are more than names, or not there."""


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_names_becomes_a_list(name, door, root, tmp_path):
    path = tmp_path / "names"
    if NAMES[name]:
        path.write_text(NAMES[name])
    message = door.refused("check_data", *own(root, path))
    advised = r"(?:or the names themselves, as in|neither a list,) '(data\.classes=\[[\w,]+\])'"
    door.follow("check_data", *own(root)[:2], re.search(advised, message)[1])
    path.write_text("it's [a]\nb, or c\n")
    door.follow("check_data", *own(root, path))


@pytest.mark.parametrize(
    ("text", "says", "old", "new"),
    [
        ("Value, Class\n0, a\none, b\n", "'one, b' is not a number, a comma", "one", "1"),
        (
            "# label:color_rgb:parts:actions\na:0,0,0::\nb:128,0::\n",
            *("'b:128,0::' is not name:red,green,blue::", "128,0", "128,0,0"),
        ),
    ],
    ids=["value", "colour"],
)
def test_a_row_of_another_program_is_mended(text, says, old, new, door, root, tmp_path):
    path = tmp_path / "names"
    path.write_text(text)
    assert says in door.refused("check_data", *own(root, path))
    path.write_text(text.replace(old, new))
    if "color_rgb" in text:
        colored(root)
    door.follow("check_data", *own(root, path))


def test_values_of_roboflow_become_settings(door, tmp_path):
    root = plant(tmp_path / "data", values=(1, 2))
    path = tmp_path / "_classes.csv"
    path.write_text("Pixel Value, Class\n1, a\n2, b or c\n")
    message = door.refused("check_data", *own(root, path))
    (setting,) = shlex.split(re.search(r"one a line, and set (.*)$", message, re.MULTILINE)[1])
    path.write_text("a\nb or c\n")
    assert "b or c" in door.follow("check_data", *own(root, path), setting)
    door.follow("train", *own(root, path), setting)


def test_one_kind_of_object_is_two_classes(door, root):
    names = re.search(
        r"write \[(\w+), (\w+)\]", heard(Folder, root=root, split="train", classes=["cat"])
    )
    Folder(root=root, split="train", classes=names.groups())
    message = door.refused("train", *own(root, "[cat]"))
    setting = re.search(r"background and object, '(data\.\S+)'$", message)[1]
    door.follow("train", *own(root)[:2], setting)


# --- Runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that stopped after 2 of 4 steps; nothing may be changed in it."""
    folder = tmp_path_factory.mktemp("finished") / "a run"
    settings = Door(None, folder.parent).defaults("train", [f"run.dir={folder}"])
    call("train", *settings, "trainer.steps=4", "trainer.stop_at=2")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "a run")


GOES_ON = ("trainer.steps=4", "trainer.stop_at=2")
RESUMED, USED, AGAIN = ("resume={last}",), ("run.dir={run}",), ("resume={last}", "run.dir={run}")
STARTED = "of the backbone all"


def with_fields(**fields):
    """Returns a change of a run: other fields in its last checkpoint."""
    return lambda run: rewrite(run / "last.pt", **fields)


def lose_a_state(run):
    optimizer = checkpoint_format.load(run / "last.pt")["optimizer"]
    optimizer["state"].pop(0)
    optimizer["param_groups"][0]["params"].pop(0)
    rewrite(run / "last.pt", optimizer=optimizer)


def diverge(run):
    shutil.copy(run / "last.pt", run.parent / "before.pt")
    model = checkpoint_format.load(run / "last.pt")["model"]
    model["head.classify.1.bias"][0] = float("nan")
    rewrite(run / "last.pt", model=model)


def keep_weights_alone(run):
    torch.save(checkpoint_format.load(run / "last.pt")["model"], run / "last.pt")


def damage(run):
    for path in run.glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])


def rename_run(run):
    (run / ".run_id").write_text("another\n")


OTHER_DATA = "Scenes train, 7 samples"
BEFORE = r"take (weights) from before the run diverged$"
RUNS = {
    "auto": (None, ("resume=auto", "run.dir=null"), r"which run with ([\w.]+)=<folder>",
             ("resume=auto", "{0}={run}"), "steps 2 to 4"),
    "converted": (with_fields(optimizer=None), RESUMED, r"start one from these weights with (\w+)$",
                  ("{0}={last}",), STARTED),
    "plain weights": (keep_weights_alone, RESUMED, r"plain weights go to (\w+)$",
                      ("{0}={last}",), STARTED),
    "average": (None, (*RESUMED, "trainer.ema_decay=0.5"), r"use (\w+)$",
                ("{0}={last}", "trainer.ema_decay=0.5"), STARTED),
    "steps": (None, (*RESUMED, "trainer.steps=1"), r"(\S+)=1, and (2) steps are done; give more",
              (*RESUMED, "{0}={1}2"), "steps 2 to 22"),
    "seed goes on": (None, (*RESUMED, "seed=7"), r"^(\S+) goes on with the new ones",
                     (*RESUMED, "seed=7", "{0}"), "from here on with other settings"),
    "seed starts": (None, (*RESUMED, "seed=7"), r"(\w+) starts a new run$",
                    ("{0}={last}", "seed=7"), STARTED),
    "training set": (with_fields(training_set=OTHER_DATA), RESUMED, r"; (\S+) goes on with the new",
                     (*RESUMED, "{0}"), "it goes on"),
    "validation set": (with_fields(validation_set=OTHER_DATA), RESUMED, r"; (\S+) goes on with the",
                       (*RESUMED, "{0}"), "it goes on"),
    "batch": (None, (*RESUMED, "data.batch_size=1"), r"x (trainer\.\w+)=1 x",
              (*RESUMED, "data.batch_size=1", "{0}=2"), "steps 2 to 4"),
    "order": (None, (*RESUMED, "data.batch_size=1"), r"; (\S+) goes on in another order",
              (*RESUMED, "data.batch_size=1", "{0}"), "it goes on in another order"),
    "used folder": (None, USED, r"give (\S+) to go on with it", (*USED, "{0}"), "steps 2 to 4"),
    "another folder": (None, USED, r", or another (\S+)$", ("{0}={tmp}/another",), "steps 0 to 4"),
    "another run": (rename_run, AGAIN, r"name a new folder with (\S+)$",
                    (*RESUMED, "{0}={tmp}/new"), "steps 2 to 4"),
    "damaged": (damage, ("resume=auto", *USED), r"to start over give another (\S+)$",
                ("resume=auto", "{0}={tmp}/another"), "steps 0 to 4"),
    "states": (lose_a_state, RESUMED, r"new run from the weights use (\w+)$",
               ("{0}={last}",), STARTED),
    "diverged": (diverge, RESUMED, BEFORE, ("resume={tmp}/before.pt",), "steps 2 to 4"),
    "diverged weights": (diverge, ("init_from={last}",), BEFORE,
                         ("init_from={tmp}/before.pt",), STARTED),
}  # fmt: skip
"""What changes in a run, what is typed, where the advice is, what is typed then, what is said."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_or_starts_as_advised(name, door, run, tmp_path):
    change, typed, pattern, then, said = RUNS[name]
    places = {"run": run, "last": run / "last.pt", "tmp": tmp_path}
    if change:
        change(run)
    message = door.refused("train", *GOES_ON, *(text.format(**places) for text in typed))
    found = re.search(pattern, message, re.MULTILINE).groups()
    then = [text.format(*found, **places) for text in then]
    assert said in door.follow("train", *GOES_ON, *then)


def test_a_run_that_ended_early_goes_on_as_advised(door, run):
    rewrite(run / "last.pt", evaluations_since_best=2)
    resumed = (*GOES_ON[:1], f"resume={run / 'last.pt'}", f"run.dir={run}")
    message = door.follow("train", *resumed, "trainer.patience=2")
    found = re.search(r"(\S+)=(null), or above (\d+), goes on$", message, re.MULTILINE).groups()
    for patience in (found[1], int(found[2]) + 1):
        assert "steps 2 to 4" in door.follow("train", *resumed, f"{found[0]}={patience}")


def test_a_step_is_seen_again(door, tmp_path):
    diverges = ("optimizer.lr=1e30", "trainer.steps=5", "trainer.log_every=1")
    settings = door.defaults("train", [*diverges, f"run.dir={tmp_path / 'a run'}"])
    message = door.call("train", *settings, code=3, trains=True)
    program, name, *typed = shlex.split(re.search(r"to see it again: (.*)$", message, re.M)[1])
    assert (program, name) == ("python", "tools/train.py")
    assert (ROOT / name).is_file()
    again = door.call("train", *typed, f"run.dir={tmp_path / 'again'}", code=3, trains=True)
    first, second = (
        re.search(r"step \d+: the loss .*?samples: [\w, ]+", t)[0] for t in (message, again)
    )
    assert first == second


def test_a_run_is_repeated_as_its_config_says(door, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = (run / "config.yaml").read_text().splitlines()[1]
    _, name, *typed = shlex.split(head.removeprefix("#"))
    assert re.search(r"/finished\d+/a run$", typed[1])
    reported = door.call(name.removeprefix("tools/")[:-3], *typed)
    assert "steps 0 to 4" in reported


# --- Objects made in Python -----------------------------------------------------------------------


def heard(make, *arguments, kind=InputError, **named):
    """Returns what is said when something cannot be made."""
    with pytest.raises((kind, ValueError)) as error:
        make(*arguments, **named)
    return str(error.value)


def test_what_a_class_expects_is_said_in_python_too():
    assert "cache_dir=5: expected a folder or null" in heard(Reading, cache_dir=5)
    assert "stem='8x8' is not '7x7', '64-64-128' or" in heard(ResNet, depth=18, stem="8x8")


def test_one_rate_for_a_backbone_that_does_not_list_its_layers(door):
    message = heard(SGD(0.1, layer_decay=0.5), tiny())
    door.follow("train", "optimizer=sgd", re.search(r"; set (\S+), or take", message)[1])


@pytest.mark.parametrize("setting", ["model.backbone.freeze=2", "model.backbone.norm_eval=true"])
def test_what_stays_as_it_is_should_have_been_trained(door, tiny_checkpoint, tmp_path, setting):
    said = door.follow("train", setting)
    file, start = re.search(rf"{setting}:.* give (\S+)=FILE, or (\w+)$", said, re.M | re.I).groups()
    torch.save(ResNet(depth=18).state_dict(), tmp_path / "w.pth")
    weights = ("model/backbone=resnet18", f"{file}={tmp_path / 'w.pth'}")
    for given in ([f"{start}={tiny_checkpoint}"], weights):
        assert "never trained" not in door.follow("train", setting, *given)


def test_a_class_count_stays_as_the_data_set_has_it():
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = check(hydra.compose("train", TINY))
    config.data.num_classes = 3  # as a data set of somebody's own may have it
    message = heard(make_dataset, config, "val", training=False)
    count = re.search(r"has (\d+) class names: leave data.num_classes as", message)[1]
    config.data.num_classes = int(count)
    make_dataset(config, "val", training=False)


# --- Batches, memory, devices -------------------------------------------------------------------


def test_pictures_of_several_sizes(door, tmp_path):
    root = plant(tmp_path / "data", splits=(("train", 2), ("val", 1)))
    for folder in ("images", "masks"):
        path = root / folder / "train/train_0.png"
        Image.open(path).crop((0, 0, 40, 40)).save(path)
    plain = (*own(root), "data/transforms=none", "data.crop=null")
    message = door.call("train", *door.defaults("train", plain), code=2, trains=True)
    pattern = r"set (data\.crop) and a transform that crops, such as (\S+), or (data\.\S+)$"
    crop, transform, alone = re.search(pattern, message, re.MULTILINE).groups()
    door.follow("train", *own(root), transform, f"{crop}=[32,32]", trains=True)
    door.follow("train", *plain, alone, trains=True)


def test_mixed_pictures_of_several_sizes(door, tmp_path):
    root = plant(tmp_path / "data", splits=(("train", 2), ("val", 1)))
    for folder in ("images", "masks"):
        path = root / folder / "train/train_0.png"
        Image.open(path).crop((0, 0, 40, 40)).save(path)
    plain = (*own(root), "data/transforms=none", "data.crop=null", "data.batch_size=1")
    plain = (*plain, "data.class_mix=1", "trainer.steps=4")
    message = door.call("train", *door.defaults("train", plain), code=2, trains=True)
    pattern = r"set (data\.crop) and a transform that crops, such as (\S+), or (data\.\S+)$"
    crop, transform, without = re.search(pattern, message, re.MULTILINE).groups()
    door.follow("train", *own(root), "data.class_mix=1", transform, f"{crop}=[32,32]", trains=True)
    door.follow("train", *plain, without, trains=True)


def test_bad_samples_are_mended_or_removed(door, tmp_path):
    root = plant(tmp_path / "data", splits=(("train", 8), ("val", 1)))
    for i in range(5):
        path = root / f"images/train/train_{i}.png"
        path.write_bytes(path.read_bytes()[:-400])
    typed = (*own(root), "data.on_bad_sample=skip", "trainer.steps=6")
    message = door.call("train", *door.defaults("train", typed), code=2, trains=True)
    pattern = r"repair or remove them \(tools/(\w+)\.py (\S+) finds all\)"
    name, setting = re.search(pattern, message).groups()
    found = door.refused(name, *own(root), setting, "show=10", f"output={tmp_path / 'o'}")
    assert found.count("train_") == found.count("cut off") == 5
    report = json.loads((tmp_path / "o/report.json").read_text())
    for problem in report["splits"]["train"]["problems"]:
        Path(problem.partition(": ")[0]).unlink()
    door.follow("train", *typed, trains=True)


def test_workers_without_room_or_memory(door):
    message = str(workers.explain(OSError(errno.ENOSPC, ""), [], list, 0))
    dead = types.SimpleNamespace(pid=1, exitcode=-signal.SIGKILL)
    killed = str(workers.exit_error([dead], lambda: ["x"]))
    pattern = r"(data\.num_workers=0) needs none, .*size=2g (\S+)$"
    setting, path = re.search(pattern, message).groups()
    assert Path(path).is_dir()
    for program in ("docker run --shm-size=2g", "mount -o remount,size=2g"):
        assert program in message
    assert setting.startswith(re.search(r"fewer (data\.num_workers) need less", killed)[1])
    door.follow("train", setting)


def test_one_process_per_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = heard(choose_device, "auto")
    pattern = r"^3 processes on a machine with (\d+) CUDA device\(s\): start one process per device"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", re.search(pattern, message)[1])
    assert choose_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("DANET_SHARE_DEVICE", "1")  # a test of several processes on one GPU
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cuda") == torch.device("cuda", 0)


def test_gradients_that_are_too_large_for_float16(door, tmp_path):
    step = make_trainer(tmp_path, accumulate=1, steps=30).train_step
    step.overflows += 30
    step.scaler = torch.amp.GradScaler("cpu", enabled=True)
    message = heard(step.require_updates, 30, 99, "x", kind=DivergedError)
    key, *values = re.search(r"set (\S+)=(\w+) or (\w+), or lower optimizer\.lr;", message).groups()
    for value in values:
        door.follow("train", f"{key}={value}", "optimizer.lr=0.0001")


def test_processes_that_did_not_meet_get_another_port(monkeypatch):
    def taken(*_, **__):
        raise RuntimeError("address already in use")

    monkeypatch.setattr(rendezvous, "rendezvous", taken)
    message = heard(rendezvous.join, timedelta(seconds=1), kind=ProcessError)
    pattern = r"torchrun (--\S+) finds a free port, (--\S+) names another"
    known = torchrun.get_args_parser()._option_string_actions
    assert set(re.search(pattern, message).groups()) <= set(known)


def test_memory_that_was_not_enough(door):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config, cpu = check(hydra.compose("train", TINY)), torch.device("cpu")
    with pytest.raises(RuntimeError) as short:
        torch.empty(2**52, dtype=torch.uint8)
    for error in (short.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        message = str(advice.explain_shortage(error, config, cpu, training=True))
        assert message.startswith("out of memory on cpu in a step of data.batch_size=2 with 48 x 9")
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert advice.explain_shortage(other, config, cpu, training=True) is None
    pattern = r"(\S+), '(\S+)', a smaller (\S+) with a larger (\S+), a smaller (\S+); (\S+) shows"
    precision, recompute, pair, accumulate, size, plan = re.search(pattern, message).groups()
    door.follow("train", precision, recompute, f"{pair}=3", f"{accumulate}=2", f"{size}=[32,32]")
    assert "largest crop" in door.follow("train", f"{plan}")
    message = str(advice.explain_shortage(MemoryError(), config, cpu, training=False))
    setting, key = re.search(r"use (\S+), or a smaller (\S+)$", message).groups()
    door.follow("train", setting, f"{key}=[64,64]", "evaluation.stride=[48,48]")


def test_sums_of_exponentials_or_a_mean(door, tiny_checkpoint, tmp_path):
    saved = checkpoint_format.load(tiny_checkpoint)
    saved["model"]["head.classify.1.bias"][0] = 200
    checkpoint_format.save(tmp_path / "last.pt", saved)
    typed = (f"checkpoint={tmp_path / 'last.pt'}", f"output={tmp_path / 'o'}")
    small = ("evaluation=danet_single", "evaluation.base_size=96", "evaluation.crop=48")
    message = door.refused("eval", *typed, *small)
    door.follow("eval", *typed, re.search(r"take (\S+), which averages", message)[1])


# --- Caches -------------------------------------------------------------------------------------


def test_there_are_systems_without_caches(door, root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "os", types.SimpleNamespace(**{**vars(os), "name": "nt"}))
    cached = (*own(root), f"data.cache_dir={tmp_path / 'cache'}")
    setting = re.search(r"; use (\S+)$", door.refused("train", *cached, "data.cache=disk"))[1]
    door.follow("train", *cached, setting)


# --- Weights of others --------------------------------------------------------------------------


def test_an_entry_of_torchvision_or_a_file_is_named(door, tmp_path, monkeypatch):
    resnet = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), resnet)
    typed = ("model/backbone=resnet18", "model.head.reduction=8")
    message = door.refused("train", *typed, "model.backbone.weights=IMAGENET")
    names = re.search(r"neither a file nor a weight entry .* \(([\w, ]+)\)$", message)[1]
    name = names.split(", ")[-1]
    entry = torchvision.models.get_model_weights("resnet18")[name]
    state = torch.load(resnet)
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: state)
    door.follow("train", *typed, f"model.backbone.weights={name}")
    message = door.refused("train", *typed, f"init_from={resnet}")
    place = re.search(r"weights of a backbone alone go to (\S+)$", message)[1]
    door.follow("train", *typed, f"{place}={resnet}")


def test_images_are_normalised_as_in_the_file(door, run):
    model = checkpoint_format.load(run / "last.pt")["model"]
    model["mean"][:] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    rewrite(run / "last.pt", model=model)
    reported = door.follow("train", f"init_from={run / 'last.pt'}")
    value = re.search(r"normalised with \{'mean': (\[.*?\]).*; '(\+\S+)=\[\.\.\.\]' and ", reported)
    setting = f"{value[2]}={value[1].replace(' ', '')}"
    reported = door.follow("train", f"init_from={run / 'last.pt'}", setting)
    assert "were normalised" not in reported


def test_timm_is_installed_or_another_network_taken(door, monkeypatch):
    pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    typed = ("model/backbone=timm", "model.head.reduction=8")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        message = door.refused("train", *typed)
    assert_installs(re.search(r"is not installed: (.*)$", message)[1], "timm")
    message = door.refused("train", *typed, "model.backbone.name=resnet18q")
    name = re.search(r"; there are (\S+),", message)[1]
    other = ("model.backbone.name=efficientformer_l1", "model.backbone.image_size=[64,256]")
    message = door.refused("train", *typed, *other)
    found = re.search(r": set 'data\.crop=\[(\d+),(\d+)\]'; or take another network", message)
    with torch.device("meta"):  # large ones, of which no weights are asked
        TimmBackbone(name=name)
        TimmBackbone(name="efficientformer_l1", image_size=[int(side) for side in found.groups()])


# --- What the other tools say -------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "pictures/p.png"
    save_picture(path, np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    return path


EVAL = {
    "show": ("check_data", "show=0"),
    "samples": ("check_data", "samples=-1"),
    "boundary_ratio": ("eval", "boundary_ratio=2"),
    "predict batch": ("predict", "batch_size=0"),
    "predict tolerance": ("predict", "tolerance=-1"),
    "predict opacity": ("predict", "opacity=2"),
    "predict min_confidence": ("predict", "min_confidence=2"),
    "predict maps": ("predict", "maps=uint32"),
    "predict kinds": ("predict", "write=[x]"),
    "count": ("visualize", "count=0"),
    "channels": ("visualize", "channels=0"),
    "opacity": ("visualize", "opacity=2"),
    "formats": ("export", "formats=[x]"),
    "sizes": ("export", "sizes=[[1,1]]"),
    "opset": ("export", "opset=3"),
    "size": ("export", "size=[1,1]"),
    "calibration": ("export", "calibration=0"),
}
"""A tool and a setting that is out of its range."""


@pytest.mark.parametrize("name", EVAL)
def test_settings_of_tools_at_their_ends(name, door, network, picture, root, tmp_path):
    program, wrong = EVAL[name]
    key = wrong.partition("=")[0]
    typed = (f"checkpoint={network}", f"output={tmp_path / 'o'}")
    typed = own(root) if program == "check_data" else typed
    typed += (f"images={picture.parent}",) if program == "predict" else ()
    typed += ("formats=[]",) if name in ("sizes", "size", "opset", "calibration") else ()
    message = door.refused(program, *typed, wrong)
    values = ends_of(message)
    if key == "write":
        values = [f"[{re.search(r'expected some of ([a-z]+, [a-z]+)', message)[1]}]", "[]"]
    elif key == "formats":
        values = ["[]"]  # what the others write takes its time, and is tested
    elif name == "sizes":
        values = [f"[{values[0]}]"]
    elif name == "size":
        values = [f"[{values[0]},{values[0]}]"] if "," not in values[0] else values
    assert values, message
    for number, value in enumerate(values):
        # Results of two settings are not mixed in a folder.
        apart = [f"{s}{number}" if s.startswith("output=") else s for s in typed]
        door.follow(program, *apart, f"{key}={value.replace(', ', ',')}")


SAID = {
    "elsewhere": ("predict images={pictures}", "output={pictures}/o", "name a folder", ""),
    "frames": ("predict images={pictures}", "frames=2", "leave it out$", ""),
    "points": (
        *("visualize images={wide}", "points=[4,5]"),
        *(r"x and y, as in 'points=(\S+)'$", "points={0}"),
    ),
    "classes": ("visualize count=1", "classes=[qq]", r"; it has (\w+),", "classes=[{0}]"),
    "corruptions": ("eval device=cpu", "corruptions=fog", r"names, as in '(\S+)'$", "{0}"),
    "report": (
        *("visualize attention=false count=1", "images={wide} report=true"),
        *(r"(report=true) scores a split: leave images out$", "{0}"),
    ),
}
"""A tool with its settings, those that are refused, what is said, and what is typed then."""


@pytest.mark.parametrize("name", SAID)
def test_a_tool_takes_what_it_says(name, door, network, picture, tmp_path):
    (program, *typed), wrong, pattern, then = SAID[name][0].split(), *SAID[name][1:]
    Image.new("RGB", (320, 64)).save(tmp_path / "wide.png")
    places = {"pictures": picture.parent, "wide": tmp_path / "wide.png"}
    typed = [f"checkpoint={network}", f"output={tmp_path / 'o'}", *typed]
    typed = [text.format(**places) for text in typed]
    wrong = wrong.format(**places).split()
    keys = {text.partition("=")[0] for text in wrong}
    kept = [text for text in typed if text.partition("=")[0] not in keys]
    found = re.search(pattern, door.refused(program, *kept, *wrong))
    door.follow(program, *typed, *then.format(*found.groups()).split())


def test_scores_are_those_of_eval(door, network, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("{}")
    typed = ("export", f"checkpoint={network}", "formats=[]", f"output={tmp_path / 'o'}")
    message = door.refused(*typed, f"metrics={path}")
    name = re.search(r"not a metrics.json of tools/(\w+)\.py$", message)[1]
    door.follow(name, f"checkpoint={network}", f"output={tmp_path / 'scores'}")
    door.follow(*typed, f"metrics={tmp_path / 'scores/metrics.json'}")


def test_results_of_others_are_left_alone(door, network, tmp_path):
    typed = ["export", f"checkpoint={network}", "formats=[]"]
    door.follow(*typed, f"output={tmp_path / 'o'}")
    (tmp_path / "o/model.pt2").write_bytes(b"a program")
    rewrite(network, step=9)
    message = door.refused(*typed, f"output={tmp_path / 'o'}")
    assert "; name another folder, or remove it" in message
    door.follow(*typed, f"output={tmp_path / 'other'}")
    shutil.rmtree(tmp_path / "o")
    door.follow(*typed, f"output={tmp_path / 'o'}")


def test_a_split_with_labels_is_scored_and_one_without_submitted(door, network, tmp_path):
    for split, kind in (("train", 0), ("val", 1), ("test", 2)):
        root, name = tmp_path / "data", f"{split}/ulm/ulm_000000_000019"
        noise = np.random.default_rng(kind).integers(7, 9, (40, 48, 3), dtype=np.uint8)
        save_picture(root / f"leftImg8bit/{name}_leftImg8bit.png", noise)
        if split != "test":
            save_picture(root / f"gtFine/{name}_gtFine_labelIds.png", noise[..., 0])
    data = ("data=cityscapes", f"data.root={root}", "data.batch_size=1", "model/head=fcn")
    door.follow("train", *data, f"run.dir={tmp_path / 'run'}", trains=True)
    typed = (f"checkpoint={tmp_path / 'run/last.pt'}", "split=test", "device=cpu")
    key = re.search(r"; (\w+)=<folder> writes predictions", door.refused("eval", *typed))[1]
    door.follow("eval", *typed, f"{key}={tmp_path / 'sent'}")
    message = door.refused("eval", *typed, f"{key}={tmp_path / 'sent'}")
    assert message.endswith("; remove it or name another folder")
    door.follow("eval", *typed, f"{key}={tmp_path / 'again'}")
    typed = (*typed[::2], f"output={tmp_path / 'r'}", "count=1")
    message = door.refused("visualize", *typed, "split=test", "report=true")
    setting = re.search(r"; (report=true) needs them", message)[1]
    door.follow("visualize", *typed, "split=test")
    door.follow("visualize", *typed, "split=val", setting)
    typed = (f"checkpoint={network}", f"output={tmp_path / 'o'}")
    message = door.refused("eval", *typed, f"{key}={tmp_path / 'sent'}")
    assert "leave submission= away to score a split with labels" in message
    door.follow("eval", *typed)


# --- Packages and Pythons -----------------------------------------------------------------------


def assert_installs(command, extra):
    """Asserts that a command names a checkout that has an extra; pip itself needs a network."""
    program, verb, flag, target = shlex.split(command)
    assert (program, verb, flag) == ("pip", "install", "-e")
    path, name = re.fullmatch(r"(.*)\[(\w+)\]", target).groups()
    assert name == extra
    assert (Path(path) / "setup.py").is_file()
    assert f'"{extra}": ' in (Path(path) / "setup.py").read_text()
    assert extra in importlib.metadata.metadata("danet").get_all("Provides-Extra")
    return target


@pytest.mark.parametrize("extra", ["export", "geo", "hub", "tiff", "timm"])
def test_an_extra_is_installed_from_the_checkout(extra, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert assert_installs(extras.how_to_install(extra), extra) == f".[{extra}]"
    monkeypatch.chdir(tmp_path)
    assert_installs(extras.how_to_install(extra), extra)


def test_packages_are_named_where_a_wheel_was_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site/danet/extras.py"))
    needed = ["torch>=2", 'safetensors>=0.5; extra == "export"', "onnx>=1.18 ; extra == 'export'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    command = extras.how_to_install("export")
    assert shlex.split(command) == ["pip", "install", "safetensors>=0.5", "onnx>=1.18"]
