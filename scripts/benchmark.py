"""Measure ours against plain references, in one process and by turns; docs/benchmarks.md.

python scripts/benchmark.py                                all parts
python scripts/benchmark.py attention step --json out.jsonl
python scripts/benchmark.py --quick                        check that the parts run and agree
"""

import argparse
import importlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import torch
from bench.measure import Options, Row, return_freed_memory, table
from provenance import commit, processor

PARTS = {
    "attention": "bench.attention",
    "step": "bench.step",
    "eval": "bench.evaluation",
    "data": "bench.data",
    "startup": "bench.startup",
    "scaling": "bench.scaling",
}
"""Each module has ``run(options) -> list[Row]``."""


def circumstances(options: Options) -> dict[str, Any]:
    """Return what identifies a measurement: device, versions, threads, commit and command."""
    device = options.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "quick": options.quick,
    }


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; or all")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=auto)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; figures mean nothing")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--profile", action="store_true", help="print the operators of a step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line per figure")
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts: {', '.join(PARTS)}")
    return chosen


def main() -> None:
    """Run one part, or each of several in a process of its own, one after another."""
    chosen = arguments()
    if len(chosen.parts) == 1:
        failed = run_part(chosen.parts[0], chosen)
    else:
        flags = [argument for argument in sys.argv[1:] if argument not in PARTS]
        # A part that fails, or disagrees with its reference, must not cost the figures of others.
        failed = [
            part
            for part in chosen.parts or PARTS
            if subprocess.run([sys.executable, __file__, part, *flags], check=False).returncode
        ]
    if failed:
        sys.exit(f"FAILED: {', '.join(failed)}")


def run_part(part: str, chosen: argparse.Namespace) -> list[str]:
    """Run a part, print its table, append the figures to the JSON file; return what failed."""
    options = Options(
        torch.device(chosen.device), chosen.quick, chosen.precision, profile=chosen.profile
    )
    # As in training, where crops have one size. TF32 is off until a case asks for it.
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    around = circumstances(options)
    for key, value in around.items():
        print(f"{key:<8} {value}", flush=True)
    return_freed_memory()
    torch.manual_seed(0)
    rows: list[Row] = importlib.import_module(PARTS[part]).run(options)
    print(f"\n{table(rows)}\n", flush=True)
    if chosen.json:
        with open(chosen.json, "a") as file:
            for row in rows:
                figures = {**row._asdict(), "ratio": row.ratio, "failed": row.has_failed}
                file.write(json.dumps({**figures, **around}) + "\n")
    return [f"{row.case}, {row.note}" for row in rows if row.has_failed]


if __name__ == "__main__":
    main()
