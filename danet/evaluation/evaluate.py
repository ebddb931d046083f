"""The evaluation loop."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from danet.evaluation.fuse import fuse_for_inference
from danet.evaluation.inference import Inference
from danet.evaluation.metrics import ConfusionMatrix
from danet.types import Batch


class Prediction(NamedTuple):
    """What a network says about one image, beside what is true."""

    classes: Tensor
    """uint8 (H, W), class indices, at the image's own size."""
    mask: Tensor
    """uint8 (H, W), on the same device."""
    name: str


@torch.inference_mode()
def predict(
    model: nn.Module, batches: Iterable[list[Batch]], infer: Inference, *, device: torch.device
) -> Iterator[Prediction]:
    """Yields the prediction for every image, in float32.

    The network is put into eval mode and left there; what runs is a quicker copy of it, the same
    function (see ``speed.prepared``). Mixed precision is not used, and images pass one at a time,
    since kernels may round otherwise for another batch: a number of the same device is the same
    during training and afterwards, to the last digit.
    """
    model.eval()
    quick = fuse_for_inference(model, device)
    for group in batches:
        for batch in group:
            images = batch.image.to(device, non_blocking=True).split(1)
            masks = batch.mask.to(device, non_blocking=True)
            for image, mask, name in zip(images, masks, batch.name, strict=True):
                yield Prediction(infer.predict(quick, image)[0], mask, name)


def evaluate(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    infer: Inference,
    *,
    num_classes: int,
    device: torch.device,
) -> ConfusionMatrix:
    """Counts what a network predicts for all batches, at the labels' own size; see ``predict``."""
    confusion = ConfusionMatrix(num_classes, device)
    for prediction in predict(model, batches, infer, device=device):
        confusion.update(prediction.classes, prediction.mask)
    return confusion
