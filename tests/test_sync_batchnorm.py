"""Batch norm over two processes is torch's over both batches in one process."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from danet.distributed.sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm

pytestmark = pytest.mark.slow


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def uneven(norm):
    """Gives every channel another weight and bias."""
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
        norm.bias.copy_(torch.linspace(-1, 1, len(norm.bias)))
    return norm


NORMS = {
    "images": lambda: uneven(nn.BatchNorm2d(6)),
    "float64": lambda: uneven(nn.BatchNorm2d(6)).double(),
    "channels_last": lambda: uneven(nn.BatchNorm2d(6)),
    "bfloat16": lambda: uneven(nn.BatchNorm2d(6)),
    "far from zero": lambda: uneven(nn.BatchNorm2d(6)),
    "activation": lambda: uneven(NormAct(6)),
    "vectors": lambda: uneven(nn.BatchNorm1d(6)),
    "sequences": lambda: nn.BatchNorm1d(6, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "compiled": lambda: uneven(nn.BatchNorm2d(6)),
}


def inputs(name):
    """Two batches of 3 for each of two processes, and gradients of what comes out."""
    generator = torch.Generator().manual_seed(0)
    rest = {"vectors": (), "sequences": (7,)}.get(name, (5, 4))
    x, gradient = (torch.randn(2, 6, 6, *rest, generator=generator) for _ in range(2))
    x = x * torch.linspace(1, 3, 6).view(1, -1, *(1,) * (len(rest) + 1)) + (
        1000 if name == "far from zero" else 0.5
    )
    if name == "channels_last":
        x = x.transpose(0, 1).contiguous(memory_format=torch.channels_last_3d).transpose(0, 1)
    dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(name, torch.float32)
    return x.to(dtype), gradient.to(dtype)


def results(norm, x, gradient):
    """What comes out of two steps, the gradients, and the running statistics."""
    found = []
    for batch, upstream in zip(x, gradient, strict=True):
        leaf = batch.clone().requires_grad_()
        out = norm(leaf)
        out.backward(upstream)
        found += [out.detach(), leaf.grad]
    return {"by image": found, "sums": [p.grad for p in norm.parameters()], **norm.state_dict()}


def work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for name, make in NORMS.items():
        norm = convert_sync_batchnorm(make())
        assert isinstance(norm, SyncBatchNorm)
        if name == "compiled":
            norm.compile(backend="aot_eager", fullgraph=True)
        x, gradient = (t[:, 3 * rank : 3 * rank + 3] for t in inputs(name))
        found[name] = results(norm, x, gradient)
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def by_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", NORMS)
def test_two_processes_compute_what_one_does(name, by_process):
    first, second = (found[name] for found in by_process)
    norm = NORMS[name]()
    whole = results(norm, *inputs(name))
    loose = {torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}
    for i, expected in enumerate(whole.pop("by image")):
        got = torch.cat([first["by image"][i], second["by image"][i]])
        assert got.dtype == expected.dtype
        bound = 1e-3 if name == "far from zero" else loose[expected.dtype]
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound)
    for ours, theirs, expected in zip(
        first["sums"], second["sums"], whole.pop("sums"), strict=True
    ):
        torch.testing.assert_close(
            ours + theirs, expected, rtol=1e-2 if name == "bfloat16" else 1e-3, atol=1e-3
        )
    for key, expected in whole.items():
        torch.testing.assert_close(first[key], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[key], second[key])


def test_one_process_and_evaluation_are_torchs():
    norm, x = uneven(nn.BatchNorm2d(6)), torch.randn(4, 6, 5, 5)
    ours = convert_sync_batchnorm(copy.deepcopy(norm))
    assert torch.equal(ours(x), norm(x))
    assert torch.equal(ours.eval()(x), norm.eval()(x))
