"""Sample order as a function of the seed and the position in the run."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass

import torch

from danet.errors import InputError
from danet.seeds import mix
from danet.types import SampleKey


@dataclass
class StepSampler:
    """Endless batches of one process, from a given batch on.

    The run is one stream of positions 0, 1, 2, ...: epoch after epoch, each a new permutation of
    the data set. Batch b of all processes together starts at position ``b * world * batch_size``,
    so at an equal global batch the content of a step does not depend on the number of processes or
    workers, and a resumed run continues where it stopped without stored state.
    """

    num_samples: int  # of the data set
    batch_size: int  # of one process
    _: KW_ONLY
    seed: int  # decides order and augmentation
    start: int = 0  # number of the first batch
    rank: int = 0  # number of this process
    world: int = 1  # number of processes

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(
                f"data.batch_size={self.batch_size} is not a whole number of at least 1"
            )
        if self.num_samples < self.batch_size * self.world:
            raise InputError(
                f"{self.num_samples} samples do not fill one batch: data.batch_size="
                f"{self.batch_size} on {self.world} process(es); use a smaller data.batch_size"
            )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        first = (self.start * self.world + self.rank) * self.batch_size
        for position in itertools.count(first, self.world * self.batch_size):
            yield [self._key(p) for p in range(position, position + self.batch_size)]

    def _key(self, position: int) -> SampleKey:
        epoch, place = divmod(position, self.num_samples)
        order = _permutation(self.num_samples, mix(self.seed, 0, epoch))
        # Of the position, not of the index: a sample is augmented differently in each epoch.
        # 0 and 1 keep the seeds of order and augmentation apart.
        return SampleKey(int(order[place]), mix(self.seed, 1, position))


@functools.lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
