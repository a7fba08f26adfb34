"""The procedural data set: clip number i of a split is a function of the split and i alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wan_core.train.data import Clip, Frame

from .captions import caption
from .world import FEW_LOOKS, Scene, film, presence, random_scene

VERSION = "2"  # of the world: part of every cached latent's name
_HELD_OUT_BUCKETS = 10  # one of so many combinations of words is never trained on


def held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the test: by its combination of shape, colour, ground and motion."""
    words = f"{scene.shape} {scene.colour} {scene.ground} {scene.motion}"
    return sum(i * ord(letter) for i, letter in enumerate(words, start=1)) % _HELD_OUT_BUCKETS == 0


def scenes(seed: int, *, test: bool) -> Iterator[tuple[Scene, str]]:
    """An endless row of scenes and captions; test scenes and training scenes never share a combination."""
    random = np.random.default_rng(seed)
    while True:
        scene = random_scene(random)
        words = caption(scene, random)
        if held_out(scene) == test:
            yield scene, words


def to_tensor(clip: np.ndarray) -> Tensor:
    """[F, H, W, 3] in 0..1 -> [3, F, H, W] in -1..1."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2).mul(2).sub(1).contiguous()


def training_clips(count: int, frame: Frame, seed: int = 0) -> list[Clip]:
    """The first clips of the training split, for the transformers."""
    rows = zip(range(count), scenes(seed, test=False), strict=False)
    return [_clip(i, scene, words, frame, seed) for i, (scene, words) in rows]


def _clip(i: int, scene: Scene, words: str, frame: Frame, seed: int) -> Clip:
    return Clip(
        name=f"scene {i}",
        prompt=words,
        key=f"nano-{VERSION}-{seed}-{i}-{frame}",
        pixels=lambda: to_tensor(film(scene, frame.frames, frame.height, frame.width)),
    )


def subject(scene: Scene, frame: Frame, stride: int) -> Tensor:
    """Where the shape is in a latent of that spatial stride, [1, T, h, w] of 0 and 1: the first frame alone, then four
    at a time, as the autoencoders see them."""
    seen = presence(scene, frame.frames, frame.height, frame.width)
    mask = torch.from_numpy(seen).float()[None, None]
    parts = [mask[:, :, :1]] + [mask[:, :, i : i + 4] for i in range(1, mask.shape[2], 4)]
    return torch.cat([F.max_pool3d(part, (part.shape[2], stride, stride)) for part in parts], dim=2)[0]


class RandomClips:
    """Fresh clips for the autoencoders: (generator, frames) -> [3, frames, H, W], a part of a film.

    Args:
        looks: see ``random_scene``.
        vivid: how often the colours are saturated whatever else the scene is.
    """

    def __init__(self, frame: Frame, looks: tuple[float, ...] = FEW_LOOKS, vivid: float = 0.0):
        self.frame, self.looks, self.vivid = frame, looks, vivid

    def __call__(self, generator: torch.Generator, frames: int) -> Tensor:
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        scene = random_scene(random, self.looks)
        while held_out(scene):
            scene = random_scene(random, self.looks)
        if self.vivid and random.random() < self.vivid:
            scene = replace(scene, tone="saturated")
        whole = film_part(scene, self.frame, frames, random)
        return to_tensor(whole)


def film_part(scene: Scene, frame: Frame, frames: int, random: np.random.Generator) -> np.ndarray:
    """Some consecutive frames of the whole film of a scene."""
    from .world import moments, picture

    start = int(random.integers(0, frame.frames - frames + 1))
    return np.stack(
        [picture(scene, moment, frame.height, frame.width) for moment in moments(frame.frames)[start : start + frames]]
    )
