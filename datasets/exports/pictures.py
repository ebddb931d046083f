"""The picture files of an export: where they are, and whether they are those that it describes."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from danet.datasets.exports.shapes import Picture
from danet.datasets.image_io import reason
from danet.datasets.listing import find_files
from danet.errors import InputError


class Pictures:
    """The picture files of some folders, found by what an export calls them."""

    def __init__(self, folders: Sequence[Path]) -> None:
        found = (f"{folder}/{name}" for folder in folders for name in find_files(folder))
        self.paths = list(dict.fromkeys(map(os.path.normpath, found)))
        self._by_name = defaultdict[str, list[str]](list)
        for path in self.paths:
            for key in {os.path.basename(path), os.path.splitext(os.path.basename(path))[0]}:
                self._by_name[key].append(path)

    def locate(self, picture: Picture, root: Path) -> str | None:
        """Return the file of a picture: by its path, else by the end of it; None without one."""
        name = picture.name.replace("\\", "/")
        for folder in (picture.file.parent, root):
            path = os.path.normpath(folder / name)
            if path in self._by_name[os.path.basename(path)]:
                return path
        ends = [*self._ends(name)]
        if Path(name).is_relative_to(root):  # where the format has it, not where another may be
            ends = [path for path in ends if not Path(path).is_relative_to(root)]
        if len(ends) > 1:
            raise InputError(
                f"{picture.file}: {picture.name} may be {ends[0]} or {ends[1]}; remove one, or "
                "name the folder of the right one, data.images_dir=FOLDER"
            )
        return ends[0] if ends else None

    def _ends(self, name: str) -> Iterator[str]:
        """Yield the files that share the longest end of a path, with or without suffixes."""
        base, stem = os.path.basename(name), os.path.splitext(os.path.basename(name))[0]
        candidates = self._by_name[base] or self._by_name[stem]
        parts = PurePosixPath(name).parts[-2::-1]

        def shared(path: str) -> int:
            pairs: Any = zip(PurePosixPath(path).parts[-2::-1], parts, strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), len(parts))

        longest = max(map(shared, candidates), default=0)
        yield from (path for path in candidates if shared(path) == longest)


def size_of(picture: Picture, image: Path) -> tuple[int, int]:
    """Return height and width of a picture; raise InputError if its export has others."""
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if picture.size:  # of a kind that Pillow does not read
            return picture.size
        raise InputError(f"{image}: not a readable picture ({reason(error, image)})") from error
    if picture.size not in (None, (height, width)):
        stated = f"{picture.size[1]} x {picture.size[0]}" if picture.size else ""
        turned = "; an EXIF tag may turn it in the tool: turn its pixels" * (
            picture.size == (width, height)
        )
        raise InputError(
            f"{picture.file}: {picture.name} is {stated} there, and {image} is {width} x {height} "
            f"(width x height){turned or '; replace it by the picture that was annotated'}"
        )
    return height, width
