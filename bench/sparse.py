"""Checkpoints of the real shapes and sizes that take no space on the disk: a header, then a hole for the weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from wan_core.layouts.text import SPIECE_MODEL

_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The tensors of a module that is never filled."""
    with torch.device("meta"):
        return {key: tuple(slot.shape) for key, slot in make().state_dict().items()}


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A safetensors file of zeros: of the dtype, but for the bytes of a tokenizer."""
    header, end = {}, 0
    for key, shape in shapes.items():
        kind = torch.uint8 if key == SPIECE_MODEL else dtype
        start, end = end, end + kind.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file
