"""Export a network to other formats: ``python tools/export.py checkpoint=PATH``."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

from omegaconf import DictConfig, OmegaConf
from torch import nn

from danet import cli
from danet.checkpoint import exported
from danet.config.build import checked_config, load_saved, model_of
from danet.config.schema import ExportConfig, did_you_mean
from danet.errors import InputError
from danet.export import demo, folder
from danet.export.programs import SMALLEST, Parity, compare, export_onnx, export_torch
from danet.extras import require
from danet.filesystem import folder_of, require_writable
from danet.plain import problem_with
from danet.prediction.results import weights_digest

FORMATS = {"onnx": "model.onnx", "torch": "model.pt2"}


def run(config: DictConfig) -> None:
    """Write the folder, the programs and the card; upload them if requested."""
    settings: ExportConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    settings.formats = formats = chosen_formats(settings)
    refuse_settings(settings)
    saved = load_saved(settings.checkpoint)
    trained = checked_config(saved, settings.checkpoint)
    model = model_of(saved, trained, settings.checkpoint)
    path = Path(settings.checkpoint).expanduser()
    beside = path if path.is_dir() else path.parent
    default = folder_of(beside / "exported", exported.CONFIG, {"step": saved["step"]})
    output = Path(settings.output).expanduser() if settings.output else default
    found = find_metrics(settings.metrics, beside, saved["step"], weights_digest(model))
    require_writable(output)
    refuse_leftovers(
        output, [*(FORMATS[f] for f in formats), *["demo"] * settings.demo], saved["step"]
    )
    if settings.demo and model.bands:
        raise InputError("demo=true: the page is for RGB of 8 bits, and this network has bands")
    size = getattr(model.backbone, "size", None)
    if formats and size:
        raise InputError(
            f"formats={formats}: programs are for images of any size, and the backbone "
            f"computes {size[0]} x {size[1]} only; set 'formats=[]'"
        )
    runtime = demo.find_runtime(settings.demo_runtime) if settings.demo else {}

    folder.save(output, saved, model.state_dict())
    print_file(output / exported.WEIGHTS)
    programs: dict[str, Sequence[Parity]] = {}
    for name in formats:
        programs[FORMATS[name]] = write_program(model, name, output, settings)
    num_weights = sum(p.numel() for p in model.parameters())
    text = folder.card(
        saved, num_weights=num_weights, programs=programs, opset=settings.opset, metrics=found
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


def refuse_leftovers(output: Path, written: Sequence[str], step: int) -> None:
    """Raise InputError for a folder where programs of another step would stay."""
    stale = [file for file in (*FORMATS.values(), "demo") if file not in written]
    stale = [file for file in stale if (output / file).exists()]
    if stale and folder_of(output, exported.CONFIG, {"step": step}) != output:
        raise InputError(
            f"output={output}: {stale[0]} of another step is there and would stay; name "
            "another folder, or remove it"
        )


def write_program(
    model: nn.Module, name: str, output: Path, settings: ExportConfig
) -> Sequence[Parity]:
    """Write one program and compare it with the network."""
    path = output / FORMATS[name]
    is_onnx = name == "onnx"
    program = export_onnx(model, path, settings.opset) if is_onnx else export_torch(model, path)
    print_file(path)
    found = compare(model, program, [(height, width) for height, width in settings.sizes])
    for parity in found:
        print(
            f"  {parity.height} x {parity.width}: logits differ by at most "
            f"{parity.difference:.2g} of {parity.scale:.3g}, "
            f"{100 * parity.agreement:.3f} % of the pixels have the same class"
        )
    return found


def refuse_settings(settings: ExportConfig) -> None:
    """Raise InputError for settings that are out of range, or need packages that are missing."""
    formats = settings.formats or []
    for name in formats:
        if name not in FORMATS:
            raise InputError(
                f"formats: there is no {name}{did_you_mean(name, FORMATS)}; expected some of "
                f"{', '.join(FORMATS)}; safetensors are always written"
            )
    for size in settings.sizes:
        is_pair = isinstance(size, list) and len(size) == 2
        if not is_pair or not all(isinstance(n, int) and n >= SMALLEST for n in size):
            raise InputError(
                f"sizes={settings.sizes}: expected pairs [height,width] of at least {SMALLEST}"
            )
    if settings.opset < 18:
        raise InputError(f"opset={settings.opset}: expected at least 18, which the exporter needs")
    if settings.demo and "onnx" not in formats:
        raise InputError(f"demo=true runs model.onnx: formats={formats} lacks onnx")
    if settings.demo_runtime and not settings.demo:
        raise InputError("demo_runtime is for the page of demo=true; set that as well")
    if "onnx" in formats:
        require_onnx()
    if settings.push:
        require("huggingface_hub")


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
