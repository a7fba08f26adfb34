"""Adapters that turn a weight's rows instead of adding to them: OFT and BOFT, as LyCORIS writes them.

At strengths other than 1 they do what ComfyUI does, which is no interpolation of the angle: OFT adds the strength's
square of what 1 adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .adapters import Adapter, Shapes

_MOST_STAGES = 32  # each doubles the number of rows that are mixed


def rotations(blocks: Tensor, limit: float | None) -> Tensor:
    """Cayley's rotations (I + Q)(I − Q)⁻¹ of the skew parts Q of blocks [..., n, n], float32.

    Args:
        limit: what the length of all Q together may be at most; 0 and None mean any.

    Raises:
        ValueError: the blocks hold infinite numbers or none.
    """
    blocks = blocks.to(torch.float32)
    skew = blocks - blocks.transpose(-1, -2)
    if limit is not None and limit > 0 and (length := skew.norm() + 1e-8) > limit:
        skew = skew * (limit / length)
    if not skew.isfinite().all():
        raise ValueError("infinite numbers, or none, in the blocks")
    one = torch.eye(blocks.shape[-1], device=blocks.device)
    return (one + skew) @ torch.linalg.inv(one - skew)


class _Rotating(Adapter):
    """``oft_blocks`` holds the rotations: they are worked out once. Alpha limits them, and is no scale."""

    needs = (frozenset({"oft_blocks"}),)
    beside = frozenset({"alpha"})
    scaled = False

    def __init__(self, parts: Mapping[str, Tensor], *, scale: float = 1.0, alpha: float | None = None) -> None:
        numbers = {role: part.to(torch.float32) for role, part in parts.items()}
        super().__init__(numbers | {"oft_blocks": rotations(parts["oft_blocks"], alpha)})

    @classmethod
    def stored_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def merge_(self, weight: Tensor, rows: slice, strength: float) -> None:
        weight.add_(self._turned(weight, rows, strength).sub_(weight), alpha=strength)

    def _turned(self, weight: Tensor, rows: slice, strength: float) -> Tensor:
        raise NotImplementedError


class Orthogonal(_Rotating):
    """OFT (arXiv 2306.07280): blocks [count, n, n] each turn n neighbouring rows."""

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, None]:
        count, side = shapes["oft_blocks"][:2]
        return count * side, None

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        _, one, other = shapes["oft_blocks"]
        return one == other and super().coherent(shapes, weight)

    def rows_together(self, rows: int) -> int:
        return self._tensor("oft_blocks").shape[1]

    def _turned(self, weight: Tensor, rows: slice, strength: float) -> Tensor:
        side = self._tensor("oft_blocks").shape[1]
        turns = self._part("oft_blocks", weight.device, slice(rows.start // side, rows.stop // side))
        grouped = weight.view(len(turns), side, -1)
        return grouped.lerp(turns.transpose(1, 2) @ grouped, strength).view(weight.shape)


class Butterfly(_Rotating):
    """BOFT (arXiv 2311.06243): stages [stage, count, n, n] of rotations, each of rows further apart than before."""

    optional = frozenset({"rescale"})

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, None]:
        _, count, side = shapes["oft_blocks"][:3]
        return count * side, None

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        stages, _, one, other = shapes["oft_blocks"]
        if one != other or one % 2 or not 0 < stages <= _MOST_STAGES or weight[0] % (one << stages - 1):
            return False
        return math.prod(shapes.get("rescale", weight[:1])) == weight[0] and super().coherent(shapes, weight)

    def rows_together(self, rows: int) -> int:
        return rows

    def _turned(self, weight: Tensor, rows: slice, strength: float) -> Tensor:
        turns = self._part("oft_blocks", weight.device)
        one, side = torch.eye(turns.shape[-1], device=weight.device), turns.shape[-1]
        turned = weight
        for stage, turn in enumerate(turns):
            apart = side // 2 << stage
            mixed = turned.unflatten(0, (-1, 2, apart)).transpose(1, 2).reshape(len(turn), side, -1)
            mixed = torch.lerp(one, turn, strength) @ mixed
            turned = mixed.reshape(-1, apart, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        if "rescale" in self._buffers:
            return turned * self._part("rescale", weight.device).view(-1, 1)
        return turned.clone() if turned is weight else turned
