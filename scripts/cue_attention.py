"""How much of the position attention of far-pair pixels lies on the cue that decides their class.

python scripts/cue_attention.py RUN/last.pt [NUM_PICTURES]     for a network trained on scenes
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from danet.assemble import checked_config, make_dataset, model_of
from danet.datasets.scenes import Scenes
from danet.drawing.attention import Point, position_maps
from danet.engine import checkpoint


def main(path: str, count: int = 30) -> None:
    """Prints, for each pair, the share of attention on its cue and the cue's share of the area."""
    saved = checkpoint.load(path)
    config = checked_config(saved, path)
    model, scenes = model_of(saved, config, path), make_dataset(config, "test", training=False)
    assert isinstance(scenes, Scenes)
    for pair in scenes.far_pairs:
        indices = [scenes.classes.index(name) for name in pair]
        shares, areas = [], []
        for number in range(min(count, len(scenes))):
            image, mask, _ = scenes.read(number)
            cue = scenes.cue(number)["/".join(pair)].astype(np.float32)
            rows, columns = np.nonzero(np.isin(mask, indices))
            if not len(rows):
                continue
            every = slice(None, None, max(1, len(rows) // 50))
            points = [
                Point(int(x), int(y)) for x, y in zip(columns[every], rows[every], strict=True)
            ]
            tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
            maps = position_maps(model, tensor, points).numpy()  # (P, h, w)
            size = (maps.shape[2], maps.shape[1])
            region = cv2.resize(cue, size, interpolation=cv2.INTER_AREA)
            shares.append(float((maps * region).sum(axis=(1, 2)).mean()))
            areas.append(float(cue.mean()))
        print(f"{'/'.join(pair)}: {np.mean(shares):.3f} on the cue, area {np.mean(areas):.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:3]))
