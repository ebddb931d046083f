"""One loss over the global batch, however it is spread over micro-batches and processes.

A mean over pixels is a sum divided by the number of labelled pixels. Averaging the means of
micro-batches would weigh pixels by how few others are labelled beside them; so the sums of all
micro-batches and processes are divided by the common number (see ``danet.losses.Part``).
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from danet.distributed import collectives
from danet.losses import Part

Divisors = Mapping[str, Sequence[Tensor]]
"""Name of a loss term -> scalars by which its parts are divided."""


def divisors_of(parts: Mapping[str, Sequence[Part]]) -> Divisors:
    """Return the divisors of one micro-batch."""
    return {name: [part.divisor for part in found] for name, found in parts.items()}


def add_up(micro_batches: Iterable[Divisors]) -> Divisors:
    """Return the sums of the divisors of several micro-batches."""
    by_term: dict[str, list[Sequence[Tensor]]] = {}
    for divisors in micro_batches:
        for name, values in divisors.items():
            by_term.setdefault(name, []).append(values)
    # Sums stay on the device: a Python number of them would wait for every micro-batch.
    return {
        name: [torch.stack(values).sum() for values in zip(*found, strict=True)]
        for name, found in by_term.items()
    }


def average_over_processes(divisors: Divisors) -> Divisors:
    """Return the means of divisors over all processes."""
    world_size = collectives.world_size()
    if world_size == 1:
        return divisors
    # Divided by the number of processes, since DDP divides the gradients by it as well. One
    # all-reduce for all terms: of scalars only its latency counts.
    flat = torch.stack([divisor for found in divisors.values() for divisor in found]) / world_size
    collectives.sum_in_place(flat)
    shared = iter(flat.unbind())
    return {name: [next(shared) for _ in found] for name, found in divisors.items()}
