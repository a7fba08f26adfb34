"""A transformer from its file, some of whose blocks may stream."""

from __future__ import annotations

import torch
from torch import nn

from ..files.unchanged import check_unchanged
from ..loading.dit import DiTFile, fill_dit
from ..models.dit.dit import WanDiT, keeps_float32
from ..recipe import PREFETCH
from .stream.swap import BlockSwap


def build_dit(
    file: DiTFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    attention: str = "auto",
    swap_blocks: int = 0,
    prefetch: int = PREFETCH,
) -> WanDiT:
    """The model with its weights on the device, but for ``swap_blocks`` blocks, which stream from the file.

    Raises:
        WanError: see ``fill_dit`` and ``BlockSwap``.
    """

    def stream(blocks: nn.ModuleList, dtype: torch.dtype) -> BlockSwap:
        return BlockSwap(
            blocks,
            swap_blocks,
            device=device,
            dtype=dtype,
            keep_float32=keeps_float32,
            prefetch=prefetch,
            check=lambda: check_unchanged(file),
        )

    return fill_dit(file, device=device, dtype=dtype, attention=attention, stream=stream if swap_blocks else None)
