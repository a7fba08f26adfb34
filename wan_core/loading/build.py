"""Modules from checkpoints: built on the meta device, then filled strictly, without a second copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some
from ..layouts.extras import misfit
from ..mapped import fetch, is_mapped, read_into, room_for
from ..quant.base import Packed
from ..quant.linear import pack_layers
from ..quant.scaled import Scaled
from ..quant.scratch import Scratch

Built = TypeVar("Built", bound=nn.Module)
Key = Callable[[str], bool]


def _none(key: str) -> bool:
    return False


def _all(key: str) -> bool:
    return True


@dataclass(frozen=True)
class Rules:
    """How a model's tensors are held, by our keys.

    Attributes:
        keep_float32: those that stay float32 whatever the model's dtype is.
        place: False for those that stay memory-mapped on the CPU in the file's dtype (streamed blocks).
        packs: matrices that stay in their quantised format; all others are dequantised.
        make: the format in which such a matrix is packed now if the file has it in none, or in another.
        spare: matrices that stay mapped if a CPU can use them as they lie in the file: their layers read them at each
            use.
    """

    keep_float32: Key = _none
    place: Key = _all
    packs: Key = _none
    make: Callable[[str], Scaled | None] = lambda key: None
    spare: Key = _none


PLAIN = Rules()


def load_strict(
    module: Built,
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    rules: Rules = PLAIN,
) -> Built:
    """Fill a module that was made on the meta device.

    Args:
        module: its state dict names every tensor wanted, with the shape expected.
        names: our key -> the checkpoint's key. Keys of the module that are missing here, and keys here that the module
            does not know, are errors.
        dtype: of floating-point tensors after loading; None keeps the file's.

    What stays is read into aligned memory of the model's own, also where dtype and device fit already: a mapping would
    kill the process when its file is truncated, and products would depend on where the file happens to have a matrix.
    On a CPU, packed matrices stay mapped, and are read as they are used.

    Raises:
        WanError: missing or unexpected keys, or other shapes than expected; all of them are listed. Or a file was
            changed while it was read.
    """
    wanted = check_fit(module, checkpoint, names)
    packed: dict[str, Packed] = {}
    scratch, device, reads = Scratch(), torch.device(device), []
    with checkpoint.reading():
        for key, slot in wanted.items():
            if rules.packs(key) and (rules.make(key) or _is_packed(checkpoint, names[key])):
                matrix = _packed(checkpoint, names[key], rules.make(key), device)
                packed[key] = matrix.to(device) if rules.place(key) or device.type == "cpu" else matrix
                continue
            tensor = checkpoint.tensor(names[key])
            target = torch.float32 if rules.keep_float32(key) else dtype
            target = target if target and tensor.is_floating_point() else tensor.dtype
            if not _stays(module, key, tensor, device, target, streams=not rules.place(key), spare=rules.spare(key)):
                if is_mapped(tensor):
                    reads.append((tensor, room_for(tensor, device, target)))
                    tensor = reads[-1][1]
                else:
                    tensor = fetch(tensor, device, target, aligned=True)
            assign(module, key, tensor, is_parameter=isinstance(slot, nn.Parameter))
    read_into(reads)
    _lend(module, scratch)
    pack_layers(module, packed, scratch)
    return module.eval().requires_grad_(False)


def check_fit(module: nn.Module, checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The module's parameters and buffers by their keys.

    Raises:
        WanError: missing or unexpected keys, or other shapes than expected; all of them are listed.
    """
    wanted = dict(module.state_dict(keep_vars=True))
    _check_names(wanted, names, checkpoint)
    _check_shapes(wanted, names, checkpoint)
    return wanted


def _stays(
    module: nn.Module,
    key: str,
    tensor: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    *,
    streams: bool,
    spare: bool,
) -> bool:
    """Whether a tensor stays where it lies in the file: streamed ones, but for what is small and fits already."""
    fits = device.type == "cpu" and tensor.dtype == dtype
    path, _, name = key.rpartition(".")
    is_matrix = name == "weight" and getattr(module.get_submodule(path), "may_stay_in_file", False)
    return (is_matrix or not fits) if streams else (is_matrix and fits and spare)


def _lend(module: nn.Module, scratch: Scratch) -> None:
    """The buffer to all layers whose matrices are mapped."""
    for layer in module.modules():
        lent: Any = layer
        if getattr(lent, "may_stay_in_file", False) and hasattr(lent, "scratch") and is_mapped(lent.weight):
            lent.scratch = scratch


def _packed(checkpoint: Checkpoint, key: str, make: Scaled | None, device: torch.device | str) -> Packed:
    """A matrix as the file has it, mapped, or packed on the device."""
    stored = checkpoint.tensors[key].format
    if make is None or stored and stored.name == make.name and _is_packed(checkpoint, key):
        return checkpoint.packed(key)
    return make.pack(fetch(checkpoint.tensor(key), device))


def _is_packed(checkpoint: Checkpoint, key: str) -> bool:
    """Whether a matrix lies packed in the file row by row (GGUF may have cut it into other rows)."""
    info = checkpoint.tensors[key]
    return info.format is not None and checkpoint.packed(key).shape == info.shape


def assign(module: nn.Module, key: str, tensor: torch.Tensor, *, is_parameter: bool = True) -> None:
    """Put a tensor in a module's slot by its dotted name, whatever was there."""
    *path, name = key.split(".")
    owner = module.get_submodule(".".join(path))
    if is_parameter:
        owner._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[name] = tensor


def _check_names(wanted: Mapping, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    missing = sorted(set(wanted) - set(names))
    unexpected = sorted(names[key] for key in set(names) - set(wanted))
    if missing or unexpected:
        raise misfit(checkpoint.path, missing, unexpected)


def _check_shapes(wanted: Mapping, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    wrong = [
        f"{names[key]} is {list(checkpoint.tensors[names[key]].shape)}, expected {list(slot.shape)}"
        for key, slot in wanted.items()
        if tuple(checkpoint.tensors[names[key]].shape) != tuple(slot.shape)
    ]
    if wrong:
        raise WanError(f"{checkpoint.path} has tensors of other shapes than expected: {_some(wrong)}.")
