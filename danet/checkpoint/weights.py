"""Reading weights that others made: torchvision's by name, or a local state dict."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.checkpoint import reading
from danet.errors import InputError
from danet.plain import printable

_CLASSIFIER = ("fc.weight", "fc.bias")
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch.compile, FSDP and recomputation put anywhere into names."""
_PREFIXES = ("module.", "model.")
"""What DataParallel and moving averages, and classes that hold a model, put before every name."""
_COUNTER = "n_averaged"
"""Of torch's moving average, beside the tensors of its module."""
_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""Whether blocks have three convolutions, and blocks of the four stages -> depth of a ResNet."""


class Weights(NamedTuple):
    """Tensors of a file by name, and notes for the user on how their names were changed."""

    tensors: dict[str, Tensor]
    notes: list[str]


def read_state_dict(path: Path, key: str = "init_from", *, foreign: Sequence[str] = ()) -> Weights:
    """Read a file of named tensors without running code from it.

    Accepts a plain state dict, or one below ``state_dict`` or ``model``; what wrappers add to names
    is removed.

    Args:
        path: Of the file.
        key: The setting that named it, for messages.
        foreign: As in ``reading.read``.

    Raises:
        InputError: The file is missing, damaged, holds anything but tensors and plain values, or a
            tensor has values that are not finite.
    """
    content = reading.read(path, key, foreign=foreign).value
    # Lightning and mmsegmentation write state_dict; this project, among others, model.
    for part in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    if not isinstance(content, dict) or not content:
        raise InputError(
            f"{key}={path}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    for name, value in content.items():
        # Cut in the message, since a key of a foreign file may be of any length.
        if not isinstance(value, Tensor):
            raise InputError(
                f"{key}={path}: expected a dictionary of tensors, but {str(name)[:99]!r} is not one"
            )
        if not isinstance(name, str) or printable(name) != name:
            raise InputError(f"{key}={path}: {str(name)[:200]!r} is no name of a tensor")
    problem = reading.unsound(content)
    if problem:
        raise InputError(f"{key}={path}: {problem}; take weights from before the run diverged")
    return without_wrappers(content, f"{key}={path}")


def without_wrappers(tensors: Mapping[str, Tensor], source: str) -> Weights:
    """Remove from names what wrappers of the network added, in whatever order they were nested.

    Raises:
        InputError: Two names would become one.
    """
    names = {old: old for old in tensors}
    notes = []
    for part in _WRAPPERS:
        pieces = {old: name.split(".") for old, name in names.items()}
        if any(part in found for found in pieces.values()):
            names = {old: ".".join(p for p in found if p != part) for old, found in pieces.items()}
            notes.append(f"{source}: the {part + '.'!r} in names was taken off")
    # The counter of a moving average never has a prefix. A prefix goes only if every other name has
    # it, since a network may have a part of that name; in a loop, since DataParallel and averages
    # nest.
    own = [old for old in names if old != _COUNTER]
    while own and (found := [p for p in _PREFIXES if all(names[o].startswith(p) for o in own)]):
        names = {old: names[old].removeprefix(found[0]) for old in own}
        notes.append(f"{source}: the {found[0]!r} in front of every name was taken off")
    # With and without wrapper in one file: either could be meant, and one would be lost.
    old_of: dict[str, str] = {}
    for old, name in names.items():
        if old_of.setdefault(name, old) != old:
            raise InputError(f"{source}: {old} and {old_of[name]} both stand for the tensor {name}")
    return Weights({name: tensors[old] for old, name in names.items()}, notes)


def load_backbone(backbone: nn.Module, depth: int, weights: str) -> None:
    """Fill a ResNet from a torchvision weight entry or a local file; all but ``fc`` must fit.

    Raises:
        InputError: No such entry or file, or tensors are missing, left over or of another shape.
    """
    from torchvision.models import get_model_weights  # takes seconds, and is seldom needed

    key = "model.backbone.weights"
    entries = get_model_weights(f"resnet{depth}")
    if weights in entries.__members__:
        try:
            # Without check_hash a download that was cut short would be kept in torch's cache.
            state = dict(entries[weights].get_state_dict(check_hash=True))
        except (OSError, RuntimeError) as error:  # no network, or another file than expected
            raise InputError(
                f"{key}={weights}: {entries[weights].url} could not be downloaded ({error}); fetch "
                f"it on another machine and set {key}=FILE"
            ) from error
    elif Path(weights).expanduser().exists():
        state = read_state_dict(Path(weights).expanduser(), key).tensors
    else:
        raise InputError(
            f"{key}={weights}: neither a file nor a weight entry of torchvision's resnet{depth} "
            f"({', '.join(entries.__members__)})"
        )
    for name in _CLASSIFIER:  # of ImageNet; segmentation has a head instead
        state.pop(name, None)
    # Before the tensors are compared: one line on the depth says more than a hundred names.
    found = depth_of(state)
    if found not in (None, depth):
        raise InputError(
            f"{key}={weights}: the weights of a ResNet-{found}, and model.backbone.depth={depth}; "
            f"set model/backbone=resnet{found}, or give weights of a ResNet-{depth}"
        )
    expected = backbone.state_dict()
    for name, value in expected.items():
        # Counters of batch norm are missing in files written before PyTorch 1.0.
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, value)
    problems = explain_mismatch(expected, state)
    if problems:
        raise InputError(f"{key}={weights} does not fit: {problems}")
    backbone.load_state_dict(state)


def depth_of(names: Iterable[str], prefix: str = "") -> int | None:
    """Return the depth of the ResNet whose tensors have these names; None if it is unclear."""
    blocks = [0, 0, 0, 0]
    has_bottlenecks = False
    pattern = re.compile(re.escape(prefix) + r"layer([1-4])\.(\d+)\.(\w+)")
    for name in names:
        match = pattern.match(name)
        if match:
            stage = int(match[1]) - 1
            blocks[stage] = max(blocks[stage], int(match[2]) + 1)
            has_bottlenecks = has_bottlenecks or match[3] == "conv3"  # 34 has as many blocks as 50
    a, b, c, d = blocks
    return _DEPTHS.get((has_bottlenecks, (a, b, c, d)))


def explain_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return in one line why ``found`` does not fit ``expected``; empty if it does."""
    parts = [_depths(expected, found), _class_counts(expected, found)]
    differences = _differences(expected, found)
    parts += [f"{kind}: {_named(names, 3)}" for kind, names in differences.items() if names]
    return "; ".join(filter(None, parts))


def _differences(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return the names of tensors that are missing, unexpected, or have another shape."""
    return {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "shape": [
            f"{name} is {tuple(found[name].shape)} in the file and {tuple(value.shape)} here"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }


def initialise(model: nn.Module, path: Path) -> list[str]:
    """Load the tensors of a checkpoint or state dict that fit; return lines on those that do not.

    Raises:
        InputError: The file is not readable, its backbone has another depth, or nothing fits.
    """
    found, notes = read_state_dict(path.expanduser(), "init_from")
    expected = model.state_dict()
    # Much of a ResNet-50 fits a ResNet-101: a network filled by half would pass unnoticed.
    depths = _depths(expected, found)
    if depths:
        raise InputError(
            f"init_from={path}: {depths}; set model/backbone to the one of the file, or take "
            "another file"
        )
    # The config says how images are normalised.
    normalising = {name: found.pop(name) for name in ("mean", "std") if name in found}
    expected = {name: v for name, v in expected.items() if name not in ("mean", "std")}
    # Shapes are compared here, since strict=False still raises on a tensor of another shape.
    fits = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    if not fits:
        hint = "; weights of a backbone alone go to model.backbone.weights" * bool(depth_of(found))
        raise InputError(
            f"init_from={path}: none of its {len(found)} tensors fits this network{hint}"
        )
    model.load_state_dict(fits, strict=False)
    backbone = [name for name in expected if name.startswith("backbone.")]
    filled = sum(name in fits for name in backbone)
    lines = [
        f"{len(fits)} of {len(expected)} tensors taken; of the backbone "
        + (f"all {filled}" if filled == len(backbone) else f"{filled} of {len(backbone)}")
    ]
    for name, value in normalising.items():
        used = getattr(model, name, None)
        if isinstance(used, Tensor) and not torch.allclose(used.flatten(), value.flatten()):
            lines.append(
                f"its images were normalised with {name}={_rounded(value)}, these will be with "
                f"{_rounded(used)}; +model.{name}=[...] sets it"
            )
    reason = _class_counts(expected, found)
    differences = _differences(expected, found)
    for kind, label in (
        ("shape", f"left out, since {reason}" if reason else "left out"),
        ("missing", "not in the file, so random as before"),
        ("unexpected", "in the file and not in this network"),
    ):
        if names := differences[kind]:
            lines.append(f"{label}: {_named(names, 40)}")
    return [*notes, *(f"init_from={path}: {line}" for line in lines)]


def _rounded(values: Tensor) -> str:
    return f"[{','.join(f'{value:g}' for value in values.flatten().tolist())}]"


def _named(names: list[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _depths(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a text with the depth found and the one expected; empty if they are equal."""
    for prefix in ("", "backbone."):  # a backbone alone, a whole network
        old, new = depth_of(found, prefix), depth_of(expected, prefix)
        if old and new and old != new:
            return f"the file has a ResNet-{old} and this network a ResNet-{new}"
    return ""


def _class_counts(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a text with both numbers of classes, outputs of the head; empty if they are equal."""
    counts = [
        {
            value.shape[0]
            for key, value in of.items()
            if re.fullmatch(r"head\.classify\.\d+\.bias", key)
        }
        for of in (found, expected)
    ]
    # Every classifier of a head has the outputs of the others; else it is no head of ours.
    if counts[0] == counts[1] or not all(len(count) == 1 for count in counts):
        return ""
    return f"it has {counts[0].pop()} classes and this network {counts[1].pop()}"
