"""Trees of files that are wrong in one way, and both ways in which a user meets them."""

import copy
import functools
import shutil

import numpy as np
import pytest
import yaml
from conftest import plant
from omegaconf import OmegaConf
from PIL import Image
from test_config import compose

from danet.config.validate import check
from danet.engine import run
from danet.errors import InputError
from danet.tools.check_data import examine

CLASSES = "data.classes=[a,b,c,d,e,f,g,h,i,j,k]"
KINDS = {
    "folder": ["data=folder", CLASSES],
    "camvid": ["data=camvid"],
}
"""Name of a data set -> settings that choose it; both have 11 classes."""
LABELS = {"folder": "masks", "camvid": "labels"}
"""Name of a data set -> its folder of labels."""


class Started(Exception):
    """A training has passed all that it looks at before there is a network."""


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


def start_training(settings, monkeypatch):
    """Goes as far as a training goes before the network is made; raises what it raises."""

    def started(_):
        raise Started

    monkeypatch.setattr(run, "make_model", started)
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
