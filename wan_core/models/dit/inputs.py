"""What a transformer is told beside text, as data: each kind a small class; those of a feature are in its own file."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Concat:
    """Channels that stand behind the noisy latent's own.

    Attributes:
        channels: [B, c, T, h, w]; of image-to-video models the mask (4) and the latent of the known frames (16).
    """

    channels: torch.Tensor


def with_channels(x: torch.Tensor, inputs: tuple) -> torch.Tensor:
    """A noisy latent [B, C, T, h, w] -> [B, C_in, T, h, w], with the channels that these inputs bring."""
    brought = [one.channels.to(x) for one in inputs if isinstance(one, Concat)]
    return torch.cat([x, *(part.expand(len(x), *part.shape[1:]) for part in brought)], dim=1) if brought else x
