"""Weights for a network of timm from a local file: timm's names, or those of the publisher."""

import inspect
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danet.checkpoint.weights import fitting, read_state_dict
from danet.distributed import collectives
from danet.errors import InputError, first_line
from danet.models.timm_features import create, flat_name

_KINDS = ("weight", "bias", "running_mean", "running_var")
"""Last parts of names that say what a tensor is; others differ between programs."""


def load_weights(network: nn.Module, name: str, path: Path, sizes: Mapping[str, Any]) -> None:
    """Fill the feature maps of a network from a file of its weights.

    The names may be timm's; those of a publisher that timm converts, such as Meta's for DINOv2 and
    DINOv3 or Microsoft's for Swin; or any, as long as the tensors are those of timm's network in
    its order, such as torchvision's for EfficientNet. Position embeddings are resized.

    Args:
        network: The feature maps.
        name: Of the network.
        path: Of the file: torch's or safetensors.
        sizes: Arguments of ``timm.create_model`` that decide the shapes of tensors.

    Raises:
        InputError: It cannot be read or does not fit.
    """
    source = f"model.backbone.weights={path}"
    if name.startswith("tf_efficientnet_lite") and not path.exists():
        # The script knows a network by its name without the tag of its training.
        where = f"name={name.partition('.')[0]} {shlex.quote(f'output={path}')}"
        fetch = f"python scripts/fetch_weights.py {where}"
        raise InputError(f"{source}: there is no such file; `{fetch}` fetches it")
    found = read_state_dict(path, "model.backbone.weights")
    whole = create(name, **sizes)
    known = whole.state_dict()
    named, problem = _converted(found, name, whole)
    notes = []
    if known.keys().isdisjoint(named) and (ordered := _in_order(found, known)):
        named, problem = ordered, ""
        notes.append(f"all {len(named)} tensors taken, in order, since their names are not timm's")
    if problem:
        raise InputError(
            f"{source}: these are no weights of {name} ({problem}); give a file of this network, "
            "or the network of the file in model.backbone.name"
        )
    if rest := [key for key in named if key not in known]:
        more = f" and {len(rest) - 5} more" * (len(rest) > 5)
        notes.append(f"left out, of no part of {name}: {', '.join(rest[:5])}{more}")
    flat = {flat_name(key): value for key, value in named.items() if key in known}
    expected, trained = network.state_dict(), dict(network.named_parameters())
    state = {key: flat[flat_name(key)] for key in expected if flat_name(key) in flat}
    for key, value in expected.items():  # tables that timm computes
        if key not in trained and not key.endswith(("running_mean", "running_var")):
            state.setdefault(key, value)
    network.load_state_dict(fitting(expected, state, source))
    if collectives.is_first():
        for note in notes:
            print(f"{source}: {note}", flush=True)


def _converted(
    found: Mapping[str, Tensor], name: str, whole: nn.Module
) -> tuple[dict[str, Tensor], str]:
    """Return tensors with timm's names, converted from those that its module knows; and a problem.

    The problem is empty if there is none.
    """
    import timm

    module = sys.modules[timm.models.model_entrypoint(name.partition(".")[0]).__module__]
    converters = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
    convert = next((vars(module)[c] for c in converters if c in vars(module)), None)
    if convert is None:
        return dict(found), ""
    takes_network = len(inspect.signature(convert).parameters) > 1
    try:
        # Of networks without a bias it prints every bias that a file lacks.
        with redirect_stdout(StringIO()):
            return convert(dict(found), *[whole] * takes_network), ""
    except Exception as error:  # of a file of another network, anything
        return {}, first_line(error)


def _in_order(found: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of the same place in ``known``; {} if any differs."""
    # Counters and tables of indices are whole numbers, and each program has others.
    theirs, ours = ([k for k, v in of.items() if v.is_floating_point()] for of in (found, known))
    if len(theirs) != len(ours):
        return {}
    named = {}
    for old, new in zip(theirs, ours, strict=True):
        value, shape = found[old], known[new].shape
        # A scale per channel is (C,) or (C, 1, 1).
        if value.squeeze().shape != known[new].squeeze().shape or _kind(old) != _kind(new):
            return {}
        named[new] = value.reshape(shape)
    return named


def _kind(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if last in _KINDS else ""
