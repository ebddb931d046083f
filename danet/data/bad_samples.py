"""Unreadable training samples: an error, or replaced by other samples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.utils.data import Dataset

from danet.errors import InputError
from danet.seeds import mix
from danet.types import Sample, SampleKey

GRACE = 3  # number of bad samples tolerated, whatever share of a small data set they are
Reasons = dict[int, str]
"""Index in the data set of a sample that could not be read -> message, with the path."""


class Loaded(NamedTuple):
    """A training sample and what it took to get it."""

    sample: Sample
    bad: Reasons  # the samples that it replaces
    num_read: int = 1  # samples that make it up


class SkipBadSamples(Dataset[Loaded]):
    """Data set in which a random other sample replaces one that cannot be read.

    The replacement depends on the seed in the key alone, not on previous samples, so a resumed run
    has the samples of an uninterrupted one, as long as the same files are bad. Other processes are
    not affected. ``max_retries`` successive replacements may be bad as well; 0 replaces nothing.
    """

    def __init__(self, dataset: Dataset[Sample], max_retries: int = 20) -> None:
        self.dataset = dataset
        self.items = getattr(dataset, "items", None)  # with the names for messages
        self.max_retries = max_retries

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: SampleKey) -> Loaded:
        """Return the sample of a key, or its replacement and the samples that it replaces."""
        bad: Reasons = {}
        for _ in range(self.max_retries + 1):
            try:
                return Loaded(self.dataset[key], bad)
            except (InputError, OSError) as error:  # other errors are bugs and must not be hidden
                if not self.max_retries:
                    raise
                bad[key.index] = str(error)
            # 2 and 3, since StepSampler uses 0 and 1.
            key = SampleKey(mix(key.seed, 2) % len(self), mix(key.seed, 3))
        raise InputError(
            f"data.on_bad_sample=skip: {self.max_retries + 1} samples in a row cannot be read; is "
            "the storage still there?\n  " + "\n  ".join(list(bad.values())[:GRACE])
        )


@dataclass
class BadSamples:
    """Record of the bad samples of one process: warns once about each, fails if too many."""

    num_samples: int  # of the data set
    max_share: float  # of the different samples seen so far, 0..1; GRACE are tolerated anyway
    warn: Callable[[str], None]  # called with one line at the first occurrence of each
    reasons: Reasons = field(default_factory=dict, init=False)
    replaced: int = field(default=0, init=False)  # number of replacements
    _seen: int = field(default=0, init=False)

    def record(self, num_read: int, bad: Reasons) -> None:
        """Count samples that were read, and record bad ones; raise InputError for too many."""
        self._seen += num_read
        self.replaced += len(bad)
        for index, reason in bad.items():
            if index not in self.reasons:
                self.reasons[index] = reason
                self.warn(f"skipped, another sample takes its place: {reason}")
        # A second epoch has no new samples, and must not raise the number that is tolerated.
        seen = min(self._seen, self.num_samples)
        if len(self.reasons) > max(GRACE, self.max_share * seen):
            raise InputError(
                f"{len(self.reasons)} of {seen} samples seen cannot be read, more than "
                f"data.max_bad_share={self.max_share}; repair or remove them (tools/check_data.py "
                "full=true finds all):\n"
                + "\n".join(f"  {reason}" for reason in self.reasons.values())
            )


def summary(reasons_by_rank: list[Reasons]) -> list[str]:
    """Return lines that list the bad samples of all processes, each once; none without any."""
    merged = {index: reason for reasons in reasons_by_rank for index, reason in reasons.items()}
    head = f"{len(merged)} sample(s) could not be read and were replaced by others:"
    return [head, *(f"  {merged[index]}" for index in sorted(merged))] if merged else []
