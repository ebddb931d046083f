"""A trained network as a folder to share: weights as safetensors, and all else as JSON.

``model.safetensors`` has the tensors and ``config.json`` the config, the classes with their
colours, and where the weights come from. Neither can hold code.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import reading
from danet.errors import InputError, StorageError
from danet.export.programs import require
from danet.plain import printable

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1

_MOST = 1 << 24
"""Bytes of config.json; those of this project have some kB."""
_KEPT = ("version", "classes", "palette", "step", "scores", "best_miou", "training_set", "run_id")


def is_exported(path: Path) -> bool:
    """Tells whether a path is a folder as ``save`` writes it."""
    return path.is_dir() and (path / CONFIG).is_file()


def save(folder: Path, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Writes the folder.

    Args:
        folder: Made where it does not exist.
        saved: A checkpoint. Paths of this machine in its config are left out.
        weights: State of the network that is meant, the averaged one where there is one.

    Raises:
        InputError: safetensors is missing.
        StorageError: The folder cannot be written.
    """
    require("safetensors")
    from safetensors.torch import save_file

    facts = {"format": FORMAT, **{key: saved[key] for key in _KEPT if key in saved}}
    facts["config"] = without_paths(dict(saved["config"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{WEIGHTS}"
        whole = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        save_file(whole, temporary, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)
        temporary = folder / f".{CONFIG}"
        temporary.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(folder / CONFIG)
    except OSError as error:
        raise StorageError(f"output={folder}: cannot be written ({error.strerror})") from error


def load(folder: Path, *, key: str = "checkpoint") -> dict[str, Any]:
    """Returns what a checkpoint would hold for the use of a network; there is no optimizer.

    Args:
        folder: As ``save`` wrote it.
        key: The setting that named it, for messages.

    Raises:
        InputError: It is damaged, incomplete, or of another format.
    """
    require("safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if (size := (folder / CONFIG).stat().st_size) > _MOST:
            raise InputError(
                f"{key}={folder}: {CONFIG} has {size >> 20} MiB; expected at most {_MOST >> 20}"
            )
        facts = json.loads((folder / CONFIG).read_text("utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or "config" not in facts:
            raise InputError(
                f"{key}={folder}: {CONFIG} is not of an exported network of this project "
                f"(format {FORMAT})"
            )
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        told = printable(str(error)[:300])
        raise InputError(f"{key}={folder}: damaged or incomplete ({told})") from error
    problem = reading.unsound(weights)
    if problem:
        raise InputError(f"{key}={folder}: {problem}")
    saved = {name: facts[name] for name in ("config", *_KEPT) if name in facts}
    saved |= {"model": weights, "ema": None}
    checkpoint_format.require_sound(saved, f"{key}={folder}")
    return saved


def without_paths(node: Any) -> Any:
    """Returns plain values with ``.`` in place of every path that only this machine knows."""
    if isinstance(node, dict):
        return {name: without_paths(value) for name, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    is_path = isinstance(node, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", node)
    return "." if is_path else node
