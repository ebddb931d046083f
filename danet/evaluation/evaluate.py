"""The evaluation loop."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from danet.evaluation.base import Inference
from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.metrics import ConfusionMatrix
from danet.types import Batch


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[list[Batch]], infer: Inference, *, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """Yield for every image the predicted classes and the label, uint8 (H, W), and the name.

    The network is put into eval mode and left there; a faster copy of it computes the predictions
    (see ``fuse_for_inference``). On one device the numbers during training and afterwards are
    equal, bit by bit.
    """
    model.eval()
    fused = fuse_for_inference(model, device)
    for group in batches:
        for batch in group:
            # One image at a time: kernels may round otherwise for another batch size, and a score
            # would depend on it.
            images = batch.image.to(device, non_blocking=True).split(1)  # (1, 3, H, W) each
            masks = batch.mask.to(device, non_blocking=True)
            for image, mask, name in zip(images, masks, batch.name, strict=True):
                yield infer.predict(fused, image)[0], mask, name


def evaluate(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    infer: Inference,
    *,
    num_classes: int,
    device: torch.device,
) -> ConfusionMatrix:
    """Return the confusion matrix of all batches, at the size of the labels; see ``predict``."""
    confusion = ConfusionMatrix(num_classes, device)
    for classes, mask, _ in predict(model, batches, infer, device=device):
        confusion.update(classes, mask)
    return confusion
