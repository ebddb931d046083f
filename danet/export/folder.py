"""A trained network as a folder to share: weights as safetensors, all else as JSON, and a card.

``model.safetensors`` has the tensors and ``config.json`` the config, the classes with their
colours, and where the weights come from. Neither can hold code.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2
import safetensors.torch
from torch import Tensor

from danet.checkpoint.exported import CONFIG, FIELDS, FORMAT, WEIGHTS
from danet.errors import InputError, UserError, first_line
from danet.export.programs import OPSET, SMALLEST, Parity
from danet.extras import require
from danet.filesystem import atomic_write
from danet.plain import printable, walk


def save(folder: Path, saved: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Write the folder of a checkpoint, without paths of this machine, with these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors refuses tensors that share memory or are not contiguous.
    whole = {name: tensor.contiguous().clone() for name, tensor in weights.items()}
    with atomic_write(folder / WEIGHTS) as temporary:
        temporary.write_bytes(safetensors.torch.save(whole, metadata={"format": "pt"}))
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

    The token is that of ``hf auth login`` or of the variable HF_TOKEN. Raises InputError if the
    package is missing or the hub rejects the upload.
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
            ignore_patterns=[".*", "demo/*"],
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"push={repository}: {first_line(error)}") from error
    except OSError as error:  # no network
        raise UserError(f"push={repository}: {first_line(error)}") from error
    return str(commit)


def card(
    saved: Mapping[str, Any],
    *,
    num_weights: int,
    programs: Mapping[str, Sequence[Parity]],
    opset: int = OPSET,
    size: Sequence[int] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the text of README.md, a model card: architecture, training, scores, use and limits.

    It has config, classes and scores of a checkpoint; the results of ``compare`` by file names of
    programs, of any ``size`` or one; and ``metrics.json`` of ``tools/eval.py`` for the checkpoint.
    """
    config = saved["config"]
    nodes = (node for _, node, _ in walk(config["loss"], "loss") if isinstance(node, dict))
    scores = [(_what(found), found) for found in metrics]
    if saved.get("scores") and saved.get("evaluated_at", saved["step"]) == saved["step"]:
        scores.append((f"{config['data']['val_split']}, in training", saved["scores"]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=_plain,  # whatever a value is, it stays text of its place
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"name": _name, "what": _what}
    return environment.get_template("card.md.j2").render(
        saved=saved,
        losses=list(dict.fromkeys(_name(node) for node in nodes if "_target_" in node)),
        num_weights=num_weights,
        programs=programs,
        opset=opset,
        size=size,
        smallest=SMALLEST,
        metrics=metrics,
        scores=scores,
    )


def _plain(text: Any) -> str:
    """Return text of a file as Markdown shows it: no link, no HTML, no further cell of a table."""
    return re.sub(r"([\\\\`*|\[\]])", r"\\\1", escape(printable(str(text)), quote=False))


def _name(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _what(found: Mapping[str, Any]) -> str:
    return f"{found['split']}, {found['images']} images, {_name(found['evaluation'])}"
