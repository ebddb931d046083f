"""Reading weights that others made: torchvision's by name, or a local state dict."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danet.errors import InputError

_CLASSIFIER = ("fc.weight", "fc.bias")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a file of named tensors without running anything that lies in it.

    Accepts a plain state dict, or one below ``state_dict`` or ``model``; a ``module.`` in front of
    every name is taken off.

    Raises:
        InputError: The file is missing, damaged, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise InputError(f"{path.resolve()}: there is no such weight file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if "weights_only" in reason.lower() or "weights only" in reason.lower():
            reason = "it holds Python objects, which are not loaded because they can run code"
        raise InputError(f"{path}: not a readable weight file ({reason})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    wrong = [k for k, v in content.items() if not isinstance(v, Tensor)]
    if wrong:
        raise InputError(f"{path}: expected a dictionary of tensors, but {wrong[0]!r} is not one")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def load_backbone(backbone: nn.Module, depth: int, weights: str) -> None:
    """Fills a ResNet from a torchvision weight entry or a local file; all but ``fc`` must fit.

    Raises:
        InputError: No such entry or file, or tensors are missing, left over or of another shape.
    """
    from torchvision.models import get_model_weights  # takes seconds, and is seldom needed

    entries = get_model_weights(f"resnet{depth}")
    if weights in entries.__members__:
        state = dict(entries[weights].get_state_dict(check_hash=True))
    elif Path(weights).expanduser().exists():
        state = read_state_dict(Path(weights).expanduser())
    else:
        raise InputError(
            f"model.backbone.weights={weights}: neither a file nor a weight entry of "
            f"torchvision's resnet{depth} ({', '.join(entries.__members__)})"
        )
    for key in _CLASSIFIER:
        state.pop(key, None)
    expected = backbone.state_dict()
    for key, value in expected.items():
        # Counters of batch norm are missing in files written before PyTorch 1.0.
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, value)
    problems = explain_mismatch(expected, state)
    if problems:
        raise InputError(f"model.backbone.weights={weights} does not fit: {problems}")
    backbone.load_state_dict(state)


def explain_mismatch(expected: dict[str, Tensor], found: dict[str, Tensor]) -> str:
    """Says in one line what keeps ``found`` from filling ``expected``; empty when nothing does."""
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    shapes = [
        f"{key} is {tuple(found[key].shape)} in the file and {tuple(expected[key].shape)} here"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    parts = []
    for label, names in (("missing", missing), ("unexpected", unexpected), ("shape", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{label}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def initialise(model: nn.Module, path: Path) -> list[str]:
    """Fills what fits of a network from a checkpoint or state dict; says in lines what did not.

    Raises:
        InputError: The file is not readable, or nothing in it fits.
    """
    found, expected = read_state_dict(path.expanduser()), model.state_dict()
    fits = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    if not fits:
        raise InputError(f"init_from={path}: none of its {len(found)} tensors fits this network")
    model.load_state_dict(fits, strict=False)
    lines = [f"init_from={path}: {len(fits)} of {len(expected)} tensors taken"]
    rest = explain_mismatch(expected, found)
    return [*lines, f"init_from={path}: left out: {rest}"] if rest else lines
