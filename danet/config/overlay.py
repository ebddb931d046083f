"""The checkpoint that a run continues from, and its config, over which a command line is laid."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import manager
from danet.checkpoint.format import Checkpoint
from danet.config.build import checked_config, refuse_misfit
from danet.config.help import CONFIGS
from danet.errors import InputError
from danet.plain import walk

_INTERPOLATION = re.compile(r"^ *(\w+): (\$\{.*\})(?: #.*)?$", re.MULTILINE)


def base(typed: Sequence[Override]) -> tuple[dict[str, Any], list[str]] | None:
    """Return the primary config for Hydra that goes on with a checkpoint; None for a fresh start.

    Groups that were chosen (``loss=ohem``) come from their files, all else from the checkpoint. An
    experiment sets what it likes: with one, too, None, and all settings are compared.

    Returns:
        The config, and the overrides for it: without what removes a key that is not there, and
        with ``++`` for ``+``, since the checkpoint may have the key that was added at its start.
    """
    values: dict[str, Any] = {override.key_or_group: override.value() for override in typed}
    groups = [name for name in values if (CONFIGS / name).is_dir()]
    source, folder = values.get("resume"), values.get("run.dir")
    if not isinstance(source, str) or {"experiment", "debug"} & set(groups):
        return None
    path, saved, _ = find(source, folder)
    if saved is None:
        return None
    primary = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))
    settings = with_interpolations(stored_settings(saved, path))
    # Those of the start before. A run that reached its stop_at would stop at once.
    settings.run.dir = settings.trainer.stop_at = None
    for group in groups:
        parent, _, name = group.rpartition("/")
        node = OmegaConf.select(settings, parent.replace("/", ".")) if parent else settings
        if node is not None:  # else it is part of another group that was chosen
            node.pop(name, None)
    outer = [group for group in groups if not any(group.startswith(f"{g}/") for g in groups)]
    defaults = [d for d in primary["defaults"] if "override" in str(d) or d == "train_schema"]
    defaults[1:1] = [*({group: None} for group in outer), "_self_"]
    kept = []
    for override in typed:
        key, line = override.key_or_group, override.input_line or ""
        is_new = any(key.startswith(f"{group.replace('/', '.')}.") for group in groups)
        if is_new or OmegaConf.select(settings, key) is not None or not override.is_delete():
            kept.append(f"+{line}" if re.match(r"\+[^+]", line) and key not in groups else line)
    plain: Any = OmegaConf.to_container(settings)
    return {**primary, **plain, "defaults": defaults}, kept


def with_interpolations(stored: Mapping[str, Any]) -> DictConfig:
    """Return a resolved config with the interpolations of our files wherever they give its values.

    So what is typed reaches every place that follows it: ``seed`` the trainer's, ``data.crop`` the
    transforms.
    """
    known: set[tuple[str, ...]] = set()
    for file in CONFIGS.glob("*/**/*.yaml"):
        found = _INTERPOLATION.findall(file.read_text(encoding="utf-8"))
        known |= {(file.relative_to(CONFIGS).parts[0], *pair) for pair in found}
    config = OmegaConf.create(dict(stored))
    for key, value, _ in walk(stored, ""):
        ends = {t for g, name, t in known if key.startswith(f"{g}.") and key.endswith(f".{name}")}
        for text in (*sorted(ends), value) if ends else ():
            OmegaConf.update(config, key, text)
            with suppress(Exception):  # a key that this data set does not have, a file that is gone
                if OmegaConf.select(config, key) == value:
                    break
    return config


def find(source: str, folder: str | None) -> tuple[Path, Checkpoint | None, list[str]]:
    """Return the path and content of the checkpoint that ``resume`` names, and notes.

    ``source`` is a file, the folder of a run for its newest whole one, or ``auto`` for that of
    ``folder``, the setting ``run.dir``; there the content is None if there is none yet.
    """
    path = Path(source).expanduser()
    if source == "auto":
        if folder is None:
            raise InputError("resume=auto: say which run with run.dir=<folder>")
        path = Path(folder).expanduser()
        if not manager.by_age(path):
            return path, None, [f"resume=auto: nothing in {path} yet, starting from step 0"]
    if not path.exists() and path.name == source and not path.suffix:  # true, last, latest
        raise InputError(
            f"resume={source}: there is no such file; resume=auto with run.dir=<folder>, or "
            "resume=<run folder or checkpoint>"
        )
    if not (found := manager.by_age(path)):
        return path, checkpoint_format.load(path, key="resume"), []
    damaged: list[str] = []
    for file in found:
        try:
            saved = checkpoint_format.load(file, key="resume")
        except InputError as error:
            damaged.append(str(error))
            continue
        instead = f" instead, at step {saved['step']}; the steps after it are done again"
        note = f"resume={source}: going on from {file}{instead * bool(damaged)}"
        return file, saved, [*damaged, note]
    # A run never starts from zero over what is left of it.
    raise InputError(
        "\n".join(damaged) + f"\nresume={source}: no checkpoint in {path} is whole; to start over "
        "give another run.dir"
    )


def stored_settings(saved: Checkpoint, path: Path) -> dict[str, Any]:
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
