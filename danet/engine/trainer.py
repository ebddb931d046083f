"""The trainer: one file, read from the top."""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import danet
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import run_folder
from danet.checkpoint.format import Checkpoint
from danet.checkpoint.manager import Saver
from danet.checkpoint.storage import FAILED, Storage
from danet.distributed import collectives, data_parallel
from danet.distributed.agreement import Agreement, Farewell, wait_patiently
from danet.distributed.data_parallel import freeze_unused_parameters
from danet.distributed.failures import naming_gradient_failures
from danet.distributed.signals import SAVE, STOP, Signals, Stop
from danet.engine.ema import MovingAverage
from danet.engine.log import RunLog, class_table
from danet.engine.nonfinite import LossWatch, Overflows, Pace
from danet.engine.optimizer import Recipe, restore, state_of
from danet.engine.precision import choose_memory_format, choose_precision, compiled
from danet.engine.profile import StepProfile
from danet.engine.schedule import Schedule
from danet.engine.settings import TrainSettings
from danet.errors import Interrupted, StorageError
from danet.evaluation.inference import describe
from danet.evaluation.metrics import ConfusionMatrix, single_class_warning
from danet.losses import DeepSupervision, Part, mean_of
from danet.seeds import mix
from danet.types import Batch

Evaluate = Callable[[nn.Module], ConfusionMatrix]
"""Counts this process's share of the validation set."""
DrawPictures = Callable[[nn.Module], Mapping[str, np.ndarray]]
"""Draws pictures of what the network says, uint8 (H, W, 3), by name."""
Divisors = dict[str, list[Tensor]]
"""What the parts of each loss term are divided by."""
Count = Callable[[], Mapping[str, float]]
"""Counts what this process has met, by name; the log has the sums over all processes."""


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
        count: Further numbers for the log, the same names on all processes.
        log_to: Where the log is shown, see danet.engine.trackers.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        criterion: DeepSupervision,
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
        count: Count = dict,
        log_to: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.device = device
        self.schedule = schedule
        self.evaluate = evaluate
        self.draw = draw
        self.count = count
        self.folder = folder
        self.header = dict(header)
        self.criterion = criterion.to(device)
        self.step = 0
        self.overflows = Overflows(device)
        self.evaluated_at = 0
        self.best_miou: float | None = None
        self.scores: dict[str, float] | None = None
        self.last = min(settings.stop_at or settings.steps, settings.steps)

        if collectives.world_size() > 1:
            freeze_unused_parameters(model)
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        distinct = collectives.world_size() > 1 and device.type == "cuda"
        if settings.sync_batchnorm and distinct:
            model = data_parallel.convert_sync_batchnorm(model)
        self.dtype = choose_precision(settings.precision, device)
        self.memory_format = choose_memory_format(settings.channels_last, device, self.dtype)
        self.model = model.to(device).to(memory_format=self.memory_format)
        self.ema: MovingAverage | None = None
        if settings.ema_decay is not None:
            self.ema = MovingAverage(model, settings.ema_decay)
        self.optimizer = recipe(model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if resume is not None:
            self._restore(resume)
        self.parallel: nn.Module = model
        if collectives.world_size() > 1:
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
        self.agreement = Agreement()
        self.saver = Saver(
            folder,
            keep_last=settings.keep_last,
            keep_best=settings.keep_best,
            keep_every=settings.keep_every,
            in_background=settings.save_in_background,
            best=[(pair[0], pair[1]) for pair in resume.get("best", ())] if resume else None,
        )
        self.log = RunLog(
            folder if collectives.is_first() else None,
            step=self.step,
            steps=settings.steps,
            log_to=log_to,
            run_id=str(self.header.get("run_id", "")),
        )
        is_profiled = settings.profile and collectives.is_first()
        self.profile = StepProfile(folder / "profile" if is_profiled else None, device, self.log)
        self.storage = Storage(self.saver, settings.on_storage_error, self.log.warn)
        self.watch = LossWatch(folder)
        self.pace = Pace(device)

    def fit(self, batches: Iterator[Batch]) -> None:
        """Trains from ``step`` to ``settings.steps`` on batches that do not run out.

        SIGTERM and SIGINT end it after the step, with a checkpoint; SIGUSR1 saves one.

        Raises:
            DivergedError: A loss or a weight is not finite; the last checkpoint is left as it is.
            Interrupted: A signal ended it, and a checkpoint is written.
            StorageError: A checkpoint could not be written.
        """
        try:
            with Signals() as signals:
                try:
                    self._fit(batches, signals)
                except Stop:
                    self._stop(signals.name or "another process")
                self.profile.close()
                self.agreement.close()
                # All processes end alike, and only the first knows what it wrote. The last
                # checkpoint may still be under way, so a signal waits for it.
                if error := collectives.from_first(self.storage.finish()):
                    raise error
            if self.step == self.settings.steps and self.scores:
                settings = {k: v for k, v in self.header["config"].items() if k != "run"}
                self.log.summary(self.step, settings, {**self.scores, "best_miou": self.best_miou})
        finally:
            if error := self.storage.finish():  # of a run that ends for another reason
                self.log.warn(str(error))
            self.log.close()
            self.saver.close()

    def _fit(self, batches: Iterator[Batch], signals: Signals) -> None:
        settings = self.settings
        self.parallel.train()
        self.pace.restart()
        while True:
            due = self.step > 0 and (self.step % settings.eval_every == 0 or self.step == self.last)
            if due and self.evaluated_at < self.step:
                self.save()  # whatever an evaluation meets, the training is not lost
                # Nothing of the training changes in there, so it may be left at any moment.
                with signals.at_once():
                    self._evaluate()
                self.save()
                self.parallel.train()
                self.pace.restart()
            if self.step >= self.last:
                return
            flags = signals.take() | self.storage.flags()
            if collectives.is_first() and self.storage.falls_due(settings.save_minutes):
                flags |= SAVE
            requests = self.agreement.exchange(flags)
            if requests & FAILED:
                raise collectives.from_first(self.storage.finish()) or StorageError("no checkpoint")
            if requests & STOP:
                raise Stop
            if requests & SAVE:
                self.save()

            self.profile.begin()
            start = time.perf_counter()
            group = [next(batches) for _ in range(settings.accumulate)]
            waited = time.perf_counter() - start
            self.pace.note(waited, sum(len(batch.name) for batch in group))
            with naming_gradient_failures(self.step + 1):
                terms = self.train_step(group)
            self.profile.end(waited)
            self.step += 1
            self.watch.note(self.step, [name for batch in group for name in batch.name], terms)
            self.log.advance()

            saves = settings.save_every is not None and self.step % settings.save_every == 0
            often = settings.log_every, settings.eval_every
            is_logged = self.step == self.last or any(self.step % every == 0 for every in often)
            if is_logged or saves or self.watch.is_full:
                # Between evaluations our only wait for the device; torch's SyncBatchNorm has more.
                means = self.watch.look()
                if self.scaler.is_enabled():
                    replay = self.watch.replay(self.step)
                    self.overflows.require_updates(self.step, self.last, replay)
                if is_logged:
                    self._log_train(means)
            if saves:
                self.save()

    def _stop(self, by: str) -> None:
        """Ends the run for a signal, with a checkpoint.

        What asks to be started again is left only if all processes live: after a death this is the
        launcher cleaning up, and the run has failed.
        """
        farewell = Farewell()
        try:
            self.save(together=False)  # it may have come within an evaluation
            error = self.storage.finish()
        finally:
            all_came = farewell.all_arrived()
        if error:
            raise error
        if collectives.is_first() and all_came:
            (self.folder / run_folder.STOPPED).touch()
        raise Interrupted(
            f"stopped by {by} at step {self.step} of {self.settings.steps}; go on with "
            + shlex.quote(f"resume={self.folder / 'last.pt'}")
        )

    def train_step(self, group: list[Batch]) -> dict[str, Tensor]:
        """Updates the weights once; returns the loss terms.

        The gradient is that of the whole global batch: means over pixels are divided by what all
        micro-batches of all processes count. The terms returned are this process's part, so that
        their mean over the processes is the loss.
        """
        divisors = self._divisors(group) if len(group) > 1 else None
        self._seed()
        factor: float | Tensor = self.schedule(self.step, self.settings.steps)
        if self.scaler.is_enabled():
            factor = self.overflows.factor(self.schedule, self.step, self.settings.steps)
        for parameters in self.optimizer.param_groups:
            rate = parameters["base_lr"] * factor
            # Only torch's fused kernels take a rate that is on the device.
            parameters["lr"] = rate if parameters.get("fused") else float(rate)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(group):
            share_gradients = i + 1 == len(group) or self.parallel is self.model
            with nullcontext() if share_gradients else self.parallel.no_sync():  # type: ignore[operator]
                parts = self._forward(batch)
                if divisors is None:
                    divisors = _shared(_divisors_of(parts))
                terms = {name: mean_of(found, divisors[name]) for name, found in parts.items()}
                loss = torch.stack(list(terms.values())).sum()
                self.scaler.scale(loss).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.overflows.note(self.scaler, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, is_first=self.step == 0)
        return sums

    def _seed(self) -> None:
        """Makes dropout depend on the step alone: a resumed run draws what the whole run would."""
        torch.manual_seed(mix(self.seed, self.step, collectives.rank()))

    def _divisors(self, group: list[Batch]) -> Divisors:
        """Returns what the loss of several micro-batches is divided by, before the first backward.

        Masks tell it, but for the pixels that OHEM keeps: those are counted by passes of the
        network that leave no trace.
        """
        masks = [batch.mask.to(self.device, non_blocking=True) for batch in group]
        found = [self.criterion.divisors(mask) for mask in masks]
        if None in found:
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            self._seed()
            with torch.no_grad():
                passes = [self._forward(batch) for batch in group]
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # statistics of batch norms
            found = [_divisors_of(parts) for parts in passes]
        together: dict[str, list[list[Tensor]]] = {}
        for divisors in found:
            for name, values in (divisors or {}).items():
                together.setdefault(name, []).append(values)
        return _shared(
            {
                name: [torch.stack(values).sum() for values in zip(*lists, strict=True)]
                for name, lists in together.items()
            }
        )

    def _forward(self, batch: Batch) -> dict[str, list[Part]]:
        image = batch.image.to(self.device, non_blocking=True)
        image = image.to(memory_format=self.memory_format)
        mask = batch.mask.to(self.device, non_blocking=True)
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=mixed):
            return self.criterion.parts(self.network(image), mask)

    def _log_train(self, means: dict[str, float]) -> None:
        total = sum(means.values())
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        values = {"loss": total, **{f"loss_{name}": value for name, value in means.items()}}
        values |= {"lr": min(rates), "lr_head": max(rates), **self.pace.take()}
        if self.scaler.is_enabled():
            values["skipped"] = self.overflows.total()
        if counts := self.count():
            numbers = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.device)
            values |= zip(counts, collectives.sum_of(numbers, "sum of counters"), strict=True)
        self.log.status(loss=f"{total:.3f}", waiting=f"{values['data_waiting']:.0%}")
        self.log.scalars(self.step, "train", values)

    def _evaluate(self) -> None:
        """Scores the network, or its average where there is one."""
        model = self.ema.module if self.ema is not None else self.model
        collectives.broadcast_buffers(model)
        confusion = self.evaluate(model)
        wait_patiently(f"the evaluation at step {self.step}")
        collectives.sum_in_place(confusion.counts)
        scores = confusion.scores()
        classes = self.header["classes"]
        protocol = self.header.get("config", {}).get("evaluation", {})
        self.log.say(f"step {self.step}: validation, {describe(protocol)}")
        self.log.say(class_table(classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
        if warning := single_class_warning(confusion.matrix, classes):
            self.log.warn(f"step {self.step}: {warning}")
        self.scores = {
            "miou": scores.miou,
            "pixel_accuracy": scores.pixel_accuracy,
            "mean_accuracy": scores.mean_accuracy,
            "frequency_weighted_iou": scores.frequency_weighted_iou,
        }
        per_class = {f"iou/{name}": v for name, v in zip(classes, scores.iou, strict=True)}
        self.log.scalars(self.step, "val", {**self.scores, **per_class})
        if collectives.is_first() and self.log.takes_images():
            self.log.images(self.step, self.draw(model))
        self.best_miou = max(scores.miou, self.best_miou or 0.0)
        self.evaluated_at = self.step
        self.log.say(
            f"  mIoU {100 * scores.miou:.2f} (best {100 * self.best_miou:.2f}), "
            f"pixel accuracy {100 * scores.pixel_accuracy:.2f}"
        )

    def save(self, *, together: bool = True) -> None:
        """Writes a checkpoint of this step, by the first process; of finite weights only.

        ``together``: whether all processes come here at this step. Raises DivergedError.
        """
        self.watch.require_finite(self.model, self.step, together=together)
        if not collectives.is_first():
            return
        is_scored = self.scores is not None and self.evaluated_at == self.step
        state = {
            "format": checkpoint_format.FORMAT,
            "version": danet.__version__,
            **self.header,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": state_of(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "processes": collectives.world_size(),
            "threads": torch.get_num_threads(),
            "step": self.step,
            "skipped": self.overflows.total(),
            "evaluated_at": self.evaluated_at,
            "best_miou": self.best_miou,
            "scores": self.scores,
        }
        score = self.scores["miou"] if is_scored and self.scores else None
        self.storage.save(state, step=self.step, score=score)

    def _restore(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved["model"])
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict({"n_averaged": torch.tensor(0), **saved["ema"]})
        restore(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # of float16 alone
            self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.overflows.resume(saved.get("skipped", 0))
        # Format 1 was written after evaluations only.
        self.evaluated_at = saved["evaluated_at" if "evaluated_at" in saved else "step"]
        self.best_miou = saved["best_miou"]
        self.scores = saved["scores"]


def _divisors_of(parts: Mapping[str, Sequence[Part]]) -> Divisors:
    return {name: [part.divisor for part in found] for name, found in parts.items()}


def _shared(divisors: Divisors) -> Divisors:
    """Returns the means of divisors over the processes: DDP averages the gradients, too."""
    world = collectives.world_size()
    if world == 1:
        return divisors
    flat = torch.stack([divisor for found in divisors.values() for divisor in found]) / world
    collectives.sum_in_place(flat)
    shared = iter(flat.unbind())
    return {name: [next(shared) for _ in found] for name, found in divisors.items()}
