"""How the residual of a model's blocks grows from step to step: MagCache's measurements, as curves over sigma.

A ratio belongs to a pair of noise levels, not to a step's number: as the sum of logarithms over sigma it holds for any
number of steps, for given sigmas and for the expert switch at another place. The measurement was made along one
schedule; beyond its noise levels a curve goes on flat.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .schedules import schedule

_FILE = Path(__file__).with_name("magnitudes.json")


@dataclass(frozen=True)
class Curve:
    """The logarithm of a residual's size, up to a constant, at noise levels that fall."""

    sigmas: tuple[float, ...]
    sizes: tuple[float, ...]

    def growth(self, before: float, after: float) -> float:
        """The ratio of the residuals' sizes between two noise levels."""
        return math.exp(self._size(after) - self._size(before))

    def _size(self, sigma: float) -> float:
        rising = self.sigmas[::-1]
        place = bisect_left(rising, sigma)
        if place == 0:
            return self.sizes[-1]
        if place == len(rising):
            return self.sizes[0]
        low, high = rising[place - 1], rising[place]
        share = (sigma - low) / (high - low)
        sizes = self.sizes[::-1]
        return sizes[place - 1] + share * (sizes[place] - sizes[place - 1])


@cache
def curves_of(task: str) -> Mapping[str, Curve]:
    """The curves of a model's experts by their names; none where nothing is published."""
    measured = json.loads(_FILE.read_text(encoding="utf-8")).get(task)
    if measured is None:
        return {}
    sigmas = schedule("unipc", measured["steps"], measured["shift"]).sigmas[:-1].tolist()
    switch = measured.get("switch")  # the first step of the low-noise expert
    if switch is None:
        return {"only": curve(sigmas, measured["ratios"])}
    return {
        "high": curve(sigmas[:switch], measured["ratios"][: switch - 1]),
        "low": curve(sigmas[switch:], measured["ratios"][switch:]),
    }


def curve(sigmas: list[float], ratios: list[float]) -> Curve:
    """From the ratios between each two neighbouring steps."""
    sizes = [0.0]
    for ratio in ratios:
        sizes.append(sizes[-1] + math.log(ratio))
    assert len(sizes) == len(sigmas), "a ratio for each two neighbouring steps"
    return Curve(tuple(sigmas), tuple(sizes))
