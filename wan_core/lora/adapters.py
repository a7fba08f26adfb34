"""What a LoRA file does to one weight: the frame of every kind, and the plain ones; ``kinds`` lists them all.

A weight is seen as a matrix [rows, columns]: of a convolution all but the output channels are columns. Formulas are
those of ComfyUI's ``comfy/weight_adapter``, computed in float32, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mapped import fetch

Shapes = Mapping[str, tuple[int, ...]]  # role -> shape

DECOMPOSED = frozenset({"dora", "magnitude"})


class Adapter(nn.Module):
    """An update of one weight. Its tensors are buffers under their roles, wherever and in whatever dtype they lie.

    Args:
        scale: of the update; ``alpha`` is what the file's own tensor of this name says, for kinds that mean
            something else by it.
    """

    needs: tuple[frozenset[str], ...]  # sets of roles, one of which is the kind's
    optional: frozenset[str] = frozenset()  # roles that change what the others mean
    beside: frozenset[str] = frozenset({"alpha"}) | DECOMPOSED
    scaled: bool = True  # whether an alpha scales it
    products: tuple[tuple[str, str], ...] = ()  # roles of matrices that are multiplied, where a file has them

    def __init__(self, parts: Mapping[str, Tensor], *, scale: float = 1.0, alpha: float | None = None) -> None:
        super().__init__()
        for role, part in parts.items():
            self.register_buffer(role, part)
        self.scale = scale

    @classmethod
    def adds(cls, roles: Collection[str]) -> bool:
        """Whether one with these roles can be added to what a layer answers, with no merged matrix."""
        return False

    @property
    def additive(self) -> bool:
        return self.adds(self._buffers)

    def add_(self, y: Tensor, x: Tensor, strength: float) -> None:
        """Where it is additive: to what a layer makes of x [..., columns], y [..., rows]."""
        raise NotImplementedError

    @classmethod
    def stored_dtype(cls, dtype: torch.dtype) -> torch.dtype:
        """What tensors of a file's dtype are held in while they wait to be merged."""
        return dtype

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int | None]:
        """Rows and columns of the weight that it is for, None for any; an IndexError where a matrix is none."""
        raise NotImplementedError

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """What alpha is divided by; None where it does not count."""
        return None

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        """Whether the tensors for a weight of this shape, whose size is right, go together."""
        rows, channels = weight[0], weight[1] if len(weight) > 1 else 1
        lengths = {role: math.prod(shapes[role]) for role in cls.beside & shapes.keys()}
        wanted = {"alpha": 1, "magnitude": rows}
        if "dora" in lengths:
            wanted["dora"] = channels if shapes["dora"][:1] == (1,) else rows
        factors = {role for pair in cls.products for role in pair} & shapes.keys()
        return (
            all(lengths[role] == wanted[role] for role in lengths)
            and all(len(shapes[role]) > 1 for role in factors)
            and all(cls._inner(shapes[left]) == shapes[right][0] for left, right in cls.products if left in shapes)
            and cls.rank(shapes) != 0
        )

    @staticmethod
    def _inner(left: tuple[int, ...]) -> int:
        return math.prod(left[1:])

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        """What strength 1 adds to some rows of the weight, which are ``weight`` [rows, columns] now; float32."""
        raise NotImplementedError

    def rows_together(self, rows: int) -> int:
        """How many rows of a weight, out of so many, have to be merged as one."""
        dora = self._buffers.get("dora")
        return rows if dora is not None and dora.shape[0] == 1 else 1

    def merge_(self, weight: Tensor, rows: slice, strength: float) -> None:
        """Change some rows of a weight [rows, columns], float32."""
        update = self.delta(weight, rows).reshape(weight.shape)
        if not DECOMPOSED & self._buffers.keys():
            weight.add_(update, alpha=strength)
            return
        weight.lerp_(self._decomposed(weight, update, rows), strength)

    def _decomposed(self, weight: Tensor, update: Tensor, rows: slice) -> Tensor:
        """DoRA (arXiv 2402.09353): the sum, with the length of each row, or each input channel, that was learned.

        ComfyUI divides rows by the length of the old weight's, where the paper, and PEFT, take the sum's. Each file
        means what its own program did with it: ``dora_scale`` is ComfyUI's, ``lora_magnitude_vector`` is PEFT's.
        """
        total = weight + update
        if "magnitude" in self._buffers:
            wanted, length = self._part("magnitude", weight.device).view(-1, 1)[rows], total.norm(dim=1, keepdim=True)
            return total * (wanted / length)
        wanted, eps = self._part("dora", weight.device), torch.finfo(torch.float32).eps
        if len(self._tensor("dora")) == 1:
            channels = total.view(len(total), wanted.numel(), -1)
            length = channels.norm(dim=(0, 2), keepdim=True)
            return (channels * (wanted.view(1, -1, 1) / (length + eps))).view(total.shape)
        return total * (wanted.view(-1, 1)[rows] / (weight.norm(dim=1, keepdim=True) + eps))

    def _part(self, role: str, device: torch.device, rows: slice = slice(None)) -> Tensor:
        return fetch(self._tensor(role)[rows], device, torch.float32)

    def _tensor(self, role: str) -> Tensor:
        return cast(Tensor, self._buffers[role])


class LowRank(Adapter):
    """LoRA (arXiv 2106.09685): up [rows, rank] times down [rank, columns].

    With a middle [rank, rank, …] of a convolution, down is [rank, channels].
    """

    needs = (frozenset({"up", "down"}),)
    optional = frozenset({"mid"})
    products = (("up", "down"),)

    @classmethod
    def adds(cls, roles: Collection[str]) -> bool:
        return not (DECOMPOSED | cls.optional) & set(roles)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["up"][0], math.prod(shapes["down"][1:]) * kernel_of(shapes.get("mid", (0, 0)))

    @classmethod
    def rank(cls, shapes: Shapes) -> int:
        return shapes["down"][0]

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        mid = shapes.get("mid")
        fits = mid is None or mid[:2] == (math.prod(shapes["up"][1:]), shapes["down"][0])
        return fits and super().coherent(shapes, weight)

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        up, down = self._part("up", weight.device, rows).flatten(1), self._part("down", weight.device).flatten(1)
        if "mid" in self._buffers:
            down = torch.einsum("mn...,nj->mj...", self._part("mid", weight.device), down).flatten(1)
        return up @ down * self.scale

    def add_(self, y: Tensor, x: Tensor, strength: float) -> None:
        """To what a layer makes of x [..., columns], y [..., rows]; with tensors of their dtype and device."""
        low = F.linear(x, self._tensor("down").flatten(1)).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(low, self._tensor("up").flatten(1).T, alpha=strength * self.scale)


def kernel_of(core: tuple[int, ...]) -> int:
    """How many positions a convolution's core [rank, rank, …] has."""
    if len(core) < 2:
        raise IndexError("a core is at least a matrix")
    return math.prod(core[2:])


class Difference(Adapter):
    """The whole difference of two weights."""

    needs = (frozenset({"diff"}),)
    beside = frozenset()
    scaled = False

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        (shape,) = shapes.values()
        return shape[0], math.prod(shape[1:])

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        (role,) = self._buffers
        return self._part(role, weight.device, rows) * self.scale


class BiasOfUp(Difference):
    """The bias that PEFT may give to its second matrix: a difference of the layer's bias, at the LoRA's own scale."""

    needs = (frozenset({"up_bias"}),)


class Replacement(Adapter):
    """Another weight in the old one's place, whatever the strength."""

    needs = (frozenset({"set"}),)
    beside = frozenset()
    scaled = False

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["set"][0], math.prod(shapes["set"][1:])

    def merge_(self, weight: Tensor, rows: slice, strength: float) -> None:
        weight.copy_(self._part("set", weight.device, rows).reshape(weight.shape))
