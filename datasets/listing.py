"""Finding files and folders, through links; obstacles are errors of one line."""

import os
import shlex
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from danet.errors import InputError

# Compared in lower case.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
LABEL_SUFFIXES = IMAGE_SUFFIXES | {".gif", ".npy"}


def find_files(folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[str]:
    """Return paths relative to ``folder``, with forward slashes, of files with these suffixes.

    Links are followed, and capitals in suffixes do not matter. A folder that does not exist holds
    no files. Hidden files and folders are left out. A folder that cannot be read, and a link that
    is broken or leads back to a parent, raise InputError.
    """
    return sorted(_walk(folder, "", suffixes)) if folder.is_dir() else []


def named_files(folder: Path, *suffixes: str) -> dict[str, str]:
    """Return relative path without suffix -> path of the files with these suffixes, sorted."""
    return {name.rpartition(".")[0]: f"{folder}/{name}" for name in find_files(folder, suffixes)}


def first_folder(root: Path, places: Iterable[str], marker: str) -> Path | None:
    """Return the first of some places below ``root`` that has a folder ``marker``."""
    return next((root / place for place in places if (root / place / marker).is_dir()), None)


def elsewhere(root: Path, marker: str, key: str = "data.root") -> str:
    """Return which folders near ``root`` do have ``marker``, as settings; "" where none has.

    Archives get unpacked inside themselves, and a folder too high or too deep gets named: two
    levels up and two down are searched.
    """
    near = chain(root.parents[:2], sorted(root.glob("*/")), sorted(root.glob("*/*/")))
    found = (folder for folder in near if os.path.exists(folder / marker))
    settings = " or ".join(shlex.quote(f"{key}={folder}") for folder in islice(found, 5))
    return f"; {marker} is elsewhere: set {settings}" if settings else ""


def _walk(folder: Path, prefix: str, suffixes: Collection[str]) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    for entry in found:
        suffix = os.path.splitext(entry.name)[1].lower()
        target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        if (suffix in suffixes or not suffix) and not os.path.lexists(target):
            raise InputError(f"{entry.path}: this link leads to {target}, which does not exist")
        if entry.is_dir():
            if target != entry.path and Path(target) in Path(os.path.realpath(folder), "x").parents:
                raise InputError(
                    f"{entry.path}: this link leads back to {target}, in which it lies"
                )
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", suffixes)
        elif suffix in suffixes:
            yield prefix + entry.name
