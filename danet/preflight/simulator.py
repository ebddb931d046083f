"""A training step on fake tensors: how much is alive at once, and how much is computed.

Fake tensors have shapes but no storage; a ledger counts what would be alive. The network, the loss
and the optimizer are the real ones, so chunked losses, recomputation and functions with gradients
of their own are counted as they are. Not counted: workspaces inside the kernels (of convolutions
above all), what the allocator keeps in reserve, the context of CUDA, batches waiting in the loader.
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
    """Counts the bytes of all storages that were made under it and are alive, and FLOPs.

    FLOPs are torch's formulas for convolutions, products and attention, with 2 for a multiply-add.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and enters its results."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._enter(leaf)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes()
        self._known.add(id(storage))
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._leave, id(storage), size).atexit = False

    def _leave(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class Footprint(NamedTuple):
    """One update of the weights: bytes on the device, and FLOPs."""

    parameters: int
    """With buffers."""
    gradients: int
    optimizer: int
    average: int
    """The moving average of the weights; 0 without."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    attention: int
    """The part of ``activations`` that the two attention modules keep."""
    peak: int
    """The most that is alive at once, all of the above included as far as it is then alive."""
    forward_flops: int
    """Of the network on one batch, without the loss."""
    step_flops: int
    """Of all batches of an update, recomputation included."""


class StepSimulator:
    """A run's training step on fake tensors of the CPU; sizes may be asked in any order.

    Args:
        config: A checked train config; files that it names are not read.
        precision: Of autocast. float16 is taken for bfloat16: the bytes are the same.
        on_cuda: Whether optimizer steps handle all tensors at once, as torch does on CUDA.
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
            backbone["weights"] = None  # values do not matter here, so nothing is read
        with torch.device("meta"):
            model = make_model(replace(config, model={**config.model, "backbone": backbone}))
            criterion = make(config.loss, "loss")
        self.model = model.train()
        self._criterion = criterion
        self.parameters = sum(p.numel() for p in model.parameters())
        self.head_parameters = self.parameters - sum(
            p.numel() for p in model.get_submodule("backbone").parameters()
        )
        self._watch_attention()
        ledger = self._ledger
        with self._fake, ledger:
            for root in (model, criterion):
                _fake_tensors(root, channels_last=bool(self._settings.channels_last))
            self._weights = ledger.now
            # A copy of every weight and buffer; updating it in place needs nothing more.
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
        """Simulates one update with batches of one size."""
        ledger, times = self._ledger, self._settings.accumulate
        with self._fake, ledger:
            if times > 1:  # from the second batch on there are gradients already
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
        """Updates the weights with any gradients; the first time the optimizer makes its state."""
        self._make_gradients()
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(self, batch_size: int, height: int, width: int) -> tuple[Tensor, int, int]:
        """Returns the loss of a batch, the FLOPs of the network, and passes that only count pixels.

        Image and mask live as long as the graph of the loss needs them. The loss is not counted
        here since it already computes gradients, among them products (``resize_backward``).
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

    def _watch_attention(self) -> None:
        """Notes what is alive before and after each attention module."""
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
    """Puts fake CPU tensors in the place of meta tensors; torch's own ``to`` cannot."""
    for module in root.modules():
        for name, old in module.named_parameters(recurse=False):
            wide = channels_last and old.ndim == 4
            form = torch.channels_last if wide else torch.contiguous_format
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu", memory_format=form)
            module._parameters[name] = nn.Parameter(new, old.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
