"""Losses: each maps logits and a mask to a scalar; DeepSupervision applies them to all outputs.

All accept logits (B, K, h, w) and a mask (B, H, W) of class indices or ``ignore_index(K)``,
upsample logits that are coarser than the mask, compute in float32, and return exactly 0 with finite
gradients where every pixel is ignored. Cross entropy, OHEM and the focal loss never hold the
upsampled logits of a whole batch; the losses of regions need all pixels of a class at once and do.

A batch may be spread over micro-batches and processes. Means over pixels, or over images, are then
sums over all of them, divided by one common divisor (``Part``), so that the same images give the
same loss however they are spread. What is no such mean is computed per micro-batch and averaged
over those with a labelled pixel: Dice and Lovasz, and the selection of OHEM by ``min_kept``.
"""

from danet.losses.composites import CrossEntropyPlus as CrossEntropyPlus
from danet.losses.composites import DeepSupervision as DeepSupervision
from danet.losses.composites import WeightedSum as WeightedSum
from danet.losses.parts import Part as Part
from danet.losses.parts import mean_of as mean_of
from danet.losses.pixels import OHEM as OHEM
from danet.losses.pixels import CrossEntropy as CrossEntropy
from danet.losses.pixels import Focal as Focal
from danet.losses.regions import Dice as Dice
from danet.losses.regions import LovaszSoftmax as LovaszSoftmax
from danet.losses.regions import RegionMutualInformation as RegionMutualInformation
