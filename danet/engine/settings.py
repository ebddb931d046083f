"""The settings of the trainer; free of torch, which the command line need not wait for."""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")

_SAVING = "saving changes no weight"
_CHOICES = {
    "precision": ("auto", "float32", "bfloat16", "float16"),
    "on_storage_error": ("stop", "warn"),
    "device": ("auto", "cpu", "cuda"),
}


def resumable(default: T, reason: str) -> T:
    """Return a dataclass field that may have another value in a resumed run.

    Args:
        default: Of the field.
        reason: Why the value does not change what a training step computes.
    """
    made: Any = field(default=default, metadata={"resumable": reason})
    return made


@dataclass
class TrainSettings:
    """The config group ``trainer``.

    Args:
        steps: Updates of the weights in the whole run.
        stop_at: End early after this step, with a checkpoint and the schedule of the whole run.
        eval_every, log_every: In steps; evaluation writes last.pt (and best.pt).
        accumulate: Batches per update; the effective batch is
            ``data.batch_size * accumulate * processes``.
        clip_norm: Upper bound of the gradient's norm; null for none.
        precision: Of the network: float32, bfloat16, float16 (CUDA only), or auto: bfloat16 where
            the hardware computes in it, else float32. Weights and losses are float32 always.
        save_every: Steps between checkpoints beside those after evaluations; null for none.
        save_minutes: A checkpoint is written when there was none for so long; null for none.
        keep_last, keep_best: How many of the newest and of the best checkpoints stay.
        keep_every: Checkpoints of steps that are a multiple of it stay for ever; null for none.
        save_in_background: Write checkpoints in a thread, while training continues.
        on_storage_error: What a checkpoint that cannot be written does: ``stop`` ends the run,
            ``warn`` continues without it; the last one must be written in either case.
        channels_last: Memory order of images and convolutions; null for what suits the device.
        compile: Train through torch.compile, which takes minutes at the start and needs a C++
            compiler (on CUDA also Triton). Evaluation is not compiled.
        ema_decay: Evaluate and keep a moving average of the weights; null for none.
        sync_batchnorm: Batch statistics over all processes, on CUDA with more than one.
        device: auto, cpu or cuda.
        deterministic: Ask torch for deterministic kernels (CUDA; slower).
        seed: Of dropout, together with the step and the process.
        profile: Record steps 6 to 10 of this start: a trace, the top costs, the time waiting
            for data; in ``profile/`` of the run's folder.
    """

    steps: int
    stop_at: int | None = resumable(None, "sets where this start ends")
    eval_every: int = resumable(1000, "evaluation changes no weight")
    log_every: int = resumable(20, "logging changes no weight")
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

    def errors(self) -> list[str]:
        """Return what is wrong with the values, one line each."""
        counts = [f.name for f in fields(self) if f.type in (int, int | None) and f.name != "seed"]
        lines = [
            f"trainer.{name}={getattr(self, name)}: expected a whole number of at least 1"
            for name in counts
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        # ``not x > 0`` instead of ``x <= 0``: NaN, which YAML can spell, fails every comparison.
        if self.clip_norm is not None and not self.clip_norm > 0:
            lines.append(f"trainer.clip_norm={self.clip_norm}: expected a number above 0, or null")
        if self.save_minutes is not None and not self.save_minutes >= 0:
            lines.append(
                f"trainer.save_minutes={self.save_minutes}: expected a number of minutes, or null"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            lines.append(f"trainer.ema_decay={self.ema_decay}: expected 0 < decay < 1, or null")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
                lines.append(f"trainer.{name}={value}: expected {expected}")
        return lines
