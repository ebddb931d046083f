"""Sources of pictures: files, folders, patterns, lists, and the frames of videos."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from pathlib import Path
from typing import NamedTuple, TypeVar

import cv2
import numpy as np

from danet.datasets.image_io import Levels, inspect_dropped, read_image
from danet.datasets.listing import IMAGE_SUFFIXES
from danet.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
"""Compared in lower case."""
_COUNTED = frozenset({".mp4", ".m4v", ".mov", ".avi"})
"""Containers that store the number of frames; of others it is estimated from the duration."""

T = TypeVar("T")


class Source(NamedTuple):
    """A file to be predicted."""

    path: Path
    name: str
    """Of its results: its path below the folder that was given, without suffix; unique."""
    version: tuple[int, int, int]
    """Bytes, mtime and ctime in ns: results of another version are predicted again.

    The ctime cannot be set by copying or by ``touch``.
    """

    @property
    def is_video(self) -> bool:
        """Return whether the suffix is that of a video."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


class Picture(NamedTuple):
    """A picture that was read."""

    name: str
    source: Source
    image: np.ndarray
    """uint8 (H, W, 3), RGB."""
    rate: float = 0.0
    """Frames per second of its video; 0 for a file of its own."""
    dropped: tuple[str, ...] = ()
    """What the reader dropped."""
    levels: Levels | None = None
    """Of a file with more than 8 bits."""


class Unreadable(NamedTuple):
    """A file that could not be read."""

    source: Source
    problem: str
    """One line, with the path."""


IsDone = Callable[[str, Source], bool]
"""Returns whether the results with a name are there already."""


def find_sources(wanted: str, lines: Iterable[str] = ()) -> list[Source]:
    """Return the files that a setting names, sorted by path; a list keeps its order.

    Args:
        wanted: A file, a folder (with all folders below), a pattern with ``*``, ``?`` and ``**``,
            or ``-`` for a list of files.
        lines: The list: one path per line; empty lines are left out.

    Raises:
        InputError: There is no such file, or no picture or video among them.
    """
    path = Path(wanted).expanduser()
    known = ", ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    if wanted == "-":
        paths, root = [Path(line.strip()).expanduser() for line in lines if line.strip()], None
        for listed in paths:
            if not listed.is_file():
                raise InputError(f"images=-: {listed}: there is no such file")
    elif path.is_file():
        paths, root = [path], None
    elif path.is_dir():
        paths, root = sorted(p for p in path.rglob("*") if p.is_file()), path
    elif has_magic(wanted):
        paths, root = sorted(Path(p) for p in glob(str(path), recursive=True)), None
        paths = [p for p in paths if p.is_file()]
    else:
        raise InputError(f"images={wanted}: there is no such file or folder")
    kept = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if paths and not kept and root is None:
        raise InputError(f"images={wanted}: {paths[0]} is no picture or video ({known})")
    if not kept:
        raise InputError(f"images={wanted}: no pictures or videos there ({known})")
    names = _names(kept, root)
    return [Source(p, n, _version(p)) for p, n in zip(kept, names, strict=True)]


def _version(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _names(paths: Sequence[Path], root: Path | None) -> list[str]:
    """Return unique names: the stem, with parent folders and suffix where they are needed."""
    if root is None:
        absolute = [p.absolute() for p in paths]
        parents = {p.parent for p in absolute}
        # The folder that all files share.
        shared = absolute[0].parent
        while len(parents) > 1 and not all(p.is_relative_to(shared) for p in absolute):
            shared = shared.parent
        bare = [p.stem for p in paths]
        whole = [p.relative_to(shared).with_suffix("").as_posix() for p in absolute]
        stems = bare if len(set(bare)) == len(bare) else whole
    else:
        stems = [p.relative_to(root).with_suffix("").as_posix() for p in paths]
    counts: dict[str, int] = {}
    for stem in stems:
        counts[stem] = counts.get(stem, 0) + 1
    names, used = [], set[str]()
    for path, stem in zip(paths, stems, strict=True):
        name = stem if counts[stem] == 1 else f"{stem}{path.suffix}"
        number = 2
        while name in used:  # a file that is listed twice
            name, number = f"{stem}{path.suffix}-{number}", number + 1
        used.add(name)
        names.append(name)
    return names


def frame_name(source: Source, number: int) -> str:
    """Return the name of a frame of a video; frames count from 0."""
    return f"{source.name}/{number:06d}"


def count_frames(source: Source) -> int:
    """Return the number of frames in the header of a video; 0 where it has none."""
    return max(0, int(cv2.VideoCapture(str(source.path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def read_pictures(
    sources: Iterable[Source], is_done: IsDone, *, max_pixels: int
) -> Iterator[Picture | Unreadable | None]:
    """Yield pictures one after another, and None for each that is done, without decoding it."""
    for source in sources:
        if source.is_video:
            yield from _frames(source, is_done)
        elif is_done(source.name, source):
            yield None
        else:
            try:
                image = read_image(source.path, max_pixels=max_pixels)
                facts = inspect_dropped(source.path, max_pixels=max_pixels)
            except InputError as error:
                yield Unreadable(source, str(error))
            else:
                yield Picture(source.name, source, image, 0.0, *facts)


def _frames(source: Source, is_done: IsDone) -> Iterator[Picture | Unreadable | None]:
    """Yield the frames of a video in order, and Unreadable where it ends too early."""
    capture = cv2.VideoCapture(str(source.path))
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    number, is_broken = 0, False
    while capture.grab():
        name = frame_name(source, number)
        if is_done(name, source):
            yield None
        else:
            is_read, frame = capture.retrieve()
            if not is_read:
                is_broken = True
                break
            yield Picture(name, source, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate)
        number += 1
    capture.release()
    expected = count_frames(source)
    if number == 0:
        yield Unreadable(source, f"{source.path}: not a readable video")
    elif is_broken or number < expected - _tolerance(source, expected):
        yield Unreadable(
            source,
            f"{source.path}: {number} of {expected} frames could be read, which are done; the file "
            "is cut off or damaged",
        )


def _tolerance(source: Source, expected: int) -> int:
    """Return how many frames may be missing; more where their number is an estimate."""
    is_counted = source.path.suffix.lower() in _COUNTED
    return 1 if is_counted else max(1, expected // 50)


def prefetch(items: Iterator[T], count: int = 2) -> Iterator[T]:
    """Yield the same items, computed ahead by another thread."""
    end = object()
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield item  # type: ignore[misc]
            item = end  # a reference here would keep a picture in memory
