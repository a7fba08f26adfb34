"""What a diffusion transformer learns in one batch, and what is written when it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..config import Architecture, Variant
from ..dtypes import NAMES
from ..errors import Hint, WanError
from ..files.write import save_tensors
from ..layouts.variants import signature_of
from ..media.video import unfinished
from . import lora
from .cache import Entry, batches_of
from .model import TrainedDiT
from .objective import (
    Example,
    NoiseRange,
    noisy,
    velocity_loss,
    with_channels,
    with_clean_first_frame,
    with_clip,
    with_subject,
)
from .parallel import Processes
from .precision import autocast, resolve_precision
from .sharded import gathered

_NEGATIVE_BATCHES = 0.2


@dataclass(frozen=True, eq=False)
class Data:
    """Clips made ready.

    Attributes:
        entries: latents of the clips; read when a batch wants them.
        texts: embedding [n, D] of a clip's prompt.
        empty: embedding of the empty prompt, in whose place a caption is sometimes dropped.
        shapes: of the latents; batches hold one shape.
        key: of the whole set, for refusing to go on with other data.
        negative: embedding of the negative prompt that users will give, for models that would not know it: it stands
            in for the empty one in some batches.
    """

    entries: Callable[[int], Entry]
    texts: Callable[[int], Tensor]
    empty: Tensor
    shapes: Sequence[tuple]
    key: str
    negative: Tensor | None = None


@dataclass(frozen=True)
class Recipe:
    """How a transformer is taught.

    Attributes:
        caption_dropout: how often the caption is empty: guidance needs a model that knows both.
        image_dropout: TI2V: how often the first frame is not given.
        emphasis: extra weight of the subject, where the entries tell where it is.
    """

    variant: Variant
    noise: NoiseRange
    batch: int = 1
    caption_dropout: float = 0.1
    image_dropout: float = 0.3
    emphasis: float = 0.0
    precision: str = "auto"
    seed: int = 0  # of the order of the clips
    base: str = ""  # of the weights that a run began with, for refusing to go on from others


class DiTTask:
    """A transformer in training, whole or through LoRA: the ``Task`` of ``loop.train``."""

    def __init__(
        self,
        model: TrainedDiT,
        data: Data,
        recipe: Recipe,
        *,
        adapted: Mapping[str, lora.AdaptedLinear] | None = None,
        sampler: Callable[[int, Path], None] | None = None,
        on_block: Callable[[int], None] | None = None,
    ):
        self.model, self.data, self.recipe, self.adapted = model, data, recipe, adapted
        self.on_block = on_block
        self.precision = resolve_precision(recipe.precision, model.device)
        self.sampler = sampler
        self._epochs: dict[int, list[list[int]]] = {}
        check_variant(model.config, recipe.variant, "The model")

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def describe(self) -> dict[str, object]:
        recipe = self.recipe
        told = {
            "task": recipe.variant.task,
            "noise": recipe.noise,
            "batch": recipe.batch,
            "data": self.data.key,
            "caption_dropout": recipe.caption_dropout,
            "image_dropout": recipe.image_dropout,
            "precision": self.precision,
            "lora_rank": 0,
            "model": self.model.config,
        }
        if recipe.base:
            told["base"] = recipe.base
        if recipe.emphasis:
            told["emphasis"] = recipe.emphasis
        return told | (lora.describe(self.adapted) if self.adapted else {})

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        clips = self._clips(batch)
        entries = [self.data.entries(i) for i in clips]
        example = self.example(entries, generator)
        texts = [self.data.texts(i) for i in clips]
        dropped = torch.rand(len(clips), generator=generator) < self.recipe.caption_dropout
        empty = self._empty(generator)
        texts = [empty if drop else text for text, drop in zip(texts, dropped, strict=True)]
        with autocast(self.precision, self.model.device, once=True):
            velocity = self.model(example.x, example.t, texts, on_block=self.on_block, inputs=example.inputs)
        return velocity_loss(velocity, example), {}

    def example(self, entries: Sequence[Entry], generator: torch.Generator) -> Example:
        """What the model is shown of these clips, on its device."""
        latent = torch.stack([entry.latent for entry in entries])
        noise = torch.randn(latent.shape, generator=generator)
        made = noisy(latent, noise, self.recipe.noise.sigmas(len(latent), generator))
        if self.recipe.emphasis:
            subjects = [torch.zeros_like(e.latent[:1]) if e.subject is None else e.subject for e in entries]
            made = with_subject(made, torch.stack(subjects), self.recipe.emphasis)
        if self.recipe.variant.image == "channels":
            made = with_channels(made, torch.stack([cast(Tensor, entry.concat) for entry in entries]))
        if self.recipe.variant.clip:
            made = with_clip(made, torch.stack([cast(Tensor, entry.clip) for entry in entries]))
        if self.recipe.variant.image == "frame":
            given = torch.rand(len(latent), generator=generator) >= self.recipe.image_dropout
            made = with_clean_first_frame(made, latent, given & (latent.shape[2] > 1))
        device = self.model.device
        x, t, target, weight = (part.to(device) for part in (made.x, made.t, made.target, made.weight))
        return Example(x, t, target, weight, made.inputs)

    def sample(self, step: int, folder: Path) -> None:
        if self.sampler:
            self.sampler(step, folder)

    def save(self, file: Path, dtype: str = "auto") -> None:
        """The LoRA, or the whole model, as the pack's and ComfyUI's loaders read them.

        All processes call this together: a sharded model comes from all. The first one writes.
        """
        first = Processes.current().first
        metadata = {
            "wan_task": self.recipe.variant.task,
            "noise_from": f"{self.recipe.noise.low}",
            "noise_to": f"{self.recipe.noise.high}",
        }
        weights = {} if self.adapted else gathered(self.model.state_dict(), keep=first)
        if not first:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        if self.adapted:
            lora.save_lora(self.adapted, file, metadata)
        else:
            save_weights(weights, file, dtype, metadata)

    def _empty(self, generator: torch.Generator) -> Tensor:
        if self.data.negative is None or torch.rand((), generator=generator) >= _NEGATIVE_BATCHES:
            return self.data.empty
        return self.data.negative

    def _clips(self, batch: int) -> list[int]:
        size = len(self._batches(0))
        epoch, place = divmod(batch, size)
        return self._batches(epoch)[place]

    def _batches(self, epoch: int) -> list[list[int]]:
        """Every epoch has as many batches: it depends on how many clips there are of each shape alone."""
        if epoch not in self._epochs:
            self._epochs = {0: self._epochs[0]} if 0 in self._epochs else {}
            self._epochs[epoch] = batches_of(self.data.shapes, self.recipe.batch, self.recipe.seed, epoch)
        return self._epochs[epoch]


def save_weights(weights: Mapping[str, Tensor], file: Path, dtype: str, metadata: Mapping[str, str]) -> None:
    """One safetensors file under the official keys; "auto" keeps each tensor's own dtype."""
    target = None if dtype == "auto" else NAMES[dtype]
    made = {key: tensor.detach().to("cpu", target or tensor.dtype).contiguous() for key, tensor in weights.items()}
    with unfinished(file) as partial:
        save_tensors(made, partial, {"format": "pt", **metadata})


def check_variant(config: Architecture, variant: Variant, name: str | Path) -> None:
    """
    Raises:
        WanError: another network than the variant's, by its channels or the CLIP tokens that it hears.
    """
    if signature_of(config) != variant.signature:
        raise WanError(
            f"{name} takes {_inputs(signature_of(config))}, but {variant.display_name} takes "
            f"{_inputs(variant.signature)}.",
            Hint.TRAIN_TASK,
        )


def _inputs(signature: tuple[int, int, int]) -> str:
    channels, _, pictures = signature
    return f"{channels} channels{('', ' and a picture through CLIP', ' and two pictures through CLIP')[pictures]}"
