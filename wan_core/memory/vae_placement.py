"""Where a VAE runs, and in which tiles: for encoding and decoding, nodes and command line."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from ..config import VAEConfig
from ..errors import WanError, is_out_of_memory
from ..models.vae.tiles import Tiles
from .activations import Work, vae_budget
from .budget import GB
from .devices import empty_cache

if TYPE_CHECKING:
    from ..loading.vae import VAEFile
    from ..models.vae.vae import VideoVAE
    from .engine import Engine

log = logging.getLogger(__name__)

Made = TypeVar("Made")
_SMALLEST = 64  # pixels: what two tiles share, and is thrown away


@dataclass(frozen=True)
class Place:
    """Where frames of one size go through a VAE, in which tiles (None: whole), and what it computes in."""

    device: torch.device
    tiles: Tiles | None
    dtype: torch.dtype


def place(
    config: VAEConfig,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    room: float = math.inf,
    work: Work = "decode",
) -> Place:
    """For frames of this height and width: whole or in tiles, as ``room`` bytes allow; on the CPU where that is too
    little for the smallest tile."""
    if math.isinf(room) or device.type == "cpu":  # a CPU's pages are swapped out before a tile would help
        return Place(device, None, dtype)
    tiles = fitting_tiles(config, *size, room, dtype, work)
    if tiles is None or vae_budget(config, *at_once(size, tiles), dtype, work).total <= room:
        return Place(device, tiles, dtype)
    log.warning("No tile of %dx%d fits into %.1f GB: the VAE runs on the CPU.", size[1], size[0], room / GB)
    return Place(torch.device("cpu"), None, dtype)


def vae_at(engine: Engine, file: VAEFile, where: Place, size: tuple[int, int], work: Work) -> VideoVAE:
    """The VAE in its place, with room for what it computes with for frames of this height and width."""
    if where.device.type == "cpu":
        return engine.vae(file, where.device, where.dtype)
    needs = vae_budget(file.config, *at_once(size, where.tiles), where.dtype, work)
    return engine.vae(file, where.device, where.dtype, working=needs.activations)


def square_tiles(side: int) -> Tiles:
    """
    Raises:
        WanError: less than what two tiles share.
    """
    if side < _SMALLEST:
        raise WanError(f"Tiles of {side} pixels a side: expected {_SMALLEST} or more, say 512.")
    return Tiles.square(side)


def at_once(size: Sequence[int], tiles: Tiles | None) -> tuple[int, int]:
    """Height and width of what the VAE sees at a time."""
    height, width = size
    return (min(tiles.height, height), min(tiles.width, width)) if tiles else (height, width)


def fitting_tiles(
    config: VAEConfig, height: int, width: int, free: float, dtype: torch.dtype, work: Work = "decode"
) -> Tiles | None:
    """The largest tiles whose coding fits into ``free`` bytes, for frames of so many pixels; None: no tiles needed.

    Where nothing fits, the smallest tiles.
    """
    if vae_budget(config, height, width, dtype, work).total <= free:
        return None
    sizes = [size for size in _SIZES if size < max(height, width)] or _SIZES[-1:]
    fits = (s for s in sizes if vae_budget(config, min(s, height), min(s, width), dtype, work).total <= free)
    size = next(fits, sizes[-1])
    return Tiles.square(size)


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
