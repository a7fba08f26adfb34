"""Quantised tensors in safetensors files: ComfyUI's markings, scales without a marking, and plain casts to fp8.

A layer is marked in one of three ways: a tensor ``scaled_fp8`` for the file and ``<layer>.scale_weight`` (the older
one); the header's ``_quantization_metadata``, or a tensor ``<layer>.comfy_quant`` with the same JSON as bytes, both
with ``<layer>.weight_scale``. The names of ComfyUI's formats are those of its ``QUANT_ALGOS``. A scale belongs to its
tensor whatever that is: a matrix, a convolution, a bias, inside the blocks or outside. It is applied, or the file is
refused.
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
from ..quant.block_scaled import BlockScaled, tiles_shape
from ..quant.fp8 import FP8
from ..quant.int4 import Int4
from ..quant.int8 import Int8
from ..quant.registry import MARKED
from ..quant.smoothed import Smoothed
from .belongings import Belongings, belongings_of, refuse_foreign
from .door import Damage, read_json, shown
from .storage import NAMES

_HEADER = "_quantization_metadata"
_LAYER_MARK = ".comfy_quant"
_FILE_MARK = "scaled_fp8"
_OLD_SCALE = ".scale_weight"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_FEW = 1 << 20  # numbers of a scale that are looked at while a header is read
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
    """The tensors of a model from those of its file: packed ones are recognised, what belongs to them is gone.

    ``read`` fetches a tensor; only layers' markings, some bytes each, are read, and scales that may be all ones.

    Raises:
        WanError: a format that is not known, by name, or a scale that does not fit its tensor, belongs to none, or
            may have been applied already.
    """
    layers = _marked_layers(path, stored, metadata, read)
    belongings, taken = belongings_of(path, stored)
    refuse_foreign(path, stored, taken, layers)
    found: Infos = {}
    for key, info in stored.items():
        if key in taken or key.endswith(_LAYER_MARK) or _is_file_mark(key):
            continue
        mark = layers.get(key.removesuffix(".weight"))
        tensor = _Stored(path, key, info, stored, belongings.get(key, {}), mark, read)
        found[key] = tensor.understood()
        _check_numbers(path, key, found[key])
    return found


def _is_file_mark(key: str) -> bool:
    return key.rpartition(".")[2] == _FILE_MARK


def _check_numbers(path: Path, key: str, info: TensorInfo) -> None:
    """Weights are floating-point numbers, or packed in a format that says how to make such of them.

    Raises:
        WanError: neither; says what they are.
    """
    if not key.endswith(".weight") or info.format is not None:
        return
    stored = info.unread or (None if _holds_weights(info.dtype) else NAMES.get(info.dtype, str(info.dtype)))
    if stored:
        raise WanError(
            f"{shown(path)} holds {shown(key)} as {stored}, without a marking of a quantised format that "
            f"this version reads. Expected {_expected()}."
        )


def _holds_weights(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype is not getattr(torch, "float8_e8m0fnu", None)


def _expected() -> str:
    return f"{', '.join(MARKED)} as ComfyUI marks them, GGUF, or a bf16 or fp16 file of the same model"


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file with all that the file says of it."""

    path: Path
    key: str
    info: TensorInfo
    stored: Mapping[str, TensorInfo]
    belongings: Belongings
    mark: Mapping[str, Any] | None
    read: Callable[[str], torch.Tensor]

    def understood(self) -> TensorInfo:
        """With the format that it is packed in, if any."""
        info = self.info
        if info.unread or 0 in info.shape:  # refused by name, or nothing to unpack
            return info
        if info.format is not None:
            if self.belongings:
                raise self._refused(f"which is {info.format.name} and needs no {shown(self._any)}")
            return info
        kind = self._format()
        if kind is None:
            return info
        described = self._in_blocks(kind) if isinstance(kind, BlockScaled) else self._scaled(kind)
        return self._smoothed(described) if "smooth" in self.belongings else described

    @property
    def _any(self) -> str:
        return next(iter(self.belongings.values()))

    def _refused(self, problem: str) -> WanError:
        return WanError(f"{shown(self.path)} holds {shown(self.key)}, {problem}. Expected {_expected()}.")

    def _format(self) -> Format | None:
        """None for plain numbers."""
        if self.mark:
            return self._marked()
        dtype, matrix = self.info.dtype, len(self.info.shape) == 2 and self.key.endswith(".weight")
        if not self.belongings:
            if dtype is torch.int8 and self.key.endswith(".weight"):
                raise WanError(
                    f"{shown(self.path)} holds {shown(self.key)} as int8 without saying how it was made: no "
                    f"{shown(self.key)}_scale, no marking. Expected {_expected()}."
                )
            return FP8(dtype) if matrix and dtype in _FP8 else None
        return self._unmarked(dtype)

    def _marked(self) -> Format:
        assert self.mark
        name = self.mark["format"]
        if name not in MARKED:
            raise WanError(
                f"{shown(self.path)} holds {shown(self.key)} in the quantised format {shown(name)!r}, which "
                f"this version does not read. Expected {_expected()}."
            )
        try:
            return MARKED[name](self.mark, self.info.dtype)
        except ValueError as error:
            raise WanError(
                f"{shown(self.path)}: the marking of {shown(self.key)} {error}. Download the file again."
            ) from error

    def _unmarked(self, dtype: torch.dtype) -> Format | None:
        """What a scale says by itself: integers and fp8 are to be multiplied by it; other numbers may have been."""
        if "whole" in self.belongings:
            raise self._refused(
                f"with {shown(self.belongings['whole'])}: this looks like nvfp4, but no marking says "
                "how its numbers and scales are laid out"
            )
        scale = self.belongings.get("scale")
        if scale is not None and self.stored[scale].dtype in (torch.uint8, getattr(torch, "float8_e8m0fnu", None)):
            raise self._refused(
                f"with {shown(scale)} as bytes: this looks like mxfp8, but no marking says how its scales are laid out"
            )
        if dtype is torch.int8 and scale is not None:
            return Int8()
        if dtype in _FP8:
            return FP8(dtype)
        if dtype.is_floating_point and all(self._is_one(key) for key in self.belongings.values()):
            return None
        raise self._refused(f"as {dtype}, with {shown(self._any)}; no marking says whether it is still to be applied")

    def _is_one(self, key: str) -> bool:
        info = self.stored[key]
        few = math.prod(info.shape) <= _FEW and info.dtype.is_floating_point and not info.unread
        return few and bool((self.read(key).float() == 1).all())

    def _scaled(self, kind: Format) -> TensorInfo:
        """One scale for the tensor, or one for each row."""
        scale, shape = self.belongings.get("scale"), self.info.shape
        if self.info.dtype not in (torch.int8, torch.uint8) and not _holds_weights(self.info.dtype):
            raise self._refused(f"as {self.info.dtype}, which is no {kind.name}")
        if len(shape) == 2:
            shape = shape[0], kind.columns(torch.empty(shape, device="meta"))
        elif isinstance(kind, Int4):
            raise self._refused(f"{list(shape)}, which is no {kind.name} matrix")
        if "whole" in self.belongings:
            raise self._refused(f"which is {kind.name} and has no use for {shown(self.belongings['whole'])}")
        if scale:
            self._check_scale(scale)
        elif not isinstance(kind, FP8):
            raise WanError(
                f"{shown(self.path)} lacks {shown(self.key)}_scale, the scale of a quantised layer. Is it a "
                "partial download?"
            )
        rotation = getattr(kind, "rotation", 0)
        if rotation and (len(shape) != 2 or shape[1] % rotation):
            raise self._refused(f"{list(shape)}, which cannot be turned in groups of {rotation} columns")
        parts = (("data", self.key), ("scale", scale)) if scale else (("data", self.key),)
        return replace(self.info, shape=shape, size=self.info.bytes, format=kind, parts=parts)

    def _check_scale(self, key: str) -> None:
        info, matrix = self.stored[key], self.info.shape
        rows = matrix[0] if matrix else 1
        fits = math.prod(info.shape) == 1 or info.shape[:1] == (rows,) == (math.prod(info.shape),)
        if not fits or info.unread or not _holds_weights(info.dtype):
            raise WanError(
                f"{shown(self.path)}: {shown(key)} has shape {list(info.shape)} for a matrix of "
                f"{list(matrix)}; expected one scale, or one for each row. Block-wise scales are read in "
                "mxfp8 and nvfp4 only: use another file of the same model."
            )

    def _in_blocks(self, kind: BlockScaled) -> TensorInfo:
        """A matrix with a scale for each block of a row, in tiles, as ComfyUI's files have them, or row by row."""
        info, scale, whole = self.info, self.belongings.get("scale"), self.belongings.get("whole")
        if scale is None or (whole is not None) != kind.whole:
            need = f"{self.key}_scale" + (f" and {self.key}_scale_2" if kind.whole else " and nothing else")
            raise WanError(
                f"{shown(self.path)} lacks or mixes scales of {shown(self.key)}, which is {kind.name}: "
                f"expected {shown(need)}. Is it a partial download?"
            )
        if len(info.shape) != 2 or info.dtype not in kind.stored:
            raise self._refused(f"{list(info.shape)} of {info.dtype}, which is no {kind.name} matrix")
        rows, columns = info.shape[0], kind.columns(torch.empty(info.shape, device="meta"))
        blocks, given = columns // kind.block, self.stored[scale]
        tiled = given.shape == tiles_shape(rows, blocks) or given.shape == (math.prod(tiles_shape(rows, blocks)),)
        if (
            columns % kind.block
            or not (tiled or given.shape == (rows, blocks))
            or given.dtype not in (kind.scale_dtype, torch.uint8)
        ):
            raise WanError(
                f"{shown(self.path)}: {shown(scale)} is {list(given.shape)} of {given.dtype} for a "
                f"{kind.name} matrix of {[rows, columns]}; expected one byte for each {kind.block} numbers "
                f"of a row, {list(tiles_shape(rows, blocks))} in tiles or {[rows, blocks]}. Use another "
                "file of the same model."
            )
        if whole is not None and (
            math.prod(self.stored[whole].shape) != 1 or not _holds_weights(self.stored[whole].dtype)
        ):
            raise self._refused(f"with {shown(whole)} {list(self.stored[whole].shape)}; one number was expected")
        parts = [("data", self.key), ("tiles" if tiled else "scale", scale)] + ([("whole", whole)] if whole else [])
        return replace(info, shape=(rows, columns), size=info.bytes, format=kind, parts=tuple(parts))

    def _smoothed(self, info: TensorInfo) -> TensorInfo:
        key = self.belongings["smooth"]
        assert info.format, key
        if len(info.shape) != 2 or math.prod(self.stored[key].shape) != info.shape[1]:
            raise self._refused(
                f"{list(info.shape)} with {shown(key)} {list(self.stored[key].shape)}; expected one "
                "number for each column"
            )
        return replace(info, format=Smoothed(info.format), parts=(*info.parts, ("smooth", key)))


def _marked_layers(
    path: Path, stored: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Layer -> what its marking says, at least a "format"."""
    layers = _old_marks(stored)
    marks = _header_marks(path, metadata)
    prefixes = _prefixes(marks, stored) if marks else ()
    for name, mark in marks.items():
        layer = next((p + name for p in prefixes if f"{p}{name}.weight" in stored), name)
        layers[layer] = _as_mark(path, layer, mark)
    for key in stored:
        if key.endswith(_LAYER_MARK):
            layer = key.removesuffix(_LAYER_MARK)
            layers[layer] = _as_mark(path, layer, _json(path, key, _mark_text(path, key, stored[key], read)))
    return layers


def _prefixes(marks: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> list[str]:
    """What may stand before a header's names of layers in the names of the tensors; nothing is tried first."""
    ends = {f".{name}.weight" for name in list(marks)[:1]}
    return ["", *sorted({key.removesuffix(end[1:]) for end in ends for key in stored if key.endswith(end)})]


def _old_marks(stored: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    """A tensor ``scaled_fp8`` says that every scale below its prefix is to be applied."""
    layers: dict[str, dict[str, Any]] = {}
    for mark in (key for key in stored if _is_file_mark(key)):
        says = {"format": "float8_e4m3fn", "full_precision_matrix_mult": math.prod(stored[mark].shape) == 2}
        prefix = mark.removesuffix(_FILE_MARK)
        layers |= {
            key.removesuffix(_OLD_SCALE): says for key in stored if key.startswith(prefix) and key.endswith(_OLD_SCALE)
        }
    return layers


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
        raise WanError(
            f"{shown(path)}: {shown(key)} is no marking of a quantised layer: expected up to "
            f"{_LONGEST_MARK} bytes, found {info.bytes} as {info.dtype}. Download the file again."
        )
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
