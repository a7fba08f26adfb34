"""What formats share that have a scale of one byte for each block of weights along a row.

Tensor cores take these scales in tiles of 128 rows by 4 blocks (docs.nvidia.com/cuda/cublas, "1D block scaling factors
layout"), and so do files: within a tile the four scales of a row lie together, and row ``r`` comes at ``r % 32``, then
``r // 32``. Rows and blocks are filled up to whole tiles. A scale is found in its tile when its row is decoded, so that
the tiles need not be laid out anew.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mapped import rows_of
from .base import Format, Parts

TILE = (128, 4)  # rows, blocks


class BlockScaled(Format):
    """``data`` [rows, bytes of a row], and as bytes ``scale`` [rows, blocks] or ``tiles``, the same scales in tiles.

    ``whole``, where there is one, is a float32 factor of the matrix.
    """

    block: int  # weights with one scale
    stored: tuple[torch.dtype, ...]  # what the data may be in files
    scale_dtype: torch.dtype
    whole: bool = False  # whether the matrix has a factor

    @abstractmethod
    def columns(self, data: Tensor) -> int: ...

    def prepared(self, stored: Parts) -> dict[str, Tensor]:
        parts = {name: part.view(torch.uint8) for name, part in stored.items() if name in ("scale", "tiles")}
        if "whole" in stored:
            parts["whole"] = stored["whole"].to(torch.float32).reshape(1, 1)
        return {"data": stored["data"], **parts}

    def rows(self, parts: Parts, index: slice | Tensor) -> Parts:
        data = rows_of(parts["data"], index)
        whole = {"whole": parts["whole"]} if "whole" in parts else {}
        if "scale" in parts:
            return {"data": data, "scale": parts["scale"][index], **whole}
        numbers = torch.arange(len(parts["data"]), device=data.device)[index]
        return {"data": data, "scale": from_tiles(parts["tiles"], numbers, self.columns(data) // self.block), **whole}

    def lacks_arithmetic(self, device: torch.device) -> bool:
        return not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (10, 0))


def tiles_shape(rows: int, blocks: int) -> tuple[int, int]:
    """The scales of a matrix, filled up to whole tiles."""
    return -(-rows // TILE[0]) * TILE[0], -(-blocks // TILE[1]) * TILE[1]


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [rows, blocks] in tiles, filled up with zeros: the shape of ``tiles_shape``."""
    rows, blocks = tiles_shape(*scale.shape)
    full = F.pad(scale, (0, blocks - scale.shape[1], 0, rows - scale.shape[0]))
    return full.view(-1, 4, 32, blocks // 4, 4).permute(0, 3, 2, 1, 4).reshape(rows, blocks)


def from_tiles(tiles: Tensor, rows: Tensor, blocks: int) -> Tensor:
    """The scales [len(rows), blocks] of some rows, by their numbers."""
    across = -(-blocks // TILE[1])
    cells = tiles.reshape(-1, across, 32, 4, TILE[1])
    return cells[rows // 128, :, rows % 32, rows % 128 // 32].reshape(len(rows), -1)[:, :blocks]
