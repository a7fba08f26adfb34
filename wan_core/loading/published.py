"""The published models as their headers tell of them, with no file behind: for plans before anything is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..config import VAES, Architecture, TextConfig, VAEConfig, VAEKind, Variant
from ..files.checkpoint import Checkpoint
from ..files.marks import TensorInfo
from ..models.dit.dit import WanDiT
from ..models.dit.features.clip_tokens import PICTURE_TOKENS, ClipTokensConfig
from ..models.text.umt5 import Umt5Encoder
from .dit import DiTFile
from .file import ModelFile
from .text import TextFile
from .vae import VAE_CLASSES, VAEFile


class Depth(NamedTuple):
    """What goes with a width of the published transformers."""

    ffn_dim: int
    layers: int


_DEPTHS = {5120: Depth(13824, 40), 3072: Depth(14336, 30), 1536: Depth(8960, 30)}
VAE_CONFIGS: dict[VAEKind, VAEConfig] = {
    "wan2.1": VAEConfig("wan2.1", VAES["wan2.1"].channels, 96, 96),
    "wan2.2": VAEConfig("wan2.2", VAES["wan2.2"].channels, 160, 256),
}
TEXT_CONFIG = TextConfig(256384, 4096, 4096, 10240, heads=64, layers=24)  # umT5-XXL's encoder


def architecture_of(variant: Variant) -> Architecture:
    """The published dimensions of a variant."""
    depth = _DEPTHS[variant.dim]
    pictures = ClipTokensConfig(positions=2 * PICTURE_TOKENS if variant.clip == 2 else 0)
    return Architecture(
        variant.in_channels,
        VAES[variant.vae].channels,
        variant.dim,
        depth.ffn_dim,
        depth.layers,
        text_dim=TEXT_CONFIG.dim,
        freq_dim=256,
        heads=variant.dim // 128,
        features=(pictures,) if variant.clip else (),
    )


def published_dit(variant: Variant, level: str) -> DiTFile:
    """An expert in bfloat16; ``level`` is "high", "low", or "only"."""
    config = architecture_of(variant)
    noise = "" if level == "only" else f"_{level}_noise"
    return _file(f"{variant.task}{noise}_as_published", lambda: WanDiT(config), config, torch.bfloat16)


def published_vae(variant: Variant) -> VAEFile:
    """In float32, as the official ``.pth`` files."""
    config = VAE_CONFIGS[variant.vae]
    return _file(VAES[variant.vae].checkpoint, lambda: VAE_CLASSES[config.kind](config), config, torch.float32)


def published_text_encoder() -> TextFile:
    """umT5-XXL's encoder in bfloat16; it has no tokenizer, so nothing can be encoded with it."""
    file = _file("umt5_xxl_as_published", lambda: Umt5Encoder(TEXT_CONFIG), TEXT_CONFIG, torch.bfloat16)
    return TextFile(**vars(file), tokenizer=b"")


def _file(name: str, make: Callable[[], nn.Module], config: object, stored: torch.dtype) -> ModelFile:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in make().state_dict().items()}
    path = Path(name)
    checkpoint = Checkpoint(path, {key: TensorInfo(shape, stored, path) for key, shape in shapes.items()}, {})
    return ModelFile(checkpoint, {key: key for key in shapes}, config, ())
