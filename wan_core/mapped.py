"""Mapped files, and reading what lies behind a mapped tensor without touching the mapping.

A mapped page that the disk cannot deliver any more (the file was truncated, the network share went away) is no error
that a program could handle: the system ends the process. So a mapped tensor says where numbers lie, and whoever wants
the numbers asks for them here: ``fetch``, ``read_into`` and ``rows_of`` use ordinary reads, which can fail. They also
take several places of a disk at once.

What is read lies in memory that begins at a multiple of ``ALIGNMENT``. A file promises no such thing, and libraries
choose their instructions by it: the product of a matrix with one row may be rounded in another order.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from . import staging
from .errors import Hint, WanError
from .staging import Piece

ALIGNMENT = 64  # bytes: what PyTorch's allocator gives, and the widest instructions and cache lines want
_READERS = 4  # reads under way at once: one alone reaches neither a disk's speed nor that of the memory
_PART = 16 * 1024**2  # bytes that one reader takes of a large tensor
_CHUNK = 4 * 1024**2  # bytes that wait for their conversion: few enough for a processor's cache

_NO_RESERVE = 0x4000  # MAP_NORESERVE, which the module names from Python 3.13 on
_COPY_ON_WRITE = (
    {"flags": mmap.MAP_PRIVATE | _NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    if sys.platform == "linux"
    else {"access": mmap.ACCESS_COPY}
)

_pool = ThreadPoolExecutor(_READERS, thread_name_prefix="wan-read")
_maps: weakref.WeakSet[MappedFile] = weakref.WeakSet()


class MappedFile(mmap.mmap):
    """A whole file, mapped privately; it lives as long as any tensor over it."""

    file: Path
    state: tuple[int, int]
    address: int

    def __new__(cls, file: Path) -> MappedFile:
        with file.open("rb") as stream:
            self = super().__new__(cls, stream.fileno(), 0, **_COPY_ON_WRITE)
            self.file, self.state = file, _state(stream)
        self.address = torch.frombuffer(self, dtype=torch.uint8, count=1).data_ptr()
        _maps.add(self)
        return self

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What lies at a place of the file.

        Raises:
            WanError: the file was truncated since its header was read.
        """
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        if offset + count * dtype.itemsize > len(self):
            raise changed(self.file)
        return torch.frombuffer(self, dtype=dtype, count=count, offset=offset).view(shape)


def changed(path: Path) -> WanError:
    """What to say of a file that is not any more what its header said."""
    return WanError(f"{path} was changed or removed after it was chosen.", Hint.RELOAD)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in a mapped file."""
    return tensor.device.type == "cpu" and tensor.numel() > 0 and _map_at(tensor.data_ptr()) is not None


def fetch(
    tensor: Tensor, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *, aligned: bool = False
) -> Tensor:
    """As ``tensor.to(device, dtype)``, but what it returns is never mapped: what is, is read.

    Args:
        aligned: return memory that begins at a multiple of ``ALIGNMENT``, for a tensor that stays.

    Raises:
        WanError: see ``read_into``.
    """
    device, dtype = torch.device(device or tensor.device), dtype or tensor.dtype
    crooked = aligned and device.type == "cpu" and (tensor.data_ptr() % ALIGNMENT or not tensor.is_contiguous())
    if not crooked and not is_mapped(tensor):
        return tensor.to(device, dtype)
    place = room_for(tensor, device, dtype)
    read_into([(tensor, place)])
    return place


def room_for(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Uninitialised aligned memory for a tensor; anybody may write into it, in inference mode or out of it."""
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, device=device, dtype=dtype)


def rows_of(tensor: Tensor, index: slice | Tensor) -> Tensor:
    """``tensor[index]``: for a slice the same memory; for row numbers a copy, read where the tensor is mapped."""
    if isinstance(index, slice) or not is_mapped(tensor):
        return tensor[index]
    numbers, places = index.unique(return_inverse=True)
    rows = torch.empty(len(numbers), *tensor.shape[1:], dtype=tensor.dtype)
    read_into((tensor[number], row) for number, row in zip(numbers.tolist(), rows, strict=True))
    return rows[places]


def read_into(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy (tensor, place) pairs, as ``place.copy_(tensor)`` would; mapped tensors are read from their files.

    Raises:
        WanError: a file was changed, truncated or removed, or cannot be read any more. Nothing is being written to
            the places when this returns or raises.
    """
    jobs: list[Future] = []
    uploads: dict[torch.device, list[tuple[_Source, torch.dtype, Tensor]]] = {}
    try:
        for tensor, place in pairs:
            source = _behind(tensor)
            if source is None:
                place.copy_(tensor)
            elif _is_copy(tensor, place):
                jobs += [_pool.submit(part.read, into) for part, into in _parts(source, place)]
            elif place.device.type == "cpu" and place.is_contiguous():
                parts = _parts(source, place, tensor.dtype)
                jobs += [_pool.submit(_convert, part, tensor.dtype, into) for part, into in parts]
            elif place.device.type == "cuda" and place.is_contiguous():
                uploads.setdefault(place.device, []).append((source, tensor.dtype, place))
            else:
                _convert(source, tensor.dtype, place)
        for device, sources in uploads.items():
            _upload(device, sources)
    finally:
        wait(jobs)
    for job in jobs:
        job.result()


def _upload(device: torch.device, sources: Sequence[tuple[_Source, torch.dtype, Tensor]]) -> None:
    """Fill places on a CUDA device."""
    pieces = (
        Piece(part.read, dtype, into)
        for source, dtype, place in sources
        for part, into in _parts(source, place, dtype, staging.PIECE)
    )
    largest = max(min(staging.PIECE, place.numel() * dtype.itemsize) for _, dtype, place in sources)
    staging.upload(pieces, device, largest, _pool)


@dataclass(frozen=True)
class _Source:
    """A place in a file, as it was when it was mapped."""

    file: Path
    state: tuple[int, int]
    offset: int

    def read(self, place: Tensor) -> None:
        """Fill a contiguous tensor in the host's memory."""
        try:
            with self.file.open("rb", buffering=0) as stream:
                if _state(stream) != self.state:
                    raise changed(self.file)
                stream.seek(self.offset)
                rest = place.view(-1).view(torch.uint8).numpy().data
                while rest:
                    count = stream.readinto(rest)
                    if not count:
                        raise changed(self.file)
                    rest = rest[count:]
        except FileNotFoundError as error:
            raise changed(self.file) from error
        except OSError as error:
            raise WanError(
                f"{self.file} cannot be read any more ({error}). Check the disk, or the network share it "
                "lies on, and load it again."
            ) from error


def _behind(tensor: Tensor) -> _Source | None:
    """Where a tensor lies in a mapped file; None for any other and for views with gaps or another order."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
        return None
    mapped = _map_at(tensor.data_ptr())
    return None if mapped is None else _Source(mapped.file, mapped.state, tensor.data_ptr() - mapped.address)


def _map_at(address: int) -> MappedFile | None:
    return next((one for one in list(_maps) if one.address <= address < one.address + len(one)), None)


def _parts(
    source: _Source, place: Tensor, dtype: torch.dtype | None = None, size: int = _PART
) -> Iterator[tuple[_Source, Tensor]]:
    """A large tensor in parts of so many stored bytes for several readers; ``dtype``: as stored, if not the place's."""
    width = (dtype or place.dtype).itemsize
    for part in place.view(-1).split(max(1, size // width)):
        yield source, part
        source = replace(source, offset=source.offset + part.numel() * width)


def _is_copy(tensor: Tensor, place: Tensor) -> bool:
    return place.device.type == "cpu" and place.dtype == tensor.dtype and place.is_contiguous()


@torch.inference_mode()  # threads have a mode of their own, and what ComfyUI asks for may be an inference tensor
def _convert(source: _Source, dtype: torch.dtype, place: Tensor) -> None:
    """Fill a contiguous tensor of another dtype or on another device, a part at a time."""
    stored = torch.empty(min(place.numel(), _CHUNK // dtype.itemsize), dtype=dtype)
    for part in place.view(-1).split(len(stored)):
        source.read(stored[: len(part)])
        part.copy_(stored[: len(part)])
        source = replace(source, offset=source.offset + part.numel() * dtype.itemsize)


def _state(stream: IO) -> tuple[int, int]:
    """Changes when the file does: its size and modification time."""
    now = os.fstat(stream.fileno())
    return now.st_size, now.st_mtime_ns
