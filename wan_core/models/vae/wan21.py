"""The Wan2.1 autoencoder: 4x8x8 pixels to a latent of 16 channels (T2V-A14B, I2V-A14B and the Wan2.1 family)."""

from __future__ import annotations

from torch import nn

from ...config import VAEConfig
from .layers import Decoder, Downsample, Encoder, Upsample, residual_blocks
from .vae import TEMPORAL, VideoVAE


class Wan21VAE(VideoVAE):
    """Key names of ``Wan2.1_VAE.pth``: the layers of all levels follow each other in one list."""

    fold = 1

    def __init__(self, config: VAEConfig) -> None:
        encoder_widths = [config.encoder_dim * m for m in (1, *config.multipliers)]
        decoder_widths = [config.decoder_dim * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        super().__init__(
            config,
            Encoder(3, encoder_widths, 2 * config.channels, _downsamples(encoder_widths, config.blocks)),
            Decoder(config.channels, decoder_widths, 3, _upsamples(decoder_widths, config.blocks + 1)),
        )


def _downsamples(widths: list[int], blocks: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for level, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += residual_blocks(width_in, width, blocks)
        if level < len(TEMPORAL):
            layers.append(Downsample(width, TEMPORAL[level]))
    return layers


def _upsamples(widths: list[int], blocks: int) -> list[nn.Module]:
    """Each upsampler also halves the channels, so that all levels but the first begin with half the width before."""
    layers: list[nn.Module] = []
    for level, (width_in, width) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        layers += residual_blocks(width_in if level == 0 else width_in // 2, width, blocks)
        if level < len(TEMPORAL):
            layers.append(Upsample(width, width // 2, TEMPORAL[-1 - level]))
    return layers
