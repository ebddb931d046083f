"""The training step of mmsegmentation's DANet, where the package is installed.

pip install onedl-mmsegmentation onedl-mmengine onedl-mmcv
"""

import warnings
from typing import Any

from torch import Tensor

NAME = "mmsegmentation float32 NCHW, auxiliary head"


class Step:
    """Its network on a ResNet-50 at output stride 8 with its auxiliary head, its loss, and SGD."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        from mmengine.registry import init_default_scope
        from mmengine.structures import PixelData
        from mmseg.registry import MODELS
        from mmseg.structures import SegDataSample

        from danet.engine.optimizer import SGD

        image, mask = batch
        self.image = image.float()
        self.samples = [
            SegDataSample(gt_sem_seg=PixelData(data=truth[None].long())) for truth in mask
        ]
        init_default_scope("mmseg")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that this network does not use
            import mmseg.models  # noqa: F401 (fills the registry)

            self.model = MODELS.build(_CONFIG).to(image.device).train()
        self.optimizer = SGD(lr=1e-3)(self.model)

    def __call__(self) -> None:
        """Update the weights once."""
        terms: dict[str, Any] = self.model.loss(self.image, self.samples)
        sum(term for name, term in terms.items() if "loss" in name).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


_NORM = {"type": "BN", "requires_grad": True}
_HEAD = {"dropout_ratio": 0.0, "num_classes": 19, "norm_cfg": _NORM, "align_corners": False}
_LOSS = {"type": "CrossEntropyLoss", "avg_non_ignore": True}
_CONFIG = {
    "type": "EncoderDecoder",
    "backbone": {
        "type": "ResNet",
        "depth": 50,
        "strides": (1, 2, 1, 1),
        "dilations": (1, 1, 2, 4),
        "norm_cfg": _NORM,
    },
    "decode_head": {
        "type": "DAHead",
        "in_channels": 2048,
        "in_index": 3,
        "channels": 512,
        "pam_channels": 64,
        "loss_decode": {**_LOSS, "loss_weight": 1.0},
        **_HEAD,
    },
    "auxiliary_head": {
        "type": "FCNHead",
        "in_channels": 1024,
        "in_index": 2,
        "channels": 256,
        "num_convs": 1,
        "concat_input": False,
        "loss_decode": {**_LOSS, "loss_weight": 0.4},
        **_HEAD,
    },
}
