"""Sources of pictures: files, folders, patterns, lists, and the frames of videos."""

import os
from collections import Counter, deque
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob, has_magic
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np

from danet.bands import Bands
from danet.datasets.band_io import read_bands
from danet.datasets.image_io import Levels, inspect_dropped
from danet.datasets.listing import IMAGE_SUFFIXES
from danet.errors import InputError

VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
"""Compared in lower case."""
_COUNTED = frozenset({".mp4", ".m4v", ".mov", ".avi"})
"""Containers that store the number of frames; of others it is estimated from the duration."""
_TIMEOUT = 10_000  # ms in which a stream must open, and in which each frame must come
T = TypeVar("T")


class Source(NamedTuple):
    """A file to be predicted, or a camera, a stream or a pipe, which cannot be read again."""

    path: Path
    name: str  # of its results: its path below the folder that was given, without suffix; unique
    version: dict[str, Any]
    """Absolute path, bytes, mtime and ctime in ns: results of another are predicted again.

    The ctime cannot be set by copying or by ``touch``.
    """
    is_raster: bool = False  # done in windows, see danet.prediction.raster
    address: str = ""  # of what is no file, with its password; "-" for pictures on standard input
    is_live: bool = False  # frames are lost that are not read in time

    @property
    def is_video(self) -> bool:
        """Whether it is a camera or a stream, or the suffix is that of a video."""
        return self.address not in ("", "-") or self.path.suffix.lower() in VIDEO_SUFFIXES

    def frame(self, number: int) -> str:
        """Return the name of the results of a frame of a video; frames count from 0."""
        return f"{self.name}/{number:06d}"


class Picture(NamedTuple):
    """A picture that was read."""

    name: str
    source: Source
    image: np.ndarray  # uint8 (H, W, 3), RGB, or raw bands (H, W, N)
    rate: float = 0.0  # frames per second of its video; 0 for a file of its own
    dropped: tuple[str, ...] = ()  # what the reader dropped
    levels: Levels | None = None  # of a file with more than 8 bits
    size: tuple[int, int] | None = None  # height and width of a raster, whose image is reduced
    counts: Sequence[int] = ()  # of a raster: pixels of each class
    sure: tuple[float | None, float] | None = None  # of a raster: mean confidence, unknown share
    time: float = 0.0  # Unix time at which a live frame was read
    still: int = 0  # how often its video shows the frame before it once more


def find_sources(wanted: str, lines: Iterable[str] = ()) -> list[Source]:
    """Return the files that a setting names, each once, sorted by path; a list keeps its order.

    It is a file, a folder (with all folders below), a pattern with ``*``, ``?`` and ``**``, or
    ``-`` for the list ``lines``, one path per line. Raises InputError if there is no picture.
    """
    path = Path(wanted).expanduser()
    if wanted == "-":
        paths = [Path(os.path.expanduser(line.strip())) for line in lines if line.strip()]
        if missing := [p for p in paths if not p.is_file()]:
            raise InputError(f"images=-: {missing[0]}: there is no such file")
    elif path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(path.rglob("*"))
    elif has_magic(wanted):
        paths = sorted(map(Path, glob(str(path), recursive=True)))
    else:
        raise InputError(f"images={wanted}: there is no such file or folder")
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    chosen = [p.absolute() for p in paths if p.suffix.lower() in suffixes and p.is_file()]
    if not chosen:
        known = ", ".join(sorted(suffixes))
        raise InputError(f"images={wanted}: no pictures or videos there ({known})")
    chosen = list(dict.fromkeys(chosen))
    root = path.absolute() if path.is_dir() else os.path.commonpath([p.parent for p in chosen])
    whole = [path.relative_to(root) for path in chosen]
    bare = [path.with_suffix("") for path in whole]
    number = Counter([*whole, *bare])
    # Frames of clip.mp4 are clip/000000 and so on, as a picture of a folder clip may be.
    videos = {b for b, w in zip(bare, whole, strict=True) if w.suffix.lower() in VIDEO_SUFFIXES}
    return [
        _as_source(p, (b if number[b] == 1 and b.parent not in videos else w).as_posix())
        for p, b, w in zip(chosen, bare, whole, strict=True)
    ]


def _as_source(path: Path, name: str) -> Source:
    found = path.stat()
    version = {"bytes": found.st_size, "modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return Source(path, name, {"source": str(path), **version})


def open_video(source: Source) -> cv2.VideoCapture:
    """Open a video, a camera or a stream; whether that failed is in ``isOpened()``."""
    if not source.address:
        return cv2.VideoCapture(str(source.path))
    # Their messages contain the address, and so the password.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if source.address.isdecimal():
        return cv2.VideoCapture(min(int(source.address), 2**31 - 1))
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT]
    return cv2.VideoCapture(source.address, cv2.CAP_FFMPEG, limits)


def count_frames(path: Path) -> int:
    """Return the number of frames in the header of a video; 0 where it has none."""
    return max(0, int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def read_pictures(
    sources: Iterable[tuple[Source, Container[str]]], *, max_pixels: int, bands: Bands | None = None
) -> Iterator[Picture | InputError | None]:
    """Yield pictures one after another, and an error in the place of one that cannot be read.

    Each source comes with the names that have results, for which None is yielded. Pictures above
    ``max_pixels`` are refused, and with ``bands``, which are read raw, videos.
    """
    for source, done in sources:
        if source.is_video and bands:
            yield InputError(f"{source.path}: a video is RGB; this network reads other bands")
        elif source.is_video:
            yield from _frames(source, done)
        elif source.name in done:
            yield None
        else:
            try:
                image = read_bands(source.path, bands, max_pixels=max_pixels)[0]
                facts = () if bands else inspect_dropped(source.path, max_pixels=max_pixels)
            except InputError as error:
                # A picture of a pipe is a temporary file, whose name says nothing.
                text = str(error).replace(str(source.path), source.name)
                yield InputError(text) if source.address else error
            else:
                yield Picture(source.name, source, image, 0.0, *facts)


def _frames(source: Source, done: Container[str]) -> Iterator[Picture | InputError | None]:
    """Yield the frames of a video in order, and an error where it ends too early."""
    capture = open_video(source)
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate <= 1000 else 25.0  # some streams state ticks of a clock
    number, is_read = 0, True
    while capture.grab():
        name = source.frame(number)
        if name in done:
            yield None
        else:
            is_read, frame = capture.retrieve()
            if not is_read:
                break
            yield Picture(name, source, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), rate)
        number += 1
    expected = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    # More frames may be missing where their number is an estimate.
    tolerance = 1 if source.path.suffix.lower() in _COUNTED else max(1, expected // 50)
    if number == 0:
        yield InputError(f"{source.path}: not a readable video")
    elif not is_read or number < expected - tolerance:
        yield InputError(
            f"{source.path}: {number} of {expected} frames could be read, which are done; the file "
            "is cut off or damaged",
        )


def prefetch(items: Iterator[T], count: int = 2) -> Generator[T, None, None]:
    """Yield the same items, computed ahead by another thread."""
    end = object()
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(next, items, end) for _ in range(count))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(reader.submit(next, items, end))
            yield item  # type: ignore[misc]
            item = end  # a reference here would keep a picture in memory
