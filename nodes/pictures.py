"""IMAGE as other nodes really send it, made into what it ought to be: [F,H,W,3], float32, 0..1."""

from __future__ import annotations

import logging

import torch

from ..wan_core.errors import WanError

log = logging.getLogger(__name__)

_BRIGHTEST = {torch.uint8: 255, torch.int8: 127, torch.int16: 32767}
_STEPS = (1, 255, 65535, 2**31 - 1)  # of wider integers: bits, bytes, 16 bits (a PNG of mode I), 31 bits
_OVERSHOOT = 10.0  # scaling and HDR go a little beyond 1; beyond this it is another unit


def pictures(image: torch.Tensor, name: str) -> torch.Tensor:
    """
    Args:
        image: [F,H,W,C] or [H,W,C], of 1 (grey), 3 or 4 (with transparency) channels; integers of any width.
        name: of the input, for messages.

    Raises:
        WanError: no picture, not numbers, or in another unit.
    """
    if not torch.is_tensor(image) or image.ndim not in (3, 4) or image.shape[-1] not in (1, 3, 4) or not image.numel():
        found = list(image.shape) if torch.is_tensor(image) else type(image).__name__
        raise WanError(f"{name} is {found}: expected images, [frames, height, width, 3].")
    frames = image if image.ndim == 4 else image[None]
    frames = _in_unit(frames[..., :3], name)
    return frames if frames.shape[-1] == 3 else frames.expand(*frames.shape[:-1], 3)


def _in_unit(image: torch.Tensor, name: str) -> torch.Tensor:
    if image.is_complex():
        raise WanError(f"{name} holds complex numbers: expected 0 to 1.")
    if image.dtype == torch.bool:
        return image.float()
    if not image.is_floating_point():
        return _from_integers(image, name)
    image = image.float()
    low, high = (value.item() for value in image.aminmax())
    if not (abs(low) <= _OVERSHOOT and abs(high) <= _OVERSHOOT):  # so written, NaN is refused
        raise WanError(
            f"{name} holds values from {low:g} to {high:g}: expected 0 to 1. The node before it made broken "
            "images, or counts brightness in another unit."
        )
    return image


def _from_integers(image: torch.Tensor, name: str) -> torch.Tensor:
    low, high = (int(value) for value in image.to(torch.int64).aminmax())
    full = _BRIGHTEST.get(image.dtype) or next((full for full in _STEPS if high <= full), None)
    if low < 0 or full is None:
        raise WanError(f"{name} holds whole numbers from {low} to {high}: expected 0 to 1, or 0 to 255.")
    log.info("%s holds whole numbers (%s): %d is taken for white.", name, image.dtype, full)
    return image.double().div(full).float()
