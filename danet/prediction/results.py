"""Folders of results, and what is there already when an interrupted prediction is restarted.

A folder of results has ``index/NAME.png`` (grey, the class index of every pixel),
``color/NAME.png`` and ``overlay/NAME.png`` as requested, and ``predictions.jsonl`` with one line
for each picture. The line is written last, so a picture that has one has all its files.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch import nn

from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write
from danet.prediction.sources import VIDEO_SUFFIXES, Picture, Source
from danet.visualization.overlay import Palette, colorize, overlay, row_blocks, save_image

KINDS = ("index", "color", "overlay")
_JOURNAL = "predictions.jsonl"
_FRAME = re.compile(r"/\d{6}$")

_SHARED = ("network", "evaluation")
"""Keys of the origin that all results of a folder must share."""

_VERSION = ("bytes", "modified", "changed")
"""Keys of a line that identify the version of a file; older lines lack some."""


class _Input(NamedTuple):
    """The version of a file that a result was predicted from."""

    path: str
    version: tuple[Any, ...]


def _input_of(source: Source) -> _Input:
    return _Input(str(source.path.absolute()), source.version)


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def class_shares(classes: np.ndarray, num_classes: int) -> list[float]:
    """Return the fraction of the pixels of each class, 0..1."""
    counts = np.zeros(num_classes, np.int64)
    for rows in row_blocks(classes):  # since bincount takes eight bytes a pixel
        counts += np.bincount(classes[rows].ravel(), minlength=num_classes)
    return (counts / classes.size).tolist()


class Results:
    """Writes results into a folder, and keeps those of an earlier start.

    Args:
        folder: Created where it does not exist.
        kinds: Of pictures, some of KINDS.
        origin: What all results of a folder share: the network and the protocol.
        classes, palette: Of the network.
        opacity: Of overlays.

    Raises:
        InputError: The folder has results of another origin.
    """

    ORIGIN = "predictions.json"
    """Name of the file with the origin."""

    def __init__(
        self,
        folder: Path,
        kinds: Sequence[str],
        *,
        origin: dict[str, Any],
        classes: Sequence[str],
        palette: Palette,
        opacity: float = 0.55,
    ) -> None:
        self.folder = folder
        self.kinds = tuple(kinds)
        self.classes = classes
        self.palette = palette
        self.opacity = opacity
        self.found: set[int] = set()
        """Classes in all that was written since this start."""
        self._video: _VideoFile | None = None
        self._lines: dict[str, _Input] = {}
        self._whole_videos: dict[str, bool] = {}
        """Name -> whether all of a video was there at the start."""
        self._open(origin)

    def _open(self, origin: dict[str, Any]) -> None:
        path = self.folder / self.ORIGIN
        plain = json.loads(json.dumps(origin))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if path.exists():
                found = json.loads(path.read_text())
                if any(found[key] != plain[key] for key in _SHARED):
                    raise InputError(
                        f"output={self.folder}: results of another checkpoint or another protocol "
                        "are there; name another folder, or remove it"
                    )
            else:
                path.write_text(json.dumps(plain, indent=1) + "\n")
            journal = self.folder / _JOURNAL
            whole = _whole_lines(journal) if journal.exists() else []
            self._lines = {
                line["name"]: _Input(line["source"], tuple(line.get(key) for key in _VERSION))
                for line in whole
            }
            with atomic_write(journal) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in whole))
            self._journal = journal.open("a")
        except InputError:
            raise
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(f"output={self.folder}: cannot be written ({error})") from error

    def refuse_others(self, sources: Sequence[Source]) -> None:
        """Raise InputError for pictures whose results would overwrite those of other pictures."""
        inputs = {}
        for name, found in self._lines.items():
            is_video = Path(found.path).suffix.lower() in VIDEO_SUFFIXES
            inputs[_FRAME.sub("", name) if is_video else name] = found
        for source in sources:
            other = inputs.get(source.name)
            if other is not None and other.path != str(source.path.absolute()):
                raise InputError(
                    f"output={self.folder}: results of {other.path} are there under the name that "
                    f"those of {source.path} would have; name another folder, or remove it"
                )

    def is_done(self, name: str, source: Source) -> bool:
        """Return whether a picture has all its results, predicted from the file as it is now."""
        # A video of overlays is encoded in one go, so all its frames are done or none is.
        if source.is_video and "overlay" in self.kinds:
            if source.name not in self._whole_videos:
                self._whole_videos[source.name] = self._is_whole(source)
            return self._whole_videos[source.name]
        return self._has_all(name, source)

    def _has_all(self, name: str, source: Source) -> bool:
        if self._lines.get(name) != _input_of(source):
            return False
        return all(path.exists() for path in self._paths(name, source).values())

    def _is_whole(self, source: Source) -> bool:
        """Return whether the video of overlays has all listed frames, and those all results."""
        path = self._paths(source.name, source)["overlay"]
        if not path.exists():
            return False
        frames = [name for name in list(self._lines) if name.startswith(f"{source.name}/")]
        drawn = int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT))
        return len(frames) == drawn and all(self._has_all(name, source) for name in frames)

    def _paths(self, name: str, source: Source) -> dict[str, Path]:
        paths = {kind: self.folder / kind / f"{name}.png" for kind in self.kinds}
        if source.is_video and "overlay" in paths:
            # Renamed to this after the last frame, so until then no frame is done.
            paths["overlay"] = self.folder / "overlay" / f"{source.name}.mp4"
        return paths

    def write(self, picture: Picture, classes: np.ndarray) -> None:
        """Write the results of one picture; raises StorageError.

        Args:
            picture: Frames of a video must be consecutive.
            classes: uint8 (H, W).
        """
        paths = self._paths(picture.name, picture.source)
        if self._video and self._video.source != picture.source:
            self.finish_video()
        for kind, path in paths.items():
            if kind == "index":
                drawn = classes
            elif kind == "color":
                drawn = colorize(classes, self.palette)
            else:
                drawn = overlay(picture.image, classes, self.palette, opacity=self.opacity)
            if path.suffix == ".mp4":
                self._video = self._video or _VideoFile(path, picture)
                self._video.write(drawn)
            else:
                with atomic_write(path) as temporary:
                    save_image(temporary, drawn)
        found = class_shares(classes, len(self.classes))
        self.found.update(index for index, share in enumerate(found) if share > 0)
        line = {
            "name": picture.name,
            "source": str(picture.source.path.absolute()),
            **dict(zip(_VERSION, picture.source.version, strict=True)),
            "height": classes.shape[0],
            "width": classes.shape[1],
            "shares": {c: s for c, s in zip(self.classes, found, strict=True) if s > 0},
        }
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        self._lines[picture.name] = _input_of(picture.source)

    def finish_video(self) -> None:
        """Complete the video that is being written and give it its name."""
        if self._video:
            self._video.finish()
            self._video = None

    def close(self) -> None:
        """Close the list, and delete a video that is not finished."""
        self._journal.close()
        if self._video:
            self._video.drop()


class _VideoFile:
    """An MP4 file that is there whole or not at all."""

    def __init__(self, path: Path, first: Picture) -> None:
        self.source = first.source
        self.path = path
        self.temporary = path.with_name(f".{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of another version of the file, or not of all frames
        height, width = first.image.shape[:2]
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self.writer = cv2.VideoWriter(str(self.temporary), code, first.rate, (width, height))
        if not self.writer.isOpened():
            raise StorageError(f"{path}: OpenCV could not write a video of {width} x {height}")

    def write(self, image: np.ndarray) -> None:
        self.writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def finish(self) -> None:
        self.writer.release()
        self.temporary.replace(self.path)

    def drop(self) -> None:
        self.writer.release()
        self.temporary.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of JSON objects; one cut off by a crash is left out."""
    lines = []
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
            lines.append({**found, "name": found["name"], "source": str(found["source"])})
        except (ValueError, TypeError, KeyError):
            continue
    return list({line["name"]: line for line in lines}.values())
