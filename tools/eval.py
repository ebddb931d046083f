"""Scores a checkpoint: ``python tools/eval.py checkpoint=PATH [SETTING=VALUE ...]``."""

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from danet import cli
from danet.assemble import checked_config, make, make_dataset, model_of
from danet.check import check_node
from danet.config import EvalConfig
from danet.data.loader import eval_batches
from danet.engine import checkpoint, distributed
from danet.engine.log import class_table
from danet.errors import StorageError
from danet.evaluation.confusion import Scores
from danet.evaluation.evaluate import evaluate


def work(config: DictConfig) -> None:
    """Loads the checkpoint, counts one split on all processes, prints and writes the scores."""
    settings: EvalConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    saved = checkpoint.load(settings.checkpoint)
    trained = checked_config(saved, settings.checkpoint, settings.data)
    protocol = settings.evaluation or trained["evaluation"]
    check_node(protocol, "evaluation")
    infer = make(protocol, "evaluation")
    split = settings.split or trained["data"]["val_split"]
    dataset = make_dataset(trained, split, training=False)
    model = model_of(saved, trained, settings.checkpoint)

    device = distributed.choose_device(settings.device)
    with distributed.group(device):
        batches = eval_batches(
            dataset,
            batch_size=settings.batch_size,
            rank=distributed.rank(),
            world=distributed.world_size(),
            num_workers=trained["data"]["num_workers"],
            pin_memory=device.type == "cuda",
        )
        order = (
            torch.channels_last if trained["trainer"]["channels_last"] else torch.contiguous_format
        )
        confusion = evaluate(
            model.to(device).to(memory_format=order),
            tqdm(batches, desc=split, unit="batch", disable=not distributed.is_first()),
            infer,
            num_classes=len(dataset.classes),
            device=device,
        )
        distributed.sum_in_place(confusion.counts)
        scores = confusion.scores()
        if not distributed.is_first():
            return
    mode = type(infer).__name__.lower()
    default = Path(settings.checkpoint).parent / f"eval_{split}_{mode}"
    output = Path(settings.output).expanduser() if settings.output else default
    facts = {
        "checkpoint": settings.checkpoint,
        "step": saved["step"],
        "split": split,
        "images": len(dataset),
        "evaluation": protocol,
    }
    write(output, facts, scores, dataset.classes, confusion.matrix.cpu().numpy())
    print(class_table(dataset.classes, {"IoU": scores.iou, "accuracy": scores.accuracy}))
    print(
        f"  {split}, {len(dataset)} images, {mode}: mIoU {100 * scores.miou:.2f} over "
        f"{scores.classes_averaged} classes, pixel accuracy {100 * scores.pixel_accuracy:.2f}, "
        f"mean accuracy {100 * scores.mean_accuracy:.2f}, "
        f"frequency-weighted IoU {100 * scores.frequency_weighted_iou:.2f}"
    )
    print(f"  miou={scores.miou}\n  written to {output}")


def write(
    output: Path,
    facts: dict[str, Any],
    scores: Scores,
    classes: tuple[str, ...],
    matrix: np.ndarray,
) -> None:
    """Writes metrics.json and confusion.csv (rows are truth, columns prediction, in pixels)."""
    per_class = {
        name: {"iou": None if np.isnan(i) else i, "accuracy": None if np.isnan(a) else a}
        for name, i, a in zip(classes, scores.iou, scores.accuracy, strict=True)
    }
    named = {k: v for k, v in scores._asdict().items() if k not in ("iou", "accuracy")}
    metrics = {**named, "per_class": per_class, **facts}
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("truth", *classes))
    rows.writerows((name, *row) for name, row in zip(classes, matrix.tolist(), strict=True))
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        (output / "confusion.csv").write_text(table.getvalue(), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"output={output}: cannot be written ({error.strerror})") from error


def main() -> None:
    """Is the command ``danet-eval``."""
    cli.run(work, "eval")


if __name__ == "__main__":
    main()
