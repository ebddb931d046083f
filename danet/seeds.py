"""Reproducible seeds, a function of the seed of the run and a position in it."""

import numpy as np


def mix(*numbers: int) -> int:
    """Hash non-negative integers to a seed of 32 bits.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    # Unlike sums or products, a hash keeps (1, 2) and (2, 1) and neighbouring runs apart.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
