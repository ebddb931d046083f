"""An export of an annotation tool: its format, its pictures on disk, and masks painted once.

Masks and an index lie in the cache folder, below a digest of the names, sizes and times of all
files of the export, so what is found there is never stale. Another state gets a folder of its own:
a training that runs meanwhile keeps its masks.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from types import ModuleType

import cv2
import numpy as np
from pydantic import TypeAdapter
from tqdm import tqdm

from danet.datasets.exports import (
    coco,
    cvat,
    label_studio,
    labelme,
    roboflow,
    supervisely,
    via,
    voc_masks,
    yolo,
)
from danet.datasets.exports.pictures import Pictures, size_of
from danet.datasets.exports.shapes import Export, Picture, ends_of, paint
from danet.datasets.labels import Color
from danet.datasets.layout import stem_of
from danet.datasets.listing import IMAGE_SUFFIXES, find_files
from danet.errors import InputError
from danet.filesystem import file_lock, storage_errors

FORMATS: dict[str, ModuleType] = {
    **{"coco": coco, "cvat": cvat, "labelme": labelme, "label_studio": label_studio},
    **{"roboflow": roboflow, "supervisely": supervisely, "via": via, "voc_masks": voc_masks},
    **{"yolo": yolo},
}
"""By the name of the setting ``data.format``."""
_VERSION = b"3"  # raised when readers or painting give other masks
_READ = IMAGE_SUFFIXES | {".json", ".xml", ".txt", ".yaml", ".yml", ".csv", ".npy"}


@dataclass
class Entry:
    """A picture of an export that is on disk."""

    name: str  # unique: its path below the folder, without suffix unless another has the same
    image: str  # absolute path
    split: str | None  # train, val or test, where the export says it
    is_empty: bool  # no object is in it
    remarks: dict[str, tuple[int, str]]  # key of shapes.REMARKS -> number of objects, the first one


@dataclass
class Index:
    """An export whose masks are painted: 0 is no label, position + 1 a label, then their crowds."""

    format: str
    labels: list[str]
    colors: list[Color] | None
    is_complete: bool
    entries: list[Entry] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # pictures that are not on disk
    objects: dict[str, tuple[int, str]] = field(default_factory=dict)  # label -> number, the first
    masks: str = ""  # folder of <name>.png
    notes: list[str] = field(default_factory=list)  # of what is not used


def open_export(
    root: Path,
    cache: Path,
    *,
    kind: str = "auto",
    annotations: str | None = None,
    images_dir: str | None = None,
) -> Index:
    """Return the index of an export; read and paint it first if that has not been done.

    Args:
        root: Folder of the export.
        cache: Folder for the masks.
        kind: A key of FORMATS, or auto.
        annotations: Pattern of the annotation files below root; None for all.
        images_dir: Further folder with pictures, from root on or absolute.
    """
    if kind not in ("auto", *FORMATS):
        raise InputError(f"data.format={kind}: expected auto or one of {', '.join(FORMATS)}")
    if cache.resolve().is_relative_to(root.resolve()):
        raise InputError(f"data.cache_dir={cache}: it lies below data.root={root}")
    more = root / Path(images_dir).expanduser() if images_dir else root
    folders = [Path(folder) for folder in dict.fromkeys(map(os.path.normpath, (root, more)))]
    digest = hashlib.sha256(_VERSION + repr((kind, annotations, images_dir)).encode())
    for folder in folders:
        for name in find_files(folder, _READ):
            s = os.stat(folder / name)
            # A copy over a file that keeps its size and the time of writing changes ctime.
            state = s.st_size, s.st_mtime_ns, s.st_ctime_ns
            digest.update(f"{folder}/{name}{state}".encode(errors="surrogateescape"))
    place = f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"
    home = cache / "annotations" / place / digest.hexdigest()[:16]
    if (found := _load(home / "index.json")) is not None:
        return found
    with storage_errors(home, "data.cache_dir: "):
        home.mkdir(parents=True, exist_ok=True)
        with open(home / "lock", "a") as lock:
            file_lock(lock)  # of several processes the first one paints
            if (found := _load(home / "index.json")) is None:
                name, files, unread = _files_of(root, kind, annotations)
                found = _paint_all(name, files, root, folders, home)
                found.notes += unread
                text = json.dumps(asdict(found))
                (home / "index.tmp").write_text(text, encoding="utf-8", errors="surrogateescape")
                (home / "index.tmp").replace(home / "index.json")  # last: it says that all is there
    return found


def _load(path: Path) -> Index | None:
    """Read an index; None if there is none, or half a one."""
    try:
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        content = json.loads(text) | {"masks": str(path.parent)}  # wherever the cache is now
        return TypeAdapter(Index).validate_python(content)
    except (OSError, ValueError):
        return None


def _files_of(root: Path, kind: str, annotations: str | None) -> tuple[str, list[Path], list[str]]:
    """Return the format of an export, its annotation files, and a note on others of their kind.

    Raises InputError where the format is unclear, and for a file that is cut off: by its content it
    would be of no format.
    """

    def fits(path: Path) -> bool:
        relative = PurePosixPath(path.relative_to(root))
        return annotations is None or relative.match(annotations)

    kinds = FORMATS if kind == "auto" else {kind: FORMATS[kind]}
    found: dict[str, list[Path]] = {}
    for name, module in kinds.items():
        if files := [*filter(fits, module.find(root))]:
            found[name] = files
    read = {path for files in found.values() for path in files}
    suffixes = {".json", ".xml"} & ({path.suffix.lower() for path in read} or {".json", ".xml"})
    others = [path for name in find_files(root, suffixes) if fits(path := root / name)]
    for path in (others := [path for path in others if path not in read]):
        text = ends_of(path).removeprefix(b"\xef\xbb\xbf").strip()
        if text[:1] + text[-1:] not in (b"{}", b"[]", b"<>"):
            raise InputError(f"{path}: it is cut off, or no UTF-8 text; export it again")
    which = f"data.annotations={annotations}: " if annotations else ""
    if not found:
        formats = "of a known tool" if kind == "auto" else f"in the form of {kind}"
        raise InputError(
            f"{which}no annotations {formats} below {root}; known are {', '.join(FORMATS)}; "
            "pictures that have a mask of class indices or colours each are read by data=folder"
            f"{f'; {others[0]} is in no such form' if others else ''}"
        )
    if len(found) > 1:
        listed = "; ".join(f"data.format={name} for {files[0]}" for name, files in found.items())
        raise InputError(f"{which}{root} holds annotations of several tools; choose one: {listed}")
    count = len(others)
    notes = [f"{count} file(s) of another form are not read: {path}" for path in others[:1]]
    return *next(iter(found.items())), notes


def _paint_all(
    kind: str, files: Sequence[Path], root: Path, folders: Sequence[Path], home: Path
) -> Index:
    """Read an export and paint the masks of all pictures on disk, with a progress bar."""
    export: Export = FORMATS[kind].read(files, root)
    index = Index(kind, [*export.labels], None, export.is_complete, masks=str(home))
    index.colors = [*export.colors] if export.colors else None
    type_ = np.uint8 if 2 * len(index.labels) < 256 else np.uint16
    pictures, counts, first = Pictures(folders), Counter[str](), dict[str, str]()
    described, taken = dict[str, Picture](), set[str]()
    names = Counter(stem_of(image) for image in pictures.paths)
    if not (export.labels and export.pictures):
        raise InputError(f"{files[0]}: no picture has an object; export it when some have")
    with tqdm(export.pictures, f"painting {kind}", unit="picture", dynamic_ncols=True) as bar:
        for picture in bar:
            image = pictures.locate(picture, root)
            if image is None:
                index.missing.append(f"{picture.file}: {picture.name}")
                continue
            if (other := described.setdefault(image, picture)) is not picture:
                advice = f", also in {other.file}; name the right files, 'data.annotations=PATTERN'"
                advice = advice if other.file != picture.file else " there; remove one of them"
                raise InputError(f"{picture.file}: {picture.name} is described twice{advice}")
            values, remarks = paint(picture, size_of(picture, Path(image)), index.labels)
            below = [folder for folder in folders if Path(image).is_relative_to(folder)]
            relative = os.path.relpath(image, below[0])
            name = stem_of(relative) if names[stem_of(image)] == 1 else relative
            if name in taken:  # in both folders
                name = os.path.relpath(image, root).replace("../", "")
            taken.add(name)
            path = home / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(path), values.astype(type_), [cv2.IMWRITE_PNG_COMPRESSION, 1]):
                raise InputError(f"{path}: the mask could not be written; see data.cache_dir")
            places = {
                shape.label: f"{picture.file}, {shape.where}" for shape in picture.shapes[::-1]
            }
            counts.update(shape.label for shape in picture.shapes)
            if picture.mask is not None:
                present = [index.labels[value - 1] for value in np.unique(values) if value]
                places = dict.fromkeys(present, f"{picture.file}, {picture.name}")
                counts.update(present)
            first = places | first
            index.entries.append(Entry(name, image, picture.split, not places, remarks))
    index.objects = {label: (counts[label], first[label]) for label in counts}
    rest = [path for path in pictures.paths if path not in {*described, *export.masks}]
    if rest and not export.is_complete:  # there masks are among them, and readers name the rest
        index.notes.append(f"{len(rest)} picture(s) that no annotation file has: {rest[0]}")
    return index
