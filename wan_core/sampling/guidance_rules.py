"""Rules of guidance: what is done with two prompts beside, or in place of, plain classifier-free guidance.

Each is one class of ``RULES``, whose order is that in which they act:

    interval        two prompts only within a range of noise levels; outside of it the positive one alone is asked
    nag             the positive prompt hears the negative one within its text attention
    slg             the negative prompt is asked with some blocks left out
    cfg_merge       both prompts are asked in one call
    tcfg            the negative answer without what the positive one does not share
    cfg_zero_star   the negative answer scaled to the positive one; no movement in the first steps
    apg             how far, and in which direction, the positive answer is moved away from the negative one

The first four decide what the model is asked, the others what becomes of its answers: velocities [B,C,T,h,w], float32,
each sample of a batch by itself. c and u are the positive and the negative answer, w is the guidance scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Hint, WanError
from ..lookup import look_up
from ..models.dit.nag import Nag
from .guidance import Against, Condition, Side, entries
from .schedules import Schedule

Kept = Mapping[str, Tensor]  # what a rule keeps from one step to the next


def _number(usual: float, least: float, greatest: float) -> Any:
    """A field with its range, both ends included."""
    return field(default=usual, metadata={"least": least, "greatest": greatest})


@dataclass(frozen=True)
class Rule:
    """What a rule changes; each does some of these, and leaves the others as they are.

    Attributes:
        name: its key in ``RULES``.
        needs_two: whether it has nothing to do at a guidance scale of 1, where the positive prompt alone is asked.
        needs_own: whether it reaches into the network, which must be the engine's own.
        excludes: rules that it cannot be combined with.
    """

    name: ClassVar[str]
    needs_two: ClassVar[bool] = True
    needs_own: ClassVar[bool] = False
    excludes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for one in fields(self):
            if "least" in one.metadata:
                _check_number(f"{self.name}: {one.name}", getattr(self, one.name), **one.metadata)

    def check_network(self, layers: int) -> None:
        """
        Args:
            layers: blocks of the network.

        Raises:
            WanError: it names others.
        """

    def check_schedule(self, schedule: Schedule) -> None:
        """
        Raises:
            WanError: a schedule in which the rule does nothing, or leaves nothing to do.
        """

    def rests(self, step: int) -> bool:
        """Whether the sample stays where it is at a step of the schedule; then the model is not asked."""
        return False

    def acts(self, sigma: float) -> bool:
        """Whether it does something at a noise level."""
        return True

    def asks_both(self, sigma: float) -> bool:
        """Whether both prompts are asked at a noise level."""
        return True

    def positive(self, side: Side, negative: Side | None, sigma: float) -> Side:
        """What is asked for the positive side."""
        return side

    def negative(self, side: Side, sigma: float) -> Side:
        """What is asked for the negative side."""
        return side

    def unconditional(self, c: Tensor, u: Tensor) -> Tensor:
        """The negative answer that guidance goes away from."""
        return u

    def joined(self, step: Answers, kept: Kept) -> tuple[Tensor, Kept] | None:
        """The guided velocity and what is kept for the next step; None leaves it to plain guidance."""
        return None


@dataclass(frozen=True)
class Answers:
    """Both answers at a step, the scale, and what they answer to: the sample that the model saw, its noise level."""

    c: Tensor
    u: Tensor
    w: float
    x: Tensor
    sigma: float


def _check_number(what: str, value: float, least: float, greatest: float) -> None:
    if not (math.isfinite(value) and least <= value <= greatest):
        raise WanError(f"{what} is {value:g}: expected {least:g} to {greatest:g}.")


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample, [B,1,1,1,1]."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


# --- what the model is asked


@dataclass(frozen=True)
class _Ranged(Rule):
    """A rule that acts from one noise level down to another, both included; 1 is pure noise, 0 the clean video."""

    sigma_start: float = _number(1.0, 0.0, 1.0)
    sigma_end: float = _number(0.5, 0.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma_end >= self.sigma_start:
            raise WanError(
                f"{self.name}: the noise level ends at {self.sigma_end:g} and starts at {self.sigma_start:g}: it goes "
                "down during a run, so that the end must be below the start."
            )

    def acts(self, sigma: float) -> bool:
        """Compared in float32, as the ranges of conditionings are."""
        return np.float32(self.sigma_end) <= np.float32(sigma) <= np.float32(self.sigma_start)

    def check_schedule(self, schedule: Schedule) -> None:
        sigmas = schedule.sigmas[:-1].tolist()
        if not any(map(self.acts, sigmas)):
            raise WanError(
                f"{self.name} acts at noise levels from {self.sigma_start:g} to {self.sigma_end:g}, but the "
                f"{schedule.steps} steps of this schedule lie at {', '.join(f'{sigma:.3f}' for sigma in sigmas[:50])}."
            )


@dataclass(frozen=True)
class Interval(_Ranged):
    """Guidance in a range of noise levels only (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""

    name = "interval"

    def asks_both(self, sigma: float) -> bool:
        return self.acts(sigma)


@dataclass(frozen=True)
class NormalisedAttention(Rule):
    """NAG (Chen et al. 2025, arXiv 2505.21179): the negative prompt acts within the text attention of the positive
    pass, and so at a scale of 1 too; see ``models.dit.nag``.

    Attributes:
        scale: how far away from the negative prompt.
        tau: how much larger a token's answer may become, as a ratio of L1 norms.
        alpha: the part of the result in what is passed on.
    """

    name = "nag"
    needs_two = False
    needs_own = True
    scale: float = _number(11.0, 1.0, 100.0)
    tau: float = _number(2.5, 1.0, 100.0)
    alpha: float = _number(0.25, 0.0, 1.0)

    def positive(self, side: Side, negative: Side | None, sigma: float) -> Side:
        heard = [] if negative is None else [one for one in entries(negative) if one.applies(sigma)]
        if not heard:
            return side
        against = Against(heard[0].condition, Nag(self.scale, self.tau, self.alpha))
        return _each(side, lambda condition: replace(condition, against=against))

    def check_sides(self, negative: Side | None, sigmas: Iterable[float]) -> None:
        """
        Raises:
            WanError: no negative prompt, or several at once, or one for a part of the picture.
        """
        if negative is None:
            raise WanError("nag needs a negative prompt: give one, or leave nag away.")
        for sigma in sigmas:
            heard = [one for one in entries(negative) if one.applies(sigma)]
            if len(heard) > 1 or any(isinstance(one.weight, Tensor) for one in heard):
                raise WanError(
                    "nag hears one negative prompt at a time, for the whole picture, but the negative side has several "
                    "at once or one with a mask: join their texts into one prompt, or leave nag away."
                )


@dataclass(frozen=True)
class SkipLayers(_Ranged):
    """Skip-layer guidance: the negative pass lacks some blocks, so that guidance leads away from what is badly made.

    As of ComfyUI's SkipLayerGuidanceDiTSimple; it costs no further call, and saves those blocks.

    Attributes:
        blocks: counted from 0.
    """

    name = "slg"
    needs_own = True
    blocks: tuple[int, ...] = (9,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or min(self.blocks) < 0:
            raise WanError(f"slg leaves out the blocks {_listed(self.blocks)}: expected numbers, 0 or more, say 9.")
        object.__setattr__(self, "blocks", tuple(sorted(set(self.blocks))))

    def check_network(self, layers: int) -> None:
        if self.blocks[-1] >= layers:
            raise WanError(
                f"slg leaves out the blocks {_listed(self.blocks)}, but the model has {layers}: expected 0 to "
                f"{layers - 1}."
            )
        if len(self.blocks) == layers:
            raise WanError(f"slg leaves out all {layers} blocks of the model: name one or two of them.")

    def negative(self, side: Side, sigma: float) -> Side:
        if not self.acts(sigma):
            return side
        return _each(side, lambda condition: replace(condition, skip=frozenset(self.blocks)))


@dataclass(frozen=True)
class Merge(Rule):
    """Both prompts as one batch (DiffSynth's ``cfg_merge``): the same answers by half as many, twice as large calls."""

    name = "cfg_merge"
    needs_own = True
    excludes = ("slg", "nag")


def _each(side: Side, change: Any) -> Side:
    """A side with each of its conditions changed."""
    if isinstance(side, Condition):
        changed: Condition = change(side)
        return changed
    return tuple(replace(entry, condition=change(entry.condition)) for entry in side)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "(none)"


# --- what becomes of the answers


@dataclass(frozen=True)
class Tangential(Rule):
    """TCFG (Kwon et al. 2025, arXiv 2503.18137): of the negative answer is kept what lies along the direction that both
    answers share most of, the first right-singular vector of the two rows u and c.

    That vector is (a·u + b·c) / s, where (a, b) is the leading eigenvector of the 2×2 matrix of their products and s
    the singular value; the part of u along it is a·(a·u + b·c).
    """

    name = "tcfg"
    excludes = ("apg",)

    def unconditional(self, c: Tensor, u: Tensor) -> Tensor:
        angle = torch.atan2(2 * _dot(u, c), _dot(u, u) - _dot(c, c)) / 2
        a, b = angle.cos(), angle.sin()
        return a * (a * u + b * c)


@dataclass(frozen=True)
class ZeroStar(Rule):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886): the negative answer times ⟨c, u⟩ / ‖u‖², which brings it as near
    to c as a factor can.

    Attributes:
        zero_steps: the velocity of so many first steps is 0, whatever the model would say; the paper's choice is the
            first 4 % of the steps.
    """

    name = "cfg_zero_star"
    zero_steps: int = _number(1, 0, 1000)

    def check_schedule(self, schedule: Schedule) -> None:
        if self.zero_steps >= schedule.steps:
            raise WanError(
                f"cfg_zero_star holds the sample still in {self.zero_steps} steps, but there are only "
                f"{schedule.steps}: expected fewer, 1 say."
            )

    def rests(self, step: int) -> bool:
        return step < self.zero_steps

    def unconditional(self, c: Tensor, u: Tensor) -> Tensor:
        return u * (_dot(c, u) / (_dot(u, u) + 1e-8))


@dataclass(frozen=True)
class Projected(Rule):
    """APG (Sadat et al. 2024, arXiv 2410.02416), on clean estimates as in the paper: their difference d = c₀ − u₀ gets
    momentum (m ← d + momentum·m) and a largest norm, and loses what lies along c₀, which over-saturates; then
    c₀ + (w − 1)·m.

    Norms and products are over all of a sample, as in the paper and in diffusers. Momentum goes on once a step, not in
    steps without a negative answer.

    Attributes:
        momentum: negative values lead away from where the steps before went; 0 is none.
        norm_threshold: of the difference, over all values of the latent; 0 is no limit. It goes with the square root
            of their number: 55 at 832x480 with 81 frames is 83 at 1280x720. Without a limit that is reached, negative
            momentum can build up.
        eta: how much is left of what lies along the clean estimate; 1 leaves all.
    """

    name = "apg"
    momentum: float = _number(-0.75, -5.0, 1.0)
    norm_threshold: float = _number(55.0, 0.0, 1e6)
    eta: float = _number(0.0, -10.0, 10.0)

    def joined(self, step: Answers, kept: Kept) -> tuple[Tensor, Kept]:
        clean = step.x.float() - step.sigma * step.c
        moved = step.sigma * (step.u - step.c)  # c₀ − u₀
        if self.momentum:
            if "average" in kept:
                moved = moved + self.momentum * kept["average"].to(moved.device)
            kept = {"average": moved}
        if self.norm_threshold:
            moved = moved * (self.norm_threshold / _dot(moved, moved).sqrt().clamp(min=1e-12)).clamp(max=1)
        along = _dot(moved, clean) / _dot(clean, clean).clamp(min=1e-12) * clean
        moved = moved + (self.eta - 1) * along
        return step.c - (step.w - 1) / step.sigma * moved, kept


RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (Interval, NormalisedAttention, SkipLayers, Merge, Tangential, ZeroStar, Projected)
}


# --- together


@dataclass(frozen=True)
class Guidance:
    """The rules of a run, in the order in which they act; none is plain classifier-free guidance."""

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise WanError(f"The guidance rule {twice} is given twice: give it once, with all its settings.")
        for rule in self.rules:
            for other in rule.excludes:
                if other in names:
                    raise WanError(f"{_TOGETHER[rule.name, other]} Choose one of {rule.name} and {other}.")
        order = list(RULES)
        object.__setattr__(self, "rules", tuple(sorted(self.rules, key=lambda rule: order.index(rule.name))))

    def __bool__(self) -> bool:
        return bool(self.rules)

    def __str__(self) -> str:
        return ", ".join(map(described, self.rules)) or "none"

    def adding(self, rule: Rule) -> Guidance:
        """With one more rule."""
        return Guidance((*self.rules, rule))

    @property
    def merges(self) -> bool:
        """Whether both prompts are asked in one call."""
        return any(isinstance(rule, Merge) for rule in self.rules)

    @property
    def nag(self) -> NormalisedAttention | None:
        return next((rule for rule in self.rules if isinstance(rule, NormalisedAttention)), None)

    def rests(self, step: int) -> bool:
        """Whether the model is not asked at a step, and the sample stays where it is."""
        return any(rule.rests(step) for rule in self.rules)

    def asks_both(self, sigma: float) -> bool:
        """Whether the negative prompt is asked at a noise level, where the scale is not 1."""
        return all(rule.asks_both(sigma) for rule in self.rules)

    def turns(self, schedule: Schedule) -> frozenset[int]:
        """The steps at which a rule begins or ends to act: the guided velocity then jumps."""
        acting = [[rule.acts(sigma) for rule in self.rules] for sigma in schedule.sigmas[:-1].tolist()]
        return frozenset(i for i in range(1, len(acting)) if acting[i] != acting[i - 1])

    def check_network(self, layers: int, *, own: bool = True) -> None:
        """
        Args:
            layers: blocks of the network.
            own: whether it is the engine's.

        Raises:
            WanError: blocks that it does not have, or a rule that another program's network does not know.
        """
        for rule in self.rules:
            if rule.needs_own and not own:
                raise WanError(
                    f"The guidance rule {rule.name} works within the network, but another program holds this one.",
                    Hint.TRAIN_HELD,
                )
            rule.check_network(layers)

    def check(
        self, schedule: Schedule, experts: Sequence[str], scales: Mapping[str, float], start: int, end: int
    ) -> list[str]:
        """What a run must be like; notes for the user of what is as good as none.

        Args:
            experts: who works at each step.
            scales: of each expert.
            start, end: the steps to do, ``end`` excluded.

        Raises:
            WanError: a rule that would do nothing, or leave nothing to do.
        """
        for rule in self.rules:
            rule.check_schedule(schedule)
        both = [rule.name for rule in self.rules if rule.needs_two]
        at_work = list(dict.fromkeys(experts[start:end]))
        idle = [name for name in at_work if scales[name] == 1]
        if not both or not idle:
            return []
        if len(idle) == len(at_work):
            raise WanError(
                f"The guidance is 1, so that the positive prompt alone is asked, but {_and(both)} "
                f"{_needs(both)} two prompts: raise the guidance (cfg), or leave {_and(both)} away."
            )
        return [f"The {idle[0]}-noise expert has a guidance of 1: {_and(both)} {_do(both)} nothing there."]

    def check_sides(self, positive: Side, negative: Side | None, sigmas: Iterable[float]) -> list[str]:
        """The same of what is asked: the noise levels are those of the steps to do."""
        if self.nag:
            self.nag.check_sides(negative, sigmas)
        several = self.merges and not (isinstance(positive, Condition) and isinstance(negative, Condition))
        return ["cfg_merge: where a side has several prompts at a step, they are asked one by one."] if several else []

    def calls(self, schedule: Schedule, experts: Sequence[str], scales: Mapping[str, float]) -> list[int]:
        """How often the model is asked at each step, by a solver that asks for one velocity a step."""

        def of(i: int, sigma: float) -> int:
            if self.rests(i):
                return 0
            two = scales[experts[i]] != 1 and self.asks_both(sigma)
            return 2 if two and not self.merges else 1

        return [of(i, sigma) for i, sigma in enumerate(schedule.sigmas[:-1].tolist())]

    def texts(self, prompts: int) -> int:
        """How many prompts' keys and values are held at once, where so many are computed with at a step."""
        alone = self.merges and prompts > 1 and any(isinstance(rule, Interval) for rule in self.rules)
        return max(prompts, 2 if self.nag else 1) + alone


_TOGETHER = {
    ("cfg_merge", "slg"): "cfg_merge asks both prompts in one call, slg asks the negative one with other blocks.",
    ("cfg_merge", "nag"): "cfg_merge asks both prompts in one call, nag changes the positive one's attention alone.",
    ("tcfg", "apg"): "tcfg and apg both take away what lies along one direction of the answers.",
}

PLAIN = Guidance()


def make(name: str, settings: Mapping[str, Any]) -> Rule:
    """A rule by its name, with some of its settings.

    Raises:
        WanError: no such rule or setting, or a value out of its range.
    """
    rule = look_up(RULES, name, "guidance rule")
    known = settings_of(rule)
    for setting in settings:
        if setting not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise WanError(f"The guidance rule {name} has no setting {setting!r}: {has}.")
    return rule(**settings)


def blocks_of(text: str) -> tuple[int, ...]:
    """The blocks that a text such as "9, 10" names.

    Raises:
        WanError: it is no list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        shown = text if len(text) <= 80 else text[:77] + "..."
        raise WanError(
            f"Expected blocks as whole numbers with commas between, such as 9, 10; found {shown!r}."
        ) from None


def settings_of(rule: type[Rule]) -> dict[str, Any]:
    """A rule's settings and their usual values."""
    return {one.name: one.default for one in fields(rule)}


def described(rule: Rule) -> str:
    """A rule in words: its name and settings."""
    values = ((name, getattr(rule, name)) for name in settings_of(type(rule)))
    said = [f"{name} {_listed(value) if isinstance(value, tuple) else f'{value:g}'}" for name, value in values]
    return f"{rule.name} ({', '.join(said)})" if said else rule.name


def _and(names: Sequence[str]) -> str:
    return " and ".join(names)


def _needs(names: Sequence[str]) -> str:
    return "needs" if len(names) == 1 else "need"


def _do(names: Sequence[str]) -> str:
    return "does" if len(names) == 1 else "do"
