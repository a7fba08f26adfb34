"""How a model's blocks are gone through, one after another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .attention import Attend
from .layers import PerSegment

if TYPE_CHECKING:
    from .dit import Block, TextStates


@dataclass(frozen=True, eq=False)
class Given:
    """What all blocks are given in one call of a model.

    Attributes:
        timed: the six modulations of the timestep, [B, segments, 6, dim].
        rope: the table of rotations, see ``rope_table``.
        text: what cross-attention hears.
        weights_of: the time in which a block's weights are on the device.
        on_block: called with a block's index before it; may raise to cancel.
        skip: blocks that are left out.
    """

    timed: PerSegment
    rope: torch.Tensor
    text: TextStates
    attend: Attend
    weights_of: Callable[[int], AbstractContextManager] = lambda index: nullcontext()
    on_block: Callable[[int], None] | None = None
    skip: Collection[int] = ()


class BlockRunner:
    """Calls block after block as they are; others of its kind call them in other ways."""

    def run(self, blocks: Iterable[Block], x: torch.Tensor, given: Given) -> torch.Tensor:
        """Tokens [B, L, dim] -> the same after all blocks; may overwrite x."""
        for index, block in enumerate(blocks):
            if given.on_block:
                given.on_block(index)
            with given.weights_of(index):  # of one left out too: blocks that stream come in their order
                if index not in given.skip:
                    x = self.step(block, index, x, given)
        return x

    def step(self, block: Block, index: int, x: torch.Tensor, given: Given) -> torch.Tensor:
        """One block, whose weights are on the device."""
        return block(x, given.timed, given.rope, given.text.of_block(index, block.cross_attn), given.attend)
