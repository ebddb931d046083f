"""The training loop. Read ``fit`` first; everything else serves it."""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from danet.checkpoint.format import Checkpoint
from danet.checkpoint.manager import CheckpointManager
from danet.checkpoint.run_folder import STOPPED
from danet.distributed import collectives
from danet.distributed.agreement import Agreement, all_arrived, arrive
from danet.distributed.failures import naming_failures
from danet.distributed.signals import FAIL, SAVE, STOP, Signals, Stop
from danet.engine.best import Best
from danet.engine.log import RunLog
from danet.engine.nonfinite import CHECK_EVERY, NonFiniteGuard
from danet.engine.profile import WAITING, profiling
from danet.engine.settings import AVERAGES
from danet.engine.train_step import TrainStep
from danet.errors import Interrupted, StorageError
from danet.evaluation.metrics import ConfusionMatrix
from danet.types import Batch


@dataclass(eq=False, repr=False)
class Trainer:
    """Trains a network, evaluates it (or its moving average) and saves checkpoints.

    ``evaluate`` scores a network at a step, and returns its loss; all processes call it together
    and get equal numbers. Without it checkpoints are saved at the same steps.
    """

    train_step: TrainStep
    checkpoints: CheckpointManager
    log: RunLog
    evaluate: Callable[[nn.Module, int], tuple[ConfusionMatrix, float]] | None

    def __post_init__(self) -> None:
        self.settings = settings = self.train_step.settings
        self.step = self.evaluated_at = 0
        self.last_step = min(settings.stop_at or settings.steps, settings.steps)
        self.best = Best(settings)
        self.scores: dict[str, float] | None = None
        self.agreement = Agreement()
        self.guard = NonFiniteGuard(self.checkpoints.folder)
        self.restart_clock()

    def fit(self, batches: Iterator[Batch]) -> None:
        """Train from ``step`` to the last step on batches that do not run out.

        Raises:
            DivergedError: A loss or weight is not finite, or float16 overflows in every step; the
                last checkpoint stays as it is.
            Interrupted: SIGTERM or SIGINT ended the run, and a checkpoint is written.
            StorageError: A checkpoint could not be written.
        """
        is_profiled = self.settings.profile and collectives.is_first()
        folder = self.checkpoints.folder / "profile" if is_profiled else None
        profile = profiling(folder, self.log.write)
        with Signals() as signals, self._ending(signals), profile as count_step:
            self.train_step.ddp_model.train()
            self.restart_clock()
            if self.evaluation_due():  # the run was stopped within this evaluation
                self.evaluate_and_save(signals)
            while self.step < self.last_step and not self.is_stopped_early():
                if request := self.agreement.exchange(signals.take() | self.checkpoints.status()):
                    self.obey(request)
                group = self.next_batches(batches)
                with naming_failures(f"gradients of step {self.step + 1}"):
                    terms = self.train_step(group, self.step)
                self.step += 1
                count_step()
                self.guard.append(self.step, [n for batch in group for n in batch.name], terms)
                self.log.advance()
                self.check_and_log()
                if self.evaluation_due():
                    self.evaluate_and_save(signals)
                elif self.checkpoints.due(self.step):
                    self.save()
            if self.is_stopped_early():
                why = f"{self.best.why_final()}; stopped early, trainer.patience"
                self.log.write(f"step {self.step}: {why}")

    def next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        """Return the micro-batches of a step."""
        start = time.perf_counter()
        with record_function(WAITING):
            group = [next(batches) for _ in range(self.settings.accumulate)]
        self._images += sum(len(batch.name) for batch in group)
        self._waited += time.perf_counter() - start
        return group

    def restart_clock(self) -> None:
        """Measure the throughput from now on."""
        self._since, self._waited, self._images = time.perf_counter(), 0.0, 0

    def throughput(self) -> dict[str, float]:
        """Return the figures since the clock was restarted, and restart it.

        ``data_waiting`` is a share of the time, ``images_per_second`` is that of all processes,
        ``memory_gib`` the peak so far: of tensors on CUDA, else of the process (0 on Windows).
        """
        # No synchronize: the check of the losses, just before a line of the log, has waited.
        seconds = max(time.perf_counter() - self._since, 1e-9)  # the resolution of the clock
        peak = 0
        if self.train_step.device.type == "cuda":
            # Of tensors: nvidia-smi shows more, with the allocator's cache and the CUDA context.
            peak = torch.cuda.max_memory_allocated(self.train_step.device)
        elif os.name == "posix":
            import resource  # macOS counts bytes, Linux KiB

            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        # Processes have equal batches: no collective for a figure that only rank 0 writes.
        pace = self._images * collectives.world_size() / seconds
        waiting = self._waited / seconds
        self.restart_clock()
        return {"data_waiting": waiting, "images_per_second": pace, "memory_gib": peak / 2**30}

    def evaluation_due(self) -> bool:
        """Return whether this step is to be evaluated, and has not been."""
        every = self.settings.evaluation_interval()
        is_due = self.step % every == 0 or self.step == self.last_step
        return self.step > 0 and is_due and self.evaluated_at < self.step

    def is_stopped_early(self) -> bool:
        """Return whether the evaluation of this step, before the last, used up the patience."""
        is_before_end = self.step < self.settings.steps
        return is_before_end and self.evaluated_at == self.step and self.best.is_final()

    def check_and_log(self) -> None:
        """Check and log the losses, if this step is one of those where that is done."""
        intervals = self.settings.log_every, self.settings.evaluation_interval()
        is_logged = self.step == self.last_step or any(self.step % n == 0 for n in intervals)
        if is_logged or self.step % CHECK_EVERY == 0 or self.checkpoints.due(self.step):
            losses = self.guard.check()  # while training, the only wait for the device
            replay = self.guard.replay(self.step)
            self.train_step.require_updates(self.step, self.last_step, replay)
            if is_logged:
                figures = {**self.train_step.figures(), **self.throughput()}
                self.log.train(self.step, losses, figures)

    def obey(self, request: int) -> None:
        """Save, stop or fail, as some process requested: the same step on all of them."""
        if request & FAIL:
            error = collectives.from_first(self.checkpoints.finish())
            raise error or StorageError("a checkpoint could not be written")
        if request & STOP:
            raise Stop
        if request & SAVE:
            self.save()

    def evaluate_and_save(self, signals: Signals) -> None:
        """Score the network, or its average, between two checkpoints of the same step."""
        if self.evaluate is None:
            self.evaluated_at = self.step
            return self.save()
        self.save()  # an evaluation that fails must not cost the training before it
        # Evaluation changes nothing of the training, so a signal may end it anywhere.
        with signals.at_once():
            ema, model = self.train_step.ema, self.train_step.model
            confusion, loss = self.evaluate(model if ema is None else ema.module, self.step)
        # Not within, or an evaluation that is repeated would be counted twice.
        scores = self.log.validation(self.step, confusion, loss)
        score = scores[self.settings.best_by]
        self.best.update(score, self.step)
        self.log.write(f"  {self.best.summary(scores)}")
        self.scores = {name: scores[name] for name in (*AVERAGES, "loss")}
        self.evaluated_at = self.step
        self.save(score=score)
        self.train_step.ddp_model.train()
        self.restart_clock()

    def save(self, *, score: float | None = None, on_all: bool = True) -> None:
        """Save a checkpoint of this step; raise DivergedError if a weight is not finite."""
        self.guard.require_finite(self.train_step.model, self.step, on_all=on_all)
        self.checkpoints.save(self.state(), score=score)

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint that training changes."""
        own = {"step": self.step, "evaluated_at": self.evaluated_at, "scores": self.scores}
        return {**self.train_step.state(), **own, **self.best.state()}

    def load_state(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint."""
        self.train_step.load_state(saved)
        self.step, self.evaluated_at = saved["step"], saved["evaluated_at"]
        self.best, self.scores = Best.of(saved, self.settings), saved["scores"]

    @contextmanager
    def _ending(self, signals: Signals) -> Iterator[None]:
        """End the run in good order, however it ends."""
        last_scores: dict[str, float | None] = {}
        try:
            try:
                yield
            except Stop:
                self._stop(signals.name or "another process")
            self.agreement.finish()
            # All processes must end alike, and only rank 0 knows whether its last write worked.
            if error := collectives.from_first(self.checkpoints.finish()):
                raise error
            is_finished = self.step == self.settings.steps or self.is_stopped_early()
            if is_finished and self.scores:
                last_scores = {**self.scores, f"best_{self.settings.best_by}": self.best.score}
        finally:
            self.checkpoints.close()
            self.log.close(last_scores)

    def _stop(self, by: str) -> None:
        """Save a checkpoint and end the run, for a signal.

        The file ``stopped`` asks a scheduler to start the run again. It is written only if all
        processes are alive: after a death the signal is the launcher's, and the run has failed.
        """
        arrive()
        try:
            self.save(on_all=False)  # the signal may have come within an evaluation
            error = self.checkpoints.finish()
        finally:
            have_all_arrived = all_arrived()
        if error:
            raise error
        folder = self.checkpoints.folder
        if collectives.is_first() and have_all_arrived:
            (folder / STOPPED).touch()
        raise Interrupted(
            f"stopped by {by} at step {self.step} of {self.settings.steps}; go on with "
            + shlex.quote(f"resume={folder / 'last.pt'}")
        )
