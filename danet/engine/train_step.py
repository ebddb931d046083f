"""One update of the weights: forward, loss over the global batch, backward, optimizer."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from danet.checkpoint.format import Checkpoint
from danet.distributed import collectives, data_parallel
from danet.engine import global_batch
from danet.engine.ema import ModelEMA
from danet.engine.optimizer import restore, state_of
from danet.engine.precision import choose_memory_format, choose_precision, compiled
from danet.engine.schedule import Schedule
from danet.engine.settings import TrainSettings
from danet.errors import DivergedError
from danet.losses import DeepSupervision, Part, mean_of
from danet.seeds import mix
from danet.types import Batch

MOST_OVERFLOWS = 30
"""Overflows in a row after which a float16 run ends; each halves the loss scale."""


class TrainStep:
    """Updates a network from the micro-batches of a step; owns all that an update changes.

    Args:
        model: Maps images to a SegmentationOutput; on the device that trains.
        criterion: Gives named, weighted loss terms, which are summed.
        optimizer: Over the parameters of the model; its groups have ``base_lr``.
        schedule: Factor of the base rates by step.
        settings: The config group ``trainer``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: DeepSupervision,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        settings: TrainSettings,
    ) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.schedule, self.settings = schedule, settings
        self.device = device = next(model.parameters()).device
        self.dtype = choose_precision(settings.precision, device)
        self.memory_format = choose_memory_format(settings.channels_last, device, self.dtype)
        self.ema = ModelEMA(model, settings.ema_decay) if settings.ema_decay is not None else None
        # A disabled scaler passes everything through: one code path for all precisions.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # Steps that float16 overflows let the scaler skip: in all, and in a row up to now.
        self.overflows = torch.zeros(2, dtype=torch.int64, device=device)
        self.ddp_model = model
        if collectives.world_size() > 1:
            self.ddp_model = data_parallel.wrap(model, device)
        # The compiled network shares its weights, and states keep the names of the plain one.
        self.compiled_model = self.ddp_model
        if settings.compile:
            self.compiled_model = compiled(self.ddp_model, device)

    def __call__(self, group: list[Batch], step: int) -> dict[str, Tensor]:
        """Update the weights once; return the loss terms of this process, scalars on the device.

        The gradient is that of the global batch: each term is divided by what all micro-batches of
        all processes count, and the mean of the returned terms over the processes is the loss.

        Args:
            group: Micro-batches, on the CPU.
            step: Updates done before.
        """
        divisors = self._divisors(group, step) if len(group) > 1 else None
        self._seed(step)
        factor = self.schedule(step, self.settings.steps)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["base_lr"] * factor
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(group):
            # DDP averages the gradients in the last backward pass of a step alone.
            is_last = i + 1 == len(group) or self.ddp_model is self.model
            with nullcontext() if is_last else self.ddp_model.no_sync():  # type: ignore[operator]
                parts = self._forward(batch)
                if divisors is None:
                    divisors = global_batch.average_over_processes(global_batch.divisors_of(parts))
                terms = {name: mean_of(found, divisors[name]) for name, found in parts.items()}
                self.scaler.scale(torch.stack(list(terms.values())).sum()).backward()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach()
        if self.settings.clip_norm is not None:  # of the true gradients, so they are unscaled first
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            # Private, but the public way, comparing get_scale() before and after, waits for the
            # device. So does an ``if``, and a product takes its place.
            (found,) = self.scaler._found_inf_per_device(self.optimizer).values()
            total, in_a_row = self.overflows
            self.overflows = torch.stack([total + found, (in_a_row + 1) * found]).long()
        self.scaler.update()
        # None: the next backward writes the gradients, where zeros would be read and added to.
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, is_first=step == 0)
        return sums

    def _forward(self, batch: Batch) -> dict[str, list[Part]]:
        """Return the parts of each loss term for one micro-batch."""
        # Bytes travel, a quarter of float32, and are reordered on the device.
        image = batch.image.to(self.device, non_blocking=True)
        image = image.to(memory_format=self.memory_format)
        mask = batch.mask.to(self.device, non_blocking=True)
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
            return self.criterion.parts(self.compiled_model(image), mask)

    def _divisors(self, group: list[Batch], step: int) -> global_batch.Divisors:
        """Return the divisors of the loss terms of several micro-batches, before any backward.

        Masks alone determine them, except where OHEM divides by the pixels it keeps: those are
        counted by forward passes without gradient.
        """
        masks = [batch.mask.to(self.device, non_blocking=True) for batch in group]
        found: list[global_batch.Divisors | None] = [
            self.criterion.divisors(mask) for mask in masks
        ]
        if None in found:
            # Batch norm updates its running statistics without gradients, too: undone below.
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            self._seed(step)  # the same dropout as in the passes with gradient
            with torch.no_grad():
                found = [global_batch.divisors_of(self._forward(batch)) for batch in group]
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        total = global_batch.add_up(divisors for divisors in found if divisors is not None)
        return global_batch.average_over_processes(total)

    def _seed(self, step: int) -> None:
        """Seed dropout by the step, so that a resumed run draws what an uninterrupted one would."""
        # With the rank, or all processes would drop the same units. CUDA is seeded by this, too.
        torch.manual_seed(mix(self.settings.seed, step, collectives.rank()))

    def require_updates(self, step: int, last_step: int, replay: str) -> None:
        """End a run whose gradients overflow float16 again and again; wait for the device.

        Args:
            step: Updates done.
            last_step: Of the run.
            replay: The command that repeats the step, for the message.

        Raises:
            DivergedError: MOST_OVERFLOWS steps in a row were skipped, or all steps of the run.
        """
        if not self.scaler.is_enabled():
            return
        total, in_a_row = self.overflows.tolist()
        if in_a_row >= MOST_OVERFLOWS or (step == last_step and total == step):
            raise DivergedError(
                f"step {step}: the gradients of the last {in_a_row} steps were too large for "
                "float16, so no weight has changed; set trainer.precision=bfloat16 or float32, or "
                f"lower optimizer.lr; {replay}"
            )

    def figures(self) -> dict[str, float]:
        """Return the rates of the latest step, lowest and highest; with float16 skipped steps."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        figures = {"lr": min(rates), "lr_head": max(rates)}
        if self.scaler.is_enabled():
            figures["skipped"] = int(self.overflows[0])
        return figures

    def state(self) -> dict[str, Any]:
        """Return the entries of a checkpoint that updates change; see danet.checkpoint.format."""
        return {
            # Not of ddp_model or compiled_model: their names begin with module. and _orig_mod.
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "optimizer": state_of(self.optimizer, self.model),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.overflows[0]),
        }

    def load_state(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint, which was compared with network and optimizer before."""
        self.model.load_state_dict(saved["model"])
        if self.ema is not None and saved["ema"] is not None:
            # An average without the counter is accepted: nothing is computed from it.
            self.ema.load_state_dict({"n_averaged": torch.tensor(0), **saved["ema"]})
        restore(self.optimizer, saved["optimizer"])
        if saved["scaler"]:  # of float16 alone
            self.scaler.load_state_dict(saved["scaler"])
        self.overflows[0] = saved["skipped"]
