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

from danet.checkpoint.exported import CONFIG, FIELDS, FORMAT, WEIGHTS
from danet.errors import StorageError
from danet.extras import require
from danet.filesystem import atomic_write


def save(folder: Path, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the folder.

    Args:
        folder: Created where it does not exist.
        saved: A checkpoint. Paths of this machine in its config are left out.
        weights: State dict of the network, the averaged one where there is one.

    Raises:
        InputError: safetensors is missing.
        StorageError: The folder cannot be written.
    """
    require("safetensors")
    from safetensors.torch import save_file

    facts = {"format": FORMAT, **{key: saved[key] for key in FIELDS if key in saved}}
    facts["config"] = without_paths(dict(saved["config"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory or are not contiguous.
        whole = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
        with atomic_write(folder / WEIGHTS) as temporary:
            save_file(whole, temporary, metadata={"format": "pt"})
        with atomic_write(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    except OSError as error:
        raise StorageError(f"output={folder}: cannot be written ({error.strerror})") from error


def without_paths(node: Any) -> Any:
    """Return plain values with ``.`` in place of every absolute path."""
    if isinstance(node, dict):
        return {name: without_paths(value) for name, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    is_path = isinstance(node, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", node)
    return "." if is_path else node
