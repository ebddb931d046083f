"""One training, from a checked config to its last checkpoint: builds the parts, runs the loop."""

import os
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danet import cli
from danet.checkpoint import manager, run_folder
from danet.checkpoint.format import Checkpoint
from danet.checkpoint.manager import CheckpointManager
from danet.checkpoint.weights import initialise
from danet.config import build, resume
from danet.config.build import make, make_dataset, make_model
from danet.config.schema import TrainConfig
from danet.data import bad_samples
from danet.data.loader import TrainBatches, eval_batches, train_batches
from danet.data.sampler import RareClassSampling
from danet.data_check.overlap import refuse_overlap
from danet.data_check.sample import check_sample
from danet.datasets.base import FileDataset, SegmentationDataset
from danet.datasets.label_statistics import label_pixels
from danet.distributed import collectives
from danet.distributed.agreement import wait_patiently
from danet.distributed.rendezvous import choose_device, process_group, require_same
from danet.engine.best import how_it_ended
from danet.engine.log import RunLog
from danet.engine.precision import place
from danet.engine.train_step import TrainStep
from danet.engine.trainer import Trainer
from danet.evaluation.evaluate import evaluate
from danet.evaluation.metrics import ConfusionMatrix, PixelLoss
from danet.models.finetuning import count_frozen
from danet.ops.attention import PositionAttention
from danet.preflight import advice
from danet.preflight.plan import describe, refuse_the_impossible
from danet.visualization.attention import validation_diagnosis, validation_pictures


class Parts:
    """What a training is made of, besides the network; raise InputError for what is refused."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.loss = make(config.loss, "loss")
        self.optimizer = make(config.optimizer, "optimizer")
        self.schedule = make(config.schedule, "schedule")
        self.evaluation = make(config.evaluation, "evaluation")
        # Last: a value that a constructor refuses is reported before files are read.
        self.train_set = make_dataset(config, config.data.train_split, training=True)
        build.join_extra_roots(self.train_set, config)
        self.val_set: SegmentationDataset | None = None
        self.unscored = build.why_unscored(config, self.train_set)
        if self.unscored:
            advice.refuse_unscored(config.trainer)
        else:
            self.val_set = make_dataset(config, str(config.data.val_split), training=False)
        advice.refuse_unknown_class(config.trainer.best_by, self.train_set.classes)
        sets = {"training_set": self.train_set, "validation_set": self.val_set}
        self.fingerprints = {name: data.fingerprint() for name, data in sets.items() if data}
        self.loader_settings: dict[str, Any] = {
            "batch_size": config.data.batch_size,
            "rank": collectives.rank(),
            "world": collectives.world_size(),
            "num_workers": config.data.num_workers,
            "pin_memory": device.type == "cuda",
            "timeout": config.data.timeout,
        }


def train(config: TrainConfig, overrides: Sequence[str] = ()) -> None:
    """Train, or with ``dry_run`` print the plan of the run; ``overrides`` is what was typed."""
    if config.dry_run:
        device = choose_device(config.trainer.device, key="trainer.device")
        advice.refuse_single_values(config)
        cli.say(describe(config, device))
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config, saved, notes = resume.resolve(config, overrides, world_size=world_size)
    device = choose_device(config.trainer.device, key="trainer.device")
    advice.refuse_folder(config)
    refuse_the_impossible(config, device)
    advice.refuse_single_values(config)
    for note in (*notes, *advice.notes(config, device, typed=overrides)):
        cli.say(note)
    with process_group(device):
        config = build.with_measured_range(config)
        parts = Parts(config, device)
        require_same(config.plain, parts.fingerprints)
        if saved and (ended := how_it_ended(saved, config.trainer)):
            cli.say(f"{config.resume}: this run is finished, {ended}")
            return
        validate_data(parts, saved)
        rank = collectives.rank()
        batches = train_batches(
            parts.train_set,
            seed=config.seed,
            start=(saved["step"] if saved else 0) * config.trainer.accumulate,
            warn=partial(print, f"warning: process {rank}:", file=sys.stderr, flush=True),
            rare=rare_class_sampling(parts),
            class_mix=config.data.class_mix,
            on_bad_sample=config.data.on_bad_sample,
            max_bad_share=config.data.max_bad_share,
            **parts.loader_settings,
        )
        trainer = make_trainer(parts, saved, batches)
        try:
            trainer.fit(batches)
        except (RuntimeError, MemoryError) as error:
            # The network is in training mode except in an evaluation.
            training = trainer.train_step.model.training
            shortage = advice.explain_shortage(error, config, device, training=training)
            if explained := batches.explain(error) or shortage:
                raise explained from error
            raise
        for line in bad_samples.summary(collectives.gather(batches.bad.reasons)):
            cli.say(line)
        folder = trainer.checkpoints.folder
        cli.say(f"checkpoint={folder / 'last.pt'}")
        if parts.val_set and (folder / "best.pt").exists():
            cli.say(f"best: {folder / 'best.pt'}, {trainer.best.shown()}")


def make_trainer(parts: Parts, saved: Checkpoint | None, batches: TrainBatches) -> Trainer:
    """Build network, run folder and log; continue from ``saved`` if there is one."""
    config, device, train_set, val_set = parts.config, parts.device, parts.train_set, parts.val_set
    settings, done = config.trainer, saved["step"] if saved else 0
    torch.manual_seed(config.seed)  # every process starts from the same random weights
    model = build.untrained(config) if saved else make_model(config)
    if saved:
        resume.refuse_other_states(saved, model, parts.optimizer, config.resume)
    elif config.init_from:
        for line in initialise(model, Path(run_folder.best_in(config.init_from, "init_from"))):
            cli.say(line)
    backbone: Any = getattr(model, "backbone", None)
    for note in getattr(backbone, "notes", ()):
        cli.say(note)
    if val_set and getattr(backbone, "size", None) is not None:
        advice.refuse_other_sizes(model, val_set[0].image, parts.evaluation)
    model = place(model, settings, device)
    loss, optimizer = parts.loss.to(device), parts.optimizer(model)
    folder = make_folder(config, saved)  # only now, since the optimizer may refuse the network
    classes = config.data.num_classes
    train_step = TrainStep(model, loss, optimizer, parts.schedule, settings, num_classes=classes)
    images = config.data.batch_size * settings.accumulate * collectives.world_size()
    precision = "tf32" if train_step.is_tf32 else str(train_step.dtype).removeprefix("torch.")
    attentions = (module for module in model.modules() if isinstance(module, PositionAttention))
    kernels = {module.kernel(device, train_step.dtype) for module in attentions}
    attention = f", position attention by {', '.join(kernels)}" if kernels - {"tiles"} else ""
    frozen = f" ({count:,} frozen)" if (count := count_frozen(model)) else ""
    cli.say(
        f"{folder}: {type(train_set).__name__}, {len(train_set)} training and {len(val_set or ())} "
        f"validation images; {sum(p.numel() for p in model.parameters()):,} parameters{frozen}; "
        f"steps {done} to {settings.steps} of {images} images; {device}, {precision}{attention}"
    )
    # Only now the log, whose progress bar appears at once.
    run_id = run_folder.id_of(folder)
    is_skipping = config.data.on_bad_sample == "skip"
    log = RunLog(
        folder if collectives.is_first() else None,
        step=done,
        steps=settings.steps,
        classes=train_set.classes,
        config=config.plain,
        log_to=config.run.log_to,
        run_id=run_id,
        count=(lambda: {"bad_samples": batches.bad.replaced}) if is_skipping else dict,
    )
    checkpoints = CheckpointManager(
        folder,
        settings,
        metadata={
            "config": config.plain,
            "classes": list(train_set.classes),
            "palette": [list(color) for color in train_set.palette],
            **parts.fingerprints,
            "run_id": run_id,
        },
        best=[(score, step) for score, step in saved.get("best", ())] if saved else (),
        warn=log.warn,
    )
    scoring = partial(score, parts, log, val_set) if val_set else None
    trainer = Trainer(train_step, checkpoints, log, scoring)
    if saved:
        trainer.load_state(saved)
    return trainer


def make_folder(config: TrainConfig, saved: Checkpoint | None) -> Path:
    """Make the folder of the run, or enter it again; see danet.checkpoint.run_folder."""
    # Runs that start in one second have folders of their own.
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    wanted = Path(config.run.dir or Path("runs", config.run.name or "run", now)).expanduser()
    resuming = config.resume is not None
    folder = run_folder.prepare(wanted, config=config.plain, resuming=resuming, saved=saved)
    best = folder / "best.pt"
    if saved and resume.is_best_forgotten(saved) and collectives.is_first() and best.exists():
        aside = manager.set_aside(best, f"best_before_step_{saved['step']:09d}.pt")
        cli.say(f"resume: the best checkpoint so far is now {aside}")
    return folder


def score(
    parts: Parts, log: RunLog, val_set: SegmentationDataset, model: nn.Module, step: int
) -> tuple[ConfusionMatrix, float]:
    """Score a network on the whole validation set, and return its loss.

    The first process also logs how its attention is distributed, and shows pictures of it.
    """
    data, infer = parts.config.data, parts.evaluation
    collectives.broadcast_buffers(model)
    batches = eval_batches(val_set, **parts.loader_settings)
    classes, device = data.num_classes, parts.device
    loss = PixelLoss(parts.loss.pixel_parts, classes, device)
    confusion = evaluate(model, batches, infer, num_classes=classes, device=device, counters=[loss])
    # Shares of different images take different times, more than a collective would wait.
    wait_patiently(f"the evaluation at step {step}")
    # Equal on all processes to the last bit, so they agree on whether the run ends early.
    for counts in (confusion.counts, loss.sums):
        collectives.sum_in_place(counts)
    height, width = data.crop or data.size or (512, 512)
    # A training batch of so many pixels fits the device; attention is computed for as many.
    pixels = data.batch_size * height * width
    if log.trackers:
        log.images(step, validation_pictures(model, val_set, infer, max_pixels=pixels))
    # Last: an evaluation that is stopped before is repeated, and leaves no line twice.
    is_first = collectives.is_first()
    if is_first and (found := validation_diagnosis(model, val_set, max_pixels=pixels)):
        log.scalars(step, "attention", found)
    return confusion, loss.mean()


def rare_class_sampling(parts: Parts) -> RareClassSampling | None:
    """Return the sampling that the settings ask for, from the training labels; describe it."""
    data, train_set = parts.config.data, parts.train_set
    if data.rare_class_temperature is None:
        return None
    skip, low = data.on_bad_sample == "skip", data.rare_class_min_pixels
    pixels = label_pixels(train_set, num_workers=data.num_workers, skip=skip)
    rare = RareClassSampling(pixels, temperature=data.rare_class_temperature, min_pixels=low)
    for line in rare.describe(train_set.classes):
        cli.say(line)
    return rare


def validate_data(parts: Parts, saved: Checkpoint | None) -> None:
    """Raise InputError if the splits overlap, a sample is bad, or a resumed run had other data."""
    config, train_set, val_set = parts.config, parts.train_set, parts.val_set
    if val_set:
        overlap = refuse_overlap(train_set, val_set, allowed=config.data.allow_overlap)
    else:
        why = f"{parts.unscored}; there are no scores, and last.pt is the result"
        overlap = f"no validation set: {why}"
    division = train_set.division if isinstance(train_set, FileDataset) else ""
    skipped = train_set if config.data.on_bad_sample == "skip" else None
    for note in (
        *filter(None, (overlap, division)),
        *check_sample(*filter(None, (train_set, val_set)), training=train_set, skipping=skipped),
        *resume.compare_data(saved or {}, parts.fingerprints, allowed=config.allow_changes),
    ):
        cli.say(note)
