"""Semantic segmentation with the Dual Attention Network (Fu et al., CVPR 2019).

>>> import danet
>>> model = danet.load_model("runs/quickstart/<time>/best.pt")  # doctest: +SKIP
>>> mask = danet.predict(model, "street.jpg")  # doctest: +SKIP
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Otherwise albumentations asks the package index for a newer version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
__all__ = ["Prediction", "__version__", "load_model", "predict"]

if TYPE_CHECKING:
    from danet.config.build import load_model
    from danet.prediction.predict import Prediction, predict
else:
    _PLACES = {"load_model": "danet.config.build", "predict": "danet.prediction.predict"}
    _PLACES["Prediction"] = _PLACES["predict"]

    def __getattr__(name: str) -> Any:
        """Import a function on first use, so that ``import danet`` stays cheap."""
        if name in _PLACES:
            return getattr(importlib.import_module(_PLACES[name]), name)
        raise AttributeError(f"module 'danet' has no attribute {name!r}")

    def __dir__() -> "list[str]":
        return sorted({*globals(), *_PLACES})
