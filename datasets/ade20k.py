"""ADE20K in the form of the scene parsing challenge: ADEChallengeData2016, 150 classes."""

from danet.datasets.base import FileDataset, Item
from danet.datasets.labels import read_class_table
from danet.datasets.layout import first_folder
from danet.datasets.listing import named_files
from danet.datasets.submission import Submission

_FOLDERS = {"train": "training", "val": "validation", "test": "testing"}


class ADE20K(FileDataset):
    """Reads ``images/{training,validation}`` and the PNGs of the same name in ``annotations``.

    A PNG holds 0 for everything outside the 150 classes, which is ignored, and 1..150. Zhou et al.,
    Scene parsing through ADE20K dataset, CVPR 2017.
    """

    table = read_class_table("ade20k")
    classes = table.classes
    palette = table.palette
    expected = {"train": (20210,), "val": (2000,)}
    marker = "images/training"
    label_hint = "; ADEChallengeData2016 has 0 for other things and 1..150"
    layout = (
        "  [ADEChallengeData2016/]images/{training,validation}/ADE_{train,val}_<8 digits>.jpg\n"
        "  [ADEChallengeData2016/]annotations/{training,validation}/<the same>.png"
    )

    def find_items(self) -> list[Item]:
        """Return every picture of the split; those of the challenge's test set have no label."""
        base = first_folder(self.root, ("ADEChallengeData2016", "."), "images") or self.root
        images = base / "images" / _FOLDERS[self.split]
        labels = base / "annotations" / _FOLDERS[self.split]
        found = named_files(images, ".jpg")
        if self.split == "test":
            return [Item(path, None, name) for name, path in found.items()]
        return [Item(path, f"{labels}/{name}.png", name) for name, path in found.items()]

    def submission(self) -> Submission:
        """Return the format of the challenge's server: PNGs with 1..150, named as the pictures."""
        values = {index: value for value, index in self.label_map().items() if value}
        return Submission(values=[values[i] for i in range(len(self.classes))])
