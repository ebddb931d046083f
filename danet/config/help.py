"""What ``--help`` prints: a tool's settings with the comments of its config files."""

import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from danet.plain import flat

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def choices(group: str) -> list[str]:
    """Return the choices of a group of the configs; empty if there is no such group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) if group else []


def choices_with(key: str) -> str:
    """Return the choices whose file sets a key, as in "data=folder"; "" if there is none."""
    groups = [key.rsplit(".", n)[0].replace(".", "/") for n in range(1, key.count(".") + 1)]
    files = [(group, choice) for group in groups for choice in choices(group)]
    return ", ".join(f"{g}={c}" for g, c in files if key in _comments(f"{g}/{c}", g))


def page(config: DictConfig, name: str) -> str:
    """Return the help of the tool of a root config, composed with Hydra's own settings."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    own = plain.pop("hydra")
    chosen = {g: c for g, c in own["runtime"]["choices"].items() if not g.startswith("hydra/")}
    said: dict[str, str] = {}
    for file, group in [*((f"{g}/{c}", g) for g, c in chosen.items()), (name, "")]:
        said |= {key: comment for key, comment in _comments(file, group).items() if comment}
    groups = [_entry(g, c, ", ".join(choices(g))) for g, c in chosen.items() if choices(g)[1:]]
    lines = ["Choices (NAME=CHOICE)", *groups, ""] if groups else []
    lines.append("Settings (KEY=VALUE) with the values they would have")
    for key, value in flat(plain).items():
        # A value that refers to another setting is set there; classes are chosen with a group.
        if not re.search(r"(^|\.)_|\.dataset\.", key) and not str(value).startswith("${"):
            lines.append(_entry(key, value, said.get(key, "")))
    return "\n".join([own["help"]["header"], *lines, "", own["help"]["footer"].rstrip()])


def _comments(file: str, group: str) -> dict[str, str]:
    """Return the keys of a config file with the comments behind them, or ""."""
    path, place = CONFIGS / f"{file}.yaml", group.replace("/", ".")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if package := re.search(r"^# @package (\w+)", text, re.M):
        place = package[1].replace("_global_", "")
    found, above = {}, [place] * bool(place)
    for indent, key, comment in re.findall(r"^( *)(\w+):(?:.*? # (.*))?", text, re.M):
        above[len(indent) // 2 + bool(place) :] = [key]
        found[".".join(above)] = comment
    return found


def _entry(key: str, value: Any, explanation: str) -> str:
    """Return a setting as one types it, with its explanation on the right."""
    shown = yaml.safe_dump(value, default_flow_style=True, width=10_000).splitlines()[0]
    start = f"  {f'{key}={shown}'.replace(', ', ','):<38}  "
    filled = textwrap.fill(explanation, 100, initial_indent=start, subsequent_indent=" " * 42)
    return filled or start.rstrip()
