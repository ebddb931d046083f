"""Compare runs: ``python tools/compare.py RUN RUN ...``, where a RUN is a folder."""

import argparse
import sys
from collections.abc import Sequence
from html import escape
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
from danet.errors import InputError, StorageError, UserError
from danet.filesystem import explain_storage
from danet.plain import problem_with
from danet.visualization.curves import chart

_NOT_COMPARED = ("run.", "resume", "hydra.", "defaults")
_SCORES = ("step", "best mIoU", "mIoU", "pixel accuracy", "loss", "images/s")


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


def scores_of(run: Run) -> dict[str, str]:
    """Return the scores of a run as text; a dash where it has none."""
    train = [line for line in run.lines if line.get("kind") == "train"]
    val = [line for line in run.lines if line.get("kind") == "val"]
    mious = [line["miou"] for line in val if line.get("miou") is not None]
    rates = sorted(line["images_per_second"] for line in train if "images_per_second" in line)
    found = {
        "step": str(max((line["step"] for line in run.lines), default="-")),
        "best mIoU": f"{100 * max(mious):.2f}" if mious else "-",
        "mIoU": f"{100 * mious[-1]:.2f}" if mious else "-",
        "pixel accuracy": f"{100 * val[-1]['pixel_accuracy']:.2f}" if val else "-",
        "loss": f"{train[-1]['loss']:.4f}" if train else "-",
        "images/s": f"{rates[len(rates) // 2]:.1f}" if rates else "-",
    }
    return {name: found[name] for name in _SCORES}


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Return a head and one row per run: its name, scores, and values of differing settings."""
    keys = differing(runs)
    head = ["run", *_SCORES, *keys]
    return [head] + [
        [run.name, *scores_of(run).values(), *(str(values[i]) for values in keys.values())]
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
    head, *rows = table(runs)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    charts = [
        chart(title, {run.name: _curve(run, kind, key) for run in runs})
        for title, kind, key in (
            ("loss", "train", "loss"),
            ("validation, mean IoU", "val", "miou"),
            ("validation, pixel accuracy", "val", "pixel_accuracy"),
            ("images per second", "train", "images_per_second"),
        )
    ]
    style = (
        "body{font:15px/1.5 sans-serif;max-width:1120px;margin:24px auto;padding:0 16px}"
        "table{border-collapse:collapse}td,th{padding:2px 12px 2px 0;text-align:left}"
        "svg{width:520px;max-width:100%}"
    )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Runs</title>"
        f"<style>{style}</style></head><body><h1>Runs</h1><table><tr>{cells}</tr>{body}</table>"
        f"{''.join(charts)}</body></html>\n"
    )


def _curve(run: Run, kind: str, key: str) -> list[tuple[float, float]]:
    return [
        (line["step"], line[key])
        for line in run.lines
        if line.get("kind") == kind and line.get(key) is not None
    ]


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ, as names of the runs."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise InputError("the same folder is named twice")


def write_page(path: Path, text: str) -> None:
    """Write the page; raise StorageError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


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
                write_page(options.page, as_page(runs))
            print(as_text(table(runs)))
            if options.page:
                print(options.page)
        except (UserError, OSError) as error:
            explained = explain_storage(error) if isinstance(error, OSError) else None
            if explained is None and not isinstance(error, UserError):
                raise
            code = error.exit_code if isinstance(error, UserError) else StorageError.exit_code
            print(f"error: {explained or error}", file=sys.stderr)
            sys.exit(code)


if __name__ == "__main__":
    main()
