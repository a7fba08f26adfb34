"""GGUF files: header and memory-mapped tensors.

Every count, length and place in the header is held against what the file could hold before it is followed.
The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md. Little-endian, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..errors import WanError
from ..mapped import MappedFile
from ..quant.gguf import DECODERS, GGUF, block_type, package
from .door import LONGEST_NAME, MOST_DIMENSIONS, MOST_TENSORS, Damage, check_name, check_shape, damaged, shown
from .kind import GGUF_MAGIC as MAGIC
from .marks import TensorInfo

_STRING, _ARRAY = 8, 9
_MOST_FIELDS = 50_000
_MOST_STRINGS = 4_000_000  # of one array; umT5's vocabulary has 256,384
_LONGEST_STRING = 16 * 1024**2  # bytes
_MOST_NUMBERS = 16 * 1024**2  # of an array that is read
_LEAST_FIELD = 8 + 4 + 1  # bytes: the length of a key, a kind, a value
_LEAST_ENTRY = 8 + 4 + 4 + 8  # bytes: the length of a name, the number of dimensions, a type, a place
_DEEPEST = 4  # arrays of arrays
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@cache
def type_numbers() -> dict[str, int]:
    """The number in the header of each type that is read."""
    return {name: int(package().GGMLQuantizationType[name]) for name in (*PLAIN, *DECODERS)}


@dataclass(frozen=True)
class Array:
    """An array of the header, read when asked for: a vocabulary has hundreds of thousands of entries."""

    file: Path
    kind: int
    count: int
    start: int

    def read(self) -> list[Any]:
        """
        Raises:
            WanError: more than any header needs, or damaged.
        """
        try:
            with _mapped(self.file) as data:
                if self.kind == _STRING:
                    return _Cursor(data, self.start).strings(self.count)
                if self.count > _MOST_NUMBERS:
                    raise Damage(f"an array of {self.count} numbers")
                return list(struct.unpack_from(f"<{self.count}{_scalar(self.kind)[1:]}", data, self.start))
        except (struct.error, Damage) as error:
            raise damaged(self.file, error) from error


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file."""

    shape: tuple[int, ...]
    type: str
    offset: int  # in the file

    @property
    def stored(self) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of what lies in the file: for blocks [rows, bytes of a row]."""
        if self.type in PLAIN:
            return self.shape, PLAIN[self.type]
        weights, size, _ = block_type(self.type)
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
            _check_places(header, len(data))
    except (struct.error, Damage) as error:
        problem = "it ends within its header" if isinstance(error, struct.error) else error
        raise damaged(file, problem) from error
    return header


def _check_places(header: Header, size: int) -> None:
    """Every tensor within the file, none over another."""
    entries = sorted(header.tensors.items(), key=lambda item: (item[1].offset, item[1].bytes))
    end = max((entry.offset + entry.bytes for _, entry in entries), default=0)
    if end > size:
        raise Damage(f"expected {end} bytes, found {size}")
    at = 0
    for name, entry in entries:
        if entry.offset < at:
            raise Damage(f"{shown(name)} overlaps the one before it")
        at = entry.offset + entry.bytes


def tensor_infos(file: Path, header: Header) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What a checkpoint needs to know of a GGUF file: its tensors, and the header's strings and numbers."""
    infos = {key: _info(file, key, entry, header.fields) for key, entry in header.tensors.items()}
    return infos, {key: str(value) for key, value in header.fields.items() if not isinstance(value, Array)}


def _info(file: Path, key: str, entry: Entry, fields: Mapping[str, Any]) -> TensorInfo:
    original = fields.get(f"comfy.gguf.orig_shape.{key}")  # rows of another length are laid out anew for the blocks
    shape = _original_shape(file, key, original, entry) if isinstance(original, Array) else entry.shape
    if entry.type in PLAIN:
        return TensorInfo(shape, PLAIN[entry.type], file)
    return TensorInfo(shape, torch.uint8, file, GGUF(entry.type), (("data", key),), entry.bytes)


def _original_shape(file: Path, key: str, original: Array, entry: Entry) -> tuple[int, ...]:
    try:
        shape = check_shape(key, original.read() if original.count < 64 else None)
        if math.prod(shape) != math.prod(entry.shape):
            raise Damage(f"{shown(key)} has {math.prod(entry.shape)} numbers, but is said to be {list(shape)}")
    except Damage as error:
        raise damaged(file, error) from error
    return shape


class GGUFFile(Mapping[str, torch.Tensor]):
    """A mapping of names to mapped tensors over one GGUF file: plain ones in their shape, blocks as rows of bytes."""

    def __init__(self, file: Path) -> None:
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
    def __init__(self, data: mmap.mmap, at: int = 0) -> None:
        self.data = data
        self.at = at

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def string(self, longest: int = _LONGEST_STRING) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise Damage("a text runs past its end")
        if length > longest:
            raise Damage(f"a text of {length} bytes, expected at most {longest}")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise Damage("a text that is no UTF-8") from None

    def strings(self, count: int) -> list[str]:
        self._check_strings(count)
        return [self.string() for _ in range(count)]

    def value(self, file: Path) -> Any:
        kind = self.number("<I")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(file)
        return self.number(_scalar(kind))

    def _array(self, file: Path, depth: int = 1) -> Array:
        kind, count = self.number("<I"), self.number("<Q")
        array = Array(file, kind, count, self.at)
        if kind == _STRING:
            self._skip_strings(count)
        elif kind == _ARRAY:
            self._skip_arrays(file, count, depth)
        else:
            size = count * struct.calcsize(_scalar(kind))
            if size > len(self.data) - self.at:
                raise Damage("an array runs past its end")
            self.at += size
        return array

    def _skip_arrays(self, file: Path, count: int, depth: int) -> None:
        if depth == _DEEPEST or count > _MOST_FIELDS:
            raise Damage("arrays within arrays without end")
        for _ in range(count):
            self._array(file, depth + 1)

    def _skip_strings(self, count: int) -> None:
        self._check_strings(count)
        unpack, data, at = struct.Struct("<Q").unpack_from, self.data, self.at
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        if at > len(data):
            raise Damage("a text runs past its end")
        self.at = at

    def _check_strings(self, count: int) -> None:
        if count > min(_MOST_STRINGS, (len(self.data) - self.at) // 8):
            raise Damage(f"an array of {count} texts, which it cannot hold")


def _mapped(file: Path) -> mmap.mmap:
    with file.open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def _header(file: Path, data: mmap.mmap) -> Header:
    cursor = _Cursor(data, len(MAGIC))
    version = cursor.number("<I")
    if version not in (2, 3):
        turned = " (a big-endian file)" if version in (2 << 24, 3 << 24) else ""
        raise WanError(
            f"{shown(file)} is GGUF of version {version}{turned}; expected 2 or 3, little-endian. Convert it again."
        )
    tensors, fields = cursor.number("<Q"), cursor.number("<Q")
    room = len(data) - cursor.at
    if fields > min(_MOST_FIELDS, room // _LEAST_FIELD) or tensors > min(MOST_TENSORS, room // _LEAST_ENTRY):
        raise Damage(f"its header claims {tensors} tensors and {fields} fields, which it cannot hold")
    values = _unique([(check_name(cursor.string()), cursor.value(file)) for _ in range(fields)])
    entries = _unique([_entry(file, cursor) for _ in range(tensors)])
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise Damage("its general.alignment is no power of two")
    start = -(-cursor.at // alignment) * alignment
    return Header(values, {name: Entry(shape, kind, start + place) for name, (shape, kind, place) in entries.items()})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Damage("its header has one name twice")
    return found


def _entry(file: Path, cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], str, int]]:
    name = check_name(cursor.string(4 * LONGEST_NAME))
    dimensions = cursor.number("<I")
    if dimensions > MOST_DIMENSIONS:
        raise Damage(f"{shown(name)} has {dimensions} dimensions")
    shape = check_shape(name, [cursor.number("<Q") for _ in range(dimensions)])[::-1]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    kind = _type_name(number)
    if kind not in type_numbers():
        raise WanError(
            f"{shown(file)} holds {shown(name)} in the quantisation type {kind}, which this "
            f"version does not read. Expected one of {', '.join(type_numbers())}: use such a file "
            "of the same model."
        )
    if kind in DECODERS and (not shape or shape[-1] % block_type(kind).weights):
        raise Damage(f"{shown(name)} of shape {list(shape)} cannot be {kind}")
    return name, (shape, kind, offset)


def _type_name(number: int) -> str:
    try:
        return package().GGMLQuantizationType(number).name
    except ValueError:
        return f"number {number}"


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise Damage(f"a value of the unknown kind {kind}")
    return _SCALARS[kind]
