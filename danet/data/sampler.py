"""Sample order as a function of the seed and the position in the run."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch

from danet.errors import InputError
from danet.seeds import mix
from danet.types import SampleKey

_MOST_SHOWN = 12  # how many classes are listed with their probabilities


class RareClassSampling:
    """Draws a class, the rarer the more often, and a picture that shows it.

    P(c) is proportional to exp((1 - f(c)) / T), where f(c) is the share of class c among the
    labelled pixels. The picture is uniform among those with ``min_pixels`` pixels of c or more;
    without any, among all that show c. Hoyer et al., DAFormer, CVPR 2022, section 3.3. Labels
    without any class raise InputError.

    Args:
        pixels: Of each class in each picture, (pictures, K).
        temperature: T, above 0; the smaller, the more often rare classes are drawn.
        min_pixels: At least 1.

    Attributes:
        probabilities: P, float64 (K,); 0 for classes that never occur.
        pictures: For each class, the indices among which its picture is drawn.
        absent, scarce: Classes that never occur; those of which no picture has ``min_pixels``.
    """

    def __init__(self, pixels: np.ndarray, *, temperature: float, min_pixels: int) -> None:
        total = pixels.sum(axis=0, dtype=np.int64)
        if not total.any():
            raise InputError("data.rare_class_temperature: no label has a pixel of any class")
        share = total / total.sum()
        rarest = share[total > 0].min()
        # Relative to the rarest class, so that no exponential overflows.
        weights = np.exp((rarest - share.clip(rarest)) / temperature) * (total > 0)
        self.probabilities = weights / weights.sum()
        # Divided by the last, which is 1 then: no draw lies above it.
        self._bounds = weights.cumsum() / weights.cumsum()[-1]
        self.absent = np.flatnonzero(total == 0).tolist()
        self.min_pixels = min_pixels
        self.pictures = [np.flatnonzero(column >= min_pixels) for column in pixels.T]
        self.scarce = [c for c in np.flatnonzero(total).tolist() if not len(self.pictures[c])]
        for c in self.scarce:
            self.pictures[c] = np.flatnonzero(pixels[:, c])

    def draw(self, choice: int, seed: int) -> SampleKey:
        """Return the key that ``choice``, 32 random bits, decides; ``seed`` is its augmentation."""
        focus = int(self._bounds.searchsorted(choice / 2**32, side="right"))
        pictures = self.pictures[focus]
        return SampleKey(int(pictures[mix(choice) % len(pictures)]), seed, focus)

    def describe(self, classes: Sequence[str]) -> list[str]:
        """Return lines with the highest probabilities, and the classes that are exceptions."""
        order = self.probabilities.argsort(kind="stable")[::-1].tolist()
        shown = ", ".join(
            f"{classes[c]} {self.probabilities[c]:.1%} ({len(self.pictures[c])} pictures)"
            for c in order[:_MOST_SHOWN]
            if c not in self.absent
        )
        rest = self.probabilities[order[_MOST_SHOWN:]].sum()
        lines = [f"rare-class sampling: {shown}" + f"; all others {rest:.1%}" * bool(rest)]
        if self.absent:
            names = ", ".join(classes[c] for c in self.absent)
            lines.append(f"rare-class sampling: never drawn, since they never occur: {names}")
        if self.scarce:
            names = ", ".join(classes[c] for c in self.scarce)
            lines.append(
                f"rare-class sampling: no picture has data.rare_class_min_pixels={self.min_pixels} "
                f"pixels of {names}; drawn from all pictures that show them"
            )
        return lines


@dataclass
class StepSampler:
    """Endless batches of one process, from a given batch on.

    The run is one stream of positions 0, 1, 2, ...: epoch after epoch, each a new permutation of
    the data set, or independent draws of ``rare``. Batch b of all processes together starts at
    position ``b * world * batch_size``, so at an equal global batch the content of a step does not
    depend on the number of processes or workers, and a resumed run continues where it stopped
    without stored state.
    """

    num_samples: int  # of the data set
    batch_size: int  # of one process
    _: KW_ONLY
    seed: int  # decides order and augmentation
    start: int = 0  # number of the first batch
    rank: int = 0  # number of this process
    world: int = 1  # number of processes
    rare: RareClassSampling | None = None
    class_mix: float | None = None  # share of the samples that get a partner

    def __post_init__(self) -> None:
        size = self.batch_size
        if size < 1:
            raise InputError(f"data.batch_size={size} is not a whole number of at least 1")
        if self.num_samples < size * self.world:
            raise InputError(
                f"{self.num_samples} samples do not fill one batch: data.batch_size={size} on "
                f"{self.world} process(es); use a smaller data.batch_size"
            )

    def __iter__(self) -> Iterator[list[SampleKey]]:
        first = (self.start * self.world + self.rank) * self.batch_size
        for position in itertools.count(first, self.world * self.batch_size):
            yield [self._key(p) for p in range(position, position + self.batch_size)]

    def _key(self, position: int) -> SampleKey:
        # Of the position, not of the index: a sample is augmented differently in each epoch.
        # The second number keeps seeds of different use apart; SkipBadSamples has 2 and 3.
        seed = mix(self.seed, 1, position)
        if self.rare:
            key = self.rare.draw(mix(self.seed, 4, position), seed)
        else:
            epoch, place = divmod(position, self.num_samples)
            order = _permutation(self.num_samples, mix(self.seed, 0, epoch))
            key = SampleKey(int(order[place]), seed)
        if self.class_mix and mix(seed, 5) < self.class_mix * 2**32:
            choice, own = mix(seed, 6), mix(seed, 7)
            other = SampleKey(choice % self.num_samples, own)  # in no epoch's order
            key = key._replace(partner=self.rare.draw(choice, own) if self.rare else other)
        return key


@functools.lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int) -> torch.Tensor:
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(seed))
