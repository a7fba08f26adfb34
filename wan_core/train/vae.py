"""Full training of the video autoencoders: their whole-clip forward with gradients, the losses, the calibration.

The layers are those of inference. A whole clip is one chunk to them, so nothing is cached; pixels are not clamped,
because a clamp has no gradient where it acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..loading.vae import VAE_CLASSES
from ..models.vae.layers import AttentionBlock, CausalConv3d, FrameCache, ResidualBlock
from ..models.vae.vae import LATENT_MEAN, LATENT_STD, VideoVAE, fold_pixels, unfold_pixels
from .precision import autocast, resolve_precision


def moments(vae: VideoVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Video [B, 3, F, H, W] -> mean and log variance of the raw latent, [B, C, T, h, w], float32."""
    x = vae.conv1(vae.encoder(fold_pixels(video, vae.fold), FrameCache()))
    mean, log_variance = x.float().chunk(2, dim=1)
    return mean, log_variance.clamp(-30, 20)


def pixels(vae: VideoVAE, raw: Tensor) -> Tensor:
    """Raw latent [B, C, T, h, w] -> video [B, 3, F, H, W], float32, not clamped."""
    x = vae.conv2(raw.contiguous(memory_format=torch.channels_last_3d))
    return unfold_pixels(vae.decoder(x, FrameCache()), vae.fold).float()


@dataclass(frozen=True)
class Losses:
    """Weights of the parts of the loss.

    Attributes:
        colour: of the differences R-G and B-Y, where a lost hue shows that the mean over channels hides.
        edge: of the differences between neighbouring pixels and frames: outlines, and so shapes and motion.
        square: of the squared error, what PSNR counts.
        kl: keeps the latent's channels near a normal distribution.
    """

    colour: float = 0.5
    edge: float = 1.0
    square: float = 2.0
    kl: float = 1e-5

    def __call__(self, made: Tensor, wanted: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
        error = made - wanted
        red, green, blue = error.unbind(1)
        loss = error.abs().mean() + self.square * error.square().mean()
        loss = loss + self.colour * ((red - green).abs().mean() + (blue - (red + green) / 2).abs().mean())
        edges = sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4) if error.shape[axis] > 1)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return loss + self.edge * edges + self.kl * kl


@dataclass(frozen=True)
class Phase:
    """A part of the run: clips of so many frames, cut to so many pixels a side, ``batch`` of them a step."""

    until: float  # fraction of the steps
    frames: int
    side: int
    batch: int


@dataclass(frozen=True)
class VAERecipe:
    phases: Sequence[Phase]
    steps: int
    losses: Losses = Losses()
    noise: float = 1.0  # of the latent's sampled deviation
    precision: str = "auto"

    def phase(self, step: int) -> Phase:
        return next(phase for phase in self.phases if step < phase.until * self.steps or phase is self.phases[-1])


class VAETask:
    """An autoencoder in training: the ``Task`` of ``loop.train``.

    Args:
        clips: (generator, frames) -> a clip [3, frames, H, W] in -1..1.
        key: of the data.
    """

    def __init__(
        self,
        vae: VideoVAE,
        clips: Callable[[torch.Generator, int], Tensor],
        key: str,
        recipe: VAERecipe,
        sampler: Callable[[int, Path], None] | None = None,
    ):
        self.vae, self.clips, self.key, self.recipe, self.sampler = vae, clips, key, recipe, sampler
        self.device = next(vae.parameters()).device
        self.precision = resolve_precision(recipe.precision, self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.vae.named_parameters())

    def describe(self) -> dict[str, object]:
        return {
            "vae": self.vae.config,
            "data": self.key,
            "precision": self.precision,
            "phases": self.recipe.phases,
            "losses": self.recipe.losses,
            "latent_noise": self.recipe.noise,
        }

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        phase = self.recipe.phase(batch)
        wanted = torch.stack([self._cut(phase, generator) for _ in range(phase.batch)]).to(self.device)
        with autocast(self.precision, self.device):
            mean, log_variance = moments(self.vae, wanted)
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            made = pixels(self.vae, mean + self.recipe.noise * noise * (0.5 * log_variance).exp())
        loss = self.recipe.losses(made, wanted, mean, log_variance)
        return loss, {"psnr": psnr(made.detach().clamp(-1, 1), wanted).item()}

    def sample(self, step: int, folder: Path) -> None:
        if self.sampler:
            self.sampler(step, folder)

    def _cut(self, phase: Phase, generator: torch.Generator) -> Tensor:
        clip = self.clips(generator, phase.frames)
        top, left = (
            int(torch.randint(max(1, side - phase.side + 1), (), generator=generator)) for side in clip.shape[2:]
        )
        return clip[:, :, top : top + phase.side, left : left + phase.side]


def psnr(made: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pixels in -1..1."""
    return -10 * torch.log10(((made - wanted) / 2).square().mean())


def new_vae(config: VAEConfig, seed: int) -> VideoVAE:
    """Fresh weights that begin near a plain resizing of the picture.

    Residual branches and attention answer 0, kernels see no past, resamplers average and repeat: what is left at the
    start is a linear path from pixels to latent and back that has only to be tuned.
    """
    vae = VAE_CLASSES[config.kind](config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):
                _start_convolution(module, generator)
        for name, module in vae.named_modules():
            if isinstance(module, ResidualBlock):
                cast(CausalConv3d, module.residual["6"]).weight.mul_(0.0)
            if isinstance(module, AttentionBlock):
                module.proj.weight.mul_(0.0)
            if name.endswith("resample.1"):
                _start_resampler(module)
            if name.endswith("time_conv"):
                _start_time(module)
    return vae


def _start_convolution(conv: nn.Conv2d | nn.Conv3d, generator: torch.Generator) -> None:
    """Variance kept; a causal kernel sees the present alone."""
    taps = math.prod(conv.kernel_size[-2:])
    scale = (conv.in_channels * taps) ** -0.5
    conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * scale)
    if conv.bias is not None:
        conv.bias.zero_()
    if isinstance(conv, CausalConv3d):
        conv.weight[:, :, :-1] = 0


def _start_resampler(conv: nn.Conv2d) -> None:
    """Down: the mean of 2x2 pixels of the same channel. Up: the pixel itself, neighbouring channels summed."""
    conv.weight.zero_()
    group = conv.in_channels // conv.out_channels
    for out in range(conv.out_channels):
        for source in range(out * group, (out + 1) * group):
            if conv.stride[0] == 2:
                conv.weight[out, source, :2, :2] = 0.25
            else:
                conv.weight[out, source, 1, 1] = group**-0.5


def _start_time(conv: nn.Conv3d) -> None:
    """Down: the mean of a pair of frames. Up: the frame, twice."""
    conv.weight.zero_()
    width = conv.in_channels
    for i in range(width):
        if conv.stride[0] == 2:
            conv.weight[i, i, 1:, 0, 0] = 0.5
        else:
            conv.weight[i, i, -1, 0, 0] = conv.weight[width + i, i, -1, 0, 0] = 1.0


@torch.no_grad()
def calibrate(vae: VideoVAE, videos: Sequence[Tensor]) -> None:
    """Give the raw latent the mean and deviation per channel that every program normalises it by.

    A linear change of the latent's channels, undone at the decoder's entrance: the whole stays the same.
    """
    raw = torch.cat([moments(vae, video)[0].movedim(1, 0).flatten(1) for video in videos], dim=1)
    wanted_mean, wanted_std = (raw.new_tensor(table[vae.config.kind]) for table in (LATENT_MEAN, LATENT_STD))
    scale = wanted_std / raw.std(dim=1).clamp(min=1e-4)
    shift = wanted_mean - scale * raw.mean(dim=1)
    channels = vae.config.channels
    out, back = cast(Tensor, vae.conv1.bias), cast(Tensor, vae.conv2.bias)
    vae.conv1.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    out[:channels] = out[:channels] * scale + shift
    out[channels:] += 2 * scale.log()
    vae.conv2.weight /= scale.view(1, -1, 1, 1, 1)
    back -= vae.conv2.weight.flatten(1) @ shift


@torch.no_grad()
def reconstruct(vae: VideoVAE, video: Tensor) -> Tensor:
    """[3, F, H, W] -> the same through the autoencoder, as in inference."""
    return vae.decode(vae.encode(video[None]))[0]
