"""Clips from models in training, with the sampler that users get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..config import Variant
from ..media.geometry import noise
from ..models.dit.inputs import with_channels
from ..sampling.denoise import Run, denoise
from ..sampling.experts import Expert, Experts
from ..sampling.guidance import Condition, OnBlock
from ..sampling.schedules import schedule
from ..sampling.starts import clean_frames
from .model import TrainedDiT
from .parallel import Processes
from .precision import autocast
from .report import sample_grid


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    steps: int = 20
    shift: float = 5.0
    guidance: float = 3.0
    solver: str = "euler"
    precision: str = "fp32"


@dataclass(frozen=True, eq=False)
class Given:
    """What the models are told and shown for a batch of clips.

    Attributes:
        texts: prompts [n, D], without padding.
        empty: the prompt that guidance leads away from.
        inputs: I2V: mask and condition latent, and CLIP tokens, of the whole batch.
        first: TI2V: clean first latent frames [B, C, 1, h, w].
    """

    texts: Sequence[Tensor]
    empty: Tensor
    inputs: tuple = ()
    first: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Model:
    """A model as the sampler calls it; texts are lists of prompts without padding."""

    dit: TrainedDiT
    precision: str

    def __call__(self, x: Tensor, t: Tensor, condition: Condition, on_block: OnBlock | None = None) -> Tensor:
        x = with_channels(x, condition.inputs)
        with autocast(self.precision, self.dit.device, once=True):
            return self.dit(x, t, condition.text, on_block=on_block, inputs=condition.inputs)


@torch.no_grad()
def sample(
    high: TrainedDiT,
    low: TrainedDiT,
    given: Given,
    shape: tuple[int, int, int, int],
    how: Sampling,
    variant: Variant,
    *,
    seed: int = 0,
) -> Tensor:
    """Latents [B, C, T, h, w], one for each of the given prompts.

    Args:
        high, low: the experts; the same model twice is a dense one.
        shape: [C, T, h, w] of one latent.
    """
    texts, first = given.texts, given.first
    start = noise(seed, (len(texts), *shape)).to(high.device)
    known = None if first is None else clean_frames(first.to(start.device), shape)
    experts = _experts(high, low, how, variant)
    timetable = schedule("simple", how.steps, how.shift)
    # TrainedDiT takes prompts of several lengths.
    positive, negative = (
        Condition(cast(Tensor, some), given.inputs) for some in (list(texts), [given.empty] * len(texts))
    )
    return denoise(start, experts, Run(timetable, how.solver, positive, negative, known)).x


def _experts(high: TrainedDiT, low: TrainedDiT, how: Sampling, variant: Variant) -> Experts:
    if high is low:
        return Experts.dense(_Model(high, how.precision), how.guidance)
    first = Expert(_Model(high, how.precision), how.guidance, "high")
    second = Expert(_Model(low, how.precision), how.guidance, "low")
    return Experts(first, second, variant.boundary)


@dataclass(frozen=True, eq=False)
class Wish:
    """One row of a grid: a prompt [n, D], and what the model is shown beside it."""

    caption: str
    text: Tensor
    inputs: tuple = ()  # I2V: as of a batch of one
    first: Tensor | None = None  # TI2V: [C, 1, h, w]


@dataclass(frozen=True, eq=False)
class Grids:
    """Draws the same wishes again and again while a model learns: the same seed, one picture each time.

    The model does all steps itself, one expert of a pair also those of the other, for which it was not trained: a grid
    shows what it learns, not how good the pair is.
    """

    model: TrainedDiT
    wishes: Sequence[Wish]
    empty: Tensor
    shape: tuple[int, int, int, int]
    how: Sampling
    variant: Variant
    decode: Callable[[Tensor], Tensor]  # [B, C, T, h, w] -> [B, 3, F, H, W] in -1..1
    seed: int = 0

    def __call__(self, step: int, folder: Path) -> None:
        """Write ``sample_<step>.png``. Of several processes that draw, as those of a sharded model must, the first."""
        latents = torch.cat([self._draw(wish) for wish in self.wishes])  # one at a time, to save memory
        if not Processes.current().first:
            return
        captions = [wish.caption for wish in self.wishes]
        sample_grid(list(self.decode(latents).cpu()), folder / f"sample_{step:06d}.png", captions=captions)

    def _draw(self, wish: Wish) -> Tensor:
        first = None if wish.first is None else wish.first[None]
        given = Given([wish.text], self.empty, wish.inputs, first)
        return sample(self.model, self.model, given, self.shape, self.how, self.variant, seed=self.seed)
