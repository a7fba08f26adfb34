"""Quantised matrices in safetensors files: ComfyUI's markings, and plain casts to fp8.

A layer is marked in one of three ways: a tensor ``scaled_fp8`` for the file and ``<layer>.scale_weight`` (the older
one); the header's ``_quantization_metadata``, or a tensor ``<layer>.comfy_quant`` with the same JSON as bytes, both
with ``<layer>.weight_scale``. The names of ComfyUI's formats are those of its ``QUANT_ALGOS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import WanError
from ..quant.base import Format
from ..quant.fp8 import FP8
from ..quant.int8 import Int8
from .door import Damage, read_json, shown
from .storage import NAMES

_HEADER = "_quantization_metadata"
_LAYER_MARK = ".comfy_quant"
_FILE_MARK = "scaled_fp8"
_SCALES = (".weight_scale", ".scale_weight")
_BESIDE = (_LAYER_MARK, *_SCALES, ".input_scale", ".scale_input", ".weight_scale_2", ".pre_quant_scale")
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
_FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_INT8 = ("int8_tensorwise", "int8_rowwise")
_LONGEST_MARK = 65_536  # bytes of a layer's marking


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    ``format`` is set for a matrix in a quantised format. Then ``shape`` is the matrix's and ``parts`` says under which
    keys its tensors lie in the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    format: Format | None = None
    parts: tuple[tuple[str, str], ...] = ()
    size: int | None = None  # bytes in the file, where shape and dtype do not tell
    unread: str | None = None  # the name of a way to store numbers that is known and not read

    @property
    def bytes(self) -> int:
        """What the tensor takes in its file, without the scales that belong to it."""
        return math.prod(self.shape) * self.dtype.itemsize if self.size is None else self.size


Infos = dict[str, TensorInfo]


def understand(
    path: Path, stored: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor]
) -> Infos:
    """The tensors of a model from those of its file: packed matrices are recognised, what belongs to them is gone.

    ``read`` fetches a tensor; only layers' markings, some bytes each, are read.

    Raises:
        WanError: a format that is not known, by name, or a scale that does not fit its matrix.
    """
    layers = _marked_layers(path, stored, metadata, read)
    found: Infos = {}
    for key, info in stored.items():
        if key.endswith(_BESIDE) or key.endswith(_FILE_MARK):
            continue
        layer = key.removesuffix(".weight")
        matrix = info.format is None and layer != key and len(info.shape) == 2
        found[key] = (matrix and _packed(path, key, info, stored, layers.get(layer))) or info
        _check_numbers(path, key, found[key])
    return found


def _check_numbers(path: Path, key: str, info: TensorInfo) -> None:
    """Weights are floating-point numbers, or packed in a format that says how to make such of them.

    Raises:
        WanError: neither; says what they are.
    """
    stored = info.unread or (None if info.dtype.is_floating_point else NAMES.get(info.dtype, str(info.dtype)))
    if key.endswith(".weight") and info.format is None and stored:
        raise WanError(f"{shown(path)} holds {shown(key)} as {stored}, without a marking of a quantised format that "
                       f"this version reads. Expected {', '.join((*_FP8, *_INT8))} as ComfyUI marks them, GGUF, or a "
                       "bf16 or fp16 file.")


def _packed(
    path: Path, key: str, info: TensorInfo, stored: Mapping[str, TensorInfo], mark: Mapping[str, Any] | None
) -> TensorInfo | None:
    """A matrix with its format, or None for a plain one."""
    layer = key.removesuffix(".weight")
    scale = next((layer + end for end in _SCALES if layer + end in stored), None)
    if mark is None and info.dtype is torch.int8:
        raise WanError(f"{shown(path)} holds {shown(key)} as int8 without saying how it was made (expected "
                       f"{shown(layer)}.comfy_quant). Use a file in ComfyUI's int8 format, or the bf16 file.")
    if mark is None and info.dtype not in _FP8.values():
        return None
    kind = _format(path, key, mark, info.dtype) if mark else FP8(info.dtype)
    if scale:
        _check_scale(path, scale, stored[scale].shape, info.shape)
    elif mark and not isinstance(kind, FP8):
        raise WanError(f"{shown(path)} lacks {shown(key)}_scale, the scale of a quantised layer. Is it a partial "
                       "download?")
    parts = (("data", key), ("scale", scale)) if scale else (("data", key),)
    return replace(info, format=kind, parts=parts)


def _format(path: Path, key: str, mark: Mapping[str, Any], stored: torch.dtype) -> Format:
    name = mark["format"]
    if name in _FP8:
        return FP8(_FP8[name] if stored is torch.uint8 else stored, bool(mark.get("full_precision_matrix_mult")))
    if name in _INT8:
        params = mark.get("params")
        options = {**(params if isinstance(params, dict) else {}), **mark}
        return Int8(rotation=_group(path, key, options.get("convrot_groupsize", 256)) if options.get("convrot") else 0)
    raise WanError(f"{shown(path)} holds {shown(key)} in the quantised format {shown(name)!r}, which this version "
                   f"does not read. Expected {', '.join((*_FP8, *_INT8))}, GGUF, or a bf16 or fp16 file.")


def _group(path: Path, key: str, size: object) -> int:
    if isinstance(size, str) and size.isascii() and size.isdigit() and len(size) < 10:
        size = int(size)
    if type(size) is not int or not 0 < size <= 1 << 20 or size & (size - 1) or not size.bit_length() % 2:
        raise WanError(f"{shown(path)}: the marking of {shown(key)} names no size of its rotated groups: expected a "
                       "power of 4. Download the file again.")
    return size


def _check_scale(path: Path, key: str, scale: tuple[int, ...], matrix: tuple[int, ...]) -> None:
    if math.prod(scale) not in (1, matrix[0]):
        raise WanError(f"{shown(path)}: {shown(key)} has shape {list(scale)} for a matrix of {list(matrix)}; expected "
                       "one scale, or one for each row. Block-wise scales are not read: use another file of the same "
                       "model.")


def _marked_layers(
    path: Path, stored: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Layer -> what its marking says, at least a "format"."""
    layers = _old_marks(stored)
    for name, mark in _header_marks(path, metadata).items():
        layer = next((p + name for p in _PREFIXES if f"{p}{name}.weight" in stored), name)
        layers[layer] = _as_mark(path, layer, mark)
    for key in stored:
        if key.endswith(_LAYER_MARK):
            layer = key.removesuffix(_LAYER_MARK)
            layers[layer] = _as_mark(path, layer, _json(path, key, _mark_text(path, key, stored[key], read)))
    return layers


def _old_marks(stored: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    file_mark = next((info for key, info in stored.items() if key.endswith(_FILE_MARK)), None)
    full_precision = file_mark is not None and math.prod(file_mark.shape) == 2
    layers = (key.removesuffix(_SCALES[1]) for key in stored if key.endswith(_SCALES[1]))
    return {layer: {"format": "float8_e4m3fn", "full_precision_matrix_mult": full_precision} for layer in layers}


def _header_marks(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        return {}
    marks = _json(path, _HEADER, metadata[_HEADER])
    layers = marks.get("layers") if isinstance(marks, dict) else None
    if not isinstance(layers, dict):
        raise WanError(f"{shown(path)}: the header's {_HEADER} has no layers. Download the file again.")
    return layers


def _mark_text(path: Path, key: str, info: TensorInfo, read: Callable[[str], torch.Tensor]) -> bytes:
    if info.dtype is not torch.uint8 or info.unread or info.bytes > _LONGEST_MARK:
        raise WanError(f"{shown(path)}: {shown(key)} is no marking of a quantised layer: expected up to "
                       f"{_LONGEST_MARK} bytes, found {info.bytes} as {info.dtype}. Download the file again.")
    return bytes(read(key).flatten().tolist())


def _as_mark(path: Path, layer: str, mark: object) -> dict[str, Any]:
    mark = {"format": mark} if isinstance(mark, str) else mark
    if not isinstance(mark, dict) or not isinstance(mark.get("format"), str):
        raise WanError(f"{shown(path)}: the marking of {shown(layer)} does not name a format. Download the file again.")
    return mark


def _json(path: Path, name: str, text: str | bytes) -> Any:
    try:
        return read_json(text.encode() if isinstance(text, str) else text)
    except Damage as error:
        raise WanError(f"{shown(path)}: {shown(name)} is no JSON ({error}). Download the file again.") from error
