"""Weights of other programs under this project's names.

programs.yaml has a table of prefixes for each program: theirs, and ours. A second table holds what
is left out on purpose, with the reason, so that every tensor of a file is accounted for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from danet.checkpoint.weights import depth_of, fitting
from danet.errors import InputError

PROGRAMS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("programs.yaml").read_text(encoding="utf-8")
)
_STEMS: dict[tuple[int, ...] | None, str] = {
    (64, 3, 7, 7): "7x7",
    (64, 3, 3, 3): "64-64-128",
    (32, 3, 3, 3): "32-32-64",
}
"""Shape of the first convolution -> stem."""


def rename(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors under this project's names, and the names left out with reasons."""
    names, dropped = PROGRAMS[source]["names"], PROGRAMS[source]["dropped"]
    renamed, left_out = {}, {}
    for name, tensor in tensors.items():
        reasons = [why for start, why in dropped.items() if name.startswith(start)]
        starts = [start for start in names if name.startswith(start)]
        if reasons or not starts:  # first: "pretrained.fc." also begins with "pretrained."
            left_out[name] = reasons[0] if reasons else "unknown names"
            continue
        start = max(starts, key=len)  # "backbone.stem.7." before "backbone."
        ours = names[start] + name[len(start) :]
        # A number alone in mmsegmentation, one in a row in the released code and here.
        renamed[ours] = tensor.reshape(1) if ours.endswith(".gamma") else tensor
    return renamed, left_out


def network_of(tensors: Mapping[str, Tensor], file: str) -> tuple[list[str], int | None]:
    """Return the settings of the network of renamed tensors, and its number of classes or None.

    Tensors of no ResNet that this project has raise InputError, which begins with ``file``.
    """
    depth = depth_of(tensors)
    # A deep stem is a sequence, whose first convolution has the number 0.
    first = tensors.get("backbone.conv1.weight", tensors.get("backbone.conv1.0.weight"))
    shape = None if first is None else tuple(first.shape)
    stem = _STEMS.get(shape)
    if depth is None or stem is None:
        raise InputError(
            f"{file}: expected a ResNet-18, 34, 50 or 101 with one of the stems "
            f"{', '.join(_STEMS.values())}; found {len(tensors)} known tensors, depth {depth}, "
            f"first convolution {shape}; is source= right?"
        )
    bias = tensors.get("head.classify.1.bias")  # 0 is a dropout
    has_auxiliary = any(name.startswith("auxiliary_head.") for name in tensors)
    settings = [
        f"model/backbone=resnet{depth}",
        f"model.backbone.stem={stem}",
        f"model/auxiliary_head={'fcn' if has_auxiliary else 'none'}",
    ]
    return settings, None if bias is None else bias.numel()


def fill_in(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, file: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Complete renamed tensors to the state of a network, of which ``expected`` is the fresh one.

    What files do not have comes from there: the mean and the deviation of images, counters of batch
    norms in files of before PyTorch 1.0, and the head where a file is a backbone. Other tensors
    that are missing or have another shape raise InputError, which begins with ``file``. Returned
    with the state are the names of trained tensors that the file does not have.
    """
    part = "" if PROGRAMS[source]["is_whole"] else "backbone."
    # Without a dot: mean and std of the images, which are buffers of the network itself.
    given = {k: v for k, v in expected.items() if "." not in k or not k.startswith(part)}
    state = fitting(expected, {**given, **tensors}, file)
    return state, [name for name in given if "." in name and name not in tensors]
