"""Command lines given to the tools in this process, and what a user sees of it."""

import sys
from typing import NamedTuple

from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

import danet.engine.run
from danet import cli
from danet.tools import eval as evaluation
from danet.tools import train

STARTED = "started"
"""In place of an exit code: nothing was found wrong, and the work would have begun."""


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


class Started(Exception):
    """Nothing was found wrong."""


def _run(work, name, arguments, monkeypatch, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # cli.run sets it; so it is taken back
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    # It composes everything once more, to ask for a mode that no config here sets.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
    GlobalHydra.instance().clear()
    capsys.readouterr()
    code = 0
    try:
        cli.run(work, name)
    except SystemExit as error:
        code = error.code
    except Started:
        code = STARTED
    seen = capsys.readouterr()
    return Seen(code, seen.out, seen.err.strip())


def _start(*_, **__):
    raise Started


def train_command(*arguments, monkeypatch, capsys, until="make_dataset"):
    """Run ``train.py`` until it calls a function that danet.engine.run names."""
    monkeypatch.setattr(danet.engine.run, until, _start)
    return _run(train.run, "train", arguments, monkeypatch, capsys)


def eval_command(*arguments, monkeypatch, capsys):
    """Runs ``eval.py`` until it would read pictures."""
    monkeypatch.setattr(evaluation, "predict_split", _start)
    return _run(evaluation.run, "eval", arguments, monkeypatch, capsys)
