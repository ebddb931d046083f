"""Unpack the official archives of a data set to where its loader expects them.

python scripts/prepare.py data=NAME                                       what to download
python scripts/prepare.py data=NAME root=DIR archive=FILE [archive=FILE ...]

Nothing is downloaded. Every archive is checked before the first byte is written; after a run that
was stopped or killed, the same command unpacks what is missing. With max_gib=N and max_ratio=N
archives may unpack to more than 200 GiB, or than 200 times their size.
"""

import difflib
import hashlib
import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
import yaml
from archives import DEFAULT_LIMITS, Limits, read_table, unpack
from tqdm import tqdm

from danet.errors import InputError

LAYOUTS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("archives.yaml").read_text(encoding="utf-8")
)
"""By the name of the config, ``data=NAME``; the file describes its fields."""

_JUNK = re.compile(r"(?:.*/)?(?:__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db)")
"""What file managers add to archives."""
_SETTINGS = ("data", "root", "archive", "max_gib", "max_ratio")


def parse(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Return setting -> its values; ``archive`` may be given several times."""
    given: dict[str, list[str]] = {key: [] for key in _SETTINGS}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in given:
            hint = _did_you_mean(key.lstrip("-"), _SETTINGS)
            raise InputError(f"{argument}: there is no such setting{hint}\n\n{__doc__}")
        if not value:
            raise InputError(f"{argument}: no value is given")
        if given[key] and key != "archive":
            raise InputError(f"{key}: given twice")
        given[key].append(value)
    data = "".join(given["data"])
    if data not in LAYOUTS:
        hint = _did_you_mean(data, LAYOUTS)
        raise InputError(f"data={data}: choices: {', '.join(LAYOUTS)}{hint}")
    absent = [key for key in ("archive", "root") if not given[key]]
    if len(absent) == 1:
        raise InputError(f"{absent[0]}: no value is given; data={data} needs\n{downloads(data)}")
    return given


def _did_you_mean(word: str, options: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(options), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def limits(given: dict[str, list[str]]) -> Limits:
    """Return the limits of the unpacked size."""
    found = {"max_gib": DEFAULT_LIMITS.total / 2**30, "max_ratio": DEFAULT_LIMITS.ratio}
    for key in found:
        for value in given[key]:
            try:
                found[key] = float(value)
            except ValueError:
                found[key] = math.nan
            if not 0 < found[key] < math.inf:
                raise InputError(f"{key}={value}: expected a number above 0")
    return Limits(found["max_ratio"], int(found["max_gib"] * 2**30))


def downloads(data: str) -> str:
    """List the files that the publisher of a data set offers."""
    layout = LAYOUTS[data]
    checksums = layout.get("checksums", {})
    lines = [
        f"  {file:32}{checksums.get(file, 'no checksum is published')}\n    {url}"
        for file, url in layout["sources"].items()
    ]
    return "\n".join([*lines, *([f"  {layout['note']}"] if "note" in layout else [])])


def inspect(path: Path, data: str, allowed: Limits) -> dict[str, int]:
    """Verify the checksum, if one is published, and check every member; return their sizes."""
    if not path.is_file() or not os.access(path, os.R_OK):
        what = "is a folder, not an archive" if path.is_dir() else "there is no file to be read"
        raise InputError(f"archive={path}: {what}")
    algorithm, _, expected = LAYOUTS[data].get("checksums", {}).get(path.name, "").partition(":")
    if algorithm:
        check_digest(path, algorithm, expected)
    sizes = read_table(path, allowed)
    shown = f"{algorithm} as published" if algorithm else "no published checksum"
    print(f"{path.name}: {len(sizes):,} files, {sum(sizes.values()) / 2**30:.2f} GiB, {shown}")
    return sizes


def check_digest(path: Path, algorithm: str, expected: str) -> None:
    """Raise InputError with both checksums of a file if they differ."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path}: {algorithm} is {digest.hexdigest()}, expected {expected}: the download was "
            "cut off or changed; fetch it again (an archive you packed yourself needs another name)"
        )


def targets(path: Path, members: Iterable[str], data: str) -> dict[str, str]:
    """Return member path -> path below root, for members that belong to the data set."""
    members = list(members)
    found = {member: place(member, data) for member in members if place(member, data)}
    if not found:
        others = [name for name in LAYOUTS if any(place(m, name) for m in members[:1000])]
        hint = f"; it looks like data={others[0]}" if others else ""
        raise InputError(
            f"archive={path}: nothing in it belongs to data={data}{hint}; it holds "
            f"{', '.join(members[:3]) or 'nothing'}; expected one of "
            f"{', '.join(LAYOUTS[data]['sources'])}"
        )
    if len(set(found.values())) < len(found):
        raise InputError(f"archive={path}: it holds the data set twice, in two folders")
    return found


def place(path: str, data: str) -> str:
    """Return where a member belongs below root; empty if it is not of the data set."""
    if not _JUNK.fullmatch(path):
        for pattern, target in LAYOUTS[data]["places"].items():
            match = re.fullmatch(pattern, path)
            if match:
                return match.expand(target)
    return ""


def main(arguments: Sequence[str]) -> None:
    """Check all archives, unpack them, and count the files of the data set."""
    given = parse(arguments)
    data, allowed = given["data"][0], limits(given)
    if not given["root"]:
        print(f"data={data} needs\n{downloads(data)}\nthen give root=DIR archive=FILE ...")
        sys.exit(0)
    root = Path(given["root"][0]).expanduser().absolute()
    if root.exists() and not root.is_dir():
        raise InputError(f"root={root}: is there and is no folder")
    paths = dict.fromkeys(Path(text).expanduser().absolute() for text in given["archive"])
    tables = {path: inspect(path, data, allowed) for path in paths}
    plans = {path: targets(path, sizes, data) for path, sizes in tables.items()}
    for path, plan in plans.items():
        total = sum(tables[path][member] for member in plan)
        with tqdm(  # no bar where the output is not a terminal
            desc=path.name, total=total, unit="B", unit_scale=True, disable=None, leave=False
        ) as bar:
            written = unpack(path, tables[path], plan, root, bar.update)
        present, left = len(plan) - written, len(tables[path]) - len(plan)
        facts = [
            f"{written:,} files written",
            f"{present:,} were there already" if present else "",
            f"{left:,} that do not belong to the data set left out" if left else "",
        ]
        print(f"{path.name}: {', '.join(filter(None, facts))}")
    for pattern, expected in LAYOUTS[data]["parts"].items():
        count = sum(1 for _ in root.glob(pattern))
        of = f"of {expected:>7,}" if expected else ""
        print(f"  {count:>8,} {of:10}  {pattern}")
    print(f"next: python tools/check_data.py data={data} {shlex.quote(f'data.root={root}')}")


if __name__ == "__main__":
    command_line.run(main)
