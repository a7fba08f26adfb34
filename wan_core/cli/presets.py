"""``--preset``: several of the sampling flags at once; each that is given beside it wins, which is said."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..config import VARIANTS
from ..lookup import look_up

if TYPE_CHECKING:
    from ..pipeline import Request
    from ..sampling.presets import Preset

_FLAGS = {
    "solver": "sample_solver",
    "schedule": "sample_schedule",
    "steps": "sample_steps",
    "shift": "sample_shift",
    "guidance": "sample_guide_scale",
}


def chosen_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Solver, schedule, steps, shift and guidance: each as it was given, else the preset's, else None.

    Raises:
        WanError: an unknown preset.
    """
    preset = _preset(args)
    return {
        name: getattr(preset, name, None) if getattr(args, flag) is None else getattr(args, flag)
        for name, flag in _FLAGS.items()
    }


def preset_notes(args: argparse.Namespace, request: Request) -> list[str]:
    """What the preset set, what was given instead, and whether the model is another than it was made for."""
    preset = _preset(args)
    if preset is None:
        return []
    notes = [f"Preset {args.preset}: {preset.described()}."]
    given = [
        f"--{flag} (preset: {_shown(getattr(preset, name))})"
        for name, flag in _FLAGS.items()
        if getattr(args, flag) is not None and getattr(args, flag) != getattr(preset, name)
    ]
    if given:
        notes.append(f"Not as in the preset, because given: {', '.join(given)}.")
    if stranger := preset.stranger(VARIANTS[args.task]):
        notes.append(f"Preset {args.preset}: {stranger}")
    return notes


def _preset(args: argparse.Namespace) -> Preset | None:
    from ..sampling.presets import PRESETS

    return None if args.preset is None else look_up(PRESETS, args.preset, "preset")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value.low:g},{value.high:g}" if hasattr(value, "low") else str(value)
