"""Files for the two experts: which noise level a LoRA is for, and where its twin lies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from ..config import VARIANTS
from ..errors import WanError
from ..files.checkpoint import open_checkpoint

# "high" in high_noise, HighNoise, T2V-HIGH-14B, i2vHIGH, HIGHv2; not in highlight. "h", "hn" only between separators.
_LEVEL = re.compile(
    r"(?<![A-Za-z])(?:(?:high|low)(?=noise|v\d|[^A-Za-z]|$)|(?:hn|ln|h|l)(?=[^A-Za-z]|$))"
    r"|(?-i:(?<=[A-Za-z0-9])(?:High|Low)(?=[^a-z]|noise|$))"
    r"|(?-i:(?<=[a-z0-9])(?:HIGH|LOW)(?=[^A-Za-z]|$))",
    re.IGNORECASE,
)
_OTHER = {"high": "low", "low": "high", "hn": "ln", "ln": "hn", "h": "l", "l": "h"}
_SHORT = ("h", "l", "hn", "ln")


def level_of(path: Path) -> str | None:
    """"high" or "low" as a file's name, its folder's, or its training's metadata say."""
    for name in (path.stem, path.parent.name):
        words = [word.lower() for word in _LEVEL.findall(name)]
        if whole := [word for word in words if word not in _SHORT]:
            return whole[-1]
    return _trained_level(path) or _short_level(path)


def find_twin(path: Path) -> Path | None:
    """The file for the other expert, by name or by what this project's trainer wrote into both."""
    return _twin_by_name(path) or _twin_by_metadata(path)


def _twin_by_name(path: Path) -> Path | None:
    for folder in dict.fromkeys((path.parent, path.parent.parent / _swapped(path.parent.name))):
        for name in dict.fromkeys((_swapped(path.stem), _last_swapped(path.stem), path.stem)):
            twin = _existing(folder, name + path.suffix)
            if twin and twin != path and (folder, name) != (path.parent, path.stem):
                return twin
    return None


def _swapped(name: str) -> str:
    return _LEVEL.sub(_other, name)


def _last_swapped(name: str) -> str:
    """With the word that decides the level swapped alone: that of low_poly_high_noise is low_poly_low_noise."""
    found = list(_LEVEL.finditer(name))
    whole = [match for match in found if match[0].lower() not in _SHORT] or found
    return name[: whole[-1].start()] + _other(whole[-1]) + name[whole[-1].end() :] if whole else name


def _other(match: re.Match) -> str:
    return _in_case_of(match[0], _OTHER[match[0].lower()])


def _in_case_of(pattern: str, word: str) -> str:
    if pattern.isupper():
        return word.upper()
    return word.capitalize() if pattern[0].isupper() else word


def _existing(folder: Path, name: str) -> Path | None:
    """A file of this name, whatever the case of its letters."""
    if (folder / name).is_file():
        return folder / name
    files = folder.iterdir() if folder.is_dir() else ()
    return next((file for file in files if file.name.lower() == name.lower() and file.is_file()), None)


def _short_level(path: Path) -> str | None:
    """"h" or "l" mean something only beside a twin."""
    words = _LEVEL.findall(path.stem) or _LEVEL.findall(path.parent.name)
    if words and _twin_by_name(path):
        return "high" if words[-1].lower().startswith("h") else "low"
    return None


def _trained_level(path: Path) -> str | None:
    task, noise = _training(path)
    boundary = VARIANTS[task].boundary if task else None
    if boundary is None:
        return None
    if noise[0] >= boundary - 0.1 and noise[1] > boundary:
        return "high"
    return "low" if noise[1] <= boundary + 0.1 and noise[0] < boundary else None


def _twin_by_metadata(path: Path) -> Path | None:
    level = _trained_level(path)
    if level is None:
        return None
    task, _ = _training(path)
    found = [file for file in _safetensors_beside(path)
             if _training(file)[0] == task and _trained_level(file) == _OTHER[level]]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _safetensors_beside(path: Path) -> Iterator[Path]:
    return (file for file in sorted(path.parent.glob("*.safetensors")) if file != path)


def _training(path: Path) -> tuple[str | None, tuple[float, float]]:
    """The task, and the noise levels trained, that this project's trainer writes down."""
    try:
        found = path.stat()
    except OSError:
        return _NOTHING_SAID
    return _said(path, found.st_size, found.st_mtime_ns)


_NOTHING_SAID = None, (0.0, 1.0)


@lru_cache(maxsize=4096)
def _said(path: Path, size: int, changed: int) -> tuple[str | None, tuple[float, float]]:
    """Kept, because a twin is looked for whenever a graph is queued, among all files of a folder."""
    try:
        said = open_checkpoint(path).metadata
        return said["wan_task"], (float(said["noise_from"]), float(said["noise_to"]))
    except (WanError, OSError, KeyError, ValueError):
        return _NOTHING_SAID
