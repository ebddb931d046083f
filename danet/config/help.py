"""What ``--help`` prints: a tool's settings with the comments of its config files."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from danet.plain import flat

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def choices(group: str) -> list[str]:
    """Return the choices of a group of the configs; empty if there is no such group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) if group else []


def page(config: DictConfig, name: str) -> str:
    """Return the help of the tool of a root config, composed with Hydra's own settings."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    own = plain.pop("hydra")
    chosen = {g: c for g, c in own["runtime"]["choices"].items() if not g.startswith("hydra/")}
    said: dict[str, str] = {}
    for file, place in [*((f"{g}/{c}", g) for g, c in chosen.items()), (name, "")]:
        said |= {key: comment for key, comment in _comments(file, place) if comment}
    groups = [
        _entry(group, choice, "; ".join(filter(None, (", ".join(names), said.get(f"-{group}")))))
        for group, choice in chosen.items()
        if len(names := choices(group)) > 1
    ]
    settings = [
        # A value that refers to another setting is set there; classes are chosen with a group.
        _entry(key, value, said.get(key, ""))
        for key, value in flat(plain).items()
        if not re.search(r"(^|\.)_|\.dataset\.", key) and not str(value).startswith("${")
    ]
    parts = [own["help"]["header"]]
    parts += ["Choices (NAME=CHOICE)", *groups, ""] if groups else []
    parts += ["Settings (KEY=VALUE) with the values they would have", *settings, ""]
    return "\n".join([*parts, own["help"]["footer"].rstrip()])


def choices_with(key: str) -> str:
    """Return the choices whose file sets a key, as in "data=folder"; "" if there is none."""
    groups = [key.rsplit(".", n)[0].replace(".", "/") for n in range(1, key.count(".") + 1)]
    files = [(group, choice) for group in groups for choice in choices(group)]
    return ", ".join(f"{g}={c}" for g, c in files if key in dict(_comments(f"{g}/{c}", g)))


def _comments(file: str, group: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a config file, and ``-group`` for its defaults, with its comment or ""."""
    path, place = CONFIGS / f"{file}.yaml", group.replace("/", ".")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if package := re.search(r"^# @package (\w+)", text, re.M):
        place = package[1].replace("_global_", "")
    above = [place] if place else []
    for indent, key, comment in re.findall(r"^( *)(-? ?[\w/]+):(?:.*? # (.*))?", text, re.M):
        above[len(indent) // 2 + bool(place) :] = [key]
        yield key.replace(" ", "") if key[0] == "-" else ".".join(above), comment


def _entry(key: str, value: Any, explanation: str) -> str:
    """Return a setting as one types it, with its explanation on the right."""
    shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
    start = f"  {f'{key}={shown}'.replace(', ', ','):<38}  "
    filled = textwrap.fill(explanation, 100, initial_indent=start, subsequent_indent=" " * 42)
    return filled or start.rstrip()
