"""What is measured: the parts, their dimensions and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from wan_core.config import VAES, Architecture, VAEConfig

from . import peers

Inputs = tuple[torch.Tensor, ...]
Call = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One measured operation: a DiT's forward, or one direction of a VAE.

    ``size`` is frames, height and width: of the latent for a DiT, in pixels for a VAE. ``tolerance`` is the largest
    difference to our answer that a contender may have to be measured at all, relative to the largest value.
    """

    name: str
    config: Architecture | VAEConfig
    size: tuple[int, int, int]
    text_length: int = 0
    tolerance: float = 1e-4

    @property
    def group(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def contenders(self) -> list[str]:
        return list(peers.DITS if self.group == "dit" else peers.VAES)

    def inputs(self) -> Inputs:
        return self._inputs(self.size, self.text_length)

    def smallest_inputs(self) -> Inputs:
        """Enough to run every layer once."""
        return self._inputs((5, 32, 32) if self.group != "dit" else (1, 2, 2), 1)

    def _inputs(self, size: tuple[int, int, int], text_length: int) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        frames, height, width = size
        if isinstance(self.config, Architecture):
            x = torch.randn(1, self.config.in_channels, *size, generator=generator)
            return x, torch.tensor([500.0]), torch.randn(1, text_length, self.config.text_dim, generator=generator)
        if self.name.endswith("encode"):
            return (torch.rand(1, 3, *size, generator=generator).mul_(2).sub_(1),)
        stride = VAES[self.config.kind].spatial_stride
        shape = (1, self.config.channels, (frames + 3) // 4, height // stride, width // stride)
        return (torch.randn(shape, generator=generator),)

    def weights(self) -> peers.Weights:
        return peers.dit_weights(self.config) if self.group == "dit" else peers.vae_weights(self.config)

    def build(self, contender: str, weights: peers.Weights) -> Call:
        if self.group == "dit":
            return peers.DITS[contender](self.config, weights)
        coder = peers.VAES[contender](self.config, weights)
        return coder.encode if self.name.endswith("encode") else coder.decode

    def describe(self) -> str:
        c, (frames, height, width) = self.config, self.size
        if isinstance(c, Architecture):
            tokens = frames * height * width // 4
            return (
                f"dim {c.dim}, ffn {c.ffn_dim}, {c.heads} heads, {c.layers} layers, {tokens} tokens, "
                f"text {self.text_length}x{c.text_dim}"
            )
        return f"widths {c.encoder_dim}/{c.decoder_dim}, latent channels {c.channels}, {frames} frames {width}x{height}"


def _vae(group: str, config: VAEConfig, size: tuple[int, int, int]) -> list[Part]:
    return [Part(f"{group} {direction}", config, size) for direction in ("encode", "decode")]


FULL = (
    Part("dit forward", Architecture(16, 16, 1536, 8960, 6, 4096, 256, heads=12), (5, 32, 32), 512, tolerance=2e-5),
    *_vae("vae21", VAEConfig("wan2.1", 16, 96, 96), (5, 96, 96)),
    *_vae("vae22", VAEConfig("wan2.2", 48, 160, 256), (5, 96, 96)),
)
QUICK = (
    Part("dit forward", Architecture(16, 16, 256, 512, 2, 64, 256, heads=2), (3, 8, 8), 32, tolerance=2e-5),
    *_vae("vae21", VAEConfig("wan2.1", 16, 16, 16), (5, 32, 48)),
    *_vae("vae22", VAEConfig("wan2.2", 48, 16, 32), (5, 32, 48)),
)
GROUPS = ("dit", "vae21", "vae22")


def select(quick: bool, group: str | None) -> list[Part]:
    return [part for part in (QUICK if quick else FULL) if group in (None, part.group)]


def named(quick: bool, name: str) -> Part:
    return next(part for part in select(quick, None) if part.name == name)
