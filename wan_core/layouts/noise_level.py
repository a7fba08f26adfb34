"""Which of two experts a name means: the one place that reads "high" and "low" out of file names.

High- and low-noise files have the same shapes, so that nothing but a name or the metadata tells them apart.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

Level = Literal["high", "low"]

_LEVELS: tuple[Level, Level] = ("high", "low")
# Words end where letters end or their case changes: i2vLOW_v2, HIGHv2 and HighNoise hold a word each, and slow, flow,
# yellow, highres and lowres none.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_TASK = re.compile(r"(?i)(?<![a-z])(?:ti2v|[tis]2v|a14b|14b)(?=high|low)")
_VERSION = re.compile(r"(?i)(high|low)(?=v\d)")
_DIFFUSERS: dict[str, Level] = {"transformer": "high", "transformer_2": "low"}


def noise_level_of(path: Path) -> Level | None:
    """The noise level that a file's name tells, or else its folder's; None where they tell none, or both.

    ``Wan2.2-T2V/high_noise_model/x.safetensors`` and diffusers' ``transformer_2`` are told by their folders.
    """
    for name in (path.stem if path.suffix else path.name, path.parent.name):
        if level := level_in(name):
            return level
    for name in (path.name, path.parent.name):
        if name in _DIFFUSERS:
            return _DIFFUSERS[name]
    return None


def level_in(name: str) -> Level | None:
    """The noise level that one name tells; a word beside "noise" counts before one that stands alone."""
    words = _words(name)
    beside = {a for a, b in zip(words, words[1:], strict=False) if a in _LEVELS and b == "noise"}
    found = beside or {word for word in words if word in _LEVELS}
    return found.pop() if len(found) == 1 else None


def _words(name: str) -> list[str]:
    words = []
    for word in _WORD.findall(_VERSION.sub(r"\1 ", _TASK.sub(" ", name))):
        word = word.lower()
        whole = next((level for level in _LEVELS if word in (f"{level}noise", f"{level}noisemodel")), None)
        words += [whole, "noise"] if whole else [word]
    return words
