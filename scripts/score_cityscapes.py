"""Compute the official scores of Cityscapes for a folder of predictions of any origin.

python scripts/score_cityscapes.py predictions=DIR root=DIR [split=val] [output=FILE.json]

Predictions are PNGs of label ids (0..33), one per image, named <city>_<seq>_<frame>*.png, in any
folders below DIR: the format of the benchmark's server.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line

from danet.datasets.cityscapes import LABELS, Cityscapes
from danet.datasets.image_io import read_labels
from danet.engine.log import class_table
from danet.errors import InputError, StorageError
from danet.evaluation.cityscapes import OfficialScorer, OfficialScores

USAGE = "predictions=DIR root=DIR [split=val] [output=FILE.json]"


def find_predictions(folder: Path) -> dict[str, Path]:
    """Return <city>_<seq>_<frame> -> file of all PNGs below a folder; raise InputError."""
    if not folder.is_dir():
        raise InputError(f"predictions={folder}: there is no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.png")):
        match = re.match(r"[^_]+_\d{6}_\d{6}", path.name)
        if match and found.setdefault(match[0], path) != path:
            raise InputError(
                f"predictions={folder}: {found[match[0]]} and {path} are both for {match[0]}; "
                "there must be one file per image"
            )
    return found


def score(predictions: Path, root: Path, split: str) -> tuple[OfficialScores, str]:
    """Return the scores, and a note on what is left out.

    Raises:
        InputError: Files are missing or invalid.
    """
    dataset = Cityscapes(root=root, split=split)
    if not dataset.is_labelled:
        raise InputError(f"split={split}: its labels are not published, so it cannot be scored")
    found = find_predictions(predictions)
    missing = [item.name for item in dataset.items if item.name not in found]
    if missing:
        raise InputError(
            f"predictions={predictions}: {len(missing)} of {len(dataset)} images of split "
            f"{split!r} have no file {missing[0]}*.png"
        )
    scorer = OfficialScorer(LABELS)
    note = dataset.official_counter().note
    for item in dataset.items:
        path = found[item.name]
        prediction, truth = read_labels(path), read_labels(Path(str(item.mask)))
        if prediction.shape != truth.shape:
            raise InputError(
                f"{path}: {prediction.shape[1]} x {prediction.shape[0]}, but {item.mask} is "
                f"{truth.shape[1]} x {truth.shape[0]} (width x height)"
            )
        try:
            scorer.update(prediction, truth)
            if not note:
                instances = read_labels(Path(str(dataset.instance_path(item))))
                scorer.update_instances(prediction, instances)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return scorer.scores(with_instances=not note), note


def main(arguments: Sequence[str]) -> None:
    """Print the tables; write them to ``output``, with null for absent classes."""
    given, unknown = command_line.split(arguments, ("predictions", "root", "split", "output"))
    if unknown or not {"predictions", "root"} <= set(given):
        raise InputError(f"{' '.join(arguments)}: expected {USAGE}")
    folder, root = (Path(given[key]).expanduser() for key in ("predictions", "root"))
    scores, note = score(folder, root, given.get("split", "val"))
    for kind in ("classes", "categories"):
        iou, iiou = (getattr(scores, f"{name}_{kind}") for name in ("iou", "iiou"))
        print(class_table(list(iou), {"IoU": list(iou.values()), "iIoU": _aligned(iiou, iou)}))
    for name, value in scores.averages().items():
        print(f"  {name}={value}")
    if note:
        print(f"  {note}")
    if "output" in given:
        plain = {"averages": scores.averages(), **scores._asdict()}
        shown = {
            kind: {name: None if math.isnan(v) else v for name, v in values.items()}
            for kind, values in plain.items()
        }
        try:
            Path(given["output"]).expanduser().write_text(json.dumps(shown, indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"output={given['output']}: {error.strerror}") from error


def _aligned(scores: dict[str, float], names: dict[str, float]) -> list[float]:
    return [scores.get(name, math.nan) for name in names]


if __name__ == "__main__":
    command_line.run(main)
