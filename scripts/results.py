"""Make the tables and plots of docs/results.md from the small metrics files of the studies.

python scripts/results.py               write both; plots need pip install -e '.[results]'
python scripts/results.py check=true    check that the tables match the files

A table is between two comments that name its study; the text around them is written by hand.
The files come from scripts/study.py: one per run, in docs/results/<study>/.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import yaml

from danet.errors import InputError, UserError
from danet.extras import how_to_install

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "scripts" / "studies.yaml"
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "docs" / "results"
IMAGES = ROOT / "docs" / "images"

Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""Level and variant -> runs, by seed."""


def read(study: str, results: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the stored runs of a study, by level and variant."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((results / study).glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((run["level"], run["variant"]), []).append(run)
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in found.items()}


def on_split(run: Mapping[str, Any], split: str) -> Mapping[str, Any]:
    """Return the scores of a run on one of its splits."""
    return next(found for found in (run, *run.get("other_splits", ())) if found["split"] == split)


def score(run: Mapping[str, Any], classes: Sequence[str]) -> float:
    """Return the mean IoU of some classes; those that did not occur are left out."""
    values = [run["iou"][name] for name in classes if run["iou"][name] is not None]
    return sum(values) / len(values) if values else math.nan


def scores(runs: Sequence[Mapping[str, Any]], classes: Sequence[str] | None) -> list[float]:
    """Return one score per seed in percent: of some classes, or the mean IoU of all."""
    return [100 * (run["miou"] if classes is None else score(run, classes)) for run in runs]


def cell(values: Sequence[float], sign: str = "") -> str:
    """Format the mean over seeds, with the lowest and the highest if there are several.

    With ``sign="+"`` positive numbers have one.
    """
    if not values:
        return "-"
    # Without the sign of a negative number that is rounded to zero.
    numbers = (sum(values) / len(values), min(values), max(values))
    mean, low, high = (f"{round(x, 1) + 0:{sign}.1f}" for x in numbers)
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def table(study: Mapping[str, Any], runs: Runs, classes: Sequence[str] | None) -> Iterator[str]:
    """Yield a Markdown table: a row per variant, a column per level and split."""
    levels = [level for level in study["levels"] if any(key[0] == level for key in runs)]
    columns = [(level, split) for level in levels for split in study["splits"]]
    names = [f"{level}, {split}" for level, split in columns]
    if len(study["splits"]) == 1:
        names = levels
    yield "| | " + " | ".join(names) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for variant in study["variants"]:
        cells = []
        for level, split in columns:
            found = [on_split(run, split) for run in runs.get((level, variant), ())]
            cells.append(cell(scores(found, classes)))
        if set(cells) != {"-"}:
            yield f"| {variant} | {' | '.join(cells)} |"


def details(study: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    """Yield a Markdown table of the first level: cost and scores, every class a row."""
    level = next(iter(study["levels"]))
    found = {v: runs[level, v] for v in study["variants"] if (level, v) in runs}
    yield "| | " + " | ".join(found) + " |"
    yield "| --- |" + " --- |" * len(found)

    def row(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    yield row("parameters, million", [f"{of[0]['parameters'] / 1e6:.2f}" for of in found.values()])
    times = [median(run["seconds_per_step"] for run in of) for of in found.values()]
    yield row("seconds a step, median", [f"{time:.2f}" for time in times])
    for name, key in {
        "mIoU": "miou",
        "boundary IoU": "boundary_miou",
        "pixel accuracy": "pixel_accuracy",
        "mean accuracy": "mean_accuracy",
    }.items():
        yield row(name, [cell([100 * run[key] for run in of]) for of in found.values()])
    for name in next(iter(found.values()))[0]["iou"]:
        yield row(name, [cell(scores(of, [name])) for of in found.values()])


def failures(study: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    """Yield, for every variant, the levels at which it is better than a guess, and the others."""
    group, guess = study["guess"]["scores"], study["guess"]["iou"]
    for variant in study["variants"]:
        found = {
            level: scores(runs.get((level, variant), ()), study["scores"][group])
            for level in study["levels"]
        }
        means = {level: sum(values) / len(values) for level, values in found.items() if values}
        lost = [level for level, mean in means.items() if mean <= guess]
        held = [level for level in means if level not in lost]
        parts = [
            f"better than a guess at {', '.join(held)}" if held else "",
            f"no better at {', '.join(lost)}" if lost else "",
        ]
        if means:
            yield f"- {variant}: {'; '.join(filter(None, parts))}"


FIGURES = {
    "effective": ("attended to", 1),
    "on_strongest": ("on the strongest, %", 100),
    "same_strongest": ("same strongest, %", 100),
    "row_cosine": ("cosine of rows", 1),
    "energy_std": ("deviation of energies", 1),
    "reach": ("reach, % of the diagonal", 100),
    "on_registers": ("on registers, %", 100),
    "gamma": ("gamma", 1),
    "moved": ("moved, %", 100),
    "varies": ("varies, %", 100),
}
"""Keys of danet.ops.diagnostics.diagnose: headings of columns, and factors."""
REMOVALS = ("strongest", "equal_count", "matched", "equal_mass")
"""Keys of danet.visualization.evidence.as_rows."""


def number(values: Sequence[float]) -> str:
    """Format the mean over seeds with three significant digits, and the lowest and the highest."""
    numbers = (sum(values) / len(values), min(values), max(values))
    mean, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in numbers)
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def diagnoses(study: Mapping[str, Any], runs: Runs, branch: str) -> Iterator[str]:
    """Yield a Markdown table of what a branch does: a row per variant and level."""
    found = {
        (level, variant): [run["attention"][branch] for run in runs[level, variant]]
        for level in study["levels"]
        for variant in study["variants"]
        if all(branch in run.get("attention", ()) for run in runs.get((level, variant), [{}]))
    }
    keys = [key for key in FIGURES if any(key in of[0] for of in found.values())]
    if not found:
        return
    sizes = sorted({facts["size"] for of in found.values() for facts in of})
    yield f"**{branch} attention, {' or '.join(f'{size:.0f}' for size in sizes)} {branch}s**"
    yield ""
    yield "| | " + " | ".join(FIGURES[key][0] for key in keys) + " |"
    yield "| --- |" + " --- |" * len(keys)
    for (level, variant), of in found.items():
        cells = [
            number([FIGURES[key][1] * facts[key] for facts in of]) if key in of[0] else "-"
            for key in keys
        ]
        name = variant if len(study["levels"]) == 1 else f"{variant}, {level}"
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def history(study: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    """Yield a Markdown table of position attention during the training, a row per evaluation."""
    columns = ("effective", "row_cosine", "gamma", "moved")
    rows = [
        (variant, [run["history"] for run in runs[level, variant]])
        for level in study["levels"]
        for variant in study["variants"]
        if all(len(run.get("history", ())) > 1 for run in runs.get((level, variant), [{}]))
    ]
    rows = [(variant, seeds) for variant, seeds in rows if "position/gamma" in seeds[0][0]]
    if not rows:
        return
    yield "**position attention during the training, on validation pictures**"
    yield ""
    yield f"| | step | {' | '.join(FIGURES[key][0] for key in columns)} |"
    yield "| --- |" + " --- |" * 5
    for variant, seeds in rows:
        for lines in zip(*seeds, strict=True):
            cells = [
                number([FIGURES[key][1] * line[f"position/{key}"] for line in lines])
                for key in columns
            ]
            yield f"| {variant} | {lines[0]['step']} | {' | '.join(cells)} |"
    yield ""


def mean_fall(rows: Sequence[Mapping[str, Any]], key: str, column: str = "fall") -> float:
    """Return the mean over all points of some classes of a column of a removal."""
    found = [row[key] for row in rows if row[key]]
    points = sum(of["points"] for of in found)
    return sum(of["points"] * of[column] for of in found) / points if points else math.nan


def deletions(study: Mapping[str, Any], runs: Runs) -> Iterator[str]:
    """Yield Markdown tables of the deletion test: of all variants, and by class of one."""
    flat = {
        (f"{variant}, {level}" if len(study["levels"]) > 1 else variant): [
            run["deletion"] for run in runs[level, variant]
        ]
        for level in study["levels"]
        for variant in study["variants"]
        if all("deletion" in run for run in runs.get((level, variant), [{}]))
    }
    if not flat:
        return
    heading = "points | removed | fall without them | without as many at random | points left | "
    heading += "fall without them | without as much at random |"
    yield "**deletion test**"
    yield ""
    yield f"| | {heading}"
    yield "| --- |" + " --- |" * 7
    for name, seeds in flat.items():
        yield deletion_row(name, seeds)
    yield ""
    chosen = study.get("evidence")
    if chosen not in flat:
        return
    yield f"**deletion test of {chosen}, by class**"
    yield ""
    yield f"| | {heading}"
    yield "| --- |" + " --- |" * 7
    for name in dict.fromkeys(row["class"] for seed in flat[chosen] for row in seed):
        yield deletion_row(name, [[r for r in seed if r["class"] == name] for seed in flat[chosen]])
    yield ""


def deletion_row(name: str, seeds: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Return a row of the deletion test: falls in points of a percentage, mean over the seeds."""
    found = [rows for rows in seeds if rows]
    points = sum(row["points"] for rows in found for row in rows)
    left = points - sum(row["skipped"] for rows in found for row in rows)
    removed = [mean_fall(rows, "strongest", "places") for rows in found]
    means = {key: [100 * mean_fall(rows, key) for rows in found] for key in REMOVALS}
    falls = {key: [x for x in values if not math.isnan(x)] for key, values in means.items()}
    first, many, matched, much = (cell(falls[key]) for key in REMOVALS)
    places = f"{sum(removed) / len(removed):.1f}"
    return f"| {name} | {points} | {places} | {first} | {many} | {left} | {matched} | {much} |"


def text(name: str, study: Mapping[str, Any], runs: Runs, baseline: Runs | None = None) -> str:
    """Return the section of a study: tables and facts.

    With a ``baseline``, whose FCN is compared with, gains are among them.
    """
    flat = [run for group in runs.values() for run in group]
    if not flat:
        return f"No run is stored yet: `python scripts/study.py study={name}`.\n"
    seeds = sorted({run["seed"] for run in flat})
    scored = [on_split(flat[0], split) for split in study["splits"]]
    splits = [f"Split `{found['split']}`, {found['images']} pictures" for found in scored]
    lines = [study["about"], ""]
    lines += [
        f"Every cell is the mean over the seeds that were run (of {', '.join(map(str, seeds))}), "
        "IoU in percent; with several, the lowest and the highest in brackets. "
        f"{'; '.join(splits)}; {flat[0]['protocol']}.",
        "",
    ]
    for group, classes in {**study["scores"], "all classes (mIoU)": None}.items():
        lines += [f"**{group}**", "", *table(study, runs, classes), ""]
    if baseline:
        lines += gains_of_variants("FCN", over_fcn(study, runs, baseline))
    lines += gains_of_variants("the head without attention", over_control(study, runs))
    for branch in ("position", "channel"):
        lines += diagnoses(study, runs, branch)
    lines += [*history(study, runs), *deletions(study, runs)]
    if study.get("details"):
        lines += ["**cost and every class**", "", *details(study, runs), ""]
    if "guess" in study:
        iou, why = study["guess"]["iou"], study["guess"]["why"]
        lines += [f"A guess has at most {iou:.1f}: {why}.", "", *failures(study, runs), ""]
    if is_plotted(runs):
        lines += [f"![Scores and losses of {name}](images/results_{name}.png)", ""]
    minutes = [run["minutes"] for run in flat]
    steps = sorted({run["step"] for run in flat})  # several, where trainer.patience ended some
    trained = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else steps[0]
    machines = "; ".join(sorted({run["machine"] for run in flat}))
    commits: dict[str, set[str]] = {}  # of versions that are equal in all else
    for run in flat:
        found = ", ".join(f"{k} {v}" for k, v in run["versions"].items() if k != "commit")
        commits.setdefault(found, set()).add(run["versions"].get("commit", ""))
    versions = [
        f"{found}, commit{'s' * (len(of) > 1)} {', '.join(sorted(of))}" if any(of) else found
        for found, of in sorted(commits.items())
    ]
    lines += [
        f"Made by `python scripts/study.py study={name}` and `python scripts/results.py`; one run: "
        f"`{flat[0]['command']}`. {len(flat)} run{'s' * (len(flat) > 1)} of {trained} steps, "
        f"{' to '.join(f'{m:.1f}' for m in sorted({min(minutes), max(minutes)}))} minutes each, "
        f"on {machines}; "
        f"{'; '.join(versions)}.",
    ]
    return "\n".join(lines) + "\n"


CONDITIONS = {
    "scenes": "scenes, {}",
    "cures": "scenes, {}",
    "camvid": "CamVid, random weights",
    "pretrained": "CamVid, ImageNet weights",
    "tuned": "CamVid, ImageNet weights",
    "frozen": "CamVid, frozen",
    "depth": "CamVid, frozen, {}",
    "conditions": "CamVid, frozen, {}",
}
"""Study: how a condition is named, of its level."""
HEADS = {"PAM": "PAM", "as in the paper": "PAM", "CAM": "CAM", "both": "both", "DANet": "both"}
"""Variants that are attention as in the paper, and the columns of their gains."""
Gains = Mapping[str, Mapping[str, Sequence[float]]]
"""Condition or level -> variant -> points of mIoU, one per seed."""


def gains(found: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return by how many points of mIoU runs are better than those with the same seed."""
    known = {run["seed"]: run["miou"] for run in baseline}
    return [100 * (run["miou"] - known[run["seed"]]) for run in found if run["seed"] in known]


def over_fcn(study: Mapping[str, Any], runs: Runs, baseline: Runs) -> Gains:
    """Return what the variants of a study gain over the FCN of a baseline at the same level."""
    return {
        level: {
            variant: gains(runs.get((level, variant), ()), baseline.get((level, "FCN"), ()))
            for variant in study["variants"]
            if variant != "FCN"
        }
        for level in study["levels"]
    }


def over_control(study: Mapping[str, Any], runs: Runs) -> Gains:
    """Return what variants gain over the head without attention."""
    control = study.get("control", {})
    if isinstance(control, str):
        control = {variant: control for variant in study["variants"] if variant != control}
    return {
        level: {
            variant: gains(runs.get((level, variant), ()), runs.get((level, without), ()))
            for variant, without in control.items()
        }
        for level in study["levels"]
    }


def by_condition(studies: Mapping[str, Any], stored: Mapping[str, Runs], *, control: bool) -> Gains:
    """Return gains of attention as in the paper, by condition and head, over FCN or the control."""
    found = dict[str, dict[str, Sequence[float]]]()
    for name, condition in CONDITIONS.items():
        study, runs = studies[name], stored[name]
        of = over_control(study, runs) if control else over_fcn(study, runs, runs)
        for level, row in of.items():
            shown = {HEADS[variant]: x for variant, x in row.items() if variant in HEADS and x}
            if shown:
                found[condition.format(level)] = shown
    return found


def gains_table(title: str, conditions: Gains) -> str:
    """Return what attention as in the paper gains, a row per condition."""
    columns = list(dict.fromkeys(HEADS.values()))
    lines = [f"| {title} | {' | '.join(columns)} | seeds |", "| --- |" + " --- |" * 4]
    for name, row in conditions.items():
        shown = (cell(row.get(column, ()), "+") for column in columns)
        lines.append(f"| {name} | {' | '.join(shown)} | {max(map(len, row.values()))} |")
    return "\n".join(lines) + "\n"


def gains_of_variants(title: str, found: Gains) -> Iterator[str]:
    """Yield a Markdown table of the gains of a study: a row per variant, a column per level."""
    columns = {level: of for level, of in found.items() if any(of.values())}
    if not columns:
        return
    yield f"**points of mIoU over {title}, with the same seed; with how many seeds it is better**"
    yield ""
    yield f"| | {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * len(columns)
    for variant in next(iter(columns.values())):
        cells = [
            f"{cell(values, '+')}; {sum(x > 0 for x in values)} of {len(values)}" if values else "-"
            for values in (of[variant] for of in columns.values())
        ]
        if set(cells) != {"-"}:
            yield f"| {variant} | {' | '.join(cells)} |"
    yield ""


def plot_gains(studies: Mapping[str, Any], stored: Mapping[str, Runs], path: Path) -> None:
    """Plot both tables of gains, and gains over the mean cosine of two rows of the attention."""
    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(18, 4.2), width_ratios=(1.8, 0.8, 1), layout="constrained"
    )
    colors = {"PAM": "tab:blue", "CAM": "tab:orange", "both": "tab:green"}
    for axes, control in ((left, False), (middle, True)):
        conditions = by_condition(studies, stored, control=control)
        for place, row in enumerate(conditions.values()):
            for shift, (column, color) in zip((-0.2, 0, 0.2), colors.items(), strict=True):
                values = row.get(column, ())
                axes.plot([place + shift] * len(values), values, "o", color=color, alpha=0.6, ms=4)
        axes.set_xticks(range(len(conditions)), conditions, rotation=35, ha="right", fontsize=8)
    for column, color in colors.items():
        left.plot([], [], "o", color=color, label=column)
    left.set_title("mIoU over FCN of the same seed, points")
    middle.set_title("over the same head without attention")
    for name, color in {"causes": "tab:red", "cures": "tab:purple"}.items():
        runs, baseline = stored[name], studies[name]["baseline"]
        for level, of in over_fcn(studies[name], runs, stored[baseline]).items():
            for variant, values in of.items():
                found = [run["attention"]["position"] for run in runs.get((level, variant), ())]
                is_used = all(facts["gamma"] for facts in found)
                if is_used and len(values) == len(found):
                    cosines = [facts["row_cosine"] for facts in found]
                    right.plot(cosines, values, "o", color=color, alpha=0.6, ms=4)
            right.plot([], [], "o", color=color, label=CONDITIONS[baseline].format(level))
    right.set_xlabel("mean cosine of two rows (1: all positions attend to the same)")
    right.set_title("mIoU over FCN, variants of position attention")
    for axes in (left, middle, right):
        axes.set_yscale("symlog", linthresh=2)
        axes.margins(y=0.1)
        axes.axhline(0, color="grey", lw=1, ls=":")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def is_plotted(runs: Runs) -> bool:
    """Return whether there is something to compare."""
    return sum(map(len, runs.values())) > 1


def insert(page: str, name: str, section: str) -> str:
    """Return the page with the section of a study between its two comments.

    Raises:
        InputError: The comments are missing.
    """
    begin, end = f"<!-- study {name}: made by scripts/results.py -->", f"<!-- end of {name} -->"
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise InputError(f"{PAGE.name}: expected {begin} and {end}")
    return pattern.sub(lambda _: f"{begin}\n{section}{end}", page)


def pyplot() -> Any:
    """Return matplotlib's module; raise UserError if it is not installed."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(f"plots need matplotlib: {how_to_install('results')}") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(name: str, study: Mapping[str, Any], runs: Runs, path: Path) -> None:
    """Plot scores, every seed a dot, and the losses of the first level with runs.

    Scores are plotted by level; with "details", those of the first level are plotted by class.
    """
    plt = pyplot()
    group, classes = "all classes (mIoU)", None
    if "guess" in study:
        group, classes = study["guess"]["scores"], study["scores"][study["guess"]["scores"]]
    levels = [level for level in study["levels"] if any(key[0] == level for key in runs)]
    columns = [(level, level, classes) for level in levels]
    wide = bool(study.get("details"))
    if wide:
        group = "every class"
        names = next(iter(runs.values()))[0]["iou"]
        columns = [("mIoU", levels[0], None), *((name, levels[0], [name]) for name in names)]
    variants = [v for v in study["variants"] if any(key[1] == v for key in runs)]
    many = len(variants) > 6
    colors = plt.get_cmap("tab20" if many else "tab10")
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(14, 4) if wide else (10 + 3 * many, 3.6),
        width_ratios=(1.7, 1) if wide else None,
        layout="constrained",
    )
    width = min(0.2 if wide else 0.12, 0.9 / len(variants))
    for number, variant in enumerate(variants):
        color = colors(number)
        shift = (number - (len(variants) - 1) / 2) * width
        for place, (_, level, of) in enumerate(columns):
            values = scores(runs.get((level, variant), ()), of)
            left.plot([place + shift] * len(values), values, "o", color=color, alpha=0.5, ms=4)
            if values:
                mean = sum(values) / len(values)
                left.plot([place + shift], [mean], "_", color=color, ms=7 if wide else 12, mew=2)
        for run in runs.get((levels[0], variant), ())[:1]:
            steps, losses = zip(*run["loss"], strict=True)
            right.plot(steps, losses, color=color, label=variant)
    if "guess" in study:
        left.axhline(study["guess"]["iou"], color="grey", lw=1, ls=":")
        left.set_ylim(0, 100)
    labels = [textwrap.fill(column[0], 12) for column in columns]
    left.set_xticks(range(len(columns)), labels, rotation=30 * wide)
    left.set(title=f"{group}: IoU on {study['splits'][0]}, percent")
    left.set_xlim(-0.5, len(columns) - 0.5)
    right.set(
        title=textwrap.fill(f"cross entropy of the prediction in training, {levels[0]}", 56),
        xlabel="step",
        yscale="log",
    )
    right.legend(fontsize=8, **({"loc": "upper left", "bbox_to_anchor": (1, 1)} if many else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str]) -> None:
    """Write page and plots, or compare the page."""
    own, unknown = command_line.split(arguments, ("check", "results", "page", "images"))
    if unknown:
        raise InputError(f"{unknown[0]}: expected check, results, page or images")
    results, page = Path(own.get("results", RESULTS)), Path(own.get("page", PAGE))
    before = after = page.read_text(encoding="utf-8")
    studies = yaml.safe_load(STUDIES.read_text(encoding="utf-8"))
    images = None if own.get("check") == "true" else Path(own.get("images", IMAGES))
    stored = {name: read(name, results) for name in studies}
    for name, study in studies.items():
        baseline = stored.get(study.get("baseline", ""))
        after = insert(after, name, text(name, study, stored[name], baseline))
        if is_plotted(stored[name]) and images:
            plot(name, study, stored[name], images / f"results_{name}.png")
    made = "\nMade by `python scripts/results.py` of the stored runs, with equal seeds.\n"
    tables = [
        gains_table(title, by_condition(studies, stored, control=control))
        for title, control in (
            ("mIoU over FCN", False),
            ("mIoU over the same head without attention", True),
        )
    ]
    after = insert(after, "gains", "\n".join(tables) + made)
    if images:
        plot_gains(studies, stored, images / "results_gains.png")
    if own.get("check") == "true":
        if before != after:
            raise InputError(f"{page}: not what the files give; python scripts/results.py")
        return
    page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    command_line.run(main)
