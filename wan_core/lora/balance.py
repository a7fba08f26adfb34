"""Whether both experts of a pair have their few-step LoRA: with one alone, a run of few steps ends in noise or mush."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..external import ExternalModel

if TYPE_CHECKING:
    from ..recipe import ModelRecipe
    from .use import LoraUse

# How files that need few steps are called: by the method, the maker's name for it, or the number of steps.
_FEW_STEPS = re.compile(
    r"light(?:x2v|ning|2v)|lightx|distil|cfg_?step|(?<!\d)\d{1,2}[-_ ]?steps?(?![a-z]|[-_ ]?\d)"
    r"|caus_?vid|acc_?vid|fusion_?x|turbo"
    r"|(?<![a-z])(?:dmd\d?|lcm|r?cm|hyper|pcm|tdm)(?![a-z])|fast_?wan|self[-_ ]?forcing|rapid",
    re.IGNORECASE,
)


def unbalanced(recipe: ModelRecipe) -> str | None:
    """Which expert of a pair lacks a LoRA that the other one has, in a sentence; None where both or neither have one.

    Where the names tell few-step LoRAs from others, those count; else any does. A model that is few-step itself, by
    its name, needs none; what LoRAs ComfyUI has put on a network that it holds is not known.
    """
    if recipe.low is None or any(isinstance(file, ExternalModel) for file in recipe.files):
        return None
    high, low = recipe.loras_of(recipe.high), recipe.loras_of(recipe.low)
    for name, model, mine, other_name, others in (
        ("high-noise", recipe.high, high, "low-noise", low),
        ("low-noise", recipe.low, low, "high-noise", high),
    ):
        if is_few_step(model.path) or not (lacking := _lacking(mine, others)):
            continue
        has = " and ".join(use.file.path.name for use in lacking)
        found = f"only {' and '.join(use.file.path.name for use in mine)}" if mine else "none"
        return f"The {other_name} expert has the LoRA {has}, the {name} expert ({model.path.name}) has {found}."
    return None


def is_few_step(path: Path) -> bool:
    """Whether a file's name says that it makes a model need few steps."""
    return _FEW_STEPS.search(path.name) is not None


def _lacking(mine: Sequence[LoraUse], others: Sequence[LoraUse]) -> list[LoraUse]:
    """The other expert's LoRAs of which this one has no like."""
    few = [use for use in others if is_few_step(use.file.path)]
    if few:
        named = [use for use in mine if is_few_step(use.file.path)]
        return [] if named else few
    return list(others) if not mine else []
