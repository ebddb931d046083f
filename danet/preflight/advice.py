"""Notes on unusual settings, refusals of impossible ones, and what to do about a lack of memory."""

import math
import os
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from danet.checkpoint.run_folder import refuse_used
from danet.config.build import untrained
from danet.config.schema import TrainConfig, did_you_mean
from danet.engine.precision import choose_precision
from danet.engine.settings import TrainSettings
from danet.errors import InputError, StorageError
from danet.evaluation.evaluate import Inference
from danet.plain import is_int, walk

_RECIPES = Path(__file__).resolve().parents[1] / "configs" / "optimizer"
_SHORT = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
"""Parts of the messages of torch on a CPU, of CUDA, and of cuBLAS and cuDNN."""
_FAR = 10  # factor between a learning rate and that of the recipe from which on there is a note


def notes(config: TrainConfig, device: torch.device, *, typed: Collection[str] = ()) -> list[str]:
    """Return notes on unusual settings of a training, a line each.

    ``typed`` are the overrides of the command line. Raises InputError for a device that does not
    support ``trainer.precision`` or ``evaluation.precision``.
    """
    data, trainer, lines = config.data, config.trainer, list(_argument_notes(config))
    if data.crop is not None and data.transforms["train"] is None:
        lines.append(
            f"data.crop={data.crop} crops nothing: data/transforms=none; street crops, say"
        )
    every = trainer.evaluation_interval()
    count = (trainer.steps - 1) // every  # without that of the last step
    if trainer.patience is not None and trainer.patience >= count:
        lines.append(
            f"trainer.patience={trainer.patience} never ends this run: before its last step it has "
            f"{count} evaluation(s), trainer.steps={trainer.steps} and trainer.eval_every={every}"
        )
    if any(setting.lstrip("+").startswith("data.root=") for setting in typed):
        lines.insert(0, f"data.root={data.root}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and data.num_workers > cores:
        lines.append(
            f"data.num_workers={data.num_workers}: this process may use {cores} core(s), so "
            "more workers than that wait for one another"
        )
    # Now, not at the first evaluation.
    scored_in = config.evaluation.get("precision", "float32")
    choose_precision(scored_in, device, key="evaluation.precision")
    best = choose_precision("auto", device)
    if choose_precision(trainer.precision, device) == torch.bfloat16 != best:
        lines.append(
            f"trainer.precision=bfloat16: {device} computes in it more slowly than in float32; "
            "it saves memory only"
        )
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if alone and "trainer.sync_batchnorm=true" in [setting.lower() for setting in typed]:
        why = "there is one process, so plain batch norm is used"
        lines.append(f"trainer.sync_batchnorm=true: {why}")
    return lines


def _argument_notes(config: TrainConfig) -> Iterator[str]:
    """Yield notes on arguments of the optimizer, of OHEM losses, and of the backbone."""
    optimizer, data, backbone = config.optimizer, config.data, config.model.get("backbone") or {}
    name = optimizer["_target_"].rpartition(".")[2].lower()
    path = _RECIPES / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if recipe.get("_target_") == optimizer["_target_"] and (lr := optimizer["lr"]) > 0:
        usual = recipe["lr"]
        if not 1 / _FAR <= lr / usual <= _FAR:
            yield (
                f"optimizer.lr={lr:g}: {lr / usual:.3g} times the {usual:g} of optimizer={name}; "
                f"the head gets {optimizer['head_multiplier']:g} times that"
            )
    size = data.crop or data.size or (math.inf, 1)
    pixels = data.batch_size * math.prod(size)
    for key, kept, _ in walk(config.loss, "loss"):
        if key.endswith(".min_kept") and is_int(kept) and kept >= pixels:
            yield (
                f"{key}={kept}: a batch of a process has {pixels} pixels ({data.batch_size} x "
                f"{size[0]} x {size[1]}), so every pixel is kept and OHEM does nothing"
            )
    is_trained = config.resume or config.init_from or backbone.get("weights")
    kept_parts = {"freeze": ("none", "weights"), "norm_eval": (False, "statistics")}
    for key, (default, what) in kept_parts.items():
        if not is_trained and (value := backbone.get(key, default)) != default:
            yield (
                f"model.backbone.{key}={value}: the {what} that stay as they are were never "
                "trained; give model.backbone.weights=FILE, or init_from"
            )


def refuse_unknown_class(best_by: str, classes: Sequence[str]) -> None:
    """Refuse a ``trainer.best_by`` that is the IoU of a class which the data does not have."""
    name = best_by.removeprefix("iou/")
    if best_by.startswith("iou/") and name not in classes:
        close = did_you_mean(name, classes) or f"; the classes: {', '.join(classes)}"
        raise InputError(f"trainer.best_by={best_by}: there is no class {name}{close}")


def refuse_unscored(trainer: TrainSettings) -> None:
    """Refuse settings that watch the scores of a validation set, for a training without one."""
    for key, default, shown in (("patience", None, "null"), ("best_by", "miou", "miou")):
        if (value := getattr(trainer, key)) != default:
            raise InputError(
                f"trainer.{key}={value}: there is no validation set to score; set "
                f"trainer.{key}={shown}, or data.val_split=<split>"
            )


def refuse_other_sizes(model: nn.Module, image: np.ndarray, evaluation: Inference) -> None:
    """Refuse an evaluation of images (H, W, 3) that the network cannot compute, on meta tensors.

    Otherwise a run would fail in its first evaluation, perhaps after hours.
    """
    empty = torch.empty(1, 3, *image.shape[:2], dtype=torch.uint8, device="meta")
    evaluation.predict(deepcopy(model).to("meta").eval(), empty)


def refuse_folder(config: TrainConfig) -> None:
    """Refuse a ``run.dir`` that cannot be used, before anything is loaded; nothing is created."""
    if config.run.dir is None:
        return
    folder = Path(config.run.dir).expanduser()
    refuse_used(folder, resuming=config.resume is not None)
    path = folder.absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise StorageError(f"run.dir={folder}: {there} is a file; give the name of a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(f"run.dir={folder}: {there} may not be written by you; give another")


def refuse_single_values(config: TrainConfig) -> None:
    """Refuse a batch that gives a batch norm a single value per channel, which it maps to zero."""
    size = config.data.crop or config.data.size
    processes = int(os.environ.get("WORLD_SIZE", "1")) if config.trainer.sync_batchnorm else 1
    if size is None or config.data.batch_size * processes > 1:
        return
    if single := _single_values(config, size):
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
        model: Any = untrained(config).train()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: reached.append(name))
        try:
            model(model.example(1, *size))
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                return reached[-1]
            raise InputError(f"data.crop={list(size)}: {error}") from error
    return ""


def explain_shortage(
    error: BaseException, config: TrainConfig, device: torch.device, *, training: bool
) -> InputError | None:
    """Return what to try, the least first; None if an error is no lack of memory.

    ``training`` says whether a training step failed, rather than an evaluation.
    """
    is_shortage = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not (is_shortage or any(words in str(error) for words in _SHORT)):
        return None
    if not training:
        return InputError(
            f"out of memory on {device} in an evaluation; use evaluation=sliding, or a smaller "
            "evaluation.crop"
        )
    size = config.data.crop or config.data.size
    return InputError(
        f"out of memory on {device} in a step of data.batch_size={config.data.batch_size}"
        f"{f' with {size[0]} x {size[1]}' if size else ''}; try in this order: "
        "trainer.precision=bfloat16, 'model.backbone.recompute=[1,2,3,4]', a smaller "
        "data.batch_size with a larger trainer.accumulate, a smaller data.crop; dry_run=true "
        "shows what fits"
    )
