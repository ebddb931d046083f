"""Backbones from timm: hundreds of networks, many trained better than torchvision's ResNets."""

from collections.abc import Sequence
from operator import gt
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, compiler, nn

from danet.errors import InputError, first_line
from danet.extras import require
from danet.models.finetuning import Freeze, Layer, freeze_stages, keep_in_eval
from danet.models.pyramid import Pyramid, cut
from danet.models.timm_features import NUM_MAPS, Features, choose_features
from danet.models.timm_weights import load_weights


class TimmBackbone(nn.Module):
    """A network of timm, reduced to its feature maps.

    A network that timm can dilate gives its last map at ``output_stride``; of all others a Pyramid
    brings the last map there. Vision transformers without stages give the tokens of four blocks.

    Args:
        name: Of the network in timm, with the tag of its weights: ``resnet50.a1_in1k``.
        output_stride: Pixels of the image per pixel of the last map: 4, 8, 16 or 32.
        dilate: Dilate the network if timm can; else bring its last map to ``output_stride`` by a
            Pyramid, which costs a fraction of it.
        weights: Initial weights: None for random ones, ``pretrained`` for those of the name
            (downloaded once), or the path of a file, see ``timm_weights``.
        image_size: Height and width of the images in training. Only networks that compute no
            other size use it; their position embeddings are resized to it.
        freeze, norm_eval: As in ResNet; a transformer without stages has a fourth of its blocks in
            each.
        drop_path: Probability with which a residual branch of the last block is dropped in
            training (stochastic depth, Huang et al., ECCV 2016); it grows linearly from the first.

    Attributes:
        channels: Of the feature maps, four at most.
        size: Height and width where the network computes images of one size only, else None.
        mean, std: Normalisation with which the weights were trained, of values 0..255.
        notes: What is special about the network, for the user, one line each.
    """

    def __init__(
        self,
        *,
        name: str,
        output_stride: int = 8,
        dilate: bool = True,
        weights: str | None = None,
        image_size: Sequence[int] | None = None,
        drop_path: float = 0.0,
        freeze: Freeze = "none",
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        require("timm")
        import timm

        if output_stride not in (4, 8, 16, 32):
            raise ValueError(f"output_stride={output_stride} is not 4, 8, 16 or 32")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path={drop_path} is not a probability in [0, 1)")
        if not timm.is_model(name):
            # Names of a family share their beginning.
            close = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:5]
            hint = f"; there are {', '.join(close)}" if close else ""
            raise InputError(f"model.backbone.name={name}: timm has no such network{hint}")
        stride = output_stride if dilate else None
        self.features = features = choose_features(
            name, output_stride=stride, image_size=image_size, drop_path=drop_path
        )
        try:
            self.network = timm.create_model(
                name, pretrained=weights == "pretrained", **features.arguments
            )
        except (OSError, RuntimeError) as error:
            if weights != "pretrained":
                raise
            raise InputError(
                f"model.backbone.weights=pretrained: {first_line(error)}; or fetch the file on "
                "another machine and set model.backbone.weights=FILE"
            ) from error
        if weights is not None and weights != "pretrained":
            sizes = {k: v for k, v in features.arguments.items() if k.endswith("img_size")}
            load_weights(self.network, name, Path(weights).expanduser(), sizes)
        self.channels, self.size = features.channels, features.size
        is_dilated = "output_stride" in features.arguments
        strides = features.strides
        self.pyramid = None if is_dilated else Pyramid(self.channels, strides, output_stride)
        self.notes = [] if is_dilated else [_note(name, features, output_stride)]
        trained: dict[str, Any] = self.network.pretrained_cfg  # type: ignore[assignment]
        # timm normalises images in 0..1.
        self.mean: Sequence[float] = [255 * value for value in trained["mean"]]
        self.std: Sequence[float] = [255 * value for value in trained["std"]]
        self.norm_eval = norm_eval
        freeze_stages(self, self.layers(), freeze)

    def layers(self) -> list[Layer]:
        """Return the parameters by depth: the stem, block after block, the pyramid."""
        new = tuple(name for name, _ in self.named_parameters() if name.startswith("pyramid."))
        return [*self.features.layers, Layer(5, new)]

    def train(self, mode: bool = True) -> "TimmBackbone":
        """Set training or eval mode; what is frozen stays in eval mode."""
        super().train(mode)
        if mode:
            keep_in_eval(self, norm_eval=self.norm_eval)
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 3, H, W) to up to four maps, finest first; the last has the output stride."""
        features = self.features
        size = x.shape[-2], x.shape[-1]
        if features.size and any(map(gt, size, features.size)):
            shown = "{} x {} only, and this one is {} x {}".format(*features.size, *size)
            strides = (2 * side // 3 for side in features.size)
            crop, stride = ("[{},{}]".format(*of) for of in (features.size, strides))
            raise InputError(
                f"the backbone computes images of {shown}: train on crops of that size, and score "
                f"with evaluation=sliding evaluation.crop={crop} evaluation.stride={stride}"
            )
        down, right = (-side % n for side, n in zip(size, features.multiple, strict=True))
        # Zero is the mean of normalised images.
        is_padded = compiler.is_exporting() or down or right  # a program takes any size
        maps = self.network(F.pad(x, (0, right, 0, down)) if is_padded else x)[-NUM_MAPS:]
        if features.channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        cuts = [cut(m, size, s) for m, s in zip(maps, features.strides, strict=True)]
        if self.pyramid is not None:
            cuts[-1] = self.pyramid(maps, size)
        return cuts


def _note(name: str, features: Features, output_stride: int) -> str:
    """Return a line on how a network that cannot be dilated gives its maps."""
    strides = ", ".join(map(str, features.strides))
    text = (
        f"model.backbone.name={name}: its maps have strides {strides}; a pyramid brings the last "
        f"to {output_stride}"
    )
    if features.size:
        return text + "; it computes images of {} x {} only".format(*features.size)
    multiple = features.multiple[0]
    padded = f"; images are padded to multiples of {multiple} pixels"
    return text + padded * (multiple > 1)
