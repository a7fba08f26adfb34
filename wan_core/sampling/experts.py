"""Which of the two experts works at a step, and with how much guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..config import TRAIN_STEPS
from ..errors import WanError
from ..lookup import look_up
from .schedules import Schedule

Model = Callable[..., Tensor]  # (x [B,C,T,h,w], t [B] or [B,T], condition, *, on_block) -> velocity [B,C,T,h,w]


@dataclass(frozen=True)
class Expert:
    """A model, its guidance scale, and "high", "low", or "only" for a dense model."""

    model: Model
    guidance: float
    name: str

    def begin(self, step: int, steps: int | None = None) -> None:
        """The model is about to be called for a step of the schedule, which has so many; it is told if it wants to
        know."""
        if hasattr(self.model, "begin"):
            self.model.begin(step, steps)

    def first_not_finite(self, ask: Callable[[], object]) -> str | None:
        """The first part of the model whose answer is not finite when it is asked again; None if it cannot tell."""
        return self.model.first_not_finite(ask) if hasattr(self.model, "first_not_finite") else None

    def be_exact(self) -> str | None:
        """Have the model compute without what it rounds for the sake of speed; its name, None if there is nothing."""
        return self.model.be_exact() if hasattr(self.model, "be_exact") else None


@dataclass(frozen=True)
class Switch:
    """When the low-noise expert takes over.

    Modes:
        auto: at the variant's own boundary.
        timestep: below ``value``, a fraction of the 1000 timesteps.
        step: from step ``value`` on, counted from 0.
        snr: from a signal-to-noise ratio ((1 - sigma) / sigma)^2 of ``value`` on.
    """

    mode: str = "auto"
    value: float | None = None

    def __post_init__(self) -> None:
        needs_value, fits, expected = look_up(_MODES, self.mode, "expert switch")
        if needs_value and (self.value is None or not fits(self.value)):
            raise WanError(f"The expert switch by {self.mode} is set to {self.value}: expected {expected}.")


_MODES: dict[str, tuple[bool, Callable[[float], bool], str]] = {
    "auto": (False, lambda value: True, "nothing"),
    "timestep": (True, lambda value: 0 <= value <= 1, "a fraction of the timesteps, 0 to 1"),
    "step": (True, lambda value: value >= 0 and value == int(value), "a step number, 0 or more"),
    "snr": (True, lambda value: value >= 0, "a ratio, 0 or more"),
}
MODES = tuple(_MODES)


@dataclass(frozen=True)
class Experts:
    """A high-noise and a low-noise expert; a dense model is both.

    Args:
        boundary: fraction of the timesteps at and above which the high-noise expert works when the switch is "auto";
            None for a dense model.
    """

    high: Expert
    low: Expert
    boundary: float | None
    switch: Switch = Switch()

    def __post_init__(self) -> None:
        if self.switch.mode == "auto" and self.boundary is None and self.high is not self.low:
            raise WanError(
                "This model has two experts and no boundary of its own: set the expert switch by timestep, step or SNR."
            )

    @classmethod
    def dense(cls, model: Model, guidance: float) -> Experts:
        only = Expert(model, guidance, "only")
        return cls(only, only, None)

    def at(self, i: int, schedule: Schedule) -> Expert:
        """The expert of step i, for both halves of the guidance."""
        if self.high is self.low:
            return self.high
        return self.high if self._is_high(i, schedule) else self.low

    def end(self) -> None:
        """The run is over: models that want to know are told, once each."""
        for expert in {id(one): one for one in (self.high, self.low)}.values():
            if hasattr(expert.model, "end"):
                expert.model.end()

    def announce(self, i: int, schedule: Schedule) -> None:
        """Before step i: another expert that follows it is told that its turn is near, if it wants to know."""
        if i + 1 == schedule.steps or (coming := self.at(i + 1, schedule)) is self.at(i, schedule):
            return
        if hasattr(coming.model, "prepare"):
            coming.model.prepare()

    def names(self, schedule: Schedule) -> list[str]:
        """Who works at each step: tells before the run which experts will be needed."""
        return [self.at(i, schedule).name for i in range(schedule.steps)]

    def _is_high(self, i: int, schedule: Schedule) -> bool:
        mode = self.switch.mode
        value = self.boundary if mode == "auto" else self.switch.value
        assert value is not None  # see __post_init__
        if mode == "step":
            return i < value
        if mode == "snr":
            sigma = schedule.sigmas[i].item()
            return ((1 - sigma) / sigma) ** 2 < value
        # The official rule compares the timestep that the model is told, not the solver's sigma.
        return schedule.timesteps[i].item() >= value * TRAIN_STEPS
