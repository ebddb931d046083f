"""Learning rate over the run: pure functions of (step, steps)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int, int], float]
"""Returns the factor of the base rate for the update after ``step`` of ``steps``."""


@dataclass
class Poly:
    """``(1 - step / steps) ** power``, the schedule of the paper (section 4.1.2).

    Args:
        power: 0.9 in the paper.
        warmup_steps: Updates over which the factor rises linearly to the curve.

    >>> Poly()(0, 100), round(Poly()(50, 100), 4)
    (1.0, 0.5359)
    """

    power: float = 0.9
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:  # also refuses NaN, for which every comparison is false
                raise ValueError(f"{name}={value} is negative")

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor; above 0, as ``step`` ends at ``steps - 1``."""
        return _warmup(step, self.warmup_steps) * (1 - step / steps) ** self.power


@dataclass
class Cosine:
    """Half a cosine from 1 to ``final``.

    >>> Cosine()(0, 100), Cosine()(50, 100)
    (1.0, 0.5)
    """

    final: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise ValueError(f"final={self.final} is not in 0..1")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative")

    def __call__(self, step: int, steps: int) -> float:
        """Return the factor."""
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        return _warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * cosine)


def _warmup(step: int, warmup_steps: int) -> float:
    # + 1: a first update at rate 0 would change nothing.
    return min(1.0, (step + 1) / (warmup_steps + 1))
