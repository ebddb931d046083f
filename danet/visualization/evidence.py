"""Attention as evidence: the deletion test of position attention.

Does the prediction at a point depend on the positions that it attends to most?
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from danet.errors import InputError
from danet.ops.attention import PositionAttention
from danet.visualization.attention import as_tensor, attention_branches, spread

_VARIANTS = 16  # of the features, in a batch
_ELEMENTS = 2**28  # of the features of a batch: 1 GiB in float32


class Removal(NamedTuple):
    """What a point loses without the values of some positions."""

    places: int
    """Number of the positions."""
    mass: float
    """The point's attention to them, 0..1."""
    fall: float
    """Of the probability of the point's class, -1..1."""


class Deletion(NamedTuple):
    """The deletion test at one point; lists of several pictures can be added."""

    label: int
    """The class predicted at the point."""
    before: float
    """Its probability with all positions."""
    strongest: Removal | None = None
    """The strongest positions; None where registers leave them less than the share."""
    equal_count: Removal | None = None
    """As many random other positions; None where there are fewer."""
    equal_mass: Removal | None = None
    """Random other positions of the same mass; None where all of them together have less."""


@torch.inference_mode()
def deletion_test(
    model: nn.Module, features: Tensor, *, share: float = 0.25, points: int = 8, seed: int = 0
) -> list[Deletion]:
    """Remove the positions that points of a picture attend to most, and others in their place.

    A position is removed by setting its value to zero for all queries; the weights stay. Points are
    cells of the head's output.

    Args:
        model: In eval mode, with position attention in its head.
        features: Last map of the model's backbone for the picture, (1, C, h, w).
        share: The strongest positions are the fewest that have this share of a point's attention,
            of which registers may have a part.
        points: Of each predicted class at most, evenly spread over its cells.
        seed: Of the random positions.
    """
    if features.ndim != 4 or features.shape[0] != 1:
        raise ValueError(f"found features {tuple(features.shape)}, expected those of one picture")
    if not 0 < share < 1:
        raise ValueError(f"share={share} is not between 0 and 1")
    if "position" not in attention_branches(model):
        raise InputError("the head has no position attention to be tested")
    head: Any = copy.deepcopy(model.head)
    before = head(features)["main"][0].flatten(1).float().softmax(dim=0).cpu()  # (K, N)
    chosen = list(_points(before.argmax(dim=0), points))
    # What does not depend on the values is computed once: the largest convolutions among it.
    if isinstance(getattr(head, "shared", None), nn.Sequential):
        head.shared = _Given(head.shared(features))
        reduced = head.shared(features)
    else:
        for branch in map(head.get_submodule, attention_branches(model)):
            branch.reduce = _Given(branch.reduce(features))
        reduced = head.position.reduce(features)
    query, key = head.position.attention.project(reduced)
    energies = query[0, [cell for cell, _ in chosen]].float() @ key[0].float().T
    # Registers are behind the N positions: they take attention, but are not removed.
    weights = energies.double().softmax(dim=-1)[:, : before.shape[1]].cpu()  # (P, N)
    generator = torch.Generator().manual_seed(seed)
    cases = [
        (number, name, places)
        for number, row in enumerate(weights)
        for name, places in _choose(row, share, generator).items()
    ]
    falls = _falls(head, features, [(*chosen[number], places) for number, _, places in cases])
    found: list[dict[str, Removal]] = [{} for _ in chosen]
    for (number, name, places), fall in zip(cases, falls, strict=True):
        found[number][name] = Removal(len(places), float(weights[number, places].sum()), fall)
    return [
        Deletion(index, float(before[index, cell]), **removals)
        for (cell, index), removals in zip(chosen, found, strict=True)
    ]


def deletions_by_class(
    model: Any, images: Iterable[np.ndarray], names: Sequence[str], *, points: int = 8
) -> list[dict[str, Any]]:
    """Return rows of the test on pictures, which pass the network whole.

    There are none for a head without the position attention of DANet.
    """
    branch = attention_branches(model).get("position")
    if branch is None or not isinstance(branch.attention, PositionAttention):
        return []
    found = list[Deletion]()
    for image in images:
        with torch.inference_mode():
            features = model.backbone(model.normalise(as_tensor(image, model)))[-1]
        found += deletion_test(model, features, points=points)
    return as_rows(found, names)


def as_rows(deletions: Iterable[Deletion], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return means over the points of each class, for JSON.

    Random positions of equal mass do not exist for points with a sink of attention, which are
    ``skipped``; "matched" is the strongest positions at the others, to compare "equal_mass" with.
    """
    by_class: dict[int, list[Deletion]] = defaultdict(list)
    for deletion in deletions:
        by_class[deletion.label].append(deletion)
    return [
        {
            "class": names[index],
            "points": len(found),
            "skipped": sum(d.equal_mass is None for d in found),
            "before": sum(d.before for d in found) / len(found),
            "strongest": _means(d.strongest for d in found),
            "equal_count": _means(d.equal_count for d in found),
            "matched": _means(d.strongest for d in found if d.equal_mass),
            "equal_mass": _means(d.equal_mass for d in found),
        }
        for index, found in sorted(by_class.items())
    ]


def _means(removals: Iterable[Removal | None]) -> dict[str, float] | None:
    found = [removal for removal in removals if removal]
    if not found:
        return None
    columns = zip(Removal._fields, zip(*found, strict=True), strict=True)
    return {"points": len(found), **{name: sum(of) / len(found) for name, of in columns}}


def _points(predicted: Tensor, count: int) -> Iterator[tuple[int, int]]:
    """Yield cells of a prediction (N,) and their classes."""
    for index in predicted.unique().tolist():
        cells = (predicted == index).nonzero()[:, 0].tolist()
        yield from ((cells[number], index) for number in spread(len(cells), count))


def _choose(weights: Tensor, share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the positions to be removed for one point, by the fields of a Deletion."""
    order = weights.argsort(descending=True, stable=True)
    count = _reach(weights[order], share)
    strongest, others = order[:count], order[count:]
    if count > len(order):
        return {}
    others = others[torch.randperm(len(others), generator=generator)]
    equal = _reach(weights[others], float(weights[strongest].cumsum(dim=0)[-1]))
    places = {"strongest": strongest}
    for name, size in (("equal_count", count), ("equal_mass", equal)):
        if size <= len(others):
            places[name] = others[:size]
    return places


def _reach(weights: Tensor, mass: float) -> int:
    """Return how many weights have this sum, or one more than there are."""
    return int((weights.cumsum(dim=0) < mass).sum()) + 1


class _Given(nn.Module):
    def __init__(self, found: Tensor) -> None:
        super().__init__()
        self.found = found  # (1, C, h, w)

    def forward(self, x: Tensor) -> Tensor:
        """Maps anything of V variants to (V, C, h, w)."""
        return self.found.expand(x.shape[0], -1, -1, -1)


class _Keep(nn.Module):
    mask: Tensor  # (V, 1, h, w), 0 or 1

    def forward(self, values: Tensor) -> Tensor:
        """Maps (V, C, h, w) to the same shape."""
        return values * self.mask.to(values)


def _falls(head: Any, features: Tensor, cases: list[tuple[int, int, Tensor]]) -> Iterator[float]:
    """Yield how much the probability of a class at a cell falls without positions."""
    attention, keep = head.position.attention, _Keep()
    attention.value = nn.Sequential(attention.value, keep)
    size = max(2, min(_VARIANTS, _ELEMENTS // features.numel())) - 1
    for start in range(0, len(cases), size):
        cells, classes, removed = zip(*cases[start : start + size], strict=True)
        variants = len(cells) + 1  # the first with all positions, so that rounding is the same
        keep.mask = torch.ones(variants, 1, *features.shape[2:])
        for mask, places in zip(keep.mask[1:], removed, strict=True):
            mask.view(-1)[places] = 0
        logits = head(features.expand(variants, -1, -1, -1))["main"].flatten(2)
        at = logits[:, :, list(cells)].float().softmax(dim=1)  # (V, K, V - 1)
        number = torch.arange(len(cells))
        probability = at[:, list(classes), number].cpu()  # (V, V - 1)
        yield from (probability[0] - probability[number + 1, number]).tolist()
