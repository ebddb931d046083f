"""Notes on unusual settings, and refusals of impossible ones, before a run starts."""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from danet.checkpoint.run_folder import refuse_used
from danet.config.build import untrained
from danet.config.schema import DataConfig, TrainConfig
from danet.engine.precision import choose_precision
from danet.errors import InputError, StorageError
from danet.plain import is_int, walk

_RECIPES = Path(__file__).resolve().parents[1] / "configs" / "optimizer"
_FAR = 10
"""Factor between a learning rate and that of the recipe from which on there is a note."""


def notes(config: TrainConfig, device: torch.device, *, typed: Collection[str] = ()) -> list[str]:
    """Return notes on unusual settings of a training, a line each.

    Args:
        config: A checked config.
        device: Of the training.
        typed: Overrides of the command line, as typed.

    Raises:
        InputError: The device does not support ``trainer.precision``.
    """
    data, trainer = config.data, config.trainer
    lines = []
    if any(setting.lstrip("+").startswith("data.root=") for setting in typed):
        lines.append(f"data.root={data.root}")
    lines += _rate_notes(config.optimizer)
    lines += _loss_notes(config.loss, data)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and data.num_workers > cores:
        lines.append(
            f"data.num_workers={data.num_workers}: this process may use {cores} core(s), so "
            "more workers than that wait for one another"
        )
    best = choose_precision("auto", device)
    if choose_precision(trainer.precision, device) == torch.bfloat16 != best:
        lines.append(
            f"trainer.precision=bfloat16: {device} does not compute in it, so it is emulated: "
            "slower than float32 here"
        )
    if "trainer.sync_batchnorm=true" in [setting.lower() for setting in typed]:
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        if alone or device.type == "cpu":
            why = "there is one process" if alone else "there is none on the CPU"
            lines.append(f"trainer.sync_batchnorm=true: {why}, so plain batch norm is used")
    return lines


def _rate_notes(optimizer: Mapping[str, Any]) -> list[str]:
    """Return a note if the learning rate is far from that of the optimizer's config."""
    for path in sorted(_RECIPES.glob("*.yaml")):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if recipe["_target_"] != optimizer["_target_"] or not optimizer["lr"] > 0:
            continue
        ratio = optimizer["lr"] / recipe["lr"]
        if ratio > _FAR or ratio < 1 / _FAR:
            return [
                f"optimizer.lr={optimizer['lr']:g}: {ratio:.3g} times the {recipe['lr']:g} of "
                f"optimizer={path.stem}; the head gets {optimizer['head_multiplier']:g} times that"
            ]
    return []


def _loss_notes(loss: Mapping[str, Any], data: DataConfig) -> list[str]:
    """Return notes on OHEM losses that keep every pixel."""
    size = data.crop or data.size
    if size is None:
        return []
    pixels = data.batch_size * math.prod(size)
    return [
        f"{key}={kept}: a batch of a process has {pixels} pixels ({data.batch_size} x {size[0]} x "
        f"{size[1]}), so every pixel is kept and OHEM does nothing"
        for key, kept, _ in walk(loss, "loss")
        if key.endswith(".min_kept") and is_int(kept) and kept >= pixels
    ]


def refuse_folder(config: TrainConfig) -> None:
    """Refuse a ``run.dir`` that cannot be used, before anything is loaded; nothing is created.

    Raises:
        InputError: It contains another run, which is not to be resumed.
        StorageError: It cannot be created or written.
    """
    if config.run.dir is None:
        return
    folder = Path(config.run.dir).expanduser()
    refuse_used(folder, resuming=config.resume is not None)
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise StorageError(f"run.dir={folder}: {there} is a file; give the name of a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"run.dir={folder}: {there} may not be written by you; give another")


def refuse_single_values(config: TrainConfig, device: torch.device) -> None:
    """Refuse a batch that gives a batch norm a single value per channel, which it maps to zero.

    Raises:
        InputError: With the name of the layer and the possible remedies.
    """
    size = config.data.crop or config.data.size
    is_shared = config.trainer.sync_batchnorm and device.type == "cuda"
    processes = int(os.environ.get("WORLD_SIZE", "1")) if is_shared else 1
    if size is None or config.data.batch_size * processes > 1:
        return
    single = _single_values(config, size)
    if single:
        key = "crop" if config.data.crop else "size"
        ways = f", or a larger data.{key}, or a smaller model.backbone.output_stride"
        if _single_values(config, [2 * n for n in size]):  # behind global average pooling
            ways = ""
        raise InputError(
            f"data.{key}={list(size)} with data.batch_size=1: the batch norm {single} gets one "
            f"value per channel, which is its own mean; give data.batch_size=2 or more{ways}"
        )


def _single_values(config: TrainConfig, size: Sequence[int]) -> str:
    """Return the name of the batch norm that torch refuses one image of a size for; "" if none."""
    reached: list[str] = []
    with torch.device("meta"):  # takes no memory
        model = untrained(config).train()
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda *_, name=name: reached.append(name))
        try:
            model(torch.empty(1, 3, *size, dtype=torch.uint8))
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                return reached[-1]
            raise InputError(f"data.crop={list(size)}: {error}") from error
    return ""
