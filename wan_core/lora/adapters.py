"""What a LoRA file does to one weight: one class for each way, found in ``KINDS`` by the roles of its tensors.

A weight is seen as a matrix [rows, columns]: of a convolution all but the output channels are columns. Formulas are
those of ComfyUI's ``comfy/weight_adapter``, computed in float32, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]  # role -> shape

_AT_ONCE = {"cpu": 1 << 20}  # numbers merged in one go
_AT_ONCE_ELSEWHERE = 1 << 24
_DECOMPOSED = ("dora", "magnitude")


class Adapter(nn.Module):
    """An update of one weight. Its tensors are buffers under their roles, wherever and in whatever dtype they lie."""

    needs: tuple[frozenset[str], ...]  # sets of roles, one of which is the kind's
    products: tuple[tuple[str, str], ...] = ()  # roles of matrices that are multiplied, where a file has them

    def __init__(self, parts: Mapping[str, Tensor], alpha: float | None):
        super().__init__()
        for role, part in parts.items():
            self.register_buffer(role, part)
        rank = self.rank({role: tuple(part.shape) for role, part in parts.items()})
        self.scale = 1.0 if alpha is None or rank is None else alpha / rank

    @classmethod
    def adds(cls, roles: Collection[str]) -> bool:
        """Whether one with these roles can be added to what a layer answers, with no merged matrix."""
        return False

    @property
    def additive(self) -> bool:
        return self.adds(self._buffers)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        """Rows and columns of the weight that it is for."""
        raise NotImplementedError

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        """What alpha is divided by; None where it does not count."""
        return None

    @classmethod
    def coherent(cls, shapes: Shapes) -> bool:
        """Whether the tensors of one weight go together."""
        rows, columns = cls.size(shapes)
        lengths = {role: math.prod(shapes[role]) for role in _BESIDE & shapes.keys()}
        wanted = {"alpha": 1, "magnitude": rows}
        if "dora" in lengths:
            wanted["dora"] = columns if shapes["dora"][:1] == (1,) else rows
        return all(lengths[role] == wanted[role] for role in lengths) and all(
            math.prod(shapes[left][1:]) == shapes[right][0] for left, right in cls.products if left in shapes
        )

    def delta(self, rows: slice, device: torch.device) -> Tensor:
        """What strength 1 adds to some rows of the weight, float32."""
        raise NotImplementedError

    @property
    def wants_all_rows(self) -> bool:
        """Whether the rows of a weight cannot be merged independently."""
        dora = self._buffers.get("dora")
        return dora is not None and dora.shape[0] == 1

    def merge_(self, weight: Tensor, rows: slice, strength: float) -> None:
        """Change some rows of a weight [rows, columns], float32."""
        update = self.delta(rows, weight.device).reshape(weight.shape)
        if not any(role in self._buffers for role in _DECOMPOSED):
            weight.add_(update, alpha=strength)
            return
        weight.lerp_(self._decomposed(weight, update, rows), strength)

    def _decomposed(self, weight: Tensor, update: Tensor, rows: slice) -> Tensor:
        """DoRA (arXiv 2402.09353): the sum, with the length of each row, or each column, that was learned.

        ComfyUI divides rows by the length of the old weight's, where the paper, and PEFT, take the sum's. Each file
        means what its own program did with it: ``dora_scale`` is ComfyUI's, ``lora_magnitude_vector`` is PEFT's.
        """
        total = weight + update
        if "magnitude" in self._buffers:
            wanted, length = self._part("magnitude", weight.device).view(-1, 1)[rows], total.norm(dim=1, keepdim=True)
            return total * (wanted / length)
        wanted = self._part("dora", weight.device)
        if self.wants_all_rows:
            length = total.norm(dim=0, keepdim=True)
        else:
            wanted, length = wanted.view(-1, 1)[rows], weight.norm(dim=1, keepdim=True)
        return total * (wanted / (length + torch.finfo(torch.float32).eps))

    def _part(self, role: str, device: torch.device, rows: slice = slice(None)) -> Tensor:
        return self._buffers[role][rows].to(device, torch.float32)


class LowRank(Adapter):
    """LoRA (arXiv 2106.09685): up [rows, rank] times down [rank, columns]."""

    needs = (frozenset({"up", "down"}),)
    products = (("up", "down"),)

    @classmethod
    def adds(cls, roles: Collection[str]) -> bool:
        return not any(role in roles for role in _DECOMPOSED)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["up"][0], math.prod(shapes["down"][1:])

    @classmethod
    def rank(cls, shapes: Shapes) -> int:
        return shapes["down"][0]

    def delta(self, rows: slice, device: torch.device) -> Tensor:
        return self._part("up", device, rows).flatten(1) @ self._part("down", device).flatten(1) * self.scale

    def add_(self, y: Tensor, x: Tensor, strength: float) -> None:
        """To what a layer makes of x [..., columns], y [..., rows]; with tensors of their dtype and device."""
        low = F.linear(x, self.down.flatten(1)).flatten(0, -2)
        y.view(-1, y.shape[-1]).addmm_(low, self.up.flatten(1).T, alpha=strength * self.scale)


class Hadamard(Adapter):
    """LoHa (arXiv 2108.06098): the elementwise product of two low-rank matrices."""

    needs = (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),)
    products = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["hada_w1_a"][0], math.prod(shapes["hada_w1_b"][1:])

    @classmethod
    def rank(cls, shapes: Shapes) -> int:
        return shapes["hada_w1_b"][0]

    def delta(self, rows: slice, device: torch.device) -> Tensor:
        one, two = (
            self._part(f"hada_w{n}_a", device, rows) @ self._part(f"hada_w{n}_b", device).flatten(1) for n in (1, 2)
        )
        return one * two * self.scale


class Kronecker(Adapter):
    """LoKr (arXiv 2309.14859): the Kronecker product of two matrices, either of which may be a low-rank product."""

    needs = tuple(
        frozenset(one + two)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    )
    products = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        one, two = (shapes[name] if name in shapes else (shapes[f"{name}_a"][0], shapes[f"{name}_b"][1])
                    for name in ("lokr_w1", "lokr_w2"))  # fmt: skip
        return one[0] * two[0], math.prod(one[1:]) * math.prod(two[1:])

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return next((shapes[name][0] for name in ("lokr_w2_b", "lokr_w1_b") if name in shapes), None)

    def delta(self, rows: slice, device: torch.device) -> Tensor:
        one, two = self._factor("lokr_w1", device), self._factor("lokr_w2", device)
        index = torch.arange(len(one) * len(two), device=device)[rows]
        return torch.einsum("nb,nd->nbd", one[index // len(two)], two[index % len(two)]).flatten(1) * self.scale

    def _factor(self, name: str, device: torch.device) -> Tensor:
        if name in self._buffers:
            return self._part(name, device).flatten(1)
        return self._part(f"{name}_a", device) @ self._part(f"{name}_b", device)


class Difference(Adapter):
    """The whole difference of two weights."""

    needs = (frozenset({"diff"}),)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["diff"][0], math.prod(shapes["diff"][1:])

    def delta(self, rows: slice, device: torch.device) -> Tensor:
        return self._part("diff", device, rows)


class Replacement(Adapter):
    """Another weight in the old one's place, whatever the strength."""

    needs = (frozenset({"set"}),)

    @classmethod
    def size(cls, shapes: Shapes) -> tuple[int, int]:
        return shapes["set"][0], math.prod(shapes["set"][1:])

    def merge_(self, weight: Tensor, rows: slice, strength: float) -> None:
        weight.copy_(self._part("set", weight.device, rows).reshape(weight.shape))


KINDS: tuple[type[Adapter], ...] = (LowRank, Hadamard, Kronecker, Difference, Replacement)
_BESIDE = frozenset({"alpha", *_DECOMPOSED})


def kinds_of(roles: Sequence[str]) -> list[tuple[type[Adapter], frozenset[str]]]:
    """The adapters that a weight's tensors make, each with its roles; those left over belong to none."""
    given = frozenset(roles)
    found = [(kind, next((need for need in kind.needs if need <= given), None)) for kind in KINDS]
    made = [(kind, need) for kind, need in found if need]
    return [(kind, need | (given & _BESIDE if kind not in (Difference, Replacement) else frozenset()))
            for kind, need in made]  # fmt: skip


def merge_into(
    out: Tensor, base: Callable[[slice], Tensor], adapters: Sequence[tuple[Adapter, float]]
) -> Tensor:
    """Fill out with a weight and its adapters, each at a strength, in the order given; rounded once, to out's dtype.

    Args:
        base: some rows of the weight, of any shape, dtype and device.
    """
    flat = out.view(len(out), -1)
    count = max(1, _AT_ONCE.get(out.device.type, _AT_ONCE_ELSEWHERE) // flat.shape[1])
    if any(adapter.wants_all_rows for adapter, _ in adapters):
        count = len(out)
    for start in range(0, len(out), count):
        rows = slice(start, min(start + count, len(out)))
        weight = base(rows).to(out.device, torch.float32, copy=True).view(flat[rows].shape)
        for adapter, strength in adapters:
            adapter.merge_(weight, rows, strength)
        flat[rows] = weight
    return out
