"""Compare runs: ``python tools/compare.py RUN RUN ...``, where a RUN is a folder."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

import yaml

from danet import console
from danet.engine.log import read_metrics
from danet.engine.trackers import plain_settings
from danet.errors import InputError, UserError
from danet.filesystem import explain_storage, write_file
from danet.plain import problem_with
from danet.visualization.report import Curve, chart, named_curves, render

_NOT_COMPARED = ("run.", "resume", "hydra.", "defaults", "data.dataset.")
"""Beginnings of keys; those of the last follow other keys of ``data``."""
_CURVES = (
    ("loss", "train", "loss"),
    ("validation, mean IoU", "val", "miou"),
    ("validation, pixel accuracy", "val", "pixel_accuracy"),
    ("images per second", "train", "images_per_second"),
    ("validation, loss", "val", "loss"),
)
"""Title, kind of lines of metrics.jsonl, and key of each chart."""


class Run(NamedTuple):
    """Settings and metrics of a run."""

    name: str
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    """Records of metrics.jsonl."""


def read_run(folder: Path, name: str) -> Run:
    """Read config.yaml and metrics.jsonl; raise InputError."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        problem = problem_with(config, "config")
        if problem:
            raise InputError(f"{folder}: {problem}")
        flat = plain_settings(config)
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(
            f"{folder}: not the folder of a run (no readable config.yaml in it)"
        ) from error
    lines = read_metrics(folder / "metrics.jsonl")
    return Run(name, {k: v for k, v in flat.items() if not k.startswith(_NOT_COMPARED)}, lines)


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings whose values differ, each with the value of every run."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [run.config.get(key, "-") for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(map(str, values))) > 1}


def curve(run: Run, kind: str, key: str) -> Curve:
    """Return a curve of one kind of lines; empty where the run has none."""
    return named_curves(run.lines, kind, key).get(key, ())


def scores_of(run: Run) -> dict[str, str]:
    """Return the scores of a run as text; a dash where it has none."""
    loss, miou, accuracy, rates, _ = (
        [value for _, value in curve(run, kind, key)] for _, kind, key in _CURVES
    )
    return {
        "step": str(max((line["step"] for line in run.lines), default="-")),
        "best mIoU": f"{100 * max(miou):.2f}" if miou else "-",
        "mIoU": f"{100 * miou[-1]:.2f}" if miou else "-",
        "pixel accuracy": f"{100 * accuracy[-1]:.2f}" if accuracy else "-",
        "loss": f"{loss[-1]:.4f}" if loss else "-",
        "images/s": f"{statistics.median_high(rates):.1f}" if rates else "-",
    }


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return a head and one row per run: its name, scores, and values of differing settings."""
    keys, scores = differing(runs), [scores_of(run) for run in runs]
    return [["run", *scores[0], *keys]] + [
        [run.name, *scores[i].values(), *(str(values[i]) for values in keys.values())]
        for i, run in enumerate(runs)
    ]


def as_text(rows: Sequence[Sequence[str]], *, width: int = 100) -> str:
    """Return a table as text; if it is wider than ``width``, transposed."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 2 * len(widths) > width:
        rows = list(zip(*rows, strict=True))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def as_page(runs: Sequence[Run]) -> str:
    """Return an HTML page with the table and the curves of all runs."""
    charts = [
        chart(title, {run.name: curve(run, kind, key) for run in runs})
        for title, kind, key in _CURVES
    ]
    return render(
        "runs.html", title=f"Comparison of {len(runs)} runs", rows=table(runs), charts=charts
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, as names of the runs."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("the same folder is named twice")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command ``danet-compare``."""
    parser = argparse.ArgumentParser(
        description="Prints scores and differing settings of runs, and draws their curves."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a config.yaml")
    parser.add_argument("--page", type=Path, help="write a page with table and curves here (HTML)")
    options = parser.parse_args(arguments)
    with console.unbreakable():
        try:
            folders = [path.parent if path.is_file() else path for path in options.runs]
            names = names_of(folders)
            runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
            if options.page:
                write_file(options.page, as_page(runs))
            print(as_text(table(runs)))
            if options.page:
                print(options.page)
        except (UserError, OSError) as error:
            problem = error if isinstance(error, UserError) else explain_storage(error)
            if problem is None:
                raise
            print(f"error: {problem}", file=sys.stderr)
            sys.exit(problem.exit_code)


if __name__ == "__main__":
    main()
