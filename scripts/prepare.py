"""Unpack the official archives of a data set to where its loader expects them.

python scripts/prepare.py data=NAME                                       what to download
python scripts/prepare.py data=NAME root=DIR archive=FILE [archive=FILE ...]

Nothing is downloaded. Every archive is checked before the first byte is written; a run that was
stopped or killed is resumed by the same command. With max_gib=N and max_ratio=N
archives may unpack to more than 200 GiB, or than 200 times their size.
"""

import difflib
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from danet.interpreter import require_packages

    require_packages(__file__)

import command_line
from tqdm import tqdm

from danet.archives.members import Listing, check_digest, read_listing
from danet.archives.rules import Limits
from danet.archives.unpack import unpack
from danet.errors import InputError


class Source(NamedTuple):
    """A file that the publisher offers."""

    file: str
    url: str
    digest: str = ""
    """As algorithm:hexadecimal, where one is published; empty where none is known."""


class Part(NamedTuple):
    """Files that a prepared data set has."""

    pattern: str
    """Glob below root."""
    expected: int | None
    """As the publisher counts; None where that is not known."""


class Layout(NamedTuple):
    """A data set: where it comes from and where its files belong."""

    sources: tuple[Source, ...]
    places: tuple[tuple[str, str], ...]
    """Regular expression of member paths -> path below root; the first match applies."""
    parts: tuple[Part, ...]
    note: str = ""


_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_COCO = "http://images.cocodataset.org/zips"
_CALVIN = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset"
_CITYSCAPES = "https://www.cityscapes-dataset.com/downloads/ (registration)"
_BERKELEY = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping"
_CONTEXT = Layout(
    sources=(
        Source(
            "VOCtrainval_03-May-2010.tar",
            f"{_VOC}/voc2010/VOCtrainval_03-May-2010.tar",
            "md5:da459979d0c395079b5c75ee67908abb",
        ),
        Source("trainval.tar.gz", "https://cs.stanford.edu/~roozbeh/pascal-context/"),
    ),
    places=(
        (r"(?:.*/)?(VOCdevkit/VOC2010/.+)", r"\1"),
        (r"(?:.*/)?trainval/(\d{4}_\d{6}\.mat)", r"VOCdevkit/VOC2010/trainval/\1"),
    ),
    parts=(
        Part("VOCdevkit/VOC2010/JPEGImages/*.jpg", None),
        Part("VOCdevkit/VOC2010/trainval/*.mat", 10103),
    ),
    note="in the place of trainval.tar.gz, trainval_merged.json of PASCAL in Detail can be copied "
    "to VOCdevkit/VOC2010 by hand",
)
LAYOUTS = {
    "cityscapes": Layout(
        sources=(
            Source("leftImg8bit_trainvaltest.zip", _CITYSCAPES),
            Source("gtFine_trainvaltest.zip", _CITYSCAPES),
            Source("leftImg8bit_trainextra.zip", f"{_CITYSCAPES}, for coarse labels only"),
            Source("gtCoarse.zip", f"{_CITYSCAPES}, for coarse labels only"),
        ),
        places=((r"(?:.*/)?((?:leftImg8bit|gtFine|gtCoarse)/(?:train|val|test).+)", r"\1"),),
        parts=(
            Part("leftImg8bit/train/*/*_leftImg8bit.png", 2975),
            Part("gtFine/train/*/*_gtFine_labelIds.png", 2975),
            Part("leftImg8bit/val/*/*_leftImg8bit.png", 500),
            Part("gtFine/val/*/*_gtFine_labelIds.png", 500),
            Part("leftImg8bit/test/*/*_leftImg8bit.png", 1525),
            Part("leftImg8bit/train_extra/*/*_leftImg8bit.png", 19998),
            Part("gtCoarse/train_extra/*/*_gtCoarse_labelIds.png", 19998),
        ),
    ),
    "pascal_voc": Layout(
        sources=(
            Source(
                "VOCtrainval_11-May-2012.tar",
                f"{_VOC}/voc2012/VOCtrainval_11-May-2012.tar",
                "md5:6cd6e144f989b92b3379bac3b3de84fd",
            ),
            Source(
                "benchmark.tgz",
                f"{_BERKELEY}/semantic_contours/benchmark.tgz",
                "md5:82b4d87ceb2ed10f6038a1cba92111cb",
            ),
            Source("VOC2012test.tar", f"{_VOC} (registration), for submissions only"),
        ),
        places=(
            (r"(?:.*/)?(VOCdevkit/VOC2012/.+)", r"\1"),
            (r"(?:.*/)?(benchmark_RELEASE/.+)", r"\1"),
        ),
        parts=(
            Part("VOCdevkit/VOC2012/JPEGImages/*.jpg", 17125),
            Part("VOCdevkit/VOC2012/SegmentationClass/*.png", 2913),
            Part("benchmark_RELEASE/dataset/cls/*.mat", 11355),
        ),
    ),
    "pascal_context": _CONTEXT,
    "pascal_context_60": _CONTEXT,
    "coco_stuff_10k": Layout(
        sources=(Source("cocostuff-10k-v1.1.zip", f"{_CALVIN}/cocostuff-10k-v1.1.zip"),),
        places=((r"(?:[^/]+/)?((?:images|annotations|imageLists)/[^/]+\.(?:jpg|mat|txt))", r"\1"),),
        parts=(Part("images/*.jpg", 10000), Part("annotations/*.mat", 10000)),
    ),
    "coco_stuff_164k": Layout(
        sources=(
            Source("train2017.zip", f"{_COCO}/train2017.zip"),
            Source("val2017.zip", f"{_COCO}/val2017.zip"),
            Source("stuffthingmaps_trainval2017.zip", f"{_CALVIN}/stuffthingmaps_trainval2017.zip"),
        ),
        places=(
            (r"(?:.*/)?((?:train|val)2017/\d{12}\.jpg)", r"images/\1"),
            (r"(?:.*/)?((?:train|val)2017/\d{12}\.png)", r"annotations/\1"),
        ),
        parts=(
            Part("images/train2017/*.jpg", 118287),
            Part("annotations/train2017/*.png", 118287),
            Part("images/val2017/*.jpg", 5000),
            Part("annotations/val2017/*.png", 5000),
        ),
    ),
    "ade20k": Layout(
        sources=(
            Source(
                "ADEChallengeData2016.zip",
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            ),
        ),
        places=((r"(?:.*/)?(ADEChallengeData2016/.+)", r"\1"),),
        parts=(
            Part("ADEChallengeData2016/images/training/*.jpg", 20210),
            Part("ADEChallengeData2016/annotations/training/*.png", 20210),
            Part("ADEChallengeData2016/images/validation/*.jpg", 2000),
            Part("ADEChallengeData2016/annotations/validation/*.png", 2000),
        ),
    ),
}
"""By the name of the config, ``data=NAME``."""

_JUNK = re.compile(r"(?:.*/)?(?:__MACOSX/.*|\._[^/]*|\.DS_Store|Thumbs\.db)")
"""What file managers add to archives."""


class Settings(NamedTuple):
    """The command line."""

    data: str
    archives: tuple[Path, ...]
    root: Path
    limits: Limits


def parse(arguments: Sequence[str]) -> Settings:
    """Read key=value settings; ``archive`` may be given several times."""
    known = ("data", "archive", "root", "max_gib", "max_ratio")
    given: dict[str, list[str]] = {key: [] for key in known}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            close = difflib.get_close_matches(key.lstrip("-"), known, n=1)
            hint = f"; did you mean {close[0]}=...?" if close else ""
            raise InputError(f"{argument}: there is no such setting{hint}\n\n{__doc__}")
        if not value:
            raise InputError(f"{argument}: no value is given")
        given[key].append(value)
    for key in known:
        if len(given[key]) > 1 and key != "archive":
            raise InputError(f"{key}: given {len(given[key])} times")
    if not given["data"]:
        raise InputError(f"data: no value is given; choices: {', '.join(LAYOUTS)}")
    data = given["data"][0]
    if data not in LAYOUTS:
        close = difflib.get_close_matches(data, LAYOUTS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"data={data}: choices: {', '.join(LAYOUTS)}{hint}")
    if not given["archive"] and not given["root"]:
        print(f"data={data} needs\n{downloads(data)}\nthen give root=DIR archive=FILE ...")
        sys.exit(0)
    if not given["archive"] or not given["root"]:
        absent = " and ".join(key for key in ("archive", "root") if not given[key])
        raise InputError(f"{absent}: no value is given; data={data} needs\n{downloads(data)}")
    defaults = Limits()
    ratio = _number("max_ratio", given["max_ratio"], defaults.ratio)
    gib = _number("max_gib", given["max_gib"], defaults.total / 2**30)
    return Settings(
        data,
        tuple(dict.fromkeys(Path(a).expanduser().absolute() for a in given["archive"])),
        Path(given["root"][0]).expanduser().absolute(),
        Limits(ratio, int(gib * 2**30)),
    )


def _number(key: str, given: list[str], default: float) -> float:
    try:
        value = float(given[0]) if given else default
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{key}={given[0]}: expected a number above 0")
    return value


def downloads(data: str) -> str:
    """List the files that the publisher of a data set offers."""
    layout = LAYOUTS[data]
    lines = [
        f"  {source.file:32}{source.digest or 'no checksum is published'}\n    {source.url}"
        for source in layout.sources
    ]
    return "\n".join([*lines, *([f"  {layout.note}"] if layout.note else [])])


def inspect(path: Path, data: str, limits: Limits) -> Listing:
    """Verify the checksum, if one is published, and check every member."""
    if path.is_dir() or not path.exists():
        what = "is a folder, not an archive" if path.is_dir() else "there is no such file"
        raise InputError(f"archive={path}: {what}")
    digest = next((s.digest for s in LAYOUTS[data].sources if s.file == path.name), "")
    if digest:
        algorithm, _, expected = digest.partition(":")
        with bar(f"{path.name}: {algorithm}", path.stat().st_size) as progress:
            check_digest(path, algorithm, expected, progress=progress.update)
    listing = read_listing(path, limits)
    shown = digest.partition(":")[0] + " as published" if digest else "no published checksum"
    print(f"{path.name}: {len(listing.members):,} files, {listing.size / 2**30:.2f} GiB, {shown}")
    return listing


def targets(listing: Listing, data: str) -> dict[str, str]:
    """Return member path -> path below root, for members that belong to the data set."""
    found: dict[str, str] = {}
    for member in listing.members:
        target = place(member.path, data)
        if target:
            found[member.path] = target
    if not found:
        paths = [member.path for member in listing.members]
        others = [name for name in LAYOUTS if any(place(path, name) for path in paths[:1000])]
        hint = f"; it looks like data={others[0]}" if others else ""
        files = ", ".join(source.file for source in LAYOUTS[data].sources)
        raise InputError(
            f"archive={listing.path}: nothing in it belongs to data={data}{hint}; it holds "
            f"{', '.join(paths[:3]) or 'nothing'}; expected one of {files}"
        )
    if len(set(found.values())) < len(found):
        raise InputError(f"archive={listing.path}: it holds the data set twice, in two folders")
    return found


def place(path: str, data: str) -> str:
    """Return where a member belongs below root; empty if it is not of the data set."""
    if _JUNK.fullmatch(path):
        return ""
    for pattern, target in LAYOUTS[data].places:
        match = re.fullmatch(pattern, path)
        if match:
            return match.expand(target)
    return ""


def bar(text: str, size: int) -> "tqdm[Any]":
    """Return a progress bar over bytes, disabled if the output is not a terminal."""
    return tqdm(desc=text, total=size, unit="B", unit_scale=True, disable=None, leave=False)


def main(arguments: Sequence[str]) -> None:
    """Check all archives, unpack them, and count the files of the data set."""
    settings = parse(arguments)
    data, root = settings.data, settings.root
    if root.exists() and not root.is_dir():
        raise InputError(f"root={root}: is there and is no folder")
    listings = [inspect(path, data, settings.limits) for path in settings.archives]
    plans = [(listing, targets(listing, data)) for listing in listings]
    for listing, plan in plans:
        size = sum(member.size for member in listing.members if member.path in plan)
        with bar(listing.path.name, size) as progress:
            done = unpack(listing, plan, root, progress.update)
        left = len(listing.members) - len(plan)
        facts = [
            f"{done.written:,} files written",
            f"{done.resumed:,} of them by an earlier run" if done.resumed else "",
            f"{done.present:,} were there already" if done.present else "",
            f"{left:,} that do not belong to the data set left out" if left else "",
        ]
        print(f"{listing.path.name}: {', '.join(filter(None, facts))}")
    for part in LAYOUTS[data].parts:
        count = sum(1 for _ in root.glob(part.pattern))
        of = f"of {part.expected:>7,}" if part.expected else ""
        print(f"  {count:>8,} {of:10}  {part.pattern}")
    print(f"next: python tools/check_data.py data={data} {shlex.quote(f'data.root={root}')}")


if __name__ == "__main__":
    command_line.run(main)
