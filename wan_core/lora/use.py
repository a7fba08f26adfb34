"""What the LoRAs of a recipe take beside a block's weights, and which of them must be merged."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..recipe import LoraUse
from .files import Part


def merges(uses: Sequence[LoraUse], key: str) -> bool:
    """Whether any adapter of a matrix, by our key, has to be merged into it."""
    return any(not _is_added(part) for use in uses for part in use.file.parts.get(key, ()))


def bytes_beside(uses: Sequence[LoraUse], key: str, dtype: torch.dtype) -> int:
    """What the adapters of a block's matrix, by our key, take on the device in a model that computes in this dtype."""
    total = 0
    for use in uses:
        tensors = use.file.checkpoint.tensors
        for part in use.file.parts.get(key, ()):
            infos = (
                (tensors[name].shape, dtype if _is_added(part) else part.kind.stored_dtype(tensors[name].dtype))
                for name in part.keys.values()
            )
            total += sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in infos)
    return total


def _is_added(part: Part) -> bool:
    return part.kind.adds(part.keys)
