"""Export a network to other formats: ``python tools/export.py checkpoint=PATH``."""

import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from danet import cli
from danet.checkpoint import exported
from danet.config.build import checked_config, load_saved, make_dataset, model_of
from danet.config.schema import ExportConfig, TrainConfig, did_you_mean
from danet.datasets.base import SegmentationDataset
from danet.errors import InputError, UserError
from danet.export import demo, folder
from danet.export.programs import (
    SMALLEST,
    Parity,
    Program,
    compare,
    compare_on,
    export_onnx,
    export_torch,
)
from danet.export.quantised import export_int8
from danet.extras import require
from danet.filesystem import folder_of, require_writable
from danet.ops.resize import resize
from danet.plain import problem_with
from danet.prediction.results import weights_digest

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2", "int8": "model_int8.onnx"}
COMPARED = 8
"""Pictures on which int8 is compared with the network."""
LEAST_AGREEMENT = 0.8
"""Fraction of their pixels that must have the same class."""


def run(config: DictConfig) -> None:
    """Write the folder, the programs and the card; upload them if requested."""
    settings: ExportConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    settings.formats = formats = chosen_formats(settings)
    refuse_settings(settings)
    saved = load_saved(settings.checkpoint)
    trained = checked_config(saved, settings.checkpoint, settings.data)
    model = model_of(saved, trained, settings.checkpoint)
    path = Path(settings.checkpoint).expanduser()
    beside = path if path.is_dir() else path.parent
    origin = {"step": saved["step"], "run_id": saved.get("run_id")}
    default = folder_of(beside / "exported", exported.CONFIG, origin)
    output = Path(settings.output).expanduser() if settings.output else default
    found = find_metrics(settings.metrics, beside, saved["step"], weights_digest(model))
    require_writable(output)
    refuse_leftovers(output, [*(FORMATS[f] for f in formats), *["demo"] * settings.demo], origin)
    if settings.demo and model.bands:
        raise InputError("demo=true: the page is for RGB of 8 bits, and this network has bands")
    settings.size = program_size(model, settings)
    data = calibration_data(trained) if "int8" in formats else []
    runtime = demo.find_runtime(settings.demo_runtime) if settings.demo else {}

    folder.save(output, saved, model.state_dict())
    print_file(output / exported.WEIGHTS)
    programs: dict[str, Sequence[Parity]] = {}
    for name in formats:
        programs[FORMATS[name]] = write_program(model, name, output, settings, data)
    num_weights = sum(p.numel() for p in model.parameters())
    text = folder.card(
        saved,
        num_weights=num_weights,
        programs=programs,
        opset=settings.opset,
        size=settings.size,
        metrics=found,
    )
    (output / "README.md").write_text(text, encoding="utf-8")
    print_file(output / "README.md")
    if settings.demo:
        page = demo.write(output / "demo", saved, trained, runtime)
        print(f"{page}: a page for the browser; to see it at http://localhost:8000:")
        print(f"python -m http.server -d {shlex.quote(str(page))}")
    if settings.push:
        print(folder.push(output, settings.push, private=settings.private))


def chosen_formats(settings: ExportConfig) -> list[str]:
    """Return ``formats``; by default onnx, or none and a note if its packages are missing."""
    if settings.formats is None and not settings.demo:
        try:
            require_onnx()
        except InputError as error:
            print(f"model.onnx is left out: {error}")
            return []
    return ["onnx"] if settings.formats is None else settings.formats


def require_onnx() -> None:
    """Raise InputError if a package that ONNX files need is missing."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)


def refuse_leftovers(output: Path, written: Sequence[str], origin: Mapping[str, Any]) -> None:
    """Raise InputError for a folder where programs of another run or step would stay."""
    stale = [file for file in (*FORMATS.values(), "demo") if file not in written]
    stale = [file for file in stale if (output / file).exists()]
    if stale and folder_of(output, exported.CONFIG, origin) != output:
        raise InputError(
            f"output={output}: {stale[0]} of another run or step is there and would stay; name "
            "another folder, or remove it"
        )


def program_size(model: nn.Module, settings: ExportConfig) -> list[int] | None:
    """Return height and width of the pictures of programs; None for any size."""
    only: Sequence[int] | None = getattr(model.backbone, "size", None)
    size = settings.size or (list(only) if only else None)
    where = "the backbone computes {} x {} only"
    if only and size != list(only):
        raise InputError(f"size={settings.size}: {where.format(*only)}; leave size out")
    if settings.demo and size:
        reason = where.format(*only) if only else "leave size out"
        raise InputError(f"demo=true: the page takes pictures of any size; {reason}")
    return size


def calibration_data(trained: TrainConfig) -> list[SegmentationDataset]:
    """Return the data sets for int8: of training, and of validation or else of training again."""
    splits = trained.data.train_split, trained.data.val_split or trained.data.train_split
    return [make_dataset(trained, split, training=False) for split in splits]


def pictures(
    dataset: SegmentationDataset, count: int, size: Sequence[int] | None
) -> Iterator[Tensor]:
    """Yield up to ``count`` evenly spread images, (1, N, H, W), resized to ``size`` if given."""
    for index in np.unique(np.linspace(0, len(dataset) - 1, count).astype(int)).tolist():
        image = torch.from_numpy(dataset[index].image).movedim(-1, 0)[None]
        resized = resize(image.float(), tuple(size or image.shape[2:]), align_corners=False)
        if not image.is_floating_point():
            resized = resized.round()
        yield resized.to(image.dtype).contiguous()


def write_program(
    model: nn.Module,
    name: str,
    output: Path,
    settings: ExportConfig,
    data: Sequence[SegmentationDataset],
) -> Sequence[Parity]:
    """Write one program and compare it with the network."""
    path, size, opset = output / FORMATS[name], settings.size, settings.opset
    if name == "int8":
        training = pictures(data[0], settings.calibration, size)
        program = export_int8(model, path, training, opset, size)
        found = [compare_int8(model, program, pictures(data[1], COMPARED, size))]
    else:
        is_onnx = name == "onnx"
        export = partial(export_onnx, opset=opset) if is_onnx else export_torch
        found = compare(model, export(model, path, size=size), [size] if size else settings.sizes)
    print_file(path)
    for parity in found:
        print(
            f"  {parity.height} x {parity.width}: logits differ by at most "
            f"{parity.difference:.2g} of {parity.scale:.3g}, "
            f"{100 * parity.agreement:.3f} % of the pixels have the same class"
        )
    return found


def compare_int8(model: nn.Module, program: Program, images: Iterable[Tensor]) -> Parity:
    """Compare a quantised program with its network on images.

    Raises UserError if fewer than ``LEAST_AGREEMENT`` of the pixels have the same class.
    """
    each = [compare_on(image, model, program) for image in images]
    agreement = sum(found.agreement for found in each) / len(each)
    if agreement < LEAST_AGREEMENT:
        raise UserError(
            f"int8: only {100 * agreement:.1f} % of the pixels have the network's class, and "
            f"{100 * LEAST_AGREEMENT:.0f} % are the least, so the file should not be used; "
            "calibrate on more pictures"
        )
    return max(each, key=lambda found: found.difference)._replace(agreement=agreement)


def refuse_settings(settings: ExportConfig) -> None:
    """Raise InputError for settings that are out of range, or need packages that are missing."""
    formats = settings.formats or []
    for name in formats:
        if name not in FORMATS:
            raise InputError(
                f"formats: there is no {name}{did_you_mean(name, FORMATS)}; expected some of "
                f"{', '.join(FORMATS)}; safetensors are always written"
            )
    if not all(map(is_size, settings.sizes)):
        raise InputError(
            f"sizes={settings.sizes}: expected pairs [height,width] of at least {SMALLEST}"
        )
    if settings.size is not None and not is_size(settings.size):
        raise InputError(f"size={settings.size}: expected [height,width] of at least {SMALLEST}")
    if settings.calibration < 1:
        raise InputError(f"calibration={settings.calibration}: expected at least 1")
    if settings.opset < 18:
        raise InputError(f"opset={settings.opset}: expected at least 18, which the exporter needs")
    if settings.demo and "onnx" not in formats:
        raise InputError(f"demo=true runs model.onnx: formats={formats} lacks onnx")
    if settings.demo_runtime and not settings.demo:
        raise InputError("demo_runtime is for the page of demo=true; set that as well")
    if {"onnx", "int8"}.intersection(formats):
        require_onnx()
    if settings.push:
        require("huggingface_hub")


def is_size(value: Any) -> bool:
    """Return whether a setting is a height and a width that programs can compute."""
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(isinstance(n, int) and n >= SMALLEST for n in value)


def are_scores(metrics: Any) -> bool:
    """Return whether the content of a file is what ``tools/eval.py`` writes."""
    fields = {"split": str, "images": int, "step": int, "evaluation": dict, "per_class": dict}
    if not isinstance(metrics, dict) or problem_with(metrics, ""):
        return False
    if not all(isinstance(metrics.get(key), kind) for key, kind in fields.items()):
        return False
    found = [values for values in metrics["per_class"].values() if isinstance(values, dict)]
    return (
        "_target_" in metrics["evaluation"]
        and len(found) == len(metrics["per_class"])
        and all(v is None or isinstance(v, (float, int)) for c in found for v in c.values())
    )


def find_metrics(wanted: str | None, beside: Path, step: int, network: str) -> list[dict[str, Any]]:
    """Read scores for the card: the file that was named, or those beside the checkpoint.

    Args:
        wanted: The setting ``metrics``.
        beside: Folder of the checkpoint and, by default, of its evaluations.
        step: Of the checkpoint.
        network: The digest of its weights, which old files of scores lack.

    Raises:
        InputError: A file that was named is none of ``tools/eval.py``.
    """
    files = [Path(wanted).expanduser()] if wanted else sorted(beside.glob("*/metrics.json"))
    found = []
    for file in files:
        try:
            metrics = json.loads(file.read_text("utf-8"))
            is_right = are_scores(metrics)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"metrics={file}: not readable ({error})") from error
        if wanted and not is_right:
            raise InputError(f"metrics={file}: not a metrics.json of tools/eval.py")
        if is_right and metrics["step"] == step and metrics.get("network") in (None, network):
            found.append(metrics)
        elif wanted:
            raise InputError(
                f"metrics={file}: scores of step {metrics['step']}, the checkpoint has step {step}"
                + (", but other weights" if metrics["step"] == step else "")
            )
    return found


def print_file(path: Path) -> None:
    """Print the path and the size of a file that was written."""
    size = path.stat().st_size
    print(f"{path}  {size / 2**20:.1f} MiB" if size >= 2**20 else f"{path}  {size / 2**10:.1f} KiB")


def main() -> None:
    """Run the command ``danet-export``."""
    cli.run(run, "export")


if __name__ == "__main__":
    main()
