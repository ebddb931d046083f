"""Inputs that are wrong in one way, and the ways in which a user meets them: commands, trees."""

import copy
import functools
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from conftest import call, plant
from omegaconf import OmegaConf
from PIL import Image
from test_config import compose

from danet.config.validate import check
from danet.engine import run
from danet.errors import InputError
from danet.tools import eval as evaluation
from danet.tools.check_data import examine

CLASSES = "data.classes=[a,b,c,d,e,f,g,h,i,j,k]"
KINDS = {"folder": ["data=folder", CLASSES], "camvid": ["data=camvid"]}
"""Name of a data set -> settings that choose it; both have 11 classes."""
LABELS = {"folder": "masks", "camvid": "labels"}
"""Name of a data set -> its folder of labels."""


class Started(Exception):
    """Nothing was found wrong, and the work would have begun."""


@functools.cache
def chosen(name, choice):
    """Composes a config with one choice, which takes Hydra a second."""
    return compose(choice, name=name)


def composed(name, settings):
    """Returns a config as the command line gives it; the first setting chooses the data."""
    config = copy.deepcopy(chosen(name, settings[0]))
    for setting in settings[1:]:
        key, _, value = setting.partition("=")
        OmegaConf.update(config, key, yaml.safe_load(value), merge=False)
    return config


STARTED = "started"
"""In place of an exit code."""


class Seen(NamedTuple):
    """What is left of a command."""

    code: int | str
    out: str
    err: str

    def refused(self, *parts, code=2):
        """Asserts a refusal in plain words that hold all parts; returns them."""
        assert self.code == code, self
        assert self.err.startswith("error: "), self
        assert "Traceback" not in self.err
        assert "weights_only" not in self.err, "no advice to load unsafely"
        for part in parts:
            assert str(part) in self.err, f"{part!r} is not in\n{self.err}"
        return self.err

    def accepted(self, *parts, times=1):
        """Asserts that the work began, and that each part was said so many times."""
        assert (self.code, self.err) == (STARTED, ""), self
        for part in parts:
            assert self.out.count(str(part)) == times, f"{part!r} is not in\n{self.out}"
        return self.out


def _start(*_, **__):
    raise Started


def _run(name, arguments, capsys, module, until):
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, until, _start)
        try:
            code = call(name, *arguments, code=None)
        except Started:
            code = STARTED
    seen = capsys.readouterr()
    return Seen(code, seen.out, seen.err.strip())


def train_command(capsys, *arguments, until="make_dataset"):
    """Runs ``train.py`` until it calls a function that danet.engine.run names."""
    return _run("train", arguments, capsys, run, until)


def eval_command(capsys, *arguments):
    """Runs ``eval.py`` until it would read pictures."""
    return _run("eval", arguments, capsys, evaluation, "predict_split")


def start_training(settings, monkeypatch):
    """Goes as far as a training goes before the network is made; raises what it raises."""

    monkeypatch.setattr(run, "make_model", _start)
    settings = [*settings, "run.name=x", "data.crop=[32,32]", "data.num_workers=0"]
    if not any(setting.startswith("data.batch_size") for setting in settings):
        settings.append("data.batch_size=2")
    config = check(composed("train", settings), needs_data=True)
    run.train(config)


class Site:
    """A tree of pairs in ``root`` that a test damages, and both ways in which a user meets it."""

    def __init__(self, kind, folder, monkeypatch, capsys):
        self.kind, self.folder, self.root = kind, folder, folder / "data"
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def plant(self, **how):
        shutil.rmtree(self.root, ignore_errors=True)
        return plant(self.root, folder=LABELS[self.kind], **{"values": range(11), **how})

    def image(self, name="train_2", suffix=".png"):
        return self.root / "images/train" / f"{name}{suffix}"

    def label(self, name="train_2", suffix=".png"):
        return self.root / LABELS[self.kind] / "train" / f"{name}{suffix}"

    def relabel(self, change):
        """Changes every mask: array in, array out."""
        for path in sorted((self.root / LABELS[self.kind]).rglob("*.png")):
            with Image.open(path) as picture:
                new = change(np.array(picture))
            Image.fromarray(new).save(path)

    def refused(self, *parts, settings=(), root=None):
        """Asserts that both the check and a training refuse the tree, with all parts in both."""
        every = [*KINDS[self.kind], f"data.root={root or self.root}", *settings]
        with pytest.raises(InputError) as error:
            start_training(every, self._monkeypatch)
        reported = {"train": str(error.value)}
        with pytest.raises(InputError) as error:
            self._check(every)
        return self._compare({**reported, "check_data": str(error.value)}, parts)

    def accepted(self, *parts, settings=(), root=None):
        """Asserts that both go on, and that both print all parts, once or more."""
        every = [*KINDS[self.kind], f"data.root={root or self.root}", *settings]
        self._capsys.readouterr()
        with pytest.raises(Started):
            start_training(every, self._monkeypatch)
        reported = {"train": self._capsys.readouterr().out}
        self._check(every)
        return self._compare({**reported, "check_data": self._capsys.readouterr().out}, parts)

    def _check(self, settings):
        config = composed("check_data", [*settings, "data.num_workers=0"])
        examine(config, [], self.folder / "report")

    def _compare(self, reported, parts):
        for tool, text in reported.items():
            assert "Traceback" not in text
            for part in parts:
                assert str(part) in text, f"{tool}: {part!r} is not in\n{text}"
        return reported["train"]
