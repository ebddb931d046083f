"""What lies below a folder in the place of the images and masks that were looked for."""

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from difflib import SequenceMatcher
from itertools import chain, islice, takewhile
from pathlib import Path

from danet.datasets.exports.index import FORMATS
from danet.datasets.image_io import open_picture
from danet.datasets.items import Item, Items
from danet.datasets.layout import SPLIT_OF, PairLayout, pair_files
from danet.datasets.listing import IMAGE_SUFFIXES, LABEL_SUFFIXES
from danet.errors import InputError
from danet.plain import quoted

_OF_MASKS = re.compile("mask|label|annot|truth|gt|seg|lbl|target|matte", re.IGNORECASE)
# In the path of a folder: masks, labels/train, img_annotations, but not labels/images or labeled.
_ONLY_MASKS = re.compile(
    r"(mask(?!ed)|label(?!l?ed)|annotation|truth|lbl)(?!.*(image|img|photo|pic)).*/", re.IGNORECASE
)
_NOT_READ = re.compile(
    r"\.(hei[cf]|avif|jxl|jp2|jfif|psd|tga|exr|svg|pdf|p[bgpn]m|dng|cr[23]|nef|arw)", re.IGNORECASE
)


def suggest(root: Path, layout: PairLayout, otherwise: str = "") -> str:
    """Return settings by which images below a folder find masks, as the end of a message.

    Without such settings it names a tool whose annotations are there, is ``otherwise`` or, where
    that is empty, the kinds of files that are there. Where most pictures are of a kind that is not
    read, it says so instead.
    """
    files, masks = list(_walk(root)), f"{layout.masks_dir}/" * (layout.masks_dir != ".")
    images = [
        name
        for name in files
        if _suffix(name) in IMAGE_SUFFIXES
        and not (_ONLY_MASKS.search(name) or (masks and name.startswith(masks)))
    ]
    not_read = [name for name in files if _NOT_READ.fullmatch(_suffix(name))]
    if is_read := len(not_read) <= len(images):
        ways = Counter[PairLayout]()
        for image in images[:: len(images) // 12 + 1]:
            ways.update({way for name in _like(image, files) for way in _ways(image, name)})
        own = (way for way in ways if way != layout and not _is_another(way, layout))
        likely = sorted(own, key=ways.__getitem__)[-12:]
        found = [(way, pairs) for way in likely if (pairs := _pairs(way, root))]
        way, pairs = max(found, key=lambda one: (len(one[1]), *_looks(*one)), default=(layout, []))
        paired = {os.path.relpath(str(path), root) for pair in pairs for path in pair[:2]}
        # Fewer may be chance, or one split of two.
        if pairs and len(pairs) >= min(20, 4 * len({*images} - paired)):
            first = " and ".join(os.path.relpath(str(path), root) for path in pairs[0][:2])
            return f"; {len(pairs)} pairs, as {first}, are found by {_settings(way, layout)}"
        if tools := [name for name, reader in FORMATS.items() if reader.find(root)]:
            return (
                f"; there are annotations of {' and '.join(tools)}: data=annotations reads them, "
                "with the names of their classes"
            )
        if otherwise:
            return otherwise
    shown = files if is_read else not_read
    kinds = Counter((_suffix(name), os.path.dirname(name) or ".") for name in shown)
    there = ", ".join(f"{n} {kind} in {folder}" for (kind, folder), n in kinds.most_common(5))
    read = ", ".join(sorted(IMAGE_SUFFIXES))
    convert = "" if is_read else "; convert them"
    return there and f"; there are {there}; images are files with {read}{convert}"


def _walk(root: Path) -> Iterator[str]:
    """Yield the files in the first 2000 folders below ``root`` as paths from there, none hidden."""
    for folder, inside, names in islice(os.walk(root, followlinks=True), 2000):
        inside[:] = sorted(name for name in inside if name[0] != ".")
        paths = (os.path.relpath(f"{folder}/{n}", root) for n in sorted(names) if n[0] != ".")
        yield from (path for path in paths if "*" not in path)  # which a pattern could not name


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _like(image: str, names: list[str]) -> Iterator[str]:
    """Yield files with the two words or numbers of an image's path that the fewest files have."""
    words = dict.fromkeys(re.findall(r"\d+|[^\W\d_]+", os.path.splitext(image)[0]))
    groups = ([name for name in names if word in name and name != image] for word in words)
    rarest = sorted(filter(None, groups), key=len)[:2]
    return (name for name in islice(chain(*rarest), 500) if _suffix(name) in LABEL_SUFFIXES)


def _ways(image: str, mask: str) -> Iterator[PairLayout]:
    """Yield layouts in which one file is the mask of another, given their paths."""
    (*above, name), (*above_mask, mask_name) = image.split("/"), mask.split("/")
    lead = _shared(above, above_mask)
    tail = _shared(above[lead:][::-1], above_mask[lead:][::-1])
    own, own_mask = above[lead : len(above) - tail], above_mask[lead : len(above_mask) - tail]
    if all(SPLIT_OF.get("".join(part[:1]).lower()) for part in (own, own_mask)):
        return  # one split, and another
    split = next((i for i, part in enumerate(above[:lead]) if part.lower() in SPLIT_OF), None)
    stem, (mask_stem, suffix) = os.path.splitext(name)[0], os.path.splitext(mask_name)
    at = SequenceMatcher(None, stem, mask_stem, autojunk=False).find_longest_match()
    part = stem[at.a : at.a + at.size].strip("_-. ")
    patterns = [(stem.replace(part, "*", 1), mask_stem.replace(part, "*", 1))] if part else []
    if own == own_mask and above:  # a folder for each picture
        patterns.append((f"*/{stem}", f"*/{mask_stem}"))
    for first, second in patterns:
        if first != second and re.sub(r"\d", "", first) == re.sub(r"\d", "", second):
            continue  # one picture, and the next
        inner = above[:lead] if split is None else above[1:lead]
        if own and own_mask and not split:
            places = "/".join([*inner, *own]) or ".", "/".join([*inner, *own_mask])
            yield _layout(*places, first, second + suffix)
        if (split or inner) or not (own and own_mask):
            place = "/".join(above[: split or 0]) or "."
            paths = "/".join([*own, first]), "/".join([*own_mask, second + suffix])
            yield _layout(place, place, *paths)


def _layout(images_dir: str, masks_dir: str, image: str, mask: str) -> PairLayout:
    if image[0] == mask[0] == "*":
        return PairLayout(images_dir, masks_dir, mask[1:], image[1:] or None)
    return PairLayout(images_dir, masks_dir, pairs=(image, mask))


def _shared(one: list[str], other: list[str]) -> int:
    """Return how many parts at the start of two paths are equal."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))])


def _is_another(way: PairLayout, layout: PairLayout) -> bool:
    """Return whether a way is that of another data set, in a folder with a tree of its own."""
    patterns = " /".join(way.patterns)
    return f"/{layout.images_dir}/" in f"{way.images_dir}/ {way.masks_dir}/ /{patterns}"


def _pairs(layout: PairLayout, root: Path) -> list[Item]:
    """Return the pairs of all splits whose masks are there."""
    with suppress(InputError):
        folders = layout.split_folders(root).values() or [layout.folders(root)]
        items = Items(i for f in folders for i in pair_files(*f, layout.patterns)[0].values())
        missing = {*items.without_label()}
        return [item for i, item in enumerate(items) if i not in missing]
    return []


def _looks(layout: PairLayout, pairs: list[Item]) -> tuple[int, int]:
    """Return how much masks look like masks: by their names, and by the channels of the first."""
    image, mask = zip((layout.images_dir, layout.masks_dir), layout.patterns, strict=True)
    named = bool(_OF_MASKS.search("/".join(mask))) - bool(_OF_MASKS.search("/".join(image)))
    with suppress(InputError), open_picture(Path(str(pairs[0].mask))) as picture:
        return named, -len(picture.getbands())
    return named, -1


def _settings(wanted: PairLayout, layout: PairLayout) -> str:
    """Return the settings in which a layout differs from another."""
    shown = []
    for key, value in ((f.name, getattr(wanted, f.name)) for f in fields(PairLayout)):
        if value != getattr(layout, key):
            names = [_literal(name) for name in value] if key == "pairs" and value else []
            text = f"[{','.join(names)}]" if names else "null" if value is None else _literal(value)
            shown.append(shlex.quote(f"data.{key}={text}"))
    return " ".join(shown)


def _literal(text: str) -> str:
    """Return a text as Hydra takes it, quoted if it must be."""
    plain = re.fullmatch(r"(?![\d.]*\d$)[\w.*/-]([\w.*/ -]*[\w.*/-])?", text)  # and no number
    return text if plain else quoted(text)
