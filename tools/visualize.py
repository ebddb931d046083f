"""Draws what a checkpoint sees and attends to: ``python tools/visualize.py checkpoint=PATH``."""

import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from danet import cli
from danet.assemble import checked_config, load_saved, make_dataset, model_of
from danet.check import did_you_mean
from danet.config import VisualizeConfig
from danet.datasets.base import IMAGE_SUFFIXES
from danet.datasets.files import read_image
from danet.drawing.attention import Point, figure, has_attention
from danet.drawing.overlay import predict, save_image, sheet
from danet.engine import distributed
from danet.errors import InputError

Picture = tuple[str, np.ndarray, np.ndarray | None]
"""A name, an image, and its true classes where they are known."""


def work(config: DictConfig) -> None:
    """Loads the checkpoint and writes one or two pictures for each chosen image."""
    settings: VisualizeConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    saved = load_saved(settings.checkpoint)
    trained = checked_config(saved, settings.checkpoint, settings.data)
    model = model_of(saved, trained, settings.checkpoint)
    classes, palette = saved["classes"], [tuple(color) for color in saved["palette"]]
    points, wanted = read_points(settings.points), find_classes(settings.classes, classes)
    if settings.images:
        pictures = own_pictures(Path(settings.images).expanduser())
        source = "own"
    else:
        source = settings.split or trained["data"]["val_split"]
        dataset = make_dataset(trained, source, training=False)
        chosen = np.linspace(0, len(dataset) - 1, min(settings.count, len(dataset))).round()
        pictures = ((s.name, s.image, s.mask) for s in (dataset[int(i)] for i in chosen))

    device = distributed.choose_device(settings.device)
    model.to(device)
    default = Path(settings.checkpoint).parent / f"pictures_{source}"
    output = Path(settings.output).expanduser() if settings.output else default
    for name, image, truth in pictures:
        prediction = predict(model, image, device)
        drawn = sheet(image, prediction, truth, classes, palette, opacity=settings.opacity)
        save_image(output / f"{name}.png", drawn)
        if settings.attention and has_attention(model):
            tensor = torch.from_numpy(image).permute(2, 0, 1)[None].to(device)
            here = [p for p in points if p.x < image.shape[1] and p.y < image.shape[0]]
            if points and not here:
                raise InputError(
                    f"points={settings.points}: none lies in {name}, which is "
                    f"{image.shape[1]} x {image.shape[0]}"
                )
            drawn = figure(
                model,
                tensor,
                image,
                prediction,
                truth,
                classes,
                palette,
                points=here,
                wanted=wanted,
            )
            save_image(output / f"{name}_attention.png", drawn)
        print(output / f"{name}.png", flush=True)


def own_pictures(path: Path) -> Iterator[Picture]:
    """Reads a file, or all pictures of a folder."""
    if not path.exists():
        raise InputError(f"images={path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(path.iterdir())
    files = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"images={path}: no pictures there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else file.name for file in files]
    return ((name, read_image(file), None) for name, file in zip(names, files, strict=True))


def read_points(values: list[object] | None) -> list[Point]:
    """Checks ``points=[[x,y],...]``."""
    points = []
    for value in values or []:
        whole = (
            isinstance(value, list) and len(value) == 2 and all(isinstance(n, int) for n in value)
        )
        if not isinstance(value, list) or not whole or min(value) < 0:
            raise InputError(
                f"points={values}: expected pairs of pixels, points=[[120,40],[300,52]]"
            )
        points.append(Point(*value))
    return points


def find_classes(names: list[str] | None, classes: list[str]) -> list[int]:
    """Turns names of classes into indices."""
    for name in names or []:
        if name not in classes:
            raise InputError(
                f"classes: the checkpoint has no class {name}{did_you_mean(name, classes)}; "
                f"it has {', '.join(classes)}"
            )
    return [classes.index(name) for name in names or []]


def main() -> None:
    """Is the command ``danet-visualize``."""
    cli.run(work, "visualize")


if __name__ == "__main__":
    main()
