"""The trainer: one file, read from the top."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import danet
from danet.engine import checkpoint, distributed
from danet.engine.average import MovingAverage
from danet.engine.checkpoint import Checkpoint
from danet.engine.log import RunLog, class_table
from danet.engine.optimizer import Recipe
from danet.engine.schedule import Schedule
from danet.engine.settings import TrainSettings
from danet.errors import DivergedError, InputError
from danet.evaluation.confusion import ConfusionMatrix
from danet.seeds import mix
from danet.types import Batch

Evaluate = Callable[[nn.Module], ConfusionMatrix]
"""Counts this process's share of the validation set."""
DrawPictures = Callable[[nn.Module], Mapping[str, np.ndarray]]
"""Draws pictures of what the network says, uint8 (H, W, 3), by name."""


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of autocast; ``auto`` asks the hardware whether bfloat16 is native."""
    if wanted == "float16" and device.type != "cuda":
        raise InputError(f"trainer.precision=float16 needs CUDA; {device} has bfloat16 or float32")
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """Returns the network behind ``torch.compile``, which compiles it when it is first called.

    Raises:
        InputError: torch cannot compile anything for this device, usually for lack of a compiler.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except (RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"trainer.compile=true: torch cannot compile for {device} here ("
            f"{lines[0] if lines else repr(error)}); install a C++ compiler"
            f"{' and Triton' if device.type == 'cuda' else ''}, or set trainer.compile=false"
        ) from error
    return torch.compile(network)  # type: ignore[return-value]


class Trainer:
    """Trains a network for a number of steps, evaluates and saves on the way.

    Args:
        model: Maps images to SegmentationOutput; moved to ``device``.
        criterion: Gives named weighted terms, which are summed.
        recipe: Makes the optimizer.
        schedule: Factor of the base rates by step.
        settings: The config group ``trainer``.
        seed: Of dropout, together with the step.
        device: Where to train.
        evaluate: Counts this process's share of the validation set.
        draw: Pictures for TensorBoard after each evaluation, on the first process.
        folder: Where checkpoints and logs go; written by the first process only.
        header: ``config``, ``classes`` and ``palette`` for the checkpoints.
        resume: A checkpoint to go on from.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: nn.Module,
        recipe: Recipe,
        schedule: Schedule,
        settings: TrainSettings,
        seed: int,
        device: torch.device,
        evaluate: Evaluate,
        draw: DrawPictures,
        folder: Path,
        header: Mapping[str, Any],
        resume: Checkpoint | None = None,
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.device = device
        self.schedule = schedule
        self.evaluate = evaluate
        self.draw = draw
        self.folder = folder
        self.header = dict(header)
        self.criterion = criterion.to(device)
        self.step = 0
        self.best_miou: float | None = None
        self.scores: dict[str, float] | None = None

        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        distinct = distributed.world_size() > 1 and device.type == "cuda"
        if settings.sync_batchnorm and distinct:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.memory_format = (
            torch.channels_last if settings.channels_last else torch.contiguous_format
        )
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.ema: MovingAverage | None = None
        if settings.ema_decay is not None:
            self.ema = MovingAverage(model, settings.ema_decay)
        self.optimizer = recipe(model)
        self.dtype = choose_precision(settings.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if resume is not None:
            self._restore(resume)
        self.parallel: nn.Module = model
        if distributed.world_size() > 1:
            self.parallel = DistributedDataParallel(
                model,
                device_ids=[device.index] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            # Only the first process's statistics count: it saves them, and evaluation shares them.
            # Set here, since releases differ in the name of the argument.
            self.parallel.broadcast_buffers = False
        # A second way to call the network; states keep the names of the first.
        self.network = compiled(self.parallel, device) if settings.compile else self.parallel
        self.log = RunLog(
            folder if distributed.is_first() else None, step=self.step, steps=settings.steps
        )

    def fit(self, batches: Iterator[Batch]) -> None:
        """Trains from ``step`` to ``settings.steps`` on batches that do not run out.

        Raises:
            DivergedError: The loss is not finite; the last checkpoint is left as it is.
        """
        try:
            self._fit(batches)
        finally:
            self.log.close()

    def _fit(self, batches: Iterator[Batch]) -> None:
        settings = self.settings
        last = min(settings.stop_at or settings.steps, settings.steps)
        self.parallel.train()
        waited, since = 0.0, time.perf_counter()
        while self.step < last:
            start = time.perf_counter()
            group = [next(batches) for _ in range(settings.accumulate)]
            waited += time.perf_counter() - start
            terms = self.train_step(group)
            self.step += 1
            self.log.advance()

            evaluating = self.step % settings.eval_every == 0 or self.step == last
            if self.step % settings.log_every == 0 or evaluating:
                # Between evaluations the only wait for the device.
                means = distributed.mean(terms)
                if not all(map(math.isfinite, means.values())):
                    raise DivergedError(f"step {self.step}: the loss is not finite: {means}")
                now = time.perf_counter()
                self._log_train(means, waiting=waited / (now - since))
                waited, since = 0.0, now

            if evaluating:
                is_best = self._evaluate()
                self.save("last.pt", *["best.pt"] * is_best)
                self.parallel.train()
                waited, since = 0.0, time.perf_counter()

    def train_step(self, group: list[Batch]) -> dict[str, Tensor]:
        """Updates the weights once; returns the loss terms, averaged over the group."""
        # Dropout depends on the step alone, so a resumed run draws what the whole run would.
        torch.manual_seed(mix(self.seed, self.step, distributed.rank()))
        factor = self.schedule(self.step, self.settings.steps)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = parameters["base_lr"] * factor
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(group):
            share_gradients = i + 1 == len(group) or self.parallel is self.model
            with nullcontext() if share_gradients else self.parallel.no_sync():  # type: ignore[operator]
                terms = self._forward(batch)
                loss = torch.stack(list(terms.values())).sum() / len(group)
                self.scaler.scale(loss).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach() / len(group)
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, is_first=self.step == 0)
        return sums

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        image = batch.image.to(self.device, non_blocking=True)
        image = image.to(memory_format=self.memory_format)
        mask = batch.mask.to(self.device, non_blocking=True)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            return self.criterion(self.network(image), mask)

    def _log_train(self, means: dict[str, float], *, waiting: float) -> None:
        total = sum(means.values())
        rates = [group["lr"] for group in self.optimizer.param_groups]
        values = {"loss": total, **{f"loss_{name}": value for name, value in means.items()}}
        values |= {"lr": min(rates), "lr_head": max(rates), "data_waiting": waiting}
        self.log.status(loss=f"{total:.3f}", waiting=f"{waiting:.0%}")
        self.log.scalars(self.step, "train", values)

    def _evaluate(self) -> bool:
        """Scores the network (its average, where there is one); tells whether it is the best."""
        model = self.ema.module if self.ema is not None else self.model
        distributed.share_buffers(model)
        confusion = self.evaluate(model)
        distributed.sum_in_place(confusion.counts)
        scores = confusion.scores()
        classes = self.header["classes"]
        self.log.say(f"step {self.step}: validation")
        self.log.say(class_table(classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
        self.scores = {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "frequency_weighted_iou": scores.frequency_weighted_iou,
        }
        per_class = {f"iou/{name}": v for name, v in zip(classes, scores.iou, strict=True)}
        self.log.scalars(self.step, "val", {**self.scores, **per_class})
        if distributed.is_first():
            self.log.images(self.step, self.draw(model))
        is_best = self.best_miou is None or scores.miou > self.best_miou
        if is_best:
            self.best_miou = scores.miou
        self.log.say(
            f"  mIoU {100 * scores.miou:.2f} (best {100 * self.best_miou:.2f}), "  # type: ignore[operator]
            f"pixel accuracy {100 * scores.pixel_accuracy:.2f}"
        )
        return is_best

    def save(self, *names: str) -> None:
        """Writes the whole state under each name; all processes wait until it is done."""
        if distributed.is_first():
            state = {
                "format": checkpoint.FORMAT,
                "version": danet.__version__,
                **self.header,
                "model": self.model.state_dict(),
                "ema": self.ema.state_dict() if self.ema is not None else None,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "processes": distributed.world_size(),
                "step": self.step,
                "best_miou": self.best_miou,
                "scores": self.scores,
            }
            for name in names:
                checkpoint.save(self.folder / name, state)
        distributed.wait()

    def _restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved["model"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.best_miou = saved["best_miou"]
        self.scores = saved["scores"]
