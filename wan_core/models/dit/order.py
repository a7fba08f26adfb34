"""The order in which a video's tokens stand: for attention that goes by neighbourhoods, near ones beside each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

Grid = tuple[int, int, int]
Order = Callable[[Grid], torch.Tensor]  # frames, rows, columns -> the tokens' numbers [L], in their new order


def morton(grid: Grid) -> torch.Tensor:
    """Along a Z-shaped curve through frames, rows and columns: the bits of the three places, one of each in turn."""
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    code = torch.zeros(grid, dtype=torch.int64)
    for bit in range(max(grid).bit_length()):
        for place, axis in enumerate(axes):
            code |= ((axis >> bit) & 1) << (3 * bit + 2 - place)
    return code.flatten().argsort(stable=True)
