"""Advice works when it is followed: what a message says to type is taken from it, and done."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import types
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import hydra
import numpy as np
import pytest
import safetensors.torch as safetensors
import scipy.io
import torch
import torchvision
import yaml
from conftest import ROOT, TINY, batch, call, make_folder, make_trainer, tool, write_pair
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from PIL import Image
from torch.distributed import run as torchrun

import danet
from danet import extras, interpreter
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import run_folder
from danet.checkpoint.convert import PROGRAMS
from danet.config.build import make_dataset, make_model
from danet.config.validate import check
from danet.data import workers
from danet.data.sampler import StepSampler
from danet.datasets import cache, pascal_voc
from danet.datasets.base import Reading
from danet.datasets.cityscapes import Cityscapes
from danet.datasets.coco_stuff import CocoStuff10k, CocoStuff164k
from danet.datasets.folder import Folder
from danet.datasets.formats.pascal_in_detail import detail_index
from danet.datasets.lists import shipped_list
from danet.datasets.pascal_context import PascalContext
from danet.datasets.pascal_voc import PascalVOC
from danet.datasets.scenes import Scenes
from danet.datasets.submission import SubmissionWriter
from danet.distributed import collectives, launcher, rendezvous
from danet.distributed.device import choose_device
from danet.engine.nonfinite import NonFiniteGuard
from danet.engine.train_step import TrainStep
from danet.engine.trainer import Trainer
from danet.errors import DivergedError, InputError, ProcessError, UserError
from danet.evaluation.inference import Whole
from danet.evaluation.metrics import BoundaryIoU
from danet.losses import OHEM, CrossEntropy, DeepSupervision
from danet.models.heads.dual import SingleAttentionHead
from danet.models.resnet import ResNet
from danet.models.timm_backbone import TimmBackbone
from danet.ops.attention import ChannelAttention
from danet.preflight import advice
from danet.preflight.memory_estimate import StepSimulator
from danet.tools import export

pytestmark = pytest.mark.bad_input("R30")


class Door:
    """Starts tools in this process."""

    def __init__(self, capsys, folder):
        self.capsys = capsys
        self.folder = folder
        self._runs = 0

    def call(self, name, *settings, code=0, trains=False):
        """Starts a tool and returns what it printed; a training may end before its first step."""
        self.capsys.readouterr()
        fault = ""
        with pytest.MonkeyPatch.context() as patch:
            if not trains:
                patch.setattr(Trainer, "fit", lambda *_: None)
                patch.setattr(launcher, "start", lambda *_: None)
            # It composes everything once more, to ask for a mode that no config here sets.
            patch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
            try:
                call(name, *settings, code=code)
            except AssertionError as error:
                fault = str(error).splitlines()[0]
        seen = "".join(self.capsys.readouterr())
        if fault:
            pytest.fail(f"{fault}, expected {code}: {name} {' '.join(map(str, settings))}\n{seen}")
        return seen

    def attempt(self, name, *settings):
        """Returns the message with which a tool refuses; None if it does not."""
        try:
            return self.refused(name, *settings)
        except pytest.fail.Exception as failed:
            if not str(failed).startswith("exit 0"):
                raise
            return None

    def refused(self, name, *settings, code=2):
        """Returns the message with which a tool refuses."""
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


def is_installed(name):
    """Tells whether a package is installed, by its metadata.

    find_spec does more: in a process that looks for pip, setuptools no longer replaces distutils.
    """
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture
def door(capsys, tmp_path):
    return Door(capsys, tmp_path)


ENDS = (
    (r"did you mean ([^\s?]+)\?", "{0}"),
    (r"\[(?:height, ?width|long, short)\] of at least (\d+)(?!.*pairs)", "[{0},{0}]"),
    (r"two (?:whole )?numbers of at least (\d+)", "[{0},{0}]"),
    (r"numbers of stages, (\d) to (\d)", "[{0}] [{1}]"),
    (r"must hold [a-z ]+ of at least (\d+)", "[{0}]"),
    (r"list of positive numbers up to ([\d.]+)", "[{0}]"),
    (r"with 0 < low <= high", "[0.5,0.5]"),
    (r"with ([-\d.]+) <= low <= high <= ([\d.]+)", "[{0},{1}]"),
    (r"with ([-\d.]+) <= low <= high", "[{0},{0}]"),
    (r"three numbers each", "[1,1,1]"),
    (r"two numbers in \[(\d), 1\)", "[{0},0.99]"),
    (r"in \[(\d), 1\)", "{0} 0.99"),
    (r"\(0, (1)\]", "{0}"),
    (r"0 < decay < 1|between 0 and 1", "0.5"),
    (r"as in (0\.\d+)", "{0}"),
    (r"in (1)\.\.crop=\[(\d+), (\d+)\]", "[{0},{0}] [{1},{2}]"),
    (r"\bin 0\.\.1, both left out", "0.5"),
    (r"\bin (\d+)\.\.([\d.]+)", "{0} {1}"),
    (r"expected (?:a rate of )?([\d.]+) to ([\d.]+)\b", "{0} {1}"),
    (r"at least (\d+)", "{0}"),
    (r"at most (\d+)", "{0}"),
    (r"(\d+) or more\b", "{0}"),
    (r">= (\d+)", "{0}"),
    (r"(?:expected [a-zA-Z ]*|number )above 0", "0.5"),
    (r"is (negative)|a (finite number)|seconds, or (0)|(number of minutes)", "0"),
    (r"expected (?:one of |some of )?((?:[\w:-]+, )*[\w:-]+ or [\w:-]+)$", "words"),
    (r"(?:expected |one of |some of |choices: )((?:[\w:-]+, )*[\w:-]+)$", "words"),
    (r"is n(?:either|ot) ('[\w-]+'.*'[\w-]+')$", "words"),
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


def plant(root, *, values=(0, 1), folder="masks", splits=(("train", 4), ("val", 2)), size=(44, 60)):
    """Writes pairs of noise whose labels hold some values."""
    rng = np.random.default_rng(0)
    for split, count in splits:
        for i in range(count):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            mask = rng.choice(np.array(values, np.uint8), size)
            name = f"{split}_{i}".removeprefix("._")
            write_pair(root, split, name, image, mask, labels=folder)
    return root


FOLDER = ("data=folder", "data.classes=[a,b]", "data.root={root}")
CHAINS = {
    "settings": (
        (),
        *("seed=-1", "device_memory=-1", "data.batch_size=0", "data.num_workers=-1"),
        *("+model._partial_=true", "trainer.steps=0", "trainer.clip_norm=0", "trainer.device=gpu"),
        *("trainer.save_minutes=-1", "trainer.ema_decay=1", "trainer.precision=half"),
        *("trainer.on_storage_error=go", "run.processes=0", "optimizer.head_multiplier=inf"),
    ),
    "parts": (
        (),
        *("model.head.energy=x", "model.backbone.depth=20", "model.backbone.output_stride=4"),
        *("model.backbone.multi_grid=[0]", "model.backbone.recompute=[5]", "+model.mean=[1]"),
        *("loss.weights.position=-1", "optimizer.lr=0", "optimizer.betas=[1,1]"),
        *("optimizer.weight_decay=-1", "schedule.power=-1", "schedule.warmup_steps=-1"),
        *("evaluation.max_pixels=10", "data.level=x", "data.cue_radius=99", "data.timeout=-1"),
    ),
    "pictures": (
        (*FOLDER, "model/head=cbam", "loss=ohem", "optimizer=sgd", "evaluation=sliding"),
        *("data.on_bad_sample=keep", "data.max_bad_share=2", "data.cache=disc"),
        *("data.cache_gib=0", "data.val_share=1", "data.labels_start_at=-1"),
        *("model.head.reduction=0", "loss.main.threshold=2", "loss.main.min_kept=0"),
        *("optimizer.momentum=1", "evaluation.crop=[10,10]", "evaluation.stride=[0,1]"),
        *("evaluation.windows_per_batch=0", "data.transforms.train.steps.color.hue=[-1,1]"),
        "data.transforms.train.steps.color.brightness=[2,1]",
    ),
    "windows": (
        (*FOLDER, "model/head=psanet", "loss=dice", "schedule=cosine", "evaluation=multi_scale"),
        *("model.head.mask_size=[0,1]", "model.head.shrink=0", "+loss.main.losses.1.smooth=-1"),
        *("schedule.final=2", "evaluation.scales=[0]", "data.crop=[10,10]"),
        "data.transforms.train.steps.scale_crop.scale=[2,1]",
    ),
    "authors": (
        (*FOLDER, "model/head=pspnet", "evaluation=danet_single"),
        *("model.head.bins=[0]", "evaluation.base_size=10", "evaluation.stride_rate=2"),
        "data.transforms.train.steps.scale_crop.size=[10,10]",
    ),
    "longest": (
        ("model/head=deeplab_v2", "evaluation=danet_single"),
        *("model.head.rates=[0]", "evaluation.crop=99999", "evaluation.scales=[1000]"),
    ),
    "mmseg": (
        ("model/head=position", "evaluation=mmseg_single"),
        *("model.head.attention=x", "evaluation.scale=[10,10]", "evaluation.ratios=[0]"),
    ),
    "mmseg windows": (
        ("evaluation=mmseg_single",),
        *("evaluation.crop=[10,10]", "evaluation.stride=[0,1]"),
    ),
}
"""Choices of a training, and settings that are all out of their range."""


@pytest.fixture
def root(tmp_path):
    """The folder of a data set of the kind ``folder`` with two classes, 4 and 2 pairs."""
    return plant(tmp_path / "data")


@pytest.mark.parametrize("name", CHAINS)
def test_stated_ranges_hold_at_their_ends(name, door, root, tmp_path, monkeypatch):
    """Mends one fault after the other by what is said of it, first with one end of its range."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    choices, *wrong = CHAINS[name]
    choices = [choice.format(root=root) for choice in choices]
    typed = dict(setting.split("=", 1) for setting in wrong)
    ends = {}
    while (message := door.attempt("train", *choices, *map("=".join, typed.items()))) is not None:
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

ONES = f"[{','.join(['1'] * 16)}]"
HINTS = {
    "ignore_index": (
        *("data.ignore_index=0", r"(data\.values=\{.+?\}) \((data=folder)\)"),
        ["{1} {0} data.classes=[a,b]"],
    ),
    "amp": ("trainer.amp=true", r"see (\S+) \(\w+, (\w+)", ["{0}={1}"]),
    "thresh": ("loss.main.thresh=0.6", r"see (\S+) with (\S+)", ["{1} {0}=0.6"]),
    "class_weights": (
        *("loss.class_weights=[1]", r"see (\S+) of (\S+) and (\w+), (\S+) of (\S+) and (\w+)"),
        ["{1} {0}=" + ONES, "loss={2} {0}=" + ONES, "{4} {3}=" + ONES, "loss={5} {3}=" + ONES],
    ),
    "norm": ("model.norm=group", r"see (\S+) for several", ["{0}=true"]),
    "epochs": ("trainer.epochs=1", r"updates: see (\S+)$", ["{0}=1"]),
    "max_iters": ("trainer.max_iters=1", r"see (\S+)$", ["{0}=1"]),
    "learning_rate": ("optimizer.learning_rate=0.01", r"see (\S+)$", ["{0}=0.01"]),
}
"""Keys of other programs -> a setting, what is said instead, and the settings that follow."""


@pytest.mark.parametrize("name", HINTS)
def test_keys_of_other_programs_have_their_place_here(name, door, tmp_path):
    typed, pattern, forms = HINTS[name]
    message = door.refused("train", typed)
    found = re.search(pattern, message)
    assert found, message
    tree = plant(tmp_path / "data", values=(0, 1, 2)) if name == "ignore_index" else None
    for form in forms:
        settings = [part.replace(", ", ",") for part in form.split()]
        settings = [part.format(*found.groups()) for part in settings]
        door.follow("train", *settings, *([f"data.root={tree}"] if tree else []))


TYPES = {
    "whole number": ((), "trainer.steps=many", "expected a whole number", "1"),
    "truth": ((), "allow_changes=maybe", "expected true or false", "true"),
    "value": ((), "trainer.steps=null", "expected a value", "1"),
    "number": ((), "schedule.power=x", "expected a number, got", "0.5"),
    "mapping": (
        *((), "loss.weights=1", "expected a mapping, {name: value}"),
        "{position: 1, channel: 1}",
    ),
    "list": ((), "loss.main.class_weights=1", "expected a list", ONES),
    "one of": ((), "model.backbone.stem=7x8", "expected one of 7x7", "7x7"),
    "max_pixels from": (FOLDER, "data.max_pixels=0", "number, at least 1", "100000"),
    "length": ((), f"run.log_to=[{'x' * 10001}]", "expected at most 10000", "[tensorboard]"),
    "written": ((), r"run.name=\${oc.env:HOME}", "write the value itself", "/root"),
    "head partial": ((), "model.head._partial_=maybe", "expected true or false", "true"),
    "classes_weigh": (
        *((), f"loss.main.class_weights=[{','.join(['-1'] * 16)}]", "a number of at least 0"),
        f"[{','.join(['0'] * 15)},1]",
    ),
    "names": (FOLDER, "data.classes=3", "expected names, data.classes=[name,name]", "[a,b]"),
    "few": (FOLDER, "data.num_classes=1", "a whole number of at least 2", "2"),
}
"""Choices, a setting of another type, what is said of it, and a value as it says."""


@pytest.mark.parametrize("name", TYPES)
def test_a_value_of_the_type_that_is_named_is_taken(name, door, root):
    choices, wrong, said, right = TYPES[name]
    choices = [choice.format(root=root) for choice in choices]
    assert said in door.refused("train", *choices, wrong)
    key = wrong.partition("=")[0]
    door.follow("train", *choices, f"{key}={right}")


CHOICES = {
    "no choice": ("data=kitti", r"choices: .*, (scenes)$", "data={0}"),
    "empty choice": ("data=", r"expected one of .*, (scenes)$", "data={0}"),
    "close choice": ("model/head=duel", r"did you mean (\w+)\?", "model/head={0}"),
    "close key": ("trainer.stepz=1", r"did you mean (\S+)\?", "{0}=1"),
    "log_to": ("run.log_to=[tensorbord]", r"did you mean (\w+)\?", "run.log_to=[{0}]"),
    "log_to choices": ("run.log_to=[x]", r"choices: (\w+),", "run.log_to=[{0}]"),
    "no dashes": ("--steps=3", r"as in (\S+);", "{0}"),
    "target": ("~schedule._target_", r"(schedule): names no class; expected (\S+) and", None),
    "loss": ("loss._target_=danet.losses.OHEM", r"a loss is its argument: (\S+)", "{0}"),
    "class path": ("loss.main._target_=OHEM", r"as in (\S+)$", "loss.main._target_={0}"),
    "close class": ("loss.main._target_=danet.losses.OHME", r"mean (\w+)\?", None),
    "num_classes": ("data.num_classes=300", r"leave (data.num_classes) out", ""),
}
"""A setting, what is said instead, and the setting that follows."""


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_said_instead_is_taken(name, door):
    wrong, pattern, form = CHOICES[name]
    message = door.refused("train", wrong)
    found = re.search(pattern, message, re.MULTILINE)
    assert found, message
    form = {
        "target": "{0}.{1}=danet.engine.schedule.Poly",
        "close class": "loss.main._target_=danet.losses.{0}",
    }.get(name, form)
    door.follow("train", *filter(None, [form.format(*found.groups())]))


def test_help_shows_the_settings(door):
    flag = re.search(r"(--\w+) shows them", door.refused("train", "--steps", "3"))[1]
    assert re.search(r"^trainer:\n  steps: 350", door.call("train", flag), re.MULTILINE)


@pytest.mark.parametrize(
    ("typed", "advised"),
    [
        ("data.crop=[32,32", "data.crop=[32,32]"),
        ("data.crop=32,32", "data.crop=[32,32]"),
        ("data.classes=[a b", "data.classes=[a b]"),
        ("data.lists={train: train.txt, val: val.txt", None),
    ],
)
def test_brackets_are_closed_as_the_message_shows(typed, advised, door, root):
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(f"{split}/{split}_0\n{split}/{split}_1\n")
    names = [] if "classes" in typed else ["data.classes=[a,b]"]
    message = door.refused("train", "data=folder", f"data.root={root}", *names, typed)
    form = re.search(r"a (?:list|mapping) ([^;]+)", message)[1]
    assert advised in (form, None)
    assert "[[" not in form
    if "classes" in typed:  # one name is too few, which is reported next
        message = door.refused("train", "data=folder", f"data.root={root}", form)
        form = re.search(r"background and object, (\S+)$", message)[1]
    door.follow("train", "data=folder", f"data.root={root}", *names, form)


def test_several_values_are_several_runs(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = door.refused("train", "seed=1,2")
    flag = re.search(r"with (-m) each value is a run", message)[1]
    settings = [s for s in door.defaults("train", ["seed=1,2"]) if not s.startswith("run.dir")]
    monkeypatch.setattr(Trainer, "fit", lambda *_: None)
    call("train", *settings, flag)
    assert len(list(tmp_path.glob("runs/scenes/*/config.yaml"))) == 2


@pytest.mark.parametrize("names", ["[背景,物体]", "[it's,b]", "[c(1),b]", "[a&b,c]"], ids=range(4))
def test_names_of_any_kind_are_taken(names, door, root):
    door.follow("train", "data=folder", f"data.root={root}", f"data.classes={names}")


def test_a_backslash_belongs_to_the_name(door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = r"data.root=x\y"
    message = door.refused("check_data", "data=camvid", wrong)
    assert message == f"data.root={tmp_path}/x\\y: there is no such folder; set data.root=<folder>"
    plant(tmp_path / r"x\y", folder="labels")
    door.follow("check_data", "data=camvid", wrong)


def test_a_value_that_is_missing_is_given(door, root):
    for name, key, value in (
        ("check_data", "data.root", root),
        ("check_data", "data.classes", "[a,b]"),
        ("predict", "images", root / "images"),
    ):
        given = {"data.root": root, "data.classes": "[a,b]"} if name == "check_data" else {}
        settings = [f"{k}={v}" for k, v in given.items() if k != key]
        if name == "check_data":
            settings.append("data=folder")
        else:
            settings.append("checkpoint=x")
        advised = re.search(r"set ([\w.]+)=[<\[]", door.refused(name, *settings))[1]
        assert advised == key
        done = door.attempt(name, *settings, f"{advised}={value}")
        assert "no value is given" not in (done or "")


def test_a_file_that_is_missing_is_given(door, tiny_checkpoint, tmp_path):
    message = door.refused("eval")
    key = re.search(r"set (\w+)=<file>", message)[1]
    door.follow("eval", f"{key}={tiny_checkpoint}", f"output={tmp_path / 'o'}")


def test_modules_of_ones_own_are_named_in_the_environment(door, tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        "from danet.losses import CrossEntropy\n\n\nclass Mine(CrossEntropy):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    typed = "loss.main._target_=own_losses.Mine"
    variable = re.search(r"in the environment variable (\w+)", door.refused("train", typed))[1]
    monkeypatch.setenv(variable, "own_losses")
    door.follow("train", typed)


def test_a_log_that_is_not_installed_is_installed(door, monkeypatch):
    with monkeypatch.context() as missing:
        missing.setattr("importlib.util.find_spec", lambda name: None)
        message = door.refused("train", "run.log_to=[mlflow]")
    assert "mlflow is not installed: pip install mlflow" in message
    door.follow("train", "run.log_to=[mlflow]")


def test_tabs_become_blanks(door, tmp_path):
    path = tmp_path / "own.yaml"
    head = "defaults:\n  - train_schema\n  - train\n  - _self_\n"
    path.write_text(f"{head}trainer:\n\tsteps: 1\n")
    typed = ("--config-dir", tmp_path, "--config-name", "own")
    message = door.refused("train", *typed)
    assert "indented with blanks, not with tabs" in message
    line = int(re.search(r"line (\d+)", message)[1])
    lines = path.read_text().splitlines()
    lines[line - 1] = lines[line - 1].replace("\t", "  ")
    path.write_text("\n".join(lines))
    door.follow("train", *typed)


def test_a_name_that_is_too_long_is_shortened(door, tmp_path):
    long = "x" * 300
    message = door.refused("train", f"run.dir={tmp_path / long}", code=4)
    most = int(re.search(r"take (\d+) and", message)[1])
    assert "give a shorter one" in message
    door.follow("train", f"run.dir={tmp_path / long[:most]}")


def test_a_name_that_is_refused_gets_other_letters(door, tmp_path, monkeypatch):
    from danet import filesystem

    error = OSError(errno.EILSEQ, "Invalid or incomplete multibyte", str(tmp_path / "a\udcff"))
    message = str(filesystem.explain_storage(error))
    assert "use letters, digits, dots, dashes and underscores" in message
    door.follow("train", f"run.dir={tmp_path / 'run-1_a.b'}")


def test_bytes_that_are_not_text_are_passed_as_the_message_shows(tmp_path):
    typed = ("data=camvid", f"data.root={tmp_path / 'ä'}")
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = tool("check_data", *typed, cwd=tmp_path, env=plain, code=2)
    name, value = re.search(r"set (\w+)=(\S+) in the environment, or rename", done.stderr).groups()
    done = tool("check_data", *typed, cwd=tmp_path, env={**plain, name: value}, code=2)
    assert "there is no such folder" in done.stderr, "the name is read"


# --- Own pictures -------------------------------------------------------------------------------


def change(folder, turn):
    """Writes all masks below a folder anew."""
    for path in sorted(folder.rglob("*.png")):
        Image.fromarray(turn(np.array(Image.open(path)))).save(path)


def own(root, classes="[a,b]"):
    return ("data=folder", f"data.root={root}", f"data.classes={classes}")


VALUES = {
    "0 and 255": ((0, 255), "[a,b]", r"set (data\.values=\S+?)$"),
    "0 and 255 of four": ((0, 255), "[a,b,c,d]", r"set (data\.values=\S+?)$"),
    "from 1": ((1, 2), "[a,b]", r"set (data\.labels_start_at=1)$"),
    "one too many": ((0, 1, 2), "[a,b]", r"set (data\.labels_start_at=1) if 0 means no class"),
    "other values": ((0, 7), "[a,b]", r"mapped with (data\.values=\S+), or"),
}
"""Values in the masks, classes, and where the message has the setting that is missing."""


@pytest.mark.parametrize("name", VALUES)
def test_a_setting_for_the_values_of_masks_is_right(name, door, tmp_path):
    values, classes, pattern = VALUES[name]
    data = own(plant(tmp_path / "data", values=values), classes)
    found = re.search(pattern, door.refused("check_data", *data), re.MULTILINE)
    door.follow("train", *data, found[1])


def test_a_missing_class_is_added(door, tmp_path):
    root = plant(tmp_path / "data", values=(0, 2))
    assert "add the missing class" in door.refused("check_data", *own(root))
    door.follow("check_data", *own(root, "[a,b,c]"))


def test_labels_that_perhaps_count_from_1(door, tmp_path):
    data = own(plant(tmp_path / "data", values=(1, 2)), "[a,b,c]")
    reported = door.follow("train", *data)
    setting = re.search(r"if classes count from 1, set (\S+)", reported)[1]
    assert "has the value 0" not in door.follow("train", *data, setting)


def test_labels_from_1_in_one_file(tmp_path):
    root = plant(tmp_path / "data", values=(1, 3))
    made = {"root": root, "split": "train", "classes": ["a", "b", "c"]}
    with pytest.raises(InputError) as error:
        Folder(**made)[0]
    key, value = re.search(r"with data\.(labels_start_at)=(\d) where", str(error.value)).groups()
    make_folder(**made, **{key: int(value)})[0]


def test_soft_edges_get_a_value_or_become_hard(door, tmp_path):
    root = plant(tmp_path / "data", values=(0, 128, 255))
    data = own(root)
    message = door.refused("check_data", *data, "data.values={0:0,255:1}")
    value = re.search(r"label value (\d+)", message)[1]
    ignored = re.search(r"add it there, with a class or (\d+) to ignore it", message)[1]
    door.follow("check_data", *data, f"data.values={{0:0,255:1,{value}:{ignored}}}")
    door.follow("check_data", *data, f"data.values={{0:0,255:1,{value}:1}}")
    numbers = re.search(r"numpy\.where\(mask > (\d+), (\d+), (\d+)\)\.astype\('uint8'\)", message)
    limit, high, low = map(int, numbers.groups())
    change(root / "masks", lambda mask: np.where(mask > limit, high, low).astype("uint8"))
    door.follow("check_data", *data, "data.values={0:0,255:1}")


def test_soft_edges_of_three_values_are_not_recognized(door, tmp_path):
    data = own(plant(tmp_path / "data", values=(0, 50, 100, 200)), "[a,b,c]")
    message = door.refused("check_data", *data, "data.values={0:0,100:1,200:2}")
    assert "numpy.where" not in message, "it would lose the class in the middle"


def test_pictures_that_keep_few_values_are_stretched(door, tmp_path):
    root = plant(tmp_path / "data")
    for i, path in enumerate(sorted((root / "images").rglob("*.png"))):
        dark = np.random.default_rng(i).integers(100, 1000, (44, 60)).astype(np.uint16)
        Image.fromarray(dark).save(path)
    reported = door.follow("check_data", *own(root))
    form = r"numpy\.interp\(image, (\[\d+, \d+\]), (\[\d+, \d+\])\)\.astype\('uint8'\)"
    source, target = map(json.loads, re.search(form, reported).groups())
    for path in sorted((root / "images").rglob("*.png")):
        image = np.array(Image.open(path))
        Image.fromarray(np.interp(image, source, target).astype("uint8")).save(path)
    assert "values or fewer" not in door.follow("check_data", *own(root))


def test_one_class_alone_can_be_looked_at(door, tmp_path):
    root = plant(tmp_path / "data", values=(1,))
    command = re.search(r"(tools/(\w+)\.py) with the same", door.refused("train", *own(root)))
    assert (ROOT / command[1]).is_file()
    door.refused(command[2], *own(root), f"output={tmp_path / 'drawn'}")
    assert (tmp_path / "drawn/train.png").exists()


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


def test_the_check_counts_all_labels(door, tmp_path):
    root = plant(tmp_path / "data", splits=(("train", 60), ("val", 2)), size=(8, 8))
    reported = door.follow("train", *own(root, "[a,b,c]"), "data.batch_size=2")
    name = re.search(r"tools/(\w+)\.py counts all labels", reported)[1]
    text = "classes that never occur in its 60 labels and cannot be learnt: 2 (c)"
    assert text in door.follow(name, *own(root, "[a,b,c]"))


def test_lists_freeze_what_a_hash_divided(door, tmp_path, monkeypatch):
    root = tmp_path / "data"
    plant(root, splits=((".", 6),))
    reported = door.follow("train", *own(root))
    name = re.search(r"tools/(\w+)\.py writes both", reported)[1]
    reported = door.follow(name, *own(root), f"output={tmp_path / 'a folder'}")
    setting = shlex.split(re.search(r"lists freeze it: (.*)$", reported, re.MULTILINE)[1])
    reported = door.follow("train", *own(root), *setting)
    assert "by a hash of their names" not in reported
    lists = [(tmp_path / "a folder" / f"{split}.txt").read_text() for split in ("train", "val")]
    assert [len(text.splitlines()) for text in lists] == [5, 1]


def test_class_weights_are_a_setting(door, root):
    reported = door.follow("check_data", *own(root))
    setting = re.search(r"balanced by median frequency: (\S+)$", reported, re.MULTILINE)[1]
    door.follow("train", *own(root), setting)


def test_the_check_can_decode_images(door, root):
    reported = door.follow("check_data", *own(root))
    setting = re.search(r"checksums \((\S+) decodes them\)", reported)[1]
    assert "images: decoded" in door.follow("check_data", *own(root), setting)


@pytest.mark.parametrize(("samples", "drawn"), [("0", False), ("1", True)])
def test_so_many_samples_are_drawn(samples, drawn, door, root, tmp_path):
    door.follow("check_data", *own(root), f"samples={samples}", f"output={tmp_path / 'o'}")
    assert (tmp_path / "o/train.png").exists() == drawn


CHECKS = {
    "show": "show=0",
    "samples": "samples=-1",
}


@pytest.mark.parametrize("name", CHECKS)
def test_settings_of_the_check_at_their_ends(name, door, root):
    message = door.refused("check_data", *own(root), CHECKS[name])
    door.follow("check_data", *own(root), f"{name}={ends_of(message)[0]}")


def test_a_data_set_with_files_is_named(door, root):
    message = door.refused("check_data", "data=scenes")
    key = re.search(r"set (data)=NAME", message)[1]
    door.follow("check_data", f"{key}=folder", *own(root)[1:])


# Where files lie


def other_names(root):
    """Gives the folders of images and masks other names."""
    (root / "images").rename(root / "my photos")
    (root / "masks").rename(root / "the masks")
    for path in sorted((root / "my photos").rglob("*.png")):
        Image.open(path).convert("RGB").save(path.with_suffix(".jpg"))
        path.unlink()


def beside_one_another(root):
    """Puts each mask beside its image, below a folder of the split."""
    for split in ("train", "val"):
        (root / split).mkdir()
        for path in sorted((root / "images" / split).iterdir()):
            Image.open(path).save(root / split / f"{path.stem}.jpg")
            (root / "masks" / split / path.name).rename(root / split / f"{path.stem}_mask.png")
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "masks")


def split_first(root):
    """Makes <split>/images and <split>/labels."""
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / "images" / split).rename(root / split / "images")
        (root / "masks" / split).rename(root / split / "labels")
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "masks")


def capitals(root):
    (root / "images").rename(root / "Images")
    (root / "masks").rename(root / "MASKS")


def only_masks(root):
    (root / "masks").rename(root / "labels of it")


TREES = {
    "other names": (other_names, r"as in (.*?); expected"),
    "beside": (beside_one_another, r"set (data.images_dir=.*?); expected"),
    "split first": (split_first, r"as in (.*)$"),
    "capitals": (capitals, r"as in (data.images_dir=.*?); expected"),
    "other masks": (only_masks, r"as in (.*)$"),
    "no val": (lambda root: shutil.rmtree(root / "images/val"), r"names with (.*?); expected"),
}
"""What is done to a tree, and where the message has the settings that find its files."""


@pytest.mark.parametrize("name", TREES)
def test_settings_find_the_files(name, door, root):
    move, pattern = TREES[name]
    move(root)
    found = re.search(pattern, door.refused("check_data", *own(root)), re.MULTILINE)
    settings = shlex.split(found[1])
    assert len(settings) >= 2
    door.follow("train", *own(root), *settings)


def test_a_split_is_added(door, root):
    for folder in ("images", "masks"):
        (root / folder / "val").rename(root / folder / "aside")
    message = door.refused("check_data", *own(root))
    there, split = re.search(r"which has (\S+): add one for (\w+)", message).groups()
    for folder in ("images", "masks"):
        (root / folder / "aside").rename((root / folder / Path(there).name).with_name(split))
    door.follow("check_data", *own(root))


def test_a_second_picture_is_added(door, tmp_path):
    root = plant(tmp_path / "data", splits=((".", 1),))
    assert "1 image was found, and two splits need two or more" in door.refused(
        "check_data", *own(root)
    )
    plant(root, splits=((".", 2),))
    door.follow("check_data", *own(root))


def test_the_root_that_is_meant_is_named(door, root, tmp_path):
    (tmp_path / "up").mkdir()
    root.rename(tmp_path / "up/data")
    kind, _, classes = own(root)
    message = door.refused("check_data", kind, f"data.root={tmp_path / 'up'}", classes)
    setting = re.search(r"set (data.root=\S+); expected", message)[1]
    door.follow("check_data", kind, *shlex.split(setting), classes)


def test_one_of_several_roots_is_named(tmp_path):
    roots = [plant(tmp_path / name, folder="labels") for name in ("one", "two")]
    for root in roots:
        (root / "leftImg8bit").mkdir()
    with pytest.raises(InputError) as error:
        Cityscapes(root=tmp_path, split="train")
    found = re.search(
        r"several folders have \S+: (.*?); set data.root to one of them", str(error.value)
    )
    assert found[1].split(", ") == list(map(str, roots))


def test_a_folder_that_exists_is_given(door, root, tmp_path):
    message = door.refused("train", *own(tmp_path / "nowhere"))
    key = re.search(r"set ([\w.]+)=<folder>", message)[1]
    door.follow("train", *own(tmp_path / "nowhere"), f"{key}={root}")


def test_masks_get_the_names_of_their_images_or_stand_in_lists(door, root):
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(path.with_name(f"gt_{path.name.rpartition('_')[2]}"))
    message = door.refused("check_data", *own(root))
    assert "give them the names of their images, or name pairs in data.lists" in message
    pair = re.search(r"a line each: (\S+) (\S+)/<its mask>$", message, re.MULTILINE)
    assert pair.groups() == ("images/train/train_0.png", "masks/train")
    lists = {}
    for split, count in (("train", 4), ("val", 2)):
        lines = [
            f"{pair[1]} {pair[2]}/gt_0.png".replace("train", split).replace("_0", f"_{i}")
            for i in range(count)
        ]
        (root / f"{split}.txt").write_text("\n".join(lines))
        lists[split] = f"{split}.txt"
    shown = ", ".join(f"{split}: {path}" for split, path in lists.items())
    door.follow("check_data", *own(root), f"data.lists={{{shown}}}")
    for path in sorted((root / "masks").rglob("*.png")):
        path.rename(path.with_name(path.name.replace("gt", path.parent.name)))
    door.follow("check_data", *own(root))


def test_images_without_labels_are_left_out(door, root):
    (root / "masks/train/train_0.png").unlink()
    message = door.refused("check_data", *own(root))
    setting = re.search(r"; (\S+) leaves such images out", message)[1]
    assert "left out" in door.follow("check_data", *own(root), setting)


def test_no_label_at_all_is_not_left_out(door, root):
    for path in (root / "masks/train").iterdir():
        path.unlink()
    assert "leaves such images out" not in door.refused("check_data", *own(root)), (
        "it would not help"
    )


def test_a_split_that_is_known_is_named(door, root):
    message = door.refused("check_data", *own(root), "splits=[train,dev]")
    splits = ends_of(message)
    assert splits == ["train", "val", "test"]
    door.follow("check_data", *own(root), f"splits=[{splits[0]},{splits[1]}]")


def test_lists_name_the_splits_that_are_known(door, root):
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(f"{split}/{split}_0\n{split}/{split}_1\n")
    lists = "data.lists={{train: train.txt, {}: val.txt}}"
    message = door.refused("check_data", *own(root), lists.format("vall"))
    known = re.search(r"expected some of ([\w, ]+), and '(\w+)' is needed now", message)
    assert "val" in known[1].split(", ")
    door.follow("check_data", *own(root), lists.format("val"))


def test_pictures_in_two_lists_are_allowed_on_purpose(door, root):
    (root / "train.txt").write_text("train/train_0\ntrain/train_1\n")
    (root / "val.txt").write_text("train/train_1\nval/val_0\n")
    lists = "data.lists={train: train.txt, val: val.txt}"
    message = door.refused("check_data", *own(root), lists)
    assert "take them out of one list" in message
    setting = re.search(r"set (data\.\S+) to allow it on purpose", message)[1]
    door.follow("check_data", *own(root), lists, setting)
    (root / "val.txt").write_text("val/val_0\n")
    door.follow("check_data", *own(root), lists)


def test_pictures_of_two_splits_are_allowed_on_purpose(door, root):
    advised = r"set (data\.\S+) to allow it on purpose"
    message = door.refused("train", *own(root), "data.train_split=val")
    door.follow("train", *own(root), "data.train_split=val", re.search(advised, message)[1])
    shutil.copy(root / "images/train/train_0.png", root / "images/val/val_0.png")
    for name in ("check_data", "train"):
        message = door.refused(name, *own(root))
        door.follow(name, *own(root), re.search(advised, message)[1])
    assert "take it out of one split" in message
    for folder in ("images", "masks"):
        (root / folder / "val/val_0.png").unlink()
    for name in ("check_data", "train"):
        door.follow(name, *own(root))


@pytest.mark.parametrize("way", ["renamed", "lists"])
def test_two_folders_of_one_split(way, door, root):
    for folder in ("images", "masks"):
        shutil.copytree(root / folder / "val", root / folder / "valid")
    message = door.refused("check_data", *own(root))
    assert "rename or move one, or give data.lists" in message
    if way == "renamed":
        while message is not None:
            one = Path(message.split(" and ")[0])
            one.rename(one.with_name("other"))
            message = door.attempt("check_data", *own(root))
        return
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(f"{split}/{split}_0\n{split}/{split}_1\n")
    door.follow("check_data", *own(root), "data.lists={train: train.txt, val: val.txt}")


def test_names_differ_in_more_than_their_suffix(door, root):
    image = Image.open(root / "images/train/train_0.png")
    image.save(root / "images/train/train_0.jpg")
    message = door.refused("check_data", *own(root))
    assert "names must differ in more than their suffix" in message
    (root / "images/train/train_0.jpg").rename(root / "images/train/train_9.jpg")
    shutil.copy(root / "masks/train/train_0.png", root / "masks/train/train_9.png")
    door.follow("check_data", *own(root))


def test_an_empty_list_gets_a_name_a_line(door, root):
    (root / "train.txt").write_text("\n\n")
    (root / "val.txt").write_text("val/val_0\n")
    lists = "data.lists={train: train.txt, val: val.txt}"
    assert "expected one name a line" in door.refused("check_data", *own(root), lists)
    (root / "train.txt").write_text("train/train_0\ntrain/train_1\n")
    door.follow("check_data", *own(root), lists)


def test_two_data_sets_are_not_taken_for_images_and_masks(door, tmp_path):
    roots = [plant(tmp_path / "up" / name) for name in ("one", "two")]
    message = door.refused("check_data", *own(tmp_path / "up"))
    found = re.search(r"several folders have \S+: (.*?); set data.root to one of them", message)
    assert found[1].split(", ") == list(map(str, roots))
    for root in roots:
        door.follow("check_data", *own(root))


# Names of classes

NAMES = {
    "json list": '["a", "b"]',
    "json ids": '{"a": 0, "b": 1}',
    "json names": '{"0": "a", "1": "b"}',
    "json records": '[\n  {"id": 1, "name": "a"},\n  {"id": 2, "name": "b"}\n]',
    "yaml": "- a\n- b\n",
    "yolo": "names:\n  0: a\n  1: b\n",
    "name and colour": "a,0,0,0\nb,128,0,0\n",
    "name, r, g, b": "name,r,g,b\na,0,0,0\nb,128,0,0\n",
    "numbered": "0 a\n1 b\n",
    "tabs": "name\tid\na\t0\nb\t1\n",
    "marks": "id;name\n0;it's [a]\n1;b, or c\n",
    "markup": "<classes>\n<a/>\n<b/>\n</classes>\n",
}
"""Files of names that are more than names."""


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_names_becomes_a_list(name, door, root, tmp_path):
    path = tmp_path / "names"
    path.write_text(NAMES[name])
    message = door.refused("check_data", *own(root, path))
    setting = re.search(
        r"expected one name a line and nothing else, or the names themselves, as in (.*)$", message
    )[1]
    door.follow("check_data", *own(root)[:2], setting)
    path.write_text("it's [a]\nb, or c\n")
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


def test_a_row_of_roboflow_is_mended(door, root, tmp_path):
    path = tmp_path / "_classes.csv"
    path.write_text("Pixel Value, Class\n0, a\none, b\n")
    message = door.refused("check_data", *own(root, path))
    assert "'one, b' is not a number, a comma and a name" in message
    path.write_text(path.read_text().replace("one", "1"))
    door.follow("check_data", *own(root, path))


def test_a_row_of_cvat_is_mended(door, root, tmp_path):
    colors = np.array([[0, 0, 0], [128, 0, 0]], np.uint8)
    change(root / "masks", lambda mask: colors[mask])
    path = tmp_path / "labelmap.txt"
    path.write_text("# label:color_rgb:parts:actions\na:0,0,0::\nb:128,0::\n")
    message = door.refused("check_data", *own(root, path))
    form = re.search(r"'b:128,0::' is not name:red,green,blue(\S*) as CVAT writes it", message)[1]
    path.write_text(path.read_text().replace("b:128,0::", f"b:128,0,0{form}"))
    door.follow("check_data", *own(root, path))


def test_a_file_of_names_or_a_list(door, root, tmp_path):
    path = tmp_path / "names.txt"
    message = door.refused("check_data", *own(root, path))
    setting = re.search(r"neither a list, (data\.classes=\S+), nor a text file", message)[1]
    door.follow("check_data", *own(root)[:2], setting)
    path.write_text("a\nb\n")
    door.follow("check_data", *own(root, path))


def test_one_kind_of_object_is_two_classes(door, root):
    with pytest.raises(InputError) as error:
        Folder(root=root, split="train", classes=["cat"])
    names = re.search(r"write \[(\w+), (\w+)\]", str(error.value)).groups()
    Folder(root=root, split="train", classes=names)
    message = door.refused("train", *own(root, "[cat]"))
    setting = re.search(r"background and object, (data\.\S+)$", message)[1]
    door.follow("train", *own(root)[:2], setting)


def test_a_class_count_follows_from_the_names(door, root):
    message = door.refused("train", *own(root), "data.num_classes=3")
    assert "leave data.num_classes out" in message
    door.follow("train", *own(root))


# Masks and images


COLORS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)


def test_colours_are_listed_as_the_message_shows(door, root):
    change(root / "masks", lambda mask: COLORS[mask])
    message = door.refused("check_data", *own(root))
    colors = re.search(r"with 2 colours: (\[.*?\]); data=folder", message)[1]
    form = re.search(r"reads colours with (data\.colors)=\[\[red,green,blue\],\.\.\.\]", message)[1]
    door.follow("check_data", *own(root), f"{form}=[{colors.replace(' ', '')}]")


def test_an_unknown_colour_is_listed(door, tmp_path):
    root = plant(tmp_path / "data", values=(0, 1, 2))
    change(root / "masks", lambda mask: COLORS[mask])
    known = "[0,0,0],[128,0,0]"
    message = door.refused("check_data", *own(root), f"data.colors=[{known}]")
    color = re.search(r"the colour (\[\d+, \d+, \d+\])", message)[1].replace(" ", "")
    other = re.search(r"add it there or to (data\.\w+)", message)[1]
    door.follow("check_data", *own(root), f"data.colors=[{known}]", f"{other}=[{color}]")
    door.follow("check_data", *own(root, "[a,b,c]"), f"data.colors=[{known},{color}]")


def test_ignored_colours_go_with_colours(door, root):
    change(root / "masks", lambda mask: COLORS[mask])
    message = door.refused("check_data", *own(root), "data.ignore_colors=[[0,128,0]]")
    key = re.search(r"give (data\.colors), too", message)[1]
    colors = f"{key}=[[0,0,0],[128,0,0]]"
    door.follow("check_data", *own(root), "data.ignore_colors=[[0,128,0]]", colors)


def test_a_colour_has_three_numbers(door, root):
    change(root / "masks", lambda mask: COLORS[mask])
    message = door.refused("check_data", *own(root), "data.colors=[[0,0,0],[128,0,300]]")
    most = re.search(r"is not three numbers 0\.\.(\d+)", message)[1]
    assert int(most) == 255
    door.follow("check_data", *own(root), "data.colors=[[0,0,0],[128,0,0]]")


def test_settings_that_exclude_each_other(door, root):
    both = ("data.values={0:0,1:1}", "data.labels_start_at=1")
    assert "give one of them" in door.refused("check_data", *own(root), *both)
    door.follow("check_data", *own(root), both[0])


def save_all(folder, turn, **how):
    """Saves all pictures below a folder anew, by Pillow."""
    for path in sorted(folder.rglob("*.png")):
        turn(Image.open(path)).save(path, **how)


def with_alpha(picture):
    picture = picture.convert("LA")
    picture.putalpha(200)
    return picture


def test_a_mask_is_saved_without_alpha(door, root):
    save_all(root / "masks", with_alpha)
    assert "grey and alpha: save it without alpha" in door.refused("check_data", *own(root))
    save_all(root / "masks", lambda picture: picture.convert("L"))
    door.follow("check_data", *own(root))


def test_a_mask_of_colours_is_saved_without_alpha(door, root):
    colors = "data.colors=[[0,0,0],[1,1,1]]"
    save_all(root / "masks", with_alpha)
    message = door.refused("check_data", *own(root), colors)
    assert "a mask of colours must be opaque" in message
    assert "save it without alpha" in message
    save_all(root / "masks", lambda picture: picture.convert("RGB"))
    door.follow("check_data", *own(root), colors)


@pytest.mark.parametrize("name", ["values of jpeg", "colours of jpeg"])
def test_masks_are_png(name, door, root):
    colors = [] if name == "values of jpeg" else ["data.colors=[[0,0,0],[1,1,1]]"]
    suffix = "data.mask_suffix=.jpg"
    for path in sorted((root / "masks").rglob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
    message = door.refused("check_data", *own(root), suffix, *colors)
    kind = re.search(r"JPEG is lossy .*; use (PNG)$", message, re.MULTILINE)[1]
    for path in sorted((root / "masks").rglob("*.jpg")):
        path.unlink()
    assert all(p.suffix == f".{kind.lower()}" for p in (root / "masks").rglob("*.*"))
    door.follow("check_data", *own(root), *colors)


FILES = {
    "pages": (
        *("masks", ".tif", "a label must be one picture, and this file has 2"),
        lambda label, path: label.save(path, save_all=True, append_images=[label]),
        lambda label, path: label.save(path),
    ),
    "whole numbers": (
        *("masks", ".tif", "whole numbers 0..65535 (height, width), this is float32"),
        lambda label, path: label.convert("F").save(path),
        lambda label, path: label.save(path),
    ),
    "array": (
        *("masks", ".npy", "whole numbers 0..65535 (height, width), this is float64"),
        lambda label, path: np.save(path, np.array(label) / 1.0),
        lambda label, path: np.save(path, np.array(label)),
    ),
    "array range": (
        *(
            "masks",
            ".npy",
            "whole numbers 0..65535 (height, width), this is int64 (44, 60)",
        ),
        lambda label, path: np.save(path, np.array(label).astype(int) - 1),
        lambda label, path: np.save(path, np.array(label).astype(int)),
    ),
    "32 bits": (
        *("images", ".tif", "save it with 8 or 16 bits"),
        lambda image, path: image.convert("F").save(path),
        lambda image, path: image.convert("L").save(path),
    ),
    "bands": (
        *("images", ".tif", "save the three bands that matter as RGB with 8 bits"),
        lambda image, path: path.write_bytes(b"II*\0" + bytes(40)),
        lambda image, path: image.save(path),
    ),
}
"""A folder, a suffix, what is asked for, and how a file is written that is refused, and taken."""


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_saved_as_asked_for(name, door, root):
    folder, suffix, said, refused, taken = FILES[name]
    settings = [f"data.mask_suffix={suffix}"] if folder == "masks" else []
    pictures = {path: Image.open(path).copy() for path in sorted((root / folder).rglob("*.png"))}
    for path, picture in pictures.items():
        path.unlink()
        refused(picture, path.with_suffix(suffix))
    assert said in door.refused("check_data", *own(root), *settings)
    for path, picture in pictures.items():
        taken(picture, path.with_suffix(suffix))
    door.follow("check_data", *own(root), *settings)


def test_the_limit_of_pixels_is_raised(door, root):
    message = door.refused("check_data", *own(root), "data.max_pixels=100")
    count, key = re.search(r"are (\d+) pixels, .*; raise (\S+) if it is meant", message).groups()
    door.follow("check_data", *own(root), f"{key}={count}")


def test_a_turned_picture_or_its_label_is_turned(door, root):
    save_all(root / "masks", lambda label: label.transpose(Image.Transpose.ROTATE_90))
    exif = Image.Exif()
    exif[0x0112] = 6
    save_all(root / "images", lambda image: image, exif=exif)
    message = door.refused("check_data", *own(root))
    assert "they must be equal" in message
    assert "so turn the image file or its label" in message
    other = shutil.copytree(root, root.with_name("other"))
    for folder, turn in ((root / "images", "ROTATE_90"), (other / "masks", "ROTATE_270")):
        save_all(folder, lambda picture, to=turn: picture.transpose(Image.Transpose[to]))
        door.follow("check_data", *own(folder.parent))


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


def rewrite(path, **fields):
    """Changes fields of a checkpoint."""
    checkpoint_format.save(path, {**checkpoint_format.load(path), **fields})


def new_run(door, path, *settings):
    """Starts a run from the weights of a checkpoint, as many messages advise."""
    reported = door.follow("train", *settings, f"init_from={path}")
    assert "of the backbone all" in reported


def test_auto_needs_the_run(door, run):
    message = door.refused("train", *GOES_ON, "resume=auto", "run.dir=null")
    key = re.search(r"say which run with ([\w.]+)=<folder>", message)[1]
    assert "steps 2 to 4" in door.follow("train", *GOES_ON, "resume=auto", f"{key}={run}")


def test_weights_alone_start_a_run(door, run):
    rewrite(run / "last.pt", optimizer=None)
    message = door.refused("train", *GOES_ON, f"resume={run / 'last.pt'}")
    key = re.search(r"start one from these weights with (\w+)$", message)[1]
    door.follow("train", f"{key}={run / 'last.pt'}")


@pytest.mark.parametrize("name", ["network", "losses go on", "losses start"])
def test_other_settings_go_on_or_start_a_run(name, door, run):
    last, changed = run / "last.pt", "optimizer.lr=0.5" if name == "network" else "seed=7"
    message = door.refused("train", *GOES_ON, f"resume={last}", changed)
    if name == "losses go on":
        setting = re.search(r"^(\S+) goes on with the new ones", message, re.MULTILINE)[1]
        door.follow("train", *GOES_ON, f"resume={last}", changed, setting)
        return
    form = r"use (\w+)$" if name == "network" else r"(\w+) starts a new run$"
    assert re.search(form, message)[1] == "init_from"
    new_run(door, last, changed)


@pytest.mark.parametrize("key", ["training_set", "validation_set"])
def test_other_data_go_on_on_purpose(key, door, run):
    rewrite(run / "last.pt", **{key: "Scenes train, 7 samples"})
    typed = (*GOES_ON, f"resume={run / 'last.pt'}")
    setting = re.search(r"; (\S+) goes on with the new one", door.refused("train", *typed))[1]
    assert "it goes on" in door.follow("train", *typed, setting)


def test_the_product_of_the_batch_is_kept_or_allowed_to_change(door, run):
    typed = (*GOES_ON, f"resume={run / 'last.pt'}", "data.batch_size=1")
    message = door.refused("train", *typed)
    assert "choose the two settings so that the product is the same" in message
    old, new = map(int, re.search(r"had (\d+) images .* have (\d+) \(", message).groups())
    key = re.search(r"x (trainer\.\w+)=1 x", message)[1]
    door.follow("train", *typed, f"{key}={old // new}")
    setting = re.search(r"another order of samples with (\S+)$", message)[1]
    assert "samples come in another order" in door.follow("train", *typed, setting)


def test_threads_are_set_in_the_environment(door, run):
    rewrite(run / "last.pt", threads=2)
    typed = (*GOES_ON, f"resume={run / 'last.pt'}")
    reported = door.follow("train", *typed)
    name, count = re.search(r"; (\w+)=(\d+) makes them so", reported).groups()
    asked = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    done = subprocess.run(asked, env={**os.environ, name: count}, capture_output=True, text=True)
    assert done.stdout.strip() == count
    torch.set_num_threads(int(count))
    assert "thread(s) instead of" not in door.follow("train", *typed)


def test_a_folder_with_a_run_goes_on_or_another_is_given(door, run, tmp_path):
    message = door.refused("train", *GOES_ON, f"run.dir={run}")
    setting, key = re.search(r"give (\S+) to go on with it, or another (\S+)$", message).groups()
    assert "steps 2 to 4" in door.follow("train", *GOES_ON, f"run.dir={run}", setting)
    door.follow("train", f"{key}={tmp_path / 'another'}")
    with pytest.raises(InputError) as error:  # another process was quicker than the first look
        run_folder.prepare(str(run), tmp_path / "x", config={}, resuming=False)
    assert str(error.value) == message


def test_a_run_has_a_folder(door, tmp_path):
    (tmp_path / "file").touch()
    message = door.refused("train", f"run.dir={tmp_path / 'file'}", code=4)
    assert "give the name of a folder" in message
    door.follow("train", f"run.dir={tmp_path / 'folder'}")


def test_a_folder_that_may_be_written_is_given(door, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    with monkeypatch.context() as patch:
        may = os.access
        patch.setattr(os, "access", lambda p, mode: "locked" not in str(p) and may(p, mode))
        message = door.refused("train", f"run.dir={tmp_path / 'locked'}", code=4)
        assert message.endswith("may not be written by you; give another")
        door.follow("train", f"run.dir={tmp_path / 'mine'}")


def test_a_run_goes_on_in_its_own_folder(door, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / ".run_id").write_text("another\n")
    typed = (*GOES_ON, f"resume={other / 'last.pt'}", f"run.dir={other}")
    key = re.search(r"name a new folder with (\S+)$", door.refused("train", *typed))[1]
    door.follow("train", *typed[:-1], f"{key}={tmp_path / 'new'}")


def test_one_process_trains_in_a_folder(door, run, tmp_path):
    typed = (*GOES_ON, f"resume={run / 'last.pt'}", f"run.dir={run}")
    with open(run / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = door.refused("train", *typed)
        key = re.search(r"wait for its end, or give another (\S+)$", message)[1]
        door.follow("train", *typed[:-1], f"{key}={tmp_path / 'another'}")
    door.follow("train", *typed)


def test_no_checkpoint_is_whole(door, run, tmp_path):
    for path in run.glob("*.pt"):
        if not path.is_symlink():
            path.write_bytes(path.read_bytes()[:-1])
    message = door.refused("train", *GOES_ON, "resume=auto", f"run.dir={run}")
    key = re.search(r"to start anew give another (\S+)$", message)[1]
    door.follow("train", *GOES_ON, "resume=auto", f"{key}={tmp_path / 'another'}")


def test_a_state_that_does_not_fit_starts_a_run(door, run):
    saved = checkpoint_format.load(run / "last.pt")
    saved["optimizer"]["state"].pop(0)
    saved["optimizer"]["param_groups"][0]["params"].pop(0)
    rewrite(run / "last.pt", optimizer=saved["optimizer"])
    message = door.refused("train", *GOES_ON, f"resume={run / 'last.pt'}")
    assert re.search(r"new run from the weights use (\w+)$", message)[1] == "init_from"
    new_run(door, run / "last.pt")


def test_a_whole_checkpoint_is_named(door, run, tmp_path):
    path = run / "last.pt"
    other = shutil.copy(path, run / "step_000000001.pt")
    path.unlink()
    path.write_bytes(Path(other).read_bytes()[:-100] + bytes(100))
    message = door.refused("eval", f"checkpoint={path}")
    whole = re.search(r"; ([^;]*) is whole$", message)[1]
    door.follow("eval", f"checkpoint={whole}", f"output={tmp_path / 'o'}")


def test_checkpoints_that_are_there_are_named(door, run, tmp_path):
    message = door.refused("eval", f"checkpoint={run / 'lost.pt'}")
    there = re.search(r"; there are (.*)$", message)[1].split(", ")
    assert str(run / "last.pt") in there
    for path in there:
        door.follow("eval", f"checkpoint={path}", f"output={tmp_path / 'o'}")


def test_plain_weights_start_a_run(door, run, tmp_path):
    torch.save(checkpoint_format.load(run / "last.pt")["model"], tmp_path / "plain.pt")
    message = door.refused("train", *GOES_ON, f"resume={tmp_path / 'plain.pt'}")
    assert re.search(r"plain weights go to (\w+)$", message)[1] == "init_from"
    new_run(door, tmp_path / "plain.pt")


@pytest.mark.parametrize("key", ["resume", "init_from"])
def test_weights_of_before_the_run_diverged(key, door, run, tmp_path):
    before = shutil.copy(run / "last.pt", tmp_path / "before.pt")
    saved = checkpoint_format.load(before)
    saved["model"]["head.classify.1.bias"][0] = float("nan")
    checkpoint_format.save(run / "last.pt", saved)
    message = door.refused("train", *GOES_ON, f"{key}={run / 'last.pt'}")
    assert re.search(r"take (a checkpoint|weights) from before the run diverged$", message)
    door.follow("train", *GOES_ON, f"{key}={before}")


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


def test_a_later_step_is_seen_again_from_its_checkpoint(door, run, monkeypatch):
    replay = NonFiniteGuard(run).replay(3)
    _, name, *typed = shlex.split(replay.partition("again: ")[2])
    assert typed[0] == f"resume={run / 'last.pt'}"
    assert "steps 2 to 4" in door.call(name.removeprefix("tools/")[:-3], *typed)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    assert NonFiniteGuard(run).replay(3) == f"{replay} run.processes=2"


def test_a_run_is_repeated_as_its_config_says(door, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = (run / "config.yaml").read_text().splitlines()[1]
    _, name, *typed = shlex.split(head.removeprefix("#"))
    assert typed[1].endswith("/finished0/a run")
    reported = door.call(name.removeprefix("tools/")[:-3], *typed)
    assert "steps 0 to 4" in reported


def test_a_run_that_a_signal_stopped_goes_on(door, tmp_path, monkeypatch):
    update, folder = TrainStep.__call__, tmp_path / "a run"

    def interrupted(self, group, step):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(self, group, step)

    typed = door.defaults("train", ["trainer.steps=4", f"run.dir={folder}"])
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        reported = door.call("train", *typed, code=143, trains=True)
    setting = re.search(r"go on with (.*)$", reported, re.MULTILINE)[1]
    assert "steps 1 to 4" in door.call("train", *shlex.split(setting))


def test_a_variable_of_a_launcher_is_unset(door, monkeypatch):
    for name, value in (("RANK", "x"), ("WORLD_SIZE", "0")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            message = door.refused("train")
            assert message.endswith("start the processes with torchrun, or unset the variable")
            (low,) = ends_of(message.partition(";")[0])
            patch.setenv(name, low)
            launcher.require_sound({name: low, "WORLD_SIZE": "1"})
    door.follow("train")


def test_a_rank_is_below_the_number_of_processes(door, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    most = re.search(r"RANK=2 of WORLD_SIZE=2: expected at most (\d+)", door.refused("train"))[1]
    launcher.require_sound(
        {"RANK": most, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    )


def test_a_port_is_in_its_range():
    world = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}
    with pytest.raises(InputError) as error:
        launcher.require_sound({**world, "MASTER_PORT": "70000"})
    for port in ends_of(str(error.value).partition(";")[0]):
        launcher.require_sound({**world, "MASTER_PORT": port})


# --- Objects made in Python -----------------------------------------------------------------------

PYTHON = {
    "sampler": (StepSampler, {"num_samples": 4, "seed": 0}, "batch_size", 0),
    "boundary": (BoundaryIoU, {"num_classes": 3}, "ratio", 2),
    "normalise": (OHEM, {}, "normalise", "x"),
    "evaluation precision": (Whole, {}, "precision", "half"),
    "weights of classes": (CrossEntropy, {}, "class_weights", [1, -1]),
    "stem": (ResNet, {"depth": 18, "width": 8}, "stem", "8x8"),
    "single attention": (
        *(SingleAttentionHead, {"in_channels": 16, "num_classes": 2, "channels": 8}),
        *("attention", "x"),
    ),
    "channel energy": (ChannelAttention, {}, "energy", "x"),
    "annotation": (Cityscapes, {"root": "{streets}", "split": "val"}, "annotation", "x"),
    "labels of streets": (Cityscapes, {"root": "{streets}", "split": "val"}, "labels", "x"),
    "labels of stuff": (CocoStuff164k, {"root": "{stuff}", "split": "val"}, "labels", "x"),
    "labels of context": (PascalContext, {"root": "{context}", "split": "val"}, "labels", "x"),
    "reading cache": (Reading, {}, "cache", "x"),
    "reading cache_dir": (Reading, {}, "cache_dir", 5),
    "reading max_pixels": (Reading, {}, "max_pixels", 1.5),
    "device": (choose_device, {}, "wanted", "gpu"),
}
"""What is made, its arguments, and one of them that is out of its range."""


def heard(make, *arguments, kind=InputError, **named):
    """Returns what is said when something cannot be made."""
    with pytest.raises((kind, ValueError)) as error:
        make(*arguments, **named)
    return str(error.value)


@pytest.mark.parametrize("name", PYTHON)
def test_a_range_stated_in_python_holds_at_its_ends(name, tmp_path):
    make, named, key, wrong = PYTHON[name]
    root = str(named.get("root", "")).strip("{}")
    if root:
        named = {**named, "root": grow(tmp_path / "data", root)}
    message = heard(make, **named, **{key: wrong})
    values = [yaml.safe_load(value) for value in ends_of(message)]
    values = values or ([None] if "or null" in message else [1] * ("whole number" in message))
    assert values, message
    for value in values:
        reported = refusal(make, **named, **{key: [1, value] if isinstance(wrong, list) else value})
        assert not reported or "there is nothing at" in reported or "label" in reported, (
            "other files are meant"
        )
        assert message.partition("=")[0] + "=" not in reported.partition(": ")[0]


def refusal(make, **named):
    """Returns why something cannot be made; empty if it can."""
    try:
        make(**named)
    except InputError as error:
        return str(error)
    return ""


def test_a_label_map_stays_in_its_ranges(root):
    given = {"root": root, "split": "train", "classes": ["a", "b"]}
    message = heard(make_folder, **given, values={0: 0, 1: 7})
    low, high = map(int, re.search(r"classes are (\d)\.\.(\d)", message).groups())
    make_folder(**given, values={0: low, 1: high})
    message = heard(make_folder, **given, values={0: 0, 70000: 1})
    low, high = map(int, re.search(r"values on disk are (\d)\.\.(\d+)", message).groups())
    make_folder(**given, values={low: 0, high: 1})


def test_whole_class_indices_are_given_to_a_loss():
    logits, mask = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4)
    message = heard(CrossEntropy(), logits, mask)
    assert "must hold whole class indices" in message
    CrossEntropy()(logits, mask.long())


def test_pictures_of_bytes_are_predicted(tiny_checkpoint):
    model = danet.load_model(tiny_checkpoint)
    picture = np.zeros((48, 64, 3))
    message = heard(danet.predict, model, picture)
    dtype = re.search(r"expected (\w+) in 0\.\.255: an array \(H, W, 3\) or \(H, W\)", message)[1]
    assert danet.predict(model, picture.astype(dtype)).shape == (48, 64)
    assert danet.predict(model, picture[..., 0].astype(dtype)).shape == (48, 64)
    tensor = torch.from_numpy(picture.astype(dtype)).permute(2, 0, 1)
    assert danet.predict(model, tensor).shape == (48, 64)


def test_a_class_count_stays_as_the_data_set_has_it():
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = check(hydra.compose("train", TINY))
    config.data.num_classes = 3  # as a data set of somebody's own may have it
    message = heard(make_dataset, config, "val", training=False)
    count = re.search(r"has (\d+) class names: leave data.num_classes as", message)[1]
    config.data.num_classes = int(count)
    make_dataset(config, "val", training=False)


# --- Official data sets -------------------------------------------------------------------------


def save_label(path, values):
    """Writes a label with two of the values that a data set has, in the form of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.random.default_rng(0).choice(np.array(values, np.uint8), (40, 48))
    if path.suffix == ".mat":
        scipy.io.savemat(path, {"S": label, "LabelMap": label})
    else:
        Image.fromarray(label).save(path)


def save_photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (40, 48, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def grow(root, kind):
    """Makes one pair of each split of an official data set."""
    for split in ("train", "val"):
        if kind == "streets":
            name = f"{split}/ulm/ulm_000000_000019"
            save_photo(root / f"leftImg8bit/{name}_leftImg8bit.png")
            save_label(root / f"gtFine/{name}_gtFine_labelIds.png", (7, 8))
        elif kind == "stuff":
            save_photo(root / f"images/{split}2017/000000000001.jpg")
            save_label(root / f"annotations/{split}2017/000000000001.png", (0, 1))
        else:
            save_photo(root / f"JPEGImages/{split}.jpg")
            save_label(root / f"SegmentationClassContext/{split}.png", (1, 2))
            (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
            (root / f"ImageSets/Main/{split}.txt").write_text(split)
    return root


def spread(text):
    """Yields the paths that braces stand for."""
    inner = re.search(r"\{([^{}]*)\}", text)
    if inner is None:
        yield text
        return
    for part in inner[1].split(","):
        yield from spread(text[: inner.start()] + part.strip() + text[inner.end() :])


def paths_of(layout):
    """Returns the paths that a layout shows, with names in the places for names."""
    joined = re.sub(r",\s*\n\s*", ", ", layout)
    found = []
    for line in joined.splitlines():
        shown = re.split(r"\s{2,}(?=of |\(|or |masks|images)", line.strip())
        for text in shown if "<name>" in line else shown[:1]:
            text = re.sub(r"^(for \w+ also|or) +", "", text.strip())
            for old, new in (
                *(("[ADEChallengeData2016/]", ""), ("[VOCdevkit/VOC2010/]", "")),
                *(("<city>", "ulm"), ("<seq>", "000000"), ("<frame>", "000019")),
                *(("<8 digits>", "00000001"), ("<12 digits>", "000000000001")),
                *(("<id>", "one"), ("<name>", "one"), ("<the same>", "ADE_train_00000001")),
            ):
                text = text.replace(old, new)
            found += spread(text)
    return [path for path in found if "." in path.rpartition("/")[2] and " " not in path]


LAYOUTS = {
    "folder layout": ("folder", ["data.classes=[a,b]"], (0, 1), "masks"),
    "camvid layout": ("camvid", [], (0, 1), "labels"),
    "ade20k layout": ("ade20k", [], (1, 2), "annotations"),
    "cityscapes layout": ("cityscapes", [], (7, 8), "gt"),
    "coco_stuff_10k layout": ("coco_stuff_10k", [], (1, 2), "annotations"),
    "coco_stuff_164k layout": ("coco_stuff_164k", [], (0, 1), "annotations"),
    "pascal_voc layout": ("pascal_voc", ["data.train_split=train"], (0, 1), "SegmentationClass"),
    "pascal_context layout": ("pascal_context", [], (2, 9), "trainval"),
}
"""A choice of data, settings, values in labels, and what the folders of labels begin with."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_that_lie_as_the_layout_shows_are_found(name, door, tmp_path):
    kind, settings, values, labels = LAYOUTS[name]
    root = tmp_path / "data"
    root.mkdir()
    data = (f"data={kind}", f"data.root={root}", *settings, "data.allow_overlap=true")
    message = door.refused("check_data", *data)
    layout = re.search(r"expected(?: below data.root)?\n((?:  .*\n?)+)", message)[1]
    for path in paths_of(layout):
        place = root / path
        if place.suffix == ".txt":
            place.parent.mkdir(parents=True, exist_ok=True)
            name = "COCO_train2014_000000000001" if kind == "coco_stuff_10k" else "one"
            place.write_text(f"{name}\n")
        elif place.suffix == ".json" or (place.suffix == ".mat" and kind == "pascal_voc"):
            continue  # another form of the labels, and SBD's for another split
        elif any(part.startswith(labels) for part in Path(path).parts):
            save_label(place, values)
            if kind == "ade20k":
                shutil.copy(place, place.with_name("ADE_val_00000001.png"))
        elif place.suffix in (".jpg", ".png"):
            save_photo(place)
    if kind == "folder":
        for folder in ("images", "masks"):  # the layout shows two ways
            for path in (root / folder).glob("*.*"):
                path.unlink()
    if kind == "pascal_context":
        for split in ("train", "val"):
            (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
            (root / f"ImageSets/Main/{split}.txt").write_text("one\n")
    door.follow("check_data", *data)


def test_labels_of_context_lie_as_the_layout_shows(tmp_path):
    root = grow(tmp_path / "data", "context")
    shutil.rmtree(root / "SegmentationClassContext")
    message = heard(PascalContext, root=root, split="val")
    shown = [path for path in paths_of(message.partition("expected\n")[2]) if ".png" in path]
    assert shown == ["SegmentationClassContext/one.png"]
    save_label(root / shown[0].replace("one", "val"), (1, 2))
    PascalContext(root=root, split="val")


def test_labels_of_streets_are_unpacked_or_chosen(tmp_path):
    root = grow(tmp_path / "data", "streets")
    message = heard(Cityscapes, root=root, split="val", labels="train_ids")
    key, value = re.search(r"leave data\.(\w+)=(\w+), which gives", message).groups()
    Cityscapes(root=root, split="val", **{key: value})
    shutil.rmtree(root / "gtFine")
    message = heard(Cityscapes, root=root, split="val")
    package = re.search(r"unpack (\S+) into data.root", message)[1]
    assert package in (ROOT / "scripts/archives.yaml").read_text()
    with zipfile.ZipFile(tmp_path / package, "w") as archive:
        grow(tmp_path / "other", "streets")
        for path in (tmp_path / "other/gtFine").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path / "other"))
    zipfile.ZipFile(tmp_path / package).extractall(root)
    Cityscapes(root=root, split="val")


def test_files_of_train_ids_are_chosen(door, tmp_path):
    root = grow(tmp_path / "data", "streets")
    for path in (root / "gtFine").rglob("*.png"):
        save_label(path, (40, 41))
    message = door.refused("check_data", "data=cityscapes", f"data.root={root}")
    key, kind, suffix = re.search(
        r"; (data\.labels) says which .*, or (\w+), \*(_\w+\.png) with 0\.\.18", message
    ).groups()
    for path in (root / "gtFine").rglob("*_labelIds.png"):
        save_label(path.with_name(path.name.replace("_labelIds.png", suffix)), (0, 18))
    door.follow("check_data", "data=cityscapes", f"data.root={root}", f"{key}={kind}")


@pytest.fixture
def voc(tmp_path):
    """VOC with one picture each of train and val, and one that only SBD labels."""
    train, val = (next(iter(shipped_list("voc2012", s).lines)) for s in ("train", "val"))
    names = shipped_list("voc2012", "train").lines
    extra = next(n for n in shipped_list("voc2012", "trainaug").lines if n not in names)
    root = tmp_path / "voc"
    for name in (train, val, extra):
        save_photo(root / f"JPEGImages/{name}.jpg")
    for name in (train, val):
        save_label(root / f"SegmentationClass/{name}.png", (0, 1))
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/trainaug.txt").write_text(f"{train}\n{extra}\n")
    return root, train, val, extra


def save_sbd(folder, name):
    (folder / "cls").mkdir(parents=True)
    label = {"Segmentation": np.zeros((40, 48), np.uint8)}
    scipy.io.savemat(folder / f"cls/{name}.mat", {"GTcls": label})


@pytest.mark.parametrize("way", ["sbd unpacked", "sbd named"])
def test_labels_of_sbd_are_unpacked_or_named(way, voc, tmp_path):
    root, _, _, extra = voc
    message = heard(PascalVOC, root=root, split="trainaug")
    key = re.search(
        r"unpack SBD \(\S+\) into data.root, or name its folder with ([\w.]+)", message
    )[1]
    if way == "sbd unpacked":
        place = Path(re.search(r"and in (\S+)/cls; unpack", message)[1])
        assert place.is_relative_to(root)
        save_sbd(place, extra)
        PascalVOC(root=root, split="trainaug")
    else:
        save_sbd(tmp_path / "elsewhere", extra)
        argument = key.removeprefix("data.")
        PascalVOC(root=root, split="trainaug", **{argument: str(tmp_path / "elsewhere")})


def test_the_split_that_works_is_named(voc, monkeypatch):
    root, train, _, _ = voc
    lists = pascal_voc.shipped_list
    monkeypatch.setattr(
        pascal_voc,
        "shipped_list",
        lambda *names: lists(*names)._replace(lines={train: 1}),
    )
    message = heard(PascalVOC, root=root, split="trainaug")
    split = re.search(r"; the split '(\w+)' with 1 images works now", message)[1]
    assert len(PascalVOC(root=root, split=split)) == 1


MAT = {
    "version 7.3": (
        lambda path, label: path.write_bytes(b"M" * 124 + b"\0\2IM" + b"\0" * 400),
        r"save it as version 7, save\(\.\.\., '-v7'\)$",
    ),
    "whole numbers of mat": (
        lambda path, label: scipy.io.savemat(path, {"S": label + 0.5}),
        r"S: a label must be an array of whole numbers 0\.\.65535",
    ),
    "version 1.0": (
        lambda path, label: scipy.io.savemat(
            path, {"S": label, "names": np.array(["x"] * 172, object)[:, None]}
        ),
        r"take cocostuff-10k-v1\.1\.zip$",
    ),
}
"""How a label of COCO-Stuff 10k is written that is refused, and what is asked for."""


@pytest.mark.parametrize("name", MAT)
def test_a_label_of_matlab_is_saved_as_asked_for(name, tmp_path):
    save, said = MAT[name]
    stem = "COCO_train2014_000000000001"
    save_photo(tmp_path / f"images/{stem}.jpg")
    (tmp_path / "imageLists").mkdir()
    (tmp_path / "imageLists/train.txt").write_text(stem)
    path = tmp_path / f"annotations/{stem}.mat"
    save_label(path, (1, 2))
    label = scipy.io.loadmat(path)["S"]
    save(path, label)
    message = heard(CocoStuff10k(root=tmp_path, split="train").read, 0)
    assert re.search(said, message), message
    if name == "version 1.0":
        assert "cocostuff-10k-v1.1.zip" in (ROOT / "scripts/archives.yaml").read_text()
    scipy.io.savemat(path, {"S": label, "names": np.array(["x"] * 182, object)[:, None]})
    CocoStuff10k(root=tmp_path, split="train").read(0)


def test_the_json_of_detail_has_what_is_asked_for(tmp_path):
    path = tmp_path / "trainval_merged.json"
    path.write_text('{"images": [{"image_id": 1}], "annos_segmentation": [{}]}')
    message = heard(detail_index, path)
    listed = re.search(r"expected images with (.*?), and annos_segmentation with (.*)$", message)
    of_image, of_label = ([n for n in re.split(r", | and ", part) if n] for part in listed.groups())
    values = {
        **{"image_id": 1, "file_name": "one.jpg", "height": 2, "width": 2, "phase": "train"},
        **{"category_id": 2, "segmentation": {"counts": [0, 4]}},
    }
    content = {
        "images": [{key: values[key] for key in of_image}],
        "annos_segmentation": [{key: values[key] for key in of_label}],
    }
    path.write_text(json.dumps(content))
    assert detail_index(path).labels("one").tolist() == [[2, 2], [2, 2]]


# --- Batches, memory, devices -------------------------------------------------------------------


STATED = {
    "compiler": ("trainer.compile=true", r"install a C\+\+ compiler, or set (\S+)$", ("{0}",)),
    "device": ("trainer.device=cuda", r"; use (\S+)$", ("{0}",)),
    "float16": (
        "trainer.precision=float16",
        r"cpu has (\w+) or (\w+)$",
        ("trainer.precision={0}", "trainer.precision={1}"),
    ),
    "sweep": ("seed=1,2", r"start (torchrun) once per run instead$", ("seed=1", "seed=2")),
    "mean of all positions": (
        "model/head=pspnet data.batch_size=1",
        r"give (data\.batch_size=2) or more$",  # a larger crop would not help
        ("model/head=pspnet {0}",),
    ),
    "crop alone": (
        "evaluation=multi_scale evaluation.crop=[32,32]",
        "(give both, or neither)",
        ("evaluation=multi_scale", "evaluation=multi_scale evaluation.crop=[32,32] {stride}"),
    ),
    "mmseg alone": (
        "evaluation=mmseg_single evaluation.crop=[32,32]",
        "(give both, or neither)",
        ("evaluation=mmseg_single", "evaluation=mmseg_single evaluation.crop=[32,32] {stride}"),
    ),
    "long stride": (
        "evaluation=sliding evaluation.crop=[32,32] evaluation.stride=[40,40]",
        r"is larger than crop=\[(\d+), (\d+)\]",
        ("evaluation=sliding evaluation.crop=[32,32] evaluation.stride=[{0},{1}]",),
    ),
    "reduction": (
        "model.head.reduction=5",
        r"channels=(\d+) is not divisible by",
        ("model.head.reduction={0}",),
    ),
    "width": (
        "model.backbone.width=0",
        "(a positive number of channels)",
        ("model.backbone.width=8",),
    ),
    "two sides": ("data.size=[48]", r"two whole numbers of at least 1, (\S+)$", ("{0}",)),
    "words": ("data.size=wide", r"two whole numbers of at least 1, (\S+)$", ("{0}",)),
    "small scene": (
        "data.size=[8,8]",
        r"(\d+) or more high, at least as wide as",
        ("data.size=[{0},96]",),
    ),
    "pictures of a split": (
        "data.lengths={{train:12,val:0,test:1}}",
        r"must give split 'val' (\d) picture or more",
        ("data.lengths={{train:12,val:{0},test:1}}",),
    ),
    "split of scenes": (
        "data.val_split=dev",
        r"is not one of train, val, (\w+)",
        ("data.val_split={0}",),
    ),
}
"""Settings, what their message says, and the settings that it leads to."""


@pytest.mark.parametrize("name", STATED)
def test_what_a_message_states_is_taken(name, door, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed, pattern, advised = STATED[name]
    stride = "evaluation.stride=[16,16]"
    with monkeypatch.context() as patch:
        if name == "sweep":
            world = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
            for variable, value in world.items():
                patch.setenv(variable, value)
        flags = ("-m",) if name == "sweep" else ()
        message = door.refused("train", *flags, *typed.format().split())
    found = re.search(pattern, message, re.MULTILINE)
    assert found, message
    for settings in advised:
        right = settings.format(*found.groups(), stride=stride)
        door.follow("train", *right.split(), "data.cue_radius=1")


def test_a_smaller_batch_is_filled(door):
    message = door.refused("train", "data.batch_size=100")
    count, key = re.search(r"^(\d+) samples .* use a smaller (\S+)$", message).groups()
    door.follow("train", f"{key}={count}", trains=True)


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


def test_bad_samples_are_mended_or_removed(door, tmp_path):
    root = plant(tmp_path / "data", splits=(("train", 8), ("val", 1)))
    for i in range(5):
        path = root / f"images/train/train_{i}.png"
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
        content = path.with_suffix(".bmp").read_bytes()
        path.with_suffix(".bmp").write_bytes(content[: len(content) // 2])
    typed = (*own(root), "data.on_bad_sample=skip", "trainer.steps=6")
    message = door.call("train", *door.defaults("train", typed), code=2, trains=True)
    pattern = r"mend or remove them \(tools/(\w+)\.py (\S+) finds all\)"
    name, setting = re.search(pattern, message).groups()
    found = door.refused(name, *own(root), setting, "show=10", f"output={tmp_path / 'o'}")
    assert "5 problems in all" in found
    report = json.loads((tmp_path / "o/report.json").read_text())
    for problem in report["splits"]["train"]["problems"]:
        Path(problem.partition(": ")[0]).unlink()
    door.follow("train", *typed, trains=True)


def test_workers_without_room_or_memory(door):
    message = str(workers.shared_memory_error())
    dead = types.SimpleNamespace(pid=1, exitcode=-signal.SIGKILL)
    killed = str(workers.exit_error([dead], lambda: ["x"]))
    pattern = r"(data\.num_workers=0) needs none, .*size=2g (\S+)$"
    setting, path = re.search(pattern, message).groups()
    assert Path(path).is_dir()
    for program in ("docker run --shm-size=2g", "mount -o remount,size=2g"):
        assert program in message
    assert setting.startswith(re.search(r"fewer (data\.num_workers) need less", killed)[1])
    door.follow("train", setting)


def composed(*settings):
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return check(hydra.compose("train", settings))


def test_a_device_that_is_here(door, monkeypatch, tiny_checkpoint, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    typed = (f"checkpoint={tiny_checkpoint}", f"output={tmp_path / 'o'}")
    setting = re.search(r"; use (\S+)$", door.refused("eval", *typed, "device=cuda"))[1]
    door.follow("eval", *typed, setting)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_process_per_device(monkeypatch, number):
    """More processes are refused by all of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = heard(choose_device, "auto")
    assert message.startswith("3 processes on a machine with 2 CUDA device(s)")
    count = re.search(r"with (\d+) CUDA device\(s\): start one process per device", message)[1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
    if number < 2:
        assert choose_device("cuda") == torch.device("cuda", number)


def test_gradients_that_are_too_large_for_float16(door, tmp_path):
    step = make_trainer(tmp_path, accumulate=1, steps=30).train_step
    step.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    for number in range(30):
        step([batch(number)], number)
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


def test_a_batch_norm_gets_several_values(door, root):
    typed = ("data.crop=[32,32]", "data.batch_size=1", "model.backbone.output_stride=32")
    message = door.refused("train", *own(root), *typed)
    pattern = r"give (data\.batch_size=2) or more, or a larger (\S+), or a smaller (\S+)$"
    pair, crop, stride = re.search(pattern, message).groups()
    for changed in (pair, f"{crop}=[64,64]", f"{stride}=16"):
        door.follow("train", *own(root), *typed, changed)


def test_a_plan_needs_a_crop(door):
    typed = ("data=camvid", "data.crop=null", "data/transforms=none", "dry_run=true")
    typed += ("model/head=fcn",)
    setting = re.search(r"set (\S+)$", door.refused("train", *typed))[1]
    reported = door.follow("train", *typed, setting, "data.batch_size=1", "device_memory=0.01")
    assert "512 x 512" in reported


def test_a_crop_that_fits_is_named(door, root):
    typed = [*own(root), "data.batch_size=2", "model.backbone.width=8", "trainer.device=cpu"]
    message = door.refused("train", *typed, "data.crop=[4000,4000]", "device_memory=0.05")
    crop = re.search(r"the largest crop that fits is \[(\d+), (\d+)\]", message)
    height, width = map(int, crop.groups())
    config = composed(*typed, "model.head.reduction=2")
    assert StepSimulator(config, precision=torch.float32).peak(2, height, width) < 0.05 * 2**30
    door.follow("train", *typed, f"data.crop=[{height},{width}]")


def test_memory_that_was_not_enough(door):
    config, cpu = composed(*TINY), torch.device("cpu")
    with pytest.raises(RuntimeError) as short:
        torch.empty(2**52, dtype=torch.uint8)
    for error in (short.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        message = str(advice.explain_shortage(error, config, cpu, training=True))
        assert message.startswith("out of memory on cpu in a step of data.batch_size=2 with 48 x 9")
    other = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert advice.explain_shortage(other, config, cpu, training=True) is None
    pattern = (
        r"order: (\S+), (\S+), a smaller (\S+) with a larger (\S+), a smaller (\S+); (\S+) shows"
    )
    precision, recompute, pair, accumulate, size, plan = re.search(pattern, message).groups()
    door.follow("train", precision, recompute)
    door.follow("train", f"{pair}=3", f"{accumulate}=2", f"{size}=[32,32]")
    assert "largest crop" in door.follow("train", f"{plan}")
    config.data.size = None
    message = str(advice.explain_shortage(MemoryError(), config, cpu, training=True))
    assert "data.batch_size=2; try in this order: trainer.precision=bfloat16, " in message
    message = str(advice.explain_shortage(MemoryError(), config, cpu, training=False))
    setting, key = re.search(r"use (\S+), or a smaller (\S+)$", message).groups()
    door.follow("train", setting)
    door.follow("train", setting, f"{key}=[64,64]", "evaluation.stride=[48,48]")


def test_sums_of_exponentials_or_a_mean(door, tiny_checkpoint, tmp_path):
    saved = checkpoint_format.load(tiny_checkpoint)
    saved["model"]["head.classify.1.bias"][0] = 200
    checkpoint_format.save(tmp_path / "last.pt", saved)
    typed = (f"checkpoint={tmp_path / 'last.pt'}", f"output={tmp_path / 'o'}")
    small = ("evaluation=danet_single", "evaluation.base_size=96", "evaluation.crop=48")
    message = door.refused("eval", *typed, *small)
    door.follow("eval", *typed, re.search(r"take (\S+), which averages", message)[1])


def test_values_of_scenes_and_losses_are_in_their_ranges():
    message = heard(Scenes, split="val", lengths={"val": 1}, size=[48], cue_radius=1)
    assert "must be [height, width]" in message
    Scenes(split="val", lengths={"val": 1}, size=[48, 96], cue_radius=1)
    message = heard(DeepSupervision, CrossEntropy(), weights={"position": -1.0})
    low = float(re.search(r"is not a finite number >= (\d)", message)[1])
    DeepSupervision(CrossEntropy(), weights={"position": low})


# --- Caches -------------------------------------------------------------------------------------


class System:
    """Stands for the module ``os`` with something else in it."""

    def __init__(self, **changed):
        vars(self).update(changed)

    def __getattr__(self, name):
        return getattr(os, name)


def test_a_cache_that_is_full_gets_more_room(door, root, tmp_path):
    cached = (*own(root), "data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}")
    reported = door.follow("train", *cached, "data.cache_gib=1e-9", trains=True)
    key = re.search(r"decoded every time; see (\S+)", reported)[1]
    shutil.rmtree(tmp_path / "cache")
    assert "is full" not in door.follow("train", *cached, f"{key}=0.1", trains=True)


def test_there_are_systems_without_caches(door, root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "os", System(name="nt"))
    cached = (*own(root), f"data.cache_dir={tmp_path / 'cache'}")
    setting = re.search(r"; use (\S+)$", door.refused("train", *cached, "data.cache=disk"))[1]
    door.follow("train", *cached, setting)


@pytest.mark.parametrize("name", ["no shared memory", "memory of others"])
def test_a_disk_takes_the_place_of_memory(name, door, root, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SHARED_MEMORY", tmp_path / "shm")
    if name == "memory of others":
        (tmp_path / "shm").mkdir()
        monkeypatch.setattr(cache, "os", System(getuid=lambda: os.getuid() + 1))
    cached = (*own(root), f"data.cache_dir={tmp_path / 'cache'}")
    setting = re.search(r"; use (\S+)$", door.refused("train", *cached, "data.cache=ram"))[1]
    door.follow("train", *cached, setting)


# --- Weights of others --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnets(tmp_path_factory):
    """Files of torchvision's ResNets with random weights, by depth."""
    folder = tmp_path_factory.mktemp("resnets")
    for depth in (18, 34):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        torch.save(state, folder / f"resnet{depth}.pth")
    return {depth: folder / f"resnet{depth}.pth" for depth in (18, 34)}


def test_weights_are_fetched_on_another_machine(door, resnets, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    entry = torchvision.models.get_model_weights("resnet18").IMAGENET1K_V1
    monkeypatch.setattr(type(entry), "get_state_dict", no_network)
    typed = ("model/backbone=resnet18", "model.head.reduction=8")
    key = "model.backbone.weights"
    message = door.refused("train", *typed, f"{key}=IMAGENET1K_V1")
    address, setting = re.search(
        r": (https://\S+) could .* fetch it on another machine and set (\S+)=FILE$", message
    ).groups()
    assert (address, setting) == (entry.url, key)
    door.follow("train", *typed, f"{setting}={resnets[18]}")


def test_an_entry_of_torchvision_is_named(door, resnets, monkeypatch):
    typed = ("model/backbone=resnet18", "model.head.reduction=8")
    message = door.refused("train", *typed, "model.backbone.weights=IMAGENET")
    names = re.search(r"neither a file nor a weight entry .* \(([\w, ]+)\)$", message)[1]
    name = names.split(", ")[-1]
    entry = torchvision.models.get_model_weights("resnet18")[name]
    state = torch.load(resnets[18])
    monkeypatch.setattr(type(entry), "get_state_dict", lambda *_, **__: state)
    door.follow("train", *typed, f"model.backbone.weights={name}")


def test_weights_and_network_have_one_depth(door, resnets):
    head, key = "model.head.reduction=8", "model.backbone.weights"
    message = door.refused("train", "model/backbone=resnet18", head, f"{key}={resnets[34]}")
    choice, depth = re.search(r"set (\S+), or give weights of a ResNet-(\d+)$", message).groups()
    door.follow("train", choice, head, f"{key}={resnets[34]}")
    door.follow("train", "model/backbone=resnet18", head, f"{key}={resnets[int(depth)]}")


def test_weights_to_start_from_have_the_depth_of_the_network(door, run):
    width, typed = "model.backbone.width=8", f"init_from={run / 'last.pt'}"
    message = door.refused("train", "model/backbone=resnet34", width, typed)
    depth, key = re.search(
        r"file has a ResNet-(\d+) .*; set (\S+) to the one of the file, or take another", message
    ).groups()
    door.follow("train", f"{key}=resnet{depth}", width, typed)


def test_weights_of_a_backbone_have_a_setting(door, resnets):
    typed = ("model/backbone=resnet18", "model.head.reduction=8")
    message = door.refused("train", *typed, f"init_from={resnets[18]}")
    place = re.search(r"weights of a backbone alone go to (\S+)$", message)[1]
    door.follow("train", *typed, f"{place}={resnets[18]}")


def test_images_are_normalised_as_in_the_file(door, run):
    saved = checkpoint_format.load(run / "last.pt")
    saved["model"]["mean"][:] = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    checkpoint_format.save(run / "last.pt", saved)
    reported = door.follow("train", f"init_from={run / 'last.pt'}")
    value, key = re.search(
        r"with mean=(\[\S+\]), these .*; (\+\S+)=\[\.\.\.\] sets it", reported
    ).groups()
    reported = door.follow("train", f"init_from={run / 'last.pt'}", f"{key}={value}")
    assert "were normalised" not in reported


LARGE = torch.zeros(2**18)
CONTENTS = {
    "a list": (lambda tensors: [*tensors.values()], "expected a dictionary of tensors, found list"),
    "a number": (lambda tensors: {**tensors, "n": 3}, "expected a dictionary of tensors, but 'n'"),
    "expanded": (
        lambda tensors: {**tensors, "n": torch.zeros(1).expand(9)},
        "save a clone of it",
    ),
    "shared": (
        lambda tensors: {**tensors, **{f"n{i}": LARGE[:] for i in range(99)}},
        "save clones of them",
    ),
}
"""What a file holds, and what is asked for."""


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_of_tensors_holds_what_is_asked_for(name, door, run, tmp_path):
    made, said = CONTENTS[name]
    right = checkpoint_format.load(run / "last.pt")["model"]
    path = tmp_path / "weights.pth"
    wrong = made(right)
    torch.save(wrong, path)
    assert said in door.refused("train", f"init_from={path}")
    cloned = {k: v.clone() for k, v in wrong.items()} if "clone" in said else right
    torch.save(cloned, path)
    door.follow("train", f"init_from={path}")


def test_tensors_of_an_export_have_usual_types(door, run, tmp_path):
    typed = ("export", f"checkpoint={run / 'last.pt'}", "formats=[]", f"output={tmp_path / 'o'}")
    door.follow(*typed)
    path = tmp_path / "o/model.safetensors"
    tensors = safetensors.load_file(path)
    wrong = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    safetensors.save_file(wrong, path)
    typed = (f"checkpoint={tmp_path / 'o'}", f"output={tmp_path / 'scores'}")
    names = re.search(r"is of type torch\.\w+; expected (.*)$", door.refused("eval", *typed))[1]
    assert "torch.float32" in names.split(", ")
    safetensors.save_file(tensors, path)
    door.follow("eval", *typed)


def test_a_field_of_a_checkpoint_is_what_it_must_be(door, run, tmp_path):
    rewrite(run / "last.pt", step=-1)
    typed = (f"checkpoint={run / 'last.pt'}", f"output={tmp_path / 'o'}")
    low = ends_of(door.refused("eval", *typed))[0]
    torch_saved = torch.load(run / "last.pt", weights_only=True)
    checkpoint_format.save(run / "last.pt", {**torch_saved, "step": int(low)})
    door.follow("eval", *typed)


def test_keys_of_a_config_are_texts(door, run, tmp_path):
    saved = checkpoint_format.load(run / "last.pt")
    saved["config"]["data"][None] = 1
    checkpoint_format.save(run / "last.pt", saved)
    typed = (f"checkpoint={run / 'last.pt'}", f"output={tmp_path / 'o'}")
    assert "expected a text" in door.refused("eval", *typed)
    saved["config"]["data"]["a text"] = saved["config"]["data"].pop(None)
    checkpoint_format.save(run / "last.pt", saved)
    door.follow("eval", *typed)


@pytest.mark.skipif(not is_installed("timm"), reason="timm is not installed")
def test_timm_is_installed_or_another_network_taken(door, monkeypatch):
    typed = ("model/backbone=timm", "model.head.reduction=8")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "timm", None)
        message = door.refused("train", *typed)
    assert_installs(re.search(r"is not installed: (.*)$", message)[1], "timm")
    message = door.refused("train", *typed, "model.backbone.name=resnet18q")
    name = re.search(r"; there are (\S+),", message)[1]
    with torch.device("meta"):  # a large one, of which only the name is asked
        TimmBackbone(name=name)


@pytest.mark.skipif(not is_installed("timm"), reason="timm is not installed")
@pytest.mark.parametrize("name", ["timm dilates it not", "timm makes it never"])
def test_a_network_that_timm_can_make(name, door):
    chosen = {"timm dilates it not": "vgg11", "timm makes it never": "mixer_s16_224"}[name]
    typed = ("model/backbone=timm", "model.head.reduction=8", f"model.backbone.name={chosen}")
    message = door.refused("train", *typed)
    found = re.search(r"; take (?:(\S+), or )?another network$", message)
    if chosen == "vgg11":
        key, stride = re.fullmatch(r"model\.backbone\.(\w+)=(\d+)", found[1]).groups()
        with torch.device("meta"):
            TimmBackbone(name=chosen, **{key: int(stride)})
    else:
        assert found[1] is None, "it would not help"
    door.follow("train", *typed[:2], "model.backbone.name=resnet18")


# --- Other programs' files ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A file as the authors' code names it: a ResNet-18 with a head for 11 classes."""
    folder = tmp_path_factory.mktemp("official")
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        settings = ["data=camvid", "data.root=/x", "model/backbone=resnet18"]
        network = make_model(check(hydra.compose("train", settings)))
    names = {ours: theirs for theirs, ours in PROGRAMS["official"].names.items()}
    state = {}
    for name, tensor in network.state_dict().items():
        start = max((ours for ours in names if name.startswith(ours)), key=len, default=None)
        if start:
            state[names[start] + name[len(start) :]] = tensor
    torch.save({"state_dict": state}, folder / "danet.pth")
    return folder / "danet.pth"


def test_weights_of_a_backbone_are_converted(door, resnets, tmp_path):
    typed = [f"input={resnets[18]}", f"output={tmp_path / 'a start.pt'}"]
    message = door.refused("convert", "source=torchvison", *typed)
    source = ends_of(message)[0]
    message = door.refused("convert", "source=official", *typed)
    assert "give the program that wrote it" in message
    message = door.refused("convert", f"source={source}", *typed)
    one, two = re.search(r"as in (data=camvid), or (data=folder \S+)$", message).groups()
    door.follow(
        "convert", f"source={source}", typed[0], f"output={tmp_path / 'two.pt'}", *two.split()
    )
    reported = door.follow("convert", f"source={source}", *typed, one)
    setting = shlex.split(
        re.search(r"it has no head yet: train with (.*)$", reported, re.MULTILINE)[1]
    )
    root = plant(tmp_path / "data", folder="labels")
    network = ("model/backbone=resnet18", "model.head.reduction=8")
    door.follow("train", "data=camvid", f"data.root={root}", *network, *setting)
    message = door.refused("convert", f"source={source}", *typed, one)
    assert "there is such a file already; give another name" in message
    door.follow("convert", f"source={source}", typed[0], f"output={tmp_path / 'other.pt'}", one)
    message = door.refused("convert", f"source={source}", typed[0], f"output={tmp_path / 'x'}", one)
    suffix = re.search(r"expected a name that ends in (\S+)$", message)[1]
    assert (tmp_path / "other").with_suffix(suffix).exists()


def test_a_whole_network_is_converted(door, official, tmp_path):
    typed = ("source=official", f"input={official}")
    message = door.refused("convert", *typed, f"output={tmp_path / 'a.pt'}", "data=cityscapes")
    assert "leave it out, or name the data set the network was trained on" in message
    door.follow("convert", *typed, f"output={tmp_path / 'a.pt'}", "data=camvid")
    reported = door.follow("convert", *typed, f"output={tmp_path / 'a net.pt'}")
    line = re.search(r"^  (python tools/eval.py .*)$", reported, re.MULTILINE)[1]
    _, name, *settings = shlex.split(line)
    root = plant(tmp_path / "data", folder="labels")
    settings = [s.replace("<folder>", str(root)) for s in settings]
    assert (ROOT / name).is_file()
    door.follow("eval", *settings, "evaluation=whole", f"output={tmp_path / 'o'}")
    assumed = re.findall(r"since the file does not tell: (\S+)$", reported, re.MULTILINE)
    reported = door.follow("convert", *typed, f"output={tmp_path / 'b.pt'}", *assumed)
    assert "assumed" not in reported


def test_the_program_is_the_one_that_wrote_the_file(door, official, tmp_path):
    content = torch.load(official)["state_dict"]
    torch.save({**content, "layer_of_mine": torch.zeros(1)}, tmp_path / "file.pth")
    typed = (f"input={tmp_path / 'file.pth'}", f"output={tmp_path / 'a.pt'}")
    message = door.refused("convert", "source=torchvision", *typed, "data=camvid")
    assert message.endswith("is source= right?")
    door.follow("convert", "source=official", *typed)


# --- What the other tools say -------------------------------------------------------------------


@pytest.fixture
def network(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint in a folder of its own."""
    (tmp_path / "net").mkdir()
    return shutil.copy(tiny_checkpoint, tmp_path / "net/best.pt")


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "pictures/p.png"
    save_photo(path)
    return path


EVAL = {
    "boundary_ratio": ("eval", "boundary_ratio=2"),
    "predict batch": ("predict", "batch_size=0"),
    "predict opacity": ("predict", "opacity=2"),
    "predict kinds": ("predict", "write=[x]"),
    "count": ("visualize", "count=0"),
    "channels": ("visualize", "channels=0"),
    "opacity": ("visualize", "opacity=2"),
    "formats": ("export", "formats=[x]"),
    "sizes": ("export", "sizes=[[1,1]]"),
    "opset": ("export", "opset=3"),
}
"""A tool and a setting that is out of its range."""


@pytest.mark.parametrize("name", EVAL)
def test_settings_of_tools_at_their_ends(name, door, network, picture, tmp_path):
    program, wrong = EVAL[name]
    key = wrong.partition("=")[0]
    typed = [f"checkpoint={network}", f"output={tmp_path / 'o'}"]
    typed += [f"images={picture.parent}"] if program == "predict" else []
    typed += ["formats=[]"] if name in ("sizes", "opset") else []
    message = door.refused(program, *typed, wrong)
    if key in ("write", "formats"):
        names = re.search(r"expected some of ([\w, ]+?)[,;] (?:or|safe)", message)[1].split(", ")
        names = [] if key == "formats" else names  # what they write takes its time, and is tested
        values = [f"[{','.join(names)}]", "[]"]
    elif name == "sizes":
        values = [f"[{ends_of(message)[0]}]"]
    else:
        values = ends_of(message)
    assert values, message
    for value in values:
        door.follow(program, *typed, f"{key}={value}")


def test_formats_that_are_named_are_known(door, network):
    message = door.refused("export", f"checkpoint={network}", "formats=[onx]")
    assert re.search(
        r"did you mean (\w+)\?; expected some of (\w+), (\w+); ", message
    ).groups() == (*("onnx", "onnx", "torch"),)
    assert list(export.FORMATS) == ["onnx", "torch"]


def test_scores_are_those_of_eval(door, network, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("{}")
    typed = ("export", f"checkpoint={network}", "formats=[]", f"output={tmp_path / 'o'}")
    message = door.refused(*typed, f"metrics={path}")
    name = re.search(r"not a metrics.json of tools/(\w+)\.py$", message)[1]
    door.follow(name, f"checkpoint={network}", f"output={tmp_path / 'scores'}")
    door.follow(*typed, f"metrics={tmp_path / 'scores/metrics.json'}")


def test_an_export_of_another_step_is_left_alone(door, network, tmp_path):
    typed = ("export", f"checkpoint={network}", "formats=[]")
    door.follow(*typed, f"output={tmp_path / 'o'}")
    (tmp_path / "o/model.pt2").write_bytes(b"a program")
    saved = checkpoint_format.load(network)
    checkpoint_format.save(network, {**saved, "step": 9})
    message = door.refused(*typed, f"output={tmp_path / 'o'}")
    assert "name another folder, or remove it" in message
    door.follow(*typed, f"output={tmp_path / 'other'}")
    shutil.rmtree(tmp_path / "o")
    door.follow(*typed, f"output={tmp_path / 'o'}")


@pytest.mark.parametrize("name", ["another network", "another picture"])
def test_predictions_of_others_are_left_alone(name, door, network, picture, tmp_path):
    typed = [f"checkpoint={network}", f"images={picture}", "write=[index]"]
    door.follow("predict", *typed, f"output={tmp_path / 'o'}")
    if name == "another network":
        saved = checkpoint_format.load(network)
        saved["model"]["head.classify.1.bias"][0] += 1
        checkpoint_format.save(network, saved)
    else:
        other = tmp_path / "others/p.png"
        save_photo(other)
        typed[1] = f"images={other}"
    message = door.refused("predict", *typed, f"output={tmp_path / 'o'}")
    assert "name another folder, or remove it" in message
    door.follow("predict", *typed, f"output={tmp_path / 'other'}")
    shutil.rmtree(tmp_path / "o")
    door.follow("predict", *typed, f"output={tmp_path / 'o'}")


def test_results_lie_elsewhere(door, network, picture, tmp_path):
    typed = (f"checkpoint={network}", f"images={picture.parent}")
    message = door.refused("predict", *typed, f"output={picture.parent / 'o'}")
    assert "name a folder elsewhere" in message
    door.follow("predict", *typed, f"output={tmp_path / 'o'}")


def test_points_or_classes(door, network, picture, tmp_path):
    typed = [f"checkpoint={network}", f"images={picture}", f"output={tmp_path / 'o'}"]
    message = door.refused("visualize", *typed, "points=[4,5]")
    points = re.search(r"expected pairs of pixels, (points=\S+)$", message)[1]
    wide = tmp_path / "wide/w.png"
    wide.parent.mkdir()
    Image.new("RGB", (320, 64)).save(wide)
    typed[1] = f"images={wide}"
    door.follow("visualize", *typed, points)
    message = door.refused("visualize", *typed, "by_class=true", points)
    assert "leave points out, or by_class" in message
    door.follow("visualize", *typed, points)
    door.follow("visualize", *typed, "by_class=true")
    names = re.search(r"; it has (.*)$", door.refused("visualize", *typed, "classes=[qq]"))[1]
    door.follow("visualize", *typed, f"classes=[{names.split(', ')[0]}]")
    message = door.refused("visualize", *typed, "report=true")
    assert message == "report=true scores a split: leave images out"
    small = (typed[0], typed[2], "attention=false", "count=1")
    door.follow("visualize", *small, "report=true")


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """Cityscapes with a test split, and a network for it after one step."""
    folder = tmp_path_factory.mktemp("streets")
    grow(folder / "data", "streets")
    save_photo(folder / "data/leftImg8bit/test/ulm/ulm_000000_000019_leftImg8bit.png")
    door = Door(None, folder)
    data = ("data=cityscapes", f"data.root={folder / 'data'}", "data.batch_size=1")
    call("train", *door.defaults("train", [*data, "model/head=fcn", f"run.dir={folder / 'run'}"]))
    return folder


def test_a_split_without_labels_is_submitted(door, streets, tmp_path):
    typed = (f"checkpoint={streets / 'run/last.pt'}", "split=test", "device=cpu")
    key = re.search(r"; (\w+)=<folder> writes predictions", door.refused("eval", *typed))[1]
    door.follow("eval", *typed, f"{key}={tmp_path / 'sent'}")
    message = door.refused("eval", *typed, f"{key}={tmp_path / 'sent'}")
    assert message.endswith("; remove it or name another folder")
    door.follow("eval", *typed, f"{key}={tmp_path / 'again'}")
    while message is not None:
        there = Path(re.search(r": (\S+) is there from", message)[1])
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        message = door.attempt("eval", *typed, f"{key}={tmp_path / 'sent'}")


def test_a_split_with_labels_is_scored(door, streets, network, tmp_path):
    typed = (f"checkpoint={network}", f"output={tmp_path / 'o'}")
    message = door.refused("eval", *typed, f"submission={tmp_path / 'sent'}")
    assert "leave submission= away to score a split with labels" in message
    door.follow("eval", *typed)
    typed = (f"checkpoint={streets / 'run/last.pt'}", f"output={tmp_path / 'r'}", "count=1")
    message = door.refused("visualize", *typed, "split=test", "report=true")
    setting = re.search(r"; (report=true) needs them", message)[1]
    door.follow("visualize", *typed, "split=test")
    door.follow("visualize", *typed, "split=val", setting)


@pytest.mark.parametrize("name", ["mode", "shape"])
def test_a_prediction_has_the_form_of_the_server(name, streets, tmp_path):
    data = Cityscapes(root=streets / "data", split="test")
    writer = SubmissionWriter(tmp_path / "sent", data)
    writer.begin()
    (item,) = data.items
    writer.write(item.name, np.zeros((40, 48), np.uint8))
    (path,) = writer._files.iterdir()
    right = Image.open(path).copy()
    wrong = right.convert("RGB") if name == "mode" else right.crop((0, 0, 20, 20))
    wrong.save(path)
    message = heard(writer.finish)
    said = {"mode": "expected one channel of 8 bits", "shape": "they must be equal"}[name]
    assert said in message
    right.save(path)
    writer.finish()


def test_a_config_of_an_export_is_small(door, network, tmp_path):
    door.follow("export", f"checkpoint={network}", "formats=[]", f"output={tmp_path / 'o'}")
    path = tmp_path / "o/config.json"
    text = path.read_text()
    path.write_text(text + " " * (17 << 20))
    typed = (f"checkpoint={tmp_path / 'o'}", f"output={tmp_path / 'scores'}")
    most = int(re.search(r"expected at most (\d+)$", door.refused("eval", *typed))[1])
    path.write_text(text.ljust(most << 20))
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


@pytest.mark.parametrize("where", ["in the checkout", "elsewhere"])
@pytest.mark.parametrize("extra", ["export", "hub", "timm"])
def test_an_extra_is_installed_from_the_checkout(where, extra, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT if where == "in the checkout" else tmp_path)
    command = extras.how_to_install(extra)
    target = assert_installs(command, extra)
    if where == "in the checkout":
        assert target == f".[{extra}]"


@pytest.mark.skipif(
    not (is_installed("pip") and is_installed("setuptools")), reason="pip or setuptools is missing"
)
def test_pip_takes_the_command(tmp_path):
    copy = tmp_path / "a checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("danet", "datasets", "configs", "tools"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras, "__file__", str(copy / "danet/extras.py"))
        command = extras.how_to_install("export")
    program, verb, *target = shlex.split(command)
    quiet = ["--dry-run", "--no-deps", "--no-build-isolation", "-q", "--no-index"]
    done = subprocess.run(
        [sys.executable, "-m", program, verb, *quiet, *target],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_packages_are_named_where_a_wheel_was_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site/danet/extras.py"))
    needed = ["torch>=2", 'safetensors>=0.5; extra == "export"', "onnx>=1.18 ; extra == 'export'"]
    found = types.SimpleNamespace(read_text=lambda name: None)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: needed)
    command = extras.how_to_install("export")
    assert shlex.split(command) == ["pip", "install", "safetensors>=0.5", "onnx>=1.18"]


def test_what_an_export_needs_is_installed(door, network, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors", None)
        message = door.refused("export", f"checkpoint={network}", "formats=[]")
    assert_installs(re.search(r"safetensors is not installed: (.*)$", message)[1], "export")
    door.follow("export", f"checkpoint={network}", "formats=[]")


@pytest.mark.parametrize("kind", ["packages", "activate", "install"])
def test_another_python_is_named(kind, tmp_path, monkeypatch, capsys):
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    (root / "tools").mkdir()
    shutil.copy(ROOT / "requirements.txt", root)
    shutil.copy(ROOT / "scripts/install.sh", root / "scripts")
    monkeypatch.setattr(interpreter, "missing_packages", lambda root: ["torch", "numpy"])
    python = root / ".venv/bin/python"
    if kind != "install":
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        (python.parent / "activate").write_text("export ACTIVATED=1\n")
    if kind == "packages":
        monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    with pytest.raises(SystemExit):
        interpreter.require_packages(str(root / "tools/train.py"))
    message = capsys.readouterr().err.strip()
    remedy = message.rpartition("; ")[2]
    words = shlex.split(remedy)
    if kind == "packages":
        assert words[1:4] == ["-m", "pip", "install"]
        assert (Path(words[0]).is_file(), Path(words[-1]).is_file()) == (True, True)
    elif kind == "install":
        assert words[0] == "bash"
        assert Path(words[1]).is_file()
        assert words[2:4] == ["&&", "source"]
        assert Path(words[4]).is_relative_to(root)
    else:
        done = subprocess.run(
            ["bash", "-c", f"{remedy} && echo $ACTIVATED"], capture_output=True, text=True
        )
        assert done.stdout.strip() == "1"


# --- Archives -----------------------------------------------------------------------------------


def load_prepare():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("prepare")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def pack(path, kind):
    """Packs a tiny ADE20K."""
    source = path.parent / f"{path.name}-source"
    top = "ADEChallengeData2016"
    for split, name in (("training", "train"), ("validation", "val")):
        save_photo(source / f"{top}/images/{split}/ADE_{name}_00000001.jpg")
        save_label(source / f"{top}/annotations/{split}/ADE_{name}_00000001.png", (1, 2))
    files = sorted(p for p in source.rglob("*") if p.is_file())
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(source))
    else:
        with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as archive:
            for file in files:
                archive.add(file, file.relative_to(source))
    return path


def prepared(path, root):
    """Runs prepare.py; returns what it refuses, or None."""
    program = load_prepare()
    try:
        program.main(["data=ade20k", f"root={root}", f"archive={path}"])
    except UserError as error:
        return str(error)
    return None


def test_a_python_without_filters_is_replaced(door, tmp_path, monkeypatch):
    path = pack(tmp_path / "ade.zip", "zip")
    with monkeypatch.context() as old:
        old.delattr(tarfile, "data_filter")
        assert "take 3.10.12, 3.11.4, 3.12 or later" in prepared(path, tmp_path / "root")
    assert prepared(path, tmp_path / "root") is None


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "tar cut between two files"])
def test_a_damaged_archive_is_fetched_again(kind, door, tmp_path):
    kind, *between = kind.split(maxsplit=1)
    path = pack(tmp_path / f"ade.{kind}", kind)
    whole = path.read_bytes()
    end = len(whole) // 3
    if between:
        with tarfile.open(path) as archive:
            end = archive.getmembers()[1].offset
    path.write_bytes(whole[:end])
    assert prepared(path, tmp_path / "root").endswith("; fetch it again")
    path.write_bytes(whole)
    assert prepared(path, tmp_path / "root") is None


@pytest.mark.parametrize("way", ["renamed", "fetched"])
def test_an_archive_with_another_checksum(way, door, tmp_path, monkeypatch):
    path = pack(tmp_path / "ADEChallengeData2016.zip", "zip")
    message = prepared(path, tmp_path / "root")
    assert "fetch it again (an archive you packed yourself needs another name)" in message
    if way == "renamed":
        path = path.rename(tmp_path / "mine.zip")
    else:
        program, digest = load_prepare(), hashlib.sha1(path.read_bytes()).hexdigest()
        monkeypatch.setitem(program.LAYOUTS["ade20k"]["checksums"], path.name, f"sha1:{digest}")
    assert prepared(path, tmp_path / "root") is None


@pytest.mark.parametrize("way", ["moved", "another root"])
def test_a_file_in_the_way_is_moved(way, door, tmp_path):
    path = pack(tmp_path / "ade.zip", "zip")
    there = tmp_path / "root/ADEChallengeData2016/images/training/ADE_train_00000001.jpg"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"another")
    message = prepared(path, tmp_path / "root")
    assert "move it away or choose another root" in message
    if way == "moved":
        Path(message.partition(": ")[0]).rename(tmp_path / "away")
    root = tmp_path / ("root" if way == "moved" else "other")
    assert prepared(path, root) is None


def test_what_comes_in_the_way_is_moved(door, tmp_path, monkeypatch):
    path, place = pack(tmp_path / "ade.zip", "zip"), tmp_path / "root/ADEChallengeData2016"
    with monkeypatch.context() as patch:  # called when all is unpacked and nothing in its place
        patch.setattr(os, "sync", lambda: place.write_text("came meanwhile"))
        message = prepared(path, tmp_path / "root")
    assert message.startswith(f"{place}")
    assert "run the same command again when this is mended: ade.zip starts anew" in message
    place.rename(tmp_path / "away")
    assert prepared(path, tmp_path / "root") is None


def test_the_next_command_is_the_check(door, tmp_path, capsys):
    assert prepared(pack(tmp_path / "ade.zip", "zip"), tmp_path / "a root") is None
    line = re.search(r"^next: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    program, name, *typed = shlex.split(line)
    assert (program, name) == ("python", "tools/check_data.py")
    door.follow("check_data", *typed)
