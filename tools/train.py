"""Trains a network: ``python tools/train.py [SETTING=VALUE ...]``; --help shows the settings."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig
from torch import nn

from danet import cli, resume
from danet.assemble import make, make_dataset, make_model
from danet.config import check
from danet.data.loader import eval_batches, train_batches
from danet.drawing.overlay import prediction_sheets
from danet.engine import distributed, run_folder
from danet.engine.checkpoint import Checkpoint
from danet.engine.trainer import Trainer, TrainSettings
from danet.evaluation.confusion import ConfusionMatrix
from danet.evaluation.evaluate import evaluate
from danet.models.weights import initialise


def work(config: DictConfig) -> None:
    """Checks the config, settles on a checkpoint, joins the other processes, trains."""
    checked = check(config, added=cli.added_keys())
    settled, saved = resume.settle(checked, cli.overrides())
    device = distributed.choose_device(settled["trainer"]["device"])
    with distributed.group(device):
        train(settled, saved, device, name=settled["run"]["name"] or cli.choice())


def train(config: dict[str, Any], saved: Checkpoint | None, device: torch.device, name: str) -> None:
    """Makes the parts of a run and hands them to the trainer."""
    settings, data, seed = TrainSettings(**config["trainer"]), config["data"], config["seed"]
    train_set = make_dataset(config, data["train_split"], training=True)
    val_set = make_dataset(config, data["val_split"], training=False)
    infer = make(config["evaluation"], "evaluation")
    recipe = make(config["optimizer"], "optimizer")
    schedule = make(config["schedule"], "schedule")
    criterion = make(config["loss"], "loss")
    done = saved["step"] if saved else 0
    if done >= settings.steps:
        print(f"{config['resume']}: this run is finished, at step {done} of {settings.steps}")
        return

    processes = {"rank": distributed.rank(), "world": distributed.world_size()}
    workers = {"num_workers": data["num_workers"], "pin_memory": device.type == "cuda"}
    batch_size = data["batch_size"]
    batches = train_batches(
        train_set,
        batch_size=batch_size,
        seed=seed,
        start=done * settings.accumulate,
        **processes,
        **workers,
    )
    torch.manual_seed(seed)  # every process starts from the same random weights
    model = make_model(config)
    if config["init_from"] and not saved:
        for line in initialise(model, Path(config["init_from"])):
            cli.say(line)

    def count(network: nn.Module) -> ConfusionMatrix:
        held_out = eval_batches(val_set, batch_size=batch_size, **processes, **workers)
        return evaluate(
            network, held_out, infer, num_classes=data["num_classes"], device=device
        )

    fallback = Path("runs", name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    folder = run_folder.prepare(
        config["run"]["dir"], fallback, config=config, resuming=config["resume"] is not None
    )
    trainer = Trainer(
        model=model,
        criterion=criterion,
        recipe=recipe,
        schedule=schedule,
        settings=settings,
        seed=seed,
        device=device,
        evaluate=count,
        draw=lambda network: prediction_sheets(network, val_set, device=device, count=4),
        folder=folder,
        header={
            "config": config,
            "classes": list(val_set.classes),
            "palette": [list(color) for color in val_set.palette],
        },
        resume=saved,
    )
    cli.say(
        f"{folder}: {type(train_set).__name__}, {len(train_set)} training and {len(val_set)} "
        f"validation images, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"steps {done} to {settings.steps} of "
        f"{batch_size * settings.accumulate * processes['world']} images on {device} in "
        f"{str(trainer.dtype).removeprefix('torch.')}"
    )
    trainer.fit(batches)
    cli.say(f"checkpoint={folder / 'last.pt'}")


def main() -> None:
    """Is the command ``danet-train``."""
    cli.run(work, "train")


if __name__ == "__main__":
    main()
