"""Print how much of the position attention of far-pair pixels lies on the cue of their class.

python scripts/cue_attention.py RUN/last.pt [NUM_PICTURES]     for a network trained on scenes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import cv2
import numpy as np
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.config.build import checked_config, make_dataset, model_of
from danet.datasets.scenes import Scenes
from danet.visualization.attention import Point, position_maps

POINTS = 50
"""Approximate maximum of pixels per picture whose attention is measured."""


def share_on_cue(
    model: nn.Module, image: np.ndarray, object_: np.ndarray, cue: np.ndarray
) -> float:
    """Return the mean share, 0..1, of the attention of an object's pixels that lies on the cue.

    Args:
        model: With position attention, in eval mode.
        image: uint8 (H, W, 3), RGB.
        object_: bool (H, W), not empty.
        cue: bool (H, W).
    """
    rows, columns = np.nonzero(object_)
    every = slice(None, None, max(1, len(rows) // POINTS))
    places = zip(columns[every].tolist(), rows[every].tolist(), strict=True)
    maps = position_maps(model, image, [Point(*place) for place in places]).numpy()  # (P, h, w)
    size = (maps.shape[2], maps.shape[1])
    region = cv2.resize(cue.astype(np.float32), size, interpolation=cv2.INTER_AREA)
    return float((maps * region).sum(axis=(1, 2)).mean())


def main(path: str, count: int = 60) -> None:
    """Print the share for each class of the pairs, and the part of a picture under its cue."""
    saved = checkpoint_format.load(path)
    config = checked_config(saved, path)
    model, scenes = model_of(saved, config, path), make_dataset(config, "test", training=False)
    assert isinstance(scenes, Scenes)
    for pair in scenes.far_pairs:
        for name in pair:
            shares, areas = [], []
            for number in range(min(count, len(scenes))):
                image, mask, _ = scenes.read(number)
                object_ = mask == scenes.classes.index(name)
                if object_.any():
                    cue = scenes.cue(number)["/".join(pair)]
                    shares.append(share_on_cue(model, image, object_, cue))
                    areas.append(cue.mean())
            print(f"{name}: {np.mean(shares):.3f} on the cue, which covers {np.mean(areas):.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:3]))
