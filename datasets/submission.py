"""Submissions to test servers: predictions as label files, checked, packed into one archive."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.labels import Color
from danet.errors import InputError
from danet.filesystem import storage_errors


@dataclass(frozen=True)
class Submission:
    """The format in which a test server takes predictions; a data set returns its own."""

    values: Sequence[int]  # in the files, 0..255, of each class
    pattern: str = "{name}.png"  # of the names of files; {name} is that of the image
    folder: str = "predictions"  # inside the archive, with forward slashes
    palette: Sequence[Color] | None = None  # of the values 0..255; None for grey images
    archive: Literal["zip", "tgz"] = "zip"

    def encode(self, prediction: np.ndarray) -> np.ndarray:
        """Map class indices (H, W) to the values of the server, uint8 (H, W)."""
        return np.asarray(self.values, np.uint8)[prediction]

    def file_name(self, name: str) -> str:
        """Return the file name of the prediction for an image."""
        return self.pattern.format(name=name)


def require_labels(dataset: SegmentationDataset, setting: str, remedy: str) -> None:
    """Raise InputError if the publisher keeps the labels of the split that ``setting`` chose."""
    if not dataset.is_labelled:
        raise InputError(
            f"{setting}={dataset.split}: {type(dataset).__name__} has no labels for this split, "
            f"its publisher keeps them; {remedy}"
        )


class SubmissionWriter:
    """Writes the predictions of a split below a folder, then checks and packs them.

    Until they are complete they lie in ``folder/.unfinished``; nothing is written before ``begin``.
    Several processes may write; one of them begins and finishes. A data set without a test server,
    or a folder with an earlier submission, raises InputError.
    """

    def __init__(self, folder: Path, dataset: SegmentationDataset) -> None:
        make_form = getattr(dataset, "submission", None)
        if not isinstance(dataset, FileDataset) or make_form is None:
            raise InputError(
                f"submission={folder}: {type(dataset).__name__} has no test server whose form is "
                "known here; leave submission= away to score a split with labels"
            )
        self.form: Submission = make_form()
        self.dataset = dataset
        self.folder = folder.expanduser()
        self.archive = self.folder / f"{str(dataset).lower()}_{dataset.split}.{self.form.archive}"
        self._unfinished = self.folder / ".unfinished"
        self._files = self._unfinished / self.form.folder
        self._top = Path(self.form.folder).parts[0]
        for path in (self.folder / self._top, self.archive):
            if path.exists():
                raise InputError(
                    f"submission={folder}: {path} is there from an earlier submission; remove it "
                    "or name another folder"
                )

    def begin(self) -> None:
        """Create the folder, without remains of an interrupted submission."""
        with storage_errors(self.folder):
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._files.mkdir(parents=True)

    def write(self, name: str, prediction: np.ndarray) -> None:
        """Write the prediction for an image: class indices, (H, W), at the image's size."""
        picture = Image.fromarray(self.form.encode(prediction))
        if self.form.palette is not None:
            picture.putpalette(np.asarray(self.form.palette, np.uint8).tobytes())
        path = self._files / self.form.file_name(name)
        with storage_errors(path):
            picture.save(path)

    def finish(self) -> list[str]:
        """Check that all files are there and fit the images; pack them; return lines to print."""
        for item in self.dataset.items:
            self._check(self._files / self.form.file_name(item.name), item.image)
        with storage_errors(self.archive):
            packed = shutil.make_archive(
                str(self._unfinished / "packed"),
                {"zip": "zip", "tgz": "gztar"}[self.form.archive],
                root_dir=self._unfinished,
                base_dir=self.form.folder,
                # No name of a user leaves this machine; a system without root keeps its own.
                owner="root",
                group="root",
            )
            (self._unfinished / self._top).rename(self.folder / self._top)
            Path(packed).rename(self.archive)
            self._unfinished.rmdir()
        count, expected = len(self.dataset), self.dataset.expected.get(self.dataset.split, ())
        lines = [f"{count} predictions, checked and packed: {self.archive}"]
        if expected and count not in expected:
            counts = " or ".join(f"{number:,}" for number in expected)
            lines.append(
                f"{self.dataset}: the server wants {counts} files for the split "
                f"{self.dataset.split!r}; this folder of the data has only {count:,} images"
            )
        return lines

    def _check(self, path: Path, image: str) -> None:
        if not path.is_file():
            raise InputError(f"{path}: missing, though all predictions are written; run it again")
        with Image.open(image) as picture, Image.open(path) as prediction:
            found, expected = ("{} x {}".format(*of.size) for of in (prediction, picture))
        if found != expected:
            raise InputError(
                f"{path}: the prediction is {found} and its image {image} is {expected} "
                "(width x height); they must be equal"
            )
