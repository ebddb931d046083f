"""Folders of results, and what is there already when an interrupted prediction is restarted.

A folder of results has ``index/NAME.png`` (grey, the class index of every pixel),
``color/NAME.png`` and ``overlay/NAME.png`` as requested, and ``predictions.jsonl`` with one line
for each picture. The line is written last, so a picture that has one has all its files.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch import nn

from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write
from danet.prediction.sources import Picture, Source
from danet.visualization.overlay import Palette, colorize, overlay, save_image

KINDS = ("index", "color", "overlay")
_JOURNAL = "predictions.jsonl"
_SHARED = ("network", "evaluation")
"""Keys of the origin that all results of a folder must share."""


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def class_shares(classes: np.ndarray, num_classes: int) -> list[float]:
    """Return the fraction of the pixels of each class, 0..1."""
    # In parts, since bincount takes eight bytes a pixel.
    parts = np.array_split(classes, 1 + classes.size // 2**20)
    counts = [np.bincount(part.ravel(), minlength=num_classes) for part in parts]
    return (np.sum(counts, axis=0) / classes.size).tolist()


class Results:
    """Writes results into a folder, and keeps those of an earlier start.

    It is a context: at its end the last video is completed, or deleted after an error.

    Args:
        folder: Created where it does not exist.
        kinds: Of pictures, some of KINDS.
        origin: What all results of a folder share: the network and the protocol.
        classes, palette: Of the network.
        opacity: Of overlays.

    Raises:
        InputError: The folder has results of another origin.
        StorageError: It cannot be written.
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
        self._video = ExitStack()
        self._writer: cv2.VideoWriter | None = None
        self._source: Source | None = None
        """Of the video that is being written."""
        path, journal = folder / self.ORIGIN, folder / _JOURNAL
        plain = json.loads(json.dumps(origin))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_text(json.dumps(plain, indent=1) + "\n")
            found = json.loads(path.read_text())
            is_same = all(found[key] == plain[key] for key in _SHARED)
            if is_same:
                self._lines = _whole_lines(journal) if journal.exists() else {}
                with atomic_write(journal) as temporary:
                    temporary.write_text("".join(map(_as_line, self._lines.values())))
                self._journal = journal.open("a")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StorageError(f"output={folder}: cannot be written ({error})") from error
        if not is_same:
            raise InputError(
                f"output={folder}: results of another checkpoint or another protocol are there; "
                "name another folder, or remove it"
            )
        self._names: dict[str, list[str]] = defaultdict(list)
        """Path of a file -> names of its results."""
        for name, line in self._lines.items():
            self._names[line["source"]].append(name)

    def refuse_others(self, sources: Sequence[Source]) -> None:
        """Raise InputError for pictures whose results would overwrite those of other pictures."""
        for source in sources:
            line = self._lines.get(source.frame(0) if source.is_video else source.name)
            if line is not None and line["source"] != source.version["source"]:
                raise InputError(
                    f"output={self.folder}: results of {line['source']} are there under the name "
                    f"that those of {source.path} would have; name another folder, or remove it"
                )

    def find_done(self, source: Source) -> set[str]:
        """Return the names of results that are whole and of the file as it is now."""
        done = {
            name
            for name in self._names[source.version["source"]]
            if self._lines[name].items() >= source.version.items()
            and all(path.exists() for path in self._paths(name, source).values())
        }
        if done and source.is_video and "overlay" in self.kinds:
            # A video of overlays is encoded in one go, so all its frames are done or none is.
            video = cv2.VideoCapture(str(self._paths(source.name, source)["overlay"]))
            return done if len(done) == video.get(cv2.CAP_PROP_FRAME_COUNT) else set()
        return done

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
        if self._source and self._source != picture.source:
            self._video.close()  # the last one is whole and gets its name
            self._writer = self._source = None
        for kind, path in self._paths(picture.name, picture.source).items():
            if kind == "index":
                drawn = classes
            elif kind == "color":
                drawn = colorize(classes, self.palette)
            else:
                drawn = overlay(picture.image, classes, self.palette, opacity=self.opacity)
            if path.suffix == ".mp4":
                writer = self._writer or self._start_video(path, picture)
                writer.write(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
            else:
                with atomic_write(path) as temporary:
                    save_image(temporary, drawn)
        found = class_shares(classes, len(self.classes))
        self.found.update(index for index, share in enumerate(found) if share > 0)
        line = {
            "name": picture.name,
            **picture.source.version,
            "height": classes.shape[0],
            "width": classes.shape[1],
            "shares": {c: s for c, s in zip(self.classes, found, strict=True) if s > 0},
        }
        self._journal.write(_as_line(line))
        self._journal.flush()

    def _start_video(self, path: Path, first: Picture) -> cv2.VideoWriter:
        """Open an MP4 file that is there whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # of another version of the file, or not of all frames
        temporary = self._video.enter_context(atomic_write(path))
        height, width = first.image.shape[:2]
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(temporary), code, first.rate, (width, height))
        self._video.callback(self._writer.release)
        if not self._writer.isOpened():
            raise StorageError(f"{path}: OpenCV could not write a video of {width} x {height}")
        self._source = first.source
        return self._writer

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *error: Any) -> None:
        self._journal.close()
        self._video.__exit__(*error)


def _as_line(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _whole_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> JSON object of the lines; one cut off by a crash is left out."""
    lines = {}
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
            lines[found["name"]] = {**found, "source": str(found["source"])}
        except (ValueError, TypeError, KeyError):
            continue
    return lines
