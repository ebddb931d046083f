"""Line charts as SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_COLORS = ("#1f6fb4", "#d9822b", "#2e9d63", "#b5453c", "#7b5ea7", "#7a6a58", "#c25b9b", "#5f7f86")
_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 28, 34

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


def chart(title: str, curves: Mapping[str, Curve], *, x_label: str = "step") -> str:
    """Draw named curves over one axis as an ``<svg>``; values that are not finite are left out."""
    shown = {name: [(x, y) for x, y in curve if math.isfinite(y)] for name, curve in curves.items()}
    points = [point for curve in shown.values() for point in curve]
    if not points:
        return ""
    to_x = _Scale([x for x, _ in points], _LEFT, _WIDTH - _RIGHT)
    lines = -(-len(shown) // 4) if len(shown) > 1 else 0  # of the key, four names each
    top = _TOP + 16 * lines
    to_y = _Scale([y for _, y in points], _HEIGHT - _BOTTOM, top)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" class="chart" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg" '
        'font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600">{escape(title)}</text>',
    ]
    for value in to_y.ticks():
        y = to_y(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in to_x.ticks():
        x = to_x(value)
        y = _HEIGHT - _BOTTOM + 16
        parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{value:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) // 2
    parts.append(
        f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for number, (name, curve) in enumerate(shown.items()):
        color = _COLORS[number % len(_COLORS)]
        path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in curve)
        if len(curve) > 1:
            parts.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        parts += [
            f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="2.4" fill="{color}"/>'
            for x, y in (curve if len(curve) < 20 else ())
        ]
        if len(shown) > 1:
            x, y = _LEFT + number % 4 * 112, 20 + 16 * (number // 4 + 1) - 4
            parts.append(f'<rect x="{x}" y="{y - 8}" width="9" height="9" fill="{color}"/>')
            parts.append(f'<text x="{x + 13}" y="{y}">{escape(name[-18:])}</text>')
    return "".join((*parts, "</svg>"))


class _Scale:
    """Maps values linearly to pixels, with round numbers as ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.high = min(values), max(values)
        self.only = [self.low] if self.low == self.high else []
        if self.only:
            self.low, self.high = self.low - 0.5, self.high + 0.5
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return up to six round numbers within the range, or its only value."""
        if self.only:
            return self.only
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(n * step, 12) for n in range(first, last + 1)]
