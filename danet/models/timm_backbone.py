"""Backbones from timm: hundreds of networks, many trained better than torchvision's ResNets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from danet.checkpoint.weights import fitting, read_state_dict
from danet.errors import InputError
from danet.extras import require


class TimmBackbone(nn.Module):
    """A network of timm, reduced to its feature maps.

    Args:
        name: Of the network in timm, with the tag of its weights: ``resnet50.a1_in1k``.
        output_stride: Pixels of the image per pixel of the last map; timm rejects networks that it
            cannot dilate.
        weights: Initial weights: None for random ones, ``pretrained`` for those of the name
            (downloaded once), or the path of a state dict with timm's names.

    Attributes:
        channels: Of the feature maps, four at most.
        mean, std: Normalisation with which the weights were trained, of values 0..255.
    """

    def __init__(self, *, name: str, output_stride: int = 8, weights: str | None = None) -> None:
        super().__init__()
        require("timm")
        import timm

        if not timm.is_model(name):
            # Names of a family share their beginning.
            close = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:5]
            hint = f"; there are {', '.join(close)}" if close else ""
            raise InputError(f"model.backbone.name={name}: timm has no such network{hint}")
        try:
            self.network = timm.create_model(
                name,
                features_only=True,
                output_stride=output_stride,
                pretrained=weights == "pretrained",
            )
        # For a network without feature maps or dilation.
        except (NotImplementedError, TypeError, RuntimeError, AssertionError) as error:
            raise InputError(
                f"model.backbone.name={name}, output_stride={output_stride}: timm cannot make it "
                f"({str(error) or type(error).__name__}); if it cannot dilate it, set "
                "model.backbone.output_stride=32, else take another network"
            ) from error
        # Some networks also have a map at stride 2, which no head here uses.
        self.channels: list[int] = self.network.feature_info.channels()[-4:]  # type: ignore[union-attr, operator]
        trained: dict[str, Any] = self.network.pretrained_cfg  # type: ignore[assignment]
        # timm normalises images in 0..1.
        self.mean: Sequence[float] = [255 * value for value in trained["mean"]]
        self.std: Sequence[float] = [255 * value for value in trained["std"]]
        if weights is not None and weights != "pretrained":
            self._load(Path(weights).expanduser())

    def _load(self, path: Path) -> None:
        """Load the network from a file; raise InputError if it does not fit."""
        found = read_state_dict(path, "model.backbone.weights")
        # Tensors that are left over belong to the classifier, which feature maps do not need.
        expected = self.network.state_dict()
        kept = {k: v for k, v in found.items() if k in expected}
        self.network.load_state_dict(fitting(expected, kept, f"model.backbone.weights={path}"))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, 3, H, W) to up to four maps, finest first."""
        maps: list[Tensor] = self.network(x)
        return maps[-4:]
