"""A whole network: normalisation, backbone, head and optional auxiliary head."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from danet.ops.resize import resize
from danet.types import SegmentationOutput

MakeHead = Callable[[int], nn.Module]
"""Makes a head for a number of input channels."""

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Segmentor(nn.Module):
    """Maps RGB images to logits: of their own size in eval mode, of the head's in training.

    Upsampled logits would be the largest tensors of a training step, so the losses upsample them.

    It carries the mean and std of its images as buffers, so a checkpoint is complete and a user of
    the network passes pixels as they are.

    Args:
        backbone: Image to feature maps, finest first; has ``channels``, one number per map.
        head: Called with the channels of the last map; must give logits named "main".
        auxiliary_head: Called with the channels of the last but one map; its logits are named
            "backbone". None, as in the released code, for no such head.
        mean, std: Of the RGB values 0..255; by default those the backbone names, else ImageNet's.
        align_corners: How logits are resized in eval mode; True as the authors'.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: MakeHead,
        auxiliary_head: MakeHead | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        align_corners: bool = True,
    ) -> None:
        super().__init__()
        mean = mean if mean is not None else vars(backbone).get("mean", IMAGENET_MEAN)
        std = std if std is not None else vars(backbone).get("std", IMAGENET_STD)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={list(mean)} and std={list(std)}: three numbers each, std > 0")
        self.backbone = backbone
        channels: list[int] = backbone.channels  # type: ignore[assignment]
        self.head = head(channels[-1])
        self.auxiliary_head = auxiliary_head(channels[-2]) if auxiliary_head else None
        self.align_corners = align_corners
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1))

    def normalise(self, image: Tensor) -> Tensor:
        """Maps uint8 or float RGB in 0..255 to zero mean and unit variance."""
        return (image.to(self.mean.dtype) - self.mean) / self.std  # type: ignore[operator, arg-type]

    def features(self, image: Tensor) -> Tensor:
        """Maps (B, 3, H, W) to the feature map that enters the head."""
        return self.backbone(self.normalise(image))[-1]

    def forward(self, image: Tensor) -> SegmentationOutput:
        """Maps (B, 3, H, W), uint8 or float RGB in 0..255, to logits (see SegmentationOutput)."""
        maps = self.backbone(self.normalise(image))
        if not (self.training and self.auxiliary_head is not None):
            del maps[:-1]  # a third of a gigabyte at 1024 x 2048 that the head need not wait for
        logits: dict[str, Tensor] = self.head(maps[-1])
        main = logits.pop("main")
        if not self.training:
            size = (image.shape[-2], image.shape[-1])
            return SegmentationOutput(resize(main, size, align_corners=self.align_corners), {})
        if self.auxiliary_head is not None:
            logits["backbone"] = self.auxiliary_head(maps[-2])["main"]
        return SegmentationOutput(main, logits)
