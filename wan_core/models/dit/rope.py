"""Rotary position embedding over frames, rows and columns.

Sources: RoFormer (arXiv 2104.09864); official ``wan/modules/model.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .order import Grid, Order

_THETA = 10000.0
SLICE = 4096  # tokens in one float32 slice


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's complex pairs rotate with time, height and width."""
    side = head_dim // 6
    return head_dim // 2 - 2 * side, side, side


class RopeTables:
    """The tables of the last shapes that a model saw: held by the model, and freed with it.

    Args:
        most: how many; one of 720p is 39 MB of the device's memory.
    """

    def __init__(self, head_dim: int, most: int = 2):
        self.head_dim, self.most = head_dim, most
        self._made: dict[tuple, tuple[torch.Tensor, ...]] = {}  # the one used last is the last

    def of(self, grid: Grid, device: torch.device) -> torch.Tensor:
        """See ``rope_table``."""
        return self._kept((grid, device, None), lambda: (rope_table(grid, self.head_dim, device),))[0]

    def in_order(self, grid: Grid, device: torch.device, order: Order) -> tuple[torch.Tensor, ...]:
        """The table of tokens that stand in another order; their numbers [L] in that order; where each stands [L]."""

        def made() -> tuple[torch.Tensor, ...]:
            numbers = order(grid)
            table = rope_table(grid, self.head_dim, numbers.device)[numbers]
            return tuple(part.to(device) for part in (table, numbers, numbers.argsort()))

        return self._kept((grid, device, order), made)

    def _kept(self, key: tuple, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        made = self._made.pop(key, None)
        if made is None:
            while len(self._made) >= self.most:
                del self._made[next(iter(self._made))]
            with torch.inference_mode(False):  # see ``rope_table``
                made = make()
        self._made[key] = made
        return made


@torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, whose tensors training could not use
def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> torch.Tensor:
    """Cosine and sine of every token's rotations, for a grid (frames, rows, columns): float32 [L, 1, head_dim / 2, 2].

    Angles are computed in float64.
    """
    axes = [_rotations(n, pairs) for n, pairs in zip(grid, axis_pairs(head_dim), strict=True)]
    t, h, w = grid
    table = torch.cat(
        [
            axes[0].view(t, 1, 1, -1).expand(t, h, w, -1),
            axes[1].view(1, h, 1, -1).expand(t, h, w, -1),
            axes[2].view(1, 1, w, -1).expand(t, h, w, -1),
        ],
        dim=-1,
    )
    table = table.reshape(t * h * w, 1, head_dim // 2).to(torch.complex64)
    return torch.view_as_real(table).contiguous().to(device)


def _rotations(positions: int, pairs: int) -> torch.Tensor:
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), _THETA**-exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys [B, L, heads, head_dim]; computed in float32, returned in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if is_narrow(x.device) or torch.compiler.is_compiling():  # compilers leave complex numbers as they are
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).to(x.dtype)


def rotate_(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The same, overwriting x; half precision goes slice by slice to keep the float32 copy small."""
    if x.dtype == torch.float32 and not is_narrow(x.device):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(torch.view_as_complex(table))
        return x
    for a in range(0, x.shape[1], SLICE):
        b = a + SLICE
        x[:, a:b] = rotate(x[:, a:b], table[a:b])
    return x


def is_narrow(device: torch.device) -> bool:
    """Apple's and DirectML's backends have neither float64 nor complex numbers."""
    return device.type in ("mps", "privateuseone")
