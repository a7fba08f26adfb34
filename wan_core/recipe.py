"""What flows out of a loader: a small frozen description of a model, never its weights.

Option nodes return a changed copy (``dataclasses.replace``); the engine turns the final recipe into weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import torch

from .config import PerExpert, Variant
from .errors import Hint, WanError
from .external import ExternalModel
from .layouts.noise_level import noise_level_of
from .layouts.variants import candidates, choose
from .loading.dit import DiTFile
from .sampling.experts import Expert, Experts, Switch
from .sampling.guidance_rules import PLAIN, Guidance
from .sampling.schedules import Schedule
from .sampling.step_cache import StepCache

if TYPE_CHECKING:
    from .lora.files import LoraFile

PREFETCH = 1  # streamed blocks on the device before their turn, unless asked otherwise

Network = DiTFile | ExternalModel
_BY_ITS_FILE = cast(Variant, None)  # always one of the table's: chosen by the file where none is given


@dataclass(frozen=True, eq=False)
class LoraUse:
    """A LoRA on one expert; steps are counted from 0, both ends included, and None is the last of any schedule."""

    file: LoraFile
    strength: float
    first_step: int = 0
    last_step: int | None = None

    @property
    def ranged(self) -> bool:
        """Whether it does not act at every step."""
        return self.first_step > 0 or self.last_step is not None

    def at(self, step: int) -> float:
        """The strength at a step."""
        within = self.first_step <= step and (self.last_step is None or step <= self.last_step)
        return self.strength if within else 0.0


@dataclass(frozen=True)
class Loras:
    """Each expert's chain, in the order in which it is applied; a dense model's is ``high``."""

    high: tuple[LoraUse, ...] = ()
    low: tuple[LoraUse, ...] = ()

    def __iter__(self) -> Iterator[LoraUse]:
        yield from self.high
        yield from self.low


@dataclass(frozen=True, eq=False)
class ModelRecipe:
    """A dense model, or a pair of experts, which official model that is, and how to run it.

    ``high`` alone is a dense model; ``low`` is another object, even where both are of one file on disk. ``dtype`` and
    ``attention`` may be "auto". ``notes`` are remarks for the user that loading made (which file was taken for which
    expert, say).

    Block swap: ``swap_blocks`` of them stream; a ``vram_limit`` in GB, or "auto" for what is free, decides their number
    instead when the size of the video is known (``plan``). ``prefetch`` blocks are on the device before their turn.

    ``merge_loras``: into the weights once, where those lie on the device unpacked; else LoRAs are added as layers run.

    ``compile``: blocks by ``torch.compile``, where they can be.

    ``step_cache``: which steps are extrapolated instead of computed; None computes all.

    ``guidance``: rules for what is done with both prompts; how much of it is the sampler's.

    A `ExternalModel` network runs where it is held: of the options none applies to it.
    """

    high: Network
    low: Network | None = None
    dtype: str = "auto"
    attention: str = "auto"
    switch: Switch = field(default_factory=Switch)
    swap_blocks: int = 0
    notes: tuple[str, ...] = ()
    vram_limit: float | str | None = None
    prefetch: int = PREFETCH
    loras: Loras = field(default_factory=Loras)
    merge_loras: bool = False
    step_cache: StepCache | None = None
    guidance: Guidance = PLAIN
    variant: Variant = _BY_ITS_FILE
    compile: bool = False

    def __post_init__(self) -> None:
        if self.variant is None:
            chosen = choose(self.high.config, self.high.path, pair=self.low is not None)
            object.__setattr__(self, "variant", chosen.variant)
            if chosen.assumed:
                object.__setattr__(self, "notes", (*self.notes, chosen.assumed))

    def loras_of(self, file: Network) -> tuple[LoraUse, ...]:
        """The LoRAs of one of the recipe's files that do something at some step."""
        chain = self.loras.low if file is self.low else self.loras.high
        return tuple(use for use in chain if use.strength)

    @property
    def keeps_text(self) -> bool:
        """Whether each block's keys and values of the prompts are kept: fast, and up to a gigabyte."""
        return self.vram_limit is None

    @property
    def files(self) -> tuple[Network, ...]:
        return (self.high,) if self.low is None else (self.high, self.low)

    @property
    def own(self) -> tuple[DiTFile, ...]:
        """The files whose weights are the engine's."""
        return tuple(file for file in self.files if not isinstance(file, ExternalModel))

    @property
    def stored(self) -> torch.dtype | None:
        """What decides the number format of an "auto" computation."""
        return self.own[0].checkpoint.dtype if self.own else cast(ExternalModel, self.high).dtype

    def __str__(self) -> str:
        return f"{self.variant.display_name} ({', '.join(file.path.name for file in self.files)})"


def working(recipe: ModelRecipe, schedule: Schedule) -> list[str]:
    """Who works at each step of a schedule: "high", "low", or "only"."""
    if recipe.low is None:
        return ["only"] * schedule.steps
    high, low = (Expert(_nobody, 1, name) for name in ("high", "low"))
    return Experts(high, low, recipe.variant.boundary, recipe.switch).names(schedule)


def check_guidance(
    recipe: ModelRecipe, schedule: Schedule, scales: PerExpert, start: int = 0, end: int | None = None
) -> list[str]:
    """``Guidance.check`` and ``check_network`` of a run: the notes for the user.

    Args:
        start, end: the steps to do, ``end`` excluded; None is the last.

    Raises:
        WanError: rules that this model or this run cannot have.
    """
    recipe.guidance.check_network(recipe.high.config.layers, own=recipe.own == recipe.files)
    last = schedule.steps if end is None else min(end, schedule.steps)
    return recipe.guidance.check(schedule, working(recipe, schedule), _by_name(scales), start, last)


def model_calls(recipe: ModelRecipe, schedule: Schedule, scales: PerExpert) -> list[int]:
    """How often the model is asked at each step; solvers that ask for two velocities a step ask twice as often."""
    return recipe.guidance.calls(schedule, working(recipe, schedule), _by_name(scales))


def told_of_guidance(
    recipe: ModelRecipe, schedule: Schedule, scales: PerExpert, start: int = 0, end: int | None = None
) -> str:
    """The rules in words, and what they change in how often the model is asked."""
    calls = sum(model_calls(recipe, schedule, scales)[start:end])
    plain = sum(model_calls(replace(recipe, guidance=PLAIN), schedule, scales)[start:end])
    steps = len(schedule.sigmas[:-1][start:end])
    asked = f"{calls} calls of the model in {steps} steps"
    return f"{recipe.guidance}: {asked}{f' instead of {plain}' if calls != plain else ''}."


def _by_name(scales: PerExpert) -> dict[str, float]:
    return {"high": scales.high, "low": scales.low, "only": scales.low}


def _nobody(*_: object) -> torch.Tensor:
    """In the place of a model that is not asked."""
    raise AssertionError


def pair(high: ModelRecipe, low: ModelRecipe, switch: Switch) -> ModelRecipe:
    """Two experts as one model, each with its own LoRAs; every other option is the high-noise side's.

    Where that one is `ExternalModel` and the other is not, the options are the low-noise side's.

    Raises:
        WanError: one of them is a pair already, their shapes differ, or their names say that they are swapped.
    """
    if high.low is not None or low.low is not None:
        raise WanError("Expected two single models, found a pair of experts already.", Hint.ONE_EACH)
    _check_same_shapes(high.high, low.high)
    variant = _of_two(high)
    guesses = {choose(side.high.config, side.high.path).assumed for side in (high, low)}  # being a pair answers them
    notes = tuple(note for note in high.notes + low.notes if note not in guesses) + _pair_notes(high.high, low.high)
    loras, merge = Loras(high.loras.high, low.loras.high), high.merge_loras or low.merge_loras
    side = high if high.own else low
    notes += _lost_of(low if side is high else high, side)
    second = replace(low.high) if low.high is high.high else low.high  # see loras_of
    return replace(
        side, high=high.high, low=second, variant=variant, switch=switch, notes=notes, loras=loras, merge_loras=merge
    )


def _lost_of(other: ModelRecipe, side: ModelRecipe) -> tuple[str, ...]:
    """What one expert was given that a pair has from the other."""
    options = {"guidance rules": "guidance", "step cache": "step_cache"}
    lost = [
        words for words, name in options.items() if getattr(other, name) and getattr(other, name) != getattr(side, name)
    ]
    if not lost:
        return ()
    return (
        f"Warning: the {' and the '.join(lost)} given to {other.high.path.name} alone are not used: a pair has those "
        f"of {side.high.path.name}. Give them to both together, once they are joined.",
    )


def _of_two(side: ModelRecipe) -> Variant:
    """The variant of a pair: two dense models of one shape are taken for experts of the pair with that shape."""
    if side.variant.experts == 2:
        return side.variant
    rows = [row for row in candidates(side.high.config) if row.experts == 2]
    if not rows:
        raise WanError(
            f"{side.high.path.name} is {side.variant.display_name}, one dense model without experts.", Hint.ALONE
        )
    return rows[0]


def _check_same_shapes(high: Network, low: Network) -> None:
    if high.config != low.config:
        differences = [
            f"{name} {value} and {getattr(low.config, name)}"
            for name, value in vars(high.config).items()
            if value != getattr(low.config, name)
        ]
        raise WanError(
            f"These two files are not experts of one model: {high.path.name} ({_kind(high)}) and "
            f"{low.path.name} ({_kind(low)}) differ in {'; '.join(differences)}. "
            "Choose the high-noise and the low-noise file of the same model."
        )


def _kind(file: Network) -> str:
    return f"{choose(file.config, file.path).variant.display_name}, {file.config.dim} wide"


def _pair_notes(first: Network, second: Network) -> tuple[str, ...]:
    high, low = first.path, second.path
    if _is_same(first, second):
        return (
            f"Warning: both experts are the same file, {high.name}: only guidance and LoRAs of their own tell them "
            "apart.",
        )
    says_high, says_low = noise_level_of(high), noise_level_of(low)
    if says_high == "low" and says_low != "low" or says_low == "high" and says_high != "high":
        raise WanError(
            f"The experts seem to be swapped: {high.name} was given as high-noise, {low.name} as low-noise. "
            "Both have the same shapes, so only the names tell them apart. Exchange the two inputs, "
            "or rename the files if their names are wrong."
        )
    if says_high == says_low and says_high is not None:
        return (f"Warning: by their names both files are {says_high}-noise experts: {high.name}, {low.name}.",)
    return (f"High-noise expert: {high.name}; low-noise expert: {low.name}.",)


def _is_same(high: Network, low: Network) -> bool:
    if isinstance(high, ExternalModel) or isinstance(low, ExternalModel):
        return high.fingerprint == low.fingerprint
    return high.path.resolve() == low.path.resolve()
