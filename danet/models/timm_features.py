"""Feature maps of a network of timm: the arguments with which it gives them, and what they are."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from operator import gt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from danet.errors import InputError, first_line
from danet.models.finetuning import Layer

NUM_MAPS = 4  # feature maps of a backbone, at most; some networks also have one at stride 2


class Features(NamedTuple):
    """How a network of timm becomes feature maps."""

    arguments: Mapping[str, Any]  # of ``timm.create_model``
    channels: list[int]  # of each map, finest first
    strides: list[int]  # pixels of the image per pixel of each map
    channels_last: bool  # whether maps come as (B, H, W, C)
    multiple: tuple[int, int]  # height and width of which those of an image must be multiples
    size: tuple[int, int] | None  # height and width of an image where only one size can be computed
    layers: Sequence[Layer] = ()
    """The parameters by depth, as ``network.<name>``: the stem, then block after block."""


def choose_features(
    name: str, *, output_stride: int | None, image_size: Sequence[int] | None, drop_path: float
) -> Features:
    """Find how a network gives feature maps: dilated if timm can, else at its own strides.

    The networks differ in what they accept, and say so only in errors, so each way is tried on the
    meta device, where it takes neither memory nor much time. If none works, the last reason is
    raised as InputError.

    Args:
        name: Of the network.
        output_stride: Pixels of the image per pixel of the last map, if it can be dilated; None
            not to dilate it.
        image_size: Height and width of the images, for networks that compute one size only.
        drop_path: Probability of dropping a residual branch, for the last block.
    """
    common: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        whole = create(name, **common)
        common |= {"features_only": True, **_taps(whole)}
        native = tuple(whole.default_cfg["input_size"][1:])  # type: ignore[index]
    except Exception as error:  # each network has checks of its own
        raise InputError(f"model.backbone.name={name}: {_reason(error)}") from error
    reason = ""
    for arguments, size in _ways(output_stride, image_size, native):
        try:
            network = create(name, **common, **arguments)
            found = _describe(network, {**common, **arguments}, size)
        except Exception as error:
            # The last reason counts: the first ones are about arguments that few networks take.
            reason = _reason(error)
            continue
        if arguments.get("output_stride", found.strides[-1]) != found.strides[-1]:
            continue  # it takes the argument and does not dilate
        if size and any(map(gt, image_size or size, size)):
            reason = "it computes images of {0} x {1} only: set 'data.crop=[{0},{1}]'".format(*size)
            continue
        return found._replace(layers=_layers(network, whole, found))
    raise InputError(f"model.backbone.name={name}: {reason}; or take another network")


def create(name: str, **arguments: Any) -> nn.Module:
    """Create a network of timm on the meta device, in eval mode."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def _reason(error: Exception) -> str:
    return f"timm cannot serve its feature maps ({first_line(error) or type(error).__name__})"


def _taps(whole: nn.Module) -> dict[str, Any]:
    """Return the blocks whose outputs are the maps of a plain transformer: one in each quarter.

    Networks with stages give the output of each stage by default.
    """
    info = getattr(whole, "feature_info", None)
    strides = [entry["reduction"] for entry in info] if isinstance(info, list) else []
    plain = [i for i, stride in enumerate(strides) if stride == strides[-1]]
    if len(plain) < NUM_MAPS or plain != list(range(plain[0], len(strides))):
        return {}
    ends = [-(-len(plain) * quarter // NUM_MAPS) for quarter in range(1, NUM_MAPS + 1)]
    return {"out_indices": tuple(plain[end - 1] for end in ends)}


def _ways(
    output_stride: int | None, image_size: Sequence[int] | None, native: tuple[int, int]
) -> Iterator[tuple[dict[str, Any], tuple[int, int] | None]]:
    """Yield arguments to try, each with the only size of an image, or None for any size."""
    if output_stride is not None:
        yield {"output_stride": output_stride}, None
    yield {"dynamic_img_size": True}, None  # position embeddings or windows by the image
    yield {}, None
    if image_size is not None:
        for unit in (1, 16, 32):  # a size that its patches and windows divide
            height, width = (-(-side // unit) * unit for side in image_size)
            yield {"img_size": (height, width)}, (height, width)
    yield {}, native


def _describe(
    network: nn.Module, arguments: Mapping[str, Any], size: tuple[int, int] | None
) -> Features:
    """Describe the maps of a network on the meta device by trying images of several sizes."""
    info: Any = network.feature_info
    channels = list(info.channels())[-NUM_MAPS:]
    if size is not None:
        strides, is_last = _strides(network, channels, size)
        return Features(arguments, channels, strides, is_last, size, size)
    for factor in (1, 2, 4, 8):  # windows or blocks of attention may have to fit
        multiple = factor * int(info.reduction()[-1])
        try:
            strides, is_last = _strides(network, channels, (2 * multiple, 3 * multiple))
            break
        except Exception:
            if factor == 8:
                raise
    # Most convolutional networks take any size; then nothing needs to be padded.
    odd = 2 * multiple + 3, 3 * multiple + 5
    with suppress(Exception):
        found = [_size_of(m, is_last) for m in _compute(network, odd)]
        if found == [tuple(-(-side // stride) for side in odd) for stride in strides]:
            multiple = 1
    return Features(arguments, channels, strides, is_last, (multiple, multiple), None)


def _compute(network: nn.Module, size: tuple[int, int]) -> list[Tensor]:
    maps: list[Tensor] = network(torch.empty(1, 3, *size, device="meta"))
    return maps[-NUM_MAPS:]


def _size_of(x: Tensor, is_last: bool) -> tuple[int, ...]:
    return tuple(x.shape[1:3] if is_last else x.shape[2:])


def _strides(
    network: nn.Module, channels: Sequence[int], size: tuple[int, int]
) -> tuple[list[int], bool]:
    """Return the strides of the maps, and whether channels come last; raise if they are none."""
    maps = _compute(network, size)
    is_last = all(m.shape[1] != c and m.shape[-1] == c for m, c in zip(maps, channels, strict=True))
    strides = []
    for x in maps:
        found = _size_of(x, is_last)
        stride = round(size[0] / found[0])
        # One pixel of the map more or less is a matter of rounding.
        if any(abs(n * stride - side) > stride for n, side in zip(found, size, strict=True)):
            raise ValueError(
                f"a map of an image of {size[0]} x {size[1]} is {found[0]} x {found[1]}: it does "
                "not cover the image evenly"
            )
        strides.append(stride)
    return strides, is_last


def flat_name(name: str) -> str:
    """Return a name of a parameter as it is in a whole network and in its feature maps alike.

    What gives the feature maps changes names: stages.0 becomes stages_0, model.stages.0 or
    body.stages.0.
    """
    return re.sub(r"^(model|body)\.", "", name).replace(".", "_")


def _layers(network: nn.Module, whole: nn.Module, features: Features) -> list[Layer]:
    """Return the parameters of feature maps by depth.

    A parameter is of the stage of the first map that depends on it. Within a stage blocks are those
    by which timm decays rates; a network that has none there is one block a stage.
    """
    stages = _stages(network, features)
    depths = _depths(whole, list(stages))
    # The stem is what comes before the first block of the first stage.
    start = min(depth for key, depth in depths.items() if stages[key] == 1)
    layers: dict[tuple[int, float], list[str]] = {}
    for key, stage in stages.items():
        is_stem = stage == 1 and depths[key] == start
        layers.setdefault((0 if is_stem else stage, depths[key]), []).append(f"network.{key}")
    return [Layer(stage, tuple(names)) for (stage, _), names in sorted(layers.items())]


def _stages(network: nn.Module, features: Features) -> dict[str, int]:
    """Return name of a parameter -> 1 to 4 for the first map that depends on it, 4 if none does."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    down, across = (-(-32 // n) * n for n in features.multiple)
    size = features.size or (2 * down, 3 * across)
    found: dict[str, int] = {}
    seen: set[Any] = set()
    for stage, x in enumerate(_compute(network, size), start=1):
        nodes = [x.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if (parameter := getattr(node, "variable", None)) is not None:  # a leaf of the graph
                found[names[parameter]] = stage
    return {name: found.get(name, NUM_MAPS) for name in names.values()}


def _depths(whole: nn.Module, names: Sequence[str]) -> dict[str, float]:
    """Return name of a parameter -> number of its group in timm; 0 for the first and if unknown."""
    import timm

    groups: dict[str, int] = {}
    if hasattr(whole, "group_matcher"):
        matcher: Any = whole.group_matcher(coarse=False)  # type: ignore[operator]
        groups = timm.models.group_parameters(whole, matcher, reverse=True)
    by_name = {flat_name(name): depth for name, depth in groups.items()}
    depths: dict[str, float] = {name: by_name.get(flat_name(name), 0) for name in names}
    # What is registered before a block is no deeper: timm matches no register token, for one.
    deepest = max(depths.values())
    for name in reversed(names):
        deepest = depths[name] = min(depths[name], deepest)
    return depths
