"""Imports what a training needs, once, for all processes forked afterwards."""

import danet.assemble
import danet.check
import danet.cli
import danet.data.loader
import danet.datasets.camvid
import danet.datasets.folder
import danet.datasets.scenes
import danet.doctor.sample
import danet.drawing.overlay
import danet.engine.trainer
import danet.evaluation.evaluate
import danet.losses
import danet.models.heads
import danet.models.resnet
import danet.models.segmentor
import danet.plan.report
import danet.resume
import danet.tools.train  # noqa: F401
from faults import driver, plants  # noqa: F401
