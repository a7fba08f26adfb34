"""What lies in a run's output folder, and what of it is ours: nothing else is ever replaced or removed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import WanError
from ..files.atomic import free_name
from ..media.video import made_here

STATE, LOG, PLOT = "state.pt", "log.csv", "loss.png"
SAMPLES = "sample_[0-9]*.png"
_COLUMNS = b"step,loss,learning_rate,gradient,seconds"
_PARTS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "weights": dict,
    "optimiser": dict,
    "average": (dict, type(None)),
    "describes": dict,
}


def read_state(file: Path, *, mmap: bool = False) -> dict:
    """A saved state.

    Args:
        mmap: read the tensors when they are used, for a quick look.

    Raises:
        WanError: damaged, or something else than the state of a run.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch.load fails in every way that there is on damaged files
        raise WanError(
            f"{file} is damaged, or no state of a run ({type(error).__name__}). It is left as it is. To "
            "begin anew, move it away or choose another output folder; a copy of an earlier state in its "
            "place goes on from there."
        ) from error
    if not (isinstance(saved, dict) and all(isinstance(saved.get(key, ...), kind) for key, kind in _PARTS.items())):
        raise WanError(
            f"{file} is no state of a run: expected {', '.join(_PARTS)} in it. Move it away, or choose "
            "another output folder."
        )
    return saved


def check_folder(folder: Path, *results: str, samples: bool = False) -> None:
    """Refuse a folder in which a run would replace what is not ours.

    A file is ours by what is in it: a state's parts, a log's columns, the trainer's entries in a safetensors header,
    the mark in a picture; plots and logs also beside a state, which earlier versions left without a mark.

    Args:
        results: names of the files that the run will write at its end.
        samples: whether it draws sample grids.

    Raises:
        WanError: names the files.
    """
    state = folder / STATE
    if running := state.exists():
        read_state(state, mmap=True)
    foreign = [folder / name for name in results if _there(folder / name) and not is_result(folder / name)]
    if not running:
        pictures = [folder / PLOT, *(sorted(folder.glob(SAMPLES)) if samples else ())]
        foreign += [file for file in pictures if _there(file) and not made_here(file)]
        foreign += [file for file in (folder / LOG,) if _there(file) and not _is_log(file)]
    if foreign:
        raise WanError(
            f"The output folder holds {', '.join(file.name for file in foreign)}, not written by a training "
            f"here, which this run would replace: choose another folder than {folder}, or move that away."
        )


def set_aside(file: Path) -> Path | None:
    """Give an earlier run's result a number, so that a new run does not replace it; the new name, if there was one."""
    if not file.exists():
        return None
    kept = free_name(file)
    os.rename(file, kept)
    return kept


def forget(folder: Path) -> None:
    """The next run in this folder begins anew.

    Raises:
        WanError: see ``check_folder``; then nothing is removed.
    """
    check_folder(folder)
    for name in (STATE, LOG, PLOT):
        (folder / name).unlink(missing_ok=True)


def is_result(file: Path) -> bool:
    """Whether a safetensors file was written by a training of ours."""
    return "wan_task" in _metadata(file)


def _metadata(file: Path) -> Mapping[str, str]:
    try:
        with safe_open(file, framework="pt") as content:
            return content.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _is_log(file: Path) -> bool:
    """A log, or the beginning of one that a kill left."""
    try:
        with file.open("rb") as content:
            begin = content.read(len(_COLUMNS))
    except OSError:
        return False
    return _COLUMNS.startswith(begin)


def _there(file: Path) -> bool:
    return os.path.lexists(file)
