"""A picture of speed against error, as SVG: no library, the same bytes for the same figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 70, 240, 30, 60  # around the plot; the legend stands at its right
COLOURS = ("#5b6470", "#1f77b4", "#d9772b", "#2a9d5c", "#b0413e", "#7d5ba6", "#a07f1f", "#3aa6a6")


@dataclass(frozen=True)
class Point:
    """One way: its name, its group, how many times as fast, and its relative error, above 0."""

    name: str
    group: str
    speed: float
    error: float


def svg(points: Sequence[Point], line: str) -> str:
    """
    Args:
        points: those without error are left out, for the axis of errors is logarithmic.
        line: the group whose points are joined: what the same time gives without tricks.
    """
    points = [point for point in points if point.error > 0]
    across, up = _axis([point.speed for point in points]), _axis([point.error for point in points])
    groups = list(dict.fromkeys([line, *(point.group for point in points)]))
    colour = dict(zip(groups, COLOURS * len(groups), strict=False))

    def at(point: Point) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * across.share(point.speed)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - up.share(point.error))

    joined = sorted((point for point in points if point.group == line), key=lambda point: point.speed)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, joined))
    parts = [*_frame(across, up), f'<polyline points="{path}" fill="none" stroke="{colour[line]}" stroke-width="1.5"/>']
    for point in points:
        x, y = at(point)
        tip = escape(f"{point.name}: {point.speed:.2f} times as fast, error {point.error:.4f}")
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour[point.group]}"><title>{tip}</title></circle>'
        )
    parts += _labels([(point, *at(point)) for point in points], colour)
    parts += _legend(groups, colour)
    style = "font: 12px sans-serif; background: #fff"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" style="{style}">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>', *parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1; logarithmic."""
        return math.log(value / self.low) / math.log(self.high / self.low)

    @property
    def ticks(self) -> list[float]:
        """1, 2 and 5 of each power of ten within."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 1.5, 2, 3, 5, 7) if self.high / self.low < 30 else (1, 2, 5)
        found = [step * 10.0**power for power in powers for step in steps]
        return [tick for tick in found if self.low <= tick <= self.high]


def _axis(values: Sequence[float]) -> _Axis:
    return _Axis(min(values) / 1.15, max(values) * 1.15)


def _frame(across: _Axis, up: _Axis) -> list[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in across.ticks:
        x = LEFT + (right - LEFT) * across.share(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#333">{tick:g}</text>')
    for tick in up.ticks:
        y = TOP + (bottom - TOP) * (1 - up.share(tick))
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e4e7eb"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#333">{tick:g}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 16}" text-anchor="middle" fill="#333">times as fast</text>')
    parts.append(
        f'<text x="16" y="{(TOP + bottom) / 2}" text-anchor="middle" fill="#333" '
        f'transform="rotate(-90 16 {(TOP + bottom) / 2})">relative error of the latent</text>'
    )
    return parts


def _labels(places: Sequence[tuple[Point, float, float]], colour: dict[str, str]) -> list[str]:
    """Beside each point, where neither a point nor another label stands; at its right where there is no such place."""
    parts: list[str] = []
    taken = [(y + 4, x - 6, x + 6) for _, x, y in places]  # a line of text, from one x to another
    for point, x, y in sorted(places, key=lambda place: (place[2], place[1])):
        width = 5.6 * len(point.name)
        sides = [x + 8] if x + 8 + width < WIDTH - RIGHT + 40 else []
        sides += [x - 8 - width] if x - 8 - width > LEFT or not sides else []
        tries = [(y + 4 + down, left) for down in (0, 11, -11, 22, -22, 33, -33) for left in sides]
        free = (one for one in tries if not any(_meet(*one, width, other) for other in taken))
        row, left = next(free, tries[0])
        taken.append((row, left, left + width))
        look = f'font-size="10" fill="{colour[point.group]}"'
        parts.append(f'<text x="{left:.1f}" y="{row:.1f}" {look}>{escape(point.name)}</text>')
    return parts


def _meet(row: float, left: float, width: float, other: tuple[float, float, float]) -> bool:
    return abs(row - other[0]) < 11 and left < other[2] and other[1] < left + width


def _legend(groups: Sequence[str], colour: dict[str, str]) -> list[str]:
    parts, x = [], WIDTH - RIGHT + 60
    for row, group in enumerate(groups):
        y = TOP + 12 + 20 * row
        parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{colour[group]}"/>')
        parts.append(f'<text x="{x + 12}" y="{y + 4}" fill="#333">{escape(group)}</text>')
    return parts
