"""Trains a network: ``python tools/train.py [SETTING=VALUE ...]``; --help shows the settings."""

import os
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

from omegaconf import DictConfig, OmegaConf

from danet import cli
from danet.config.validate import check
from danet.distributed import signals
from danet.errors import InputError, ProcessError, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from danet.checkpoint.format import Checkpoint
    from danet.data.loader import TrainBatches
    from danet.datasets.base import SegmentationDataset
    from danet.engine.trainer import Trainer
    from danet.evaluation.metrics import ConfusionMatrix

# The imports that bring in torch stand inside the functions: a misspelt setting is told before.


def work(config: DictConfig) -> None:
    """Checks the config, settles on a checkpoint, joins the other processes, trains."""
    if config.dry_run and OmegaConf.is_missing(config.data, "root"):
        config.data.root = "."  # a plan reads no data
    checked = check(config, cli.added_keys(), needs_data=not config.dry_run)
    processes = checked["run"]["processes"]
    if processes and "WORLD_SIZE" not in os.environ and not config.dry_run:
        start_processes(processes)
        return
    from danet.config import resume
    from danet.data import bad_samples
    from danet.distributed.device import choose_device
    from danet.distributed.rendezvous import process_group
    from danet.preflight import advice
    from danet.preflight.report import describe, refuse_the_impossible

    if config.dry_run:
        device = choose_device(checked["trainer"]["device"], key="trainer.device")
        advice.refuse_single_values(checked, device)
        cli.say(describe(checked, device))
        return

    wrong = bad_samples.errors(**loading_of(checked))
    if wrong:
        raise InputError("\n".join(wrong))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    settled, saved, notes = resume.settle(checked, cli.overrides(), world=world)
    for note in notes:
        cli.say(note)
    settled["run"]["name"] = settled["run"]["name"] or cli.choice()
    device = choose_device(settled["trainer"]["device"], key="trainer.device")
    advice.refuse_folder(settled)
    refuse_the_impossible(settled, device)
    advice.refuse_single_values(settled, device)
    for note in advice.notes(settled, device, typed=cli.overrides()):
        cli.say(note)
    with process_group(device):
        train(settled, saved, device)


def start_processes(count: int) -> None:
    """Starts this command once more, under torchrun; a sweep does so for each of its runs.

    Raises:
        ProcessError: A process failed; it has told why.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *launcher, __file__, *cli.flags(), *cli.overrides()]
    with subprocess.Popen(command) as child:

        def pass_on(number: int, _: object) -> None:
            # A terminal has sent it to the child, too.
            if number == signal.SIGTERM or not signals.is_in_foreground():
                child.send_signal(number)

        with signals.handled(pass_on, signals.STOP):
            code = child.wait()
    if code:
        raise ProcessError(f"run.processes={count}: the processes ended with code {code}")


def loading_of(config: dict[str, Any]) -> dict[str, Any]:
    """Returns how faults of reading are met; old configs and some data sets have no such keys."""
    data = config["data"]
    return {
        "on_bad_sample": data.get("on_bad_sample", "error"),
        "max_bad_share": data.get("max_bad_share", 0.01),
        "timeout": data.get("timeout", 300),
    }


def train(config: dict[str, Any], saved: "Checkpoint | None", device: "torch.device") -> None:
    """Makes the parts of a run and hands them to the trainer."""
    import torch

    from danet.checkpoint import manager, run_folder
    from danet.checkpoint.weights import initialise
    from danet.config import resume
    from danet.config.build import make, make_dataset, make_model, untrained
    from danet.data.loader import eval_batches, train_batches
    from danet.distributed import collectives, consistency
    from danet.engine.settings import TrainSettings
    from danet.engine.trainer import Trainer
    from danet.evaluation.evaluate import evaluate
    from danet.preflight import out_of_memory
    from danet.visualization.figure import validation_pictures

    memory = out_of_memory.free_memory(device)
    settings, data, seed = TrainSettings(**config["trainer"]), config["data"], config["seed"]
    parts = {key: make(config[key], key) for key in ("loss", "optimizer", "schedule", "evaluation")}
    train_set = make_dataset(config, data["train_split"], training=True)
    val_set = make_dataset(config, data["val_split"], training=False)
    done = saved["step"] if saved else 0
    consistency.require_same(
        {
            "config": consistency.digest_of({**config, "run": None, "resume": None}),
            "code": consistency.code_version(),
            "training set": train_set.fingerprint(),
            "validation set": val_set.fingerprint(),
        }
    )
    if saved and is_finished(saved, settings.steps):
        cli.say(f"{config['resume']}: this run is finished, at step {done} of {settings.steps}")
        return
    look_at_data(config, saved, train_set, val_set)

    meeting = loading_of(config)
    batch_size, world = data["batch_size"], collectives.world_size()
    loading = {
        "batch_size": batch_size,
        "rank": collectives.rank(),
        "world": world,
        "num_workers": data["num_workers"],
        "pin_memory": device.type == "cuda",
        "timeout": meeting.pop("timeout"),
    }
    start = done * settings.accumulate
    batches = train_batches(train_set, seed=seed, start=start, warn=warn, **loading, **meeting)
    torch.manual_seed(seed)  # every process starts from the same random weights
    model = untrained(config) if saved else make_model(config)
    if saved:
        resume.refuse_other_states(saved, model, parts["optimizer"], config["resume"])
    if config["init_from"] and not saved:
        for line in initialise(model, Path(config["init_from"])):
            cli.say(line)

    def count(network: "nn.Module") -> "ConfusionMatrix":
        held_out = eval_batches(val_set, **loading)
        infer, num_classes = parts["evaluation"], data["num_classes"]
        return evaluate(network, held_out, infer, num_classes=num_classes, device=device)

    if world > 1 and device.type == "cpu" and settings.sync_batchnorm:
        cli.say("trainer.sync_batchnorm: there is none on the CPU, so each process has its own")
    fallback = Path("runs", config["run"]["name"], datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = run_folder.prepare(
        config["run"]["dir"],
        fallback,
        config=config,
        resuming=config["resume"] is not None,
        saved=saved,
    )
    if saved and resume.is_best_forgotten(saved) and collectives.is_first():
        aside = manager.set_aside_best(folder, done)
        if aside:
            cli.say(f"resume: the best checkpoint so far is now {aside}")
    trainer = Trainer(
        model=model,
        criterion=parts["loss"],
        recipe=parts["optimizer"],
        schedule=parts["schedule"],
        settings=settings,
        seed=seed,
        device=device,
        evaluate=count,
        draw=lambda network: validation_pictures(
            network, val_set, parts["evaluation"], device=device, max_pixels=pixels_of(data)
        ),
        folder=folder,
        header={
            "config": config,
            "classes": list(val_set.classes),
            "palette": [list(color) for color in val_set.palette],
            "training_set": train_set.fingerprint(),
            "validation_set": val_set.fingerprint(),
            "run_id": run_folder.id_of(folder),
        },
        resume=saved,
        count=batches.count,
        log_to=config["run"]["log_to"],
    )
    cli.say(
        f"{folder}: {type(train_set).__name__}, {len(train_set)} training and {len(val_set)} "
        f"validation images; {sum(p.numel() for p in model.parameters()):,} parameters; steps "
        f"{done} to {settings.steps} of {batch_size * settings.accumulate * world} images; "
        f"{device}, {str(trainer.dtype).removeprefix('torch.')}"
    )
    fit(trainer, batches, config, memory)
    cli.say(f"checkpoint={folder / 'last.pt'}")


def is_finished(saved: "Checkpoint", steps: int) -> bool:
    """Tells whether a run has done and evaluated its steps; format 1 holds evaluated steps only."""
    evaluated = saved["evaluated_at" if "evaluated_at" in saved else "step"]
    return bool(saved["step"] >= steps and evaluated >= saved["step"])


def pixels_of(data: dict[str, Any]) -> int:
    """Returns the pixels of a training batch, of which the device can take as many at once."""
    height, width = data.get("crop") or data.get("size") or (512, 512)
    return int(data["batch_size"] * height * width)


def look_at_data(
    config: dict[str, Any],
    saved: "Checkpoint | None",
    train_set: "SegmentationDataset",
    val_set: "SegmentationDataset",
) -> None:
    """Reads some samples, and compares the data with those of the checkpoint."""
    from danet.config import resume
    from danet.data_check.overlap import refuse_overlap
    from danet.data_check.sample import check_sample
    from danet.datasets.folder import Folder

    overlap = refuse_overlap(train_set, val_set, allowed=bool(config["data"].get("allow_overlap")))
    if overlap:
        cli.say(overlap)
    if isinstance(train_set, Folder) and train_set.division:
        cli.say(train_set.division)
    skipped = train_set if loading_of(config)["on_bad_sample"] == "skip" else None
    for note in check_sample(train_set, val_set, training=train_set, skipping=skipped):
        cli.say(note)
    allowed = config["allow_changes"]
    found = {"training_set": train_set.fingerprint(), "validation_set": val_set.fingerprint()}
    for note in resume.compare_data(saved or {}, found, allowed=allowed):
        cli.say(note)


def fit(trainer: "Trainer", batches: "TrainBatches", config: dict[str, Any], memory: int) -> None:
    """Trains; says what became of readers and memory, and which samples were skipped."""
    from danet.data import bad_samples
    from danet.distributed import collectives
    from danet.preflight import out_of_memory

    try:
        trainer.fit(batches)
    except (RuntimeError, MemoryError) as error:
        told: UserError | None = None
        if isinstance(error, RuntimeError):
            told = batches.explain(error)
        if told is None and out_of_memory.is_shortage(error):
            told = out_of_memory.explain(
                config, trainer.device, memory, training=trainer.model.training
            )
        if told is None:
            raise
        raise told from error
    for line in bad_samples.summary(collectives.gather(batches.bad.reasons)):
        cli.say(line)


def warn(text: str) -> None:
    """Tells what one process alone has met."""
    print(f"warning: process {os.environ.get('RANK', '0')}: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Is the command ``danet-train``."""
    signals.follow_parent()
    cli.run(work, "train")


if __name__ == "__main__":
    main()
