"""Reading a network that was exported to share: a folder, or a repository on a Hugging Face hub.

danet.export.folder writes it: the weights as safetensors, and all else as JSON, without any code.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from danet.checkpoint import format as checkpoint_format
from danet.errors import InputError, first_line
from danet.extras import require
from danet.plain import printable

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
_OF_USE = ("version", "classes", "palette", "temperature")
FIELDS = (*_OF_USE, "step", "scores", "best_score", "training_set", "run_id")
"""Fields of a checkpoint that the folder has, beside the config and the weights."""
SCHEME = "hf://"  # begins what is a repository and no path: ``hf://owner/name[@revision]``
_MOST = 1 << 24  # bytes of config.json; those of this project have some kB


def load(folder: Path) -> dict[str, Any]:
    """Return the fields of a checkpoint that inference needs; raise InputError if it is damaged."""
    source, file = f"checkpoint={folder}", folder / CONFIG
    try:
        # Parsed JSON may take dozens of times the memory of its text.
        if (size := file.stat().st_size) > _MOST:
            raise ValueError(f"{CONFIG} has {size >> 20} MiB; expected at most {_MOST >> 20}")
        facts = json.loads(file.read_text("utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT or "config" not in facts:
            raise ValueError(f"{CONFIG} is not of an exported network of format {FORMAT}")
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        reason = printable(str(error)[:300])
        raise InputError(f"{source}: damaged or incomplete ({reason})") from error
    saved = {name: facts[name] for name in ("config", *FIELDS) if name in facts}
    saved |= {"model": weights, "ema": None}
    # JSON has no types of our own, so the fields are checked as those of any foreign file.
    checkpoint_format.require_sound(saved, source)
    return saved


def fetch(name: str) -> Path:
    """Return the local copy of ``hf://owner/name[@revision]``; raise InputError if it fails."""
    require("huggingface_hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(SCHEME).partition("@")
    try:
        files = [CONFIG, WEIGHTS]  # alone: a repository may hold gigabytes beside them, and code
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise InputError(f"{name}: {first_line(error)}") from error
