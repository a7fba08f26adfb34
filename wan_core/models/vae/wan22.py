"""The Wan2.2 autoencoder: 4x16x16 pixels to a latent of 48 channels (TI2V-5B).

Works on pixels folded 2x2 into channels. Every level runs beside a shortcut without weights that averages pixels into
channels on the way down and spreads channels over pixels on the way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...config import VAEConfig
from .layers import Decoder, Downsample, Encoder, FrameCache, Upsample, residual_blocks
from .vae import TEMPORAL, VideoVAE

FOLD = 2
Block = tuple[int, int, int]  # frames, rows and columns


class Wan22VAE(VideoVAE):
    """Key names of ``Wan2.2_VAE.pth``: each level is a module with a list of its own."""

    fold = FOLD

    def __init__(self, config: VAEConfig) -> None:
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

    def __init__(self, in_channels: int, out_channels: int, temporal: bool | None, blocks: int) -> None:
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

    def __init__(self, in_channels: int, out_channels: int, temporal: bool | None, blocks: int) -> None:
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


def _factor(temporal: bool | None) -> Block:
    """Frames, rows and columns that one place of the smaller side stands for."""
    if temporal is None:
        return 1, 1, 1
    return (2 if temporal else 1), 2, 2


def average_down(x: torch.Tensor, out_channels: int, factor: Block) -> torch.Tensor:
    """Fold blocks of ft x fh x fw pixels into channels and average neighbouring channels down to ``out_channels``.

    Folded channels are ordered by channel, frame, row, column. A chunk whose frames do not fill the first block (that
    of the video's first frame) has black before it.
    """
    lacking = -x.shape[2] % factor[0]
    if lacking:
        x = F.pad(x, (0, 0, 0, 0, lacking, 0))
    kept = _leading(out_channels // x.shape[1], factor)
    averaged = [dim for dim, whole, part in zip((2, 4, 6), factor, kept, strict=True) if part < whole]
    blocks = _blocks(x, factor)
    if averaged:
        blocks = blocks.mean(averaged, keepdim=True)
    folded = blocks.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)  # b t h w (c ft fh fw)
    return folded.unflatten(-1, (out_channels, -1)).mean(-1).permute(0, 4, 1, 2, 3)


def add_duplicated(large: torch.Tensor, small: torch.Tensor, factor: Block) -> torch.Tensor:
    """large += small unfolded, each value of ``small`` repeated to fill the places: the reverse of ``average_down``.

    large [B, O, ft T, fh H, fw W] (without the first ft - 1 frames at the start of a video), small [B, C, T, H, W].
    The repetition is a broadcast: nothing of the size of ``large`` is made.
    """
    channels = large.shape[1]
    if small.shape[1] < channels:
        small = small.repeat_interleave(channels // small.shape[1], dim=1)
    kept = _leading(small.shape[1] // channels, factor)
    places = small.unflatten(1, (channels, *kept)).permute(0, 5, 2, 6, 3, 7, 4, 1)  # b t ft h fh w fw c
    start = large.shape[2] % factor[0]
    if start:
        _blocks(large[:, :, :start], (start, *factor[1:])).add_(places[:, :1, -start:])
    if large.shape[2] > start:
        _blocks(large[:, :, start:], factor).add_(places[:, 1 if start else 0 :])
    return large


def _blocks(x: torch.Tensor, factor: Block) -> torch.Tensor:
    """A view: b c (t ft) (h fh) (w fw) -> b t ft h fh w fw c."""
    ft, fh, fw = factor
    x = x.unflatten(4, (-1, fw)).unflatten(3, (-1, fh)).unflatten(2, (-1, ft))
    return x.permute(0, 2, 3, 4, 5, 6, 7, 1)


def _leading(count: int, factor: Block) -> Block:
    """Of a block's frames, rows and columns, those that tell ``count`` folded channels apart, the slowest first."""
    kept = []
    for size in factor:
        part = size if count >= size else 1
        count //= part
        kept.append(part)
    frames, rows, columns = kept
    return frames, rows, columns
