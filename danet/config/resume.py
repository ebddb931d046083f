"""Resuming a run: which settings may differ from those of its checkpoint."""

import json
import os
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danet.checkpoint import run_folder
from danet.checkpoint.format import Checkpoint
from danet.config import overlay
from danet.config.build import make
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
TYPED = ("trainer.steps", "optimizer.lr", "optimizer.head_multiplier")
"""Settings that may change where they were typed, and not as part of an experiment: they change
what a step computes, so only who names them means them."""

CHANGEABLE = ("data.", "evaluation.", "loss.", "optimizer.", "schedule.", "seed", "trainer.")
_BANDS = ("data.channels", "data.range", "data.rgb")
NEVER = ("data.num_classes", "optimizer._target_", "trainer.ema_decay", *_BANDS)
"""With ``allow_changes`` keys that begin with the former may differ, too, but not the latter, nor
the network: their states are in the checkpoint."""

_NO_NOTE = {
    *("run.dir", "run.name", "run.processes", "resume", "init_from", "allow_changes", "dry_run"),
    *("model.channels", "model.range", "model.rgb"),  # follow those of data
    *("device_memory", "trainer.stop_at", "data.root", "data.dataset.root", "data.extra_roots"),
}
"""Settings of how and where a run goes on; a change of the last three has a note of its own."""

_OF_TRAINING = (
    *("data.crop", "data.transforms.train", "data.train_split"),
    *("data.rare_class", "data.class_mix"),
)
"""Beginnings of keys of ``data`` that change what is trained on, and not what is scored."""


def resolve(
    config: TrainConfig, overrides: Iterable[str], *, world_size: int
) -> tuple[TrainConfig, Checkpoint | None, list[str]]:
    """Return the config to train with, the checkpoint to continue from or None, and notes.

    ``config`` is that of the command line (see danet.config.overlay for what it starts from),
    ``overrides`` what was typed there. Settings that must not change raise InputError, each with
    both values.
    """
    if config.resume is None:
        return config, None, []
    path, saved, notes = overlay.find(config.resume, config.run.dir)
    if saved is None:
        return config, None, notes
    stored, settled = overlay.stored_settings(saved, path), deepcopy(config.plain)
    for group in ("data", "model"):  # measured at the start, and not again
        if settled[group].get("range") == "auto":
            settled[group]["range"] = stored[group].get("range")
    typed = {override.lstrip("+~").split("=")[0] for override in overrides}
    # With auto one command starts a run, from other weights, and goes on with it.
    if config.resume != "auto" and "init_from" in typed and config.init_from is not None:
        raise InputError(
            f"init_from={config.init_from}: resume={config.resume} goes on with a run and its "
            "weights, init_from starts a new one; leave one of the two out"
        )
    notes += compare_settings(path, stored, settled, typed=typed)
    notes += _compare_steps(saved, stored, settled)
    best_by = settled["trainer"]["best_by"]
    if any(is_measure(key, best_by) for key in differences(stored, settled)):
        forget_best(saved)
        notes.append("resume: scores are measured otherwise, so the best score is reset")
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
                f"resume: data.{key}={_as_typed(now)} instead of {_as_typed(before)}: the pictures "
                "there are taken for the same if they have the same names, so check that they are "
                "a copy"
            )
    return check_plain(settled), saved, notes


def _as_typed(value: Any) -> str:
    """Return a value as it is typed: null, true, [1, 2]."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _resolved(places: Any) -> list[str]:
    """Return the folders of ``data.root`` or ``data.extra_roots`` through links."""
    # The same folder by another name deserves no note.
    places = [places] if isinstance(places, str) else places
    return [os.path.realpath(p if isinstance(p, str) else p["root"]) for p in places]


def refuse_other_states(
    saved: Checkpoint, model: nn.Module, factory: OptimizerFactory, path: str | None
) -> None:
    """Raise InputError if the state in a checkpoint is of another optimizer or other parameters."""
    if problem := misfit(factory, model, saved["optimizer"]):
        raise InputError(
            f"resume={path}: the state of the optimizer does not fit: {problem}; to start a new "
            "run from the weights use init_from"
        )


def compare_settings(
    path: Path, stored: Mapping[str, Any], config: Mapping[str, Any], *, typed: Collection[str] = ()
) -> list[str]:
    """Return a note on each setting that differs; raise InputError where it may not."""
    free = RESUMABLE | set(typed).intersection(TYPED)
    notes, lines = [], {}
    for key, both in differences(stored, config, besides=_NO_NOTE).items():
        old, new = map(_as_typed, both)
        if key in free:
            notes.append(f"resume: {key}={new} instead of {old}")
        else:
            lines[key] = f"  {key}: {old} in the checkpoint, {new} now"
    if fixed := [v for k, v in lines.items() if k in NEVER or not k.startswith(CHANGEABLE)]:
        text = "\n".join(fixed)
        raise InputError(
            f"resume={path}: a run keeps its network and its optimizer:\n{text}\n"
            "leave these settings out; to start a new run from these weights use init_from"
        )
    if text := "\n".join(lines.values()):
        if not config["allow_changes"]:
            by_name = "; steps and rates may also be typed" * bool(lines.keys() & set(TYPED))
            raise InputError(
                f"resume={path}: these change what a step computes, or the scores:\n{text}\n"
                f"allow_changes=true goes on with the new ones; init_from starts a new run{by_name}"
            )
        notes.append(f"resume: allow_changes=true, from here on with other settings:\n{text}")
    return notes


def _compare_steps(
    saved: Checkpoint, stored: Mapping[str, Any], config: Mapping[str, Any]
) -> list[str]:
    """Return a note on what another number of steps does to the rate; raise InputError if done."""
    before, steps, done = stored["trainer"]["steps"], config["trainer"]["steps"], saved["step"]
    if steps == before:
        return []
    if steps < done:
        raise InputError(
            f"resume: trainer.steps={steps}, and {done} steps are done; give more, or an earlier "
            "checkpoint"
        )
    old, new = (make(of["schedule"], "schedule") for of in (stored, config))
    was = stored["optimizer"]["lr"] * old(min(done, before - 1), before)
    now = config["optimizer"]["lr"] * new(min(done, steps - 1), steps)
    over = f"resume: the schedule is now over {steps} steps"
    return [f"{over}: the learning rate of the next one is {now:.3g}, it would have been {was:.3g}"]


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
        effect = "and the best score is reset" if is_measured else "in another order"
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


def differences(
    stored: Mapping[str, Any], config: Mapping[str, Any], *, besides: Collection[str] = RESUMABLE
) -> dict[str, tuple[Any, Any]]:
    """Return key -> both values for every key that differs and is not in ``besides``."""
    # An argument that the version of the checkpoint did not have yet had the effect of its default.
    old, new = flat(with_defaults(stored)), flat(with_defaults(config))
    return {
        key: (old.get(key, "not set"), new.get(key, "not set"))
        for key in sorted(old.keys() | new.keys())
        if key not in besides and old.get(key) != new.get(key)
    }
