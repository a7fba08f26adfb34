"""What a rehearsal counts: kernels, bytes that they read and write, memory that lives, and who waits for the device."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
_MAKES_ROOM = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_VIEWS = ("_unsafe_view", "detach", "alias", "lift_fresh", "lift", "_reshape_alias", "set_", "resize_")
# Their first argument tells a shape, or is only written.
_ONLY_WRITES = (
    "copy_", "fill_", "zero_", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like",
)  # fmt: skip


@dataclass(eq=False)  # two that counted nothing are still two
class Counts:
    """What happened between two moments.

    Attributes:
        kernels: operations that launch work.
        read, written: bytes of the tensors that they take and make; what a kernel reads twice counts once.
        between: of these bytes, those of kernels that are no product, convolution or attention.
        operations: floating-point operations of products, convolutions and attention.
        waits: host synchronisations by what waited and where, after which the device has nothing to do.
        behind: those that wait for less than all that was launched: the device works on.
        pageable, pinned: bytes copied to the device from ordinary and from pinned memory.
        down: bytes copied to the host.
    """

    kernels: int = 0
    read: int = 0
    written: int = 0
    between: int = 0
    operations: int = 0
    waits: Counter = field(default_factory=Counter)
    behind: Counter = field(default_factory=Counter)
    uploads: int = 0
    pageable: int = 0
    pinned: int = 0
    down: int = 0
    of: Counter = field(default_factory=Counter)  # kernels by name
    bytes_of: Counter = field(default_factory=Counter)

    def add(self, cost: Cost) -> None:
        self.kernels += 1
        self.read += cost.read
        self.written += cost.written
        self.operations += cost.operations
        self.of[cost.name] += 1
        self.bytes_of[cost.name] += cost.read + cost.written
        self.between += 0 if cost.operations else cost.read + cost.written

    @property
    def moved(self) -> int:
        return self.read + self.written


class LiveMemory:
    """The device's memory: the bytes of all tensors that live at a time."""

    def __init__(self, total: int):
        self.total, self.now, self.peak = total, 0, 0
        self._seen: dict[int, weakref.ref] = {}
        self._lock = threading.RLock()

    def hold(self, storage: torch.UntypedStorage) -> None:
        """
        Raises:
            OutOfMemoryError: there is not so much memory.
        """
        with self._lock:
            key = id(storage)
            if key in self._seen:
                return
            size = storage.nbytes()
            if self.now + size > self.total:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. (a rehearsal: {self.now / 1e9:.2f} "
                    f"of {self.total / 1e9:.2f} GB are in use)"
                )
            self.now += size
            self.peak = max(self.peak, self.now)
            self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))

    def _drop(self, key: int, size: int) -> None:
        with self._lock:
            self._seen.pop(key, None)
            self.now -= size


class Tally:
    """Counts for whoever asked last, beside memory, which is one for all."""

    def __init__(self, total: int):
        self.live = LiveMemory(total)
        self.launched = 0  # kernels since the beginning
        self._counts: list[Counts] = []
        self._thread = threading.get_ident()

    def begin(self) -> Counts:
        """Counts that go on until ``end``."""
        self._counts.append(Counts())
        return self._counts[-1]

    def end(self, counts: Counts) -> Counts:
        self._counts.remove(counts)
        return counts

    def computed(self, cost: Cost, made: list[Tensor]) -> None:
        """An operation on the device has been asked for; of other threads (previews) only its memory counts."""
        for one in made:
            self.made(one)
        if cost.name and threading.get_ident() == self._thread:
            self.launched += 1
            for counts in self._counts:
                counts.add(cost)

    def made(self, tensor: Tensor) -> None:
        if tensor.fake_device.type not in ("cpu", "meta"):
            self.live.hold(tensor.untyped_storage())

    def synchronised(self, why: str, *, behind: bool = False) -> None:
        """The host waits for the device, or for what it did before the rest; in the thread that computes."""
        if threading.get_ident() == self._thread:
            where = _where()
            for counts in self._counts:
                (counts.behind if behind else counts.waits)[f"{why}: {where}"] += 1

    def uploaded(self, source: Tensor, *, pinned: bool) -> None:
        for counts in self._counts:
            counts.uploads += 1
            if pinned:
                counts.pinned += source.nbytes
            else:
                counts.pageable += source.nbytes

    def downloaded(self, source: Tensor, *, waits: bool = True) -> None:
        if waits:
            self.synchronised("copies to the host")
        for counts in self._counts:
            counts.down += source.nbytes


@dataclass(frozen=True)
class Cost:
    """Of one kernel; without a name it launches nothing, but takes memory."""

    name: str = ""
    read: int = 0
    written: int = 0
    operations: int = 0


def cost_of(function, args: Sequence, kwargs: Mapping, given: list[Tensor], out: object) -> Cost | None:
    """None for a view."""
    kind = _kind(function)
    if kind.view:
        return None
    if kind.room:
        return Cost()
    old = {id(one.untyped_storage()) for one in given if isinstance(one, FakeTensor)}
    new = [one for one in tensors_in((out,), {}) if id(one.untyped_storage()) not in old]
    changed = [args[i] for i in kind.mutated if i < len(args) and isinstance(args[i], Tensor)]
    read = [one for i, one in enumerate(given) if not (i == 0 and kind.only_writes) and one is not kwargs.get("out")]
    flops = flop_registry.get(function.overloadpacket)
    return Cost(
        kind.name,
        sum(map(touched, read)),
        sum(map(touched, [*new, *changed, *_outs(kwargs)])),
        flops(*args, **kwargs, out_val=out) if flops else 0,
    )


@dataclass(frozen=True)
class _Kind:
    name: str
    view: bool
    room: bool
    mutated: tuple[int, ...]
    only_writes: bool


@cache
def _kind(function) -> _Kind:
    schema = function._schema
    name = schema.name.partition("::")[2]
    aliases = [one.alias_info for one in schema.returns]
    view = name in _VIEWS or any(alias is not None and not alias.is_write for alias in aliases)
    positional = [one for one in schema.arguments if not one.kwarg_only]
    mutated = tuple(i for i, one in enumerate(positional) if one.alias_info is not None and one.alias_info.is_write)
    return _Kind(name, view, name in _MAKES_ROOM, mutated, name in _ONLY_WRITES)


def tensors_in(args: Sequence, kwargs: Mapping) -> list[Tensor]:
    """The tensors among arguments, and in lists and tuples among them."""
    found = []
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += [inner for inner in one if isinstance(inner, Tensor)]
    return found


def touched(tensor: Tensor) -> int:
    """Bytes of a tensor that are there: what is broadcast counts once."""
    if not isinstance(tensor, FakeTensor):
        return 0
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def _outs(kwargs: Mapping) -> list[Tensor]:
    return [kwargs["out"]] if isinstance(kwargs.get("out"), Tensor) else []


def _where() -> str:
    """The innermost function of the pack."""
    frame = sys._getframe(2)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "bench"):
            return f"{file.relative_to(ROOT).as_posix()} {frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
