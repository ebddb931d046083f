"""The model card: architecture, training, scores, use and limits of a network."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jinja2

from danet.export.programs import OPSET, SMALLEST, Parity
from danet.plain import printable, walk


def card(
    saved: Mapping[str, Any],
    *,
    num_weights: int,
    programs: Mapping[str, Sequence[Parity]],
    opset: int = OPSET,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the Markdown text of README.md.

    Args:
        saved: A checkpoint; its config, classes and scores are listed.
        num_weights: Of the network.
        programs: File names of exported programs, with the results of ``compare``.
        opset: Of the ONNX file.
        metrics: Contents of ``metrics.json`` that ``tools/eval.py`` wrote for this checkpoint.
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
