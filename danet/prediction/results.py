"""Folders of results, and what is there already when an interrupted prediction is restarted.

A folder has ``index/NAME.png``, ``color/NAME.png`` and ``overlay/NAME.png`` as requested, and
``predictions.jsonl`` with a line for each picture, which is written after all its files. Maps of
``danet.predict`` have folders, too. Formats of annotation tools are made of ``index`` at
the end. A raster always has its index, ``index/NAME.tif``, and reduced pictures.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch import nn

from danet.errors import InputError, StorageError
from danet.filesystem import atomic_write, require_writable, write_file
from danet.prediction.predict import MAPS, Prediction
from danet.prediction.sources import Picture, Source, count_frames
from danet.types import ignore_index
from danet.visualization.overlay import Legend, colorize, save_image

POLYGONS = ("coco", "labelme", "cvat")
KINDS = ("index", "color", "overlay", *MAPS, *POLYGONS)
EARLIER: dict[str, Any] = {"temperature": 1.0, "min_confidence": 0.0, "maps": "uint16"}
"""What results of versions without these entries of an origin share."""


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names and values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Results(ExitStack):
    """Writes results, some of KINDS, into a folder, and keeps those of an earlier start.

    It is a context: at its end the last video is completed, or deleted after an error. ``origin``
    is what all results of a folder share: the network, the protocol and the entries of EARLIER;
    another one is refused.
    """

    ORIGIN = "predictions.json"  # name of the file with the origin

    def __init__(
        self, folder: Path, kinds: Sequence[str], *, origin: dict[str, Any], legend: Legend
    ) -> None:
        super().__init__()
        origin, self.folder, self.legend = EARLIER | origin, folder, legend
        self.kinds = {"index" if kind in POLYGONS else kind for kind in kinds}
        self.found: set[str] = set()  # classes in all that was written since this start
        self._source: Source | None = None  # of the last picture
        self._video = self.enter_context(ExitStack())
        self._writer: cv2.VideoWriter | None = None
        self._shown: Any = None  # frame of the overlay that was written last
        require_writable(folder)
        path, journal = folder / self.ORIGIN, folder / "predictions.jsonl"
        if not path.exists():
            write_file(path, json.dumps(origin, indent=1) + "\n")
        try:
            found = EARLIER | json.loads(path.read_text())
            is_same = all(found[key] == origin[key] for key in ("network", "evaluation", *EARLIER))
        except (ValueError, LookupError, TypeError):
            is_same = False
        if not is_same:
            raise InputError(
                f"output={folder}: results of another checkpoint, protocol, temperature, "
                "min_confidence or maps are there; name another folder, or remove it"
            )
        self.maps, self.min_confidence = origin["maps"], origin["min_confidence"]
        self.lines = _whole_lines(journal) if journal.exists() else {}
        with atomic_write(journal) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines.values()))
        self._journal = self.enter_context(journal.open("a"))

    def find_done(self, source: Source) -> set[str]:
        """Return the names of results that are whole and of the file as it is now.

        Raises InputError if results of another file are there under the same name.
        """
        names: Iterable[str] = map(source.frame, count()) if source.is_video else [source.name]
        if source.address:
            names = [name for name in self.lines if name.startswith(f"{source.name}/")]
        done = set()
        for name in takewhile(self.lines.__contains__, names):
            line = self.lines[name]
            if source.address or line["source"] != source.version["source"]:
                raise InputError(
                    f"output={self.folder}: results of {line['source']} are there under the name "
                    f"that those of {source.path} would have; name another folder, or remove it"
                )
            files = self.paths(name, source).values()
            if line.items() >= source.version.items() and all(path.exists() for path in files):
                done.add(name)
        if done and source.is_video and "overlay" in self.kinds:
            # A video of overlays is encoded in one go, so all its frames are done or none is.
            number = count_frames(self.paths(source.name, source)["overlay"])
            return done if len(done) == number else set()
        return done

    def paths(self, name: str, source: Source) -> dict[str, Path]:
        """Return the file of each kind for a picture or a frame."""
        paths = {kind: self.folder / kind / f"{name}.png" for kind in self.kinds}
        for kind in self.kinds & (MAPS.keys() if self.maps == "npy" else {"probability"}):
            paths[kind] = self.folder / kind / f"{name}.npy"
        if source.is_video and "overlay" in paths:
            # Renamed to this after the last frame, so until then no frame is done.
            paths["overlay"] = self.folder / "overlay" / f"{source.name}.mp4"
        if source.is_raster:
            paths["index"] = self.folder / "index" / f"{source.name}.tif"
        return paths

    def write(self, picture: Picture, found: Prediction) -> None:
        """Write a prediction with its confidence; frames of a video are consecutive.

        That of a raster, which is written already, needs no confidence.
        """
        classes, (confidence, unknown) = found.classes, picture.sure or (None, 0.0)
        if found.confidence is not None:
            is_unknown = found.confidence < self.min_confidence
            classes = np.where(is_unknown, ignore_index(len(self.legend.classes)), classes)
            classes = classes.astype(found.classes.dtype)
            confidence, unknown = float(found.confidence.mean(dtype=np.float64)), is_unknown.mean()
        if self._source is not picture.source:
            self._video.close()  # the last one is whole and gets its name
            self._source, self._writer = picture.source, None
        for kind, path in self.paths(picture.name, picture.source).items():
            if path.suffix == ".tif":
                continue  # there already
            if kind == "index":
                drawn = classes
            elif kind in MAPS:
                drawn = getattr(found, kind)
                if self.maps != "npy":
                    most = np.iinfo(self.maps).max
                    drawn = np.rint(drawn * np.float64(most)).astype(self.maps)
            elif kind == "color":
                drawn = colorize(classes, self.legend.palette)
            else:
                drawn = self.legend.over(picture.image, classes)
            if path.suffix == ".mp4":
                writer = self._writer or self._start_video(path, picture)
                for _ in range(picture.still):
                    writer.write(self._shown)
                self._shown = cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)
                writer.write(self._shown)
            else:
                with atomic_write(path) as temporary:
                    save_image(temporary, drawn)
        counts: Any = picture.counts
        if not counts:  # Pillow counts bytes without a copy of 8 bytes a pixel
            is_byte = classes.dtype == np.uint8
            image = Image.fromarray(classes)
            counts = image.histogram() if is_byte else np.bincount(classes.ravel())
        pixels = zip(self.legend.classes, counts, strict=False)
        height, width = picture.size or classes.shape
        shares = {name: int(number) / (height * width) for name, number in pixels if number}
        self.found |= shares.keys()
        size = {"height": height, "width": width}
        line = {"name": picture.name, **picture.source.version, **size, "shares": shares}
        line |= {"confidence": confidence, "unknown": float(unknown)}
        if picture.time:
            line["time"] = datetime.fromtimestamp(picture.time, timezone.utc).isoformat()
        if not picture.source.address:  # of a camera there is no end of them
            self.lines[picture.name] = line
        self._journal.write(json.dumps(line) + "\n")
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
        return self._writer


def _whole_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> JSON object of the lines; one cut off by a crash is left out."""
    lines = {}
    for text in path.read_text("utf-8", "replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            lines[str(line["name"])] = {**line, "source": str(line["source"])}
    return lines
