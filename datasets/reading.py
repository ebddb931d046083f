"""How files are read: settings that all data sets share, and the check of choices."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from danet.bands import Bands, bands_of
from danet.datasets.image_io import MAX_PIXELS
from danet.errors import InputError
from danet.plain import is_int, is_number

T = TypeVar("T")


def check_choice(key: str, value: object, options: Any) -> None:
    """Raise InputError if the value of a setting is none of the options of a Literal."""
    if value not in get_args(options):
        raise InputError(f"data.{key}={value}: expected one of {', '.join(get_args(options))}")


def check_choices(settings: Any) -> None:
    """Check all fields of a dataclass whose type is a Literal."""
    for field in fields(settings):
        if get_origin(field.type) is Literal:
            check_choice(field.name, getattr(settings, field.name), field.type)


def as_dataclass(kind: type[T], settings: T | Mapping[str, Any] | None) -> T:
    """Return settings as their dataclass; configs give them as plain mappings."""
    return settings if isinstance(settings, kind) else kind(**(settings or {}))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Reading:
    """How files are read: the same for every data set, from keys of the config group ``data``."""

    cache: Literal["none", "disk"] = "none"  # where decoded pairs are kept
    cache_dir: str | None = None  # None for one in the user's own cache folder
    cache_gib: float = 64.0  # upper bound; pairs that do not fit are decoded every time
    max_pixels: int = MAX_PIXELS  # larger pictures are refused before they are decoded
    allow_missing_labels: bool = False  # leave out images without a label, rather than refuse them
    channels: Any = None  # bands that are read as they are; None for RGB of 8 bits
    range: Any = None  # see danet.bands
    rgb: Any = None

    def __post_init__(self) -> None:
        check_choices(self)
        if not isinstance(self.cache_dir, str | None):
            raise InputError(f"data.cache_dir={self.cache_dir}: expected a folder or null")
        if not is_number(self.cache_gib) or not 0 < self.cache_gib < math.inf:
            raise InputError(f"data.cache_gib={self.cache_gib}: expected a number above 0")
        if not is_int(limit := self.max_pixels) or limit < 1:
            raise InputError(f"data.max_pixels={limit}: expected a whole number, at least 1")

    @property
    def bands(self) -> Bands | None:
        """The bands that are read; None for RGB of 8 bits."""
        return bands_of(self.channels, self.range, self.rgb)
