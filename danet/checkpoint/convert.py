"""Weights of other programs under this project's names.

Each program has a table of prefixes: theirs, and ours. A second table holds what is left out on
purpose, with the reason, so that every tensor of a file is accounted for.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from danet.checkpoint.weights import depth_of
from danet.errors import InputError


class Program(NamedTuple):
    """How another program names the tensors of a network."""

    names: Mapping[str, str]
    """Beginning of a name there -> here; the longest that fits counts."""
    dropped: Mapping[str, str]
    """Beginning of a name there -> why it is left out."""
    is_whole: bool
    """Whether its files have a head, too."""


PROGRAMS: dict[str, Program] = {
    # The authors' repository, and the released DANet101 (a prefix for the backbone, one for the
    # head; every classifier stands behind a dropout, hence its number).
    "official": Program(
        names={
            "pretrained.": "backbone.",
            "head.conv5a.": "head.position.reduce.",
            "head.conv5c.": "head.channel.reduce.",
            "head.sa.query_conv.": "head.position.attention.query.",
            "head.sa.key_conv.": "head.position.attention.key.",
            "head.sa.value_conv.": "head.position.attention.value.",
            "head.sa.gamma": "head.position.attention.gamma",
            "head.sc.gamma": "head.channel.attention.gamma",
            "head.conv51.": "head.position.refine.",
            "head.conv52.": "head.channel.refine.",
            "head.conv6.": "head.classify_position.",
            "head.conv7.": "head.classify_channel.",
            "head.conv8.": "head.classify.",
        },
        dropped={
            "pretrained.fc.": "the classifier of ImageNet, which segmentation does not use",
            "auxlayer.": "an auxiliary head that the authors' code declares and never calls",
        },
        is_whole=True,
    ),
    # DANet of mmsegmentation 1.x and its forks: ResNet(V1c), DAHead, auxiliary FCNHead.
    "mmsegmentation": Program(
        names={
            "backbone.": "backbone.",
            # In the stem of a ResNetV1c 0, 3 and 6 are convolutions and 7 the last norm.
            "backbone.stem.": "backbone.conv1.",
            "backbone.stem.7.": "backbone.bn1.",
            "decode_head.pam_in_conv.conv.": "head.position.reduce.0.",
            "decode_head.pam_in_conv.bn.": "head.position.reduce.1.",
            "decode_head.pam.query_project.": "head.position.attention.query.",
            "decode_head.pam.key_project.": "head.position.attention.key.",
            "decode_head.pam.value_project.": "head.position.attention.value.",
            "decode_head.pam.gamma.scale": "head.position.attention.gamma",
            "decode_head.pam_out_conv.conv.": "head.position.refine.0.",
            "decode_head.pam_out_conv.bn.": "head.position.refine.1.",
            "decode_head.pam_conv_seg.": "head.classify_position.1.",
            "decode_head.cam_in_conv.conv.": "head.channel.reduce.0.",
            "decode_head.cam_in_conv.bn.": "head.channel.reduce.1.",
            "decode_head.cam.gamma.scale": "head.channel.attention.gamma",
            "decode_head.cam_out_conv.conv.": "head.channel.refine.0.",
            "decode_head.cam_out_conv.bn.": "head.channel.refine.1.",
            "decode_head.cam_conv_seg.": "head.classify_channel.1.",
            "decode_head.conv_seg.": "head.classify.1.",
            "auxiliary_head.convs.0.conv.": "auxiliary_head.reduce.0.",
            "auxiliary_head.convs.0.bn.": "auxiliary_head.reduce.1.",
            "auxiliary_head.conv_seg.": "auxiliary_head.classify.1.",
        },
        dropped={},
        is_whole=True,
    ),
    "torchvision": Program(
        names={"conv1.": "backbone.conv1.", "bn1.": "backbone.bn1.", "layer": "backbone.layer"},
        dropped={"fc.": "the classifier of ImageNet, which segmentation does not use"},
        is_whole=False,
    ),
}

_STEMS = {(7, 64): "7x7", (3, 64): "64-64-128", (3, 32): "32-32-64"}
"""Size of the first kernel, and its outputs -> stem."""
_COUNTER = "num_batches_tracked"


class Renamed(NamedTuple):
    """Tensors of a file: renamed, dropped on purpose, or unknown."""

    tensors: dict[str, Tensor]
    """Under this project's names."""
    dropped: dict[str, str]
    """Name in the file -> why it is left out."""
    unknown: list[str]
    """Names in the file that no table has."""


class Network(NamedTuple):
    """Properties of a network that follow from the names and shapes of its tensors."""

    depth: int
    stem: str
    num_classes: int | None
    """None where there is no head."""
    has_auxiliary: bool


def rename(tensors: Mapping[str, Tensor], source: str) -> Renamed:
    """Rename the tensors of a file, and list those that are dropped or unknown.

    Args:
        tensors: By their names in the file.
        source: The program that wrote it, one of PROGRAMS.
    """
    program = PROGRAMS[source]
    renamed, dropped, unknown = {}, {}, []
    for name, tensor in tensors.items():
        reasons = [why for start, why in program.dropped.items() if name.startswith(start)]
        starts = [start for start in program.names if name.startswith(start)]
        if reasons:  # first: "pretrained.fc." also begins with "pretrained."
            dropped[name] = reasons[0]
        elif starts:
            start = max(starts, key=len)  # "backbone.stem.7." before "backbone."
            ours = program.names[start] + name[len(start) :]
            # A number alone in mmsegmentation, one in a row in the released code and here.
            renamed[ours] = tensor.reshape(1) if ours.endswith(".gamma") else tensor
        else:
            unknown.append(name)
    return Renamed(renamed, dropped, unknown)


def network_of(tensors: Mapping[str, Tensor], file: str) -> Network:
    """Return the network that renamed tensors belong to.

    Args:
        tensors: As ``rename`` gives them.
        file: How messages begin.

    Raises:
        InputError: They are not of a ResNet that this project has.
    """
    depth = depth_of(tensors, "backbone.")
    # A deep stem is a sequence, whose first convolution has the number 0.
    first = tensors.get("backbone.conv1.weight", tensors.get("backbone.conv1.0.weight"))
    stem = None if first is None else _STEMS.get((first.shape[-1], first.shape[0]))
    if depth is None or stem is None:
        found = "no first convolution" if first is None else f"a stem of {tuple(first.shape)}"
        raise InputError(
            f"{file}: expected the tensors of a ResNet-18, 34, 50 or 101 with one of the stems "
            f"{', '.join(_STEMS.values())}; found {len(tensors)} known tensors, depth {depth}, "
            f"{found}; is source= right?"
        )
    bias = tensors.get("head.classify.1.bias")  # 0 is a dropout
    has_auxiliary = any(name.startswith("auxiliary_head.") for name in tensors)
    return Network(depth, stem, None if bias is None else bias.numel(), has_auxiliary)


def fill_in(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, file: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Complete the tensors of a file to the state of a network.

    What files do not have comes from ``expected``: the mean and the deviation of images, counters
    of batch norms in files of before PyTorch 1.0, and the head where a file is a backbone.

    Args:
        tensors: As ``rename`` gives them.
        expected: The fresh state of the network.
        source: The program that wrote the file.
        file: How messages begin.

    Returns:
        The state, and the names of trained tensors that the file does not have.

    Raises:
        InputError: Tensors are missing or have other shapes.
    """
    shapes = [
        f"{name} is {tuple(tensors[name].shape)} in the file and {tuple(value.shape)} here"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    absent = [name for name in expected if name not in tensors]
    # Without a dot: mean and std of the images, which are buffers of the network itself.
    fresh = [name for name in absent if not name.endswith(_COUNTER) and "." in name]
    needed = "" if PROGRAMS[source].is_whole else "backbone."
    missing = [name for name in fresh if name.startswith(needed)]
    surplus = [name for name in tensors if name not in expected]
    problems = [("missing", missing), ("shape", shapes), ("not in this network", surplus)]
    texts = [f"{label}: {_some(names)}" for label, names in problems if names]
    if texts:
        raise InputError(f"{file} does not fit: {'; '.join(texts)}")
    return {name: tensors.get(name, value) for name, value in expected.items()}, fresh


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"
