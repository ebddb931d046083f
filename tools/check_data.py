"""Check all files of a data set: ``python tools/check_data.py data=NAME data.root=DIR``."""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

from omegaconf import DictConfig, OmegaConf

from danet import cli
from danet.config.schema import CheckConfig, TrainConfig, TrainSchema
from danet.config.validate import check
from danet.engine.settings import TrainSettings
from danet.errors import InputError
from danet.filesystem import folder_of, require_writable, write_file, write_table
from danet.plain import printable, quoted

if TYPE_CHECKING:
    from torch import nn

    from danet.data_check.scan import SplitReport
    from danet.data_check.suspects import Suspect
    from danet.datasets.base import FileDataset


def run(config: DictConfig) -> None:
    """Scan the splits, print and write the report; raise InputError if there are problems."""
    output = Path(config.output).expanduser().absolute() if config.output else None
    examine(config, cli.added_keys(), output)


def examine(config: DictConfig, added: Iterable[str], output: Path | None) -> None:
    """Check the data of a composed config; without ``output`` the report gets a folder of its own.

    Raises:
        InputError: There are problems; raised after the report is written.
    """
    # Checked as part of a training config, so that all that training would refuse is refused here.
    train = OmegaConf.structured(TrainSchema(trainer=TrainSettings(steps=1)))
    train.data = config.data
    checked = check(train, added, needs_data=True)
    plain: Any = OmegaConf.to_container(config)
    settings = CheckConfig(**{**plain, "data": checked.plain["data"]})
    facts = {"root": checked.data.root}
    if output is None:
        output = folder_of(_default_output(checked.data.root), "report.json", facts)
    _check_settings(settings, output)
    require_writable(output)
    from danet.data_check.report import contact_sheet, describe, notes_of, record, weights_setting
    from danet.data_check.sample import find_single_class, sample_indices
    from danet.visualization.overlay import save_image

    network = load_network(settings) if settings.checkpoint else None
    reports, refused = scan_splits(checked, settings, network)
    warnings = 0
    found: dict[str, Any] = {**facts, "refused": refused, "splits": {}}
    for report in reports:
        split = report.dataset.split
        is_training = split == settings.data["train_split"]
        if is_training and not report.problems:
            problem = find_single_class(report)
            if problem:
                report.problems.append(problem)
        notes = notes_of(report, absent="cannot be learnt" if is_training else "have no score")
        found["splits"][split] = record(report, notes, show=settings.show)
        print(describe(split, found["splits"][split]))
        if is_training and report.pixels.any() and not (refused or report.problems):
            print(f"  balanced by median frequency: {weights_setting(report)}")
        warnings += sum(note.startswith("warning: ") for note in notes)
        indices = sample_indices(len(report.dataset), settings.samples)
        sheet = contact_sheet(report.dataset, indices)
        if sheet is not None:
            save_image(output / f"{split}.png", sheet)
            print(f"  {output / f'{split}.png'}")
    images = "decoded" if settings.full else "structure and checksums (full=true decodes them)"
    print(f"looked at every pair; labels: decoded; images: {images}")
    setting = write_lists((report.dataset for report in reports), output)
    if setting:
        print(f"to keep this division when images are added: {setting}")
    if network is not None and reports:
        list_suspects(network, reports, settings, output)
    write_file(output / "report.json", json.dumps(found, indent=1) + "\n")
    problems = [*refused, *(text for report in reports for text in report.problems)]
    if problems:
        shown = [text for report in reports for text in report.problems[: settings.show]]
        lines = without_repeated_advice([*refused, *shown])
        if len(problems) > len(lines):
            lines.append(f"{len(problems)} problems in all; see {output / 'report.json'}")
        raise InputError("\n".join(lines))
    warned = f", {warnings} warning{'s' * (warnings > 1)}" if warnings else ""
    print(f"no problems{warned}\nreport: {output / 'report.json'}")


def without_repeated_advice(problems: Iterable[str]) -> list[str]:
    """Return problems without what was said before at their ends, behind semicolons."""
    lines, said = [], set[str]()
    for problem in problems:
        parts = problem.split("; ")
        while len(parts) > 1 and parts[-1] in said:
            parts.pop()
        lines.append("; ".join(parts))
        said.update(parts)
    return lines


def scan_splits(
    config: TrainConfig, settings: CheckConfig, network: "nn.Module | None" = None
) -> tuple[list["SplitReport"], list[str]]:
    """Scan the splits; return reports, and why other splits were refused as a whole.

    Raises:
        InputError: The data set has no files, or the network is not one for it.
    """
    from danet.config.build import (
        join_extra_roots,
        make_dataset,
        why_unscored,
        with_measured_range,
    )
    from danet.data_check.overlap import refuse_overlap
    from danet.data_check.report import report_duplicates
    from danet.data_check.sample import suggest_setting
    from danet.data_check.scan import scan
    from danet.datasets.base import FileDataset

    data = config.data
    config = with_measured_range(config)
    if "cache" in config.plain["data"]:
        config.plain["data"]["cache"] = "none"  # check the files, not copies of them
    reports, refused, unscored = [], list[str](), ""
    for split in settings.splits or dict.fromkeys((data.train_split, data.val_split)):
        if split is None or (unscored and not settings.splits):
            print(f"no validation set: {unscored or 'data.val_split=null'}")
            continue
        try:
            dataset = make_dataset(config, split, training=False)
            if split == data.train_split:
                join_extra_roots(dataset, config)
                unscored = why_unscored(config, dataset)
        except InputError as error:
            refused.append(str(error))
            continue
        if not isinstance(dataset, FileDataset):
            raise InputError(f"{type(dataset).__name__} has no files to look at: set data=NAME")
        if network is not None:
            refuse_misfit(network, dataset, settings.checkpoint)
        report = scan(dataset, full=settings.full, num_workers=data.num_workers)
        reports.append(report)
        if data.train_split == data.val_split == split:
            try:
                report.notes.append(refuse_overlap(dataset, dataset, allowed=data.allow_overlap))
            except InputError as error:
                refused.append(str(error))
    report_duplicates(reports, allow_overlap=data.allow_overlap)
    if reports:
        suggestion, is_needed = suggest_setting(reports)
        if suggestion:
            (reports[0].problems if is_needed else reports[0].notes).insert(0, suggestion)
    return reports, list(dict.fromkeys(refused))


def load_network(settings: CheckConfig) -> "nn.Module":
    """Return the network of the checkpoint on its device, fused as an evaluation does."""
    from danet.config.build import load_model
    from danet.distributed.rendezvous import choose_device
    from danet.evaluation.fuse import fuse_for_inference

    device = choose_device(settings.device)
    return fuse_for_inference(load_model(str(settings.checkpoint)).to(device), device)


def refuse_misfit(network: Any, dataset: "FileDataset", checkpoint: str | None) -> None:
    """Raise InputError unless a network has the classes of a data set and reads its pictures."""
    theirs, ours = list(network.classes), list(dataset.classes)
    if theirs != ours:
        pairs = zip([*theirs, "missing"], [*ours, "missing"], strict=False)
        number, names = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        raise InputError(
            f"checkpoint={checkpoint}: its {len(theirs)} classes are not the {len(ours)} of the "
            f"data: class {number} is {names[0]} there and {names[1]} here; give a network that "
            "was trained on these classes in this order"
        )
    bands = network.bands
    if bands != dataset.reading.bands:
        advice = "leave data.channels out"
        if bands:
            values = {"channels": bands.channels, "rgb": [bands.channels[i] for i in bands.rgb]}
            values |= {} if bands.is_8_bit else {"range": bands.limits}
            texts = (f"'data.{key}={json.dumps(v)}'" for key, v in values.items())
            advice = f"set {' '.join(texts)}"
        found = f"checkpoint={checkpoint}: it reads other bands, or in another range, than the data"
        raise InputError(f"{found}; {advice}")


def list_suspects(
    network: "nn.Module", reports: Sequence["SplitReport"], settings: CheckConfig, output: Path
) -> None:
    """Write the labels that a network contradicts as suspects.csv and suspects.html."""
    from danet.data_check.suspects import find_suspects, page
    from danet.visualization.overlay import Legend

    suspects: list[Suspect] = []
    for dataset, pairs in ((report.dataset, report.pairs) for report in reports):
        usable = [p.index for p in pairs if not p.problem and dataset.items[p.index].mask]
        workers = settings.data["num_workers"]
        suspects += find_suspects(network, dataset, usable, num_workers=workers)
    suspects.sort(key=lambda suspect: -suspect[2].score)
    header = "rank picture split label_class predicted_class x y width height pixels score label"
    rows: list[Sequence[Any]] = [header.split()]
    dataset = reports[0].dataset
    for rank, (of, index, region) in enumerate(suspects, 1):
        names = [f"{i} {dataset.classes[i]}" for i in region.pair] if region.pair else ("", "")
        image, mask, _ = of.items[index]
        where = (*region.box, region.pixels, f"{region.score:.3f}")
        rows.append((rank, image, of.split, *names, *where, mask))
    write_table(output / "suspects.csv", rows)
    legend = Legend(dataset.classes, dataset.palette, bands=dataset.reading.bands)
    write_file(output / "suspects.html", page(network, suspects[: settings.suspects], legend))
    print(f"suspicious labels: {len(suspects)} places that the network contradicts")
    for number, path, _, label, prediction, x, y, *_ in rows[1:6]:
        what = f"label {label}, network {prediction}" if label else "many classes"
        print(f"  {number}. {printable(path)}: {what}, at x={x}, y={y}")
    print(f"  {output / 'suspects.html'}")


def write_lists(datasets: Iterable["FileDataset"], output: Path) -> str:
    """Write lists of splits that a hash divided; return the setting that uses them, or nothing."""
    divided = [dataset for dataset in datasets if dataset.division]
    files = {dataset.split: output / f"{dataset.split}.txt" for dataset in divided}
    if set(files) != {"train", "val"}:
        return ""
    for dataset in divided:
        lines = []
        for i, item in enumerate(dataset.items):
            # Masks that were painted of annotations lie elsewhere.
            own = [p for p in item[:2] if p and Path(p).is_relative_to(dataset.root)]
            if dataset.locate(i)[0] is dataset:
                lines.append("\t".join(os.path.relpath(p, dataset.root) for p in own) + "\n")
        write_file(files[dataset.split], "".join(lines))
    print(divided[0].division)
    # Plain paths without quotes of their own, which those of the shell would make hard to read.
    paths = {
        s: p if re.fullmatch(r"[\w./-]+", str(p)) else quoted(str(p)) for s, p in files.items()
    }
    lists = ", ".join(f"{split}: {path}" for split, path in paths.items())
    return shlex.quote(f"data.lists={{{lists}}}")


def _default_output(root: str | None) -> Path:
    """Return the folder of reports on a data set, outside of it."""
    from danet.datasets.cache import cache_folder

    # Of own pictures, always data=folder or annotations, the name of their folder says which.
    own = Path(root or "").name if cli.chosen("data") in ("annotations", "folder") else ""
    place = Path("runs/check", own or cli.choice()).absolute()
    if root is not None and place.is_relative_to(root):  # started from within the data
        return cache_folder(None) / "check" / place.name
    return place


def _check_settings(settings: CheckConfig, output: Path) -> None:
    """Raise InputError for numbers out of range and an output within the data set."""
    for name, low in (("show", 1), ("samples", 0), ("suspects", 1)):
        if getattr(settings, name) < low:
            raise InputError(f"{name}={getattr(settings, name)}: expected at least {low}")
    root = settings.data.get("root")
    if root is not None and output.is_relative_to(root):
        raise InputError(f"output={output} lies in data.root, where nothing is ever written")


def main() -> None:
    """Run the command ``danet-check-data``."""
    cli.run(run, "check_data")


if __name__ == "__main__":
    main()
