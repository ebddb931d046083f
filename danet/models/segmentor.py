"""A whole network: normalisation, backbone, head and optional auxiliary head."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danet.bands import Bands, bands_of
from danet.errors import InputError
from danet.ops.resize import resize
from danet.types import SegmentationOutput

HeadFactory = Callable[[int], nn.Module]
"""Creates a head for a number of input channels."""
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Segmentor(nn.Module):
    """Network from images to logits: at image size in eval mode, at the head's in training.

    Upsampled logits would be the largest tensors of a training step, so the losses upsample them
    piece by piece. Mean and std of the images are buffers, so a checkpoint is complete and the
    input is raw pixels.

    Args:
        backbone: Image to feature maps, finest first; has ``channels``, one number per map.
        head: Called with the channels of the last map; returns logits with the key "main".
        auxiliary_head: Called with the channels of the last but one map; its logits are named
            "backbone". None, as in the released code, for no such head.
        mean, std: Of the RGB values 0..255; by default those of the backbone, else ImageNet's.
        channels, range, rgb: Of ``data``: the bands of an image, see ``danet.bands``; the buffers
            mean and std are of their raw values. None for RGB of 8 bits.
        align_corners: How logits are resized in eval mode; True as in the authors' code.
    """

    classes: tuple[str, ...]  # with the palette set by danet.load_model
    palette: tuple[tuple[int, ...], ...]
    temperature = 1.0  # of a calibrated checkpoint: probabilities are softmax(logits / temperature)
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
        channels: Any = None,
        range: Any = None,
        rgb: Any = None,
    ) -> None:
        super().__init__()
        mean = mean if mean is not None else vars(backbone).get("mean", IMAGENET_MEAN)
        std = std if std is not None else vars(backbone).get("std", IMAGENET_STD)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean={list(mean)} and std={list(std)}: three numbers each, std > 0")
        self.bands = bands_of(channels, range, rgb)
        if self.bands:
            take_bands(backbone, self.bands)
            roles, (low, high) = self.bands.roles, np.array(self.bands.limits).T  # (3, N), (N,)
            roles[:, ~roles.any(axis=0)] = 1  # of a band that is none of RGB the average
            mix, unit = (roles / roles.sum(axis=0)).T, (high - low) / 255
            mean, std = (low + mix @ mean * unit).tolist(), (mix @ std * unit).tolist()
        self.backbone = backbone
        widths: list[int] = backbone.channels  # type: ignore[assignment]
        self.head = head(widths[-1])
        self.auxiliary_head = auxiliary_head(widths[-2]) if auxiliary_head else None
        self.align_corners = align_corners
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def normalise(self, image: Tensor) -> Tensor:
        """Maps raw values, uint8 or float (B, N, H, W), to zero mean and unit variance."""
        # Here, not in the loader: uint8 batches have a quarter of the bytes.
        return (image.to(self.mean.dtype) - self.mean) / self.std  # type: ignore[operator, arg-type]

    def example(self, *size: int) -> Tensor:
        """Return a batch (B, N, H, W) of any values, in the type of those that are trained on."""
        is_byte = self.bands is None or self.bands.is_8_bit
        dtype = torch.uint8 if is_byte else torch.float32
        return torch.empty(size[0], len(self.mean), *size[1:], dtype=dtype)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> SegmentationOutput:
        """Maps (B, N, H, W), raw bands or RGB in 0..255, to logits (see SegmentationOutput)."""
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
        count = len(self.mean)  # type: ignore[arg-type]
        is_image = is_tensor and image.ndim == 4 and image.shape[1] == count
        if not is_image or 0 in image.shape or not (is_float or image.dtype == torch.uint8):
            found = f"{image.dtype} {tuple(image.shape)}" if is_tensor else type(image).__name__
            kind = "RGB images (B, 3, H, W), uint8 or float in 0..255"
            if self.bands:
                kind = f"raw values of {count} band(s), uint8 or float (B, {count}, H, W)"
            raise ValueError(
                f"found {found}, expected {kind}; danet.predict(model, image) takes other forms"
            )
        # A step must not wait for a device; fake tensors, a subclass, have no values to look at.
        is_fake = image.is_meta or type(image) is not Tensor
        if self.training or self._is_range_known or not is_float or is_fake or self.bands:
            return
        low, high = (bound.item() for bound in image.detach().aminmax())
        is_scaled = 0 < high <= 1 or (low < 0 and high < 4)
        self._is_range_known = is_scaled or image.is_cuda  # on a CPU looking again is cheap
        if is_scaled:
            text = f"the pixels are in {low:.3g}..{high:.3g}, and the network, which normalises"
            warnings.warn(f"{text} them itself, expects 0..255: pass them unscaled", stacklevel=5)


def take_bands(backbone: nn.Module, bands: Bands) -> None:
    """Give the convolutions of RGB, the first of a backbone, an input for each band.

    A band gets the weights of its colour, or the sum of several. Others get zeros: the network
    starts as that of RGB, whatever they hold, and learns to use them from the first step on, since
    a gradient does not depend on the weight. Raises InputError for a backbone that cannot.
    """
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3]
    # Some networks normalise the weights of a convolution: zeros would change all others.
    if not convs or any(conv.groups > 1 or "Std" in type(conv).__name__ for conv in convs):
        where = "data.channels: this backbone has no plain convolution of RGB at its start"
        raise InputError(f"{where} that could take other bands; choose another model/backbone")
    unread = np.array(bands.channels)[~bands.roles.any(axis=0)].tolist()
    if unread and not all(conv.weight.requires_grad for conv in convs):
        raise InputError(
            f"model.backbone.freeze: the stem is frozen, so bands {unread} would never be read; "
            "set model.backbone.freeze=none, or leave them out of data.channels"
        )
    for conv in convs:
        roles = torch.from_numpy(bands.roles).to(conv.weight)  # (3, N)
        weight = torch.einsum("oshw,sc->ochw", conv.weight.detach(), roles).contiguous()
        conv.weight = nn.Parameter(weight, conv.weight.requires_grad)
        conv.in_channels = len(bands.channels)
