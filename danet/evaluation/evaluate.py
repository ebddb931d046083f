"""The evaluation loop, and the base of the inference modes that it runs.

The base lies outside of the modules whose classes a config may name.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.metrics import ConfusionMatrix
from danet.evaluation.sliding_window import PIXELS_PER_PASS, Piece, Windows, as_pieces, sum_maps
from danet.ops.arithmetic import cuda_arithmetic, require_tf32, without_autocast
from danet.types import IGNORE, Batch

Precision = Literal["float32", "tf32", "bfloat16"]
"""In which a network computes; logits are summed and compared in float32 always."""


class Counter(Protocol):
    """Counts pixels of logits or probabilities (B, K, H, W) with their labels (B, H, W)."""

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None: ...  # noqa: D102


@dataclass(kw_only=True, eq=False)
class Inference(ABC):
    """Base of the inference modes, which define ``bands``.

    ``precision`` is that of the network's operations, whatever its training used.
    """

    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            expected = ", ".join(get_args(Precision))
            raise ValueError(f"precision={self.precision!r} is not one of {expected}")

    @abstractmethod
    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities from top to bottom, (B, K, rows, W) each."""

    @torch.no_grad()
    def __call__(self, model: nn.Module, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to probabilities (B, K, H, W)."""
        return sum_maps([self.bands(model, image)], image.shape[2])

    def pieces(self, model: nn.Module, image: Tensor) -> Iterator[Piece]:
        """Yield what ``bands`` does, or what gives the same classes in less time or memory."""
        return as_pieces(self.bands(model, image))

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        image: Tensor,
        mask: Tensor | None = None,
        counters: Sequence[Counter] = (),
    ) -> Tensor:
        """Predict the most probable classes of images (B, 3, H, W).

        They are uint8 (B, H, W), or int32 with more than 255 classes. ``counters`` count the pixels
        of a mask of that type and shape.
        """
        classes = image.new_empty((image.shape[0], *image.shape[2:]), dtype=torch.uint8)
        for piece in self.pieces(model, image):
            if piece.scores.shape[1] > IGNORE:
                classes = classes.int()  # a copy before the first piece alone
            # On a CPU argmax takes four times as long.
            classes[piece.place] = piece.scores.max(dim=1).indices
            if mask is not None:
                for counter in counters:
                    counter.update(piece.scores, mask[piece.place], are_logits=piece.are_logits)
        return classes

    def logits(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute float32 logits (B, K, h, w) of (B, 3, h, w), whatever the caller's settings."""
        device = image.device.type
        is_half = self.precision == "bfloat16"
        mixed = torch.autocast(device, torch.bfloat16) if is_half else without_autocast(device)
        is_tf32 = self.precision == "tf32"
        if is_tf32:
            require_tf32(image.device, "evaluation.precision")
        # Windows and scales have many sizes, each of which a benchmark would time.
        with cuda_arithmetic(tf32=is_tf32, benchmark=False), mixed:
            logits: Tensor = model(image).logits
        return logits.float()


@dataclass(kw_only=True, eq=False)
class WindowInference(Inference):
    """Base of the modes that run ``probabilities`` on the windows of an image, or on all of it."""

    flip: bool = False
    windows: Windows = field(init=False)

    def bands(self, model: nn.Module, image: Tensor) -> Iterator[Tensor]:
        """Yield the probabilities from top to bottom, (B, K, rows, W) each."""
        return self.windows.bands(partial(self.probabilities, model), image)

    def pieces(self, model: nn.Module, image: Tensor) -> Iterator[Piece]:
        """Yield what ``bands`` does; of wide images in strips of columns."""
        return self.windows.pieces(partial(self.probabilities, model), image)

    def probabilities(self, model: nn.Module, image: Tensor) -> Tensor:
        """Compute the probabilities (B, K, h, w) of images or windows (B, 3, h, w)."""
        if not self.flip:
            return self.logits(model, image).softmax(dim=1)
        both = image, image.flip(-1)
        if 2 * image.shape[0] * image.shape[2] * image.shape[3] <= PIXELS_PER_PASS:
            total, other = self.logits(model, torch.cat(both)).softmax(dim=1).chunk(2)
        else:
            total, other = (self.logits(model, x).softmax(dim=1) for x in both)
        # In place: a map of all classes is the largest tensor here.
        return total.add_(other.flip(-1)).div_(2)


@torch.inference_mode()
def predict(
    fused: nn.Module,
    batches: Iterable[list[Batch]],
    infer: Inference,
    *,
    device: torch.device,
    counters: Sequence[Counter] = (),
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield for every image the predicted classes and the label, (H, W), and the name.

    The network is one of ``fuse_for_inference``. ``counters`` count the pixels of every image.
    """
    for group in batches:
        for batch in group:
            # One image at a time: kernels may round otherwise for another batch size, and a score
            # would depend on it.
            images = batch.image.to(device, non_blocking=True).split(1)  # (1, 3, H, W) each
            masks = batch.mask.to(device, non_blocking=True).split(1)  # (1, H, W) each
            for image, mask, name in zip(images, masks, batch.name, strict=True):
                yield infer.predict(fused, image, mask, counters)[0], mask[0], name


def evaluate(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    infer: Inference,
    *,
    num_classes: int,
    device: torch.device,
    counters: Sequence[Counter] = (),
) -> ConfusionMatrix:
    """Return the confusion matrix of all batches, at the size of the labels; see ``predict``.

    The network is put into eval mode and left there; a faster copy of it computes the predictions.
    On one device the numbers during training and afterwards are equal, bit by bit.
    """
    confusion = ConfusionMatrix(num_classes, device)
    fused = fuse_for_inference(model.eval(), device)
    for classes, mask, _ in predict(fused, batches, infer, device=device, counters=counters):
        confusion.update(classes, mask)
    return confusion
