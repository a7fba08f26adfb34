"""Tensors of a ``.pth`` over a mapping of our own, whose numbers can be read without touching it."""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..mapped import MappedFile, fetch

_LOCAL_HEADER = 30  # bytes of a zip entry's own header, before its name


def over_own_mapping(file: Path, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, from those that ``torch.load(mmap=True)`` made; where that cannot be told, copies in memory."""
    begin = _begin_of_mapping(_records(file), loaded)
    if begin is None:
        return {key: tensor.clone() for key, tensor in loaded.items()}
    data = MappedFile(file)
    return {key: _moved(tensor, data, begin) for key, tensor in loaded.items()}


def _moved(tensor: Tensor, data: MappedFile, begin: int) -> Tensor:
    if not tensor.numel():
        return tensor.clone()
    storage = tensor.untyped_storage()
    whole = data.tensor(storage.data_ptr() - begin, (storage.nbytes() // tensor.itemsize,), tensor.dtype)
    if tensor.is_contiguous():
        first = tensor.storage_offset()
        return whole[first : first + tensor.numel()].view(tensor.shape)
    return fetch(whole).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).contiguous()


def _records(file: Path) -> dict[int, int]:
    """Where each storage's bytes begin in the archive, and how many they are."""
    found = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        for entry in archive.infolist():
            if entry.compress_type == zipfile.ZIP_STORED:
                stream.seek(entry.header_offset + _LOCAL_HEADER - 4)
                found[entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", stream.read(4)))] = entry.file_size
    return found


def _begin_of_mapping(records: Mapping[int, int], loaded: Mapping[str, Tensor]) -> int | None:
    """The address at which every storage lies on a record of its size."""
    storages = (tensor.untyped_storage() for tensor in loaded.values() if tensor.numel())
    places = {storage.data_ptr(): storage.nbytes() for storage in storages}
    if not places:
        return None
    first = min(places)
    fitting = [
        first - offset
        for offset, size in records.items()
        if size == places[first]
        and (first - offset) % mmap.PAGESIZE == 0
        and all(records.get(address - first + offset) == size for address, size in places.items())
    ]
    return fitting[0] if len(fitting) == 1 else None
