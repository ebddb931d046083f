"""What several test files share, and the record from which docs/reliability.md has its tables.

With DANET_ROWS_JSON=FILE the outcome of every test of a fault (mark ``fault``) or of a bad input
(mark ``bad_input``, or a number in its name) goes into that file.
"""

import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.manager import CheckpointManager
from danet.datasets.folder import Folder
from danet.datasets.formats.color_masks import LabelFormat
from danet.datasets.layout import PairLayout
from danet.datasets.lists import SplitRule
from danet.distributed import collectives
from danet.engine.log import RunLog
from danet.engine.optimizer import SGD
from danet.engine.precision import place
from danet.engine.schedule import Poly
from danet.engine.settings import TrainSettings
from danet.engine.train_step import TrainStep
from danet.engine.trainer import Trainer
from danet.errors import InputError
from danet.evaluation.metrics import ConfusionMatrix
from danet.losses import OHEM, CrossEntropy, DeepSupervision
from danet.models.heads.dual import FCNHead
from danet.models.segmentor import Segmentor
from danet.types import IGNORE, Batch, Sample

ROOT = Path(__file__).resolve().parents[1]
# A script that runs the tests in the background makes them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
CAMVID = Path(os.environ.get("CAMVID", ROOT.parent / "shared" / "data" / "camvid"))
SAMPLES = Path(os.environ.get("SAMPLES", ROOT.parent / "shared" / "data" / "samples"))
# FFmpeg reads it once, when a process opens its first video; danet sets it for streams.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

TINY = [
    "data.size=[48,96]",
    "data.lengths={train:12,val:5,test:5}",
    "data.batch_size=2",
    "data.cue_radius=2",
    "model.backbone.width=8",
    "model.head.reduction=2",
    "trainer.precision=float32",
    "trainer.device=cpu",
    "trainer.log_every=2",
    "trainer.eval_every=1000",
]
"""Settings of a run of seconds."""


@pytest.fixture(autouse=True)
def _same_numbers():
    """Every test starts from the same random state and one thread."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def camvid():
    """Returns the folder of the real CamVid, or says why the test cannot run."""
    if not CAMVID.is_dir():
        pytest.skip(f"CamVid is not at {CAMVID}; name its folder in the variable CAMVID")
    return CAMVID


@pytest.fixture
def samples():
    """Returns the folder of a few real pairs of each data set, or says why it is not there."""
    if not SAMPLES.is_dir():
        pytest.skip(f"real pairs are not at {SAMPLES}; name their folder in the variable SAMPLES")
    return SAMPLES


def tool(name, *settings, cwd, code=0, launcher=(), env=None):
    """Runs a tool as a process; returns it with its output as text."""
    command = [sys.executable, *launcher, str(ROOT / "tools" / f"{name}.py"), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", **(env or {})}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def output_of(*command, cwd, path="", stdin=None):
    """Runs a program that must succeed, with modules from ``path``; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def call(name, *settings, code=0):
    """Runs a tool's command line in this process; returns its exit code, which must be ``code``.

    With None any code is right.
    """
    module = importlib.import_module(f"danet.tools.{name}")
    GlobalHydra.instance().clear()
    found, argv = 0, [f"{name}.py", *map(str, settings)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")  # cli.run sets it; so it is taken back
        patch.setattr(sys, "argv", argv)
        if "-m" not in argv:
            # It composes everything once more, to ask for a mode that no config here sets.
            patch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
        try:
            module.main()
        except SystemExit as error:
            found = error.code
    assert code in (None, found), f"exit {found}"
    return found


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any float tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        result = call(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                self.numel = max(self.numel, leaf.numel())
        return result


def highest_memory(*, anew=False):
    """Returns the most MiB that this process has held; ``anew``: forgets what was before.

    Known on Linux alone; elsewhere it is 0.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    (found,) = re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())
    return int(found) / 1024


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Returns the checkpoint of a small network with random weights, as a run leaves it."""
    from foreign import content

    state = content([*TINY, "trainer.steps=6", "data.num_workers=0"])
    state |= {"step": 6, "evaluated_at": 6, "best_score": 0.25}
    state["scores"] = {"miou": 0.25, "pixel_accuracy": 0.5}
    path = tmp_path_factory.mktemp("tiny") / "last.pt"
    checkpoint_format.save(path, state)
    return path


@pytest.fixture
def network(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint in a folder of its own."""
    (tmp_path / "net").mkdir()
    return Path(shutil.copy(tiny_checkpoint, tmp_path / "net/best.pt"))


def rewrite(path, **fields):
    """Changes fields of a checkpoint."""
    checkpoint_format.save(path, {**checkpoint_format.load(path), **fields})


def save_picture(path, pixels):
    """Saves an array in the form of the suffix, and makes the folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_pair(root, split, name, image, mask, *, labels="labels"):
    """Writes images/<split>/<name>.png and <labels>/<split>/<name>.png."""
    for folder, pixels in (("images", image), (labels, mask)):
        save_picture(root / folder / split / f"{name}.png", pixels)


def plant(root, *, values=(0, 1), folder="masks", splits=(("train", 4), ("val", 2)), size=(44, 60)):
    """Writes pairs of noise whose labels hold some values."""
    rng = np.random.default_rng(0)
    for split, count in splits:
        for i in range(count):
            image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            mask = rng.choice(np.array(values, np.uint8), size)
            name = f"{split}_{i}".removeprefix("._")
            write_pair(root, split, name, image, mask, labels=folder)
    return root


def make_folder(**settings):
    """Makes a Folder from settings as a user writes them; configs/data/folder.yaml groups them."""
    groups = {"label_format": LabelFormat, "files": PairLayout, "split_rule": SplitRule}
    for name, kind in groups.items():
        keys = [f.name for f in fields(kind) if f.name in settings]
        settings[name] = {key: settings.pop(key) for key in keys}
    return Folder(**settings)


@pytest.fixture
def site(request, tmp_path, monkeypatch, capsys):
    """A tree of own pictures or, by an indirect parameter, of CamVid; see bad_inputs/starts.py."""
    from starts import Site

    site = Site(getattr(request, "param", "folder"), tmp_path, monkeypatch, capsys)
    site.plant()
    return site


@pytest.fixture
def camvid_tree(tmp_path):
    """Makes a replica of CamVid: 4 train, 3 val and 2 test images of 60 x 44 with all labels."""
    splits = (("train", 4), ("val", 3), ("test", 2))
    return plant(tmp_path / "camvid", values=range(12), folder="labels", splits=splits)


_NUMBERS = re.compile(r"_([CFLIKR]\d\d)(?=_)")
_rows = []


def pytest_collection_modifyitems(items):
    for item in items:
        marks = [(m.args[0], m.args[1]) for m in item.iter_markers("fault")]
        marks += [(m.args[0], "") for m in item.iter_markers("bad_input")]
        marks += [(number, "") for number in _NUMBERS.findall(item.originalname or item.name)]
        # Properties of a test travel with its report, from another process, too.
        item.user_properties += [("row", mark) for mark in marks]
        if item.get_closest_marker("gpu"):
            # A machine with a GPU may have other releases of every package, and their warnings.
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_runtest_logreport(report):
    if report.when == "call" or (report.when == "setup" and not report.passed):
        figures = [value for name, value in report.user_properties if name == "figure"]
        for number, fault in (value for name, value in report.user_properties if name == "row"):
            row = {"number": number, "fault": fault, "test": report.nodeid}
            row |= {"outcome": report.outcome, "figure": "; ".join(figures)}
            _rows.append(row)


def pytest_sessionfinish(session):
    """Adds what ran to the file; a test that ran again replaces its row."""
    target = os.environ.get("DANET_ROWS_JSON")
    if not (target and _rows) or hasattr(session.config, "workerinput"):
        return
    path = Path(target)
    known = json.loads(path.read_text()) if path.exists() else []
    merged = {(row["number"], row["test"]): row for row in [*known, *_rows]}
    path.write_text(json.dumps([merged[key] for key in sorted(merged)], indent=1) + "\n")


# A trainer of a tiny network, and samples by number

K = 3
SETTINGS = {"precision": "float32", "accumulate": 2, "clip_norm": 1.0, "eval_every": 1000}


class Tiny(nn.Module):
    """A backbone of two convolutions that compiles in a second."""

    channels = (4, 8)

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.second = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        first = self.first(x)
        return [first, self.second(first.relu())]


def tiny(dropout=0.5):
    head = functools.partial(FCNHead, num_classes=K, channels=8, dropout=dropout)
    return Segmentor(Tiny(), head, head)


def make_trainer(
    folder, model=None, *, optimizer=None, resume=None, count=dict, evaluate=None, **settings
):
    """Return a trainer of a tiny network; ``settings`` are those of the trainer."""
    settings = TrainSettings(**{"steps": 8, "seed": 5, "device": "cpu", **SETTINGS, **settings})
    device = torch.device(settings.device)
    torch.manual_seed(0)
    model = place(model if model is not None else tiny(), settings, device)
    log = RunLog(
        folder if collectives.is_first() else None,
        step=resume["step"] if resume else 0,
        steps=settings.steps,
        classes=["a", "b", "c"],
        count=count,
    )
    checkpoints = CheckpointManager(
        folder,
        settings,
        metadata={"config": {}, "classes": ["a", "b", "c"], "palette": []},
        best=resume.get("best", ()) if resume else (),
        warn=log.warn,
    )
    weights = dict.fromkeys(("backbone", "position", "channel"), 0.4)
    criterion = DeepSupervision(OHEM(0.7, min_kept=50), CrossEntropy(), weights).to(device)
    factory = optimizer or SGD(0.1, momentum=0.9)
    train_step = TrainStep(model, criterion, factory(model), Poly(), settings, num_classes=K)
    evaluate = evaluate or (lambda network, step: scored())
    trainer = Trainer(train_step, checkpoints, log, evaluate)
    if resume:
        trainer.load_state(resume)
    return trainer


def scored():
    """Returns what an evaluation does: a confusion matrix and a loss."""
    confusion = ConfusionMatrix(K)
    confusion.update(batch(0).mask, batch(0).mask)
    return confusion, 0.5


def batch(number, size=(32, 40)):
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=generator)
    mask = torch.randint(0, K, (2, *size), dtype=torch.uint8, generator=generator)
    mask[:, :3] = IGNORE
    return Batch(image, mask, ("a", "b"))


class Kernels(TorchDispatchMode):
    """Refuses kernels that make a program wait for a CUDA device, whatever the device here."""

    NAMES = {
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),  # a number is read
        *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
        *("lift_fresh", "lift_fresh_copy"),  # torch.tensor(...): a copy from unpinned memory
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        chosen = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in self.NAMES or any(i is not None and i.dtype == torch.bool for i in chosen):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Refuses methods that copy to the host; on the CPU they need no kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    with Methods(), Kernels():
        yield


def poisoned(run, at):
    """Lets the loss of a step be NaN."""
    parts = run.train_step.criterion.parts

    def poison(output, mask):
        terms = parts(output, mask)
        factor = math.nan if run.step == at else 1.0
        return {k: [p._replace(total=p.total * factor) for p in v] for k, v in terms.items()}

    run.train_step.criterion.parts = poison
    return run


class Pictures:
    """Samples that show their key; some cannot be read."""

    def __init__(self, length=40, bad=()):
        self.length = length
        self.bad = set(bad)

    def __len__(self):
        return self.length

    def __getitem__(self, draw):
        item, seed = draw[:2] if isinstance(draw, tuple) else (draw, 0)
        if item in self.bad:
            raise InputError(f"picture_{item}.png: not a readable image")
        image = np.full((4, 4, 3), seed % 251, np.uint8)
        return Sample(image, np.zeros((4, 4), np.uint8), f"picture_{item}")
