"""Model the cost of data-parallel training on 1 to 64 GPUs; docs/scaling.md explains it.

Nothing here is a measurement. Byte counts and collectives come from the network; everything else
is an assumption, documented in ``Machine`` and ``Work``.
"""

from typing import NamedTuple

import torch
from torch import nn

from bench.measure import Options, Row
from bench.step import forward_flops, make_network

WORLDS = (1, 2, 4, 8, 16, 32, 64)


class Machine(NamedTuple):
    """Assumptions about the hardware."""

    gpus_a_node: int = 8
    link_in_node: float = 300e9
    """Bytes a second and GPU that an all-reduce reaches over NVLink (H100: nominally 450e9)."""
    nics_a_node: int = 8
    """Network cards. NCCL lays as many rings, and each leaves the node by another card with its
    share of the data."""
    nic: float = 40e9
    """Bytes a second and card (400 Gbit/s are nominally 50e9)."""
    latency_in_node: float = 20e-6
    """Seconds of a small all-reduce or all-gather within a node."""
    latency_between_nodes: float = 50e-6
    peak: float = 989e12
    """FLOP/s in bfloat16."""
    utilisation: float = 0.24
    """Share of the peak that an eager step reaches, estimated; 0.34 compiled. To be replaced by the
    measured one."""
    host: float = 14e-3
    """Seconds in which the CPU starts the kernels of a step, estimated: no step is shorter."""
    storage: float = 1e9
    """Bytes a second when a checkpoint is written."""


class Work(NamedTuple):
    """The run: the network's settings, and assumptions about the rest."""

    depth: int = 101
    crop: int = 768
    batch_size: int = 2
    """Per GPU."""
    overlap: float = 0.8
    """Share of the backward pass during which gradients may be sent."""
    loader_rate: float = 20.0
    """Training images a second and CPU core."""
    cores_a_gpu: int = 12
    eval_every: int = 4000
    """Steps between evaluations."""
    eval_images: int = 500
    eval_seconds: float = 0.2
    """Per image and GPU."""


class Network(NamedTuple):
    """Numbers counted in the network, not assumed."""

    parameters: int
    norms: int
    """Batch normalisations; each is one all-gather forward and one all-reduce backward."""
    flops: int
    """Of a forward pass over one image."""


class Cost(NamedTuple):
    """Seconds of a step and what they are made of."""

    compute: float
    host: float
    loader: float
    all_reduce: float
    exposed: float
    """The part of ``all_reduce`` that the backward pass does not hide."""
    sync_norm: float
    overhead: float
    """Evaluation and checkpoints, spread over the steps between them."""

    @property
    def step(self) -> float:
        """Return max(compute + exposed + sync_norm, host, loader)."""
        return max(self.compute + self.exposed + self.sync_norm, self.host, self.loader)

    @property
    def total(self) -> float:
        """Return step + overhead."""
        return self.step + self.overhead


def count(depth: int, crop: int) -> Network:
    """Count parameters, batch norms and FLOPs of the real network."""
    with torch.device("meta"):
        model = make_network(depth)
    return Network(
        parameters=sum(p.numel() for p in model.parameters()),
        norms=sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()),
        flops=forward_flops(depth, crop),
    )


def cost(network: Network, work: Work, machine: Machine, world: int) -> Cost:
    """Return the cost of a step on ``world`` GPUs."""
    within = world <= machine.gpus_a_node
    link = machine.link_in_node if within else machine.nic * machine.nics_a_node
    latency = machine.latency_in_node if within else machine.latency_between_nodes
    compute = 3 * network.flops * work.batch_size / (machine.peak * machine.utilisation)
    # Ring: every byte of the gradients (float32) passes a link 2 (n - 1) / n times.
    volume = 4 * network.parameters * 2 * (world - 1) / world
    all_reduce = volume / link
    hidden = work.overlap * compute * 2 / 3
    alone = world == 1
    evaluation = work.eval_seconds * work.eval_images / world
    checkpoint = 3 * 4 * network.parameters / machine.storage  # weights, momentum, average
    return Cost(
        compute=compute,
        host=machine.host,
        loader=work.batch_size / (work.loader_rate * work.cores_a_gpu),
        all_reduce=all_reduce,
        exposed=max(0.0, all_reduce - hidden),
        sync_norm=0.0 if alone else 2 * network.norms * latency,
        overhead=(evaluation + checkpoint) / work.eval_every,
    )


def run(options: Options) -> list[Row]:
    """Compute the table of docs/scaling.md."""
    work, machine = Work(), Machine()
    network = count(work.depth, work.crop)
    rows = []
    single = cost(network, work, machine, 1).step
    for world in WORLDS:
        step = cost(network, work, machine, world)
        parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in step._asdict().items())
        case = f"model, not measured: R{work.depth} crop {work.crop}, {world} GPU(s)"
        rate = world * work.batch_size / step.total
        rows.append(Row("scaling", case, "speed", "images/s", rate, note=f"ms: {parts}"))
        note = "of a step, evaluation and checkpoints left out"
        rows.append(Row("scaling", case, "efficiency", "", single / step.step, note=note))
    return rows
