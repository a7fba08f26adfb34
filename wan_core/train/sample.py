"""Clips from models in training, with the sampler that users get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import Variant
from ..latents import noise
from ..sampling.denoise import Given, denoise
from ..sampling.experts import Expert, Experts
from ..sampling.guidance import Condition, OnBlock
from ..sampling.schedules import schedule
from .model import TrainedDiT
from .precision import autocast


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    steps: int = 20
    shift: float = 5.0
    guidance: float = 3.0
    solver: str = "euler"
    precision: str = "fp32"


@dataclass(frozen=True, eq=False)
class _Model:
    """A model as the sampler calls it; texts are lists of prompts without padding."""

    dit: TrainedDiT
    precision: str

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, on_block: OnBlock | None = None) -> Tensor:
        if condition.concat is not None:
            x = torch.cat([x, condition.concat], dim=1)
        with autocast(self.precision, self.dit.device):
            return self.dit(x, t, condition.text, on_block=on_block)


@torch.no_grad()
def sample(
    high: TrainedDiT,
    low: TrainedDiT,
    texts: Sequence[Tensor],
    empty: Tensor,
    shape: tuple[int, int, int, int],
    how: Sampling,
    variant: Variant,
    *,
    seed: int = 0,
    concat: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Latents [B, C, T, h, w] for prompts [n, D].

    Args:
        high, low: the experts; the same model twice is a dense one.
        shape: [C, T, h, w] of one latent.
        concat: I2V: mask and condition latent [B, 20, T, h, w].
        first: TI2V: clean first latent frames [B, C, 1, h, w].
    """
    start = noise(seed, (len(texts), *shape)).to(high.device)
    given = None
    if first is not None:
        known, mask = torch.zeros_like(start), torch.ones(1, 1, shape[1], 1, 1)
        known[:, :, :1], mask[:, :, 0] = first, 0
        given = Given(known, mask, clean=True)
    experts = _experts(high, low, how, variant)
    timetable = schedule("simple", how.steps, how.shift)
    positive, negative = Condition(list(texts), concat), Condition([empty] * len(texts), concat)
    return denoise(start, experts, timetable, how.solver, positive, negative, given=given)[0]


def _experts(high: TrainedDiT, low: TrainedDiT, how: Sampling, variant: Variant) -> Experts:
    if high is low:
        return Experts.dense(_Model(high, how.precision), how.guidance)
    both = (Expert(_Model(model, how.precision), how.guidance, name) for model, name in ((high, "high"), (low, "low")))
    return Experts(*both, variant.boundary)
