"""Simulation of a training step on fake tensors: memory and FLOPs.

Fake tensors have shapes but no storage; a ledger counts the bytes that would be allocated. The step
is the trainer's own, so chunked losses, recomputation and custom autograd functions are counted
exactly. Not counted: workspaces of kernels (above all of convolutions), memory that the allocator
reserves, the CUDA context, and batches waiting in the loader.
"""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from danet.config.build import make, untrained
from danet.config.schema import TrainConfig
from danet.engine.train_step import TrainStep
from danet.ops.cross_entropy import chunks_as_on
from danet.types import Batch


class Ledger(TorchDispatchMode):
    """Counts the bytes of all live storages that were allocated under it.

    torch's own ``MemTracker`` finds the same peaks and takes ten times as long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        release = weakref.finalize(storage, self._release, id(storage), storage.nbytes())
        release.atexit = False

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class StepSimulator:
    """The training step of a run on fake CPU tensors; sizes may be simulated in any order.

    Files that the config names are not read. float16 is simulated as bfloat16, which has as many
    bytes; ``on_cuda`` the optimizer updates all tensors at once, and losses take larger chunks.
    Always allocated are ``weights``, the bytes of parameters and buffers, ``optimizer``, those of
    its state, and ``average``, those of the moving average of the weights.
    """

    def __init__(
        self, config: TrainConfig, *, precision: torch.dtype, on_cuda: bool = False
    ) -> None:
        name = "float32" if precision == torch.float32 else "bfloat16"
        settings = replace(
            config.trainer, precision=name, channels_last=False, compile=False, ema_decay=None
        )
        self._accumulate, self._device_type = settings.accumulate, "cuda" if on_cuda else "cpu"
        # Tensors of the meta device become fake ones of the CPU.
        self._fake, self._ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger()
        with torch.device("meta"):  # some networks of timm cannot be built of fake tensors
            self.model: Any = untrained(config).train()
            criterion = make(config.loss, "loss")
        with self._fake, self._ledger as ledger:
            for root in (self.model, criterion):
                root.to_empty(device="cpu")
            self.weights = ledger.now
            optimizer = make(config.optimizer, "optimizer")(self.model)
            for group in optimizer.param_groups:
                group["foreach"] = on_cuda
            for parameter in self.model.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            optimizer.step()  # allocates the state
            optimizer.zero_grad(set_to_none=True)
            self.optimizer = ledger.now - self.weights
            schedule = make(config.schedule, "schedule")
            parts = self.model, criterion, optimizer, schedule, settings
            self._step = TrainStep(*parts, num_classes=config.data.num_classes)
        # A copy, which fake tensors do not support; its update in place allocates nothing.
        self.average = self.weights if config.trainer.ema_decay is not None else 0

    def peak(self, batch_size: int, height: int, width: int) -> int:
        """Return the maximum over one update of all bytes that are allocated at once."""
        with self._fake, self._ledger as ledger, chunks_as_on(self._device_type):
            ledger.peak = ledger.now
            self._step(self._batches(batch_size, height, width), 1)
        return ledger.peak + self.average

    def flops(self, batch_size: int, height: int, width: int) -> tuple[int, int]:
        """Return the FLOPs of the network on one batch, and of an update with loss and gradients.

        Of convolutions, matrix products and attention; a multiply-add counts 2.
        """
        with self._fake:
            batches = self._batches(batch_size, height, width)
            with FlopCounterMode(display=False) as forward:
                self.model(batches[0].image)
            # Of a convolution in groups torch counts the gradient of the weight as of one group.
            formula: Any = {torch.ops.aten.convolution_backward: _count_convolution_backward}
            with FlopCounterMode(display=False, custom_mapping=formula) as step:
                self._step(batches, 1)
        return forward.get_total_flops(), step.get_total_flops()

    def _batches(self, batch_size: int, height: int, width: int) -> list[Batch]:
        image = self.model.example(batch_size, height, width)
        mask = torch.empty(batch_size, height, width, dtype=torch.uint8)
        return [Batch(image, mask, ("",) * batch_size)] * self._accumulate


def _count_convolution_backward(gradient: Any, x: Any, weight: Any, *others: Any, **_: Any) -> int:
    """Return the FLOPs of the gradients by input and weight, each as many as of the convolution."""
    _bias, _stride, _padding, _dilation, transposed, *_groups, output_mask = others
    return conv_flop_count(x, weight, gradient, transposed) * sum(output_mask[:2])
