"""Simulation of a training step on fake tensors: memory and FLOPs.

Fake tensors have shapes but no storage; a ledger counts the bytes that would be allocated. Network,
loss and optimizer are the real ones, so chunked losses, recomputation and custom autograd functions
are counted exactly. Not counted: workspaces of kernels (above all of convolutions), memory that the
allocator reserves, the CUDA context, and batches waiting in the loader.
"""

import weakref
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from danet.config.build import make, make_model
from danet.config.schema import TrainConfig


class Ledger(TorchDispatchMode):
    """Counts FLOPs and the bytes of all live storages that were allocated under it.

    FLOPs follow torch's formulas for convolutions, matrix products and attention; a multiply-add
    counts 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, id(storage), size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Footprint(NamedTuple):
    """Bytes on the device and FLOPs of one update of the weights."""

    parameters: int
    """Buffers included."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights; 0 without."""
    activations: int
    """Saved by the forward pass for the backward pass."""
    attention: int
    """The part of ``activations`` that the two attention modules save."""
    peak: int
    """The maximum over the update of all that is allocated at once."""
    forward_flops: int
    """Of the network on one batch, without the loss."""
    step_flops: int
    """Of all batches of an update, recomputation included."""


class StepSimulator:
    """The training step of a run on fake CPU tensors; sizes may be simulated in any order.

    Args:
        config: A checked train config; files that it names are not read.
        precision: Of autocast. float16 is simulated as bfloat16, which has as many bytes.
        on_cuda: Whether the optimizer updates all tensors at once (``foreach``), as on CUDA.
    """

    def __init__(
        self, config: TrainConfig, *, precision: torch.dtype, on_cuda: bool = False
    ) -> None:
        self._settings = config.trainer
        self._precision = precision
        self._fake = FakeTensorMode()
        self._ledger = Ledger()
        backbone = dict(config.model["backbone"])
        if "weights" in backbone:
            backbone["weights"] = None  # the values do not matter
        with torch.device("meta"):
            model = make_model(replace(config, model={**config.model, "backbone": backbone}))
            criterion = make(config.loss, "loss")
        self.model = model.train()
        self._criterion = criterion
        self.parameters = sum(p.numel() for p in model.parameters())
        self.head_parameters = self.parameters - sum(
            p.numel() for p in model.get_submodule("backbone").parameters()
        )
        self._measure_attention()
        ledger = self._ledger
        with self._fake, ledger:
            for root in (model, criterion):
                _fake_tensors(root, channels_last=bool(self._settings.channels_last))
            self._weights = ledger.now
            # A copy of every weight and buffer; its update in place allocates nothing.
            has_average = self._settings.ema_decay is not None
            self._average = [torch.empty_like(t) for t in _tensors(model)] if has_average else []
            self._averages = ledger.now - self._weights
            self._optimizer = make(config.optimizer, "optimizer")(model)
            for group in self._optimizer.param_groups:
                group["foreach"] = on_cuda
            self._update()
            self._states = ledger.now - self._weights - self._averages
            ledger.peak = ledger.now
            self._update()
            self._update_peak = ledger.peak

    def run(self, batch_size: int, height: int, width: int) -> Footprint:
        """Simulate one update with batches of one size."""
        ledger, times = self._ledger, self._settings.accumulate
        with self._fake, ledger:
            if times > 1:  # gradients exist from the second batch on
                self._make_gradients()
            ledger.peak, ledger.flops, before = ledger.now, 0, ledger.now
            loss, forward_flops, passes = self._forward(batch_size, height, width)
            activations = ledger.now - before
            loss.backward()
            del loss
            self._optimizer.zero_grad(set_to_none=True)
        return Footprint(
            parameters=self._weights,
            gradients=4 * self.parameters,
            optimizer=self._states,
            average=self._averages,
            activations=activations,
            attention=self._attention,
            peak=max(ledger.peak, self._update_peak),
            forward_flops=forward_flops,
            step_flops=(ledger.flops + passes * forward_flops) * times,
        )

    def _make_gradients(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    def _update(self) -> None:
        """Update the weights with any gradients; the first call allocates the optimizer state."""
        self._make_gradients()
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(self, batch_size: int, height: int, width: int) -> tuple[Tensor, int, int]:
        """Return the loss of a batch, the FLOPs of the network, and the number of counting passes.

        FLOPs of the loss are excluded, since its forward pass computes gradients (with matrix
        products, ``resize_backward``). Counting passes determine the pixels that OHEM keeps.
        """
        self._attention = 0
        image = torch.empty(batch_size, 3, height, width, dtype=torch.uint8)
        if self._settings.channels_last:
            image = image.to(memory_format=torch.channels_last)
        mask = torch.empty(batch_size, height, width, dtype=torch.uint8)
        dtype = torch.float32 if self._precision == torch.float32 else torch.bfloat16
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            outputs = self.model(image)
            flops = self._ledger.flops
            terms = self._criterion(outputs, mask)
            times = self._settings.accumulate
            passes = int(times > 1 and self._criterion.divisors(mask) is None)
        return torch.stack(list(terms.values())).sum() / times, flops, passes

    def _measure_attention(self) -> None:
        """Add hooks that measure what each attention module saves."""
        self._attention = 0
        starts: list[int] = []

        def before(*_: Any) -> None:
            starts.append(self._ledger.now)

        def after(*_: Any) -> None:
            self._attention += self._ledger.now - starts.pop()

        for module in self.model.modules():
            if type(module).__module__ == "danet.ops.attention":
                module.register_forward_pre_hook(before)
                module.register_forward_hook(after)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _fake_tensors(root: nn.Module, *, channels_last: bool) -> None:
    """Replace meta tensors by fake CPU tensors, which ``Module.to`` cannot."""
    for module in root.modules():
        for name, old in module.named_parameters(recurse=False):
            wide = channels_last and old.ndim == 4
            form = torch.channels_last if wide else torch.contiguous_format
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu", memory_format=form)
            module._parameters[name] = nn.Parameter(new, old.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
