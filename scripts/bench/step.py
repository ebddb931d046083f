"""Benchmark a whole training step: forward, loss, backward, update."""

import re
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import reference
from bench.measure import GIB, Options, Row, agree, peak_memory, relative_error, seconds
from danet.engine.optimizer import SGD
from danet.engine.precision import choose_memory_format, choose_precision
from danet.losses import CrossEntropy, DeepSupervision
from danet.models.heads.dual import DualAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor

NUM_CLASSES = 19
AGREEMENT = 1e-4

PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 FLOP/s by device, from NVIDIA's data sheets (there given with sparsity: twice)."""


class Case(NamedTuple):
    """A step to measure."""

    depth: int
    crop: int
    batch_size: int


def make_network(depth: int) -> Segmentor:
    """Return our DANet with random weights, gammas of 0.5 and no dropout."""
    torch.manual_seed(0)
    model = Segmentor(
        ResNet(depth=depth), lambda channels: DualAttentionHead(channels, NUM_CLASSES, dropout=0.0)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, 0.5)
    return model


def make_reference(depth: int, ours: nn.Module) -> reference.PlainDANet:
    """Return the plain network with the weights of ours."""
    plain = reference.PlainDANet(depth, NUM_CLASSES)
    plain.load_state_dict(ours.state_dict())
    for module in plain.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return plain


class OurStep:
    """The trainer's step, in the trainer's memory order."""

    def __init__(self, depth: int, batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        image, self.mask = batch
        order = choose_memory_format(None, image.device, dtype)
        self.image = image.to(memory_format=order)
        model = make_network(depth).to(image.device)
        self.model = model.to(memory_format=order).train()
        self.criterion = DeepSupervision(CrossEntropy(), weights={"position": 1.0, "channel": 1.0})
        self.optimizer = SGD(lr=1e-3)(self.model)
        self.dtype = dtype

    def loss(self) -> Tensor:
        """Compute the loss."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.image.device.type, dtype=self.dtype, enabled=mixed):
            terms = self.criterion(self.model(self.image), self.mask)
        return torch.stack(list(terms.values())).sum()

    def __call__(self) -> None:
        """Update the weights once."""
        _update(self.loss, self.optimizer)


class PlainStep:
    """The reference: NCHW, float32, logits at full size."""

    def __init__(self, depth: int, batch: tuple[Tensor, Tensor]) -> None:
        self.image, self.mask = batch
        model = make_reference(depth, make_network(depth))
        self.model = model.to(self.image.device).train()
        self.optimizer = SGD(lr=1e-3)(self.model)

    def loss(self) -> Tensor:
        """Compute the loss."""
        return reference.loss(self.model(self.image), self.mask)

    def __call__(self) -> None:
        """Update the weights once."""
        _update(self.loss, self.optimizer)


def _update(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def run(options: Options) -> list[Row]:
    """Measure agreement, then the cases of the device."""
    device = options.device
    rows = _agreement(device, 32 if options.quick else 64)
    if options.quick:
        cases = [Case(50, 32, 2)]
    elif device.type == "cuda":
        cases = [Case(50, 768, 2), Case(101, 768, 8)]
    else:
        cases = [Case(50, 256, 2), Case(50, 512, 2)]
    # Memory first: timing leaves holes in the heap of a CPU process.
    every = [_steps(case, options) for case in cases]
    for case, steps in zip(cases, every, strict=True):
        rows += _memory(case, steps, device)
    for case, steps in zip(cases, every, strict=True):
        rows += _time(case, steps, options)
    return rows


def _batch(crop: int, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (batch_size, 3, crop, crop), generator=generator)
    mask = torch.randint(0, NUM_CLASSES, (batch_size, crop, crop), generator=generator)
    mask[:, : crop // 8] = reference.IGNORE
    return image.to(device, torch.uint8), mask.to(device, torch.uint8)


def _agreement(device: torch.device, crop: int) -> list[Row]:
    """Compare loss and logits in float32, and the gradient of all weights in float64.

    In float32, through fifty layers of random weights with small maps, the gradient is determined
    only to some percent, in whatever order sums are taken.
    """
    batch = _batch(crop, 2, device)
    ours, plain = OurStep(50, batch, torch.float32), PlainStep(50, batch)
    of_loss = agree(relative_error(ours.loss(), plain.loss()), AGREEMENT, "step, loss")
    with torch.inference_mode():
        outputs = ours.model.eval()(ours.image).logits, plain.model.eval()(plain.image)[0]
    of_logits = agree(relative_error(*outputs), AGREEMENT, "step, logits")
    gradients = []
    for step in (ours, plain):
        step.model.double().train()
        table = dict(sorted(step.model.named_parameters()))
        parts = torch.autograd.grad(step.loss(), list(table.values()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    agree(error, 1e-5, "step, gradient")
    case = f"R50 crop {crop}"
    return [
        Row("step", f"{case} float32", "error", "", of_logits, note="logits"),
        Row("step", f"{case} float32", "error", "", of_loss, note="loss"),
        Row("step", f"{case} float64", "error", "", error, note="gradient, in the norm"),
    ]


def _steps(case: Case, options: Options) -> dict[str, Callable[[], None]]:
    """Make the steps to compare, each run once; without the reference if it does not fit."""
    device, depth = options.device, case.depth
    batch = _batch(case.crop, case.batch_size, device)
    steps: dict[str, Callable[[], None]] = {}
    with suppress(torch.cuda.OutOfMemoryError):
        plain = PlainStep(depth, batch)
        plain()
        steps["reference"] = plain
    for dtype in dict.fromkeys([torch.float32, choose_precision(options.precision, device)]):
        step = OurStep(depth, batch, dtype)
        step()
        steps[str(dtype).removeprefix("torch.")] = step
    return steps


def _memory(case: Case, steps: dict[str, Callable[[], None]], device: torch.device) -> list[Row]:
    peaks = {key: peak_memory(step, device) / GIB for key, step in steps.items()}
    plain = peaks.pop("reference", None)
    note = "above weights and optimizer state"
    return [
        Row("step", f"{_name(case)} {key}", "memory", "GiB", peak, plain, note)
        for key, peak in peaks.items()
    ]


def _time(case: Case, steps: dict[str, Callable[[], None]], options: Options) -> list[Row]:
    device, (depth, crop, batch_size) = options.device, case
    repeats = 1 if options.quick else (10 if device.type == "cuda" else 3)
    measured = seconds(list(steps.values()), device, repeats=repeats, warm_ups=0)
    times = dict(zip(steps, measured, strict=True))
    plain = times.pop("reference", None)
    rows = []
    for key, spent in times.items():
        note = f"{batch_size / spent:.2f} images/s"
        if device.type == "cpu" and len(times) == 1:
            note += "; float32 is the best precision of this CPU (no native bfloat16)"
        rows.append(Row("step", f"{_name(case)} {key}", "time", "s", spent, plain, note))
    best = list(times)[-1]  # the last is the best precision
    flops = 3 * forward_flops(depth, crop) * batch_size  # a backward pass is two forward ones
    rows += _utilisation(_name(case), flops / times[best], best, device)
    if options.profile:
        _profile(steps[best], _name(case), device)
    return rows


def _name(case: Case) -> str:
    return f"R{case.depth} crop {case.crop} batch {case.batch_size}"


def _utilisation(name: str, rate: float, precision: str, device: torch.device) -> list[Row]:
    """Return FLOP/s; in bfloat16 on a known GPU also as a share of its peak."""
    rows = [Row("step", name, "speed", "TFLOP/s", rate / 1e12, note="3 x forward, mul-add = 2")]
    if device.type == "cuda" and precision == "bfloat16":
        found = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if re.search(key.replace(" ", ".*"), found):
                note = f"of {peak / 1e12:.0f} TFLOP/s, {key}, dense bfloat16"
                return [*rows, Row("step", name, "utilisation", "", rate / peak, note=note)]
    return rows


def forward_flops(depth: int, crop: int) -> int:
    """Return the FLOPs of a forward pass over one image in training, by torch's formulas."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = reference.PlainDANet(depth, NUM_CLASSES)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(torch.empty(1, 3, crop, crop))
    return int(counter.get_total_flops())


def _profile(step: Callable[[], None], name: str, device: torch.device) -> None:
    """Print the operators with the most time of their own."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(f"{name}: operators by their own time", flush=True)
    print(profile.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=50))
