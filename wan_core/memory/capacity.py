"""Whether a machine could hold something at all: asked before anything is allocated, against all the memory it has.

What is free decides how a run is laid out (``plan``); this here is about sizes that no layout makes possible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..recipe import ModelRecipe
from .devices import total_bytes
from .plan import check_fits, does_not_fit

_ADVICE = "Choose a smaller size, fewer frames or a smaller batch."


def check_bytes(needed: float, what: str, device: torch.device | str, total: int, advice: str = _ADVICE) -> None:
    """
    Args:
        what: would take so many bytes, as a message begins.

    Raises:
        WanError: more than the device has in all.
    """
    if needed > total:
        raise does_not_fit(what, needed, total, torch.device(device), advice)


def check_tensor(
    shape: Sequence[int], what: str, *, device: torch.device | str = "cpu", total: int | None = None
) -> None:
    """``check_bytes`` of a float32 tensor of a shape."""
    total = total_bytes(torch.device(device)) if total is None else total
    check_bytes(math.prod(shape) * 4, f"{what} of shape {list(shape)}", device, total)


def check_start(recipe: ModelRecipe, shape: Sequence[int], device: torch.device | str, total: int) -> None:
    """``plan.check_fits`` for a latent that may be sampled in pieces of its length: one latent frame of one video.

    Raises:
        WanError: the host cannot hold the latent, or no device of this size can sample even that.
    """
    check_tensor(shape, "A latent")
    check_fits(recipe, (1, shape[1], 1, *shape[3:]), device, prompts=1, total=total)
