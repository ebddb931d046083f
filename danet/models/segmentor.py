"""A whole network: normalisation, backbone, head and optional auxiliary head."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from danet.ops.resize import resize
from danet.types import SegmentationOutput

HeadFactory = Callable[[int], nn.Module]
"""Creates a head for a number of input channels."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Segmentor(nn.Module):
    """Network from RGB images to logits: at image size in eval mode, at the head's in training.

    Upsampled logits would be the largest tensors of a training step, so the losses upsample them
    piece by piece. Mean and std of the images are buffers, so a checkpoint is complete and the
    input is raw pixels.

    Args:
        backbone: Image to feature maps, finest first; has ``channels``, one number per map.
        head: Called with the channels of the last map; returns logits with the key "main".
        auxiliary_head: Called with the channels of the last but one map; its logits are named
            "backbone". None, as in the released code, for no such head.
        mean, std: Of the RGB values 0..255; by default those of the backbone, else ImageNet's.
        align_corners: How logits are resized in eval mode; True as in the authors' code.
    """

    classes: tuple[str, ...]  # with the palette set by danet.load_model
    palette: tuple[tuple[int, ...], ...]
    _is_range_known = False

    def __init__(
        self,
        backbone: nn.Module,
        head: HeadFactory,
        auxiliary_head: HeadFactory | None = None,
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
        """Maps uint8 or float RGB in 0..255, (B, 3, H, W), to zero mean and unit variance."""
        # Here, not in the loader: uint8 batches have a quarter of the bytes.
        return (image.to(self.mean.dtype) - self.mean) / self.std  # type: ignore[operator, arg-type]

    def forward(self, image: Tensor) -> SegmentationOutput:
        """Maps (B, 3, H, W), uint8 or float RGB in 0..255, to logits (see SegmentationOutput)."""
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # type: ignore[attr-defined]
            self._check(image)
        maps = self.backbone(self.normalise(image))
        if not (self.training and self.auxiliary_head is not None):
            del maps[:-1]  # frees a third of a gigabyte at 1024 x 2048 before the head runs
        logits: dict[str, Tensor] = self.head(maps[-1])  # (B, K, H/8, W/8) each
        main = logits.pop("main")
        if not self.training:
            # In half precision neighbouring classes would often have equal logits.
            main = main.to(torch.promote_types(main.dtype, torch.float32))
            fine = resize(main, image.shape[-2:], align_corners=self.align_corners)
            return SegmentationOutput(fine, {})
        if self.auxiliary_head is not None:
            logits["backbone"] = self.auxiliary_head(maps[-2])["main"]
        return SegmentationOutput(main, logits)

    def _check(self, image: Tensor) -> None:
        """Raise ValueError for what is no batch of images; warn once of pixels that are scaled."""
        is_tensor = isinstance(image, Tensor)  # a newcomer may pass a path or an array
        is_float = is_tensor and image.is_floating_point()
        is_image = is_tensor and image.ndim == 4 and image.shape[1] == 3 and 0 not in image.shape
        if not is_image or not (is_float or image.dtype == torch.uint8):
            found = f"{image.dtype} {tuple(image.shape)}" if is_tensor else type(image).__name__
            raise ValueError(
                f"found {found}, expected RGB images (B, 3, H, W), uint8 or float in 0..255; "
                "danet.predict(model, image) takes other forms, too"
            )
        # A step must not wait for a device; fake tensors, a subclass, have no values to look at.
        is_fake = image.is_meta or type(image) is not Tensor
        if self.training or self._is_range_known or not is_float or is_fake or not image.numel():
            return
        low, high = (bound.item() for bound in image.detach().aminmax())
        is_scaled = 0 < high <= 1 or (low < 0 and high < 4)
        self._is_range_known = is_scaled or image.is_cuda  # on a CPU looking again is cheap
        if is_scaled:
            text = f"the pixels are in {low:.3g}..{high:.3g}, and the network, which normalises"
            warnings.warn(f"{text} them itself, expects 0..255: pass them unscaled", stacklevel=5)
