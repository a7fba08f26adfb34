"""The quantised formats by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .base import Format
from .fp8 import FP8
from .int4 import Int4
from .int8 import Int8
from .mxfp8 import MXFP8
from .nvfp4 import NVFP4
from .scaled import Scaled

# What ``dtype`` may say besides a floating-point format: the matrices are packed so while they are loaded, with a
# scale for each output channel, and computed with in the device's default dtype.
MADE_ON_LOAD: dict[str, Scaled] = {"fp8_e4m3fn": FP8(torch.float8_e4m3fn), "int8": Int8()}

Marking = Mapping[str, Any]  # what a file says of a layer: "format" and its options


def _fp8(dtype: torch.dtype) -> Callable[[Marking, torch.dtype], Format]:
    """What is stored as bytes is ``dtype``; what is stored as a floating-point format is that."""

    def made(mark: Marking, stored: torch.dtype) -> Format:
        if stored is torch.int8:  # a scale says more than the word for all scales of a file
            return Int8()
        if not stored.is_floating_point and stored is not torch.uint8:
            raise ValueError(f"says fp8, but its numbers are {stored}")
        exact = bool(mark.get("full_precision_matrix_mult"))
        return FP8(dtype if stored is torch.uint8 else stored, exact)

    return made


def _int8(mark: Marking, stored: torch.dtype) -> Format:
    options = _options(mark, stored)
    return Int8(rotation=_group(options.get("convrot_groupsize", 256)) if options.get("convrot") else 0)


def _int4(mark: Marking, stored: torch.dtype) -> Format:
    return Int4(_group(_options(mark, stored).get("convrot_groupsize", 256)))


def _options(mark: Marking, stored: torch.dtype) -> Marking:
    if stored not in (torch.int8, torch.uint8):
        raise ValueError(f"says {mark['format']}, but its numbers are {stored}")
    params = mark.get("params")
    return {**(params if isinstance(params, Mapping) else {}), **mark}


def _group(size: object) -> int:
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 10:
        size = int(size)
    if type(size) is not int or not 0 < size <= 1 << 20 or size & (size - 1) or not size.bit_length() % 2:
        raise ValueError("names no size of its rotated groups: expected a power of 4")
    return size


# The formats that a file may name for a layer (ComfyUI's ``QUANT_ALGOS``), each from the marking and the stored dtype;
# a ``ValueError`` says what is wrong with the marking.
MARKED: dict[str, Callable[[Marking, torch.dtype], Format]] = {
    "float8_e4m3fn": _fp8(torch.float8_e4m3fn),
    "float8_e5m2": _fp8(torch.float8_e5m2),
    "float8_e4m3fn_rowwise": _fp8(torch.float8_e4m3fn),
    "int8_tensorwise": _int8,
    "int8_rowwise": _int8,
    "convrot_w4a4": _int4,
    "mxfp8": lambda mark, stored: MXFP8(),
    "nvfp4": lambda mark, stored: NVFP4(),
}
