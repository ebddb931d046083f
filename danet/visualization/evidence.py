"""Attention as evidence: the deletion test of position attention.

Does the prediction at a point depend on the positions that it attends to most?
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danet.errors import InputError
from danet.ops.attention import PositionAttention
from danet.visualization.attention import as_tensor, attention_branches, spread


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
    before = head(features)["main"][0].flatten(1).softmax(dim=0).cpu()  # (K, N)
    chosen = list(_points(before.argmax(dim=0), points))
    probability = _Probability(head, features)
    generator, found = torch.Generator().manual_seed(seed), list[Deletion]()
    for cell, index in chosen:
        weights = probability.weights(cell)
        whole = probability(cell, index, weights.new_empty(0, dtype=torch.long))
        removals = {}
        for name, places in _choose(weights, share, generator).items():
            fall = whole - probability(cell, index, places)
            removals[name] = Removal(len(places), float(weights[places].sum()), fall)
        found.append(Deletion(index, whole, **removals))
    return found


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


class _Probability:
    """The probability of a class at a cell, without the values of some positions.

    It depends on the attention at the cell and its eight neighbours alone, since a 3x3 convolution
    follows: only that patch of the maps is computed again. ``head`` is changed by it.
    """

    def __init__(self, head: Any, features: Tensor) -> None:
        self.head = head
        # What is given, of the whole map, (C, N + 1): the last is of what lies outside, zero.
        self.maps: dict[_Given, Tensor] = {}
        x = features
        if isinstance(getattr(head, "shared", None), nn.Sequential):
            head.shared = self._given(x := head.shared(x))
        self.attended: _Given
        for name in ("channel", "position"):
            if (branch := getattr(head, name, None)) is not None:
                reduced = branch.reduce(x)
                if not isinstance(branch.reduce, nn.Identity):
                    branch.reduce = self._given(reduced)
                attention = branch.attention
                branch.attention = self.attended = self._given(attention(reduced))
        query, key = attention.project(reduced)
        self.query, self.key = query[0], key[0]
        self.value = attention.gamma * attention.value(reduced)[0].flatten(1).T  # (N, C)
        # Weights of the unary term, which all rows share.
        shared = attention.unary(reduced).flatten().softmax(0) if attention.unary else None
        self.shared = self.value.new_zeros(len(self.value)) if shared is None else shared
        numbers = torch.arange(1.0, len(self.value) + 1).view(1, 1, *features.shape[2:])
        # Of each cell with its neighbours, (9, N); -1 for those outside of the map.
        self.patches = F.unfold(numbers, 3, padding=1)[0].long().to(features.device) - 1

    def _given(self, found: Tensor) -> "_Given":
        module = _Given()
        self.maps[module] = F.pad(found[0].flatten(1), (0, 1))
        return module

    def weights(self, cell: int) -> Tensor:
        """Return the attention of a cell to the N positions, float64 (N,), without registers."""
        return self._rows(self.query[cell]).double().cpu()

    def _rows(self, query: Tensor) -> Tensor:
        return (query @ self.key.T).softmax(dim=-1)[..., : len(self.value)]

    def __call__(self, cell: int, index: int, removed: Tensor) -> float:
        """Return the probability of class ``index`` at a cell."""
        around = self.patches[:, cell]  # (9,)
        for module, whole in self.maps.items():
            module.found = whole[:, around].view(1, -1, 3, 3)
        lost = (self._rows(self.query[around]) + self.shared)[:, removed] @ self.value[removed]
        lost = torch.where(around[:, None] < 0, 0, lost)  # (9, C)
        self.attended.found = self.attended.found - lost.T.view_as(self.attended.found)
        logits = self.head(self.attended.found)["main"][0, :, 1, 1]
        return float(logits.softmax(dim=0)[index])


class _Given(nn.Module):
    found: Tensor

    def forward(self, _: Tensor) -> Tensor:
        """Return what was found, whatever the input."""
        return self.found
