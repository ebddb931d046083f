"""Split lists: one name a line, from files that ship with the package or from a user's own."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from danet.datasets.items import Item
from danet.datasets.layout import PairLayout, pair_files, stem_of
from danet.datasets.listing import IMAGE_SUFFIXES
from danet.errors import InputError

# Folder of the lists that ship with the package; its README.md names their sources.
SHIPPED = Path(__file__).parent / "splits"
UNSCORED = "; data.val_split=null trains without a validation set"

# A path in a line that is absolute, on any system, or goes up.
_OUTSIDE = re.compile(r"(^|[\s,;])([/\\]|[A-Za-z]:[/\\])|(^|[\s,;/\\])\.\.([/\\\s]|$)")

# A line with the paths of image and mask; both may hold blanks.
_TWO_PATHS = re.compile(
    rf"(.+?(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))[\s,;]+(\S.*)", re.IGNORECASE
)


class SplitList(NamedTuple):
    """The names of a list, in order."""

    path: Path
    names: Sequence[tuple[str, int]]  # each with its line, from 1 on; 0 where they are in no lines

    def pairs(
        self, known: Mapping[str, Item], images: Path, *, root: Path | None = None
    ) -> tuple[list[Item], list[str]]:
        """Return the pairs of the names, each once, and a note on images that are named twice.

        ``known`` has the images of the folder ``images`` by name. With ``root`` lines may also hold
        the paths of image and mask, from there on. If some names have no image, InputError has the
        line and the path of the first.
        """
        items: dict[str, Item] = {}
        missing: list[str] = []
        repeated: dict[str, str] = {}
        for name, line in self.names:
            item = known.get(name)
            if item is None:
                item = Item(f"{images}/{name}", None, name)
                if root and (two := _TWO_PATHS.fullmatch(name)):
                    item = Item(f"{root}/{two[1]}", f"{root}/{two[2]}", stem_of(two[1]))
                if not os.path.isfile(item.image):
                    where = f"{self.path}, line {line}" if line else str(self.path)
                    missing.append(f"{where}: there is no image {item.image}")
                    continue
            if item.image in items:
                repeated[item.image] = name
            items.setdefault(item.image, item)
        if missing and (known or len(missing) < len(self.names)):
            raise InputError(f"{missing[0]} ({len(missing)} of {len(self.names)} names have none)")
        names = ", ".join(list(repeated.values())[:5])
        note = f"{len(repeated)} images stand there more than once and count once: {names}"
        return list(items.values()), [f"{self.path}: {note}"] if repeated else []


def read_list(path: Path) -> SplitList:
    """Read a list without blank lines, blanks around names, CRLF and a byte-order mark.

    Raises InputError if it is no text, is empty, or a name leaves the data's folder.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a UTF-8 text"
        raise InputError(f"{path}: the list cannot be read ({reason})") from error
    # Not splitlines(): it also cuts at characters that a file name may hold.
    lines = [line.strip() for line in text.split("\n")]
    if not (names := [(name, i) for i, name in enumerate(lines, start=1) if name]):
        raise InputError(f"{path}: the list is empty; expected one name a line")
    for name, line in names:
        if _OUTSIDE.search(name):
            raise InputError(f"{path}, line {line}: the path {name!r} leaves the data's folder")
    return SplitList(path, names)


def find_list(places: Iterable[Path], data_set: str, split: str) -> SplitList:
    """Read the first list of a tree that exists, else the one of the package."""
    return read_list(next(filter(Path.exists, places), SHIPPED / data_set / f"{split}.txt"))


@dataclass(frozen=True)
class SplitRule:
    """How pictures are divided into splits where no folders do it.

    ``lists`` are text files, from root on, with a picture a line: its name below images_dir, or the
    paths of image and mask from root on.
    """

    lists: Mapping[str, str] | None = None
    allow_overlap: bool = False  # of earlier checkpoints: data.allow_overlap is checked elsewhere
    val_share: float = 0.2  # of a folder without splits; 0 leaves none for val

    def __post_init__(self) -> None:
        if not 0 <= self.val_share < 1:
            raise InputError(f"data.val_share={self.val_share} is not between 0 and 1")

    def choose_val(self, names: Sequence[str]) -> set[str]:
        """Return the names of val: the first round(n * val_share) by their hash, 1 to n - 1.

        There are none with a share of 0, nor of a single picture.
        """
        # A hash and not a seed: a picture that is added moves few others between the splits.
        ordered = sorted(names, key=lambda name: (hashlib.sha256(os.fsencode(name)).digest(), name))
        count = max(round(len(ordered) * self.val_share), 1) if self.val_share else 0
        return set(ordered[: max(0, min(count, len(ordered) - 1))])

    def list_of(self, split: str, splits: Sequence[str], root: Path) -> SplitList:
        """Read the list of ``split``, one of ``splits``, from ``root`` on."""
        lists = self.lists or {}
        if not set(lists) <= set(splits) or split not in lists:
            raise InputError(
                f"data.lists has the splits {', '.join(map(str, lists))}; expected some of "
                f"{', '.join(splits)}, and {split!r} is needed now{UNSCORED * (split == 'val')}"
            )
        return read_list(root / Path(lists[split]).expanduser())

    def read_items(
        self, split: str, splits: Sequence[str], root: Path, files: PairLayout
    ) -> tuple[list[Item], list[str]]:
        """Return the pairs of ``split``, one of ``splits``, and notes; masks need not exist."""
        names = self.list_of(split, splits, root)
        images, masks = files.folders(root)
        known = pair_files(images, masks, files.patterns)[0]
        paths = {item.image.removeprefix(f"{images}/"): item for item in known.values()}
        known = {stem_of(path): item for path, item in paths.items()} | known | paths
        return names.pairs(known, images, root=root)
