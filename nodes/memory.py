"""The engine's weights as ComfyUI's memory manager sees them.

ComfyUI keeps a list of loaded models and asks them to leave when another needs room, or when the user presses "free
memory". One object that looks like such a model stands in that list for everything the engine holds: it tells the
truth about the size, and leaving means that the engine lets go. ComfyUI never touches the weights themselves.
"""

from __future__ import annotations

import logging
from traceback import walk_tb
from typing import TYPE_CHECKING

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

if TYPE_CHECKING:
    from ..wan_core.memory.budget import Budget
    from ..wan_core.memory.engine import Engine

log = logging.getLogger(__name__)


class WanWeights(nn.Module):
    """An empty module under whose name ComfyUI's log speaks of the engine's weights."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device


class Residency(ModelPatcher):
    """The entry in ComfyUI's list; overrides all that would move or patch weights."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        super().__init__(WanWeights(device), load_device=device, offload_device=torch.device("cpu"))
        self.engine = engine
        self.incoming = 0  # bytes about to be loaded
        self.understood = True

    def make_room(self, needs: Budget, device: torch.device) -> None:
        """The engine's callback before a part is loaded or works: ComfyUI moves models of its own away and lists the
        engine's."""
        if not self.understood:
            return
        here = device == self.load_device
        self.incoming = needs.loaded if here else 0
        try:
            management.load_models_gpu([self], memory_required=needs.beside if here else 0)
        except (AttributeError, TypeError) as error:
            if raised_here(error):
                raise
            self.understood = False
            log.warning(
                "This ComfyUI's memory manager works in a way that the Wan nodes do not know: its models will "
                "not move away for theirs, and 'free memory' will not free theirs.",
                exc_info=True,
            )
        finally:
            self.incoming = 0

    def model_size(self) -> int:
        return self.loaded_size() + self.incoming

    def loaded_size(self) -> int:
        return self.engine.bytes_on(self.load_device)

    def get_ram_usage(self) -> int:
        return 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, *_: object, **__: object) -> int:
        return 0  # the engine loads, when it is asked for a part

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, *_: object, **__: object) -> int:
        """Drop whole parts, the least recently used first; returns the bytes that are free now."""
        return self.engine.shrink(int(memory_to_free), self.load_device)

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """Leave the list. Without ``unpatch_all`` the entry is only being replaced by itself and the weights stay."""
        if unpatch_all:
            self.engine.release()
        return self.model

    def clone(self) -> Residency:
        return self


def raised_here(error: BaseException) -> bool:
    """Whether the pack's own code raised an error, and not ComfyUI's or a library's."""
    pack = __name__.rpartition(".nodes.")[0] or __name__
    *_, (innermost, _) = walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith(pack)
