"""The evaluation loop."""

from collections.abc import Iterable

import torch
from torch import nn

from danet.evaluation.confusion import ConfusionMatrix
from danet.evaluation.inference import Inference
from danet.types import Batch


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    infer: Inference,
    *,
    num_classes: int,
    device: torch.device,
) -> ConfusionMatrix:
    """Counts what a network predicts for all batches, in float32 and at the labels' own size.

    The network is put into eval mode and left there. Mixed precision is not used, and
    images pass one at a time, since kernels may round otherwise for another batch: a number of
    the same device is the same during training and afterwards, to the last digit.
    """
    model.eval()
    confusion = ConfusionMatrix(num_classes, device)
    for group in batches:
        for batch in group:
            images = batch.image.to(device, non_blocking=True).split(1)
            masks = batch.mask.to(device, non_blocking=True).split(1)
            for image, mask in zip(images, masks, strict=True):
                confusion.update(infer(model, image).argmax(dim=1), mask)
    return confusion
