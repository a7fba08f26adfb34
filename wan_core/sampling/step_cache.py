"""Steps at which the model is not asked: what it would say is extrapolated from what it said.

What is remembered is the transformation of a sample, ``delta = v - x``, at the last two steps that were computed. It is
carried on in a straight line over sigma. The first steps of each expert, its first one above all, and the last step
of a run are always computed. Nothing is carried from one expert to the other.

Policies decide which steps are left out; each is one function of ``POLICIES``:
    easy: the sample's own change tells how much the answer will have changed (EasyCache, arXiv 2507.02860).
    magnitude: curves of how the model's residual grows (MagCache, arXiv 2506.09045), over sigma.
    teacache: how far the embedding of the timestep has moved, by a polynomial of the model (see ``teacache.py``).
    every: one step in n is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from ..errors import Hint, WanError
from ..lookup import look_up
from .magnitudes import Curve
from .presets import FEW_STEPS
from .schedules import Schedule
from .solvers import RENOISES
from .teacache import Embed, Polynomial, growths

FEWEST_STEPS = FEW_STEPS  # below these there is nothing that could be left out
_ONCE_A_STEP = ("unipc", "dpm++", "euler")  # solvers that ask the model once a step


@dataclass(frozen=True)
class StepCache:
    """Which steps to leave out.

    Attributes:
        policy: a key of ``POLICIES``.
        amount: easy, magnitude and teacache: how much change may add up before a step is computed (0.05 to 0.2, 0.02 to
            0.12, 0.05 to 0.3); every: how many steps make a group of which one is computed.
        dense: the part of each expert's steps, from its first, that is always computed, 0 to 1.
        most: steps in a row that may be left out.
        curves: for magnitude, of each expert by its name.
        tea, embed: for teacache, the model's polynomial, and how the model embeds timesteps.
        source: where curves or polynomial are from, for the user.
    """

    policy: str
    amount: float
    dense: float = 0.2
    most: int = 2
    curves: Mapping[str, Curve] = field(default_factory=dict)
    tea: Polynomial | None = None
    embed: Embed | None = None
    source: str = ""

    def __post_init__(self) -> None:
        rule = look_up(POLICIES, self.policy, "step cache")
        if not (math.isfinite(self.amount) and rule.least <= self.amount <= rule.greatest):
            raise WanError(
                f"The step cache {self.policy} is set to {self.amount}: expected {rule.least:g} to {rule.greatest:g}."
            )
        if not 0 <= self.dense <= 1 or self.most < 1:
            raise WanError(
                f"The step cache computes {self.dense} of the first steps and leaves out {self.most} in a row at most: "
                "expected 0 to 1, and 1 or more."
            )

    def check(self, schedule: Schedule, solver: str, experts: Sequence[str]) -> None:
        """
        Args:
            experts: who works at each step.

        Raises:
            WanError: too few steps, a solver that asks more than once a step, or a policy without what it needs.
        """
        if schedule.steps < FEWEST_STEPS:
            raise WanError(
                f"A step cache leaves out steps, but there are only {schedule.steps}: use it from {FEWEST_STEPS} steps "
                "on, or leave it away."
            )
        if solver in RENOISES:
            raise WanError(
                f"The solver {solver} noises the sample anew at each step, so no answer can be carried on: a step "
                f"cache works with {', '.join(_ONCE_A_STEP)}."
            )
        if solver not in _ONCE_A_STEP:
            raise WanError(
                f"The solver {solver} asks the model more than once a step: a step cache works with "
                f"{', '.join(_ONCE_A_STEP)}."
            )
        missing = set(experts) - set(self.curves) if self.policy == "magnitude" else set()
        if missing:
            raise WanError(
                "No curve of magnitudes is known for this model: use the step cache easy, which needs none.",
                Hint.CALIBRATE,
            )
        if self.policy == "teacache":
            self._check_teacache(experts)

    def _check_teacache(self, experts: Sequence[str]) -> None:
        if set(experts) != {"only"}:
            raise WanError(
                "No polynomial of TeaCache is published for models with two experts: use the step cache magnitude, "
                "which has curves for them, or easy."
            )
        if self.tea is None:
            raise WanError(
                "No polynomial of TeaCache is published for this model: use the step cache magnitude or easy."
            )
        if self.embed is None:
            raise WanError(
                "TeaCache reads how a model embeds timesteps from its file, but another program holds this model: use "
                "the step cache easy."
            )

    def growths(self, schedule: Schedule) -> list[float]:
        """For teacache, how far the answer is expected to move at each step; else nothing."""
        if self.policy != "teacache":
            return [0.0] * schedule.steps
        assert self.tea and self.embed  # see ``check``
        return growths(self.tea, self.embed(schedule.timesteps))

    def always(self, experts: Sequence[str], start: int, end: int) -> frozenset[int]:
        """The steps from ``start`` to before ``end`` that are computed whatever the policy says."""
        found, place = {end - 1}, 0
        for _, run in groupby(experts):
            count = len(list(run))
            found |= set(range(place, place + max(2, math.ceil(self.dense * count))))
            place += count
        return frozenset(found | {start})

    def planned(
        self, schedule: Schedule, experts: Sequence[str], start: int, end: int, turns: Collection[int] = ()
    ) -> frozenset[int] | None:
        """The steps that will be computed; None where that is decided as the run goes.

        Args:
            turns: steps at which nothing is remembered, beside the first of an expert (``Guidance.turns``).
        """
        if not POLICIES[self.policy].known_before:
            return None
        steps, nothing = CachedSteps(self, schedule, experts, start, end), torch.zeros(1)
        found = []
        for i in range(start, end):
            if i > start and (experts[i] != experts[i - 1] or i in turns):
                steps.memory = Memory()
            steps.answer(i, nothing, lambda: nothing)
            if not steps.memory.skipped:
                found.append(i)
        return frozenset(found)

    def predicted(
        self, schedule: Schedule, experts: Sequence[str], start: int, end: int, turns: Collection[int] = ()
    ) -> int | None:
        """How many steps ``planned`` has."""
        planned = self.planned(schedule, experts, start, end, turns)
        return None if planned is None else len(planned)

    def forecast(
        self, schedule: Schedule, experts: Sequence[str], start: int, end: int, turns: Collection[int] = ()
    ) -> str:
        """What it will bring, for the user, before a run of these steps."""
        name = f"Step cache {self.policy}, {self.source}" if self.source else f"Step cache {self.policy}"
        computed, steps = self.predicted(schedule, experts, start, end, turns), end - start
        if computed is None:
            least = len(self.always(experts, start, end))
            return f"{name}: decided as the run goes; at least {least} of {steps} steps are computed."
        return f"{name}: {computed} of {steps} steps will be computed, {steps / computed:.2f} times as fast."


@dataclass(frozen=True)
class Step:
    """A call of the model that may be left out: the noise level, who would answer, the sample, and, for teacache, how
    far the answer is expected to have moved since the step before.
    """

    sigma: float
    expert: str
    x: Tensor
    growth: float = 0.0


@dataclass(frozen=True)
class Memory:
    """What is known of an expert's steps so far; a value, saved and resumed with the run.

    Attributes:
        sigmas, deltas: of the last computed steps, two at most, newest last.
        x: the sample of the step before, computed or not.
        at, v: sample and answer of the last computed step.
        rate: how much the answer changes with the sample, after two computed steps.
        change: what has added up since the last computed step.
        ratio: for curves, the product of what the steps since then should have grown by.
        sigma: of the step before.
        skipped: steps left out since the last computed one.
    """

    sigmas: tuple[float, ...] = ()
    deltas: tuple[Tensor, ...] = ()
    x: Tensor | None = None
    at: Tensor | None = None
    v: Tensor | None = None
    rate: float | None = None
    change: float = 0.0
    ratio: float = 1.0
    sigma: float | None = None
    skipped: int = 0

    def extrapolated(self, step: Step) -> Tensor:
        """The answer at a step, from those before."""
        newest = self.deltas[-1]
        if len(self.deltas) == 1 or self.sigmas[0] == self.sigmas[1]:
            return step.x + newest
        along = (step.sigma - self.sigmas[1]) / (self.sigmas[1] - self.sigmas[0])
        return step.x + newest + along * (newest - self.deltas[0])

    def computed(self, step: Step, v: Tensor) -> Memory:
        """After a step at which the model was asked."""
        rate = self.rate
        if self.at is not None and self.v is not None:
            moved = _size(step.x - self.at)
            rate = _size(v - self.v) / moved if moved else None
        return Memory(
            (*self.sigmas[-1:], step.sigma), (*self.deltas[-1:], v - step.x), step.x, step.x, v, rate, sigma=step.sigma
        )

    def passed(self, step: Step) -> Memory:
        """After a step that was left out."""
        return replace(self, x=step.x, sigma=step.sigma, skipped=self.skipped + 1)

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, ready for a safetensors file."""
        numbers = [self.change, self.ratio, self.skipped, _or_nan(self.rate), _or_nan(self.sigma)]
        saved = {"sigmas": torch.tensor(self.sigmas, dtype=torch.float64)}
        saved["numbers"] = torch.tensor(numbers, dtype=torch.float64)
        saved |= {f"delta.{i}": delta for i, delta in enumerate(self.deltas)}
        samples = {"at": self.at, "v": self.v, "x": None if self.x is self.at else self.x}
        return saved | {name: value for name, value in samples.items() if value is not None}

    @classmethod
    def from_tensors(cls, saved: Mapping[str, Tensor], device: torch.device) -> Memory:
        """What ``to_tensors`` made, on a device; an empty memory of an empty mapping."""
        if "numbers" not in saved:
            return cls()
        sigmas = tuple(saved["sigmas"].tolist())
        change, ratio, skipped, rate, sigma = saved["numbers"].tolist()
        at, v, x = (saved[name].to(device) if name in saved else None for name in ("at", "v", "x"))
        x = at if x is None else x  # the step before was computed
        deltas = tuple(saved[f"delta.{i}"].to(device) for i in range(len(sigmas)))
        return cls(sigmas, deltas, x, at, v, _or_none(rate), change, ratio, _or_none(sigma), int(skipped))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _size(x: Tensor) -> float:
    """Mean of the absolute values."""
    return x.abs().mean().item()


def _easy(cache: StepCache, memory: Memory, step: Step) -> tuple[bool, Memory]:
    """The answer is expected to change in proportion to the sample, as it last did."""
    if memory.rate is None or memory.x is None or memory.v is None:
        return False, memory
    expected = memory.rate * _size(step.x - memory.x) / max(_size(memory.v), 1e-12)
    memory = replace(memory, change=memory.change + expected)
    return memory.change < cache.amount, memory


def _magnitude(cache: StepCache, memory: Memory, step: Step) -> tuple[bool, Memory]:
    """The error of reusing an old residual grows with the distance of the product of its ratios from 1."""
    assert memory.sigma is not None  # some step was computed
    ratio = memory.ratio * cache.curves[step.expert].growth(memory.sigma, step.sigma)
    memory = replace(memory, ratio=ratio, change=memory.change + abs(1 - ratio))
    return memory.change < cache.amount, memory


def _teacache(cache: StepCache, memory: Memory, step: Step) -> tuple[bool, Memory]:
    """What the steps since the last computed one are expected to have changed, added up."""
    memory = replace(memory, change=memory.change + step.growth)
    return memory.change < cache.amount, memory


def _every(cache: StepCache, memory: Memory, step: Step) -> tuple[bool, Memory]:
    return memory.skipped + 1 < cache.amount, memory


@dataclass(frozen=True)
class Policy:
    """
    Attributes:
        decide: whether a step is left out, and the memory with what has added up.
        known_before: whether the samples have no say in it.
    """

    decide: Callable[[StepCache, Memory, Step], tuple[bool, Memory]]
    usual: float
    least: float
    greatest: float
    known_before: bool


POLICIES: dict[str, Policy] = {
    "easy": Policy(_easy, 0.1, 0.001, 1.0, False),
    "magnitude": Policy(_magnitude, 0.06, 0.001, 1.0, True),
    "teacache": Policy(_teacache, 0.1, 0.001, 1.0, True),
    "every": Policy(_every, 2, 2, 4, True),
}


class CachedSteps:
    """A run's step cache at work: asked in place of the model."""

    def __init__(self, cache: StepCache, schedule: Schedule, experts: Sequence[str], start: int, end: int):
        self.cache, self.schedule, self.experts = cache, schedule, experts
        self.memory = Memory()
        self.steps = {True: 0, False: 0}  # computed, left out
        self._always = cache.always(experts, start, end)
        self._growths = cache.growths(schedule)

    def answer(self, i: int, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The velocity at a step, computed or extrapolated."""
        step = Step(self.schedule.sigmas[i].item(), self.experts[i], x, self._growths[i])
        skips = False
        if self.memory.deltas:
            skips, self.memory = POLICIES[self.cache.policy].decide(self.cache, self.memory, step)
        skips = skips and i not in self._always and self.memory.skipped < self.cache.most
        self.steps[not skips] += 1
        if skips:
            v = self.memory.extrapolated(step)
            self.memory = self.memory.passed(step)
            return v
        v = compute()
        self.memory = self.memory.computed(step, v)
        return v

    def report(self) -> str:
        """What it came to, for the user."""
        computed, left_out = self.steps[True], self.steps[False]
        return (
            f"Step cache {self.cache.policy}: {computed} of {computed + left_out} steps were computed, the others "
            f"extrapolated: {(computed + left_out) / max(computed, 1):.2f} times as fast."
        )
