"""Weights of other programs under this project's names.

programs.yaml has a table of prefixes for each program: theirs, and ours. A second table holds what
is left out on purpose, with the reason, so that every tensor of a file is accounted for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml
from torch import Tensor

from danet.checkpoint.weights import depth_of, explain_mismatch
from danet.errors import InputError


class Program(NamedTuple):
    """How another program names the tensors of a network; see programs.yaml."""

    names: Mapping[str, str]
    dropped: Mapping[str, str]
    is_whole: bool
    """Whether its files have a head, too."""
    trained_with: Sequence[str]


PROGRAMS = {
    name: Program(**table)
    for name, table in yaml.safe_load(
        Path(__file__).with_name("programs.yaml").read_text(encoding="utf-8")
    ).items()
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
    needed = "" if PROGRAMS[source].is_whole else "backbone."
    absent = [name for name in expected if name not in tensors]
    # Without a dot: mean and std of the images, which are buffers of the network itself.
    trained = [name for name in absent if not name.endswith(_COUNTER) and "." in name]
    missing = {name for name in trained if name.startswith(needed)}
    state = {**{name: expected[name] for name in absent if name not in missing}, **tensors}
    if problems := explain_mismatch(expected, state):
        raise InputError(f"{file} does not fit: {problems}")
    return {name: state[name] for name in expected}, trained
