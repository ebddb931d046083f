"""Pictures with the annotations that a tool exported: polygons, run lengths, boxes, masks."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from danet.datasets.base import FileDataset, Item, Reading, Transform
from danet.datasets.cache import cache_folder
from danet.datasets.exports.index import Entry, Index, open_export
from danet.datasets.exports.shapes import REMARKS
from danet.datasets.labels import (
    Color,
    check_class_names,
    check_colors,
    default_palette,
    is_background,
    read_class_file,
)
from danet.datasets.lists import SplitRule
from danet.datasets.reading import as_dataclass, check_choice
from danet.errors import InputError
from danet.types import ignore_index

_SHOWN = 3  # names in a note
_IGNORED = ("__ignore__", "ignore", "void")
Crowd = Literal["class", "ignore"]


class Annotations(FileDataset, published="annotations"):
    """Reads the export of an annotation tool as it is: see ``exports.index.FORMATS``.

    Polygons are painted once, into masks in the cache folder. Labels become classes by ``labels``
    and by their names. The splits are those of the export; without any, or with train alone,
    ``val_share`` of the pictures are val, by a hash of their names.

    Args:
        root, split, transform, reading: As in FileDataset.
        classes: K names, or a file of names; see ``class_names_of``.
        format: A key of ``exports.index.FORMATS``, or auto.
        annotations: Pattern of the annotation files below root, where there are several sets.
        images_dir: Further folder with pictures.
        labels: Label of the tool -> class, or None to ignore its pixels; others are the classes of
            their name. With "*" it has the class of those that ``classes`` lacks.
        background: Class of pixels without an object, and of labels that mean it; None: ignored.
        crowd: Whether groups of objects (COCO) have their class or are ignored.
        allow_missing_images: Leave out pictures that are not there, rather than refuse the set.
        palette: K RGB colours for drawing; when None, the tool's or ``default_palette``.
        split_rule: ``lists`` and ``val_share``.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        split: str,
        classes: Sequence[str] | str,
        format: str = "auto",
        annotations: str | None = None,
        images_dir: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        background: str | None = "background",
        crowd: Crowd = "class",
        allow_missing_images: bool = False,
        palette: Sequence[Sequence[int]] | None = None,
        split_rule: SplitRule | Mapping[str, Any] | None = None,
        transform: Transform | None = None,
        reading: Reading | None = None,
    ) -> None:
        names = read_class_file(classes).names if isinstance(classes, str) else classes
        check_class_names(names)
        check_choice("crowd", crowd, Crowd)
        self.classes = tuple(names)  # type: ignore[misc]  # of this data set alone
        self.rule = as_dataclass(SplitRule, split_rule)
        self.settings = format, annotations, images_dir
        self.labels = {str(label): name for label, name in (labels or {}).items()}
        self.background, self.crowd = background, crowd
        self.allow_missing_images = allow_missing_images
        self._map: dict[int, int] = {}
        self._colors = palette
        super().__init__(
            root=Path(root), split=split, transform=transform, reading=reading or Reading()
        )

    def find_items(self) -> list[Item]:
        """Return the pictures of the split with their painted masks."""
        kind, annotations, images_dir = self.settings
        index = open_export(
            *(self.root, cache_folder(self.reading.cache_dir)),
            kind=kind,
            annotations=annotations,
            images_dir=images_dir,
        )
        self._map = self._values(index)
        colors = self._colors or self._palette_of(index) or default_palette(self.classes)
        self.palette = check_colors(colors, "data.palette", len(self.classes))  # type: ignore[misc]
        if index.missing:
            self._note_missing(index)
        self.notes += index.notes
        self._splits = Counter(entry.split or "no split" for entry in index.entries)
        entries = self._entries_of_split(index.entries)
        self.notes += [*_remarks(entries)]
        return [
            Item(entry.image, f"{index.masks}/{entry.name}.png", entry.name) for entry in entries
        ]

    def explain_no_images(self) -> str:
        """Return where the pictures are, and how to name others."""
        listed = ", ".join(f"{count} of {split}" for split, count in self._splits.items())
        key = f"data.{'val' if self.split == 'val' else 'train'}_split=SPLIT"
        advice = f"set {key}, or 'data.lists={{train: FILE, val: FILE}}'"
        return "; ".join([f": the export has {listed}", *self.notes, advice])

    def label_map(self) -> Mapping[int, int]:
        """Return value in the painted masks -> class or the ignored value."""
        return self._map

    def _values(self, index: Index) -> dict[int, int]:
        """Return value in the masks -> class; raise InputError for labels without a class."""
        position = {name: i for i, name in enumerate(self.classes)}
        if unknown := sorted({*self.labels} - {*index.labels, "*"}):
            raise InputError(
                f"data.labels: {unknown[0]} is no label of {self.root}; its labels are "
                f"{', '.join(index.labels)}"
            )
        if self.background not in (None, *position) and not index.is_complete:
            raise InputError(
                f"data.classes has no {self.background}, the class of pixels without an object: "
                "add it, or ignore these pixels, data.background=null"
            )
        ignored = ignore_index(len(self.classes))
        nothing = position.get(self.background or "", ignored)
        values, strange = {0: nothing}, list[str]()
        for value, label in enumerate(index.labels, start=1):
            name = _class_of(label, self.labels, self.background, self.classes)
            if name is not None and name not in position and label in index.objects:
                count, first = index.objects[label]
                strange.append(f"{label} ({count} object(s), first {first})")
            values[value] = position.get(name or "", ignored)
            is_class = self.crowd == "class"
            values[value + len(index.labels)] = values[value] if is_class else ignored
        if strange:
            more = len(strange) - _SHOWN
            raise InputError(
                f"labels that data.classes lacks: {'; '.join(strange[:_SHOWN])}"
                f"{f'; and {more} more' * (more > 0)}; add them there, or say which class each is, "
                "null to ignore it, * for all others: 'data.labels={LABEL: CLASS, *: null}'"
            )
        return values

    def _palette_of(self, index: Index) -> list[Color] | None:
        """Return the tool's colours of the classes, where it has one for each."""
        known = dict(zip(index.labels, index.colors or (), strict=False))
        of_class = {
            _class_of(label, self.labels, self.background, self.classes): color
            for label, color in reversed(known.items())
        }
        colors = [of_class.get(n, (0, 0, 0) if is_background(n) else None) for n in self.classes]
        found = [color for color in colors if color is not None]
        return found if len({*found}) == len(self.classes) else None

    def _note_missing(self, index: Index) -> None:
        """Raise InputError for pictures that are not on disk, or note them where it is allowed."""
        count = len(index.missing) + len(index.entries)
        found = f"{len(index.missing)} of {count} pictures of the export are not below {self.root}"
        where = f"{found}: {'; '.join(index.missing[:_SHOWN])}"
        if not (self.allow_missing_images and index.entries):
            leave = ", or leave them out, data.allow_missing_images=true" * bool(index.entries)
            raise InputError(f"{where}; name their folder, data.images_dir=FOLDER{leave}")
        self.notes.append(f"left out: {where}")

    def _entries_of_split(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the pictures of the split: of a list, of the export, or by a hash."""
        if self.rule.lists:
            chosen = self._listed(entries)
            return [entry for entry in entries if entry.image in chosen]
        named = {entry.split for entry in entries} - {None}
        if named - {"train"}:
            if rest := [entry.name for entry in entries if entry.split is None]:
                shown = ", ".join(rest[:_SHOWN])
                self.notes.append(
                    f"{len(rest)} pictures that no split of the export has are train: {shown}"
                )
            return [entry for entry in entries if (entry.split or "train") == self.split]
        of_val = self.divide([entry.name for entry in entries], self.rule)
        return [e for e in entries if self.split == ("val" if e.name in of_val else "train")]

    def _listed(self, entries: Sequence[Entry]) -> set[str]:
        """Return the pictures of the list of the split, by names or by paths from the root on."""
        names = self.rule.list_of(self.split, tuple(self.expected), self.root)
        known = {entry.name: Item(entry.image, None, entry.name) for entry in entries}
        known |= {os.path.relpath(item.image, self.root): item for item in known.values()}
        items, notes = names.pairs(known, self.root)
        self.notes += notes
        return {item.image for item in items}


def class_names_of(
    index: Index, labels: Mapping[str, str | None] | None, background: str | None
) -> list[str]:
    """Return the classes of an export: the background, then the labels in its order.

    A label that ``labels`` maps to a class stands for it, and one that means the background, by its
    name, for the background. ``__ignore__``, ``ignore``, ``void`` and labels mapped to None are no
    classes. Masks that label every pixel have a background only where a label means it.
    """
    names = {str(label): name for label, name in (labels or {}).items()}
    found = [_class_of(label, names, background) for label in index.labels]
    if background and not (index.is_complete and background not in found):
        found.insert(0, background)
    return [*dict.fromkeys(name for name in found if name)]


def _class_of(
    label: str,
    labels: Mapping[str, str | None],
    background: str | None,
    classes: Sequence[str] = (),
) -> str | None:
    """Return the class of a label; None where its pixels are ignored."""
    if label in labels:
        return labels[label]
    if label.lower() in _IGNORED:
        return None
    name = background if background and is_background(label) else label
    return labels["*"] if "*" in labels and name not in (*classes, background) else name


def _remarks(entries: Sequence[Entry]) -> list[str]:
    """Return notes on the objects of pictures, and on pictures without any."""
    notes = []
    for kind, meaning in REMARKS.items():
        found = [entry.remarks[kind] for entry in entries if kind in entry.remarks]
        if count := sum(number for number, _ in found):
            shown = "; ".join(first for _, first in found[:_SHOWN])
            notes.append(f"{count} object(s) {meaning}, in {len(found)} picture(s): {shown}")
    if empty := [entry.name for entry in entries if entry.is_empty]:
        notes.append(f"{len(empty)} picture(s) without any object: {', '.join(empty[:_SHOWN])}")
    return notes
