"""Train heads on the features of a frozen backbone, which are computed once and kept.

python scripts/frozen_heads.py experiment=camvid_frozen data.root=<camvid> run.dir=DIR [SETTING=...]

The settings are those of tools/train.py; the backbone is in eval mode, whatever they say. The views
are fixed: every training picture and its mirror image, one of the two at random in each epoch, so
their features are written to a file once, shared by all runs in the folder ``frozen.kept``. Of its
own the script has

    frozen.kept=runs/features   folder of the kept features
    frozen.share=1              of the training pictures: 0.25 takes every fourth
    frozen.tile=null            [H,W]: views are the parts of pictures of this size, not wholes
    frozen.label_step=4         in training, the label of every fourth row and column counts
    frozen.map=-1               feature map of the backbone; earlier ones, -2 to -4, have seen less
                                of the picture, and are averaged to the size of the last
    frozen.checkpoint=null      a trained checkpoint whose backbone is taken

The head is scored on the split ``frozen.split`` (test), whole pictures. The checkpoint last.pt in
the folder of the run is that of the whole network, for tools/eval.py and tools/visualize.py; there
is none for an earlier map, whose network no config describes.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from torch import Tensor, nn
from tqdm import tqdm

import danet
from danet.checkpoint import format as checkpoint_format
from danet.config import schema
from danet.config.build import load_model, make, make_dataset, make_model
from danet.config.schema import TrainConfig
from danet.config.validate import check
from danet.datasets.base import SegmentationDataset
from danet.distributed.rendezvous import choose_device
from danet.engine.train_step import TrainStep
from danet.errors import InputError
from danet.evaluation.metrics import ConfusionMatrix
from danet.filesystem import atomic_write
from danet.ops.resize import resize
from danet.prediction.results import weights_digest
from danet.seeds import mix
from danet.types import Batch, SegmentationOutput
from danet.visualization.attention import as_tensor

ROOT = Path(__file__).resolve().parents[1]


class Own(NamedTuple):
    """The settings of this script."""

    kept: Path
    share: float
    tile: list[int] | None
    label_step: int
    map: int
    checkpoint: str | None
    split: str


class Trained(NamedTuple):
    """A network whose head was trained on kept features."""

    model: Any
    """A Segmentor, in eval mode."""
    config: TrainConfig
    losses: list[tuple[int, float]]
    """Steps and losses of the prediction alone."""
    seconds_per_step: float
    test: "Kept"
    data: SegmentationDataset
    """The test split."""


class Kept:
    """Features of the views of a split, and their labels, in two files that are mapped.

    Attributes:
        features: float32 (views, C, h, w); with mirror images, which are the second half.
        masks: uint8 (views, H, W).
    """

    def __init__(self, folder: Path) -> None:
        self.features = np.load(folder / "features.npy", mmap_mode="r")
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")

    def batch(self, views: Sequence[int], step: int = 1) -> Batch:
        """Return some of the views, with features (B, C, h, w) in the place of images.

        Their labels are those of every ``step``-th row and column.
        """
        index, places = list(views), slice(step // 2, None, step)
        features = self.features[index]  # a copy
        masks = np.ascontiguousarray(self.masks[index][:, places, places])
        return Batch(torch.from_numpy(features), torch.from_numpy(masks), ("",) * len(index))


class HeadOnly(nn.Module):
    """A head without its backbone: maps features to the output of the whole network."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> SegmentationOutput:
        """Maps (B, C, h, w) to logits at the resolution of the head."""
        logits = self.head(features)
        return SegmentationOutput(logits.pop("main"), logits)


class EarlyMap(nn.Module):
    """A backbone that ends with one of its earlier maps, averaged to the size of the last."""

    def __init__(self, backbone: Any, number: int) -> None:
        super().__init__()
        self.backbone, self.number = backbone, number
        self.channels = [backbone.channels[number]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps (B, 3, H, W) to one map (B, C, h, w)."""
        maps = self.backbone(images)
        return [F.adaptive_avg_pool2d(maps[self.number], maps[-1].shape[2:])]


def parse(settings: Sequence[str]) -> tuple[Own, list[str]]:
    """Split settings into those of this script and those of the training; raise InputError."""
    names = [f"frozen.{name}" for name in Own._fields]
    own, others = command_line.split(settings, names)
    for key in (text.partition("=")[0] for text in others):
        if key.startswith("frozen."):
            raise InputError(f"{key}: expected one of {', '.join(names)}")
    given = {key.removeprefix("frozen."): value for key, value in own.items()}
    expected = (
        "share is above 0 and at most 1, tile is [H,W] or null, label_step is at least 1, and map "
        "is -4 to -1"
    )
    try:
        share, step = float(given.get("share", "1")), int(given.get("label_step", "4"))
        tile, number = json.loads(given.get("tile", "null")), int(given.get("map", "-1"))
        is_valid = 0 < share <= 1 <= step and (tile is None or [*map(type, tile)] == [int, int])
        is_valid &= -4 <= number <= -1
    except (ValueError, TypeError):
        is_valid = False
    if not is_valid:
        raise InputError(f"{' '.join(f'{k}={v}' for k, v in own.items())}: frozen.{expected}")
    kept = Path(given.get("kept", ROOT / "runs" / "features")).expanduser()
    checkpoint, split = given.get("checkpoint"), given.get("split", "test")
    return Own(kept, share, tile, step, number, checkpoint, split), others


def compose(settings: Sequence[str]) -> TrainConfig:
    """Return the config of a training with these settings."""
    schema.register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return check(hydra.compose("train", overrides=list(settings)))


def train(settings: Sequence[str]) -> Trained:
    """Train a head on kept features; compute them first where they are not there."""
    own, others = parse(settings)
    config = compose(others)
    device = choose_device(config.trainer.device, key="trainer.device")
    torch.manual_seed(config.seed)
    model: Any = make_model(config).to(device).eval()
    if own.checkpoint:
        model.backbone.load_state_dict(load_model(own.checkpoint).backbone.state_dict())
    if own.map != -1:
        count = len(model.backbone.channels)
        if -own.map > count:
            raise InputError(f"frozen.map={own.map}: found {count} maps, expected -{count} to -1")
        model.backbone = EarlyMap(model.backbone, own.map)
        model.head = make(config.model["head"], "model.head")(model.backbone.channels[0])
        model.to(device).eval()
    train_set, test_set = (
        make_dataset(config, split, training=False)
        for split in (str(config.data.train_split), own.split)
    )
    kept = keep(model, config, train_set, own)
    test = keep(model, config, test_set, own._replace(tile=None))
    head = HeadOnly(model.head).train()
    loss, schedule = make(config.loss, "loss"), make(config.schedule, "schedule")
    optimizer = make(config.optimizer, "optimizer")(head)
    count = config.data.num_classes
    step = TrainStep(head, loss, optimizer, schedule, config.trainer, num_classes=count)
    batches = in_random_order(len(kept.masks) // 2, config.data.batch_size, own.share, config.seed)
    losses, started, steps = [], time.monotonic(), range(config.trainer.steps)
    for number, views in zip(tqdm(steps, unit="step", disable=None), batches, strict=False):
        terms = step([kept.batch(views, own.label_step)], number)
        losses.append((number + 1, terms["main"].item()))
    seconds = (time.monotonic() - started) / len(steps)
    if not all(math.isfinite(value) for _, value in losses):
        raise InputError("the loss is not finite; lower optimizer.lr")
    return Trained(model.eval(), config, losses, seconds, test, test_set)


def in_random_order(count: int, size: int, share: float, seed: int) -> Iterator[list[int]]:
    """Yield batches of views without end: all in each epoch, each mirrored or not at random."""
    chosen = np.arange(0, count, 1 / share).astype(int)
    pending: list[int] = []
    for epoch in range(sys.maxsize):
        random = np.random.default_rng(mix(seed, epoch))
        order = random.permutation(chosen)
        pending += (order + count * random.integers(0, 2, len(order))).tolist()
        while len(pending) >= size:
            yield pending[:size]
            del pending[:size]


def keep(model: Any, config: TrainConfig, data: SegmentationDataset, own: Own) -> Kept:
    """Return the kept features of a split; compute and write them where they are not there yet.

    Those of the training split are of mirror images, too.
    """
    is_mirrored = data.split == config.data.train_split
    facts = {
        "network": config.model["backbone"],
        "weights": weights_digest(model.backbone),
        "normalisation": [model.mean.flatten().tolist(), model.std.flatten().tolist()],
        "data": data.fingerprint(),
        "tile": own.tile,
        "mirrored": is_mirrored,
    }
    if own.map != -1:
        facts["map"] = own.map
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    folder = own.kept / f"{data.split}_{digest[:16]}"
    if not (folder / "masks.npy").is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        write(model, data, own.tile, folder, mirrored=is_mirrored)
    return Kept(folder)


@torch.inference_mode()
def write(
    model: Any, data: SegmentationDataset, tile: list[int] | None, folder: Path, *, mirrored: bool
) -> None:
    """Compute the features of the views of a split and write them with their labels.

    Raises:
        InputError: The pictures have several sizes.
    """
    height, width = data[0].mask.shape
    rows, columns = tile or (height, width)
    places = [
        (slice(top, top + rows), slice(left, left + columns))
        for top in range(0, height - rows + 1, rows)
        for left in range(0, width - columns + 1, columns)
    ]
    masks, features = [], None
    with atomic_write(folder / "features.npy") as temporary:
        for is_mirror in (False, True)[: 1 + mirrored]:
            for index in tqdm(range(len(data)), desc=data.split, unit="image", disable=None):
                image, mask, name = data[index]
                if mask.shape != (height, width):
                    raise InputError(
                        f"{name}: found {mask.shape[1]} x {mask.shape[0]} pixels, and {width} x "
                        f"{height} in {data[0].name}; kept features are of pictures of one size"
                    )
                for place in places:
                    parts = image[place], mask[place]
                    if is_mirror:
                        parts = parts[0][:, ::-1], parts[1][:, ::-1]
                    pixels = as_tensor(np.ascontiguousarray(parts[0]), model)
                    found = model.backbone(model.normalise(pixels))[-1]  # (1, C, h, w)
                    if features is None:
                        views = len(data) * len(places) * (1 + mirrored)
                        shape = (views, *found.shape[1:])
                        features = np.lib.format.open_memmap(temporary, "w+", "float32", shape)
                    features[len(masks)] = found[0].cpu().numpy()
                    masks.append(parts[1])
        if features is not None:
            features.flush()
    with atomic_write(folder / "masks.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, np.stack(masks))


@torch.inference_mode()
def score(found: Trained) -> dict[str, Any]:
    """Return the scores of a network on the kept views of its test split."""
    classes, test = found.data.classes, found.test
    confusion, head, device = (
        ConfusionMatrix(len(classes)),
        found.model.head,
        found.model.mean.device,
    )
    for view in range(len(test.masks)):
        features, mask, _ = test.batch([view])
        logits = head(features.to(device))["main"].cpu()
        fine = resize(logits, mask.shape[1:], align_corners=found.model.align_corners)
        confusion.update(fine.argmax(dim=1).to(mask.dtype), mask)
    scores = confusion.scores()
    return {
        "split": found.data.split,
        "images": len(test.masks),
        "step": found.config.trainer.steps,
        "protocol": "whole pictures",
        "miou": scores.miou,
        "mean_accuracy": scores.mean_accuracy,
        "pixel_accuracy": scores.pixel_accuracy,
        "iou": {
            name: None if math.isnan(value) else value
            for name, value in zip(classes, scores.iou, strict=True)
        },
    }


def save(found: Trained, folder: Path) -> None:
    """Write the checkpoint of the whole network, which ends with the last map of its backbone."""
    if isinstance(found.model.backbone, EarlyMap):
        print("frozen.map: no checkpoint is written, since no config describes this network")
        return
    saved = {
        "format": checkpoint_format.FORMAT,
        "version": danet.__version__,
        "config": found.config.plain,
        "classes": list(found.data.classes),
        "palette": [list(color) for color in found.data.palette],
        "model": found.model.state_dict(),
        "ema": None,
        "step": found.config.trainer.steps,
    }
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint_format.save(folder / "last.pt", saved)


def main(arguments: Sequence[str]) -> None:
    """Train and score a head, and write its checkpoint."""
    if not any(text.startswith("run.dir=") for text in arguments):
        raise InputError("run.dir: where should the checkpoint be written? run.dir=<folder>")
    found = train(arguments)
    save(found, Path(found.config.run.dir).expanduser())
    scores = score(found)
    print(f"{scores['split']}: mIoU {100 * scores['miou']:.2f}, {scores['images']} pictures")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    command_line.run(main)
