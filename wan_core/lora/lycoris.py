"""Products of more than two matrices, as LyCORIS names them: LoHa, LoKr and GLoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .adapters import Adapter, Shapes, kernel_of


def _unfolded(core: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """A Tucker product: core [i, j, …], one [i, rows], two [j, channels] -> [rows, channels · …]"""
    return torch.einsum("ij...,jc,ir->rc...", core, two, one).flatten(1)


class Hadamard(Adapter):
    """LoHa (arXiv 2108.06098): the elementwise product of two low-rank matrices.

    With cores, which convolutions may have, the first factors lie [rank, rows] instead of [rows, rank].
    """

    needs = (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),)
    optional = frozenset({"hada_t1", "hada_t2"})

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        a, b = shapes["hada_w1_a"], shapes["hada_w1_b"]
        if cls.optional & shapes.keys():
            return a[1], b[1] * kernel_of(shapes[min(cls.optional & shapes.keys())])
        return a[0], math.prod(b[1:])

    @classmethod
    def rank(cls, shapes: Shapes) -> int:
        return shapes["hada_w1_b"][0]

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        return super().coherent(shapes, weight) and all(cls._pair(shapes, number) for number in "12")

    @classmethod
    def _pair(cls, shapes: Shapes, number: str) -> bool:
        a, b, first_b = shapes[f"hada_w{number}_a"], shapes[f"hada_w{number}_b"], shapes["hada_w1_b"]
        if len(a) != 2 or len(b) < 2 or not a[1] or not b[0]:
            return False
        if not cls.optional & shapes.keys():
            return a[1] == b[0] and a[0] == shapes["hada_w1_a"][0] and b[1:] == first_b[1:]
        core = shapes.get(f"hada_t{number}", ())
        same_kernel = core[2:] == shapes["hada_t1"][2:] if "hada_t1" in shapes else False
        return (
            len(b) == 2
            and core[:2] == (a[0], b[0])
            and same_kernel
            and (a[1], b[1]) == (shapes["hada_w1_a"][1], first_b[1])
        )

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        return self._factor("1", rows, weight.device) * self._factor("2", rows, weight.device) * self.scale

    def _factor(self, number: str, rows: slice, device: torch.device) -> Tensor:
        b = self._part(f"hada_w{number}_b", device)
        if f"hada_t{number}" in self._buffers:
            a = self._part(f"hada_w{number}_a", device)[:, rows]
            return _unfolded(self._part(f"hada_t{number}", device), a, b)
        return self._part(f"hada_w{number}_a", device, rows) @ b.flatten(1)


class Kronecker(Adapter):
    """LoKr (arXiv 2309.14859): the Kronecker product of two matrices, either of which may be a low-rank product.

    With a core the second one's factors are [rank, rows] and [rank, channels].
    """

    needs = tuple(
        frozenset(one + two)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    )
    optional = frozenset({"lokr_t2"})

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        one, two = cls._shape(shapes, "lokr_w1"), cls._shape(shapes, "lokr_w2")
        return one[0] * two[0], one[1] * two[1]

    @classmethod
    def _shape(cls, shapes: Shapes, name: str) -> tuple[int, int]:
        """Rows and columns of a factor."""
        if name in shapes:
            return shapes[name][0], math.prod(shapes[name][1:])
        a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
        if name == "lokr_w2" and "lokr_t2" in shapes:
            return a[1], b[1] * kernel_of(shapes["lokr_t2"])
        return a[0], b[1]

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        return super().coherent(shapes, weight) and cls._factors(shapes)

    @classmethod
    def _factors(cls, shapes: Shapes) -> bool:
        for name in ("lokr_w1", "lokr_w2"):
            if name in shapes:
                if len(shapes[name]) < 2 or "lokr_t2" in shapes and name == "lokr_w2":
                    return False
                continue
            a, b = shapes[f"{name}_a"], shapes[f"{name}_b"]
            core = shapes.get("lokr_t2") if name == "lokr_w2" else None
            if len(a) != 2 or len(b) != 2 or not b[0] or (core[:2] != (a[0], b[0]) if core else a[1] != b[0]):
                return False
        return True

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        one, two = self._factor("lokr_w1", weight.device), self._factor("lokr_w2", weight.device)
        index = torch.arange(len(one) * len(two), device=weight.device)[rows]
        return torch.einsum("nb,nd->nbd", one[index // len(two)], two[index % len(two)]).flatten(1) * self.scale

    def _factor(self, name: str, device: torch.device) -> Tensor:
        if name in self._buffers:
            return self._part(name, device).flatten(1)
        a, b = self._part(f"{name}_a", device), self._part(f"{name}_b", device)
        if name == "lokr_w2" and "lokr_t2" in self._buffers:
            return _unfolded(self._part("lokr_t2", device), a, b)
        return a @ b


class Generalised(Adapter):
    """GLoRA (arXiv 2306.07967): the weight itself times a low-rank matrix, plus a low-rank matrix.

    LyCORIS has turned its matrices round: today a1 [channels, rank], a2 [rank, channels], b1 [rows, rank],
    b2 [rank, columns], once each the other way.
    """

    needs = (frozenset({"a1", "a2", "b1", "b2"}),)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        first, second = ("b2", "b1") if cls._is_old(shapes) else ("b1", "b2")
        return shapes[first][0], math.prod(shapes[second][1:])

    @staticmethod
    def _is_old(shapes: Shapes) -> bool:
        """Of a square weight both orders fit together: then the shorter side is the rank."""
        old = shapes["b2"][1] == shapes["b1"][0] == shapes["a1"][0] == shapes["a2"][1]
        new = shapes["b2"][0] == shapes["b1"][1] == shapes["a1"][1] == shapes["a2"][0]
        return old and (not new or shapes["a1"][0] <= shapes["a1"][1])

    @classmethod
    def rank(cls, shapes: Shapes) -> int:
        return shapes["a1"][0] if cls._is_old(shapes) else shapes["a2"][0]

    @classmethod
    def coherent(cls, shapes: Shapes, weight: tuple[int, ...]) -> bool:
        if len(weight) < 2 or any(len(shapes[role]) < 2 for role in ("a1", "a2", "b1", "b2")):
            return False
        old = cls._is_old(shapes)
        left, right, first, second = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
        flat = {role: (shapes[role][0], math.prod(shapes[role][1:])) for role in (left, right, first)}
        rank, into = cls.rank(shapes), math.prod(weight[1:]) if old else weight[1]
        return (
            super().coherent(shapes, weight)
            and flat[left] == (into, rank)
            and flat[right] == (rank, into)
            and flat[first][1] == rank == shapes[second][0]
        )

    def delta(self, weight: Tensor, rows: slice) -> Tensor:
        shapes = {role: tuple(self._tensor(role).shape) for role in ("a1", "a2", "b1", "b2")}
        left, right, first, second = ("a2", "a1", "b2", "b1") if self._is_old(shapes) else ("a1", "a2", "b1", "b2")
        one, two = (self._part(role, weight.device).flatten(1) for role in (left, right))
        channels = weight.view(len(weight), len(one), -1)
        turned = torch.einsum("oik,ir,rj->ojk", channels, one, two).reshape(weight.shape)
        added = self._part(first, weight.device, rows).flatten(1) @ self._part(second, weight.device).flatten(1)
        return (turned + added) * self.scale
