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
from danet.errors import InputError, UserError, first_line
from danet.extras import require
from danet.filesystem import atomic_write


def save(folder: Path, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the folder.

    Args:
        folder: Created where it does not exist.
        saved: A checkpoint. Paths of this machine in its config are left out.
        weights: State dict of the network, the averaged one where there is one.
    """
    from safetensors.torch import save_file  # an optional dependency

    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory or are not contiguous.
    whole = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        save_file(whole, temporary, metadata={"format": "pt"})
    facts = {"format": FORMAT, **{key: saved[key] for key in FIELDS if key in saved}}
    facts["config"] = without_paths(dict(saved["config"]))
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")


def without_paths(node: Any) -> Any:
    """Return plain values with ``.`` in place of every absolute path."""
    if isinstance(node, dict):
        return {name: without_paths(value) for name, value in node.items()}
    if isinstance(node, list):
        return [without_paths(value) for value in node]
    is_path = isinstance(node, str) and re.match(r"[/~\\]|[A-Za-z]:[/\\]", node)
    return "." if is_path else node


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder to a Hugging Face hub, into a new repository if needed; return its address.

    The token is that of ``hf auth login`` or of the variable HF_TOKEN.

    Raises:
        InputError: The package is missing, or the hub rejects the upload.
    """
    require("huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload an exported network",
            ignore_patterns=[".*"],
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"push={repository}: {first_line(error)}") from error
    except OSError as error:  # no network
        raise UserError(f"push={repository}: {first_line(error)}") from error
    return str(commit)
