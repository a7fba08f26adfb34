"""How a model's blocks are gone through, one after another: as they are, or compiled."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING

import torch

from .attention import BACKENDS, DENSE_BLOCKS, Attend, sdpa
from .layers import PerSegment

if TYPE_CHECKING:
    from .dit import Block, TextStates

log = logging.getLogger(__name__)


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

    def attend_in(self, index: int) -> Attend:
        """A way to attend that leaves things out does not do so in the first blocks."""
        return sdpa if index < getattr(self.attend, DENSE_BLOCKS, 0) else self.attend


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
        sources = given.text.of_block(index, block.cross_attn)
        return block(x, given.timed, given.rope, sources, given.attend_in(index))


class CompiledRunner(BlockRunner):
    """Blocks by ``torch.compile``: one graph serves all of them, whatever the step and the prompt.

    Another size of the video makes a second graph, which serves all later sizes. Where a block cannot be compiled (a
    layer says so by ``compiles``), or compiling fails, blocks are called as they are.

    Attributes:
        tell: is told what the user should know.
        progress: is told what is under way and takes long.
        paused: call blocks as they are for now, as where somebody watches their layers.
        graphs: how many were compiled.

    Args:
        backend: of ``torch.compile``, by its name.
    """

    def __init__(self, backend: str = "inductor"):
        self.tell: Callable[[str], None] = log.warning
        self.progress: Callable[[str], None] = log.info
        self.paused = False
        self.graphs = 0
        self._backend = backend
        self._ended = ""  # why nothing is compiled any more
        self._said = False
        self._block: Callable[..., torch.Tensor] | None = None

    def run(self, blocks: Iterable[Block], x: torch.Tensor, given: Given) -> torch.Tensor:
        if torch.is_grad_enabled():
            return super().run(blocks, x, given)
        graphs, began = self.graphs, time.monotonic()
        made = super().run(blocks, x, given)
        if self.graphs > graphs:
            log.info("wan_core: compiled and called the blocks in %.0f seconds", time.monotonic() - began)
        return made

    def step(self, block: Block, index: int, x: torch.Tensor, given: Given) -> torch.Tensor:
        plain = super().step
        if self.paused or self._ended or torch.is_grad_enabled() or not self._suits(block):
            return plain(block, index, x, given)
        sources = given.text.of_block(index, block.cross_attn)
        x = x if x._base is None else x.clone()  # the first block's is a view, which would ask for a graph of its own
        try:
            return self._compiled()(block, x, given.timed, given.rope, sources, operator_of(given.attend_in(index)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the tracer, the compiler, its C compiler; an error of the block's comes again
            self._ended = _first_cause(error)
            self.tell(f"The transformer's blocks cannot be compiled here and are run as they are ({self._ended}).")
            return plain(block, index, x, given)  # a compiled block writes over nothing that it is given

    def _suits(self, block: Block) -> bool:
        hinders = next((name for name, part in block.named_modules() if not getattr(part, "compiles", True)), None)
        if hinders and not self._said:
            self._said = True
            self.tell(
                f"Blocks with layers like {hinders} ({type(block.get_submodule(hinders)).__name__}) are not compiled: "
                "weights that stay quantised or in their file, or that LoRAs are merged into at each step."
            )
        return hinders is None

    def _compiled(self) -> Callable[..., torch.Tensor]:
        """``Block.forward`` with a code object of its own: PyTorch keeps graphs with it, and they go with it."""
        if self._block is None:
            from .dit import Block

            plain = Block.forward
            own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__, plain.__defaults__)
            runner, compiler = weakref.ref(self), torch._dynamo.lookup_backend(self._backend)

            def compiled(graph: torch.fx.GraphModule, example: list) -> Callable:
                if owner := runner():  # PyTorch keeps this function for ever
                    owner._announce()
                return compiler(graph, example)

            self._block = torch.compile(own, backend=compiled, fullgraph=True)
        return self._block

    def _announce(self) -> None:
        self.graphs += 1
        again = "" if self.graphs == 1 else " again, for another size or another way to attend"
        self.progress(f"The transformer's blocks are being compiled{again}: this step takes longer, perhaps a minute.")


def _first_cause(error: BaseException) -> str:
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@cache
def _opaque() -> Callable[..., torch.Tensor]:
    """Attention by a backend's name, into which the compiler does not look. Made when first needed: it takes long."""

    @torch.library.custom_op("wan_core::attend", mutates_args=())
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, kind: str) -> torch.Tensor:
        return BACKENDS[backend].run(q, k, v, kind=kind).contiguous()

    @attend.register_fake
    def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str, kind: str) -> torch.Tensor:
        return torch.empty_like(q, memory_format=torch.contiguous_format)

    return attend


_operators: dict[str, Attend] = {}


def operator_of(attend: Attend) -> Attend:
    """A way to attend that a graph may hold: PyTorch's own as it is, another package's without a look inside."""
    name = next((name for name, backend in BACKENDS.items() if backend.run is attend), None)
    if attend is sdpa or name is None:
        return attend
    if name not in _operators:
        opaque = _opaque()
        _operators[name] = lambda q, k, v, *, kind="self": opaque(q, k, v, name, kind)
    return _operators[name]
