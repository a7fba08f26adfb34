"""The official models' widths and their largest videos."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from wan_core.config import Architecture

from .card import Card

A14B = Architecture(16, 16, 5120, 13824, layers=40, text_dim=4096, freq_dim=256, heads=40)
TI2V = Architecture(48, 48, 3072, 14336, layers=30, text_dim=4096, freq_dim=256, heads=24)
TINY = Architecture(16, 16, 256, 512, layers=2, text_dim=64, freq_dim=256, heads=2)


@dataclass(frozen=True)
class Size:
    """A model at a latent of so many frames, rows and columns."""

    name: str
    config: Architecture
    latent: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.latent
        return frames * rows * columns // 4

    def shortened(self, layers: int) -> Size:
        return replace(self, config=replace(self.config, layers=layers))

    def inputs(self, card: Card) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latent, timestep and text."""
        torch.manual_seed(1)
        x = card.randn(1, self.config.in_channels, *self.latent, dtype=torch.float32)
        text = card.randn(1, 512, self.config.text_dim, dtype=torch.float32)
        return x, torch.tensor([500.0], device=card.device), text

    def block_flops(self) -> float:
        d, f, n = self.config.dim, self.config.ffn_dim, self.tokens
        return 12.0 * n * d * d + 4.0 * n * d * f + 4.0 * n * n * d + 4.0 * n * 512 * d


A14B_720P = Size("A14B 720p", A14B, (21, 90, 160))
A14B_480P = Size("A14B 480p", A14B, (21, 60, 104))
TI2V_704P = Size("TI2V-5B 704p", TI2V, (31, 44, 80))


def sizes(card: Card) -> list[Size]:
    return [Size("tiny", TINY, (3, 8, 8))] if card.quick else [A14B_720P, A14B_480P, TI2V_704P]
