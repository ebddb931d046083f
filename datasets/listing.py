"""Finding files below a folder, through links; obstacles are errors of one line."""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from danet.errors import InputError

# Compared in lower case.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def find_files(folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[str]:
    """Return paths relative to ``folder``, with forward slashes, of files with these suffixes.

    Links are followed, and capitals in suffixes do not matter. A folder that does not exist holds
    no files. Hidden files and folders are left out.

    Raises:
        InputError: A folder cannot be read, or a link is broken or leads back to a parent.
    """
    return sorted(_walk(folder, "", suffixes)) if folder.is_dir() else []


def named_files(folder: Path, *suffixes: str) -> dict[str, str]:
    """Return relative path without suffix -> path of the files with these suffixes, sorted."""
    return {name.rpartition(".")[0]: f"{folder}/{name}" for name in find_files(folder, suffixes)}


def unused_note(folder: Path, names: Sequence[str]) -> list[str]:
    """Return a note on label files without an image, or no note."""
    shown = f"label files have no image and are not used: {', '.join(names[:5])}"
    return [f"{folder}: {len(names)} {shown}"] if names else []


def _walk(folder: Path, prefix: str, suffixes: Collection[str]) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder}: this folder cannot be read ({error.strerror})") from error
    for entry in found:
        if entry.name.startswith("."):
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        if entry.is_symlink():
            _check_link(folder, entry, suffix in suffixes or not suffix)
        if entry.is_dir():
            yield from _walk(folder / entry.name, f"{prefix}{entry.name}/", suffixes)
        elif suffix in suffixes:
            yield prefix + entry.name


def _check_link(folder: Path, entry: "os.DirEntry[str]", is_wanted: bool) -> None:
    """Raise InputError for a broken link that is wanted, and for a link to one of its parents."""
    target = os.path.realpath(entry.path)
    if not os.path.exists(entry.path):
        if is_wanted:
            leads = os.readlink(entry.path)
            raise InputError(f"{entry.path}: this link leads to {leads}, which does not exist")
    elif os.path.isdir(target) and Path(target) in (real := folder.resolve(), *real.parents):
        raise InputError(f"{entry.path}: this link leads back to {target}, in which it lies")
