"""Recipes: the solver, schedule, steps, shift and guidance that belong together; every menu and flag reads this table.

The official ones are the variants' own. The others are those of distilled models and LoRAs, which were trained at
their noise levels and without guidance: LightX2V's 4 steps (lightx2v ``step_distill``), Self-Forcing (arXiv
2506.08009), FastWan (FastVideo), CausVid (arXiv 2412.07772), rCM (arXiv 2510.08431, which TurboDiffusion runs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config import VARIANTS, PerExpert, Variant
from ..errors import WanError
from .schedules import AUTO, FIXED, Schedule, schedule
from .solvers import RENOISES

FEW_STEPS = 10  # below these nothing can be left out, and distilled models have no use for guidance


@dataclass(frozen=True)
class Preset:
    """One recipe.

    Attributes:
        shift: None where the schedule has none.
        made_for: tasks whose models it belongs to; none: it goes by the LoRA, not by the model.
        distilled: whether the model was trained for these few steps.
    """

    steps: int
    guidance: PerExpert
    shift: float | None
    solver: str
    schedule: str
    made_for: tuple[str, ...] = ()
    distilled: bool = False

    @property
    def values(self) -> dict[str, object]:
        """By the names of the sampler's inputs; without the shift where there is none."""
        values: dict[str, object] = {
            "steps": self.steps,
            "cfg_high": self.guidance.high,
            "cfg_low": self.guidance.low,
            "shift": self.shift,
            "solver": self.solver,
            "schedule": self.schedule,
        }
        return {name: value for name, value in values.items() if value is not None}

    def timetable(self) -> Schedule:
        return schedule(self.schedule, self.steps, 1.0 if self.shift is None else self.shift, solver=self.solver)

    def described(self) -> str:
        """What it sets, in words."""
        parts = [f"solver {self.solver}", f"schedule {self.schedule}", f"{self.steps} steps"]
        if self.shift is not None:
            parts.append(f"shift {self.shift:g}")
        high, low = self.guidance.high, self.guidance.low
        parts.append(f"cfg {high:g}" if high == low else f"cfg {high:g} (high noise) and {low:g} (low noise)")
        if self.steps < FEW_STEPS:
            parts.append(f"noise levels {', '.join(f'{sigma:.4g}' for sigma in self.timetable().sigmas.tolist())}")
        return ", ".join(parts)

    def stranger(self, variant: Variant) -> str | None:
        """A sentence where the model is none of those it was made for."""
        if not self.made_for or variant.task in self.made_for:
            return None
        names = ", ".join(VARIANTS[task].display_name for task in self.made_for)
        return f"It was made for {names}; the model is {variant.display_name}."


def _official(variant: Variant, shift: float) -> Preset:
    return Preset(variant.steps, variant.guidance, shift, "unipc", AUTO, (variant.task,))


def _officials() -> dict[str, Preset]:
    found = {}
    for variant in VARIANTS.values():
        name = variant.display_name.removeprefix("Wan2.2 ")
        found[name] = _official(variant, variant.shift)
        if variant.shift_480p is not None:
            found[f"{name} 480P"] = _official(variant, variant.shift_480p)
    return found


def _distilled(steps: int, solver: str, schedule: str, shift: float | None, *made_for: str) -> Preset:
    return Preset(steps, PerExpert(1.0, 1.0), shift, solver, schedule, made_for, distilled=True)


_T2V = ("t2v-1.3B", "t2v-14B", "t2i-14B", "t2v-A14B")
_I2V = ("i2v-A14B", "i2v-14B")

# Names are saved in workflows: append, never rename.
PRESETS: dict[str, Preset] = {
    **_officials(),
    "LightX2V-4step": _distilled(4, "euler", "simple", 5.0),
    "Self-Forcing-4step": _distilled(4, "lcm", "self-forcing", 5.0),
    "FastWan-1.3B-3step": _distilled(3, "lcm", "fastwan", 8.0, "t2v-1.3B"),
    "FastWan-5B-3step": _distilled(3, "lcm", "fastwan", 5.0, "ti2v-5B"),
    "CausVid-9step": _distilled(9, "lcm", "causvid", 1.0, "t2v-1.3B", "t2v-14B"),
    "rCM-T2V-4step": _distilled(4, "lcm", "rcm-80", None, *_T2V),
    "rCM-T2V-4step-ODE": _distilled(4, "euler", "rcm-80", None, *_T2V),
    "rCM-I2V-4step": _distilled(4, "lcm", "rcm-200", None, *_I2V),
    "rCM-I2V-4step-ODE": _distilled(4, "euler", "rcm-200", None, *_I2V),
}


def replaced(preset: Preset, given: Mapping[str, object]) -> dict[str, object]:
    """Which of the given values (by the sampler's inputs) are not the preset's."""
    wanted = preset.values
    return {name: value for name, value in given.items() if name in wanted and value != wanted[name]}


def check_distilled(along: Schedule, solver: str, guidance: PerExpert, *, pair: bool) -> None:
    """
    Args:
        pair: whether there are two experts; one model alone goes by the low-noise value.

    Raises:
        WanError: guidance where the steps are those of a distilled model: it was trained to do without, and two calls a
            step would make its picture worse.
    """
    distilled = along.name in FIXED or solver in RENOISES
    used = {guidance.low, guidance.high} if pair else {guidance.low}
    if not distilled or along.steps >= FEW_STEPS or used == {1}:
        return
    shown = f"{guidance.high:g} (high noise) and {guidance.low:g} (low noise)" if pair else f"{guidance.low:g}"
    kind = f"schedule {along.name}" if along.name in FIXED else f"solver {solver}"
    raise WanError(
        f"The {kind} with {along.steps} steps is for distilled models, which were trained without guidance, but the "
        f"guidance is {shown}: set it to 1, or use {FEW_STEPS} steps or more."
    )


def uneven(experts: Sequence[str], along: Schedule) -> str | None:
    """A sentence where few steps are not shared equally between two experts, as 4-step LoRAs were trained.

    Args:
        experts: who works at each step.
    """
    high, low = experts.count("high"), experts.count("low")
    if along.steps != 4 or high + low != 4 or high == low:
        return None
    by = "" if along.shift is None else f" at shift {along.shift:g}"
    return (
        f"Of the 4 steps{by} the high-noise expert does {high} and the low-noise expert {low}: 4-step LoRAs were "
        "trained with 2 and 2, as at shift 5."
    )
