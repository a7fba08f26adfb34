"""Layers whose matrix stays packed in a quantised format."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import is_out_of_memory
from ..mapped import fetch
from .base import Format, Packed
from .scratch import Scratch

log = logging.getLogger(__name__)

_broken: set[tuple[str, str]] = set()  # (format, device) whose product failed once: never tried again


class QuantLinear(nn.Module):
    """A linear layer over a packed matrix.

    The packed tensors are buffers, moved as they are and never cast; the bias is a parameter in the dtype of the
    computation. Without gradients the dequantised matrix lives in the scratch buffer that all layers of a model share.
    """

    bias: Tensor | None
    compiles = False  # its formats decide by the device, and by what has failed, how to multiply

    def __init__(self, packed: Packed, bias: Tensor | None, scratch: Scratch) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.format = packed.format
        self.scratch = scratch
        for name, part in packed.parts.items():
            self.register_buffer(name, part)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def packed(self) -> Packed:
        return Packed(self.format, dict(self.named_buffers(recurse=False)))

    def forward(self, x: Tensor, scratch: Scratch | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; ``scratch`` takes the place of the layer's own."""
        parts = dict(self.named_buffers(recurse=False))
        if not torch.is_grad_enabled() and (product := _multiplied(self.format, x, parts, self.bias)) is not None:
            return product
        if parts["data"].device != x.device:  # they stay where they are; this call takes a copy
            parts = {name: fetch(part, x.device) for name, part in parts.items()}
        shape = self.out_features, self.in_features
        # With gradients backward needs the matrix, when the scratch buffer holds another one.
        room = x.new_empty(shape) if torch.is_grad_enabled() else (scratch or self.scratch).space(shape, like=x)
        return F.linear(x, self.format.dequantise(parts, room), self.bias)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {self.in_features}, {self.out_features}, bias={self.bias is not None}"


class QuantEmbedding(nn.Module):
    """A packed table of which only the rows asked for are dequantised, where the table lies."""

    data: Tensor

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.format = packed.format
        for name, part in packed.parts.items():
            self.register_buffer(name, part)

    def forward(self, ids: Tensor, like: Tensor) -> Tensor:
        """ids [N] -> rows [N, columns] with the device and dtype of ``like``."""
        parts = self.format.rows(dict(self.named_buffers(recurse=False)), ids.to(self.data.device))
        return Packed(self.format, dict(parts)).dequantise(like.dtype).to(like.device)


def _multiplied(kind: Format, x: Tensor, parts: dict[str, Tensor], bias: Tensor | None) -> Tensor | None:
    """The format's own product; a device that fails at it is told from then on to dequantise."""
    if (kind.name, str(x.device)) in _broken or parts["data"].device != x.device:
        return None
    try:
        return kind.multiply(x, parts, bias)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _broken.add((kind.name, str(x.device)))
        log.warning(
            "wan_core: %s products failed on %s (%s); weights are dequantised instead",
            kind.name,
            x.device,
            str(error).splitlines()[0],
        )
        return None


def pack_layers(module: nn.Module, packed: Mapping[str, Packed], scratch: Scratch) -> None:
    """Put packed layers where linear layers stand, by the names of their weights ("blocks.0.ffn.0.weight").

    Their biases stay the parameters they are. A layer that is no linear one names its stand-in as ``packed_kind``.
    """
    for key, matrix in packed.items():
        path, _, _ = key.rpartition(".")
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, _packed_layer(module.get_submodule(path), matrix, scratch))


def _packed_layer(layer: nn.Module, matrix: Packed, scratch: Scratch) -> nn.Module:
    if kind := getattr(layer, "packed_kind", None):
        return kind(matrix)
    made = QuantLinear(matrix, None, scratch)
    made.register_parameter("bias", getattr(layer, "bias", None))
    return made
