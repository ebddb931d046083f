"""The best score of a run, by ``trainer.best_by``, and for how long there was no better one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from danet.checkpoint.format import Checkpoint
from danet.engine.settings import TrainSettings


@dataclass
class Best:
    """The best score so far; a checkpoint holds all of it, so a resumed run ends where it would.

    Attributes:
        score: None before the first.
        step: Of that score; 0 where an old checkpoint does not say it.
        misses: Evaluations in a row since then.
    """

    settings: TrainSettings
    score: float | None = None
    step: int = 0
    misses: int = 0

    @classmethod
    def of(cls, saved: Checkpoint, settings: TrainSettings) -> "Best":
        """Return that of a checkpoint; old ones begin to count with the first evaluation."""
        step, misses = saved.get("best_step", 0), saved.get("evaluations_since_best", 0)
        return cls(settings, saved["best_score"], step, misses)

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        found = {"best_score": self.score, "best_step": self.step}
        return {**found, "evaluations_since_best": self.misses}

    def update(self, score: float, step: int) -> None:
        """Compare the score of an evaluation; one that is not finite is never the best."""
        merit = self.settings.merit
        if math.isfinite(score) and (self.score is None or merit(score) > merit(self.score)):
            self.score, self.step, self.misses = score, step, 0
        else:
            self.misses += 1

    def is_final(self) -> bool:
        """Return whether ``trainer.patience`` is used up."""
        return self.settings.patience is not None and self.misses >= self.settings.patience

    def why_final(self) -> str:
        """Return for how long there was no better score."""
        label = _label(self.settings.best_by)
        best = self.shown().removeprefix(f"{label} ")
        return f"{label} did not improve in the last {self.misses} evaluation(s) (best {best})"

    def shown(self) -> str:
        """Return the score in words, with its step where that is known."""
        by, when = self.settings.best_by, f" at step {self.step}" if self.step else ""
        return f"{_label(by)} {_shown(by, self.score)}{when}"

    def summary(self, scores: Mapping[str, float]) -> str:
        """Return the main scores of an evaluation in one line, with the best one so far."""
        by = self.settings.best_by
        parts = []
        for name in dict.fromkeys(("miou", "pixel_accuracy", "loss", by)):
            best = f" (best {_shown(by, self.score)})" if name == by else ""
            parts.append(f"{_label(name)} {_shown(name, scores[name])}{best}")
        return ", ".join(parts)


def how_it_ended(saved: Checkpoint, settings: TrainSettings) -> str:
    """Return where and why the run of a checkpoint ended; "" where steps are left to train."""
    best, step, steps = Best.of(saved, settings), saved["step"], settings.steps
    is_early = step < steps and best.is_final()
    if saved["evaluated_at"] < step or not (is_early or step >= steps):
        return ""
    why = f": {best.why_final()}; trainer.patience=null, or above {best.misses}, goes on"
    return f"at step {step} of {steps}{why if is_early else '; a higher trainer.steps goes on'}"


def _label(name: str) -> str:
    if name.startswith("iou/"):
        return f"IoU of {name.removeprefix('iou/')}"
    return {"miou": "mIoU"}.get(name, name.replace("_", " "))


def _shown(name: str, score: float | None) -> str:
    """Format a share 0..1 as a percentage, and a loss as it is; a dash where there is none."""
    if score is None or math.isnan(score):
        return "-"
    return f"{score:.4f}" if name == "loss" else f"{100 * score:.2f}"
