"""What the model is told at each step, and classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..errors import WanError
from ..models.dit.nag import Nag
from .experts import Model

OnBlock = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Condition:
    """What the model is told beside the noise.

    Attributes:
        text: [B,L,D] embedded prompt.
        inputs: everything else, such as ``Concat`` and ``ClipTokens``; the same kind at most once.
        key: one number for each condition, by which what was computed from it is found again.
        skip: blocks of the network that are left out.
        against: another condition that is heard beside this one's text, and is moved away from.
    """

    text: Tensor
    inputs: tuple[Any, ...] = ()
    key: int = field(default_factory=itertools.count().__next__)
    skip: frozenset[int] = frozenset()
    against: Against | None = None


@dataclass(frozen=True, eq=False)
class Against:
    """The text of this condition is moved away from within attention."""

    condition: Condition
    nag: Nag


@dataclass(frozen=True, eq=False)
class Entry:
    """One condition of several on a side of the guidance: where it applies, and with what weight.

    Attributes:
        first, last: the highest and the lowest sigma at which it applies, both included (``sigma_at``).
        weight: beside the others that apply at a step; a number, or a tensor that broadcasts to [B,C,T,h,w].
        rest: it takes what the weights of the others leave of 1, and its own counts for nothing.
    """

    condition: Condition
    first: float = 1.0
    last: float = 0.0
    weight: float | Tensor = 1.0
    rest: bool = False

    def applies(self, sigma: float) -> bool:
        """Compared in float32, as ComfyUI's samplers do."""
        return np.float32(self.last) <= np.float32(sigma) <= np.float32(self.first)


Side: TypeAlias = Condition | tuple[Entry, ...]


def entries(side: Side) -> tuple[Entry, ...]:
    """A side of the guidance as a list; one condition applies everywhere."""
    return (Entry(side),) if isinstance(side, Condition) else side


def active(side: Side, sigma: float) -> Condition | None:
    """The one condition that a side comes to at a noise level; None where several or none apply, or one in part."""
    if isinstance(side, Condition):
        return side
    present = [entry for entry in side if entry.applies(sigma)]
    alone = len(present) == 1 and not present[0].rest and not isinstance(present[0].weight, Tensor)
    return present[0].condition if alone and present[0].weight else None


def sigma_at(percent: float, shift: float) -> float:
    """The noise level at a fraction of the way from noise (0) to the clean video (1), as ComfyUI counts it."""
    if percent <= 0:
        return 1.0
    if percent >= 1:
        return 0.0
    return shift * (1 - percent) / (1 + (shift - 1) * (1 - percent))


def silent(side: Side, sigmas: Iterable[float]) -> list[int]:
    """The steps, from 0, at which nothing of a side applies."""
    return [i for i, sigma in enumerate(sigmas) if not any(entry.applies(sigma) for entry in entries(side))]


def predicted(model: Model, x: Tensor, t: Tensor, sigma: float, side: Side, on_block: OnBlock | None = None) -> Tensor:
    """The velocity [B,C,T,h,w] by one side, float32: the mean of what applies, by weight.

    Where nothing does, the clean estimate is 0, as in ComfyUI's samplers.
    """
    if isinstance(side, Condition):
        return model(x, t, side, on_block=on_block).float()
    present = _weighted([entry for entry in side if entry.applies(sigma)], x)
    if len(present) == 1 and not isinstance(present[0][1], Tensor):
        return model(x, t, present[0][0], on_block=on_block).float()
    total, weights = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
    for condition, weight in present:
        total += weight * model(x, t, condition, on_block=on_block).float()
        weights += weight
    return torch.where(weights == 0, x.float() / sigma, total / torch.where(weights == 0, 1, weights))


def _weighted(active: list[Entry], x: Tensor) -> list[tuple[Condition, float | Tensor]]:
    weighted = [(entry.condition, _on(entry.weight, x)) for entry in active if not entry.rest]
    others = [entry.condition for entry in active if entry.rest]
    if others:
        left = torch.ones_like(x[:1, :1], dtype=torch.float32)
        for _, weight in weighted:
            left = left - weight
        left = left.clamp(min=0)
        weighted += [(condition, left) for condition in others if left.any()]
    return [(condition, weight) for condition, weight in weighted if isinstance(weight, Tensor) or weight]


def _on(weight: float | Tensor, x: Tensor) -> float | Tensor:
    return weight.to(x.device, torch.float32) if isinstance(weight, Tensor) else weight


def given(negative: Side | None, scale: float) -> Side:
    """
    Raises:
        WanError: there is no negative side.
    """
    if negative is None:
        raise WanError(f"Guidance {scale} needs a negative prompt: give one (it may be empty), or set guidance to 1.")
    return negative


def guided(
    model: Model,
    x: Tensor,
    t: Tensor,
    positive: Side,
    negative: Side | None,
    scale: float,
    on_block: OnBlock | None = None,
    *,
    sigma: float = 1.0,
) -> Tensor:
    """The velocity away from the negative prompt: uncond + scale * (cond - uncond), float32.

    A scale of 1 is the positive prompt alone and costs one model call instead of two.

    Args:
        sigma: the noise level of x, where the sides have several entries.
    """
    cond = predicted(model, x, t, sigma, positive, on_block)
    if scale == 1:
        return cond
    uncond = predicted(model, x, t, sigma, given(negative, scale), on_block)
    return uncond + scale * (cond - uncond)
