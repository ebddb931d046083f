"""The model card: architecture, training, scores, use and limits of a network."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from danet.export.network import SMALLEST
from danet.export.programs import OPSET, Parity
from danet.plain import printable

_SCORES = {
    "miou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
}


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
    data, model = config["data"], config["model"]
    parts = [
        "---\nlibrary_name: danet\npipeline_tag: image-segmentation\n"
        "tags: [semantic-segmentation, danet, pytorch]\n---",
        f"# {_name(model['head'])}, {_backbone(model['backbone'])}, on {_name(data['dataset'])}",
        f"Says for every pixel of a photograph to which of {len(saved['classes'])} classes it "
        f"belongs. {num_weights:,} weights, after {saved['step']} updates; written by danet "
        f"{_plain(saved.get('version', ''))}.",
        "## Use\n\n```python\nimport danet\n\n"
        'model = danet.load_model("this/folder")  # or hf://owner/name\n'
        'mask = danet.predict(model, "street.jpg")  # uint8 (H, W); values index model.classes\n'
        "```",
    ]
    if programs:
        parts.append(_programs(programs, opset))
    parts += [_recipe(saved), _scores(saved, metrics), _classes(saved, metrics)]
    parts.append(
        "## Limits\n\n"
        f"- It knows the pictures of {_name(data['dataset'])} and what resembles them; every pixel "
        "gets one of the classes above, whatever it shows.\n"
        "- Scores are those of the split and protocol named with them, of one training.\n"
        "- The data set and pretrained weights it started from have licences of their own."
    )
    return "\n\n".join(parts) + "\n"


def _plain(text: Any) -> str:
    """Return text of a file as Markdown shows it: no link, no HTML, no further cell of a table."""
    return re.sub(r"([\\\\`*|\[\]])", r"\\\1", escape(printable(str(text)), quote=False))


def _name(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]


def _backbone(node: Mapping[str, Any]) -> str:
    depth = node.get("depth")
    return f"{_name(node)}-{depth}" if depth else _name(node)


def _programs(programs: Mapping[str, Sequence[Parity]], opset: int) -> str:
    lines = [
        "Without this project: `image` is uint8 (B, 3, H, W), RGB as it is, `logits` float32 "
        "(B, K, H, W); the largest of a pixel's logits is its class. Batch, height and width are "
        f"free from {SMALLEST} pixels on.\n"
    ]
    if "model.onnx" in programs:
        lines.append(
            f"```python\nimport onnxruntime  # opset {opset}\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            '(logits,) = session.run(["logits"], {"image": image})\n```\n'
        )
    lines.append("| file | H x W | largest difference of a logit | pixels of equal class |")
    lines.append("| --- | --- | --- | --- |")
    lines += [
        f"| {name} | {p.height} x {p.width} | {p.difference:.2g} of {p.scale:.3g} "
        f"| {100 * p.agreement:.3f} % |"
        for name, found in programs.items()
        for p in found
    ]
    return "\n".join(lines)


def _recipe(saved: Mapping[str, Any]) -> str:
    config = saved["config"]
    data, trainer = config["data"], config["trainer"]
    processes = saved.get("processes", 1)
    images = data["batch_size"] * trainer["accumulate"] * processes
    optimizer = config["optimizer"]
    rows = {
        "data": saved.get("training_set") or f"{_name(data['dataset'])} {data['train_split']}",
        "crop": data.get("crop"),
        "images per update": images,
        "updates": f"{saved['step']} of {trainer['steps']}",
        "optimizer": f"{_name(optimizer)}, rate {optimizer.get('lr')}, "
        f"weight decay {optimizer.get('weight_decay')}",
        "schedule": _name(config["schedule"]),
        "loss": ", ".join(_loss_names(config["loss"])),
        "averaged weights": "yes" if saved.get("ema") else "no",
        "seed": config["seed"],
    }
    lines = ["## Training\n", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_plain(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(lines)


def _loss_names(node: Any) -> list[str]:
    """Return the names of all classes in the config of a loss, each once."""
    inside = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    own = [_name(node)] if isinstance(node, dict) and "_target_" in node else []
    return list(dict.fromkeys(own + [name for value in inside for name in _loss_names(value)]))


def _scores(saved: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    shown = [(f"{m['split']}, {m['images']} images, {_name(m['evaluation'])}", m) for m in metrics]
    details = [
        _plain(f"- {what}: {m['protocol']}; data set: {m['data_set']}")
        for what, m in shown
        if "protocol" in m and "data_set" in m
    ]
    data = saved["config"]["data"]
    if saved.get("scores") and saved.get("evaluated_at", saved["step"]) == saved["step"]:
        shown.append((f"{data['val_split']}, in training", saved["scores"]))
    if not shown:
        return "## Scores\n\nNone were measured."
    lines = ["## Scores\n", "In percent.\n", "| on | " + " | ".join(_SCORES.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(_SCORES))
    for what, values in shown:
        cells = [_percent(values.get(key)) for key in _SCORES]
        lines.append(f"| {_plain(what)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *details] if details else lines)


def _classes(saved: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    columns = [f"IoU, {m['split']}, {_name(m['evaluation'])}" for m in metrics]
    head = "".join(f" {_plain(column)} |" for column in columns)
    lines = ["## Classes\n", f"| value | class | colour |{head}"]
    lines.append("| --- | --- | --- |" + " --- |" * len(columns))
    for index, (name, color) in enumerate(zip(saved["classes"], saved["palette"], strict=True)):
        ious = [m["per_class"].get(name, {}).get("iou") for m in metrics]
        written = "#" + "".join(f"{part:02x}" for part in color)
        cells = "".join(f" {_percent(iou)} |" for iou in ious)
        lines.append(f"| {index} | {_plain(name)} | `{written}` |{cells}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
