"""List and launch the commands for the tables of the paper, and fill in what was measured.

python scripts/reproduce.py table=1 [row=r50_pam]                  published, measured, commands
python scripts/reproduce.py table=1 launch=torchrun data.root=DIR  train and score here
python scripts/reproduce.py table=1 launch=slurm data.root=DIR     submit the trainings
python scripts/reproduce.py table=1 launch=score data.root=DIR     score what is trained

Runs are kept below ``runs`` (runs=DIR); the same command again resumes them, and does not score
twice. With output=FILE the table is written there, too. Further settings are those of the
training. Tables: 1, 2, 4, 6, 7; the numbers are in tables.yaml.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import yaml

from danet.config.schema import did_you_mean
from danet.errors import InputError, UserError

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "scripts" / "tables.yaml"
OWN = ("table", "row", "launch", "runs", "output")
LAUNCHERS = {
    "torchrun": ("bash", "scripts/launch/torchrun.sh"),
    "slurm": ("sbatch", "scripts/launch/slurm.sbatch"),
    "score": (),
}


class Row(NamedTuple):
    """A number of the paper, and the run that should give it."""

    name: str
    published: float
    experiment: str
    """The training to score; several rows may share one."""
    split: str
    scoring: tuple[str, ...]
    """The protocols to score with."""
    evaluation: tuple[str, ...]
    """Settings of the protocols."""


def rows_of(own: Mapping[str, str]) -> tuple[str, list[Row]]:
    """Return the subject of a table, and its rows, or the requested one.

    Raises:
        InputError: There is no such table or row.
    """
    tables = yaml.safe_load(TABLES.read_text(encoding="utf-8"))
    known = [str(number) for number in tables]
    number = own.get("table", "")
    if number not in known:
        raise InputError(f"table={number or 'none'}: expected one of {', '.join(known)}")
    table = tables[int(number)]
    names = [own["row"]] if "row" in own else list(table["rows"])
    for name in names:
        if name not in table["rows"]:
            raise InputError(
                f"row={name}: table {number} has {', '.join(table['rows'])}"
                + did_you_mean(name, table["rows"])
            )
    return table["about"], [_row(number, name, table) for name in names]


def _row(number: str, name: str, table: Mapping[str, Any]) -> Row:
    row = table["rows"][name]
    return Row(
        name,
        row["published"],
        row.get("weights", f"table{number}_{name}"),
        table["split"],
        tuple(row.get("scoring", table["scoring"])),
        tuple(table.get("evaluation", ())),
    )


def train_command(row: Row, launcher: str, runs: Path, settings: Sequence[str]) -> list[str]:
    """Return the command that trains a row, or resumes its training."""
    folder = str(runs / row.experiment)
    return [*LAUNCHERS[launcher], folder, f"experiment={row.experiment}", *settings]


def score_commands(row: Row, runs: Path, settings: Sequence[str]) -> Iterator[list[str]]:
    """Yield the commands that score a row, one per protocol without a score."""
    root = [text for text in settings if text.startswith("data.root=")]
    for protocol in row.scoring:
        if measured(row, protocol, runs) is None:
            yield [
                *("python", "tools/eval.py", f"checkpoint={runs / row.experiment / 'last.pt'}"),
                *(f"split={row.split}", f"evaluation={protocol}", *row.evaluation, *root),
            ]


def measured(row: Row, protocol: str, runs: Path) -> dict[str, Any] | None:
    """Return the metrics of a row's last checkpoint; None if it was not scored.

    Scores of an earlier step are kept beside those of a later one, in numbered folders.

    Raises:
        InputError: They are of another split than the paper's.
    """
    folder = ROOT / runs / row.experiment
    paths = folder.glob(f"eval_{row.split}_{protocol}*/metrics.json")
    ends = re.compile(rf"eval_{row.split}_{protocol}(-\d+)?")
    scored: list[tuple[dict[str, Any], Path]] = [
        (json.loads(path.read_text(encoding="utf-8")), path)
        for path in paths
        if ends.fullmatch(path.parent.name)
    ]
    if not scored:
        return None
    found, path = max(scored, key=lambda pair: (pair[0]["step"], pair[1].stat().st_mtime_ns))
    if found["split"] != row.split:
        raise InputError(f"{path}: of split {found['split']}, expected {row.split}")
    last = folder / "last.pt"
    is_stale = last.is_file() and last.stat().st_mtime_ns > path.stat().st_mtime_ns
    return None if is_stale else found


def table_text(about: str, rows: Sequence[Row], runs: Path) -> str:
    """Return published and measured numbers as a Markdown table; a dash for those missing."""
    protocols = list(dict.fromkeys(p for row in rows for p in row.scoring))
    lines = [
        f"{about}; mIoU in percent",
        "",
        "| row | published | " + " | ".join(f"measured, {p}" for p in protocols) + " |",
        "| --- |" + " --- |" * (1 + len(protocols)),
    ]
    for row in rows:
        cells = []
        for protocol in protocols:
            found = measured(row, protocol, runs) if protocol in row.scoring else None
            shown = "-"
            if found is not None:
                miou = 100 * found["miou"]
                shown = f"{miou:.2f} ({miou - row.published:+.2f}; step {found['step']})"
            cells.append(shown)
        lines.append(f"| {row.name} | {row.published:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def launch(row: Row, launcher: str, runs: Path, settings: Sequence[str]) -> None:
    """Train, submit or score a row; raise UserError if a command fails."""
    todo = list(score_commands(row, runs, settings))
    if not todo:
        return
    trained = (ROOT / runs / row.experiment / "last.pt").exists()
    if launcher == "score" and not trained:
        print(f"{row.name}: not trained yet", flush=True)
        return
    commands = [] if launcher == "score" else [train_command(row, launcher, runs, settings)]
    commands += [] if launcher == "slurm" else todo
    for command in commands:
        print(shlex.join(command), flush=True)
        given = [sys.executable, *command[1:]] if command[0] == "python" else command
        code = subprocess.run(given, cwd=ROOT, check=False).returncode
        if code:
            raise UserError(f"{shlex.join(command)} ended with exit code {code}")


def main(arguments: Sequence[str]) -> None:
    """Launch the requested rows, if asked to, and print the table."""
    own, settings = command_line.split(arguments, OWN)
    about, rows = rows_of(own)
    runs = Path(own.get("runs", "runs")).expanduser()  # commands start in this checkout
    launcher = own.get("launch")
    if launcher is not None:
        if launcher not in LAUNCHERS:
            raise InputError(f"launch={launcher}: expected one of {', '.join(LAUNCHERS)}")
        if not any(text.startswith("data.root=") for text in settings):
            raise InputError("data.root: where is the data? Give data.root=<folder>")
        submitted = set()
        for row in rows:  # rows that share a training are submitted once
            if launcher != "slurm" or row.experiment not in submitted:
                launch(row, launcher, runs, settings)
            submitted.add(row.experiment)
    text = table_text(about, rows, runs)
    print(text)
    if "output" in own:
        Path(own["output"]).expanduser().write_text(text, encoding="utf-8")
    if launcher is None:
        shown = settings or ["data.root=<folder>"]
        for row in rows:
            print(f"{row.name}:")
            print(f"  {' '.join(train_command(row, 'torchrun', runs, shown))}")
            for command in score_commands(row, runs, shown):
                print(f"  {' '.join(command)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    command_line.run(main)
