"""Normalised attention guidance (Chen et al. 2025, arXiv 2505.21179): a negative prompt within text attention.

What a token hears of the positive text is moved away from what it hears of the negative one, its size is kept in
bounds, and a part of that is mixed in. It needs the keys and values of a second text, and no second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .layers import SLICE, out_of_place


@dataclass(frozen=True)
class Nag:
    """
    Attributes:
        scale: how far away from the negative prompt; at 1 nothing is moved.
        tau: how much larger a token's answer may become, as a ratio of L1 norms over all heads.
        alpha: the part of the result in what is passed on.
    """

    scale: float
    tau: float
    alpha: float

    def steered(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Two answers of attention [B, L, heads, head_dim] -> the guided one; in inference it overwrites the first.

        The elements are rounded to their own dtype after each of three passes, each computed in float32; the norms are
        float32.
        """
        if out_of_place():
            moved, share = self._moved(positive, negative)
            return torch.addcmul(positive * (1 - self.alpha), moved, share.to(positive.dtype))
        for part, other in zip(positive.split(SLICE, dim=1), negative.split(SLICE, dim=1), strict=True):
            self._steer_(part, other)
        return positive

    def _steer_(self, positive: torch.Tensor, negative: torch.Tensor) -> None:
        moved, share = self._moved(positive, negative)
        positive.mul_(1 - self.alpha).addcmul_(moved, share)

    def _moved(self, positive: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is mixed in, and how much of it, [B, L, 1, 1]: less where it has become too large."""
        moved = torch.lerp(negative, positive, self.scale)
        growth = _size(moved) / _size(positive).clamp(min=1e-12)
        return moved, self.alpha * (self.tau / growth.clamp(min=1e-12)).clamp(max=1)


class Opposite(NamedTuple):
    """The negative text's keys and values [B, L, heads, head_dim] in one block."""

    keys: torch.Tensor
    values: torch.Tensor
    nag: Nag


def _size(x: torch.Tensor) -> torch.Tensor:
    """L1 norm of each token, over heads and their width, float32."""
    return torch.linalg.vector_norm(x, ord=1, dim=(-2, -1), keepdim=True, dtype=torch.float32)
