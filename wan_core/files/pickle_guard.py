"""A ``.pth`` looked through before PyTorch opens it: nothing of it is built or called here.

``torch.load(weights_only=True)`` runs no foreign code, but what it does allow can still be made to fill the memory:
a ``bytearray`` of a terabyte, a list copied ten thousand times, a compressed record, a storage larger than its file, a
tuple nested until hashing it ends the process. The instructions of the pickle are followed here on stand-ins, which
know only how large things would become; what a state dict never needs is refused.
"""

from __future__ import annotations

import pickletools
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import WanError
from .door import MOST_DIMENSIONS, Damage, damaged, is_count, shown

_PICKLE_LIMIT = 64 * 1024**2  # bytes of instructions
_MOST_STEPS = 500_000  # a training state of ten thousand tensors has some 350,000
_MOST_COPIED = 4_000_000  # entries that are copied from one container to another
_MOST_RECORDS = 100_000
_DEEPEST = 50  # tuples within tuples
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number by which torch.save's older files begin
_GLOBAL_NAME = re.compile(r"[A-Za-z_][\w.]{0,120}", re.ASCII)

_STORAGE_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16, "UntypedStorage": 1,
}  # fmt: skip
_REBUILD = "torch._utils._rebuild_"
_TENSORS = {f"{_REBUILD}tensor", f"{_REBUILD}tensor_v2", f"{_REBUILD}tensor_v3"}
_WRAPPED = {f"{_REBUILD}parameter", f"{_REBUILD}parameter_with_state"}
_COPIES = {"collections.Counter", "builtins.set", "__builtin__.set", "torch.Size", "torch.device", "builtins.complex",
           "__builtin__.complex", "_codecs.encode", "builtins.bytearray", "__builtin__.bytearray"}  # fmt: skip


class Refused(Damage):
    """What PyTorch might allow, but no checkpoint of a model needs."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Tuple:
    items: tuple[Any, ...]
    depth: int


@dataclass
class _Container:
    """A list, a dict or a set, of which only the number of its entries counts."""

    size: int = 0


@dataclass(frozen=True)
class _Storage:
    bytes: int
    item: int  # bytes of one element


class _Tensor:
    pass


_MARK = object()


@dataclass
class _Machine:
    """Follows one pickle. ``room`` is what its file could hold, in bytes."""

    room: int
    storages: dict[Any, int] = field(default_factory=dict)  # key -> bytes
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    steps: int = 0
    copied: int = 0  # entries
    claimed: int = 0  # bytes

    def follow(self, stream: BinaryIO) -> Any:
        """To the end of one pickle: what it leaves behind."""
        self.stack, self.memo = [], {}
        for opcode, value, _ in pickletools.genops(stream):
            self.steps += 1
            if self.steps > _MOST_STEPS:
                raise Refused(f"a pickle of more than {_MOST_STEPS} instructions")
            step = _STEPS.get(opcode.name)
            if step is None:
                raise Refused(f"the instruction {opcode.name}, which no state dict needs")
            step(self, value)
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise Damage("a pickle without a mark")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def tuple_of(self, items: list[Any]) -> None:
        depth = 1 + max((item.depth for item in items if isinstance(item, _Tuple)), default=0)
        if depth > _DEEPEST:
            raise Refused("tuples nested too deeply")
        self.stack.append(_Tuple(tuple(items), depth))

    def last(self, count: int) -> None:
        items = self.stack[-count:]
        del self.stack[-count:]
        self.tuple_of(items)

    def grow(self, entries: int) -> None:
        if not isinstance(self.stack[-1], _Container):
            raise Damage("a pickle that fills what is no container")
        self.stack[-1].size += entries

    def fill(self, taken: int) -> None:
        """One entry, of which this many parts lie on the stack: a value, or a key and a value."""
        for _ in range(taken):
            self.stack.pop()
        self.grow(1)

    def set_items(self, items: list[Any]) -> None:
        self.grow(len(items) // 2)

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise Damage("a pickle that remembers what it never had")
        self.stack.append(self.memo[place])

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def persistent(self) -> None:
        """('storage', its type, its key, where it was, its number of elements, and a view in older files)"""
        given = self.stack.pop()
        items = given.items if isinstance(given, _Tuple) else ()
        if len(items) not in (5, 6) or items[0] not in ("storage", b"storage") or not isinstance(items[1], _Global):
            raise Refused("a reference to something that is no storage")
        item = _STORAGE_BYTES.get(items[1].name.rpartition(".")[2])
        if item is None or not is_count(items[4]) or not isinstance(items[2], (str, bytes, int)):
            raise Refused("a storage of an unknown kind or size")
        size = items[4] * item
        if items[2] not in self.storages:
            self.storages[items[2]] = size
            self.claimed += size
        elif self.storages[items[2]] < size:
            raise Damage("one storage in two sizes")
        if self.claimed > self.room:
            raise Damage(f"storages of more bytes than the file has ({self.room})")
        self.stack.append(_Storage(size, item))

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Container):  # the attributes of an OrderedDict
            self.copy(state)
        else:
            raise Refused("attributes of something that is no state dict")

    def copy(self, *given: Any) -> None:
        for one in given:
            if isinstance(one, _Container):
                self.copied += one.size
            elif isinstance(one, _Tuple):
                self.copied += len(one.items)
            elif isinstance(one, (str, bytes)):
                self.copied += len(one) // 16
        if self.copied > _MOST_COPIED:
            raise Refused("containers copied again and again")

    def reduce(self) -> None:
        given = self.stack.pop()
        function = self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(given, _Tuple):
            raise Refused("a call of something that is no function")
        self.stack.append(self.called(function.name, given.items))

    def called(self, name: str, given: tuple[Any, ...]) -> Any:
        if name == "collections.OrderedDict" and not given:
            return _Container()
        if name in _TENSORS:
            return self._tensor(name, given)
        if name in _WRAPPED and given and isinstance(given[0], _Tensor):
            return given[0]
        if name == "torch._tensor._rebuild_from_type_v2" and len(given) == 4:
            function, _, inner, _ = given
            if isinstance(function, _Global) and function.name in _TENSORS | _WRAPPED and isinstance(inner, _Tuple):
                return self.called(function.name, inner.items)
        if name in _COPIES and not (name.endswith("bytearray") and any(isinstance(one, int) for one in given)):
            self.copy(*given)
            return _Container(sum(one.size for one in given if isinstance(one, _Container)))
        raise Refused(f"a call of {_named(name)}")

    def _tensor(self, name: str, given: tuple[Any, ...]) -> _Tensor:
        """(storage, offset, size, stride, …), and a dtype in the newest kind: all of it must lie in its storage."""
        storage, offset, size, stride = given[:4] if len(given) >= 4 else (None,) * 4
        if not isinstance(storage, _Storage) or not is_count(offset) or not _counts(size) or not _counts(stride):
            raise Damage("a tensor without storage, size or stride")
        item = _item_bytes(given[6:7]) if name.endswith("v3") else storage.item
        sizes, strides = size.items, stride.items
        if len(sizes) != len(strides) or len(sizes) > MOST_DIMENSIONS:
            raise Damage("a tensor whose size and stride do not go together")
        count, end = 1, offset + 1
        for length, step in zip(sizes, strides, strict=True):
            count, end = count * length, end + (length - 1) * step
        if count and (end * item > storage.bytes or count * item > self.room):
            raise Damage("a tensor that is larger than its storage")
        return _Tensor()


def _counts(given: Any) -> bool:
    return isinstance(given, _Tuple) and all(is_count(number) for number in given.items)


def _item_bytes(given: tuple[Any, ...]) -> int:
    found = getattr(torch, given[0].name.rpartition(".")[2], None) if given and isinstance(given[0], _Global) else None
    if not isinstance(found, torch.dtype):
        raise Damage("a tensor of no dtype")
    return found.itemsize


def _named(name: str) -> str:
    return name if _GLOBAL_NAME.fullmatch(name) else "something without a proper name"


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _push_global(machine: _Machine, value: str) -> None:
    """A name only; what it stands for is not looked up. PyTorch refuses what is not on its list."""
    machine.stack.append(_Global(".".join(value.split(" ", 1))))


Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, Step] = {
    "PROTO": lambda machine, value: None,
    "STOP": lambda machine, value: None,
    "GLOBAL": _push_global,
    "MARK": lambda machine, value: machine.stack.append(_MARK),
    "NONE": _push,
    "NEWTRUE": lambda machine, value: machine.stack.append(True),
    "NEWFALSE": lambda machine, value: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, value: machine.tuple_of([]),
    "TUPLE": lambda machine, value: machine.tuple_of(machine.since_mark()),
    "TUPLE1": lambda machine, value: machine.last(1),
    "TUPLE2": lambda machine, value: machine.last(2),
    "TUPLE3": lambda machine, value: machine.last(3),
    "APPEND": lambda machine, value: machine.fill(1),
    "APPENDS": lambda machine, value: (lambda items: machine.grow(len(items)))(machine.since_mark()),
    "SETITEM": lambda machine, value: machine.fill(2),
    "SETITEMS": lambda machine, value: machine.set_items(machine.since_mark()),
    "BINPERSID": lambda machine, value: machine.persistent(),
    "REDUCE": lambda machine, value: machine.reduce(),
    "BUILD": lambda machine, value: machine.build(),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), lambda machine, value: _push(machine, _Container())),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1", "BINUNICODE", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, value: machine.get(value)),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, value: machine.put(value)),
}


def check_pickle(file: Path) -> None:
    """Look through a file of torch.save, new or old.

    Raises:
        WanError: damaged, no file of torch.save, or made to fill the memory or to run code.
    """
    try:
        with file.open("rb") as stream:
            if stream.read(2) == b"PK":
                _check_zip(file, stream)
            else:
                _check_legacy(file, stream)
    except Refused as error:
        raise WanError(
            f"{shown(file)} was refused: it is a pickle that wants to run code, or no plain state dict "
            f"({error}). Use a safetensors version of it."
        ) from error
    except (Damage, struct.error, zipfile.BadZipFile, EOFError) as error:
        raise damaged(file, error if isinstance(error, Damage) else "it ends too early") from error
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError, NotImplementedError, OverflowError) as error:
        raise damaged(file, f"its pickle cannot be followed: {type(error).__name__}") from error


def _check_legacy(file: Path, stream: BinaryIO) -> None:
    """Five pickles (a number, a version, the system, the object, its storages' keys), then the storages."""
    size = file.stat().st_size
    stream.seek(0)
    if stream.read(len(_LEGACY_START)) != _LEGACY_START:
        raise Refused("it does not begin as torch.save's files do")
    if size > 257 + 5 and _at(stream, 257, 5) == b"ustar":
        raise Refused("an archive of the kind that PyTorch wrote before 2018")
    content, machine = BytesIO(_at(stream, 0, _PICKLE_LIMIT)), _Machine(room=size)
    for _ in range(5):
        machine.follow(content)


def _at(stream: BinaryIO, place: int, count: int) -> bytes:
    stream.seek(place)
    return stream.read(count)


def _check_zip(file: Path, stream: BinaryIO) -> None:
    size = file.stat().st_size
    _check_records(stream, size)
    with zipfile.ZipFile(stream) as archive:
        records = archive.infolist()
        if len({one.filename.lower() for one in records}) < len(records):
            raise Damage("an archive with two records of one name")
        if any(one.compress_type != zipfile.ZIP_STORED or one.file_size != one.compress_size for one in records):
            raise Refused("a compressed archive: torch.save writes them uncompressed")
        top = records[0].filename.split("/")[0] if records else ""
        found = {one.filename: one for one in records}
        if f"{top}/constants.pkl" in found:
            raise Refused("a TorchScript program")
        pickled = found.get(f"{top}/data.pkl")
        if pickled is None:
            raise Damage("an archive without data.pkl: it was not written by torch.save")
        if pickled.file_size > _PICKLE_LIMIT:
            raise Refused(f"a pickle of {pickled.file_size} bytes")
        _check_order(archive, found.get(f"{top}/byteorder"))
        machine = _Machine(room=size)
        machine.follow(BytesIO(archive.read(pickled)))
    for key, claimed in machine.storages.items():
        record = found.get(f"{top}/data/{key}")
        if record is None or record.file_size != claimed or record.header_offset + claimed > size:
            raise Damage("storages that its records do not hold")


def _check_order(archive: zipfile.ZipFile, record: zipfile.ZipInfo | None) -> None:
    """PyTorch ends the process when it turns the bytes of a tensor that is not there yet."""
    order = b"little"
    if record is not None:
        order = archive.read(record).strip() if record.file_size < 16 else b""
    if order == b"big":
        raise Refused("a file of a big-endian machine")
    if order != b"little":
        raise Damage("the order of its bytes is neither big nor little")


def _check_records(stream: BinaryIO, size: int) -> None:
    """The number of records and the size of their list, before a library makes objects of them."""
    tail = _at(stream, max(0, size - 65_557), 65_557)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > len(tail):
        raise Damage("an archive without its end")
    count, listed = struct.unpack_from("<HI", tail, end + 10)
    if count == 0xFFFF or listed == 0xFFFFFFFF:
        locator = tail[max(0, end - 20) : end]
        if locator[:4] != b"PK\x06\x07":
            raise Damage("an archive without its end")
        (place,) = struct.unpack_from("<Q", locator, 8)
        if place > size:
            raise Damage("an archive without its end")
        count, listed = struct.unpack_from("<QQ", _at(stream, place, 56), 32)
    if count > _MOST_RECORDS or listed > _PICKLE_LIMIT:
        raise Refused(f"an archive of {count} records")
