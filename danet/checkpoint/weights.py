"""Reading weights that others made: torchvision's by name, or a local state dict."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danet.checkpoint import reading
from danet.distributed import collectives
from danet.errors import InputError

_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts that torch.compile, FSDP and recomputation put anywhere into names."""
_PREFIXES = ("module.", "model.")  # of DataParallel, moving averages, and classes that hold a model
_ADVICE = "set another model/backbone, or give other weights"
_NORMALISE = "'+model.mean=[...]' and '+model.std=[...]' set it"
_BATCHES = "num_batches_tracked"
COUNTER = "n_averaged"  # of torch's moving average, beside the tensors of its module
_DEPTHS: dict[tuple[bool, tuple[int, ...]], int] = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""Whether blocks have three convolutions, and blocks of the four stages -> depth of a ResNet."""


def read_state_dict(
    path: Path, key: str = "init_from", *, foreign: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Read a file of named tensors without running code from it.

    Accepts a plain state dict, or one below ``state_dict`` or ``model``; what wrappers add to names
    is removed. ``key`` is the setting that named it, ``foreign`` as in ``reading.read``. A missing
    or damaged file, and one with anything but finite tensors, raises InputError.
    """
    if path.suffix == ".safetensors":
        content: Any = reading.read_safetensors(path, key)
    else:
        content, _ = reading.read(path, key, foreign=foreign)
    # Lightning and mmsegmentation write state_dict; this project, among others, model.
    for part in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(part), dict):
            content = content[part]
    reading.require_tensors(content, f"{key}={path}")
    tensors = without_wrappers(content, f"{key}={path}")
    tensors.pop(COUNTER, None)
    parts = {name.partition(".")[0] for name in tensors}
    if key == "model.backbone.weights" and {"backbone", "head", "mean", "std"} <= parts:
        raise InputError(f"{key}={path}: a checkpoint of this project; use init_from={path}")
    return tensors


def without_wrappers(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Remove from names what wrappers of the network added, in whatever order, and report it."""
    removed = {part for name in tensors for part in _WRAPPERS.findall(name)}
    names = {old: _WRAPPERS.sub("", old) for old in tensors}
    # A prefix goes only if every name has it but the counter, since a network may have a part of
    # that name; in a loop, since DataParallel and averages nest.
    own = [old for old in names if old != COUNTER]
    while own and (found := [p for p in _PREFIXES if all(names[o].startswith(p) for o in own)]):
        names |= {old: names[old].removeprefix(found[0]) for old in own}
        removed.add(found[0])
    # With and without wrapper in one file: either could be meant, and one would be lost.
    old_of: dict[str, str] = {}
    for old, name in names.items():
        if old_of.setdefault(name, old) != old:
            raise InputError(f"{source}: {old} and {old_of[name]} both stand for the tensor {name}")
    if removed and collectives.is_first():  # every rank reads the file, one prints
        print(f"{source}: {', '.join(sorted(removed))} was taken off the names", flush=True)
    return {name: tensors[old] for old, name in names.items()}


def load_backbone(backbone: nn.Module, depth: int, weights: str) -> None:
    """Fill a ResNet from a torchvision weight entry or a local file; all but ``fc`` must fit."""
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
        state = read_state_dict(Path(weights).expanduser(), key)
    else:
        raise InputError(
            f"{key}={weights}: neither a file nor a weight entry of torchvision's resnet{depth} "
            f"({', '.join(entries.__members__)})"
        )
    for name in ("fc.weight", "fc.bias"):  # of ImageNet; segmentation has a head instead
        state.pop(name, None)
    backbone.load_state_dict(fitting(backbone.state_dict(), state, f"{key}={weights}"))


def fitting(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the tensors of a file in the order of a network; raise InputError if they do not fit.

    Counters of batch norm, missing in files of before PyTorch 1.0, are those of the network.
    """
    state = {**{k: v for k, v in expected.items() if k.endswith(_BATCHES)}, **found}
    if problems := explain_mismatch(expected, state):
        raise InputError(f"{source} does not fit: {problems}; {_ADVICE}")
    return {name: state[name] for name in expected}


def depth_of(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the depth of the ResNet, alone or in a network, of tensors; None if it is unclear."""
    pattern = re.compile(r"(?:backbone\.)?layer([1-4])\.(\d+)\.")
    # Without counters, which ``fitting`` adds.
    names = [name for name in tensors if not name.endswith(_BATCHES)]
    blocks = {match.groups() for name in names if (match := pattern.match(name))}
    counts = tuple(sum(stage == found for found, _ in blocks) for stage in "1234")
    # 34 has as many blocks as 50.
    return _DEPTHS.get((any("layer1.0.conv3." in name for name in tensors), counts))


def explain_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return in one line why ``found`` does not fit, with a few names a kind; "" if it does."""
    if depths := _depths(expected, found):  # says more than a hundred names
        return depths
    differences = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "shape": [
            f"{name} is {tuple(found[name].shape)} in the file and {tuple(value.shape)} here"
            for name, value in expected.items()
            if name in found and found[name].shape != value.shape
        ],
    }
    parts = []
    # Every classifier of a head has the outputs of the others; else it is no head of ours.
    bias = re.compile(r"head\.classify\.\d+\.bias")
    old, new = ({v.numel() for k, v in of.items() if bias.fullmatch(k)} for of in (found, expected))
    if old != new and len(old) == len(new) == 1:
        parts.append(f"it has {old.pop()} classes and this network {new.pop()}")
    for kind, names in differences.items():
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        if names:
            parts.append(f"{kind}: {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def initialise(model: nn.Module, path: Path) -> list[str]:
    """Load the tensors of a checkpoint or state dict that fit; return lines on those that do not.

    A backbone of another depth, or nothing that fits, raises InputError.
    """
    found = read_state_dict(path.expanduser(), "init_from")
    expected = dict(model.state_dict())
    # Much of a ResNet-50 fits a ResNet-101: a network filled by half would pass unnoticed.
    if depths := _depths(expected, found):
        raise InputError(f"init_from={path} does not fit: {depths}; {_ADVICE}")
    # The config says how images are normalised.
    ours, theirs = (
        {k: [round(x, 3) for x in of.pop(k).flatten().tolist()] for k in ("mean", "std") if k in of}
        for of in (expected, found)
    )
    # Shapes are compared here, since strict=False still raises on a tensor of another shape.
    fits = {k: v for k, v in found.items() if k in expected and v.shape == expected[k].shape}
    if not fits:
        hint = "; weights of a backbone alone go to model.backbone.weights" * bool(depth_of(found))
        none = f"none of its {len(found)} tensors fits this network"
        raise InputError(f"init_from={path}: {none}{hint}")
    model.load_state_dict(fits, strict=False)
    backbone = [name for name in expected if name.startswith("backbone.")]
    filled = sum(name in fits for name in backbone)
    part = f"all {filled}" if filled == len(backbone) else f"{filled} of {len(backbone)}"
    lines = [f"{len(fits)} of {len(expected)} tensors taken; of the backbone {part}"]
    if theirs and theirs != ours:
        lines.append(
            f"its images were normalised with {theirs}, these will be with {ours}; "
            + ("data.range sets it" if getattr(model, "bands", None) else _NORMALISE)
        )
    if rest := explain_mismatch(expected, found):
        lines.append(f"the rest is left out, or random as before: {rest}")
    return [f"init_from={path}: {line}" for line in lines]


def _depths(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Return a text with the depth found and the one expected; empty if they are equal."""
    old, new = depth_of(found), depth_of(expected)
    is_other = old and new and old != new
    return f"the file has a ResNet-{old} and this network a ResNet-{new}" if is_other else ""
