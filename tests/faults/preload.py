"""Imports what a training needs, once, for all processes forked afterwards.

All but danet.engine.run: it names functions that faults.plants replaces before it is imported.
"""

# ruff: noqa: F401
import torch._dynamo  # comes with torchvision and takes two seconds
import torch.utils.tensorboard
import torchvision

import danet.checkpoint.weights
import danet.cli
import danet.config.resume
import danet.data.loader
import danet.data_check.overlap
import danet.data_check.sample
import danet.datasets.camvid
import danet.datasets.folder
import danet.datasets.scenes
import danet.engine.trainer
import danet.evaluation.evaluate
import danet.losses
import danet.models.heads.dual
import danet.models.resnet
import danet.models.segmentor
import danet.preflight.advice
import danet.tools.train
import danet.visualization.attention
from faults import driver, plants
