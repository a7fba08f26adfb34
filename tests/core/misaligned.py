"""The same weights in files where they lie at other places, and a watch over what the models multiply with."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_core.mapped import ALIGNMENT, is_mapped

ODD = (0, 4, 8, 24, 40)  # bytes beside a multiple of 64; 24 is where one processor's products began to differ
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WEIGHTS = {  # where an operation takes its weights
    "aten::mm": (1,), "aten::addmm": (0, 2), "aten::convolution": (1, 2), "aten::native_layer_norm": (2, 3),
    "aten::mkldnn_convolution": (1, 2), "aten::_fused_rms_norm": (2,), "aten::embedding": (0,),
}  # fmt: skip


def write_at(file: Path, weights: Mapping[str, Tensor], beside: int) -> Path:
    """A safetensors file whose data begin so many bytes beside a multiple of 64."""
    header, end = {}, 0
    for key, value in weights.items():
        start, end = end, end + value.nbytes
        header[key] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * ((beside - 8 - len(text)) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for value in weights.values():
            stream.write(value.contiguous().view(-1).view(torch.uint8).numpy())
    assert (8 + len(text)) % ALIGNMENT == beside
    return file


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition(".")[0]
        for place in _WEIGHTS.get(name, ()):
            operand = args[place] if place < len(args) else None
            if isinstance(operand, Tensor) and operand.numel() > 1:
                self.seen.add(name)
                assert not is_mapped(operand), f"{name} reads a mapped file"
                # A part of a weight, such as a convolution's last frame, lies where it lies: in every run at the same
                # place of its storage.
                begin = operand.untyped_storage().data_ptr()
                assert begin % ALIGNMENT == 0, f"{name} takes weights that begin at {begin % ALIGNMENT}"
        return function(*args, **(kwargs or {}))


@contextmanager
def aligned_products() -> Iterator[set[str]]:
    """Every product inside is one with aligned weights that lie in memory; yields the operations seen."""
    with _Watch() as watch:
        yield watch.seen
