"""Whether a machine could hold something at all: asked before anything is allocated, against all the memory it has.

What is free decides how a run is laid out (``plan``); this here is about sizes that no layout makes possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import psutil
import torch

from .config import TEMPORAL_STRIDE, VAEConfig
from .errors import WanError
from .plan import GB, plan
from .recipe import ModelRecipe

_ADVICE = "Choose a smaller size, fewer frames or a smaller batch."

TotalBytes = Callable[[torch.device], int]


def total_bytes(device: torch.device | str) -> int:
    """All the memory of a device; of the host with what it can swap out."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total + psutil.swap_memory().total


def check_bytes(needed: int, what: str, device: torch.device | str, total: int, advice: str = _ADVICE) -> None:
    """
    Args:
        what: would take so many bytes, as a message begins.

    Raises:
        WanError: more than the device has in all.
    """
    if needed > total:
        raise WanError(f"{what} would take {needed / GB:,.1f} GB, but {device} has {total / GB:,.1f} GB in all. "
                       f"{advice}")


def check_tensor(
    shape: Sequence[int], what: str, *, copies: int = 1, device: torch.device | str = "cpu", total: int | None = None
) -> None:
    """``check_bytes`` of float32 tensors of a shape."""
    total = total_bytes(device) if total is None else total
    check_bytes(math.prod(shape) * 4 * copies, f"{what} of shape {list(shape)}", device, total)


def least_bytes(recipe: ModelRecipe, shape: Sequence[int], device: torch.device | str, *, guided: bool = True) -> int:
    """What sampling a latent [B, C, T, h, w] takes of a device with every block streamed: less is not possible."""
    layers = recipe.high.config.layers if recipe.own else 0
    streamed = replace(recipe, swap_blocks=layers, prefetch=0, vram_limit=None)
    return plan(streamed, tuple(shape), device, guided=guided).total


def check_run(
    recipe: ModelRecipe, shape: Sequence[int], device: torch.device | str, total: int, *, guided: bool = True
) -> None:
    """
    Raises:
        WanError: no layout of sampling a latent [B, C, T, h, w] fits into what the device has in all.
    """
    b, _, t, h, w = shape
    what = f"Sampling a latent of {w}x{h}x{t}{f', batch {b}' if b > 1 else ''}, with every block streamed,"
    check_bytes(least_bytes(recipe, shape, device, guided=guided), what, device, total)


def check_start(recipe: ModelRecipe, shape: Sequence[int], device: torch.device | str, total: int) -> None:
    """``check_run`` for a latent that may be sampled in pieces of its length: one latent frame of one video.

    Raises:
        WanError: the host cannot hold the latent, or no device of this size can sample even that.
    """
    check_tensor(shape, "A latent")
    check_run(recipe, (1, shape[1], 1, *shape[3:]), device, total, guided=False)


def encode_bytes(config: VAEConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """At least what encoding four frames of this size takes: the input and output of the first residual block."""
    pixels = TEMPORAL_STRIDE * height * width / (4 if config.kind == "wan2.2" else 1)
    return int(2 * pixels * config.encoder_dim * dtype.itemsize)
