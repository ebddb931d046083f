"""Resuming a run: the checkpoint it continues from, and its config."""

import os
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import manager, run_folder
from danet.checkpoint.format import Checkpoint
from danet.config.build import checked_config, refuse_misfit
from danet.config.schema import SETTINGS, TrainConfig
from danet.config.targets import with_defaults
from danet.config.validate import check_plain
from danet.engine.optimizer import OptimizerFactory, misfit
from danet.errors import InputError
from danet.plain import flat

RESUMABLE = {
    "data.dataset.root",  # an interpolation of data.root
    # Follows data.crop. Only tensors of some networks depend on it, and those are compared.
    "model.backbone.image_size",
    *(p + f.name for p, s in SETTINGS.items() for f in fields(s) if f.metadata.get("resumable")),
}
"""Settings that do not change what a step computes; each is declared with the reason."""

CHANGEABLE = ("data.", "evaluation.", "loss.", "schedule.", "seed", "trainer.")
NEVER = ("data.num_classes", "trainer.ema_decay")
"""With ``allow_changes`` keys that begin with the former may differ, too, but not the latter, nor
network and optimizer: their states are in the checkpoint."""

_OF_TRAINING = (
    *("data.crop", "data.transforms.train", "data.train_split"),
    *("data.rare_class", "data.class_mix"),
)
"""Beginnings of keys of ``data`` that change what is trained on, and not what is scored."""


def resolve(
    config: TrainConfig, overrides: Iterable[str], *, world_size: int
) -> tuple[TrainConfig, Checkpoint | None, list[str]]:
    """Return the config to train with and the checkpoint to continue from.

    With nothing but free keys on the command line the config is the checkpoint's, with those keys
    from the command line. With other settings the whole config must be the checkpoint's.

    Args:
        config: Checked, from the command line.
        overrides: The settings of the command line as typed.
        world_size: The number of processes.

    Returns:
        The config; the checkpoint, None for a fresh start; lines for the user.

    Raises:
        InputError: No such checkpoint, or settings that differ; each is named with both values.
    """
    if config.resume is None:
        return config, None, []
    path = Path(config.resume)
    notes: list[str] = []
    if config.resume == "auto":
        if config.run.dir is None:
            raise InputError("resume=auto: say which run with run.dir=<folder>")
        folder = Path(config.run.dir).expanduser()
        if not manager.by_age(folder):
            return config, None, [f"resume=auto: nothing in {folder} yet, starting from step 0"]
        path, saved, notes = _newest_good(folder)
    else:
        saved = checkpoint_format.load(path, key="resume")
    stored = _resumable_settings(saved, path)
    # A choice of a group (experiment=...) is never free, so it leads to the comparison of all keys.
    typed = {override.lstrip("+~").split("=")[0] for override in overrides}
    if typed <= RESUMABLE:
        settled = _with_typed(stored, config, typed)
    else:
        settled = deepcopy(config.plain)
        notes += compare_settings(path, stored, settled)
        best_by = settled["trainer"]["best_by"]
        if any(is_measure(key, best_by) for key in differences(stored, settled)):
            forget_best(saved)
            notes.append("resume: scores are measured otherwise, so the best score begins anew")
    # The path and not "auto", so that the run records which checkpoint it continued.
    settled["resume"], settled["init_from"] = str(path), None
    if config.run.dir is None:
        settled["run"]["dir"] = str(path.parent)
    run_folder.refuse_foreign(Path(settled["run"]["dir"]).expanduser(), path, saved)
    notes += _compare_sums(saved, stored, settled, world_size)
    for key in ("root", "extra_roots"):
        before, now = (of["data"].get(key) for of in (stored, settled))
        if before and now and _resolved(before) != _resolved(now):
            notes.append(
                f"resume: data.{key}={now} instead of {before}: the pictures there are taken for "
                "the same if they have the same names, so check that they are a copy"
            )
    return check_plain(settled), saved, notes


def _resolved(places: Any) -> list[str]:
    """Return the folders of ``data.root`` or ``data.extra_roots`` through links."""
    # The same folder by another name deserves no note.
    places = [places] if isinstance(places, str) else places
    return [os.path.realpath(p if isinstance(p, str) else p["root"]) for p in places]


def _resumable_settings(saved: Checkpoint, path: Path) -> dict[str, Any]:
    """Return the checked settings of a checkpoint; raise InputError if no run can continue it."""
    checkpoint_format.require_fields(saved, checkpoint_format.FOR_RESUME, f"resume={path}")
    if saved["optimizer"] is None:  # made by tools/convert.py
        raise InputError(
            f"resume={path}: it has weights and no state of an optimizer, so there is no run to go "
            "on with; start one from these weights with init_from"
        )
    config = checked_config(saved, path)
    refuse_misfit(saved, config, f"resume={path}")
    return config.plain


def _with_typed(
    stored: Mapping[str, Any], config: TrainConfig, typed: Iterable[str]
) -> dict[str, Any]:
    """Return the settings of a checkpoint with those that were typed; see ``resolve``."""
    settled, before, now = OmegaConf.create(dict(stored)), flat(stored), flat(config.plain)
    # It was the end of the start before: a run that reached it would stop at once.
    settled.trainer.stop_at = None
    for key in typed:
        if key in before or now.get(key) is not None:  # a data set may not have every free key
            OmegaConf.update(settled, key, now.get(key))
    if "data.root" in typed and "data.dataset.root" in before:
        settled.data.dataset.root = config.data.root
    plain: Any = OmegaConf.to_container(settled)
    return plain


def refuse_other_states(
    saved: Checkpoint, model: nn.Module, factory: OptimizerFactory, path: str | None
) -> None:
    """Raise InputError if the state in a checkpoint is of another optimizer or other parameters."""
    if problem := misfit(factory, model, saved["optimizer"]):
        raise InputError(
            f"resume={path}: the state of the optimizer does not fit: {problem}; to start a new "
            "run from the weights use init_from"
        )


def _newest_good(folder: Path) -> tuple[Path, Checkpoint, list[str]]:
    """Return the newest undamaged checkpoint of a run, and notes on the damaged ones.

    If all are damaged raise InputError: a run never starts from zero over what is left of it.
    """
    damaged = []
    for path in manager.by_age(folder):
        try:
            saved = checkpoint_format.load(path, key="resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        instead = (
            f"resume=auto: going on from {path} instead, at step {saved['step']}; the steps after "
            "it are done again"
        )
        return path, saved, [*damaged, instead] if damaged else []
    raise InputError(
        "\n".join(damaged) + f"\nresume=auto: no checkpoint in {folder} is whole; to start anew "
        "give another run.dir"
    )


def compare_settings(path: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return a note on settings that differ; raise InputError where they may not."""
    different = differences(stored, config)
    if not different:
        return []
    text = "\n".join(different.values())
    is_fixed = any(key in NEVER or not key.startswith(CHANGEABLE) for key in different)
    if config["allow_changes"] and not is_fixed:
        return [f"resume={path}: allow_changes=true, from here on with other settings:\n{text}"]
    advice = "allow_changes=true goes on with the new ones; init_from starts a new run"
    if is_fixed:
        advice = "to start a new run from these weights use init_from"
    raise InputError(f"resume={path}: the run had other settings:\n{text}\n{advice}")


def is_measure(key: str, best_by: str) -> bool:
    """Return whether scores before and after a change of a key are not comparable."""
    if key == "trainer.best_by" or (best_by == "loss" and key.startswith("loss.main.")):
        return True
    return key.startswith(("evaluation.", "data.")) and not key.startswith(_OF_TRAINING)


def _change(text: str, effect: str, *, allowed: bool) -> str:
    """Return a note on a change that is allowed; raise InputError on one that is not."""
    if not allowed:
        raise InputError(f"resume: {text}; allow_changes=true goes on {effect}")
    return f"resume: allow_changes=true, {text}; it goes on {effect}"


def compare_data(saved: Checkpoint, found: Mapping[str, str], *, allowed: bool) -> list[str]:
    """Return notes on data that differ from the checkpoint's; raise InputError unless allowed.

    Scores on another validation set are not comparable with those before: the best is forgotten.
    ``found`` has the fingerprints now, as the checkpoint has them; old ones have none.
    """
    lines = []
    for key, now in found.items():
        if (before := saved.get(key)) in (None, now):
            continue
        text = f"the {key.replace('_', ' ')} was {before}, now it is {now}"
        is_measured = key == "validation_set"
        effect = "and the best score begins anew" if is_measured else "in another order"
        lines.append(_change(text, f"with the new one, {effect}", allowed=allowed))
        if is_measured:
            forget_best(saved)
    return lines


def forget_best(saved: Checkpoint) -> None:
    """Remove the scores of a checkpoint: later ones are not comparable with them."""
    saved["best_score"], saved["scores"], saved["best"] = None, None, []
    saved["best_step"] = saved["evaluations_since_best"] = 0


def is_best_forgotten(saved: Checkpoint) -> bool:
    """Return whether ``forget_best`` was called on a checkpoint that had a score."""
    return saved["best_score"] is None and saved.get("evaluated_at", 0) > 0


def _compare_sums(
    saved: Checkpoint, stored: Mapping[str, Any], config: Mapping[str, Any], world: int
) -> list[str]:
    """Return notes on other numbers of images a step, of processes or, on the CPU, of threads.

    The order of samples is a function of the seed and the images so far, so other images a step
    must be allowed; else raises InputError.
    """
    counts, texts, notes = [], [], []
    for of, processes in ((stored, saved["processes"]), (config, world)):
        size, times = of["data"]["batch_size"], of["trainer"]["accumulate"]
        counts.append(size * times * processes)
        factors = f"data.batch_size={size} x trainer.accumulate={times} x {processes} process(es)"
        texts.append(f"{counts[-1]} images a step ({factors})")
    order = "sums are added in another order, so weights are not bit-equal"
    if counts[0] != counts[1]:
        text = f"the run had {texts[0]}, now it would have {texts[1]}"
        if not (is_allowed := config["allow_changes"]):
            text += "; choose the two settings so that the product is the same"
        notes.append(_change(text, "in another order of samples", allowed=is_allowed))
    elif saved["processes"] != world:
        notes.append(
            f"resume: {world} process(es) instead of {saved['processes']}: every step has the same "
            f"samples as before, but {order}"
        )
    threads, before = torch.get_num_threads(), saved.get("threads")
    is_cpu = config["trainer"]["device"] == "cpu" or not torch.cuda.is_available()
    if is_cpu and before not in (None, threads):
        notes.append(
            f"resume: {threads} thread(s) instead of {before}: {order}; OMP_NUM_THREADS={before} "
            "makes them so"
        )
    return notes


def differences(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> line for every key that differs and is not in ``RESUMABLE``."""
    # An argument that the version of the checkpoint did not have yet had the effect of its default.
    old, new = flat(with_defaults(stored)), flat(with_defaults(config))
    return {
        key: f"  {key}: {old.get(key, 'not set')} in the checkpoint, {new.get(key, 'not set')} now"
        for key in sorted(old.keys() | new.keys())
        if key not in RESUMABLE and old.get(key) != new.get(key)
    }
