"""Where a VAE runs, and in which tiles: for encoding and decoding, nodes and command line."""

from __future__ import annotations

import torch

from ..config import VAEConfig
from ..models.vae.tiles import Tiles
from .plan import decode_bytes


def fitting_tiles(config: VAEConfig, height: int, width: int, free: float, dtype: torch.dtype) -> Tiles | None:
    """The largest tiles whose decoding fits into ``free`` bytes, for frames of so many pixels; None: no tiles needed.

    Where nothing fits, the smallest tiles.
    """
    if decode_bytes(config, height, width, dtype) <= free:
        return None
    sizes = [size for size in _SIZES if size < max(height, width)] or _SIZES[-1:]
    fits = (s for s in sizes if decode_bytes(config, min(s, height), min(s, width), dtype) <= free)
    size = next(fits, sizes[-1])
    return Tiles.square(size)


_SIZES = (1024, 768, 640, 512, 448, 384, 320, 256, 192)
