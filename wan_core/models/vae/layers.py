"""Layers of the causal video autoencoders, working on one chunk of frames at a time.

Facts from the official ``wan/modules/vae2_1.py`` and ``vae2_2.py``; module names are those of the official checkpoints.
Tensors are [B, C, T, H, W] with channels innermost in memory (``torch.channels_last_3d``): convolutions then need no
layout copies, the norm over channels reads contiguous rows, and a pixel's channels are an attention token as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

PAST = 2  # frames before the present that a temporal kernel of 3 sees


class FrameCache:
    """What the causal layers remember of earlier chunks, for one pass over one video, under the layer itself.

    ``first`` is true during the first chunk of the video, which the resamplers treat apart.
    """

    def __init__(self) -> None:
        self.first = True
        self._frames: dict[nn.Module, torch.Tensor] = {}

    def take(self, layer: nn.Module) -> torch.Tensor | None:
        """The frames that a layer kept, handed over; None if it kept none yet."""
        return self._frames.pop(layer, None)

    def keep(self, layer: nn.Module, frames: torch.Tensor) -> None:
        """Remember a copy, so that the chunk they are a part of can be freed."""
        self._frames[layer] = frames.clone()

    def move(self, device: torch.device) -> None:
        """Take what is remembered to another device."""
        self._frames = {layer: frames.to(device) for layer, frames in self._frames.items()}

    def clear(self) -> None:
        """Forget everything: the video is over."""
        self._frames = {}


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees the present frame and the two before it; before the video there is black.

    Its input is a window: the present chunk behind the last two frames of its past, in one tensor that the layer
    before writes into, so that nothing is concatenated or padded.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int]) -> None:
        self.border = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, padding=self.border)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:  # type: ignore[override]
        window = self.open_window(x, cache)
        window[:, :, -x.shape[2] :] = x
        self.remember(window, cache)
        return self.convolve(window)

    def open_window(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, C, 2 + T, H, W] with the past filled in, the present not.

        A single frame without a past gets a window of its own size: black frames need not be multiplied.
        """
        past = cache.take(self)
        b, c, t, h, w = x.shape
        frames = t if past is None and t == 1 else PAST + t
        window = x.new_empty(b, frames, h, w, c).permute(0, 4, 1, 2, 3)
        if frames > t:
            black = PAST if past is None else PAST - past.shape[2]
            window[:, :, :black] = 0
            if past is not None:
                window[:, :, black:PAST] = past
        return window

    def remember(self, window: torch.Tensor, cache: FrameCache) -> None:
        """Keep the last two frames of a filled window for the next chunk; the only one, where it has no past."""
        cache.keep(self, window[:, :, -PAST:])

    def convolve(self, window: torch.Tensor) -> torch.Tensor:
        """[B, C, 2 + T, H, W] -> [B, C', T, H, W]; a window of one frame meets the kernel's last slice alone."""
        if window.shape[2] > 1:
            return conv3d(_cheaper_layout(window, self.weight), self.weight, self.bias, padding=self.border)
        frame, weight = window[:, :, 0], self.weight[:, :, -1]
        return F.conv2d(_cheaper_layout(frame, weight), weight, self.bias, padding=self.border[1:])[:, :, None]


def conv3d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    padding: tuple[int, int, int] = (0, 0, 0),
    stride: tuple[int, int, int] = (1, 1, 1),
) -> torch.Tensor:
    """``F.conv3d``. Where PyTorch would take a path that needs several times the memory, cuDNN is asked directly."""
    if x.device.type != "cuda" or x.dtype not in (torch.float16, torch.bfloat16) or not _passes_cudnn_by():
        return F.conv3d(x, weight, bias, stride=stride, padding=padding)
    return _by_cudnn(x, weight, bias, padding, stride)


def _by_cudnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    padding: tuple[int, int, int],
    stride: tuple[int, int, int],
) -> torch.Tensor:
    product = torch.cudnn_convolution(
        x, weight, padding, stride, (1, 1, 1), 1, benchmark=False, deterministic=False, allow_tf32=True
    )
    return product if bias is None else product.add_(bias.view(1, -1, 1, 1, 1))


@lru_cache(maxsize=1)
def _passes_cudnn_by() -> bool:
    """PyTorch 2.9 and 2.10 with cuDNN from 9.10.2 up to 9.15: there ComfyUI asks cuDNN for half-precision 3D
    convolutions too, because PyTorch's own choice takes far more memory.
    """
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():
        return False
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return (2, 9) <= version <= (2, 10) and 91002 <= torch.backends.cudnn.version() < 91500


def _cheaper_layout(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PyTorch copies a convolution's weight into the layout of its input: hand it the smaller of the two to copy."""
    return x.contiguous() if x.numel() < weight.numel() else x


class PointConv3d(nn.Conv3d):
    """A 1x1x1 convolution: with channels innermost in memory, one matrix product."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(_channels_last(x), self).permute(0, 4, 1, 2, 3)


class RMSNorm(nn.Module):
    """Scales the channels of each pixel to root mean square one, then by gamma."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[..., C] -> [..., C], into ``out`` if given."""
        if torch.is_grad_enabled():
            inverse = x.float().square().mean(-1, keepdim=True).clamp_min(1e-24 / x.shape[-1]).rsqrt()
            return (x * inverse * self.gamma.flatten()).to(x.dtype)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = (x.shape[-1] ** 0.5 / size.clamp_min_(1e-12)).to(x.dtype)
        return torch.mul(x, factor, out=out).mul_(self.gamma.flatten())


def norm_silu(norm: RMSNorm, conv: CausalConv3d, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
    """silu(norm(x)), written straight into the window of the convolution that follows."""
    window = conv.open_window(x, cache)
    now = window[:, :, -x.shape[2] :]
    if torch.is_grad_enabled():
        _channels_last(now).copy_(F.silu(norm(_channels_last(x))))
    else:
        norm(_channels_last(x), out=_channels_last(now))
        F.silu(now, inplace=True)
    conv.remember(window, cache)
    return window


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 4, 1)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels, 3),
                "2": CausalConv3d(in_channels, out_channels, (3, 3, 3)),
                "3": RMSNorm(out_channels, 3),
                "6": CausalConv3d(out_channels, out_channels, (3, 3, 3)),
            }
        )
        self.shortcut = PointConv3d(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        norm1, conv1, norm2, conv2 = cast("Sequence[Any]", self.residual.values())
        h = norm_silu(norm1, conv1, x, cache)
        h = conv1.convolve(h)
        h = norm_silu(norm2, conv2, h, cache)
        h = conv2.convolve(h)
        return h.add_(x if self.shortcut is None else self.shortcut(x))


def residual_blocks(in_channels: int, out_channels: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count)]


class AttentionBlock(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        tokens = _channels_last(x).flatten(2, 3)[:, :, None].flatten(0, 1)  # b t h w c -> (b t) 1 (h w) c
        q, k, v = _linear(self.norm(tokens), self.to_qkv).chunk(3, dim=-1)
        out = _linear(F.scaled_dot_product_attention(q, k, v), self.proj).view(_channels_last(x).shape)
        return out.permute(0, 4, 1, 2, 3).add_(x)


def _linear(tokens: torch.Tensor, conv: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


def _frames_as_batch(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W], channels innermost in memory."""
    return _channels_last(x).contiguous().flatten(0, 1).permute(0, 3, 1, 2)


def _batch_as_frames(x: torch.Tensor, batch: int) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).unflatten(0, (batch, -1)).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Halves height and width and, if ``temporal``, the frames after the first of the video."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        conv = cast(nn.Conv2d, self.resample["1"])
        padded = F.pad(_frames_as_batch(x), (0, 1, 0, 1))
        small = _batch_as_frames(conv(_cheaper_layout(padded, conv.weight)), x.shape[0])
        return small if self.time_conv is None else self._halve_frames(self.time_conv, small, cache)

    def _halve_frames(self, conv: nn.Conv3d, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """The video's first frame stays; every later pair is convolved with the frame before it."""
        past = cache.take(self)
        cache.keep(self, x[:, :, -1:])
        if past is not None:
            return _halved(conv, torch.cat([past, x], 2))
        return x if x.shape[2] == 1 else torch.cat([x[:, :, :1], _halved(conv, x)], 2)


def _halved(conv: nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
    return conv3d(x, conv.weight, conv.bias, stride=(2, 1, 1))


class Upsample(nn.Module):
    """Doubles height and width and, if ``temporal``, the frames after the first of the video."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(in_channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, cache)
        conv = cast(nn.Conv2d, self.resample["1"])
        large = F.interpolate(_frames_as_batch(x), scale_factor=2.0, mode="nearest-exact")
        return _batch_as_frames(conv(_cheaper_layout(large, conv.weight)), x.shape[0])

    def _double_frames(self, conv: CausalConv3d, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """The video's first frame stays and is not seen by the convolution of the later ones."""
        if cache.first:
            first, x = x[:, :, :1], x[:, :, 1:]
            return first if x.shape[2] == 0 else torch.cat([first, _pairs(conv, x, cache)], 2)
        return _pairs(conv, x, cache)


def _pairs(conv: CausalConv3d, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
    pairs = _channels_last(conv(x, cache)).unflatten(-1, (2, -1))  # b t h w (2 c)
    return pairs.permute(0, 1, 4, 2, 3, 5).flatten(1, 2).permute(0, 4, 1, 2, 3)


class Encoder(nn.Module):
    """Pixels to the distribution of the latent; ``downsamples`` holds what differs between the two autoencoders."""

    def __init__(
        self, in_channels: int, widths: Sequence[int], out_channels: int, downsamples: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[0], (3, 3, 3))
        self.downsamples = nn.ModuleList(downsamples)
        self.middle = _middle(widths[-1])
        self.head = _head(widths[-1], out_channels)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        x = self.conv1(x, cache)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, cache)
        return _run_head(self.head, x, cache)


class Decoder(nn.Module):
    """Latent to pixels; ``upsamples`` holds what differs between the two autoencoders."""

    def __init__(
        self, in_channels: int, widths: Sequence[int], out_channels: int, upsamples: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        self.upsamples = nn.ModuleList(upsamples)
        self.head = _head(widths[-1], out_channels)

    def forward(self, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        x = self.conv1(x, cache)
        for layer in [*self.middle, *self.upsamples]:
            x = layer(x, cache)
        return _run_head(self.head, x, cache)


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width)])


def _head(width: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": RMSNorm(width, 3), "2": CausalConv3d(width, out_channels, (3, 3, 3))})


def _run_head(head: nn.ModuleDict, x: torch.Tensor, cache: FrameCache) -> torch.Tensor:
    norm, conv = cast("Sequence[Any]", head.values())
    x = norm_silu(norm, conv, x, cache)
    return conv.convolve(x)
