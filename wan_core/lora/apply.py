"""How adapters reach a loaded model, with the file's weights left as they are.

Matrices of blocks that are quantised or stream get their low-rank updates beside them: ``(x A^T) B^T`` is added to what
the layer answers. Adapters that cannot be expressed so are merged, in the dequantised space, into a scratch buffer
each time. Adapters of a streamed block travel with it. All other weights are small or lie on the device as they are
used: those are merged once, from the file, and merged again when a strength changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files.unchanged import check_unchanged
from ..layouts.dit import packs
from ..layouts.keys import block_of
from ..loading.dit import DiTFile
from ..mapped import fetch
from ..models.dit.dit import WanDiT, keeps_float32
from ..quant.linear import QuantLinear
from ..quant.scratch import Scratch
from .adapters import Adapter
from .files import LoraFile, Part
from .kinds import merge_into

Passenger: TypeAlias = tuple[nn.Module, str, Tensor, torch.dtype]  # module, name, tensor, wanted dtype


class PatchedLinear(nn.Module):
    """A linear layer, packed or not, and its adapters.

    Args:
        places: of each adapter, where in ``strengths`` its own stands; the list belongs to the whole model.
    """

    def __init__(
        self,
        base: nn.Linear | QuantLinear,
        adapters: Sequence[Adapter],
        places: Sequence[int],
        strengths: list[float],
        scratch: Scratch,
    ):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList(adapters)
        self.places, self.strengths, self.scratch = tuple(places), strengths, scratch

    @property
    def compiles(self) -> bool:
        """Whether all that is active is added to the answer."""
        return all(adapter.additive for adapter, _ in self._active())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        active = self._active()
        if not all(adapter.additive for adapter, _ in active):
            return F.linear(x, self._merged(active, like=x), self.base.bias)
        y = self.base(x)
        for adapter, strength in active:
            adapter.add_(y, x, strength)
        return y

    def _active(self) -> list[tuple[Adapter, float]]:
        placed = zip(cast(Sequence[Adapter], self.adapters), self.places, strict=True)
        return [(adapter, self.strengths[place]) for adapter, place in placed if self.strengths[place]]

    def _merged(self, active: Sequence[tuple[Adapter, float]], like: Tensor) -> Tensor:
        base = self.base
        out = self.scratch.space((base.out_features, base.in_features), like=like)
        return merge_into(out, partial(_rows_of, base), active)


def _rows_of(layer: nn.Linear | QuantLinear, rows: slice) -> Tensor:
    if isinstance(layer, QuantLinear):
        packed = layer.packed
        return type(packed)(packed.format, dict(packed.format.rows(packed.parts, rows))).dequantise()
    return fetch(layer.weight[rows])


@dataclass(frozen=True)
class _Merged:
    """A weight that holds its adapters: its own key, and each adapter with the place of its strength."""

    key: str
    adapters: tuple[tuple[Adapter, int], ...]


class Adaptation:
    """The adapters of one loaded model, which holds this.

    Attributes:
        revision: changes whenever the model answers differently from before.
    """

    def __init__(self, model: WanDiT, file: DiTFile) -> None:
        self._model = weakref.ref(model)
        self.file = file
        self.revision = 0
        self._loras: tuple[LoraFile, ...] = ()
        self._merge = False
        self._strengths: list[float] = []
        self._merged: list[_Merged] = []
        self._patched: list[str] = []

    @property
    def model(self) -> WanDiT:
        return cast(WanDiT, self._model())

    def set(self, loras: Sequence[LoraFile], strengths: Sequence[float], *, merge: bool = False) -> None:
        """Have the model answer with these LoRAs, in this order; what is so already is left alone.

        Args:
            merge: merge once also into matrices that lie on the device unpacked: no cost at each step, but theirs are
                read again when a strength changes.

        Raises:
            WanError: a file was changed since its header was read.
        """
        for lora in loras:
            check_unchanged(lora)
        same = [_meaning(one) for one in loras] == [_meaning(one) for one in self._loras] and merge == self._merge
        if same and list(strengths) == self._strengths:
            return
        self.revision += 1
        with ExitStack() as files:
            for checkpoint in (self.file.checkpoint, *(lora.checkpoint for lora in loras)):
                files.enter_context(checkpoint.reading())
            self._change(None if same else tuple(loras), strengths, merge=merge)

    def _change(self, loras: tuple[LoraFile, ...] | None, strengths: Sequence[float], *, merge: bool) -> None:
        """Put these LoRAs in the place of those that are there; None only changes the strengths."""
        try:
            if loras is None:
                self._strengths[:] = strengths
                self._merge_all()
            else:
                self._undo()
                self._loras, self._merge, self._strengths = loras, merge, list(strengths)
                self._build()
        except BaseException:  # out of memory, or cancelled: half of it would be worse than nothing
            self._undo()
            raise

    @torch.no_grad()
    def _build(self) -> None:
        scratch, apart = Scratch(), []
        beside: dict[int, list[Passenger]] = {}
        for key, parts in _by_weight(self._loras).items():
            if not self._stays_beside(key, parts):
                adapters = tuple((part.read(lora.checkpoint), place) for place, lora, part in parts)
                self._merged.append(_Merged(key, adapters))
                apart.append(self._slot(key))
                continue
            patched = self._patch(key.removesuffix(".weight"), parts, scratch)
            if (block := self._streamed_block(key)) is not None:
                beside.setdefault(block, []).extend(self._passengers(patched))
            else:
                self._settle(patched)
        if self.model.swap:
            self.model.swap.carry(beside, apart, [partial(check_unchanged, lora) for lora in self._loras])
        self._merge_all()

    def _stays_beside(self, key: str, parts: Sequence[tuple[int, LoraFile, Part]]) -> bool:
        """Whether a weight is left as it is, and its adapters work beside it."""
        if not packs(key):
            return False
        if self._streamed_block(key) is not None or self._is_packed(key):
            return True
        return not self._merge and all(part.kind.adds(part.keys) for _, _, part in parts)

    def _patch(self, path: str, parts: Sequence[tuple[int, LoraFile, Part]], scratch: Scratch) -> PatchedLinear:
        base = cast("nn.Linear | QuantLinear", self.model.get_submodule(path))
        adapters = [part.read(lora.checkpoint) for _, lora, part in parts]
        patched = PatchedLinear(base, adapters, [place for place, _, _ in parts], self._strengths, scratch)
        _replace(self.model, path, patched)
        self._patched.append(path)
        return patched

    def _wanted_dtype(self, adapter: Adapter, tensor: Tensor) -> torch.dtype:
        """Added updates are in the dtype of the computation; merged ones are cast when they are merged."""
        return self.model.dtype if adapter.additive else tensor.dtype

    def _cargo(self, patched: PatchedLinear) -> Iterator[Passenger]:
        for adapter in cast(Sequence[Adapter], patched.adapters):
            for role, tensor in adapter.named_buffers():
                yield adapter, role, tensor, self._wanted_dtype(adapter, tensor)

    def _passengers(self, patched: PatchedLinear) -> Iterator[Passenger]:
        """What travels; on a CPU, what is merged is read from its file some rows at a time as it is."""
        on_cpu = self.model.device.type == "cpu"
        return (one for one in self._cargo(patched) if not on_cpu or one[0].additive)

    def _settle(self, patched: PatchedLinear) -> None:
        """The adapters' tensors come to the device; whole differences stay in their file, they are as large as the
        weights.
        """
        for adapter, role, tensor, dtype in self._cargo(patched):
            if adapter.additive or role not in ("diff", "set"):
                adapter._buffers[role] = fetch(tensor, self.model.device, dtype, aligned=True)

    def _merge_all(self) -> None:
        for merged in self._merged:
            active = [(adapter, self._strengths[place]) for adapter, place in merged.adapters if self._strengths[place]]
            self._put(merged.key, active)

    @torch.no_grad()
    def _put(self, key: str, active: Sequence[tuple[Adapter, float]]) -> None:
        """A weight from its file, with adapters or without."""
        stored = self.file.checkpoint.tensor(self.file.names[key])
        owner, name = self._slot(key)
        dtype = torch.float32 if keeps_float32(key) else self.model.dtype
        if active:
            out = torch.empty(stored.shape, dtype=dtype, device=self.model.device)
            weight = merge_into(out, lambda rows: fetch(stored[rows]), active)
        elif getattr(owner, "scratch", None) is not None and stored.dtype == dtype:
            weight = stored  # the layer reads it at each use
        else:
            weight = fetch(stored, self.model.device, dtype, aligned=True)
        owner._parameters[name] = nn.Parameter(weight, requires_grad=False)

    def _undo(self) -> None:
        for path in self._patched:
            _replace(self.model, path, cast(PatchedLinear, self.model.get_submodule(path)).base)
        if self.model.swap:
            self.model.swap.carry({}, [], [])
        for merged in self._merged:
            if self._streamed_block(merged.key) is None or not self.model.swap.brings(*self._slot(merged.key)):
                self._put(merged.key, [])
        self._patched, self._merged, self._loras, self._strengths = [], [], (), []

    def _streamed_block(self, key: str) -> int | None:
        if self.model.swap is None or self.model.swap.places(key):
            return None
        return block_of(key)

    def _is_packed(self, key: str) -> bool:
        return isinstance(self._slot(key)[0], QuantLinear)

    def _slot(self, key: str) -> tuple[nn.Module, str]:
        """The module that holds a weight, and the weight's name there."""
        path, _, name = key.rpartition(".")
        owner = self.model.get_submodule(path)
        return owner.base if isinstance(owner, PatchedLinear) else owner, name


def adaptation_of(model: WanDiT, file: DiTFile) -> Adaptation:
    """The one that a model has; it begins with no LoRAs."""
    if model.adaptation is None:
        model.adaptation = Adaptation(model, file)
    return cast(Adaptation, model.adaptation)


def _meaning(lora: LoraFile) -> tuple:
    """What two readings of a file have in common that change the same; one may be of its half for the other expert."""
    return lora.fingerprint, lora.parts


def _by_weight(loras: Sequence[LoraFile]) -> Mapping[str, list[tuple[int, LoraFile, Part]]]:
    """Our key -> every adapter of it: the LoRA's place in the chain, its file, its part."""
    found: dict[str, list[tuple[int, LoraFile, Part]]] = {}
    for place, lora in enumerate(loras):
        for key, parts in lora.parts.items():
            found.setdefault(key, []).extend((place, lora, part) for part in parts)
    return found


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._modules[name] = layer
