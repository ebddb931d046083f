"""What becomes of a training sample that cannot be read: the run stops, or takes another one."""

from collections.abc import Callable
from typing import NamedTuple

from torch.utils.data import Dataset

from danet.errors import InputError
from danet.plain import is_number
from danet.seeds import mix
from danet.types import Draw, Sample

POLICIES = ("error", "skip")
GRACE = 3
"""So many bad samples are forgiven whatever share of a small data set they are."""
_TRIES = 20
"""Replacements in a row that may be bad, too."""


class Bad(NamedTuple):
    """A sample that could not be read."""

    item: int
    """Its index in the data set."""
    reason: str
    """What the data set said, with the path."""


class Read(NamedTuple):
    """A sample, and the bad ones in whose place it stands."""

    sample: Sample
    bad: tuple[Bad, ...]


class Replacing(Dataset[Read]):
    """Reads a data set so that the next best sample takes the place of a bad one.

    Which one follows from the seed of the draw alone, not from what came before, so a run that is
    stopped and resumed sees what the whole run would, as long as the same files are bad. Other
    processes notice nothing.
    """

    def __init__(self, dataset: Dataset[Sample]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Read:
        """Reads what is drawn, or what replaces it.

        Raises:
            InputError: Not one of many replacements can be read.
        """
        bad: list[Bad] = []
        while True:
            try:
                return Read(self.dataset[draw], tuple(bad))
            except (InputError, OSError) as error:
                bad.append(Bad(draw.item, str(error)))
                if len(bad) > _TRIES:
                    lines = [f"  {one.reason}" for one in bad[:GRACE]]
                    raise InputError(
                        f"data.on_bad_sample=skip: {len(bad)} samples in a row cannot be read; "
                        "is the storage still there?\n" + "\n".join(lines)
                    ) from error
                draw = Draw(mix(draw.seed, 2) % len(self), mix(draw.seed, 3))


class BadSamples:
    """Counts the bad samples of one process, tells each once, and stops when there are too many.

    Args:
        num_samples: Of the data set.
        max_share: Of the different samples seen so far, 0..1; GRACE are forgiven anyway.
        tell: Is given a line for each bad sample when it is met first.

    Attributes:
        reasons: What is wrong, by index in the data set.
        replaced: How often another sample was taken.
    """

    def __init__(self, num_samples: int, max_share: float, tell: Callable[[str], None]) -> None:
        self.num_samples = num_samples
        self.max_share = max_share
        self.tell = tell
        self.reasons: dict[int, str] = {}
        self.replaced = 0
        self._seen = 0

    def note(self, reads: int, bad: tuple[Bad, ...]) -> None:
        """Takes in that so many samples were read, and which others could not be.

        Raises:
            InputError: Too many; with all of them.
        """
        self._seen += reads
        self.replaced += len(bad)
        for one in bad:
            if one.item not in self.reasons:
                self.reasons[one.item] = one.reason
                self.tell(f"skipped, another sample takes its place: {one.reason}")
        seen = min(self._seen, self.num_samples)
        if len(self.reasons) > max(GRACE, self.max_share * seen):
            raise InputError(
                f"{len(self.reasons)} of {seen} samples seen cannot be read, more than "
                f"data.max_bad_share={self.max_share}; mend or remove them (tools/check_data.py "
                "full=true finds all):\n"
                + "\n".join(f"  {reason}" for reason in self.reasons.values())
            )


def summary(of_processes: list[dict[int, str]]) -> list[str]:
    """Returns lines that name the bad samples of all processes, each once; none without any.

    Args:
        of_processes: BadSamples.reasons of each process.
    """
    together = {item: reason for reasons in of_processes for item, reason in reasons.items()}
    if not together:
        return []
    lines = [f"  {together[item]}" for item in sorted(together)]
    return [f"{len(lines)} sample(s) could not be read and were replaced by others:", *lines]


def faults(*, on_bad_sample: object, max_bad_share: object, timeout: object) -> list[str]:
    """Returns what is wrong with the settings of loading, one line each."""
    lines = []
    if on_bad_sample not in POLICIES:
        lines.append(f"data.on_bad_sample={on_bad_sample}: expected {' or '.join(POLICIES)}")
    if not is_number(max_bad_share) or not 0 <= max_bad_share <= 1:
        lines.append(f"data.max_bad_share={max_bad_share}: expected a share between 0 and 1")
    if not is_number(timeout) or not timeout >= 0:
        lines.append(f"data.timeout={timeout}: expected seconds, or 0 to wait for ever")
    return lines
