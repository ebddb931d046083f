"""Draw predictions and attention of a checkpoint: ``python tools/visualize.py checkpoint=PATH``."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from danet import cli
from danet.bands import Bands
from danet.config.build import checked_config, load_saved, make, make_dataset, model_of
from danet.config.schema import TrainConfig, VisualizeConfig, did_you_mean
from danet.datasets.annotations import Annotations
from danet.datasets.band_io import read_bands
from danet.datasets.base import SegmentationDataset
from danet.datasets.folder import Folder
from danet.datasets.listing import IMAGE_SUFFIXES
from danet.datasets.submission import require_labels
from danet.distributed.rendezvous import choose_device
from danet.engine.log import read_metrics
from danet.errors import InputError
from danet.evaluation.calibration import Calibration
from danet.evaluation.corruptions import STRENGTHS, TABLE
from danet.evaluation.evaluate import Inference
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import describe
from danet.evaluation.metrics import ConfusionMatrix, single_class_warning
from danet.filesystem import folder_of, require_writable, write_file
from danet.plain import is_number
from danet.prediction.predict import predict
from danet.prediction.results import weights_digest
from danet.visualization import report
from danet.visualization.attention import (
    Point,
    as_tensor,
    attention_branches,
    choose_points,
    diagnose_attention,
    figure,
    spread,
)
from danet.visualization.evidence import deletions_by_class
from danet.visualization.overlay import Legend, SegmentedImage, resize, save_image, sheet

Picture = tuple[str, np.ndarray, np.ndarray | None]
"""A name, an image, and its true classes where they are known."""

_ORIGIN = "pictures.json"
"""States what the pictures of a folder are of."""
_TILE = 288
"""Width of a picture on the contact sheet, in pixels."""
_EXTREMES = 3
"""How many best and how many worst pictures a report shows."""


class Network(NamedTuple):
    """A checkpoint, loaded onto a device."""

    path: str
    model: nn.Module
    legend: Legend
    step: int
    config: TrainConfig
    infer: Inference
    """The protocol of its training, which predicts everything drawn and scored here."""


def run(config: DictConfig) -> None:
    """Load the checkpoint, write pictures of the chosen images and, if requested, a report."""
    settings: VisualizeConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    refuse_settings(settings)
    device = choose_device(settings.device)
    network = load_network(settings.checkpoint, settings, device)
    other = None
    if settings.other:
        try:
            other = load_network(settings.other, settings, device)
        except InputError as error:
            raise InputError(str(error).replace("checkpoint=", "other=", 1)) from None
    if other and other.legend.bands != network.legend.bands:
        raise InputError(
            f"other={settings.other}: it reads other bands, or in another range, than "
            f"checkpoint={settings.checkpoint}: give one with the same data.channels and data.range"
        )
    if other and other.legend.classes != network.legend.classes:
        raise InputError(
            f"other={settings.other}: its {len(other.legend.classes)} classes are not the "
            f"{len(network.legend.classes)} of checkpoint={settings.checkpoint}"
        )
    facts: dict[str, Any] = {
        "network": weights_digest(network.model),
        "other": weights_digest(other.model) if other else None,
        "evaluation": network.config.evaluation,
    }
    source = settings.split or network.config.data.val_split or network.config.data.train_split
    path = Path(settings.checkpoint).expanduser()
    beside = path if path.is_dir() else path.parent
    if settings.images:
        images = Path(settings.images).expanduser()
        pictures, source = own_pictures(images, network.legend.bands), "own"
        facts["images"] = str(images.absolute())
    else:
        dataset = make_dataset(network.config, source, training=False)
        if settings.report:
            require_labels(dataset, "split", "report=true needs them to score the network")
        pictures = split_pictures(dataset, settings.count)
        facts["images"] = dataset.fingerprint()
        facts["root"] = network.config.data.root
    default = folder_of(beside / f"pictures_{source}", _ORIGIN, facts)
    output = Path(settings.output).expanduser() if settings.output else default
    require_writable(output)
    if not settings.output:  # a folder that was named is the user's own affair
        write_file(output / _ORIGIN, json.dumps(facts, indent=1) + "\n")
    rows = []
    for picture in draw(pictures, network, other, settings, output):
        height, width = picture.prediction.shape
        rows.append(resize(picture, min(1, _TILE / width, 2 * _TILE / height)))
    save_image(output / "contact_sheet.png", sheet(network.legend, *rows))
    print(output / "contact_sheet.png", flush=True)
    if settings.report:
        text = report.page(examine(network, dataset, settings, beside))
        write_file(output / "report.html", text)
        print(output / "report.html", flush=True)


def load_network(path: str, settings: VisualizeConfig, device: torch.device) -> Network:
    """Load a checkpoint with its config, and its network onto a device."""
    saved = load_saved(path)
    config = checked_config(saved, path, settings.data)
    model = model_of(saved, config, path).to(device)
    palette = [tuple(color) for color in saved["palette"]]
    bands: Any = model.bands
    legend = Legend(saved["classes"], palette, settings.opacity, bands)
    infer = make(config.evaluation, "evaluation")
    return Network(path, model, legend, saved["step"], config, infer)


def refuse_settings(settings: VisualizeConfig) -> None:
    """Raise InputError for settings that contradict each other or are out of range."""
    for name in ("count", "channels"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}={getattr(settings, name)}: expected at least 1")
    if settings.report and settings.images:
        raise InputError("report=true scores a split: leave images out")
    if settings.points and settings.classes:
        raise InputError("points and classes both say where to look: leave one of them out")
    if not 0 <= settings.opacity <= 1:
        raise InputError(f"opacity={settings.opacity}: expected 0 to 1")


def draw(
    pictures: Iterator[Picture],
    network: Network,
    other: Network | None,
    settings: VisualizeConfig,
    output: Path,
) -> Iterator[SegmentedImage]:
    """Write the pictures of each image, and yield it with its prediction."""
    model, legend, infer = network.model, network.legend, network.infer
    points, wanted = read_points(settings.points), find_classes(settings.classes, legend.classes)
    for name, image, truth in pictures:
        picture = SegmentedImage(name, image, predict(model, image, infer=infer), truth)
        save_image(output / f"{name}.png", sheet(legend, picture))
        if other:
            second = predict(other.model, image, infer=other.infer)
            both = (
                picture._replace(name=f"1st: {Path(network.path).name}"),
                picture._replace(name=f"2nd: {Path(other.path).name}", prediction=second),
            )
            save_image(output / f"{name}_versus.png", sheet(legend, *both))
        if settings.attention and attention_branches(model):
            height, width = image.shape[:2]
            inside = [p for p in points if p.x < width and p.y < height]
            if points and not inside:
                raise InputError(
                    f"points={settings.points}: none lies in {name}, which is {width} x {height}"
                )
            outside = [tuple(p) for p in points if p not in inside]
            if outside:
                note = f"not in {name}, which is {width} x {height}, and left out"
                print(f"points={outside}: {note}", file=sys.stderr, flush=True)
            inside = inside or choose_points(picture.prediction, wanted=wanted)
            drawn = figure(model, picture, legend, points=inside, channels=settings.channels)
            save_image(output / f"{name}_attention.png", drawn)
        print(output / f"{name}.png", flush=True)
        yield picture


def examine(
    network: Network, dataset: SegmentationDataset, settings: VisualizeConfig, folder: Path
) -> report.Report:
    """Score a split by the protocol of the training, and choose pictures for the report."""
    model, classes, infer = network.model, network.legend.classes, network.infer
    device = next(model.parameters()).device
    fused = fuse_for_inference(model, device)
    # Without the temperature of a calibrated checkpoint, and with it.
    temperature: Any = model.temperature
    calibrations = [Calibration(t, device) for t in sorted({1.0, temperature})]
    confusion, by_image = ConfusionMatrix(len(classes)), list[float]()
    for index in tqdm(range(len(dataset)), desc=dataset.split, unit="image"):
        image, mask, _ = dataset[index]
        alone, truth = ConfusionMatrix(len(classes)), torch.from_numpy(mask.astype(np.int32))[None]
        predicted = infer.predict(fused, as_tensor(image, fused), truth.to(device), calibrations)
        alone.update(predicted.cpu(), truth)
        confusion.counts.add_(alone.counts)
        by_image.append(alone.scores().miou if alone.matrix.any() else math.nan)

    def segmented(index: int) -> SegmentedImage:
        # Predicted again: the predictions of a whole split may not fit into memory.
        image, mask, name = dataset[index]
        return SegmentedImage(name, image, predict(fused, image, infer=infer), mask)

    order = [int(i) for i in np.argsort(by_image) if not math.isnan(by_image[i])]
    half = len(order) // 2  # so that no picture is among the best and the worst
    best, worst = order[half:][::-1], order[:half]
    wanted = find_classes(settings.classes, classes)
    has_viewer = "position" in attention_branches(model)
    spaced = spread(len(dataset), settings.count)
    samples = (dataset[i] for i in spaced)
    fitting = (
        report.fit(model, SegmentedImage(name, image, mask)) for image, mask, name in samples
    )
    images = [picture.image for picture in fitting] if attention_branches(model) else []
    warning = single_class_warning(confusion.matrix, classes)
    if warning:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    weights = sum(p.numel() for p in model.parameters())
    source = type(dataset).__name__
    if isinstance(dataset, (Annotations, Folder)):
        source = dataset.root.name
    return report.Report(
        title=f"{source}, {dataset.split}: {100 * confusion.scores().miou:.2f} % mean IoU",
        facts=[
            f"{folder.absolute().name}, step {network.step}; "
            f"{weights:,} weights; {len(dataset)} images.",
            f"Scored and drawn by {describe(network.config.evaluation)}; attention is that of "
            "one pass over the whole picture.",
            *([warning] if warning else []),
        ],
        legend=network.legend,
        confusion=confusion,
        lines=read_metrics(folder / "metrics.jsonl"),
        examples={
            "Best pictures": [(segmented(i), by_image[i]) for i in best[:_EXTREMES]],
            "Worst pictures": [(segmented(i), by_image[i]) for i in worst[:_EXTREMES]],
        },
        calibration=[found.facts() for found in calibrations],
        views=[report.view(model, segmented(i), wanted) for i in spaced if has_viewer],
        corruptions=corruption_scores(network, dataset, folder),
        attention=diagnose_attention(model, images),
        deletions=deletions_by_class(model, images, classes, points=4),
    )


def corruption_scores(
    network: Network, dataset: SegmentationDataset, folder: Path
) -> dict[str, list[float]]:
    """Return mIoU without and under corruptions, where tools/eval.py wrote it below a folder.

    It is that of the same weights, samples and protocol; the first in the order of the names.
    """
    wanted = {
        "network": weights_digest(network.model),
        "step": network.step,
        "data_set": dataset.fingerprint(),
        "evaluation": network.config.evaluation,
    }
    for file in sorted(folder.glob("*/metrics.json")):
        # It may lie beside a foreign checkpoint, so nothing of its content is trusted.
        with suppress(OSError, ValueError, TypeError, LookupError, RecursionError, AttributeError):
            metrics = json.loads(file.read_text("utf-8"))
            if metrics.items() >= wanted.items():
                clean, rows = metrics["miou"], metrics["corruptions"]
                found = {name: [clean, *rows[name]] for name in TABLE if name in rows}
                values = [value for row in found.values() for value in row]
                if len(values) == len(found) * (1 + len(STRENGTHS)) and all(map(is_number, values)):
                    return found
    return {}


def split_pictures(dataset: SegmentationDataset, count: int) -> Iterator[Picture]:
    """Read evenly spaced samples of a split."""
    samples = (dataset[i] for i in spread(len(dataset), count))
    return ((s.name, s.image, s.mask) for s in samples)


def own_pictures(path: Path, bands: Bands | None) -> Iterator[Picture]:
    """Read a file, or all pictures of a folder."""
    if not path.exists():
        raise InputError(f"images={path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"images={path}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else file.name for file in files]
    pairs = zip(names, files, strict=True)
    return ((name, read_bands(file, bands)[0], None) for name, file in pairs)


def read_points(values: list[Any] | None) -> list[Point]:
    """Return the points of ``points=[[x,y],...]``; raises InputError for other values."""
    values = values or []
    for value in values:
        is_list = isinstance(value, list)
        if not is_list or len(value) != 2 or not all(isinstance(n, int) and n >= 0 for n in value):
            raise InputError(
                f"points={values}: expected pairs of pixels that count from 0, x and y, as in "
                "'points=[[120,40],[300,52]]'"
            )
    return [Point(*value) for value in values]


def find_classes(names: list[str] | None, classes: Sequence[str]) -> list[int]:
    """Return the indices of classes; raises InputError for unknown names."""
    for name in names or []:
        if name not in classes:
            raise InputError(
                f"classes: the checkpoint has no class {name}{did_you_mean(name, classes)}; "
                f"it has {', '.join(classes)}"
            )
    return [classes.index(name) for name in names or []]


def main() -> None:
    """Run the command ``danet-visualize``."""
    cli.run(run, "visualize")


if __name__ == "__main__":
    main()
