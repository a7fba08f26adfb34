"""Flow matching: noise levels, noisy latents, the velocity to learn, and how images enter.

Sources: Lipman et al. 2022 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003), Esser et al. 2024 (arXiv 2403.03206)
for the shift.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import TRAIN_STEPS, Variant
from ..errors import WanError
from ..models.dit.features.clip_tokens import ClipTokens


@dataclass(frozen=True)
class NoiseRange:
    """The noise levels that a model is trained on.

    Attributes:
        low, high: sigma from and to, within 0..1: an expert's half of the way.
        shift: how levels are spread, as in sampling: evenly placed s become ``shift s / (1 + (shift - 1) s)``.
    """

    low: float
    high: float
    shift: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise WanError(
                f"Timestep boundaries {self.low} to {self.high}: expected fractions with 0 <= minimum < maximum <= 1."
            )
        if self.shift <= 0:
            raise WanError(f"shift is {self.shift}: expected a number above 0.")

    def sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """[count] noise levels, one from each of ``count`` equal parts of the range, in random order."""
        parts = torch.randperm(count, generator=generator)
        place = (parts + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        first, last = self._even(self.low), self._even(self.high)
        even = first + (last - first) * place
        return (self.shift * even / (1 + (self.shift - 1) * even)).clamp(1e-4, 1).float()

    def _even(self, sigma: float) -> float:
        """The place before the shift."""
        return sigma / (self.shift - (self.shift - 1) * sigma)


def expert_range(variant: Variant, expert: str, shift: float | None = None) -> NoiseRange:
    """The official part of an expert: "high" from the boundary up, "low" below it, "only" everything."""
    boundary = variant.boundary or 0.0
    bounds = {"high": (boundary, 1.0), "low": (0.0, boundary), "only": (0.0, 1.0)}
    low, high = bounds[expert]
    return NoiseRange(low, high, variant.shift if shift is None else shift)


@dataclass(frozen=True, eq=False)
class Example:
    """What the model is shown and what it should answer.

    Attributes:
        x: [B, C_in, T, h, w], condition channels included.
        t: [B], or [B, T] where first frames are clean.
        target: velocity [B, C, T, h, w].
        weight: [B or 1, 1, T or 1, h or 1, w or 1]; 0 where nothing is to be learnt.
        inputs: what the model's features are told, such as ``ClipTokens``, of the whole batch.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    weight: Tensor
    inputs: tuple = ()


def noisy(latent: Tensor, noise: Tensor, sigmas: Tensor) -> Example:
    """Text to video: ``x = (1 - sigma) data + sigma noise``, and the way from data to noise is the velocity."""
    sigma = sigmas.view(-1, 1, 1, 1, 1)
    x = (1 - sigma) * latent + sigma * noise
    return Example(x, sigmas * TRAIN_STEPS, noise - latent, torch.ones(1, 1, 1, 1, 1))


def with_channels(example: Example, concat: Tensor) -> Example:
    """I2V: mask and condition latent [B, 20, T, h, w] stand behind the noisy latent."""
    return replace(example, x=torch.cat([example.x, concat], dim=1))


def with_clip(example: Example, features: Tensor) -> Example:
    """Wan2.1 I2V and FLF2V: what CLIP makes of the pictures, [B, 257 or 514, 1280]."""
    return replace(example, inputs=(*example.inputs, ClipTokens(features)))


def with_clean_first_frame(example: Example, latent: Tensor, given: Tensor) -> Example:
    """TI2V-5B: where ``given`` [B] is true the first latent frame is clean, has timestep 0, and is not learnt."""
    frames = latent.shape[2]
    first = torch.zeros(len(latent), frames, dtype=torch.bool)
    first[:, 0] = given
    clean = first.view(-1, 1, frames, 1, 1).to(latent.device)
    t = example.t[:, None].expand(-1, frames).masked_fill(first.to(example.t.device), 0.0)
    return replace(example, x=torch.where(clean, latent, example.x), t=t, weight=example.weight * ~clean)


def with_subject(example: Example, subject: Tensor, emphasis: float) -> Example:
    """Places of the subject [B, 1, T, h, w] (0 or 1) count ``1 + emphasis (1 - sigma)`` times: fully where the clip can
    almost be seen, not at all in pure noise, where weights that depend on the clip would move the mean."""
    clear = (1 - example.t / TRAIN_STEPS).view(-1, 1, 1, 1, 1)
    return replace(example, weight=example.weight * (1 + emphasis * clear * subject))


def velocity_loss(velocity: Tensor, example: Example) -> Tensor:
    """Mean squared error of the velocity over the places that count; each sample weighs the same."""
    weight = example.weight.to(velocity).expand(len(velocity), 1, *velocity.shape[2:])
    error = (velocity.float() - example.target).square().mean(dim=1, keepdim=True)
    per_sample = (error * weight).sum(dim=(1, 2, 3, 4)) / weight.sum(dim=(1, 2, 3, 4)).clamp(min=1)
    return per_sample.mean()
