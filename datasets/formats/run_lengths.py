"""Run lengths of masks, as COCO, PASCAL in Detail and CVAT have them."""

import numpy as np


def mask_of_runs(counts: str | list[int], size: int) -> np.ndarray:
    """Return bool (size) from lengths of runs of background, object, background, ...

    In COCO's text form a number is a sequence of characters, five bits in each from the low end,
    two's complement; bit 5 says that more follow; 48 is added. From the fourth number on the
    difference to the number two places before is stored (the COCO API's maskApi.c). Raises
    ValueError for a text that no encoder writes, a negative run, or not ``size`` pixels in all.
    """
    runs: list[int] = [] if isinstance(counts, str) else counts
    number = shift = 0
    for character in counts if isinstance(counts, str) else "":
        digit = ord(character) - 48
        if not 0 <= digit < 64 or shift > 35:  # 40 bits are more than any picture has
            raise ValueError("not a run-length text of COCO")
        number |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            number -= (1 << shift) * bool(digit & 16)
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    lengths = np.array(runs, np.int64)
    if shift or lengths.min(initial=0) < 0 or lengths.sum() != size:
        raise ValueError(f"the runs cover {lengths.sum()} pixels, the picture has {size}")
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)
