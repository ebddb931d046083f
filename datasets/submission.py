"""Submissions to test servers: predictions as label files, checked, packed into one archive."""

import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.labels import Color, ranges
from danet.errors import InputError, StorageError


@dataclass(frozen=True)
class Submission:
    """The format in which a test server takes predictions; a data set returns its own.

    Args:
        values: Class index -> value in the files, 0..255; one per class.
        pattern: File name of a prediction; {name} is the name of the image.
        folder: Of the files inside the archive, with forward slashes.
        palette: Colours of the values 0..255, for palette images; None for grey ones.
        archive: The kind of archive.
    """

    values: Sequence[int]
    pattern: str = "{name}.png"
    folder: str = "predictions"
    palette: Sequence[Color] | None = None
    archive: Literal["zip", "tgz"] = "zip"

    def encode(self, prediction: np.ndarray) -> np.ndarray:
        """Map class indices (H, W) to the values of the server, uint8 (H, W)."""
        return np.asarray(self.values, np.uint8)[prediction]

    def file_name(self, name: str) -> str:
        """Return the file name of the prediction for an image."""
        return self.pattern.format(name=name)


def is_labelled(dataset: SegmentationDataset) -> bool:
    """Return whether the split has labels; drawn pictures always have them."""
    return not isinstance(dataset, FileDataset) or dataset.is_labelled


def require_labels(dataset: SegmentationDataset, setting: str, remedy: str) -> None:
    """Raise InputError if the publisher keeps the labels of the split.

    Args:
        dataset: Of the split.
        setting: The key that chose the split.
        remedy: What to do instead.
    """
    if not is_labelled(dataset):
        raise InputError(
            f"{setting}={dataset.split}: {type(dataset).__name__} has no labels for this split, "
            f"its publisher keeps them; {remedy}"
        )


class SubmissionWriter:
    """Writes the predictions of a split below a folder, then checks and packs them.

    Until they are complete they lie in ``folder/.unfinished``. Several processes may write; one of
    them begins and finishes.

    Args:
        folder: ``submission``; nothing is written before ``begin``.
        dataset: The split.

    Raises:
        InputError: The data set has no test server, or an earlier submission is in the folder.
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
        top = Path(self.form.folder).parts[0]
        self._moves = {
            self._unfinished / top: self.folder / top,
            self._unfinished / self.archive.name: self.archive,
        }
        earlier = [path for path in self._moves.values() if path.exists()]
        if earlier:
            raise InputError(
                f"submission={folder}: {earlier[0]} is there from an earlier submission; remove it "
                "or name another folder"
            )

    def begin(self) -> None:
        """Create the folder, without remains of an interrupted submission."""
        with _explain_storage(self.folder):
            shutil.rmtree(self._unfinished, ignore_errors=True)
            self._files.mkdir(parents=True)

    def write(self, name: str, prediction: np.ndarray) -> None:
        """Write the prediction for an image: class indices, (H, W), at the image's size."""
        picture = Image.fromarray(self.form.encode(prediction))
        if self.form.palette is not None:
            picture.putpalette(np.asarray(self.form.palette, np.uint8).tobytes())
        path = self._files / self.form.file_name(name)
        with _explain_storage(path):
            picture.save(path)

    def finish(self) -> list[str]:
        """Check and pack all files; return lines to print.

        Raises:
            InputError: A file is missing, is one too many, or not as the server wants it.
            StorageError: Disk full, no permission.
        """
        self.check()
        members = sorted(self._files.iterdir())
        with _explain_storage(self.archive):
            _pack(self._unfinished / self.archive.name, members, self.form.folder)
            for source, target in self._moves.items():
                source.rename(target)
            self._unfinished.rmdir()
        lines = [f"{len(members)} predictions, checked and packed: {self.archive}"]
        expected = self.dataset.expected.get(self.dataset.split, ())
        if expected and len(members) not in expected:
            counts = " or ".join(f"{count:,}" for count in expected)
            lines.append(
                f"{self.dataset}: the server wants {counts} files for the split "
                f"{self.dataset.split!r}; this folder of the data has only {len(members):,} images"
            )
        return lines

    def check(self) -> None:
        """Compare the files on disk with the images and with the format of the server."""
        images = {self.form.file_name(item.name): item.image for item in self.dataset.items}
        found = {path.name for path in self._files.iterdir()}
        for names, what in ((images.keys() - found, "missing"), (found - images.keys(), "extra")):
            if names:
                raise InputError(
                    f"{self._files}: {len(names)} files are {what}, first {min(names)}"
                )
        allowed = np.zeros(256, bool)
        allowed[list(self.form.values)] = True
        for name, image in images.items():
            self._check_file(self._files / name, image, allowed)

    def _check_file(self, path: Path, image: str, allowed: np.ndarray) -> None:
        with Image.open(image) as picture:
            size = picture.size
        with Image.open(path) as picture:
            mode, labels = picture.mode, np.array(picture)
        if mode != ("L" if self.form.palette is None else "P") or labels.dtype != np.uint8:
            raise InputError(f"{path}: of mode {mode}; expected one channel of 8 bits")
        if labels.shape[::-1] != size:
            raise InputError(
                f"{path}: the prediction is {labels.shape[1]} x {labels.shape[0]} and its image "
                f"{image} is {size[0]} x {size[1]} (width x height); they must be equal"
            )
        invalid = [int(value) for value in np.unique(labels[~allowed[labels]])]
        if invalid:
            values = ranges(sorted(self.form.values))
            raise InputError(f"{path}: values {ranges(invalid)}; the server takes {values}")


def _pack(packed: Path, members: Sequence[Path], folder: str) -> None:
    """Write a zip or tgz, as its name says, of files that are put into a folder."""
    if packed.suffix == ".zip":
        with zipfile.ZipFile(packed, "w") as archive:  # stored: PNG is compressed already
            for path in members:
                archive.write(path, f"{folder}/{path.name}")
    else:
        with tarfile.open(packed, "w:gz", compresslevel=1) as tar:
            for path in members:
                tar.add(path, f"{folder}/{path.name}", filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove the user from an entry of the archive."""
    return member.replace(uid=0, gid=0, uname="", gname="", deep=False)


@contextmanager
def _explain_storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
