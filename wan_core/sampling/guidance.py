"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import WanError
from .experts import Model

OnBlock = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Condition:
    """What the model is told beside the noise.

    Attributes:
        text: [B,L,D] embedded prompt.
        inputs: everything else, such as ``Concat`` and ``ClipTokens``; the same kind at most once.
        key: one number for each condition, by which what was computed from it is found again.
    """

    text: Tensor
    inputs: tuple = ()
    key: int = field(default_factory=itertools.count().__next__)


def guided(
    model: Model,
    x: Tensor,
    t: Tensor,
    positive: Condition,
    negative: Condition | None,
    scale: float,
    on_block: OnBlock | None = None,
) -> Tensor:
    """The velocity away from the negative prompt: uncond + scale * (cond - uncond), float32.

    A scale of 1 is the positive prompt alone and costs one model call instead of two.
    """
    cond = model(x, t, positive, on_block=on_block).float()
    if scale == 1:
        return cond
    if negative is None:
        raise WanError(f"Guidance {scale} needs a negative prompt: give one (it may be empty), or set guidance to 1.")
    uncond = model(x, t, negative, on_block=on_block).float()
    return uncond + scale * (cond - uncond)
