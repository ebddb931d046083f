"""Benchmark where an exported network runs: time, memory, logits and mIoU of each runtime.

python scripts/bench/deployment.py resnet50 360 480 --work work/r50
python scripts/bench/deployment.py resnet50 1024 2048 --work work/r50 --repeats 3 --rows ort
python scripts/bench/deployment.py runs/x/best.pt 360 480 --work work/x --root /data/camvid --miou

Each runtime is a process of its own. Exports and figures stay in the folder ``--work``: what is
there is not done again, so the same command continues, and ``--rows`` does some of the rows.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from provenance import commit, processor
from torch import Tensor, nn

from bench.evaluation import picture
from bench.step import make_network
from danet.config.build import checked_config, load_saved, make_dataset, model_of
from danet.config.schema import DataFolder
from danet.datasets.base import SegmentationDataset
from danet.export.programs import export_onnx, export_torch
from danet.export.quantised import export_int8
from danet.tools.export import pictures

RUNTIMES = Path(__file__).with_name("runtimes.py")


class Case(NamedTuple):
    """A row of the table."""

    title: str
    runtime: str
    """A function of runtimes.py."""
    file: str
    """That it loads; empty for the checkpoint."""


ROWS = {
    "pytorch": Case("PyTorch, as tools/eval.py runs it", "pytorch", ""),
    "torch": Case("torch.export, any size", "torch_export", "model.pt2"),
    "torch_fixed": Case("torch.export, one size", "torch_export", "fixed.pt2"),
    "ort": Case("ONNX Runtime, any size", "onnxruntime", "model.onnx"),
    "ort_fixed": Case("ONNX Runtime, one size", "onnxruntime", "fixed.onnx"),
    "ort_int8": Case("ONNX Runtime, int8", "onnxruntime", "int8.onnx"),
    "openvino": Case("OpenVINO, any size", "openvino", "model.onnx"),
    "openvino_fixed": Case("OpenVINO, one size", "openvino", "fixed.onnx"),
    "openvino_bf16": Case(
        "OpenVINO, one size, default precision", "openvino_default", "fixed.onnx"
    ),
    "openvino_int8": Case("OpenVINO, int8", "openvino", "int8.onnx"),
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", help="a checkpoint, or resnet50 for random weights")
    parser.add_argument("size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--work", type=Path, required=True, help="folder of exports and figures")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of them, with commas")
    parser.add_argument("--root", help="where the data of the checkpoint is")
    parser.add_argument("--miou", action="store_true", help="also score the validation split")
    parser.add_argument("--calibration", type=int, default=64, help="pictures for int8")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def network_of(name: str) -> nn.Module:
    """Return the network of a checkpoint, or one with random weights."""
    if name == "resnet50":
        return make_network(50).eval()
    saved = load_saved(name)
    return model_of(saved, checked_config(saved, name), name)


def data_of(chosen: argparse.Namespace, use: str) -> SegmentationDataset | None:
    """Return a split of a checkpoint's data, ``train`` or ``val``; None for random weights."""
    if chosen.network == "resnet50":
        return None
    trained = checked_config(
        load_saved(chosen.network), chosen.network, DataFolder(root=chosen.root)
    )
    split = trained.data.train_split if use == "train" else trained.data.val_split
    return make_dataset(trained, split or trained.data.train_split, training=False)


def images_of(chosen: argparse.Namespace, use: str, count: int) -> list[Tensor]:
    """Return pictures, uint8 (1, 3, H, W): of a split, or noise for random weights."""
    dataset = data_of(chosen, use)
    if dataset is None:
        return [picture(*chosen.size, torch.device("cpu"))]
    return list(pictures(dataset, count, chosen.size))


def prepare(chosen: argparse.Namespace, folder: Path) -> None:
    """Write the pictures, their labels for ``--miou``, and the network's logits of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "logits.npy").exists():
        return
    images = images_of(chosen, "val", 1)
    dataset = data_of(chosen, "val") if chosen.miou else None
    if dataset is not None:
        samples = [dataset[i] for i in range(len(dataset))]
        images = [torch.from_numpy(s.image).movedim(-1, 0)[None] for s in samples]
        np.save(folder / "masks.npy", np.stack([s.mask for s in samples]))
    np.save(folder / "images.npy", torch.cat(images).numpy())
    model = network_of(chosen.network)
    with torch.inference_mode():
        np.save(folder / "logits.npy", model(images[0]).logits.numpy())


def export(chosen: argparse.Namespace, file: str, folder: Path) -> Path:
    """Return a file of the network, written if it is not there."""
    place = chosen.work if file.startswith("model") else folder
    path = place / file
    if path.exists():
        return path
    model, size = network_of(chosen.network), chosen.size
    if file == "int8.onnx":
        export_int8(model, path, iter(images_of(chosen, "train", chosen.calibration)), size=size)
    else:
        write = export_torch if file.endswith("pt2") else export_onnx
        write(model, path, size=size if file.startswith("fixed") else None)
    return path


def run_row(chosen: argparse.Namespace, case: Case, folder: Path) -> dict[str, object]:
    """Export, and measure in a process of its own; an error becomes the row."""
    try:
        path = export(chosen, case.file, folder) if case.file else chosen.network
    except Exception as error:  # whatever an exporter raises is the result
        return {"error": first_line(str(error))}
    threads, repeats = str(chosen.threads), str(chosen.repeats)
    command = [sys.executable, str(RUNTIMES), case.runtime]
    command += [str(path), threads, str(folder), repeats]
    around = {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **around})
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "Check '" in line]
        return {"error": first_line((lines or [f"ended with {done.returncode}"])[-1])}
    return json.loads(done.stdout.splitlines()[-1])


def first_line(text: str) -> str:
    """Return the first line of an error, as a cell of a table."""
    return (text.strip() or "unknown").splitlines()[0][:160].replace("|", "/")


def table(figures: dict[str, dict]) -> str:
    """Return the Markdown table of the rows that are there."""
    lines = [
        "| runtime | load, s | ms per picture | MiB on top, in all | logits differ by | same class "
        "| mIoU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in ROWS.items():
        found = figures.get(name)
        if not found:
            continue
        if "error" in found:
            lines.append(f"| {case.title} | does not run: {found['error']} | | | | | |")
            continue
        median, low, high = found["ms"]
        miou = "" if found["miou"] is None else f"{100 * found['miou']:.2f}"
        cells = (
            *(case.title, f"{found['load']:.1f}", f"{median:.0f} ({low:.0f} to {high:.0f})"),
            *(f"{found['on_top']:.0f}, {found['whole']:.0f}",),
            *(f"{found['difference']:.1e} of {found['largest']:.3g}",),
            *(f"{100 * found['same']:.2f} %", miou),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the rows that are not there yet, and print the table."""
    chosen = arguments()
    folder = chosen.work / "{}x{}".format(*chosen.size)
    results = folder / "rows.json"
    torch.set_num_threads(chosen.threads)
    prepare(chosen, folder)
    figures = json.loads(results.read_text()) if results.exists() else {}
    for name in chosen.rows.split(","):
        if name not in ROWS:
            sys.exit(f"--rows: there is no {name}; rows: {','.join(ROWS)}")
        if name not in figures:
            figures[name] = run_row(chosen, ROWS[name], folder)
            results.write_text(json.dumps(figures, indent=1))
            print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    print(f"{processor()}, {chosen.threads} threads, commit {commit()}\n\n{table(figures)}")


if __name__ == "__main__":
    main()
