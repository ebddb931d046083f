"""The config of a checkpoint as what a command line is laid over, in place of ``train.yaml``."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from danet.config import resume
from danet.plain import walk

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
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
    path, saved, _ = resume.find(source, folder)
    if saved is None:
        return None
    primary = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))
    settings = with_interpolations(resume.stored_settings(saved, path))
    # Those of the start before. A run that reached its stop_at would stop at once.
    settings.run.dir = settings.trainer.stop_at = None
    outer = [g for g in groups if not any(g.startswith(f"{other}/") for other in groups)]
    for group in outer:
        parent, _, name = group.replace("/", ".").rpartition(".")
        node = OmegaConf.select(settings, parent) if parent else settings
        node.pop(name, None)
    defaults = [d for d in primary["defaults"] if "override" in str(d) or d == "train_schema"]
    defaults[1:1] = [*({group: None} for group in outer), "_self_"]
    kept = []
    for override in typed:
        key, line = override.key_or_group, override.input_line or ""
        is_there = OmegaConf.select(settings, key) is not None or key in groups
        is_new = any(key.startswith(f"{group.replace('/', '.')}.") for group in outer)
        if override.is_delete() and not (is_there or is_new):
            continue
        kept.append(f"+{line}" if re.match(r"\+[^+]", line) and key not in groups else line)
    plain: Any = OmegaConf.to_container(settings)
    return {**primary, **plain, "defaults": defaults}, kept


def with_interpolations(stored: Mapping[str, Any]) -> DictConfig:
    """Return a resolved config with the interpolations of our files wherever they give its values.

    So what is typed reaches every place that follows it: ``seed`` the trainer's, ``data.crop`` the
    transforms.
    """
    config = OmegaConf.create(dict(stored))
    known = sorted(
        {
            (file.relative_to(CONFIGS).parts[0], *found)
            for file in CONFIGS.glob("*/**/*.yaml")
            for found in _INTERPOLATION.findall(file.read_text(encoding="utf-8"))
        }
    )
    for key, value, _ in walk(stored, ""):
        for group, name, text in known:
            if not (key.startswith(f"{group}.") and key.endswith(f".{name}")):
                continue
            OmegaConf.update(config, key, text)
            with suppress(Exception):  # a key that this data set does not have, a file that is gone
                found = OmegaConf.to_container(
                    OmegaConf.create({"x": OmegaConf.select(config, key)})
                )
                if found == {"x": value}:
                    break
            OmegaConf.update(config, key, value)
    return config
