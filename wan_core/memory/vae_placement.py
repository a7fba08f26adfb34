"""Where a VAE runs, and in which tiles: for encoding and decoding, nodes and command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ..config import VAEConfig
from ..errors import WanError
from ..models.vae.tiles import Tiles
from .devices import empty_cache, is_out_of_memory
from .plan import decode_bytes

log = logging.getLogger(__name__)

Made = TypeVar("Made")
WORKSPACE = 10**9  # bytes that convolutions may take beside their tensors: no plan knows them


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


def working_bytes(config: VAEConfig, height: int, width: int, tiles: Tiles | None, dtype: torch.dtype) -> int:
    """What must be free to decode frames of so many pixels: the peak, weights included, and room for workspaces."""
    if tiles is not None:
        height, width = min(tiles.height, height), min(tiles.width, width)
    return decode_bytes(config, height, width, dtype) + WORKSPACE


def smaller_tiles(height: int, width: int, tiles: Tiles | None) -> Tiles | None:
    """The next try after these tiles (None: whole frames of so many pixels) were too much; None after the smallest."""
    side = max(height, width) if tiles is None else min(max(tiles.height, tiles.width), max(height, width))
    return next((Tiles.square(size) for size in _SIZES if size < side), None)


def retried(run: Callable[[Tiles | None], Made], height: int, width: int, tiles: Tiles | None) -> Made:
    """``run(tiles)``, and again in smaller ones when memory runs out.

    Raises:
        WanError: the smallest tiles are too much.
    """
    while True:
        try:
            return run(tiles)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        tiles = next_tiles(height, width, tiles, said)  # outside the except block, where no frame holds tensors


def next_tiles(height: int, width: int, tiles: Tiles | None, said: str) -> Tiles:
    """``smaller_tiles`` after running out of memory, with a note.

    Raises:
        WanError: the smallest tiles were too much; ``said`` is the device's message.
    """
    empty_cache()
    less = smaller_tiles(height, width, tiles)
    if less is None:
        raise WanError(
            f"The device's memory ran out in the VAE, also in small tiles ({said}). Choose a smaller size, or close "
            "other programs that use the device."
        )
    log.warning("The VAE ran out of memory: it goes on in tiles of %dx%d pixels.", less.width, less.height)
    return less


_SIZES = (1024, 768, 640, 512, 448, 384, 320, 256, 192)
