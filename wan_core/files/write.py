"""Checkpoint files written tensor by tensor, so that a model never lies in memory as a whole.

A writer is told first what will come, because headers hold sizes and places, and then asks each tensor for its bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import WanError
from ..mapped import ALIGNMENT
from ..quant.gguf import block_type
from .gguf import PLAIN, type_numbers
from .kind import GGUF_MAGIC
from .place import mark_pickle
from .storage import NAMES as _NAMES

_ALIGNMENT = 32
_GGUF_PLAIN = {dtype: name for name, dtype in PLAIN.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written.

    ``blocks`` names a GGUF block type; then the pieces are bytes. ``pieces`` makes consecutive parts of the tensor, in
    ``dtype``; it is called once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]
    blocks: str | None = None

    @property
    def bytes(self) -> int:
        if self.blocks is None:
            return math.prod(self.shape) * self.dtype.itemsize
        weights, size, _ = block_type(self.blocks)
        return math.prod(self.shape) // weights * size


OnWritten = Callable[[Planned], None]


def write_safetensors(
    file: Path, tensors: Sequence[Planned], metadata: Mapping[str, str], on_written: OnWritten
) -> None:
    """Written in the order given, and laid out so that whoever maps the file finds the tensors aligned.

    The header is padded with spaces, which the format allows; gaps between tensors it does not.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for one in sorted(tensors, key=lambda one: -_evenness(one.bytes)):
        start, end = end, end + one.bytes
        offsets[one.name] = start
        header[one.name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.flush()  # so that what a killed run leaves says whose it is
        for one in tensors:
            stream.seek(8 + len(text) + offsets[one.name])
            _write(stream, one)
            on_written(one)
        _settle(stream)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file from tensors in memory."""
    plans = [Planned(key, tuple(one.shape), one.dtype, partial(_whole, one)) for key, one in tensors.items()]
    write_safetensors(Path(file), plans, metadata or {}, lambda one: None)


def _whole(tensor: Tensor) -> list[Tensor]:
    return [tensor.detach().to("cpu")]


def _evenness(size: int) -> int:
    """The largest power of two, up to the alignment, that divides a size. Tensors in falling order of it all lie at
    multiples of their own.
    """
    return math.gcd(size, ALIGNMENT)


def write_gguf(file: Path, tensors: Sequence[Planned], fields: Mapping[str, object], on_written: OnWritten) -> None:
    """``fields`` are the header's values: strings, booleans, integers (as uint32), and lists of one kind."""
    head = [GGUF_MAGIC, struct.pack("<IQQ", 3, len(tensors), len(fields))]
    head += [_string(key) + _value(value) for key, value in fields.items()]
    offset = 0
    for one in tensors:
        dims = struct.pack(f"<I{len(one.shape)}Q", len(one.shape), *reversed(one.shape))
        number = type_numbers()[one.blocks or _GGUF_PLAIN[one.dtype]]
        head.append(_string(one.name) + dims + struct.pack("<IQ", number, offset))
        offset += one.bytes + -one.bytes % _ALIGNMENT
    start = b"".join(head)
    with file.open("wb") as stream:
        stream.write(start + bytes(-len(start) % _ALIGNMENT))
        stream.flush()
        for one in tensors:
            _write(stream, one)
            stream.write(bytes(-one.bytes % _ALIGNMENT))
            on_written(one)
        _settle(stream)


def write_pickle(file: Path, tensors: Sequence[Planned], mark: str, on_written: OnWritten) -> None:
    """A ``.pth``: laid out without data first, then filled through a shared mapping of the file."""
    try:
        with torch.serialization.skip_data():
            torch.save({one.name: torch.empty(one.shape, dtype=one.dtype) for one in tensors}, file)
    except RuntimeError as error:  # torch's writer has no other word for a full disk
        raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error
    mark_pickle(file, mark)
    with file.open("r+b") as stream:
        if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process when the mapping is filled
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
    with _shared_mapping():
        places = torch.load(file, mmap=True, weights_only=True)
    for one in tensors:
        place, done = places[one.name].view(-1), 0
        for piece in one.pieces():
            place[done : done + piece.numel()] = piece.reshape(-1)
            done += piece.numel()
        on_written(one)
    del places


def as_json(content: object) -> str:
    return json.dumps(content, indent=2) + "\n"


def _shared_mapping() -> AbstractContextManager[object]:
    import mmap

    return torch.serialization.set_default_mmap_options(mmap.MAP_SHARED)


def _write(stream: BinaryIO, one: Planned) -> None:
    written = 0
    for piece in one.pieces():
        data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        stream.write(data.data)
        written += data.nbytes
    assert written == one.bytes, (one.name, written, one.bytes)


def _settle(stream: BinaryIO) -> None:
    """Onto the disk before the file gets its name."""
    stream.flush()
    os.fsync(stream.fileno())


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, list):
        kind, code = _KINDS[type(value[0])]
        items = b"".join(map(_string, value)) if code is None else struct.pack(f"<{len(value)}{code}", *value)
        return struct.pack("<IIQ", 9, kind, len(value)) + items
    kind, code = (4, "I") if type(value) is int else _KINDS[type(value)]
    return struct.pack("<I", kind) + (_string(value) if code is None else struct.pack(f"<{code}", value))


_KINDS: dict[type, tuple[int, str | None]] = {
    str: (8, None),
    bytes: (8, None),
    bool: (7, "?"),
    int: (5, "i"),
    float: (6, "f"),
}


def check_room(folder: Path, needed: int) -> None:
    """
    Raises:
        WanError: the disk has less room than will be written.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise WanError(
            f"{folder} has {free / 1e9:.2f} GB free, but {needed / 1e9:.2f} GB are to be written. Make "
            "room, or name a place on another disk."
        )
