"""The one place where weights live: recipes in, models out, and everything given back on request.

Nodes and the pipeline ask for a part when they are about to use it. What was loaded stays for the next run while
there is room; the least recently used goes first. ``release`` drops all, and with the last tensor the mapped files.
"""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .checkpoint import text as text_layout
from .checkpoint.unchanged import check_unchanged
from .config import TEXT_LENGTH, PerExpert
from .devices import available_bytes, empty_cache
from .dtypes import resolve_dtype
from .models.dit import TextStates, WanDiT
from .models.load_dit import DiTFile, build_dit
from .models.load_vae import VAEFile, build_vae
from .models.text_encoder import TextEncoder, TextFile, build_text_encoder
from .models.vae import VideoVAE
from .offload import spread
from .recipe import ModelRecipe
from .sampling.experts import Expert, Experts
from .sampling.guidance import Condition

log = logging.getLogger(__name__)

_MARGIN = 2 * 1024**3  # room left for activations


@dataclass
class _Loaded:
    part: Any
    bytes: int
    device: torch.device


def _no_room_made(needed: int, device: torch.device) -> None: ...


@dataclass
class Engine:
    """Loads, keeps and releases models.

    Args:
        make_room: called with the bytes about to be loaded and the device, before each load, so that a host
            (ComfyUI) can move its own models away.
        keep_one: hold one model at a time on a device other than the CPU, whatever the room (``--offload_model``).
    """

    make_room: Callable[[int, torch.device], None] = _no_room_made
    keep_one: bool = False
    loads: int = 0  # how many models were read so far; a run that reloads nothing leaves it as it was
    _loaded: OrderedDict[Hashable, _Loaded] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, size: int, device: torch.device | str, load: Callable[[], Any]) -> Any:
        """The part under this key, loaded now if it is not there yet.

        Args:
            size: bytes it takes on the device.
            load: makes the part.
        """
        device = torch.device(device)
        if key in self._loaded:
            self._loaded.move_to_end(key)
            return self._loaded[key].part
        self.make_room(size, device)
        self._evict_for(size, device)
        self.loads += 1
        part = load()
        log.info("wan_core: loaded %s on %s (%.2f GB)", key[0], device, size / 1e9)
        self._loaded[key] = _Loaded(part, size, device)
        return part

    def dit(self, file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> WanDiT:
        """One expert's weights, as the recipe wants them.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_dit``.
        """
        check_unchanged(file)
        key = ("dit", file.fingerprint, str(device), recipe.dtype, recipe.attention, recipe.swap_blocks)
        return self.get(key, dit_bytes(file, recipe, device), device, lambda: build_dit(
            file, device=device, dtype=recipe.dtype, attention=recipe.attention, swap_blocks=recipe.swap_blocks,
        ))  # fmt: skip

    def experts(self, recipe: ModelRecipe, guidance: PerExpert, device: torch.device | str) -> Experts:
        """A recipe's experts as ``denoise`` calls them; nothing is loaded before the first call."""
        high = LazyDiT(self, recipe.high, recipe, torch.device(device))
        if recipe.low is None:
            return Experts.dense(high, guidance.low)
        low = LazyDiT(self, recipe.low, recipe, torch.device(device))
        return Experts(
            high=Expert(high, guidance.high, "high"), low=Expert(low, guidance.low, "low"),
            boundary=recipe.variant.boundary, switch=recipe.switch,
        )  # fmt: skip

    def text_encoder(self, file: TextFile, device: torch.device | str, dtype: str | torch.dtype | None) -> TextEncoder:
        """A text encoder with its weights.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_text_encoder``.
        """
        check_unchanged(file)
        key = ("text", file.fingerprint, str(device), str(dtype))
        size = _bytes(file, device, dtype, skip=(text_layout.TABLE,))
        return self.get(key, size, device, lambda: build_text_encoder(file, device=device, dtype=dtype))

    def vae(self, file: VAEFile, device: torch.device | str, dtype: str | torch.dtype | None) -> VideoVAE:
        """A VAE with its weights.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_vae``.
        """
        check_unchanged(file)
        key = ("vae", file.fingerprint, str(device), str(dtype))
        return self.get(key, _bytes(file, device, dtype), device, lambda: build_vae(file, device=device, dtype=dtype))

    def release(self, *kinds: str) -> None:
        """Drop what is loaded; with kinds ("dit", "vae", "text"), only those."""
        for key in [k for k in self._loaded if not kinds or k[0] in kinds]:
            del self._loaded[key]
        gc.collect()
        empty_cache()

    def shrink(self, wanted: int, device: torch.device | str) -> int:
        """Drop the least recently used parts on a device until ``wanted`` bytes are free; returns how many are."""
        before = self.bytes_on(device)
        for key in [k for k, entry in self._loaded.items() if entry.device == torch.device(device)]:
            if before - self.bytes_on(device) >= wanted:
                break
            del self._loaded[key]
        gc.collect()
        empty_cache()
        return before - self.bytes_on(device)

    def bytes_on(self, device: torch.device | str) -> int:
        """Bytes of weights held for a device."""
        return sum(entry.bytes for entry in self._loaded.values() if entry.device == torch.device(device))

    def _evict_for(self, size: int, device: torch.device) -> None:
        on_device = [key for key, entry in self._loaded.items() if entry.device == device]
        for key in on_device:
            if not (self.keep_one and device.type != "cpu") and available_bytes(device) >= size + _MARGIN:
                return
            log.info("wan_core: releasing %s to make room", key[0])
            del self._loaded[key]
            gc.collect()
            empty_cache()


class LazyDiT:
    """An expert that fetches its weights from the engine when it is called, and remembers each prompt's text states."""

    def __init__(self, engine: Engine, file: DiTFile, recipe: ModelRecipe, device: torch.device):
        self.engine = engine
        self.file = file
        self.recipe = recipe
        self.device = device
        self._owner: weakref.ref[WanDiT] | None = None  # weak, so that the engine can release it during the run
        self._texts: dict[int, tuple[Condition, TextStates]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        on_block: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        dit = self.engine.dit(self.file, self.recipe, self.device)
        x = self._with_channels(x.to(self.device), condition)
        return dit(x, t, self._text(dit, condition, len(x)), on_block=on_block).to(torch.float32)

    def _with_channels(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        if condition.concat is None:
            return x
        extra = condition.concat.to(x)
        return torch.cat([x, extra.expand(len(x), *extra.shape[1:])], dim=1)

    def _text(self, dit: WanDiT, condition: Condition, batch: int) -> TextStates:
        if self._owner is None or dit is not self._owner():  # loaded again: the old states belong to old weights
            self._owner, self._texts = weakref.ref(dit, lambda _: self._texts.clear()), {}
        if id(condition) not in self._texts:
            text = pad_text(condition.text)
            self._texts[id(condition)] = condition, dit.text_states(text.expand(batch, *text.shape[1:]))
        return self._texts[id(condition)][1]


def pad_text(text: torch.Tensor) -> torch.Tensor:
    """[B, L, D] -> at least 512 rows: cross-attention was trained to see the zeros after a prompt."""
    missing = TEXT_LENGTH - text.shape[1]
    return nn.functional.pad(text, (0, 0, 0, missing)) if missing > 0 else text


def dit_bytes(file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> int:
    """Bytes on the device of one expert, without its swapped blocks."""
    swapped = spread(recipe.swap_blocks, file.config.layers)
    return _bytes(file, device, recipe.dtype, skip=tuple(f"blocks.{i}." for i in swapped))


def _bytes(
    file: DiTFile | TextFile | VAEFile,
    device: torch.device | str,
    dtype: str | torch.dtype | None,
    skip: tuple[str, ...] = (),
) -> int:
    """Bytes of a file's weights in the dtype of the computation, without those whose names begin with ``skip``."""
    width = resolve_dtype(dtype, device, file.checkpoint.dtype).itemsize
    tensors = file.checkpoint.tensors
    kept = (tensors[theirs].shape for own, theirs in file.names.items() if not own.startswith(skip))
    return sum(math.prod(shape) * width for shape in kept)
