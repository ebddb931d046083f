"""CamVid in SegNet's split: 701 street scenes of 480x360, 11 classes."""

from danet.datasets.base import FileDataset, Item
from danet.datasets.layout import pair_files
from danet.datasets.listing import elsewhere

FOLDERS = ("train", "val", "test")


class CamVid(FileDataset, published="camvid"):
    """Reads ``images/<split>/<name>.jpg`` and ``labels/<split>/<name>.png``, or SegNet's folders.

    Labels are indices 0..10; 11 is void and ignored. Brostow et al., Semantic object classes in
    video, PRL 2009; the split is SegNet's: 367 train, 101 val, 233 test. Its own folders are
    ``<split>`` for the pictures and ``<split>annot`` for the labels.

    The training pictures are from three drives, with which their names begin. ``0006R0`` is the
    split of one of them, ``train-0006R0`` of the two others: trained on these and scored on that,
    a network sees new streets, as in the test split. The pictures of val are neighbours of training
    pictures.
    """

    def find_items(self) -> list[Item]:
        """Return every picture of the split with the label of the same name."""
        folder, _, left_out = self.split.partition("-")
        drive = "" if folder in FOLDERS else folder
        folder = "train" if drive else folder
        images, labels = self.root / "images" / folder, self.root / "labels" / folder
        if (self.root / f"{folder}annot").is_dir() and not images.is_dir():
            images, labels = self.root / folder, self.root / f"{folder}annot"
        items, self.notes = pair_files(images, labels)
        kept = (name for name in items if name.startswith(drive))
        return [items[n] for n in kept if not (left_out and n.startswith(left_out))]

    def explain_no_images(self) -> str:
        """Return where either kind of folders may be."""
        return elsewhere(self.root, self.marker) or elsewhere(self.root, "trainannot")
