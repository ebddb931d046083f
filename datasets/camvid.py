"""CamVid in SegNet's split: 701 street scenes of 480x360, 11 classes."""

from danet.datasets.base import FileDataset, Item
from danet.datasets.labels import read_class_table
from danet.datasets.listing import find_files, named_files, unused_note


class CamVid(FileDataset):
    """Reads ``images/<split>/<name>.jpg`` and ``labels/<split>/<name>.png``.

    Labels are indices 0..10; 11 is void and ignored. Brostow et al., Semantic object classes in
    video, PRL 2009; the split is SegNet's: 367 train, 101 val, 233 test.
    """

    table = read_class_table("camvid")
    classes = table.classes
    palette = table.palette
    expected = {"train": (367,), "val": (101,), "test": (233,)}
    marker = "images/train"
    layout = "  images/{train,val,test}/<name>.jpg\n  labels/{train,val,test}/<name>.png"

    def find_items(self) -> list[Item]:
        """Return every picture of the split with the label of the same name."""
        images, labels = self.root / "images" / self.split, self.root / "labels" / self.split
        found = named_files(images, ".jpg", ".png")
        unused = [n for n in find_files(labels, {".png"}) if n.rpartition(".")[0] not in found]
        self.notes += unused_note(labels, unused)
        return [Item(path, f"{labels}/{name}.png", name) for name, path in found.items()]
