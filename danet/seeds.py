"""Seeds for things that must repeat: a function of the run's seed and a place in the run."""

import numpy as np


def mix(*numbers: int) -> int:
    """Mixes non-negative integers into a seed of 32 bits.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
