"""Convert foreign weights to a checkpoint: ``python tools/convert.py source=... input=...``.

The checkpoint contains a complete training config, so ``tools/eval.py`` and ``tools/visualize.py``
accept it, and a training can start from it with ``init_from``.
"""

import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

import danet
from danet import cli
from danet.checkpoint import format as checkpoint_format
from danet.checkpoint import reading
from danet.checkpoint.convert import PROGRAMS, fill_in, network_of, rename
from danet.checkpoint.weights import read_state_dict
from danet.config.build import make_model
from danet.config.schema import ConvertConfig, TrainConfig, did_you_mean
from danet.config.targets import locate
from danet.config.validate import check
from danet.datasets.labels import default_palette
from danet.errors import InputError
from danet.filesystem import require_writable

FOREIGN = ("numpy", "mmengine", "mmcv")
"""Packages whose objects such files contain beside tensors: scores, logs of a training."""
DATA = {
    11: "camvid",
    19: "cityscapes",
    21: "pascal_voc",
    59: "pascal_context",
    60: "pascal_context_60",
    150: "ade20k",
    171: "coco_stuff_10k",
}
"""Number of classes -> data set."""


def run(config: DictConfig, *, further: list[str]) -> None:
    """Convert a file and print what each tensor became.

    Args:
        config: Of this tool.
        further: Overrides of the training config, as typed.
    """
    settings: ConvertConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    source = settings.source
    if source not in PROGRAMS:
        raise InputError(
            f"source={source}: expected one of {', '.join(PROGRAMS)}"
            + did_you_mean(source, PROGRAMS)
        )
    path, output = Path(settings.input).expanduser(), Path(settings.output).expanduser()
    refuse_output(output)
    require_writable(output.absolute().parent)
    tensors = read_state_dict(path, "input", foreign=FOREIGN)
    renamed, left_out = rename(tensors, source)
    if not renamed:
        raise InputError(
            f"input={path}: none of its {len(tensors)} tensors has a name of source={source}; they "
            f"are called {', '.join(list(tensors)[:3])}; give the program that wrote it"
        )
    network, num_classes = network_of(renamed, f"input={path}")
    network += PROGRAMS[source]["trained_with"]
    train = train_config([*network, *further], num_classes, f"input={path}")
    torch.manual_seed(train.seed)
    state, fresh = fill_in(renamed, make_model(train).state_dict(), source, f"input={path}")
    classes, palette = classes_of(train)
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_format.save(
        output,
        {
            "format": checkpoint_format.FORMAT,
            "version": danet.__version__,
            "config": train.plain,
            "classes": list(classes),
            "palette": [list(color) for color in palette],
            "model": state,
            "ema": None,
            "optimizer": None,
            "scaler": None,
            "processes": 1,
            "step": 0,
            "best_score": None,
            "scores": None,
        },
    )
    for note in account(renamed, left_out, fresh):
        cli.say(note)
    cli.say(f"{output}: {network[0]}, {len(classes)} classes of {train_name(train)}")
    for assumed in PROGRAMS[source]["trained_with"]:
        if not any(text.startswith(assumed.partition("=")[0]) for text in further):
            cli.say(f"  assumed, since the file does not specify it: {assumed}")
    if num_classes is None:
        cli.say(f"  it has no head yet: train with {shlex.quote(f'init_from={output}')}")
    else:
        setting = shlex.quote(f"checkpoint={output}")
        cli.say(f"  python tools/eval.py {setting} data.root=<folder>")


def refuse_output(output: Path) -> None:
    """Refuse a name that exists or does not have the suffix of a checkpoint."""
    if output.suffix not in reading.SUFFIXES:
        raise InputError(f"output={output}: expected a name that ends in .pt")
    if output.exists():
        raise InputError(f"output={output}: there is such a file already; give another name")


def train_config(settings: list[str], num_classes: int | None, file: str) -> TrainConfig:
    """Compose the training config that describes a network.

    Raises:
        InputError: The data set is unknown or has another number of classes.
    """
    chosen = [setting for setting in settings if setting.startswith("data=")]
    data = DATA.get(num_classes or 0)
    if data is None and not chosen:
        raise InputError(
            f"{file}: which classes are meant? It has {num_classes or 'none'}; name a "
            "data set, as in data=camvid, or data=folder 'data.classes=[a,b]'"
        )
    own = [] if chosen else [f"data={data}"]
    composed = hydra.compose(
        "train", overrides=[*own, "optimizer=sgd", "schedule.warmup_steps=0", *settings]
    )
    if OmegaConf.is_missing(composed.data, "root"):
        composed.data.root = "."  # given when the checkpoint is used
    checked = check(composed)
    count, name = checked.data.num_classes, chosen[-1][5:] if chosen else data
    if num_classes not in (None, count):
        raise InputError(
            f"{file}: it has {num_classes} classes, and data={name} has {count}; leave "
            "it out, or name the data set the network was trained on"
        )
    return checked


def classes_of(train: TrainConfig) -> tuple[list[str], list[Any]]:
    """Return names and colours of the classes, without reading files of the data set."""
    node = train.data.dataset
    target = locate(node["_target_"], "data")
    classes = node.get("classes") or target.classes
    palette = node.get("palette") or node.get("colors") or getattr(target, "palette", None)
    return list(classes), list(palette or default_palette(classes))


def train_name(train: TrainConfig) -> str:
    """Return the class name of the data set."""
    return str(train.data.dataset["_target_"]).rpartition(".")[2]


def account(renamed: Collection[str], left_out: Mapping[str, str], fresh: list[str]) -> list[str]:
    """Return which tensors of the file were taken or left out, and which are random, as lines."""
    lines = [f"{len(renamed)} tensors taken"]
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        lines.append(f"left out, {reason}: {', '.join(names)}")
    if fresh:
        lines.append(f"not in the file, so random: {', '.join(fresh)}")
    return lines


def main() -> None:
    """Run the command ``danet-convert``."""
    own = tuple(f"{field.name}=" for field in fields(ConvertConfig))
    given = sys.argv[1:]
    sys.argv[1:] = [text for text in given if text.startswith(("-", *own))]
    further = [cli.quote(text) for text in given if text not in sys.argv[1:]]
    cli.run(partial(run, further=further), "convert")


if __name__ == "__main__":
    main()
