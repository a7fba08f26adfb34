"""The Wan2.2 autoencoder: 4x16x16 pixels to a latent of 48 channels (TI2V-5B).

Works on pixels folded 2x2 into channels. Every level runs beside a shortcut without weights that averages pixels into
channels on the way down and spreads channels over pixels on the way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..config import VAEConfig
from .vae import TEMPORAL, VideoVAE
from .vae_layers import Decoder, Downsample, Encoder, FrameCache, Upsample, residual_blocks

FOLD = 2


class Wan22VAE(VideoVAE):
    """Key names of ``Wan2.2_VAE.pth``: each level is a module with a list of its own."""

    fold = FOLD

    def __init__(self, config: VAEConfig):
        encoder_widths = [config.encoder_dim * m for m in (1, *config.multipliers)]
        decoder_widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        downsamples = _levels(DownLevel, encoder_widths, config.blocks, TEMPORAL)
        upsamples = _levels(UpLevel, decoder_widths, config.blocks + 1, TEMPORAL[::-1])
        pixel = 3 * FOLD**2
        super().__init__(
            config,
            Encoder(pixel, encoder_widths, 2 * config.channels, downsamples),
            Decoder(config.channels, decoder_widths, pixel, upsamples),
        )


def _levels(level: type[nn.Module], widths: list[int], blocks: int, temporal: tuple[bool, ...]) -> list[nn.Module]:
    """One level for each width after the first; the last one resamples nothing."""
    resampling = [*temporal, None]
    return [level(*row, blocks) for row in zip(widths[:-1], widths[1:], resampling, strict=True)]


class DownLevel(nn.Module):
    """Residual blocks and a downsampler (``temporal`` None: none) beside averaged pixels."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool | None, blocks: int):
        super().__init__()
        self.factor = _factor(temporal)
        self.out_channels = out_channels
        layers = residual_blocks(in_channels, out_channels, blocks)
        if temporal is not None:
            layers.append(Downsample(out_channels, temporal))
        self.downsamples = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        h = x
        for layer in self.downsamples:
            h = layer(h, cache)
        return h.add_(average_down(x, self.out_channels, self.factor))


class UpLevel(nn.Module):
    """Residual blocks and an upsampler beside spread channels (``temporal`` None: neither)."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool | None, blocks: int):
        super().__init__()
        self.factor = _factor(temporal)
        layers = residual_blocks(in_channels, out_channels, blocks)
        self.resamples = temporal is not None
        if temporal is not None:
            layers.append(Upsample(out_channels, out_channels, temporal))
        self.upsamples = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        h = x
        for layer in self.upsamples:
            h = layer(h, cache)
        return add_duplicated(h, x, self.factor) if self.resamples else h


def _factor(temporal: bool | None) -> tuple[int, int, int]:
    """Frames, rows and columns that one place of the smaller side stands for."""
    if temporal is None:
        return 1, 1, 1
    return (2 if temporal else 1), 2, 2


def average_down(x: torch.Tensor, out_channels: int, factor: tuple[int, int, int]) -> torch.Tensor:
    """Fold blocks of ft x fh x fw pixels into channels and average neighbouring channels down to ``out_channels``.

    A chunk whose frames do not fill the first block (that of the video's first frame) has black before it.
    """
    ft, fh, fw = factor
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % ft, 0))
    b, c, t, h, w = x.shape
    blocks = x.view(b, c, t // ft, ft, h // fh, fh, w // fw, fw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(b, t // ft, h // fh, w // fw, out_channels, -1).mean(-1).permute(0, 4, 1, 2, 3)


def add_duplicated(large: torch.Tensor, small: torch.Tensor, factor: tuple[int, int, int]) -> torch.Tensor:
    """large += small, each pixel of which covers a block of ft x fh x fw: the inverse folding of ``average_down``.

    large [B, O, ft T, fh H, fw W] (without the first ft - 1 frames at the start of a video), small [B, C, T, H, W].
    Each channel of ``small`` fills O ft fh fw / C places, in the order of output channel, frame, row, column.
    """
    ft, fh, fw = factor
    b, c, t, h, w = small.shape
    out_channels = large.shape[1]
    repeats = out_channels * ft * fh * fw // c
    spread = small.repeat_interleave(repeats, dim=1).view(b, out_channels, ft, fh, fw, t, h, w)
    spread = spread.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, out_channels, t * ft, h * fh, w * fw)
    return large.add_(spread[:, :, -large.shape[2] :])
