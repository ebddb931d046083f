"""The settings of the trainer; free of torch, which the command line need not wait for."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")
_SAVING = "saving changes no weight"
_PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")
ONE_GPU = "CUDA_VISIBLE_DEVICES=1 before the command chooses the second GPU"
AVERAGES = ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")
"""Scores of a validation over all classes, as they are logged."""


def resumable(default: T, reason: str) -> T:
    """Return a dataclass field that may differ in a resumed run, since a step computes the same.

    The reason is kept in its metadata, under "resumable".
    """
    made: Any = field(default=default, metadata={"resumable": reason})
    return made


@dataclass
class TrainSettings:
    """The config group ``trainer``; its settings are explained in docs/training.md."""

    steps: int
    stop_at: int | None = resumable(None, "sets where this start ends")
    eval_every: int | None = resumable(None, "evaluation changes no weight")
    log_every: int = resumable(20, "logging changes no weight")
    patience: int | None = resumable(None, "sets where the run ends")
    best_by: str = "miou"
    accumulate: int = resumable(1, "part of the global batch, which is compared as a product")
    clip_norm: float | None = None
    precision: str = "auto"
    save_every: int | None = resumable(None, _SAVING)
    save_minutes: float | None = resumable(10.0, _SAVING)
    keep_last: int = resumable(2, _SAVING)
    keep_best: int = resumable(1, _SAVING)
    keep_every: int | None = resumable(None, _SAVING)
    save_in_background: bool = resumable(True, _SAVING)
    on_storage_error: str = resumable("stop", _SAVING)
    channels_last: bool | None = None
    compile: bool = False
    ema_decay: float | None = None
    sync_batchnorm: bool = True
    device: str = resumable("auto", "runs move between machines")
    deterministic: bool = False
    profile: bool = resumable(False, "profiling changes no weight")
    seed: int = 1

    def evaluation_interval(self) -> int:
        """Return the steps between evaluations, by default a fifth of the run."""
        return self.eval_every or math.ceil(self.steps / 5)

    def merit(self, score: float) -> float:
        """Return a number that is the higher, the better a score is by ``best_by``."""
        return -score if self.best_by == "loss" else score

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one line each."""
        counts = [f.name for f in fields(self) if f.type in (int, int | None) and f.name != "seed"]
        # NaN, which YAML can spell, fails every comparison.
        ranges: list[tuple[str, Callable[[Any], bool], str]] = [
            *((name, lambda n: n >= 1, "a whole number of at least 1") for name in counts),
            ("clip_norm", lambda norm: norm > 0, "a number above 0, or null"),
            ("save_minutes", lambda minutes: minutes >= 0, "a number of minutes, or null"),
            ("ema_decay", lambda decay: 0 < decay < 1, "0 < decay < 1, or null"),
            ("precision", _PRECISIONS.__contains__, "auto, float32, tf32, bfloat16 or float16"),
            ("on_storage_error", ("stop", "warn").__contains__, "stop or warn"),
            (
                *("best_by", lambda name: name in (*AVERAGES, "loss") or name.startswith("iou/")),
                f"iou/<class name>, or one of {', '.join(AVERAGES)}, loss",
            ),
            ("device", ("auto", "cpu", "cuda").__contains__, f"auto, cpu or cuda; {ONE_GPU}"),
        ]
        return [
            f"trainer.{name}={value}: expected {expected}"
            for name, fits, expected in ranges
            if (value := getattr(self, name)) is not None and not fits(value)
        ]
