"""Tiny decoders of Wan latents, for previews: TAEHV by Ollin Boer Bohan (github.com/madebyollin/taehv).

``taew2_1`` decodes the 16 channels of the Wan2.1 VAE, ``taew2_2`` the 48 of the Wan2.2 VAE; LightX2V's ``lighttaew2_*``
have the same layers. They take the latents as the models see them (normalised) and give pixels in 0..1. The files name
their layers by place: ``decoder.1`` is the first convolution, ``decoder.22`` the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = 3
_BLOCKS = 3  # per stage
_PLACES = 6  # of a stage: its blocks, the enlargement, `grow`, `narrow`


@dataclass(frozen=True)
class TinyConfig:
    """``widths`` of the stages and of what follows them; ``patch``: pixels per side that one output position holds."""

    channels: int
    widths: tuple[int, ...]
    grow: tuple[int, ...]  # frames in time that a stage makes of one
    patch: int


class TinyDecoder(nn.Module):
    """One picture per latent frame, the last of the four that the full decoder would make.

    As its author does it for cheap previews, enlargement is left out where it is not asked for: in time always, in
    space as ``frames`` says.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.enter = _conv(config.channels, config.widths[0])
        widths = zip(config.widths, config.widths[1:], config.grow, strict=False)
        self.stages = nn.ModuleList(_Stage(width, after, grow) for width, after, grow in widths)
        self.leave = _conv(config.widths[-1], 3 * config.patch**2)

    @torch.no_grad()
    def frames(self, latent: Tensor, doublings: int = STAGES) -> Iterator[Tensor]:
        """[C,T,h,w] -> T pictures [3,H,W] in 0..1, with H = h * patch * 2**doublings, one after the other.

        Args:
            doublings: 0 to 3. The first stages are those that do not enlarge: there a doubling costs most.
        """
        memory: list[list[Tensor | None]] = [[None] * _BLOCKS for _ in self.stages]
        for frame in latent.to(self.enter.weight).unbind(1):
            x = F.relu(self.enter(torch.tanh(frame[None] / 3) * 3))
            for number, stage in enumerate(self.stages):
                x = stage(x, memory[number], double=number >= STAGES - doublings)
            pixels = F.pixel_shuffle(self.leave(F.relu(x)), self.config.patch)
            yield pixels[0].clamp(0, 1)


class _Stage(nn.Module):
    def __init__(self, width: int, after: int, grow: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_MemoryBlock(width) for _ in range(_BLOCKS))
        self.grow = nn.Conv2d(width, width * grow, 1, bias=False)
        self.narrow = _conv(width, after, bias=False)

    def forward(self, x: Tensor, memory: list[Tensor | None], *, double: bool) -> Tensor:
        for place, block in enumerate(self.blocks):
            x, memory[place] = block(x, memory[place]), x
        if double:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        last = self.grow.weight[-x.shape[1] :]  # of the frames it could make, the last
        return self.narrow(F.conv2d(x, last))


class _MemoryBlock(nn.Module):
    """A residual block that also sees what it was given for the frame before; nothing before the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([_conv(2 * width, width), _conv(width, width), _conv(width, width)])

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        y = torch.cat([x, torch.zeros_like(x) if before is None else before], dim=1)
        for conv in self.convs[:-1]:
            y = F.relu(conv(y))
        return F.relu(self.convs[-1](y) + x)


def _conv(inside: int, outside: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1, bias=bias)


def published_key(key: str) -> str:
    """Our key -> the files': ``stages.1.blocks.0.convs.2.weight`` -> ``decoder.9.conv.4.weight``.

    They count activations as layers too.
    """
    part, *rest = key.split(".")
    if part == "enter":
        return ".".join(["decoder.1", *rest])
    if part == "leave":
        return ".".join([f"decoder.{_PLACES * STAGES + 4}", *rest])
    first = 3 + _PLACES * int(rest[0])
    if rest[1] == "grow":
        return f"decoder.{first + 4}.conv.{rest[2]}"
    if rest[1] == "narrow":
        return f"decoder.{first + 5}.{rest[2]}"
    return f"decoder.{first + int(rest[2])}.conv.{2 * int(rest[4])}.{rest[5]}"
