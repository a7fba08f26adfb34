"""Files for the two experts: which noise level a LoRA is for, and where its twin lies.

Other files of a folder are looked at in passing: whatever is wrong with one of them, it is no twin, and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config import VARIANTS
from ..files.checkpoint import open_checkpoint
from .dialects import expert_of

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
    """ "high" or "low" as a file's name, its folder's, or its training's metadata say."""
    for name in (path.stem, path.parent.name):
        words = [word.lower() for word in _LEVEL.findall(name)]
        if whole := [word for word in words if word not in _SHORT]:
            return whole[-1]
    return _trained_level(path) or _level_of_keys(path) or _short_level(path)


def find_twin(path: Path) -> Path | None:
    """The file for the other expert: by name, by what this project's trainer wrote into both, or of another epoch."""
    try:
        return _twin_by_name(path) or _twin_by_metadata(path) or _twin_of_another_epoch(path)
    except OSError:  # a folder that cannot be read
        return None


def has_other_epoch(path: Path, twin: Path) -> bool:
    """Whether two files' names differ in more than the noise level: they are of different points of a training."""
    same = (_swapped(path.stem), _last_swapped(path.stem), path.stem)
    return _twin_by_metadata(path) != twin and twin.stem.lower() not in {name.lower() for name in same}


def _twin_by_name(path: Path) -> Path | None:
    for folder in _folders(path):
        for name in dict.fromkeys((_swapped(path.stem), _last_swapped(path.stem), path.stem)):
            twin = _existing(folder, name + path.suffix)
            if twin and twin != path and (folder, name) != (path.parent, path.stem):
                return twin
    return None


def _folders(path: Path) -> list[Path]:
    return list(dict.fromkeys((path.parent, path.parent.parent / _swapped(path.parent.name))))


# What trainers number: -000010, _e10, epoch_10, step00001000, and a number that ends the name. Not 14B, v2 or 4steps.
_EPOCH = re.compile(
    r"[-_. ]*(?<![A-Za-z])(?:epochs?|ep|e|steps?|iters?|checkpoint|ckpt|s)[-_. ]?(\d{1,12})(?![A-Za-z\d])"
    r"|[-_. ](\d{5,12})(?![A-Za-z\d])"
    r"|[-_. ](\d{1,4})$",
    re.IGNORECASE,
)


def _twin_of_another_epoch(path: Path) -> Path | None:
    """The nearest point of the other expert's training; a name without a number is its end."""
    swapped = {_swapped(path.stem), _last_swapped(path.stem)} - {path.stem}
    epoch = _epoch_of(path)
    found = [
        (abs(_epoch_of(file) - epoch), -_epoch_of(file), file)
        for folder in _folders(path)
        for wanted in [{_without_epoch(name) for name in (swapped if folder == path.parent else swapped | {path.stem})}]
        for file in _files(folder)
        if file != path and file.suffix.lower() == path.suffix.lower() and _without_epoch(file.stem) in wanted
    ]
    return next((file for _, _, file in sorted(found) if _said(file).readable), None)


def _without_epoch(name: str) -> str:
    return _EPOCH.sub("", name).lower()


def _epoch_of(path: Path) -> int:
    found = [int(next(filter(None, numbers))) for numbers in _EPOCH.findall(path.stem)]
    return found[-1] if found else _END


_END = 10**12


def _files(folder: Path) -> list[Path]:
    """The plain files of a folder: no pipes, which would never answer, and nothing that cannot be looked at."""
    found = []
    try:
        for file in sorted(folder.iterdir()):
            if _is_file(file):
                found.append(file)
    except OSError:
        pass
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or in a folder that is closed to us
        return False


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
    if _is_file(folder / name):
        return folder / name
    return next((file for file in _files(folder) if file.name.lower() == name.lower()), None)


def _short_level(path: Path) -> str | None:
    """ "h" or "l" mean something only beside a twin."""
    words = _LEVEL.findall(path.stem) or _LEVEL.findall(path.parent.name)
    if words and _twin_by_name(path):
        return "high" if words[-1].lower().startswith("h") else "low"
    return None


def _level_of_keys(path: Path) -> str | None:
    """Of a file all of whose keys name the second expert, as diffusers and DiffSynth do: the first's name is any's."""
    return _said(path).level


def _trained_level(path: Path) -> str | None:
    said = _said(path)
    boundary = VARIANTS[said.task].boundary if said.task in VARIANTS else None
    if boundary is None:
        return None
    if said.first >= boundary - 0.1 and said.last > boundary:
        return "high"
    return "low" if said.last <= boundary + 0.1 and said.first < boundary else None


def _twin_by_metadata(path: Path) -> Path | None:
    level = _trained_level(path)
    if level is None:
        return None
    task = _said(path).task
    found = [
        file
        for file in _files(path.parent)
        if file != path
        and file.suffix.lower() == ".safetensors"
        and _said(file).task == task
        and _trained_level(file) == _OTHER[level]
    ]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Said:
    """What a file says of itself: the task and the noise levels that this project's trainer writes down, and the
    expert that its keys name.
    """

    task: str | None = None
    first: float = 0.0
    last: float = 1.0
    level: str | None = None
    readable: bool = False


def _said(path: Path) -> _Said:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return _Said()
    return _read(path, found.st_size, found.st_mtime_ns) if _is_file(path) or path.is_dir() else _Said()


@lru_cache(maxsize=4096)
def _read(path: Path, size: int, changed: int) -> _Said:
    """Kept, because a twin is looked for whenever a graph is queued, among all files of a folder."""
    try:
        checkpoint = open_checkpoint(path)
        level = "low" if {expert_of(key) for key in checkpoint.tensors} == {"low"} else None
        said, numbers = checkpoint.metadata, (0.0, 1.0)
        task = said.get("wan_task") if {"noise_from", "noise_to"} <= said.keys() else None
        if task is not None:
            numbers = float(said["noise_from"]), float(said["noise_to"])
        return _Said(task if isinstance(task, str) else None, *numbers, level, True)
    except Exception:  # somebody's file in passing: damaged in any way, it is nobody's twin
        return _Said()
