"""Every kind of adapter, found by the roles and shapes of its tensors, and how a weight is merged with several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adapters import Adapter, BiasOfUp, Difference, LowRank, Replacement, Shapes
from .lycoris import Generalised, Hadamard, Kronecker
from .orthogonal import Butterfly, Orthogonal

KINDS: tuple[type[Adapter], ...] = (
    LowRank, Hadamard, Kronecker, Generalised, Orthogonal, Butterfly, Difference, BiasOfUp, Replacement,
)  # fmt: skip

_AT_ONCE = {"cpu": 1 << 20}  # numbers merged in one go
_AT_ONCE_ELSEWHERE = 1 << 24
_BLOCKS = {3: Orthogonal, 4: Butterfly}  # both are called oft_blocks: the number of dimensions tells them apart


def kinds_of(shapes: Shapes) -> list[tuple[type[Adapter], frozenset[str]]]:
    """The adapters that a weight's tensors make, each with its roles; those left over belong to none."""
    given, made = frozenset(shapes), []
    for kind in KINDS:
        need = next((need for need in kind.needs if need <= given), None)
        if need and _is_its(kind, shapes):
            made.append((kind, need | given & (kind.optional | kind.beside)))
    return made


def _is_its(kind: type[Adapter], shapes: Shapes) -> bool:
    return kind not in _BLOCKS.values() or _BLOCKS.get(len(shapes["oft_blocks"])) is kind


def merge_into(out: Tensor, base: Callable[[slice], Tensor], adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    """Fill out with a weight and its adapters, each at a strength, in the order given; rounded once, to out's dtype.

    Args:
        base: some rows of the weight, of any shape, dtype and device.
    """
    flat = out.view(len(out), -1)
    group = min(len(out), math.lcm(*(adapter.rows_together(len(out)) for adapter, _ in adapters)))
    count = max(1, _AT_ONCE.get(out.device.type, _AT_ONCE_ELSEWHERE) // flat.shape[1] // group) * group
    for start in range(0, len(out), count):
        rows = slice(start, min(start + count, len(out)))
        weight = base(rows).to(out.device, torch.float32, copy=True).view(flat[rows].shape)
        for adapter, strength in adapters:
            adapter.merge_(weight, rows, strength)
        flat[rows] = weight
    return out
