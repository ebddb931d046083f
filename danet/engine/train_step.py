"""One update of the weights: forward, loss over the global batch, backward, optimizer.

A mean over pixels is a sum divided by the number of labelled pixels. Averaging the means of
micro-batches would weigh pixels by how few others are labelled beside them; so the sums of all
micro-batches and processes are divided by the common number (see ``danet.losses.Part``).
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danet.checkpoint.format import Checkpoint
from danet.distributed import collectives, data_parallel
from danet.engine.ema import ModelEMA
from danet.engine.optimizer import restore, state_of
from danet.engine.precision import choose_memory_format, choose_precision, compiled
from danet.engine.schedule import Schedule
from danet.engine.settings import TrainSettings
from danet.errors import DivergedError
from danet.losses import DeepSupervision, Part, mean_of
from danet.ops.arithmetic import cuda_arithmetic
from danet.seeds import mix
from danet.types import Batch

Divisors = Mapping[str, Sequence[Tensor]]
"""Name of a loss term -> scalars by which its parts are divided."""
MOST_OVERFLOWS = 30  # overflows in a row after which a float16 run ends; each halves the loss scale


@dataclass(eq=False, repr=False)
class TrainStep:
    """Updates a network from the micro-batches of a step; owns all that an update changes."""

    model: nn.Module  # maps images to a SegmentationOutput; on the device that trains
    criterion: DeepSupervision  # gives named, weighted loss terms, which are summed
    optimizer: torch.optim.Optimizer  # over the parameters of the model; groups have ``base_lr``
    schedule: Schedule  # factor of the base rates by step
    settings: TrainSettings  # the config group ``trainer``
    _: KW_ONLY
    num_classes: int

    def __post_init__(self) -> None:
        model, criterion, settings = self.model, self.criterion, self.settings
        self.device = device = next(model.parameters()).device
        self.dtype = choose_precision(settings.precision, device)
        self.is_tf32 = settings.precision == "tf32"
        self.memory_format = choose_memory_format(
            settings.channels_last, self.dtype, tf32=self.is_tf32
        )
        self.ema = ModelEMA(model, settings.ema_decay) if settings.ema_decay is not None else None
        # A disabled scaler passes everything through: one code path for all precisions.
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        # Steps that float16 overflows let the scaler skip: in all, and in a row up to now.
        self.overflows = torch.zeros(2, dtype=torch.int64, device=device)
        is_one_of_many = collectives.world_size() > 1
        self.ddp_model = data_parallel.wrap(model, device) if is_one_of_many else model
        network = self.ddp_model

        def parts(image: Tensor, mask: Tensor) -> dict[str, list[Part]]:
            return criterion.parts(network(image), mask)

        # The compiled network shares its weights, and states keep the names of the plain one.
        self.parts = compiled(parts, device) if settings.compile else parts

    def __call__(self, group: list[Batch], step: int) -> dict[str, Tensor]:
        """Update the weights once; return the loss terms of this process, scalars on the device.

        The gradient is that of the global batch: each term is divided by what all micro-batches of
        all processes count, and the mean of the returned terms over the processes is the loss.
        ``group`` has micro-batches on the CPU, ``step`` counts the updates before.
        """
        factor = self.schedule(step, self.settings.steps)
        for param_group in self.optimizer.param_groups:
            param_group["lr"] = param_group["base_lr"] * factor
        sums: dict[str, Tensor] = {}
        # Crops have one size. The benchmark may choose other kernels in each run.
        benchmark = not self.settings.deterministic
        with cuda_arithmetic(tf32=self.is_tf32, benchmark=benchmark):
            divisors = self._divisors(group, step) if len(group) > 1 else None
            self._seed(step)
            for i, batch in enumerate(group):
                # DDP averages the gradients in the last backward pass of a step alone.
                is_last = i + 1 == len(group) or self.ddp_model is self.model
                with nullcontext() if is_last else self.ddp_model.no_sync():  # type: ignore[operator]
                    parts = self._forward(batch)
                    if divisors is None:
                        divisors = _combine([_divisors_of(parts)])
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
        image = batch.image.to(self.device, non_blocking=True).to(memory_format=self.memory_format)
        mask = batch.mask.to(self.device, non_blocking=True)
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=is_mixed):
            return self.parts(image, mask)

    def _divisors(self, group: list[Batch], step: int) -> Divisors:
        """Return the divisors of the loss terms of several micro-batches, before any backward.

        Masks alone determine them, except where OHEM divides by the pixels it keeps: those are
        counted by forward passes without gradient.
        """
        masks = (batch.mask.to(self.device, non_blocking=True) for batch in group)
        by_mask = [self.criterion.divisors(mask, self.num_classes) for mask in masks]
        found: list[Divisors] = [divisors for divisors in by_mask if divisors is not None]
        if not found:
            # Batch norm updates its running statistics without gradients, too: undone below.
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            self._seed(step)  # the same dropout as in the passes with gradient
            with torch.no_grad():
                found = [_divisors_of(self._forward(batch)) for batch in group]
                for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
        return _combine(found)

    def _seed(self, step: int) -> None:
        """Seed dropout by the step, so that a resumed run draws what an uninterrupted one would."""
        # With the rank, or all processes would drop the same units. CUDA is seeded by this, too.
        torch.manual_seed(mix(self.settings.seed, step, collectives.rank()))

    def require_updates(self, step: int, last_step: int, replay: str) -> None:
        """Raise DivergedError if float16 overflowed in many steps in a row, or in all of the run.

        ``replay`` is the command that repeats the step, for the message.
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
            # Not of ddp_model, whose names begin with module.
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


def _divisors_of(parts: Mapping[str, Sequence[Part]]) -> Divisors:
    return {name: [part.divisor for part in found] for name, found in parts.items()}


def _combine(micro_batches: Sequence[Divisors]) -> Divisors:
    """Return the sums of the divisors of micro-batches, averaged over all processes."""
    if len(micro_batches) == collectives.world_size() == 1:
        return micro_batches[0]
    names = [(name, i) for name, found in micro_batches[0].items() for i in range(len(found))]
    # Sums stay on the device: a Python number of them would wait for every micro-batch. One tensor
    # for all terms: of an all-reduce of scalars only the latency counts.
    flat = torch.stack([torch.stack([d[n][i] for d in micro_batches]).sum() for n, i in names])
    # Divided by the number of processes, since DDP divides the gradients by it as well.
    flat = flat / collectives.world_size()
    collectives.sum_in_place(flat)
    shared = iter(flat.unbind())
    return {name: [next(shared) for _ in found] for name, found in micro_batches[0].items()}
