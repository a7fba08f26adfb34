"""The header of a safetensors file, checked as a whole before anything believes it.

The format (github.com/huggingface/safetensors): eight bytes of length, a JSON object of name -> dtype, shape and
data_offsets, then the tensors one after the other, with nothing between them.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import WanError
from .door import HEADER_LIMIT, MOST_TENSORS, Damage, check_name, check_shape, damaged, is_count, read_json, shown
from .storage import STORAGES, Storage, named

_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """One tensor: ``begin`` and ``end`` count from the beginning of the file."""

    shape: tuple[int, ...]
    storage: Storage
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """
    Raises:
        WanError: truncated, corrupt, or with a type of numbers that the format does not know.
    """
    try:
        return _header(file)
    except (Damage, struct.error) as error:
        raise damaged(file, error) from error


def _header(file: Path) -> Header:
    size = file.stat().st_size
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > size - 8:
            raise Damage(f"its header claims {length} bytes of {size}")
        if length > HEADER_LIMIT:
            raise Damage(f"its header claims {length} bytes, expected at most {HEADER_LIMIT}")
        content = read_json(stream.read(length))
    if not isinstance(content, dict):
        raise Damage(f"its header is a {type(content).__name__}, expected an object")
    metadata = _metadata(content.pop(_METADATA, None))
    if len(content) > MOST_TENSORS:
        raise Damage(f"it claims {len(content)} tensors, expected at most {MOST_TENSORS}")
    entries = {check_name(name): _entry(file, name, entry, 8 + length) for name, entry in content.items()}
    _check_places(entries, 8 + length, size)
    return Header(entries, metadata)


def _metadata(found: object) -> dict[str, str]:
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise Damage("its metadata is no object of texts")
    try:
        for text in (*found, *found.values()):
            text.encode()
    except UnicodeEncodeError:
        raise Damage("its metadata has halves of characters") from None
    return found


def _entry(file: Path, name: str, found: object, begin: int) -> Entry:
    if not isinstance(found, dict):
        raise Damage(f"the entry of {shown(name)} is no object")
    kind, shape, places = (found.get(part) for part in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str):
        raise Damage(f"{shown(name)} has no dtype")
    if kind not in STORAGES:
        raise WanError(
            f"{shown(file)} holds {shown(name)} as {named(kind)}, which the safetensors format did not "
            f"have when this version was made. Known: {', '.join(STORAGES)}. Use another file of the same "
            "model, or a newer version of this program."
        )
    shape, storage = check_shape(name, shape), STORAGES[kind]
    if not isinstance(places, list) or len(places) != 2 or not all(is_count(place) for place in places):
        raise Damage(f"the data_offsets of {shown(name)} are no two places")
    bits = math.prod(shape) * storage.bits
    if bits % 8 or places[1] - places[0] != bits // 8:
        raise Damage(
            f"{shown(name)} of shape {list(shape)} as {kind} takes {bits / 8:g} bytes, but its data_offsets "
            f"hold {places[1] - places[0]}"
        )
    return Entry(shape, storage, begin + places[0], begin + places[1])


def _check_places(entries: dict[str, Entry], begin: int, size: int) -> None:
    """One after the other, without overlap or hole, to the end of the file."""
    at = begin
    last = max((entry.end for entry in entries.values()), default=begin)
    if last != size:  # said first: it tells a broken download from a broken header
        raise Damage(f"expected {last} bytes, found {size}")
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != at:
            problem = "overlaps the one before it" if entry.begin < at else "leaves a hole before it"
            raise Damage(f"{shown(name)} {problem}")
        at = entry.end
