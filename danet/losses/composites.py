"""Sums of losses, and the losses of all outputs of a network."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from danet.losses.parts import Part, divisors_of, mean_of, parts_of, pixel_parts_of, require_finite
from danet.losses.pixels import CrossEntropy
from danet.types import SegmentationOutput


class WeightedSum(nn.Module):
    """Weighted sum of losses: ``sum_i weights[i] * losses[i](logits, mask)``."""

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if len(losses) != len(weights):
            raise ValueError(f"{len(losses)} losses and {len(weights)} weights")
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(weights)

    def forward(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> Tensor:
        """Maps (B, K, h, w) and (B, H, W) to a scalar."""
        return mean_of(self.parts(logits, mask, align_corners=align_corners))

    def parts(self, logits: Tensor, mask: Tensor, *, align_corners: bool = True) -> list[Part]:
        """Return the weighted parts of all losses."""
        found = (parts_of(loss, logits, mask, align_corners=align_corners) for loss in self.losses)
        return self._weighted(found)

    def pixel_parts(self, logits: Tensor, mask: Tensor) -> list[Part]:
        """Return the weighted parts of the losses that are sums over pixels; not of regions."""
        return self._weighted(pixel_parts_of(loss, logits, mask) for loss in self.losses)

    def _weighted(self, found: Iterable[list[Part]]) -> list[Part]:
        pairs = zip(self.weights, found, strict=True)
        return [part._replace(factor=w * part.factor) for w, parts in pairs for part in parts]

    def divisors(self, mask: Tensor, num_classes: int) -> list[Tensor] | None:
        """Return the divisors of all losses; None if one of them depends on the logits."""
        found = [divisors_of(loss, mask, num_classes) for loss in self.losses]
        return None if None in found else [d for divisors in found for d in divisors or ()]


class CrossEntropyPlus(WeightedSum):
    """``weights[0] * CrossEntropy(class_weights, label_smoothing) + weights[1] * other``."""

    def __init__(
        self,
        other: nn.Module,
        class_weights: Sequence[float] | None = None,
        *,
        label_smoothing: float = 0.0,
        weights: Sequence[float] = (1.0, 1.0),
    ) -> None:
        cross_entropy = CrossEntropy(class_weights, label_smoothing=label_smoothing)
        super().__init__([cross_entropy, other], weights)


class DeepSupervision(nn.Module):
    """Losses of all outputs of a network (section 3.4; equal weights in the authors' code).

    Args:
        main: The loss of the prediction, with weight 1.
        auxiliary: The loss of the other outputs; ``main`` again if None.
        weights: Of the other outputs by name. A name without an output is ignored; an output
            without a weight is an error.
        align_corners: How logits are upsampled to the mask; the same as in evaluation.
    """

    def __init__(
        self,
        main: nn.Module,
        auxiliary: nn.Module | None = None,
        weights: Mapping[str, float] | None = None,
        *,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.main = main
        self.auxiliary = auxiliary if auxiliary is not None else main
        self.weights = dict(weights or {})
        require_finite({f"weights.{name}": weight for name, weight in self.weights.items()})

    def forward(self, output: SegmentationOutput, mask: Tensor) -> dict[str, Tensor]:
        """Return weighted scalars by output name; their sum is the loss."""
        return {name: mean_of(parts) for name, parts in self.parts(output, mask).items()}

    def parts(self, output: SegmentationOutput, mask: Tensor) -> dict[str, list[Part]]:
        """Return the weighted parts of each output by name."""
        parts = partial(parts_of, mask=mask, align_corners=self.align_corners)
        terms = {"main": parts(self.main, output.logits)}
        for name, logits in output.auxiliary.items():
            if name not in self.weights:
                raise ValueError(
                    f"loss.weights has no entry for the output {name!r} of the network, only "
                    f"{', '.join(self.weights) or 'none'}"
                )
            found, weight = parts(self.auxiliary, logits), self.weights[name]
            terms[name] = [part._replace(factor=weight * part.factor) for part in found]
        return terms

    def pixel_parts(self, logits: Tensor, mask: Tensor) -> list[Part]:
        """Return the parts of the main loss for an evaluation; see CrossEntropy.

        Where it has none they are those of the plain cross entropy.
        """
        return pixel_parts_of(self.main, logits, mask) or CrossEntropy().parts(logits, mask)

    def divisors(self, mask: Tensor, num_classes: int) -> dict[str, list[Tensor]] | None:
        """Return those of ``parts`` as losses do, for all weighted outputs, present or not."""
        losses = self.main, self.auxiliary
        main, others = (divisors_of(loss, mask, num_classes) for loss in losses)
        if main is None or others is None:
            return None
        return {**dict.fromkeys(self.weights, others), "main": main}
