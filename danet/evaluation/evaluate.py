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

    The network is put into eval mode and left there. Mixed precision is not used, so that a number
    of the same device is the same during training and afterwards.
    """
    model.eval()
    confusion = ConfusionMatrix(num_classes, device)
    for group in batches:
        for batch in group:
            image = batch.image.to(device, non_blocking=True)
            prediction = infer(model, image).argmax(dim=1)
            confusion.update(prediction, batch.mask.to(device, non_blocking=True))
    return confusion
