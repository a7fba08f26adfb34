"""A LoRA put to a recipe: each file on its expert, and a report of what was done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ..config import PerExpert
from ..errors import Hint, WanError
from ..external import only_own
from ..layouts.noise_level import noise_level_of
from ..loading.dit import DiTFile
from ..recipe import Loras, LoraUse, ModelRecipe, Network
from .expert_pairs import find_twin, has_other_epoch, level_of
from .files import LoraFile, read_lora

AUTO = "auto"


@dataclass(frozen=True)
class Placed:
    """The file of each expert, and why."""

    high: Path | None
    low: Path | None
    note: str
    found: Path | None = None  # the one that was not chosen but found


def place(file: Path, low: Path | str | None) -> Placed:
    """Which file goes on which expert.

    Args:
        low: the low-noise expert's; None for none; "auto" finds out: a file with a twin goes on its own expert and the
            twin on the other, one that names its noise level goes there alone, any other goes on both.
    """
    if low != AUTO:
        return Placed(file, None if low is None else Path(low), "as chosen")
    level, twin = level_of(file), find_twin(file)
    if twin:
        high, low = (twin, file) if level == "low" else (file, twin)
        other = ", of another epoch: there is none nearer" if has_other_epoch(file, twin) else ""
        return Placed(high, low, f"{twin.name} is the twin of {file.name}{other}", twin)
    if level is None:
        return Placed(file, file, "one file for both experts")
    other = "low" if level == "high" else "high"
    note = f"{file.name} is for the {level}-noise expert, and no twin for the {other}-noise expert was found beside it"
    return Placed(file, None, note) if level == "high" else Placed(None, file, note)


def with_lora(
    recipe: ModelRecipe,
    file: Path,
    strength: PerExpert,
    *,
    low: Path | str | None = AUTO,
    first_step: int = 0,
    last_step: int | None = None,
    merge: bool = False,
) -> tuple[ModelRecipe, str]:
    """The recipe with one more LoRA at the end of each expert's chain, and a report.

    Args:
        low: see ``place``; a model of its own (dense, or one expert) takes one file.
        first_step, last_step: counted from 0, both included.

    Raises:
        WanError: see ``read_lora`` and ``only_own``; or an empty range of steps.
    """
    if first_step < 0 or last_step is not None and last_step < first_step:
        raise WanError(
            f"The LoRA's steps are {first_step} to {last_step}: expected a first step of 0 or more, and a "
            "last step not before it."
        )
    only_own(recipe.files, "A LoRA", Hint.LORA_HELD)
    placed = place(file, low) if recipe.low or recipe.variant.experts == 2 else Placed(file, None, "")
    sides = _sides(recipe, placed, strength)
    uses, lines = {}, [placed.note] if placed.note else []
    for name, (model, path, value, level) in sides.items():
        alone = name == "only" and recipe.variant.experts == 2
        title = f"Model, taken for the {level}-noise expert" if alone else _TITLES[name]
        if path is None:
            lines.append(f"{title}: no LoRA")
            continue
        use = LoraUse(_read(path, model, level, placed), value, first_step, last_step)
        uses[name] = (use,) if value else ()
        lines.append(f"{title}: strength {value:g}{_steps(use)}, {use.file.report()}")
        if recipe.variant.experts == 2 and (named := level_of(path)) not in (None, level):
            lines.append(f"Warning: by its name {path.name} is for the {named}-noise expert")
    loras = Loras(
        recipe.loras.high + uses.get("high", ()) + uses.get("only", ()), recipe.loras.low + uses.get("low", ())
    )
    return replace(recipe, loras=loras, merge_loras=recipe.merge_loras or merge), "\n".join(lines)


def _read(path: Path, model: Network, level: str, placed: Placed) -> LoraFile:
    try:
        return read_lora(path, cast(DiTFile, model), level)
    except WanError as error:
        if path != placed.found:
            raise
        raise WanError(
            f"{error} It was found as the other expert's file ({placed.note}): name the low-noise expert's "
            "file yourself, or none for it, to go on without."
        ) from error


_TITLES = {"high": "High-noise expert", "low": "Low-noise expert", "only": "Model"}


def _sides(
    recipe: ModelRecipe, placed: Placed, strength: PerExpert
) -> dict[str, tuple[Network, Path | None, float, str]]:
    """Each expert with its file, strength and level; one expert on its own takes those of its noise level."""
    if recipe.low:
        return {
            "high": (recipe.high, placed.high, strength.high, "high"),
            "low": (recipe.low, placed.low, strength.low, "low"),
        }
    own = recipe.high.path
    if recipe.variant.experts == 2 and (noise_level_of(own) or level_of(own)) == "low":
        return {"only": (recipe.high, placed.low or placed.high, strength.low, "low")}
    return {"only": (recipe.high, placed.high or placed.low, strength.high, "high")}


def _steps(use: LoraUse) -> str:
    if not use.ranged:
        return ""
    return f", steps {use.first_step} to {'the last' if use.last_step is None else use.last_step}"
