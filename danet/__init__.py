"""Semantic segmentation with the Dual Attention Network (Fu et al., CVPR 2019).

>>> import danet
>>> model = danet.load_model("runs/quickstart/<time>/best.pt")  # doctest: +SKIP
"""

import os
from typing import TYPE_CHECKING, Any

# albumentations asks the package index for a newer version when it is imported, unless told not to.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

__version__ = "0.1.0"
__all__ = ["__version__", "load_model"]

if TYPE_CHECKING:
    from danet.assemble import load_model


def __getattr__(name: str) -> Any:
    """Imports ``load_model`` on first use, so that ``import danet`` stays cheap."""
    if name == "load_model":
        from danet.assemble import load_model

        return load_model
    raise AttributeError(f"module 'danet' has no attribute {name!r}")
