"""Run a study: variants of a network at several levels, equal in everything else.

python scripts/study.py study=scenes [level=NAME] [variant=NAME] [seed=N] [runs=DIR] [results=DIR]
python scripts/study.py study=camvid data.root=<camvid>
python scripts/study.py study=frozen data.root=<camvid> frozen.kept=DIR
python scripts/study.py study=scenes list=true          list what is done, and how long it took
python scripts/study.py study=scenes results=DIR trainer.steps=9     other settings, elsewhere

The studies are defined in studies.yaml beside this file. Every run is trained, scored once, and
leaves a small file of metrics in ``results`` (docs/results); a run that has one is not repeated,
and an interrupted one is resumed. Further settings are those of the training; since they change the
study, they need ``results=DIR``. Those of a study with ``frozen: true`` are of
``scripts/frozen_heads.py``. ``python scripts/results.py`` makes tables and plots of the files.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import frozen_heads
import numpy as np
import torch
import yaml
from provenance import commit, processor

import danet
from danet.config.build import checked_config, load_saved, make_dataset
from danet.config.schema import did_you_mean
from danet.datasets.base import SegmentationDataset
from danet.errors import InputError, UserError
from danet.filesystem import atomic_write
from danet.visualization.attention import diagnose_attention, spread
from danet.visualization.evidence import deletions_by_class

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "scripts" / "studies.yaml"
RESULTS = ROOT / "docs" / "results"
OWN = ("study", "level", "variant", "seed", "runs", "results", "list")
PLACES = ("data.root", "data.num_workers", "data.cache", "trainer.device", "frozen.kept")
"""Settings of the training that do not influence a result."""
HISTORY = ("step", *(f"position/{key}" for key in ("effective", "row_cosine", "gamma", "moved")))
"""What is kept of the attention at each evaluation during a training."""
_POINTS = 60
"""Number of points of a loss curve that are kept."""
_EXAMINED = 10
"""Number of test pictures whose attention is examined."""


class Run(NamedTuple):
    """One training of a study."""

    study: str
    level: str
    variant: str
    seed: int
    settings: tuple[str, ...]
    """Of the training, without the paths of the data."""

    @property
    def name(self) -> str:
        """The stem of its files."""
        parts = (self.level, self.variant, str(self.seed))
        return "_".join(re.sub(r"\W+", "-", part).lower() for part in parts)


class Settings(NamedTuple):
    """The command line."""

    own: dict[str, str]
    places: list[str]
    """Settings among PLACES."""
    changes: list[str]
    """Further settings of the training."""


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line; raise InputError."""
    own, others = command_line.split(arguments, OWN)
    places = [text for text in others if text.partition("=")[0] in PLACES]
    changes = [text for text in others if text not in places]
    if "study" not in own:
        raise InputError(f"study: which one? study={' or study='.join(studies())}")
    if changes and "results" not in own:
        raise InputError(f"{changes[0]}: a study with other settings needs results=<folder>")
    return Settings(own, places, changes)


def studies() -> dict[str, Any]:
    """Return the definitions of all studies."""
    return dict(yaml.safe_load(STUDIES.read_text(encoding="utf-8")))


def runs_of(settings: Settings) -> list[Run]:
    """Return the requested runs, all levels and variants of a seed before the next.

    Raises:
        InputError: There is no such study, level, variant or seed.
    """
    own = settings.own
    study = _pick("study", own["study"], studies())
    found = studies()[study]
    chosen = {}
    for key, values in (
        ("level", list(found["levels"])),
        ("variant", list(found["variants"])),
        ("seed", [str(seed) for seed in found["seeds"]]),
    ):
        chosen[key] = [_pick(key, own[key], values)] if key in own else values
    return [
        Run(
            study,
            level,
            variant,
            int(seed),
            (
                *found["levels"][level],
                *found["variants"][variant],
                *settings.changes,
                f"seed={seed}",
            ),
        )
        for seed in chosen["seed"]
        for level in chosen["level"]
        for variant in chosen["variant"]
    ]


def _pick(key: str, value: str, values: Mapping[str, Any] | Sequence[str]) -> str:
    if value not in values:
        close = did_you_mean(value, values)
        raise InputError(f"{key}={value}: expected one of {', '.join(values)}{close}")
    return value


def do(run: Run, folder: Path, places: Sequence[str]) -> dict[str, Any]:
    """Train and score a run, or resume it; return the result to store.

    Raises:
        UserError: A tool ended with an error, which it has printed.
    """
    definition = studies()[run.study]
    if definition.get("frozen"):
        return do_frozen(run, folder, places)
    clock = folder.with_suffix(".seconds")
    train = ["tools/train.py", f"run.dir={folder}", "resume=auto", *run.settings, *places]
    started = time.monotonic()
    try:
        _call(train)
    finally:  # a stopped run is resumed later, and its time counts
        seconds = time.monotonic() - started
        clock.parent.mkdir(parents=True, exist_ok=True)
        before = float(clock.read_text()) if clock.is_file() else 0.0
        clock.write_text(f"{before + seconds:.1f}")
    scored = [score(definition, folder, split, places) for split in definition["splits"]]
    saved = load_saved(folder / "last.pt")
    model = danet.load_model(folder / "last.pt")
    data = make_dataset(checked_config(saved, folder), definition["splits"][0], training=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    images = config["data"]["batch_size"] * config["trainer"]["accumulate"]
    return {
        **origin(run, places),
        **scored[0],
        "other_splits": scored[1:],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds_per_step": round(images / median(x["images_per_second"] for x in steps), 3),
        "loss": curve([(x["step"], x["loss_main"]) for x in steps]),
        "minutes": round(float(clock.read_text()) / 60, 1),
        **examine(model, data),
        "history": [
            {key: rounded(value) for key, value in line.items() if key in HISTORY}
            for line in lines
            if line["kind"] == "attention"
        ],
    }


def do_frozen(run: Run, folder: Path, places: Sequence[str]) -> dict[str, Any]:
    """Train and score a head on kept features; return the result to store."""
    started = time.monotonic()
    found = frozen_heads.train([*run.settings, *places])
    frozen_heads.save(found, folder)
    return {
        **origin(run, places),
        **frozen_heads.score(found),
        "other_splits": [],
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "seconds_per_step": round(found.seconds_per_step, 3),
        "loss": curve(found.losses),
        "minutes": round((time.monotonic() - started) / 60, 1),
        **examine(found.model, found.data),
    }


def examine(model: Any, data: SegmentationDataset) -> dict[str, Any]:
    """Return what the attention of a network does on some pictures, if its head has one."""
    images = [data[index].image for index in spread(len(data), _EXAMINED)]
    found = {
        "attention": diagnose_attention(model, images),
        "deletion": deletions_by_class(model, images, data.classes),
    }
    return {key: rounded(value) for key, value in found.items() if value}


def rounded(value: Any) -> Any:
    """Round all numbers in plain data to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def origin(run: Run, places: Sequence[str]) -> dict[str, Any]:
    """Return which run a result is of, and what computed it."""
    return {
        **{key: getattr(run, key) for key in ("study", "level", "variant", "seed")},
        "command": command_of(run),
        "machine": machine(places),
        "versions": {
            "danet": danet.__version__,
            "commit": commit(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def score(
    definition: Mapping[str, Any], folder: Path, split: str, places: Sequence[str]
) -> dict[str, Any]:
    """Score a trained run of a study on a split, and return what is kept of it."""
    scored = folder / f"scored_{split}"
    command = [
        "tools/eval.py",
        f"checkpoint={folder / 'last.pt'}",
        f"split={split}",
        f"evaluation={definition['evaluation']}",
        f"boundary_ratio={definition.get('boundary_ratio', 'null')}",
        f"output={scored}",
    ]
    _call([*command, *(text for text in places if text.startswith("data.root="))])
    metrics = json.loads((scored / "metrics.json").read_text(encoding="utf-8"))
    names = "split images step protocol miou image_miou mean_accuracy pixel_accuracy boundary_miou"
    return {
        **{key: metrics[key] for key in names.split() if key in metrics},
        "iou": {name: scores["iou"] for name, scores in metrics["per_class"].items()},
    }


def curve(losses: Sequence[tuple[int, float]]) -> list[list[float]]:
    """Return the loss of the prediction alone, which every head has, at some of the steps."""
    points = [[step, round(loss, 4)] for step, loss in losses]
    return points[:: max(1, len(points) // _POINTS)]


def _call(command: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {done.returncode}")


def machine(places: Sequence[str]) -> str:
    """Describe the device that computes."""
    if torch.cuda.is_available() and "trainer.device=cpu" not in places:
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores"


def stored(run: Run, path: Path) -> dict[str, Any]:
    """Return the stored result of a run.

    Raises:
        InputError: It is from another command, since the study was changed.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    command = command_of(run)
    if found.get("command", command) != command:
        raise InputError(
            f"{path}: the result of `{found['command']}`, and the study now says `{command}`; "
            "remove the file to run it again, or name another folder with results="
        )
    return found


def command_of(run: Run) -> str:
    """Return the command that trains a run."""
    is_frozen = studies()[run.study].get("frozen")
    script = "scripts/frozen_heads.py" if is_frozen else "tools/train.py"
    return " ".join([f"python {script}", *run.settings])


def status(runs: Sequence[Run], results: Path) -> Iterator[str]:
    """Yield a line for every run: its score and duration, or the command that is left to do."""
    for run in runs:
        path = results / run.study / f"{run.name}.json"
        if path.is_file():
            found = stored(run, path)
            yield f"  done   {run.name}: mIoU {100 * found['miou']:.2f}, {found['minutes']} minutes"
        else:
            yield f"  to do  {run.name}: {command_of(run)}"


def as_text(found: Mapping[str, Any]) -> str:
    """Return a result as JSON with a line per entry."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(arguments: Sequence[str]) -> None:
    """Run or list what the command line asks for."""
    settings = parse(arguments)
    runs = runs_of(settings)
    results = Path(settings.own.get("results", RESULTS)).expanduser().absolute()
    if settings.own.get("list") == "true":
        print("\n".join(status(runs, results)))
        return
    base = Path(settings.own.get("runs", ROOT / "runs" / "study")).expanduser().absolute()
    for number, run in enumerate(runs, 1):
        path = results / run.study / f"{run.name}.json"
        if path.is_file():
            stored(run, path)
            continue
        print(f"{number} of {len(runs)}: {run.study} {run.name}", flush=True)
        found = do(run, base / run.study / run.name, settings.places)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, durable=True) as temporary:
            temporary.write_text(as_text(found), encoding="utf-8")
    print("\n".join(status(runs, results)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    command_line.run(main)
