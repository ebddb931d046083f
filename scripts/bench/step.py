"""Benchmark a whole training step: forward, loss, backward, update.

The headline is the plain network in the precision of ours, in the memory order that suits it; the
plain float32 step, which a user with bfloat16 would not run, stands beside it.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import reference
from bench.measure import GIB, Options, Row, name_of, peak_memory, relative_error, seconds
from danet.engine.optimizer import SGD
from danet.engine.precision import choose_memory_format
from danet.losses import CrossEntropy, DeepSupervision
from danet.models.heads.dual import DualAttentionHead, FCNHead
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


def make_network(
    depth: int, *, auxiliary: bool = False, recompute: Sequence[int] = ()
) -> Segmentor:
    """Return our DANet with random weights, gammas of 0.5 and no dropout."""
    torch.manual_seed(0)
    head = partial(DualAttentionHead, num_classes=NUM_CLASSES, dropout=0.0)
    beside = partial(FCNHead, num_classes=NUM_CLASSES, channels=256, dropout=0.0)
    backbone = ResNet(depth=depth, recompute=recompute)
    model = Segmentor(backbone, head, beside if auxiliary else None)
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

    def __init__(
        self,
        depth: int,
        batch: tuple[Tensor, Tensor],
        dtype: torch.dtype = torch.float32,
        *,
        auxiliary: bool = False,
        compiled: bool = False,
        recompute: Sequence[int] = (),
    ) -> None:
        image, self.mask = batch
        order = choose_memory_format(None, dtype)
        self.image = image.to(memory_format=order)
        model = make_network(depth, auxiliary=auxiliary, recompute=recompute).to(image.device)
        self.model = model.to(memory_format=order).train()
        weights = {"position": 1.0, "channel": 1.0, "backbone": 0.4}
        criterion = DeepSupervision(CrossEntropy(), weights=weights)

        def terms(image: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return criterion(self.model(image), mask)

        self.terms = torch.compile(terms) if compiled else terms
        self.optimizer = SGD(lr=1e-3)(self.model)
        self.dtype = dtype

    def loss(self) -> Tensor:
        """Compute the loss."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.image.device.type, dtype=self.dtype, enabled=mixed):
            terms = self.terms(self.image, self.mask)
        return torch.stack(list(terms.values())).sum()

    def __call__(self) -> None:
        """Update the weights once."""
        _update(self.loss, self.optimizer)


class PlainStep:
    """The reference: eager or compiled, logits at full size."""

    def __init__(
        self,
        depth: int,
        batch: tuple[Tensor, Tensor],
        dtype: torch.dtype = torch.float32,
        order: torch.memory_format = torch.contiguous_format,
        *,
        compiled: bool = False,
    ) -> None:
        image, self.mask = batch
        self.image, self.dtype = image.to(memory_format=order), dtype
        model = make_reference(depth, make_network(depth)).to(image.device)
        self.model = model.to(memory_format=order).train()
        self.network = torch.compile(self.model) if compiled else self.model
        self.optimizer = SGD(lr=1e-3)(self.model)

    def loss(self) -> Tensor:
        """Compute the loss."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.image.device.type, dtype=self.dtype, enabled=mixed):
            return reference.loss(self.network(self.image), self.mask)

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
    of_loss = relative_error(ours.loss(), plain.loss())
    with torch.inference_mode():
        outputs = ours.model.eval()(ours.image).logits, plain.model.eval()(plain.image)[0]
    of_logits = relative_error(*outputs)
    gradients = []
    for step in (ours, plain):
        step.model.double().train()
        table = dict(sorted(step.model.named_parameters()))
        parts = torch.autograd.grad(step.loss(), list(table.values()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    case = f"R50 crop {crop}"
    return [
        Row("step", f"{case} float32", "error", "", of_logits, note="logits", bound=AGREEMENT),
        Row("step", f"{case} float32", "error", "", of_loss, note="loss", bound=AGREEMENT),
        Row("step", f"{case} float64", "error", "", error, note="gradient, in norm", bound=1e-5),
    ]


class Steps(NamedTuple):
    """The steps to compare, each run once, by name."""

    ours: dict[str, Callable[[], None]]
    references: dict[str, Callable[[], None]]
    """Without those that do not fit."""

    def against(self, name: str) -> list[str]:
        """Return the references of one of ours: of equal precision, then plain float32."""
        if name.endswith("auxiliary head"):
            return [other for other in self.references if other.endswith("auxiliary head")]
        plain = [other for other in self.references if other.startswith("plain")]
        equal = [other for other in plain if name.split()[0] in other]
        return list(dict.fromkeys([*equal, *plain[:1]]))


def _steps(case: Case, options: Options) -> Steps:
    device, depth = options.device, case.depth
    batch = _batch(case.crop, case.batch_size, device)
    ours, plain = partial(OurStep, depth, batch), partial(PlainStep, depth, batch)
    last, best = torch.channels_last, options.precisions()[-1]
    steps = Steps({}, {})
    # The large case is that of a GPU, in its best precision alone: device time is dear.
    for dtype in options.precisions() if depth == 50 else [best]:
        name = name_of(dtype)
        if dtype == torch.float32:  # in half precision this order is slower, so not a choice
            _add(steps.references, f"plain {name} NCHW", partial(plain, dtype))
        _add(steps.references, f"plain {name} channels_last", partial(plain, dtype, last))
        _add(steps.ours, name, partial(ours, dtype))
    name = name_of(best)
    _add(steps.ours, f"{name} recompute=[1,2,3]", partial(ours, best, recompute=[1, 2, 3]))
    if device.type == "cuda" and depth != 50:
        compiled = partial(plain, best, last, compiled=True)
        _add(steps.references, f"plain {name} channels_last compiled", compiled)
        _add(steps.ours, f"{name} compiled", partial(ours, best, compiled=True))
    if importlib.util.find_spec("mmseg") and depth == 50:
        from bench import mmseg

        _add(steps.references, mmseg.NAME, partial(mmseg.Step, batch))
        _add(steps.ours, "float32 auxiliary head", partial(ours, auxiliary=True))
    return steps


def _add(
    steps: dict[str, Callable[[], None]], name: str, make: Callable[[], Callable[[], None]]
) -> None:
    """Make a step and run it once, unless the device has too little memory for it."""
    with suppress(torch.cuda.OutOfMemoryError):
        step = make()
        step()
        steps[name] = step


def _memory(case: Case, steps: Steps, device: torch.device) -> list[Row]:
    peaks = {
        name: peak_memory(step, device) / GIB
        for name, step in (*steps.references.items(), *steps.ours.items())
    }
    return _compare(case, steps, "memory", "GiB", peaks, "above weights and optimizer state")


def _compare(
    case: Case, steps: Steps, measure: str, unit: str, found: dict[str, float], note: str = ""
) -> list[Row]:
    """Return a row for each of ours and each reference, of equal precision first."""
    rows = []
    for name in steps.ours:
        for other in steps.against(name) or [""]:
            what = f"{_name(case)} {name}"
            figures = found[name], found.get(other), note, other
            rows.append(Row("step", what, measure, unit, *figures))
    return rows


def _time(case: Case, steps: Steps, options: Options) -> list[Row]:
    device, (depth, crop, batch_size) = options.device, case
    every = {**steps.references, **steps.ours}
    repeats = 1 if options.quick else (10 if device.type == "cuda" else 7)
    measured = seconds(list(every.values()), device, repeats=repeats, warm_ups=0)
    times = dict(zip(every, measured, strict=True))
    rows = _compare(case, steps, "time", "s", times)
    flops = 3 * forward_flops(depth, crop) * batch_size  # a backward pass is two forward ones
    for name in steps.ours:
        what, rate = f"{_name(case)} {name}", flops / times[name]
        note = f"{batch_size / times[name]:.2f} images/s; 3 x forward, mul-add = 2"
        rows.append(Row("step", what, "speed", "TFLOP/s", rate / 1e12, note=note))
        rows += _utilisation(what, rate, name, device)
    if options.profile:
        for name, step in every.items():
            _profile(step, f"{_name(case)} {name}", device)
    return rows


def _name(case: Case) -> str:
    return f"R{case.depth} crop {case.crop} batch {case.batch_size}"


def _utilisation(name: str, rate: float, precision: str, device: torch.device) -> list[Row]:
    """Return FLOP/s in bfloat16 on a known GPU as a share of its peak."""
    if device.type == "cuda" and precision.startswith("bfloat16"):
        found = torch.cuda.get_device_name(device)
        for key, peak in PEAKS.items():
            if re.search(key.replace(" ", ".*"), found):
                note = f"of {peak / 1e12:.0f} TFLOP/s, {key}, dense bfloat16"
                return [Row("step", name, "utilisation", "", rate / peak, note=note)]
    return []


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
