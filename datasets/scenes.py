"""Street scenes, drawn on the fly from (seed, split, index): the data set that needs no files.

Most classes are recognisable by themselves. Two pairs are not: a bus and a tram are drawn by the
same lines, and so are a kiosk and a booth. They stand in the right 40 % of a picture, and only a
cue in its left quarter decides between the two:

    a landmark, mill or tower (terracotta or cobalt)   decides    bus or tram
    a square, heath or lawn (heather or moss)          decides    kiosk or booth

Both are fair bits, independent of each other and of all else that is drawn, so a network that
carries nothing across the picture is left to guess. One that looks for one cue of a pair, and takes
its absence for the other class, needs no more. Nothing taller than a car hides a cue.

A picture is painted from the back to the front. Ground lines are fractions of its height, objects
are measured in ``Canvas.unit``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Literal

import cv2
import numpy as np

from danet.datasets.base import SegmentationDataset
from danet.datasets.canvas import Box, Canvas, pick, shade, spread
from danet.datasets.image_io import MAX_PIXELS
from danet.datasets.labels import read_class_table
from danet.datasets.reading import check_choices
from danet.errors import InputError

_TABLE = read_class_table("scenes")
Level = Literal["wide", "small", "relation"]

SKY, BUILDING, ROAD, SIDEWALK, TREE, POLE, PERSON, CAR = range(8)
MILL, TOWER, HEATH, LAWN, BUS, TRAM, KIOSK, BOOTH = range(8, 16)

Cue = tuple[int, int]  # the classes that show bit 0 and bit 1
LANDMARK: Cue = (MILL, TOWER)
SQUARE: Cue = (HEATH, LAWN)
# Class of the pixels around a cue that does not fill its place.
BEHIND = {LANDMARK: BUILDING, SQUARE: SIDEWALK}

HORIZON, KERB, LANE_LINE, NEAR_KERB = 0.50, 0.56, 0.67, 0.78  # fractions of the height
CUE_END, PAIR_START = 0.25, 0.60  # fractions of the width
MIN_HEIGHT = 48

RGB = SimpleNamespace(
    **json.loads((Path(__file__).parent / "tables" / "scene_colors.json").read_text())
)
"""Colours by name: one, or several to choose from."""
TINTS = dict(zip((MILL, TOWER, HEATH, LAWN), RGB.tints, strict=True))


def draw_sky(canvas: Canvas, rng: Random) -> None:
    """Paint a sky that fades to haze at the horizon, with clouds."""
    height, unit = canvas.height, canvas.unit
    depth = np.minimum(np.arange(height) / (HORIZON * height), 1)[:, None]  # (H, 1)
    fade = (1 - depth) * pick(rng, RGB.zeniths) + depth * pick(rng, RGB.hazes)  # (H, 3)
    canvas.image[:] = fade.astype(np.uint8)[:, None]
    for x in spread(rng, 0, canvas.width, room=unit):
        y = rng.uniform(0.04, 0.2) * height
        for _ in range(4):
            radius = rng.uniform(0.03, 0.06) * unit
            puff = (x + rng.uniform(-0.16, 0.16) * unit, y)
            canvas.ellipse(SKY, RGB.cloud, puff, 2 * radius, radius)


def draw_buildings(canvas: Canvas, rng: Random) -> None:
    """Draw a row of stone facades, some with a gable, some with a shop."""
    unit, bottom = canvas.unit, HORIZON * canvas.height
    left = -rng.uniform(0, 0.3) * unit
    while left < canvas.width:
        right, top = left + rng.uniform(0.35, 0.8) * unit, rng.uniform(0.16, 0.34) * canvas.height
        stone = pick(rng, RGB.stone)
        if rng.random() < 0.4:
            ridge = ((left + right) / 2, top - 0.1 * unit)
            canvas.polygon(BUILDING, shade(stone, 0.6), [(left, top), (right, top), ridge])
        canvas.box(BUILDING, stone, (left, top, right, bottom))
        canvas.box(BUILDING, shade(stone, 1.15), (left, top, right, top + 0.02 * unit))
        panes = (left + 0.04 * unit, top + 0.05 * unit, right - 0.02 * unit, bottom - 0.1 * unit)
        pitch = (rng.uniform(0.09, 0.14) * unit, rng.uniform(0.1, 0.13) * unit)
        canvas.grid(pick(rng, (RGB.glass, RGB.lit)), panes, pitch=pitch, fill=(0.5, 0.6))
        if rng.random() < 0.5:
            shop = (left + 0.03 * unit, bottom - 0.08 * unit, right - 0.03 * unit, bottom)
            canvas.box(BUILDING, pick(rng, RGB.paint), shop)
        left = right


def draw_ground(canvas: Canvas, rng: Random) -> None:
    """Draw the far sidewalk, the road with its markings, and the near sidewalk with its kerb."""
    height, width, unit = canvas.height, canvas.width, canvas.unit
    paving, whole = pick(rng, [RGB.paving]), float(max(height, width))
    canvas.box(SIDEWALK, shade(paving, 0.92), (0, HORIZON * height, width, height))
    canvas.box(ROAD, pick(rng, [RGB.asphalt]), (0, KERB * height, width, height))
    middle = (0, LANE_LINE * height - 0.012 * unit, width, LANE_LINE * height + 0.012 * unit)
    canvas.grid(RGB.line, middle, pitch=(0.3 * unit, whole), fill=(0.55, 1))
    x = rng.uniform(0, width - 0.4 * unit)
    crossing = (x, (KERB + 0.02) * height, x + 0.4 * unit, (NEAR_KERB - 0.02) * height)
    canvas.grid(RGB.line, crossing, pitch=(0.1 * unit, whole), fill=(0.5, 1))
    top = NEAR_KERB * height
    canvas.box(SIDEWALK, paving, (0, top, width, height))
    canvas.box(SIDEWALK, shade(paving, 1.2), (0, top, width, top + 0.02 * unit))


def draw_texture(canvas: Canvas, landmark: Box) -> None:
    """Draw windows on the landmark and joints on the near sidewalk; the tints stay visible."""
    unit, whole = canvas.unit, float(max(canvas.height, canvas.width))
    left, top, right, bottom = landmark
    panes = (left + 0.05 * unit, top + 0.05 * unit, right - 0.03 * unit, bottom - 0.04 * unit)
    canvas.grid(RGB.glass, panes, pitch=(0.12 * unit, 0.11 * unit), fill=(0.4, 0.5), opacity=0.5)
    ground = (0, NEAR_KERB * canvas.height, canvas.width, canvas.height)
    rows, columns = (whole, 0.06 * unit), (0.12 * unit, whole)
    canvas.grid(RGB.asphalt, ground, pitch=rows, fill=(1, 0.2), opacity=0.15)
    canvas.grid(RGB.asphalt, ground, pitch=columns, fill=(0.12, 1), opacity=0.15)


def paint_cue(
    canvas: Canvas, rng: Random, cue: Cue, bit: int, box: Box, level: Level, radius: float
) -> None:
    """Paint what shows a bit inside a box.

    "wide": a tint of the whole box. "small": a disc of this radius on stone, on the ground lying
    flat. "relation": two patches on stone, of one tint (bit 0) or of two (bit 1), so that neither
    tint alone is a cue.
    """
    left, top, right, bottom = box
    if level == "wide":
        canvas.box(cue[bit], pick(rng, [TINTS[cue[bit]]]), box)
        return
    canvas.box(BEHIND[cue], pick(rng, RGB.stone), box)
    if level == "small":
        across, down = (radius, radius) if cue == LANDMARK else (1.4 * radius, 0.45 * radius)
        x, y = rng.uniform(left + across, right - across), rng.uniform(top + down, bottom - down)
        canvas.ellipse(cue[bit], pick(rng, [TINTS[cue[bit]]]), (x, y), across, down)
        return
    first, third = rng.getrandbits(1), (right - left) / 3
    for x, kind in ((left, cue[first]), (right - third, cue[first ^ bit])):
        canvas.box(kind, pick(rng, [TINTS[kind]]), (x, top, x + third, bottom))


def draw_tree(canvas: Canvas, rng: Random, left: float, bottom: float) -> None:
    """Draw a trunk and a crown of six clumps."""
    unit, green = canvas.unit, pick(rng, RGB.leaves)
    x, top = left + 0.1 * unit, bottom - rng.uniform(0.3, 0.36) * unit
    canvas.box(TREE, RGB.bark, (x - 0.015 * unit, top, x + 0.015 * unit, bottom))
    for _ in range(6):
        clump = (x + rng.uniform(-0.07, 0.07) * unit, top + rng.uniform(-0.07, 0.07) * unit)
        leaves = shade(green, rng.uniform(0.8, 1.15))
        canvas.ellipse(TREE, leaves, clump, rng.uniform(0.06, 0.1) * unit)


def draw_pole(canvas: Canvas, rng: Random, left: float, bottom: float) -> None:
    """Draw a street lamp."""
    unit, metal = canvas.unit, pick(rng, [RGB.metal])
    top, right = bottom - rng.uniform(0.5, 0.6) * unit, left + 0.14 * unit
    canvas.box(POLE, metal, (left, top, left + 0.04 * unit, bottom))
    canvas.box(POLE, metal, (left, top, right, top + 0.03 * unit))
    canvas.box(POLE, RGB.lamp, (left + 0.09 * unit, top, right, top + 0.05 * unit))


def draw_person(canvas: Canvas, rng: Random, left: float, bottom: float) -> None:
    """Draw a standing person."""
    tall = rng.uniform(0.2, 0.25) * canvas.unit
    top, right, waist = bottom - tall, left + 0.3 * tall, bottom - 0.4 * tall
    inset = 0.03 * tall
    canvas.box(PERSON, pick(rng, RGB.trousers), (left + inset, waist, right - inset, bottom))
    canvas.box(PERSON, pick(rng, RGB.paint), (left, top + 0.2 * tall, right, waist))
    canvas.ellipse(PERSON, pick(rng, RGB.skin), ((left + right) / 2, top + 0.1 * tall), 0.1 * tall)


def draw_wheels(canvas: Canvas, kind: int, xs: Sequence[float], *, bottom: float, r: float) -> None:
    """Draw wheels of radius r that stand on ``bottom``."""
    for x in xs:
        canvas.ellipse(kind, RGB.tyre, (x, bottom - r), r)
        canvas.ellipse(kind, RGB.rim, (x, bottom - r), 0.4 * r)


def draw_car(canvas: Canvas, rng: Random, left: float, bottom: float) -> None:
    """Draw a car from its side."""
    unit, paint = canvas.unit, pick(rng, RGB.paint)
    length, tall = rng.uniform(0.36, 0.42) * unit, rng.uniform(0.15, 0.17) * unit
    top, waist, sill = bottom - tall, bottom - 0.58 * tall, bottom - 0.12 * tall
    cabin = ((0.14, waist), (0.3, top), (0.7, top), (0.88, waist))
    panes = ((0.22, waist), (0.33, top + 0.1 * tall), (0.67, top + 0.1 * tall), (0.8, waist))
    canvas.polygon(CAR, paint, [(left + part * length, y) for part, y in cabin])
    canvas.polygon(CAR, RGB.glass, [(left + part * length, y) for part, y in panes])
    canvas.box(CAR, paint, (left, waist, left + length, sill))
    axles = (left + 0.22 * length, left + 0.78 * length)
    draw_wheels(canvas, CAR, axles, bottom=bottom, r=0.2 * tall)


def draw_coach(canvas: Canvas, rng: Random, left: float, bottom: float, *, kind: int) -> None:
    """Draw a bus or a tram: nothing but the class differs."""
    unit, paint = canvas.unit, pick(rng, RGB.paint)
    length, tall = rng.uniform(0.75, 0.85) * unit, rng.uniform(0.32, 0.36) * unit
    top, right = bottom - tall, left + length
    canvas.box(kind, paint, (left, top, right, bottom - 0.1 * tall))
    canvas.box(kind, shade(paint, 0.7), (left, top, right, top + 0.12 * tall))
    panes = (left + 0.03 * unit, top + 0.22 * tall, right, top + 0.56 * tall)
    canvas.grid(RGB.glass, panes, pitch=(0.13 * unit, unit), fill=(0.75, 1))
    canvas.box(kind, RGB.cloth, (left, top + 0.7 * tall, right, top + 0.75 * tall))
    axles = (left + 0.2 * length, left + 0.8 * length)
    draw_wheels(canvas, kind, axles, bottom=bottom, r=0.13 * tall)


def draw_stall(canvas: Canvas, rng: Random, left: float, bottom: float, *, kind: int) -> None:
    """Draw a kiosk or a booth: nothing but the class differs."""
    unit, paint = canvas.unit, pick(rng, RGB.paint)
    wide, tall = rng.uniform(0.36, 0.44) * unit, rng.uniform(0.36, 0.42) * unit
    top, right, inset = bottom - tall, left + wide, 0.1 * wide
    shelf, awning = top + 0.6 * tall, (left, top, right, top + 0.28 * tall)
    canvas.box(kind, shade(paint, 0.85), (left, top, right, bottom))
    canvas.box(kind, RGB.counter, (left + inset, top, right - inset, shelf))
    canvas.box(kind, RGB.shelf, (left, shelf, right, shelf + 0.08 * tall))
    canvas.box(kind, RGB.cloth, awning)
    canvas.grid(paint, awning, pitch=(0.09 * unit, unit), fill=(0.5, 1))


def draw_street(canvas: Canvas, rng: Random, *, coach: int, stall: int) -> None:
    """Draw trees, poles, people and vehicles, from the far sidewalk to the near one."""
    width, unit = float(canvas.width), canvas.unit
    coaches, stalls = partial(draw_coach, kind=coach), partial(draw_stall, kind=stall)
    past_cue, right = CUE_END * width, PAIR_START * width
    # Function, start and stop on x, width of a slot in units, range of the ground line.
    rows: tuple[tuple[Callable[..., None], float, float, float, tuple[float, float]], ...] = (
        (draw_tree, past_cue, width, 0.6, (0.53, 0.55)),
        (draw_pole, past_cue, width, 1.1, (0.54, 0.56)),
        (draw_person, past_cue, width, 0.5, (0.54, 0.56)),
        (draw_car, 0, right, 0.5, (0.63, 0.65)),
        (coaches, right, width, 0.86, (0.65, 0.67)),
        (draw_car, 0, width, 1.0, (0.74, 0.77)),
        (draw_person, past_cue, width, 0.7, (0.84, 0.92)),
        (stalls, right, width, 0.6, (0.90, 0.97)),
    )
    for draw, start, stop, room, ground in rows:
        for left in spread(rng, start, stop, room=room * unit):
            draw(canvas, rng, left, rng.uniform(*ground) * canvas.height)


def expose(image: np.ndarray, rng: Random) -> np.ndarray:
    """Return the picture, (H, W, 3) uint8, with the blur, exposure and grain of a camera."""
    soft = cv2.GaussianBlur(image, (3, 3), 0.6)
    numbers = np.random.default_rng(rng.getrandbits(64))  # one draw per pixel: slow with random
    grain = 5 * numbers.standard_normal(image.shape[:2], np.float32)  # (H, W)
    lit = cv2.convertScaleAbs(soft, alpha=rng.uniform(0.85, 1.1))
    return cv2.add(lit, cv2.merge([grain] * 3), dtype=cv2.CV_8U)  # saturates, unlike numpy


def draw_scene(
    rng: Random, *, size: Sequence[int], level: Level, cue_radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture: (H, W, 3) uint8 RGB, and its mask, (H, W) uint8 class indices."""
    canvas = Canvas(*size, background=SKY)
    height, end, unit = float(canvas.height), CUE_END * canvas.width, canvas.unit
    left, top = rng.uniform(0, 0.2) * end, rng.uniform(0.04, 0.08) * height
    landmark = (left, top, end, HORIZON * height)
    square = (0.0, NEAR_KERB * height + 0.02 * unit, end, height)
    coach_bit, stall_bit = rng.getrandbits(1), rng.getrandbits(1)
    draw_sky(canvas, rng)
    draw_buildings(canvas, rng)
    paint_cue(canvas, rng, LANDMARK, coach_bit, landmark, level, cue_radius)
    draw_ground(canvas, rng)
    paint_cue(canvas, rng, SQUARE, stall_bit, square, level, cue_radius)
    draw_texture(canvas, landmark)
    draw_street(canvas, rng, coach=(BUS, TRAM)[coach_bit], stall=(KIOSK, BOOTH)[stall_bit])
    return expose(canvas.image, rng), canvas.mask


@dataclass(kw_only=True, eq=False, repr=False)
class Scenes(SegmentationDataset):
    """Draws street scenes with two pairs of classes that only a distant cue distinguishes.

    A picture is a function of (seed, split, index): nothing is stored, and no two splits share one.

    Args:
        split: One of ``splits``.
        lengths: Number of pictures of each split.
        size: Height and width of a picture.
        level: How a cue encodes its bit. "wide": a whole facade, a whole square; "small": a disc on
            stone; "relation": two patches on stone, of one class or of both.
        cue_radius: Of the disc, in pixels; the other levels have none.

    Attributes:
        far_pairs: The pairs of classes that look the same.
    """

    classes = _TABLE["classes"]
    palette = _TABLE["palette"]
    far_pairs = (("bus", "tram"), ("kiosk", "booth"))
    splits = ("train", "val", "test")

    lengths: Mapping[str, int]
    size: Sequence[int]
    seed: int = 0
    level: Level = "wide"
    cue_radius: float = 4

    def __post_init__(self) -> None:
        if self.split not in self.splits:
            raise InputError(f"Scenes: split={self.split!r} is not one of {', '.join(self.splits)}")
        if self.lengths.get(self.split, 0) < 1:
            what = f"must give split {self.split!r} 1 picture or more"
            raise InputError(f"Scenes: lengths={dict(self.lengths)} {what}")
        height, width = self.size if len(self.size) == 2 else (0, 0)
        if not MIN_HEIGHT <= height <= width or height * width > MAX_PIXELS:
            raise InputError(
                f"Scenes: size={list(self.size)} must be [height, width], {MIN_HEIGHT} or more "
                f"high, at least as wide as high, and {MAX_PIXELS} pixels or fewer"
            )
        check_choices(self)
        largest = min(0.2 * height, 0.07 * width)  # that fits into the narrowest landmark
        if not 1 <= self.cue_radius <= largest:
            where = f"1..{largest:g} for pictures of {height} x {width} (height x width)"
            raise InputError(f"Scenes: cue_radius={self.cue_radius} must be in {where}")

    def __len__(self) -> int:
        return self.lengths[self.split]

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        """Draw RGB uint8 (H, W, 3) and classes uint8 (H, W); the name is such as val_000012."""
        if not 0 <= index < len(self):
            raise IndexError(f"Scenes: index={index} is not in 0..{len(self) - 1}")
        # A str is hashed by SHA-512, not hash().
        rng = Random(f"{self.seed}/{self.split}/{index}")
        drawn = draw_scene(rng, size=self.size, level=self.level, cue_radius=self.cue_radius)
        return *drawn, f"{self.split}_{index:06d}"

    def cue(self, index: int) -> dict[str, np.ndarray]:
        """Return the visible pixels of the cue of each far pair: "bus/tram" -> (H, W) bool."""
        mask, cues = self.read(index)[1], (LANDMARK, SQUARE)
        pairs = zip(self.far_pairs, cues, strict=True)
        return {"/".join(pair): np.isin(mask, cue) for pair, cue in pairs}
