"""Score a checkpoint: ``python tools/eval.py checkpoint=PATH [SETTING=VALUE ...]``."""

import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from danet import cli
from danet.checkpoint import exported
from danet.checkpoint.manager import add_temperature
from danet.checkpoint.run_folder import best_in
from danet.config import build
from danet.config.schema import EvalConfig, TrainConfig, did_you_mean
from danet.data.loader import eval_batches
from danet.datasets.base import SegmentationDataset
from danet.datasets.cityscapes import Cityscapes
from danet.datasets.image_io import read_image
from danet.datasets.submission import SubmissionWriter, require_labels
from danet.distributed import collectives, signals
from danet.distributed.agreement import wait_patiently
from danet.distributed.rendezvous import choose_device, process_group
from danet.engine.log import class_table
from danet.errors import InputError, UserError
from danet.evaluation.calibration import LEVELS, Calibration, TemperatureFit
from danet.evaluation.cityscapes import OfficialScores
from danet.evaluation.corruptions import GROUPS, PHOTOGRAPHS, STRENGTHS, TABLE, Corrupted
from danet.evaluation.evaluate import Counter, Inference, predict
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import describe, mode_name
from danet.evaluation.metrics import (
    BoundaryIoU,
    ConfusionMatrix,
    Scores,
    image_iou,
    single_class_warning,
)
from danet.evaluation.robustness import Robustness
from danet.filesystem import folder_of, require_writable, write_file, write_table
from danet.prediction.results import weights_digest
from danet.types import Sample


def run(config: DictConfig) -> None:
    """Load the checkpoint, run it over one split, print and write scores and predictions."""
    settings: EvalConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    if settings.batch_size < 1:
        raise InputError(f"batch_size={settings.batch_size}: expected at least 1")
    corruptions = chosen_corruptions(settings)
    # First, so that messages and metrics.json name the file.
    settings.checkpoint = best_in(settings.checkpoint, "checkpoint")
    if settings.calibrate:
        refuse_exported(settings.checkpoint)
    saved = build.load_saved(settings.checkpoint)
    trained = build.checked_config(saved, settings.checkpoint, settings.data)
    protocol, infer = build.choose_inference(settings.evaluation, trained)
    ratio = settings.boundary_ratio
    if ratio is not None and not 0 < ratio < 1:
        raise InputError(f"boundary_ratio={ratio}: expected a part of the diagonal, as in 0.02")
    split = settings.split or trained.data.val_split
    if split is None:
        raise InputError("split: the training had no validation set; set split=<split>")
    if settings.calibrate and split == trained.data.train_split:
        raise InputError(
            f"calibrate=true: split={split} was trained on, and a network is too sure there; "
            "name another with split="
        )
    dataset = build.make_dataset(trained, split, training=False)
    if settings.calibrate:
        require_labels(dataset, "split", "calibrate=true needs them: name another split")
    writer = None
    if settings.submission:
        writer = SubmissionWriter(Path(settings.submission), dataset)
    else:
        require_labels(
            dataset, "split", "submission=<folder> writes predictions for the test server"
        )
    model: Any = build.model_of(saved, trained, settings.checkpoint)
    if corruptions and (model.bands or not dataset.is_labelled):
        reason = "RGB of 8 bits, and this network has bands" if model.bands else "labelled splits"
        raise InputError(f"corruptions: they are for {reason}; leave corruptions out")

    device = choose_device(settings.device)
    mode = cli.chosen("evaluation") or mode_name(protocol)
    facts = {
        "checkpoint": settings.checkpoint,
        "step": saved["step"],
        "network": weights_digest(model),
        "split": split,
        "images": len(dataset),
        "data_set": dataset.fingerprint(),
        "root": trained.data.root,
        "boundary_ratio": ratio,
        "evaluation": protocol,
        "protocol": describe(protocol, mode),
    }
    default = Path(settings.checkpoint).expanduser().parent / f"eval_{split}_{mode}"
    same = ("network", "step", "data_set", "root", "evaluation", "boundary_ratio")
    output = folder_of(default, "metrics.json", {key: facts[key] for key in same})
    if settings.output:
        output = Path(settings.output).expanduser()
    with process_group(device):
        if collectives.is_first() and dataset.is_labelled:
            require_writable(output)
        fused = fuse_for_inference(model.to(device), device)
        walk = partial(predict_split, fused, infer, settings, trained, device)
        origin = {key: facts[key] for key in same if key != "boundary_ratio"}
        robustness = Robustness(output, origin, corruptions)
        if settings.calibrate:
            over = partial(walk, dataset, split)
            file = Path(settings.checkpoint).expanduser()
            facts["uncalibrated"] = calibrate(model, over, file, saved["step"], device)
        calibration = Calibration(model.temperature, device)
        predictions = walk(dataset, split, [calibration] * dataset.is_labelled)
        counted = count(predictions, dataset, writer, device, calibration, boundary_ratio=ratio)
        score_corruptions(robustness, walk, dataset, Path(settings.frost).expanduser(), device)
        if not collectives.is_first():
            return
    if writer:
        print("\n".join(f"  {line}" for line in writer.finish()))
    if counted is None:  # a split without labels
        return
    if corruptions:
        facts |= robustness.summary(counted.scores.miou)
        robustness.write_table()
    write(output, facts, counted, dataset.classes)
    what = f"{split}, {len(dataset)} images"
    report(counted, dataset.classes, what, describe(protocol, mode))
    if corruptions:
        report_corruptions(facts, counted.scores.miou)
    print(f"  miou={counted.scores.miou}\n  written to {output}")


def predict_split(
    fused: nn.Module,
    infer: Inference,
    settings: EvalConfig,
    trained: TrainConfig,
    device: torch.device,
    dataset: Dataset[Sample],
    what: str,
    counters: Sequence[Counter] = (),
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield the predictions for this process's share of a split, which counters count."""
    batches = eval_batches(
        dataset,
        batch_size=settings.batch_size,
        rank=collectives.rank(),
        world=collectives.world_size(),
        num_workers=trained.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    shown = tqdm(batches, desc=what, unit="batch", disable=not collectives.is_first())
    return predict(fused, shown, infer, device=device, counters=counters)


def chosen_corruptions(settings: EvalConfig) -> dict[str, dict[str, str]]:
    """Return the corruptions of the settings in their usual order; raise InputError.

    ``frost`` has a digest of its photographs, since its scores depend on them.
    """
    wanted = settings.corruptions
    if not isinstance(wanted, (bool, list)):
        example = "'corruptions=[fog,snow]'"
        raise InputError(f"corruptions={wanted}: expected true, false or names, as in {example}")
    for name in wanted if isinstance(wanted, list) else ():
        if not isinstance(name, str) or name not in TABLE:
            raise InputError(
                f"corruptions: there is no {name}{did_you_mean(name, TABLE)}; expected some of "
                f"{', '.join(TABLE)}"
            )
    chosen: dict[str, dict[str, str]] = {
        name: {} for name in TABLE if wanted is True or (wanted and name in wanted)
    }
    folder = Path(settings.frost).expanduser()
    missing = [name for name in PHOTOGRAPHS if not (folder / name).is_file()]
    if "frost" in chosen and missing:
        others = ",".join(name for name in chosen if name != "frost")
        raise InputError(
            f"frost={folder}: {missing[0]} is not there; fetch the photographs with `python "
            f"scripts/fetch_weights.py name=frost output={shlex.quote(str(folder))}`, or leave "
            f"frost out: 'corruptions=[{others}]'"
        )
    if "frost" in chosen:
        pixels = b"".join(read_image(folder / name).tobytes() for name in PHOTOGRAPHS)
        chosen["frost"]["photographs"] = hashlib.sha256(pixels).hexdigest()
    return chosen


def refuse_exported(checkpoint: str) -> None:
    """Raise InputError for a network that is no file to which a temperature can be written."""
    is_folder = (Path(checkpoint).expanduser() / exported.CONFIG).is_file()
    if is_folder or checkpoint.startswith(exported.SCHEME):
        raise InputError(
            f"calibrate=true: checkpoint={checkpoint} is an exported network; calibrate the "
            "checkpoint it was made of, and export that again"
        )


def calibrate(
    model: Any,
    walk: Callable[[Sequence[Counter]], Iterable[Any]],
    file: Path,
    step: int,
    device: torch.device,
) -> dict[str, Any]:
    """Fit the temperature of a network, and write it into its checkpoint on the first process.

    Returns the facts of the calibration before.
    """
    if collectives.is_first():
        require_writable(file.resolve().parent, "checkpoint")
    before, fit = Calibration(model.temperature, device), TemperatureFit(device)
    for _ in walk([before, fit]):
        pass
    wait_patiently("the first pass")
    for counter in (before, fit):
        collectives.sum_in_place(counter.counts)
    if not before.counts.any():
        raise InputError("calibrate=true: no pixel of the split has a label; name another split")
    model.temperature = fit.temperature()
    facts = before.facts()
    error: UserError | None = None
    if collectives.is_first():
        print(f"  before: {sentence(facts)}")
        try:
            for name in add_temperature(file, model.temperature, step=step):
                print(f"  {name}: temperature {model.temperature:.4f}")
        except UserError as refused:  # raised on all processes: none may wait for the others
            error = refused
    error = collectives.from_first(error)
    if error:
        raise error
    return facts


def sentence(facts: dict[str, Any]) -> str:
    """Return the numbers of a calibration as a line."""
    return (
        f"expected calibration error {100 * facts['ece']:.2f}, mean confidence "
        f"{100 * facts['mean_confidence']:.2f}, area under the risk-coverage curve "
        f"{100 * facts['aurc']:.2f}, temperature {facts['temperature']:.4g}"
    )


def score_corruptions(
    robustness: Robustness,
    walk: Callable[[Dataset[Sample], str], Iterable[tuple[Tensor, Tensor, str]]],
    dataset: SegmentationDataset,
    frost: Path,
    device: torch.device,
) -> None:
    """Score the split under each corruption that has no score yet; print those that are done."""
    started, missing = time.monotonic(), robustness.missing()
    for number, (name, strength) in enumerate(missing, start=1):
        corrupted, what = Corrupted(dataset, name, strength, frost), f"{name} {strength}"
        confusion = ConfusionMatrix(len(dataset.classes), device)
        for classes, mask, _ in walk(corrupted, what):
            confusion.update(classes, mask)
        wait_patiently(what)
        collectives.sum_in_place(confusion.counts)
        robustness.add(name, strength, confusion.scores())
        if number == 1 < len(missing):
            minutes = (time.monotonic() - started) * (len(missing) - 1) / 60
            cli.say(f"  about {minutes:.0f} minutes for the other {len(missing) - 1}")
        if strength == STRENGTHS[-1]:
            cli.say(f"  {name}: " + " ".join(f"{100 * v:.2f}" for v in robustness.row(name)))


def report_corruptions(facts: Mapping[str, Any], clean: float) -> None:
    """Print the scores that metrics.json has, and their mean beside that without corruption."""
    columns = {str(s): [row[s - 1] for row in facts["corruptions"].values()] for s in STRENGTHS}
    columns["mean"] = [*facts["corruption_means"].values()]
    print(class_table([f"{GROUPS[name]}: {name}" for name in facts["corruptions"]], columns))
    mean = facts["mean_corrupted_miou"]
    ratio = f", {100 * mean / clean:.2f} % of" if clean else "; without:"
    print(f"  mean under corruptions: mIoU {100 * mean:.2f}{ratio} {100 * clean:.2f}")


class Counted(NamedTuple):
    """The counts and scores of the whole split, over all processes."""

    matrix: np.ndarray
    """int64 (K, K); rows are truth, columns prediction, in pixels."""
    scores: Scores
    official: OfficialScores | None
    note: str
    """Which official scores are left out, and why."""
    image_miou: float
    boundary: Tensor | None
    """Boundary IoU by class, float64 (K,)."""
    calibration: dict[str, Any]
    levels: np.ndarray
    """int64 (L, 3): levels of confidence, wrong and right pixels."""


def count(
    predictions: Iterable[tuple[Tensor, Tensor, str]],
    dataset: SegmentationDataset,
    writer: SubmissionWriter | None,
    device: torch.device,
    calibration: Calibration,
    *,
    boundary_ratio: float | None = None,
) -> Counted | None:
    """Write and count the predictions of this process, and sum the counts over processes.

    Returns:
        None for a split without labels.
    """
    confusion = ConfusionMatrix(len(dataset.classes), device)
    images = torch.zeros(2, dtype=torch.float64, device=device)  # sum of means, and number
    boundary = BoundaryIoU(len(dataset.classes), boundary_ratio) if boundary_ratio else None
    has_labels = dataset.is_labelled
    counter = None
    if has_labels and isinstance(dataset, Cityscapes):
        counter = dataset.official_counter()
    if writer:
        if collectives.is_first():
            writer.begin()
        wait_patiently("the folder of predictions")
    for predicted, mask, name in predictions:
        if has_labels:
            # Pixels are counted once: the matrix of the split is the sum of those of the images.
            alone = ConfusionMatrix(len(dataset.classes), device)
            alone.update(predicted, mask)
            confusion.counts.add_(alone.counts)
            images += image_iou(alone.matrix)
        if writer or counter or boundary:
            classes = predicted.cpu().numpy()
            if boundary and has_labels:
                boundary.update(classes, mask.cpu().numpy())
            if writer:
                writer.write(name, classes)
            if counter:
                counter.update(classes, name)
    # Shares may take very different times, and the first process then checks the files of all.
    wait_patiently("the predictions")
    if not has_labels:
        return None
    # Some counts are on the CPU, where the backend of a GPU cannot sum them.
    further = (c.counts for c in (calibration, boundary, counter) if c)
    for counts in (confusion.counts, images, *further):
        totals = counts.to(device)
        collectives.sum_in_place(totals)
        counts.copy_(totals)
    matrix = confusion.matrix.cpu().numpy()
    total, number = images.tolist()
    return Counted(
        matrix=matrix,
        scores=confusion.scores(),
        official=counter.scores(matrix) if counter else None,
        note=counter.note if counter else "",
        image_miou=total / number if number else math.nan,
        boundary=boundary.iou() if boundary else None,
        calibration=calibration.facts(),
        levels=calibration.table(),
    )


def report(counted: Counted, classes: tuple[str, ...], what: str, protocol: str) -> None:
    """Print the tables of scores, and the protocol."""
    scores, official = counted.scores, counted.official
    columns: dict[str, Sequence[float]] = {"IoU": scores.iou, "accuracy": scores.accuracy}
    if official and official.iiou_classes:
        columns["iIoU"] = [official.iiou_classes.get(name, math.nan) for name in classes]
    if counted.boundary is not None:
        columns["boundary"] = counted.boundary.tolist()
    print(class_table(classes, columns))
    if official:
        names = list(official.iou_categories)
        columns = {"IoU": [official.iou_categories[name] for name in names]}
        if official.iiou_categories:
            columns["iIoU"] = [official.iiou_categories.get(name, math.nan) for name in names]
        print(class_table(names, columns))
    print(
        f"  {what}: mIoU {100 * scores.miou:.2f} over "
        f"{scores.classes_averaged} classes, pixel accuracy {100 * scores.pixel_accuracy:.2f}, "
        f"mean accuracy {100 * scores.mean_accuracy:.2f}, "
        f"frequency-weighted IoU {100 * scores.frequency_weighted_iou:.2f}, "
        f"mean of the images' mIoU {100 * counted.image_miou:.2f}"
    )
    if counted.boundary is not None:
        print(f"  mean boundary IoU {100 * counted.boundary.nanmean():.2f}")
    print(f"  {sentence(counted.calibration)}")
    print(f"  protocol: {protocol}")
    if official:
        shown = {
            name: value for name, value in official.averages().items() if not math.isnan(value)
        }
        print("  official: " + ", ".join(f"{k} {100 * v:.2f}" for k, v in shown.items()))
    if counted.note:
        print(f"  {counted.note}")
    warning = single_class_warning(torch.from_numpy(counted.matrix), classes)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def write(output: Path, facts: dict[str, Any], counted: Counted, classes: tuple[str, ...]) -> None:
    """Write metrics.json, confusion.csv and confidence.csv.

    Rows of confusion.csv are truth, columns prediction, in pixels. Those of confidence.csv are
    the confidences that occur.
    """
    scores = counted.scores
    per_class = {
        name: {"iou": _number(i), "accuracy": _number(a)}
        for name, i, a in zip(classes, scores.iou, scores.accuracy, strict=True)
    }
    named = {k: v for k, v in scores._asdict().items() if k not in ("iou", "accuracy")}
    metrics = {**named, "image_miou": counted.image_miou, "per_class": per_class, **facts}
    if counted.boundary is not None:
        for name, value in zip(classes, counted.boundary.tolist(), strict=True):
            per_class[name]["boundary_iou"] = _number(value)
        metrics["boundary_miou"] = _number(counted.boundary.nanmean().item())
    if counted.official:
        metrics["official"] = official_facts(counted.official)
    metrics["calibration"] = counted.calibration
    write_file(output / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    confusion = zip(classes, counted.matrix.tolist(), strict=True)
    rows: list[tuple[Any, ...]] = [("truth", *classes), *((name, *row) for name, row in confusion)]
    write_table(output / "confusion.csv", rows)
    levels = ((round(level / LEVELS, 6), *pixels) for level, *pixels in counted.levels.tolist())
    write_table(output / "confidence.csv", [("confidence", "wrong", "right"), *levels])


def official_facts(official: OfficialScores) -> dict[str, Any]:
    """Return official scores as plain values for JSON: averages, and each score by name."""
    averages = {name: _number(value) for name, value in official.averages().items()}
    named = {
        kind: {name: _number(value) for name, value in values.items()}
        for kind, values in official._asdict().items()
    }
    return {"averages": averages, **named}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def main() -> None:
    """Run the command ``danet-eval``."""
    signals.follow_parent()
    cli.run(run, "eval")


if __name__ == "__main__":
    main()
