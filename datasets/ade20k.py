"""ADE20K in the form of the scene parsing challenge: ADEChallengeData2016, 150 classes."""

from danet.datasets.base import FileDataset, Item
from danet.datasets.layout import pair_files
from danet.datasets.listing import first_folder
from danet.datasets.submission import Submission

_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


class ADE20K(FileDataset, published="ade20k"):
    """Reads ``images/{training,validation}`` and the PNGs of the same name in ``annotations``.

    A PNG holds 0 for everything outside the 150 classes, which is ignored, and 1..150. Zhou et al.,
    Scene parsing through ADE20K dataset, CVPR 2017.
    """

    def find_items(self) -> list[Item]:
        """Return every picture of the split; those of the challenge's test set have no label."""
        base = first_folder(self.root, ("ADEChallengeData2016", "."), "images") or self.root
        folder = _FOLDERS[self.split]
        items, self.notes = pair_files(base / "images" / folder, base / "annotations" / folder)
        hidden = self.split == "test"
        return [item._replace(mask=None) if hidden else item for item in items.values()]

    def submission(self) -> Submission:
        """Return the format of the challenge's server: PNGs with 1..150, named as the pictures."""
        return Submission(values=range(1, len(self.classes) + 1))
