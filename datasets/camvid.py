"""CamVid in SegNet's split: 701 street scenes of 480x360, 11 classes."""

from danet.datasets.base import FileDataset, Item
from danet.datasets.layout import pair_files


class CamVid(FileDataset, published="camvid"):
    """Reads ``images/<split>/<name>.jpg`` and ``labels/<split>/<name>.png``.

    Labels are indices 0..10; 11 is void and ignored. Brostow et al., Semantic object classes in
    video, PRL 2009; the split is SegNet's: 367 train, 101 val, 233 test.
    """

    def find_items(self) -> list[Item]:
        """Return every picture of the split with the label of the same name."""
        images, labels = self.root / "images" / self.split, self.root / "labels" / self.split
        items, self.notes = pair_files(images, labels)
        return list(items.values())
