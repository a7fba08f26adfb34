"""What the finished family can do, in figures: every line of the model card's table.

Clips are drawn with the sampler that users get, from prompts whose combination of words was held out from training, and
read by ``evaluate``. Nothing here is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor

from wan_core.config import VARIANTS, VAEKind, Variant
from wan_core.loading.dit import read_dit
from wan_core.loading.text import load_text_encoder
from wan_core.loading.vae import load_vae
from wan_core.media.geometry import latent_frames
from wan_core.models.vae.vae import VideoVAE
from wan_core.sampling.starts import known_channels
from wan_core.train.data import Frame
from wan_core.train.model import TrainedDiT, load_trained
from wan_core.train.sample import Given, Sampling, sample
from wan_core.train.vae import psnr, reconstruct

from .captions import caption
from .dataset import scenes, to_tensor
from .evaluate import PAIRS, Rate, explanation, pair_scene, pair_won, score, together
from .world import Scene, film

FILES = {
    "text": "text_encoders/nano_umt5.safetensors",
    "vae16": "vae/nano_vae16.safetensors", "vae48": "vae/nano_vae48.safetensors",
    "t2v_high": "diffusion_models/nano_t2v_high_noise.safetensors",
    "t2v_low": "diffusion_models/nano_t2v_low_noise.safetensors",
    "i2v_high": "diffusion_models/nano_i2v_high_noise.safetensors",
    "i2v_low": "diffusion_models/nano_i2v_low_noise.safetensors",
    "ti2v": "diffusion_models/nano_ti2v.safetensors",
}  # fmt: skip
VAE_STAGE: dict[VAEKind, str] = {"wan2.1": "vae16", "wan2.2": "vae48"}
T2V, I2V, TI2V = (VARIANTS[task] for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"))

ARRANGEMENTS = {
    "pair": ("t2v_high", "t2v_low"),
    "high-noise expert alone": ("t2v_high", "t2v_high"),
    "low-noise expert alone": ("t2v_low", "t2v_low"),
    "experts exchanged": ("t2v_low", "t2v_high"),
}

Prompt = tuple[Scene, str]


def held_out_prompts(count: int, seed: int = 900, *, fixed: bool = False) -> list[Prompt]:
    """Scenes never trained on, and a caption of each; ``fixed``: only where the camera stays and motion is seen."""
    rows = (row for row in scenes(seed, test=True) if not fixed or row[0].camera == "fixed")
    return [row for _, row in zip(range(count), rows, strict=False)]


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error."""

    value: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        return cls(mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0, len(values))

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f} of {self.count}"


class Judge:
    """A family of files, and clips of it.

    Args:
        file: stage -> where its weights are.
        frame: size of the clips.
        how: sampling.
    """

    def __init__(self, file: Callable[[str], Path], frame: Frame, how: Sampling, batch: int = 20):
        self.file, self.frame, self.how, self.batch = file, frame, how, batch
        self.dit = cache(self._dit)
        self.vae = cache(self._vae)
        self.text = cache(self._text)

    def _dit(self, stage: str) -> TrainedDiT:
        return load_trained(read_dit(self.file(stage))).requires_grad_(False).eval()

    def _vae(self, kind: VAEKind) -> VideoVAE:
        return load_vae(self.file(VAE_STAGE[kind]), dtype=torch.float32)

    @cached_property
    def _encoder(self):
        return load_text_encoder(self.file("text"), dtype=torch.float32)

    def _text(self, prompt: str) -> Tensor:
        ids = self._encoder.tokenizer.encode(prompt)
        return self._encoder.encode_ids([ids])[0, : len(ids)]

    def film(self, scene: Scene) -> Tensor:
        return to_tensor(film(scene, self.frame.frames, self.frame.height, self.frame.width))

    @torch.no_grad()
    def clips(
        self, high: str, low: str, variant: Variant, prompts: Sequence[Prompt], seed: int, *, images: bool = False
    ) -> Iterator[tuple[Tensor, Scene]]:
        """Videos [3, F, H, W] of prompts; with ``images`` the first frame of the prompt's own film is given."""
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            given = [self.film(scene)[:, 0] for scene, _ in part] if images else None
            latents = self._latents(high, low, variant, [words for _, words in part], seed * 1000 + start, given)
            videos = self.vae(variant.vae).decode(latents)
            yield from zip(videos, (scene for scene, _ in part), strict=True)

    def _latents(
        self, high: str, low: str, variant: Variant, prompts: list[str], seed: int, images: list[Tensor] | None
    ) -> Tensor:
        vae, frame = self.vae(variant.vae), self.frame
        shape = (
            vae.config.channels,
            latent_frames(frame.frames),
            frame.height // vae.spec.spatial_stride,
            frame.width // vae.spec.spatial_stride,
        )
        given = Given([self.text(words) for words in prompts], self.text(""))
        if images is not None and variant.image == "channels":
            known = known_channels([{0: image} for image in images], frame.frames, vae.encode_all)
            given = replace(given, inputs=(known,))
        elif images is not None:
            given = replace(given, first=vae.encode(torch.stack(images)[:, :, None]))
        return sample(self.dit(high), self.dit(low), given, shape, self.how, variant, seed=seed)

    def reconstruction(self, kind: VAEKind, count: int) -> tuple[list[float], Mapping[str, Rate]]:
        """PSNR of held-out films through a VAE, and what can still be read of them."""
        vae = self.vae(kind)
        films = [(self.film(scene), scene) for scene, _ in held_out_prompts(count)]
        made = [(reconstruct(vae, clip), scene) for clip, scene in films]
        values = [psnr(clip, film).item() for (clip, _), (film, _) in zip(made, films, strict=True)]
        return values, score(made)

    def words(self, high: str, low: str, variant: Variant, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Words:
        """How often each word is seen, and how well a scene of the world explains each clip."""
        made = [clip for seed in seeds for clip in self.clips(high, low, variant, prompts, seed)]
        right = [score([clip]) for clip in made]
        shares = tuple(mean(rate.value for rate in rates.values()) for rates in right)
        return Words(together(right), shares, tuple(explanation(*clip) for clip in made))

    def pairs(self, high: str, low: str, variant: Variant, count: int, seed: int = 0) -> dict[str, Rate]:
        """How often the first word of a pair moves its statistic above the second, with the same noise."""
        hits: dict[str, Rate] = {}
        bases = [scene for scene, _ in held_out_prompts(400, fixed=True) if plain(scene)][:count]
        for name in PAIRS:
            sides = [[_told(pair_scene(scene, name, side)) for scene in bases] for side in (0, 1)]
            videos = [list(self.clips(high, low, variant, prompts, seed)) for prompts in sides]
            won = [pair_won(name, more, less) for more, less in zip(*videos, strict=True)]
            hits[name] = Rate(sum(won), len(won))
        return hits

    def animated(
        self, high: str, low: str, variant: Variant, prompts: Sequence[Prompt], seeds: Sequence[int]
    ) -> Animated:
        """First frames against the image, and the motion word."""
        made = [clip for seed in seeds for clip in self.clips(high, low, variant, prompts, seed, images=True)]
        first = [min(100.0, psnr(video[:, 0], self.film(scene)[:, 0]).item()) for video, scene in made]
        return Animated(Mean.of(first), score(made)["motion"])


@dataclass(frozen=True)
class Words:
    """What was seen in some clips.

    Attributes:
        shares: of the words of each clip that are right.
        explanations: of each clip, dB.
    """

    rates: Mapping[str, Rate]
    shares: tuple[float, ...]
    explanations: tuple[float, ...]

    @property
    def share(self) -> Mean:
        return Mean.of(self.shares)

    @property
    def explained(self) -> Mean:
        return Mean.of(self.explanations)


@dataclass(frozen=True)
class Animated:
    first: Mean  # dB
    motion: Rate


def _told(scene: Scene) -> Prompt:
    return scene, caption(scene, np.random.default_rng(1))


def plain(scene: Scene) -> bool:
    """Whether a scene has no look, so that a pair's words are the only ones."""
    return replace(scene, tone="plain", light="plain", time="plain", composition="plain", shot="plain") == scene
