"""Command lines given to the tools in this process, and what a user sees of it."""

from typing import NamedTuple

import pytest
from conftest import call

import danet.engine.run
from danet.tools import eval as evaluation

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


def _run(name, arguments, capsys, module, until):
    def start(*_, **__):
        raise Started

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, until, start)
        try:
            code = call(name, *arguments, code=None)
        except Started:
            code = STARTED
    seen = capsys.readouterr()
    return Seen(code, seen.out, seen.err.strip())


def train_command(capsys, *arguments, until="make_dataset"):
    """Runs ``train.py`` until it calls a function that danet.engine.run names."""
    return _run("train", arguments, capsys, danet.engine.run, until)


def eval_command(capsys, *arguments):
    """Runs ``eval.py`` until it would read pictures."""
    return _run("eval", arguments, capsys, evaluation, "predict_split")
