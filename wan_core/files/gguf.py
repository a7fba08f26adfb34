"""GGUF files: header and memory-mapped tensors.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import WanError
from ..quant.gguf import BLOCK_TYPES, GGUF
from .mapped import MappedFile
from .marks import TensorInfo

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPE_NUMBERS = {
    0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """An array of the header, read when asked for: a vocabulary has hundreds of thousands of entries."""

    file: Path
    kind: int
    count: int
    start: int

    def read(self) -> list:
        with _mapped(self.file) as data:
            if self.kind == _STRING:
                return _Cursor(data, self.start).strings(self.count)
            return list(struct.unpack_from(f"<{self.count}{_scalar(self.kind)[1:]}", data, self.start))


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file."""

    shape: tuple[int, ...]
    type: str
    offset: int  # in the file

    @property
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what lies in the file: for blocks [rows, bytes of a row]."""
        if self.type in _PLAIN:
            return self.shape, _PLAIN[self.type]
        weights, size, _ = BLOCK_TYPES[self.type]
        return (math.prod(self.shape[:-1]), self.shape[-1] // weights * size), torch.uint8

    @property
    def bytes(self) -> int:
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize


@dataclass(frozen=True)
class Header:
    fields: dict[str, Any]  # strings, numbers and ``Array``
    tensors: dict[str, Entry]


def read_header(file: Path) -> Header:
    """The header of a GGUF file.

    Raises:
        WanError: truncated or corrupt, or a quantisation type that is not read, by name.
    """
    try:
        with _mapped(file) as data:
            header = _header(file, data)
            size = len(data)
    except (struct.error, ValueError, OverflowError, UnicodeDecodeError) as error:
        if isinstance(error, WanError):
            raise
        raise WanError(f"{file} is truncated or corrupt ({error}). Download it again.") from error
    end = max((entry.offset + entry.bytes for entry in header.tensors.values()), default=0)
    if end > size:
        raise WanError(f"{file} is truncated or corrupt (expected {end} bytes, found {size}). Download it again.")
    return header


def tensor_infos(file: Path, header: Header) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a checkpoint needs to know of a GGUF file: its tensors, and the header's strings and numbers."""
    infos = {key: _info(file, key, entry, header.fields) for key, entry in header.tensors.items()}
    return infos, {key: str(value) for key, value in header.fields.items() if not isinstance(value, Array)}


def _info(file: Path, key: str, entry: Entry, fields: Mapping[str, Any]) -> TensorInfo:
    original = fields.get(f"comfy.gguf.orig_shape.{key}")  # rows of another length are laid out anew for the blocks
    shape = tuple(original.read()) if isinstance(original, Array) else entry.shape
    if entry.type in _PLAIN:
        return TensorInfo(shape, _PLAIN[entry.type], file)
    return TensorInfo(shape, torch.uint8, file, GGUF(entry.type), (("data", key),), entry.bytes)


class GGUFFile(Mapping):
    """A mapping of names to mapped tensors over one GGUF file: plain ones in their shape, blocks as rows of bytes."""

    def __init__(self, file: Path):
        self.entries = read_header(file).tensors
        self.data = MappedFile(file)

    def __getitem__(self, key: str) -> torch.Tensor:
        entry = self.entries[key]
        shape, dtype = entry.stored
        return self.data.tensor(entry.offset, shape, dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _Cursor:
    def __init__(self, data: mmap.mmap, at: int = 0):
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a string runs past the end")
        return self.data[self.at - length : self.at].decode("utf-8")

    def strings(self, count: int) -> list[str]:
        return [self.string() for _ in range(count)]

    def value(self, file: Path) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(file)
        return self.number(_scalar(kind))

    def _array(self, file: Path) -> Array:
        kind, count = self.number("<I"), self.number("<Q")
        array = Array(file, kind, count, self.at)
        if kind == _STRING:
            self._skip_strings(count)
        else:
            self.at += count * struct.calcsize(_scalar(kind))
        return array

    def _skip_strings(self, count: int) -> None:
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self.at = at


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _header(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.number("<I")
    if version not in (2, 3):
        raise WanError(f"{file} is GGUF of version {version}; expected 2 or 3, little-endian. Convert it again.")
    tensors, fields = cursor.number("<Q"), cursor.number("<Q")
    values = {cursor.string(): cursor.value(file) for _ in range(fields)}
    entries = [_entry(file, cursor) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    return Header(values, {name: Entry(shape, kind, start + offset) for name, shape, kind, offset in entries})


def _entry(file: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    name = cursor.string()
    shape = tuple(reversed([cursor.number("<Q") for _ in range(cursor.number("<I"))]))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in _TYPE_NUMBERS:
        raise WanError(f"{file} holds {name} in the quantisation type {_type_name(kind)}, which this version does not "
                       f"read. Expected one of {', '.join(_TYPE_NUMBERS.values())}: use such a file of the same model.")
    kind = _TYPE_NUMBERS[kind]
    if kind in BLOCK_TYPES and (not shape or shape[-1] % BLOCK_TYPES[kind].weights):
        raise ValueError(f"{name} of shape {list(shape)} cannot be {kind}")
    return name, shape, kind, offset


def _type_name(number: int) -> str:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown kind {kind}")
    return _SCALARS[kind]
