"""ClassMix: classes of one training sample pasted over another, image and mask together."""

import math

import numpy as np
from torch.utils.data import Dataset

from danet.data.bad_samples import Loaded, SkipBadSamples
from danet.errors import InputError
from danet.seeds import mix
from danet.types import Sample, SampleKey, ignore_of


class ClassMix(Dataset[Loaded]):
    """Data set in which a sample whose key has a partner gets half of the partner's classes.

    Both are augmented before, by the seeds of their keys, so the result depends on the key alone.
    Olsson et al., ClassMix, WACV 2021, section 3.1; here both masks are labels, not predictions.
    """

    def __init__(self, dataset: SkipBadSamples) -> None:
        self.dataset = dataset
        self.items = dataset.items  # with the names for messages

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Loaded:
        """Return the sample of a key; raise InputError if one cannot be read or sizes differ."""
        below = self.dataset[key]
        if key.partner is None:
            return below
        above = self.dataset[key.partner]
        sample = paste(below.sample, above.sample, mix(key.partner.seed, 8))
        return Loaded(sample, {**below.bad, **above.bad}, below.num_read + above.num_read)


def paste(below: Sample, above: Sample, seed: int) -> Sample:
    """Return ``below`` with half of the classes of ``above``, rounded up, pasted over it.

    The seed draws the classes. Pixels that ``above`` ignores are never pasted. Samples of different
    sizes raise InputError.
    """
    if below.mask.shape != above.mask.shape:
        sizes = " and ".join(f"{of.mask.shape[1]} x {of.mask.shape[0]}" for of in (below, above))
        raise InputError(
            f"data.class_mix: {below.name} and {above.name} are of different sizes ({sizes}): set "
            "data.crop and a transform that crops, such as data/transforms=street, or "
            "data.class_mix=null"
        )
    ignored = ignore_of(above.mask)
    present = np.flatnonzero(np.bincount(above.mask.ravel(), minlength=ignored + 1)[:ignored])
    # By a hash, not a generator of numpy, whose draws may change with its version.
    in_order = sorted(present.tolist(), key=lambda c: mix(seed, c))
    is_pasted = np.zeros(ignored + 1, bool)
    is_pasted[in_order[: math.ceil(len(in_order) / 2)]] = True
    where = is_pasted[above.mask]  # (H, W)
    image = np.where(where[..., None], above.image, below.image)
    return Sample(image, np.where(where, above.mask, below.mask), f"{below.name} + {above.name}")
