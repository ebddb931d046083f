"""Copy CamVid with mistakes planted in the labels of 20 training pictures, all different.

python scripts/plant_mistakes.py root=CAMVID output=FOLDER [seed=0]
python tools/check_data.py data=camvid data.root=FOLDER splits=[train] checkpoint=FILE output=REPORT
python scripts/plant_mistakes.py output=FOLDER found=REPORT/suspects.csv [first=40]

The first command plants and writes ``planted.json``; pictures and correct labels are links. The
last counts how many mistakes are among the first rows of what check_data lists. By turns:

swapped: a connected region of 300 to 20,000 pixels gets another class;
shifted: the whole mask is moved by 20 to 40 pixels, what it uncovers is void;
missing: a car, pedestrian or bicyclist of at least 300 pixels gets the classes around it.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from danet.errors import InputError
from danet.filesystem import write_file

KINDS = "swapped", "shifted", "missing"
COUNT = 20
CLASSES, VOID = 11, 11  # labels are 0..10, and 11 where there is none
OBJECTS = 8, 9, 10  # Car, Pedestrian, Bicyclist
AREA = 300, 20_000  # pixels of a region; a picture has 172,800
SHIFT = 20, 40  # pixels


def main(arguments: Sequence[str]) -> None:
    """Plant mistakes in a copy, or count how many of them a list has."""
    own, others = command_line.split(arguments, ("root", "output", "seed", "found", "first"))
    if others or "output" not in own or ("root" in own) == ("found" in own):
        raise InputError((__doc__ or "").split("\n\n")[1])
    output = Path(own["output"]).expanduser().absolute()
    if "found" in own:
        planted = json.loads((output / "planted.json").read_text())
        with open(own["found"], encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[: int(own.get("first", 40))]
        count(planted, rows)
        return
    root = Path(own["root"]).expanduser().absolute()
    if output.exists():
        raise InputError(f"output={output} is there already; give another folder")
    planted = plant(root / "labels" / "train", int(own.get("seed", 0)), output)
    for path in sorted(root.glob("*/*/*.*")):
        copy = output / path.relative_to(root)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    write_file(output / "planted.json", json.dumps(planted, indent=1) + "\n")
    for row in planted:
        print(*row.values())


def plant(labels: Path, seed: int, output: Path) -> list[dict[str, Any]]:
    """Write labels with mistakes below ``output``; return picture, kind, box and what was done."""
    rng, planted = np.random.default_rng(seed), list[dict[str, Any]]()
    paths = sorted(labels.glob("*.png"))
    if len(paths) < COUNT:
        raise InputError(f"{labels} has {len(paths)} labels; root=FOLDER is that of CamVid")
    waiting = [paths[i] for i in rng.permutation(len(paths))]
    while len(planted) < COUNT:
        kind = KINDS[len(planted) % len(KINDS)]
        for path in waiting:
            found = make_mistake(np.asarray(Image.open(path)), kind, rng)
            if found:
                break
        else:
            raise InputError(f"{labels} has too few pictures with regions to change")
        waiting.remove(path)
        mask, box, detail = found
        copy = output / "labels" / "train" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(copy)
        planted.append({"picture": path.stem, "kind": kind, "box": box, "detail": detail})
    return sorted(planted, key=lambda row: row["picture"])


def make_mistake(
    mask: np.ndarray, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, list[int], str] | None:
    """Return a changed mask, the box (x, y, width, height) and a description; None if unsuited."""
    height, width = mask.shape
    if kind == "shifted":
        x, y = (int(rng.integers(*SHIFT, endpoint=True) * rng.choice((-1, 1))) for _ in "xy")
        changed = ndimage.shift(mask, (y, x), order=0, cval=VOID)
        return changed, [0, 0, width, height], f"by {x}, {y}"
    regions = []
    for label in OBJECTS if kind == "missing" else range(CLASSES):
        _, numbers, stats, _ = cv2.connectedComponentsWithStats(np.uint8(mask == label))
        for i, (*box, area) in enumerate(stats.tolist()):
            if i and AREA[0] <= area <= AREA[1]:
                regions.append((label, box, area, numbers == i))
    if not regions:
        return None
    label, box, area, region = regions[rng.integers(len(regions))]
    changed = mask.copy()
    if kind == "swapped":
        other = int(rng.choice([i for i in range(CLASSES) if i != label]))
        changed[region] = other
        return changed, box, f"{area} pixels of {label} are {other}"
    # Each pixel gets the class of the nearest one outside that is neither void nor such an object.
    unusable = np.isin(mask, (*OBJECTS, VOID))
    nearest = ndimage.distance_transform_edt(unusable, return_distances=False, return_indices=True)
    changed[region] = mask[tuple(nearest)][region]
    return changed, box, f"{area} pixels of {label}"


def count(planted: Sequence[dict[str, Any]], rows: Sequence[dict[str, str]]) -> None:
    """Print at which rank each mistake is, if any, and how many there are of each kind."""
    ranks: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for mistake in planted:
        hits = [int(row["rank"]) for row in rows if shows(row, mistake)]
        ranks[mistake["kind"]] += hits[:1]
        print(f"{hits[0] if hits else '-':>4}", *mistake.values())
    for kind, found in ranks.items():
        of = sum(mistake["kind"] == kind for mistake in planted)
        print(f"{kind}: {len(found)} of {of} among the first {len(rows)}")
    print(f"all: {sum(map(len, ranks.values()))} of {len(planted)}")


def shows(row: dict[str, str], mistake: dict[str, Any]) -> bool:
    """Return whether an entry is of the picture, and its box overlaps that of the mistake."""
    x, y, width, height = mistake["box"]
    left, top, right, bottom = int(row["x"]), int(row["y"]), int(row["width"]), int(row["height"])
    overlaps = left < x + width and x < left + right and top < y + height and y < top + bottom
    return Path(row["label"]).stem == mistake["picture"] and overlaps


if __name__ == "__main__":
    command_line.run(main)
