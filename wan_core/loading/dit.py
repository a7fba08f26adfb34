"""From a checkpoint on disk to a WanDiT."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import nn

from ..config import Architecture
from ..dtypes import precision_of
from ..files.checkpoint import Checkpoint
from ..layouts import dit as keys
from ..layouts.architecture import check_runs
from ..layouts.detect import find
from ..models.dit.attention import find_backend
from ..models.dit.dit import WanDiT, keeps_float32
from .build import Rules, load_strict
from .file import ModelFile, Understood, read_file

log = logging.getLogger(__name__)


DiTFile: TypeAlias = ModelFile[Architecture]


def read_dit(path: str | Path) -> DiTFile:
    """Read a DiT's header: milliseconds for safetensors.

    Raises:
        WanError: not there, damaged, something else than a Wan DiT, or a relative that is not supported.
    """
    return read_file(path, understand_dit)


def understand_dit(checkpoint: Checkpoint) -> Understood[Architecture]:
    """Dimensions; our key -> the checkpoint's for every tensor of the model; and what to say of the rest.

    Raises:
        WanError: see ``read_dit``.
    """
    found = find("dit", checkpoint)
    shapes = {own: checkpoint.tensors[theirs].shape for own, theirs in found.names.items()}
    check_runs(checkpoint.path, shapes, checkpoint.metadata)
    keys.refuse_relatives([*found.place.keys, *found.outside], checkpoint.path)
    config, notes = keys.config_of(checkpoint, shapes)
    with torch.device("meta"):
        wanted = WanDiT(config).state_dict().keys()
    keys.refuse_inputs(wanted, found.names, checkpoint.path)
    names, more = found.fit(wanted, checkpoint)
    return config, names, (*notes, *more)


class Stream(Protocol):
    """Blocks whose weights stay in the file, and come to the device for the time of one block."""

    def places(self, key: str) -> bool:
        """Whether a weight of the model, by its full name, lives on the device all the time."""

    def adopt(self) -> Stream:
        """Take over the other blocks' weights, which are loaded (mapped) by now."""


def fill_dit(
    file: DiTFile,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    attention: str = "auto",
    stream: Callable[[nn.ModuleList, torch.dtype], Stream] | None = None,
) -> WanDiT:
    """The model with its weights on the device.

    Args:
        stream: blocks and the computation's dtype -> what brings some of them in their turn.

    Raises:
        WanError: see ``load_strict``, ``find_backend`` and ``precision_of``.
    """
    requested, precision = dtype, precision_of(dtype)
    dtype = precision.on(device, file.checkpoint.dtype)
    backend = find_backend(attention, device, dtype)
    if note := quantised_note(file, requested, device):
        log.info("wan_core: %s", note)
    with torch.device("meta"):
        model = WanDiT(file.config)
    swap = stream(model.blocks, dtype) if stream else None
    rules = Rules(keep_float32=keeps_float32, packs=keys.packs, make=lambda key: precision.weights)
    if swap:
        rules = replace(rules, place=swap.places, spare=lambda key: not key.startswith("blocks."))
    load_strict(model, file.checkpoint, file.names, device=device, dtype=dtype, rules=rules)
    model.attend = backend.run
    model.swap = swap.adopt() if swap else None
    return model


def quantised_note(file: DiTFile, dtype: torch.dtype | str | None, device: torch.device | str) -> str | None:
    """What the user should know of quantised weights on a device that cannot multiply them as they are."""
    made = precision_of(dtype).weights
    infos = (file.checkpoint.tensors[theirs] for own, theirs in file.names.items() if keys.packs(own))
    formats = [made] if made else [info.format for info in infos if info.format]
    lacking = sorted({one.name for one in formats if one.lacks_arithmetic(torch.device(device))})
    if not lacking:
        return None
    return (
        f"{file.checkpoint.path.name}: {device} has no {', '.join(lacking)} arithmetic, so each layer's weights "
        "are dequantised when they are used. That saves the same memory, but no time."
    )


def load_dit(path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None) -> WanDiT:
    """Load a Wan DiT.

    Args:
        path: a file, a sharded folder, or an index json; official, prefixed, ComfyUI's or diffusers' keys.
        dtype: of the computation; None means bfloat16 where the device is fast in it, else float32. A quantised file
            stays as it is, whatever the computation. "fp8_e4m3fn" and "int8" quantise the matrices of the blocks while
            they are loaded, and compute in the default dtype.

    Returns:
        ``dit(x [B,C_in,T,h,w], t [B] or [B,T] in 0..1000, context [B,L,D]) -> velocity [B,C_out,T,h,w]``, float32.

    Raises:
        WanError: the file is missing, damaged, or no Wan DiT.
    """
    return fill_dit(read_dit(path), device=device, dtype=dtype)
