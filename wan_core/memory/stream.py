"""Block swap: some blocks keep their weights in the mapped file and stream through the device, one way only.

    file --reader thread--> staging ring (pinned) --copy stream--> device slots --> the block's modules

While a block computes, the next ones are read and copied; behind the last comes the first again, for the other half
of the guidance or the next step. Nothing is written back, and once the ring stands nothing is allocated but a small
buffer where a dtype changes.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ..errors import WanError
from ..files.mapped import is_mapped, read_into

log = logging.getLogger(__name__)

ALIGNMENT = 256  # bytes; a tensor's place in a slot
STAGES = 2  # blocks in host memory on their way: one is read while the other is copied
PREFETCH = 1  # blocks on the device before their turn, unless asked otherwise

Key = Callable[[str], bool]
Passenger = tuple[nn.Module, str, torch.Tensor, torch.dtype]  # buffer of a module: its name, as stored, dtype there


def spread(count: int, layers: int) -> tuple[int, ...]:
    """Which blocks are swapped: evenly spaced, so that resident ones between them give their copies more time."""
    return tuple(i for i in range(layers) if (i + 1) * count // layers > i * count // layers)


def check_count(count: int, layers: int) -> None:
    if not 0 <= count <= layers:
        raise WanError(f"Cannot keep {count} blocks off the device: this model has {layers} blocks. "
                       f"Choose 0 to {layers}.")


class Ring:
    """Who may go on: the reader, the copier or the computation. Knows no threads, no devices and no clock.

    Blocks pass in a cycle; the n-th to pass has ticket n. ``read``, ``copied`` and ``released`` count the tickets that
    are through with each. A ticket takes stage ``ticket % stages`` and slot ``ticket % slots``.
    """

    def __init__(self, blocks: Sequence[int], *, slots: int, stages: int):
        self.blocks = tuple(blocks)
        self.slots, self.stages = slots, stages
        self.read = self.copied = self.released = 0
        self._shift = 0

    def block(self, ticket: int) -> int:
        return self.blocks[(ticket + self._shift) % len(self.blocks)]

    def stage(self, ticket: int) -> int:
        return ticket % self.stages

    def slot(self, ticket: int) -> int:
        return ticket % self.slots

    def may_read(self) -> bool:
        """Whether the ticket ``read`` has a stage: the one that was there before has been copied away."""
        return self.read - self.copied < self.stages

    def may_copy(self) -> bool:
        """Whether the ticket ``copied`` is read and has a slot: the one that was there before has been computed."""
        return self.copied < self.read and self.copied - self.released < self.slots

    def may_compute(self) -> bool:
        """Whether the ticket ``released`` is on the device."""
        return self.released < self.copied

    def restart(self, block: int) -> None:
        """Go on at another block than the next; all that is under way is dropped."""
        self.copied = self.released = self.read
        self._shift = self.blocks.index(block) - self.read


@dataclass(frozen=True)
class Cargo:
    """One tensor of a block: where it comes from, where it goes, and where it lies in a slot."""

    owner: nn.Module
    name: str
    is_parameter: bool
    stored: torch.Tensor  # mapped
    dtype: torch.dtype  # on the device
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.stored.numel() * self.dtype.itemsize

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Its place in a buffer of bytes, as a tensor."""
        return buffer[self.offset : self.end].view(self.dtype).view(self.stored.shape)

    def put(self, tensor: torch.Tensor) -> None:
        if self.is_parameter:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.name] = tensor


@dataclass(frozen=True)
class Load:
    """All that one block brings to the device."""

    cargo: tuple[Cargo, ...]

    @property
    def bytes(self) -> int:
        return self.cargo[-1].end if self.cargo else 0

    def read_into(self, buffer: torch.Tensor) -> None:
        """Read from the file, in the device's dtypes."""
        read_into((item.stored, item.view(buffer)) for item in self.cargo)

    def put(self, buffer: torch.Tensor) -> None:
        for item in self.cargo:
            item.put(item.view(buffer))

    def take_away(self) -> None:
        for item in self.cargo:
            item.put(torch.empty_like(item.stored, device="meta"))


def load_of(block: nn.Module, device: torch.device, dtype: torch.dtype, keep_float32: Key) -> Load:
    """What must be moved of a block whose tensors are mapped: parameters in the dtype of the computation (or float32),
    buffers as they are. What is right as it lies in the file stays there.
    """
    cargo = []
    for path, owner in block.named_modules():
        for is_parameter, tensors in ((True, owner._parameters), (False, owner._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{path}.{name}" if path else name
                target = _target_dtype(full, tensor, is_parameter, dtype, keep_float32)
                if tensor.device == device and tensor.dtype == target:
                    continue
                cargo.append(Cargo(owner, name, is_parameter, tensor.data, target, 0))
    return _laid_out(cargo)


def _laid_out(cargo: Iterable[Cargo]) -> Load:
    """Each tensor at a place of its own in the slot."""
    placed, offset = [], 0
    for item in cargo:
        placed.append(replace(item, offset=offset))
        offset = -(-placed[-1].end // ALIGNMENT) * ALIGNMENT
    return Load(tuple(placed))


def _target_dtype(
    name: str, tensor: torch.Tensor, is_parameter: bool, dtype: torch.dtype, keep_float32: Key
) -> torch.dtype:
    if not is_parameter or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if keep_float32(name) else dtype


class Lane(Protocol):
    """The memory that blocks pass through, and how one place waits for another. Calls but ``stage`` return at once."""

    slots: Sequence[torch.Tensor]

    def stage(self, index: int) -> torch.Tensor:
        """A staging buffer, once nothing reads from it any more."""

    def copy(self, stage: int, slot: int, count: int) -> None:
        """Begin to copy so many bytes, after the last computation with the slot."""

    def enter(self, slot: int) -> None:
        """Let the computation that follows wait for the copy."""

    def leave(self, slot: int) -> None:
        """The computation that has been asked for so far is the last with this slot's present content."""

    def close(self) -> None:
        """Wait until no copy is under way."""


class HostLane:
    """Plain memory and copies that are done when they return: for any device without streams."""

    @torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, and another thread writes into these
    def __init__(self, device: torch.device, slots: int, stages: int, size: int):
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.stages = [torch.empty(size, dtype=torch.uint8) for _ in range(stages)]

    def stage(self, index: int) -> torch.Tensor:
        return self.stages[index]

    def copy(self, stage: int, slot: int, count: int) -> None:
        self.slots[slot][:count].copy_(self.stages[stage][:count])

    def enter(self, slot: int) -> None: ...

    def leave(self, slot: int) -> None: ...

    def close(self) -> None: ...


def _pinned(size: int) -> torch.Tensor:
    """Host memory that a device copies from by itself; plain memory, waited for, where the system gives none."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        log.warning("wan_core: no pinned memory (%s): blocks are copied more slowly.", str(error).split("\n")[0])
        return torch.empty(size, dtype=torch.uint8)


class CudaLane:
    """Pinned staging buffers and a stream of its own for copies; events order it and the computation."""

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, slots: int, stages: int, size: int):
        self.device = device
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.stages = [_pinned(size) for _ in range(stages)]
        self.stream = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(slots)]  # the slot's copy is done
        self._free = [torch.cuda.Event() for _ in range(slots)]  # the slot's last computation is done
        self._drained = [torch.cuda.Event(blocking=True) for _ in range(stages)]  # the stage's copy is done
        for event in self._free:  # a slot may be memory that kernels under way still use for something else
            event.record(torch.cuda.current_stream(device))

    def stage(self, index: int) -> torch.Tensor:
        self._drained[index].synchronize()
        return self.stages[index]

    def copy(self, stage: int, slot: int, count: int) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._free[slot])
            self.slots[slot][:count].copy_(self.stages[stage][:count], non_blocking=True)
            self._ready[slot].record(self.stream)
            self._drained[stage].record(self.stream)

    def enter(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._ready[slot])

    def leave(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        self.stream.synchronize()


LANES: dict[str, Callable[[torch.device, int, int, int], Lane]] = {"cuda": CudaLane}  # devices that prefetch


class Conveyor:
    """Blocks on their way from the file to the device, read by a thread so that the disk stalls nobody else."""

    def __init__(self, loads: dict[int, Load], lane: Lane, ring: Ring, check: Callable[[], None]):
        self.loads, self.lane, self.ring, self.check = loads, lane, ring, check
        self._changed = threading.Condition()
        self._closed = False
        self._error: BaseException | None = None
        self._era = 0  # counts restarts, so that what was read before one is dropped
        self._thread = threading.Thread(target=self._read_on, name="wan-block-reader", daemon=True)
        self._thread.start()

    def take(self, block: int) -> torch.Tensor:
        """The slot in which a block's bytes lie, or will lie when the device gets there."""
        with self._changed:
            if self._error or self.ring.block(self.ring.released) != block:
                self._restart(block)
            self._changed.wait_for(lambda: self._error or self.ring.may_compute())
            if self._error:
                raise self._error
            slot = self.ring.slot(self.ring.released)
        self.lane.enter(slot)
        return self.lane.slots[slot]

    def give_back(self) -> None:
        """The block taken last has been computed with."""
        self.lane.leave(self.ring.slot(self.ring.released))
        with self._changed:
            self.ring.released += 1
            self._copy_on()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop; the buffers may be freed afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self.lane.close()

    def _restart(self, block: int) -> None:
        self._era += 1
        self._error = None
        self.ring.restart(block)
        self._changed.notify_all()

    def _copy_on(self) -> None:
        while self.ring.may_copy():
            ticket = self.ring.copied
            self.lane.copy(self.ring.stage(ticket), self.ring.slot(ticket), self.loads[self.ring.block(ticket)].bytes)
            self.ring.copied += 1

    @torch.no_grad()
    def _read_on(self) -> None:
        while (task := self._next_task()) is not None:
            era, ticket, block = task
            error = None
            try:
                self.check()
                self.loads[block].read_into(self.lane.stage(self.ring.stage(ticket)))
            except BaseException as caught:  # the thread that computes must hear of it, whatever it is
                error = caught
            self._report(era, error)

    def _next_task(self) -> tuple[int, int, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._error is None and self.ring.may_read()))
            return None if self._closed else (self._era, self.ring.read, self.ring.block(self.ring.read))

    def _report(self, era: int, error: BaseException | None) -> None:
        with self._changed:
            if era == self._era:
                self._error = error
                self.ring.read += error is None
                self._copy_on()
            self._changed.notify_all()


class BlockSwap:
    """Brings block weights to the device for the time of one block; nothing is copied back.

    On a device with streams, blocks are prefetched; elsewhere they are copied when their turn comes. Tensors that the
    device can use as they lie in the file (a CPU, in the file's dtype) are not copied at all.

    Args:
        count: how many blocks are swapped, see ``spread``.
        prefetch: how many are on the device before their turn.
        check: called before a block is read; raises when its file has changed.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        count: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        keep_float32: Key,
        prefetch: int = PREFETCH,
        check: Callable[[], None] = lambda: None,
    ):
        check_count(count, len(blocks))
        if prefetch < 0:
            raise WanError(f"Cannot prefetch {prefetch} blocks: expected 0 or more.")
        self.blocks = blocks
        self.device = _with_index(torch.device(device))
        self.dtype, self.keep_float32, self.check = dtype, keep_float32, check
        self.indices = spread(count, len(blocks))
        self.prefetch = min(prefetch, max(0, count - 1))
        self._lane = LANES.get(self.device.type)
        self._loads: dict[int, Load] = {}
        self._own: dict[int, Load] = {}  # the blocks' own weights, without adapters
        self._check_all = check
        self._conveyor: Conveyor | None = None
        self._slot: torch.Tensor | None = None

    def places(self, key: str) -> bool:
        """Whether a weight of the model, by its full name, lives on the device all the time."""
        parts = key.split(".")
        return parts[0] != "blocks" or int(parts[1]) not in self.indices

    def adopt(self) -> BlockSwap:
        """Take over the swapped blocks' weights, which must be loaded (mapped) by now."""
        for index in self.indices:
            load = load_of(self.blocks[index], self.device, self.dtype, self.keep_float32)
            load.take_away()
            self._loads[index] = self._own[index] = load
        return self

    def carry(
        self, beside: Mapping[int, Iterable[Passenger]], apart: Iterable[tuple[nn.Module, str]],
        checks: Iterable[Callable[[], None]],
    ) -> None:  # fmt: skip
        """Bring other tensors with the blocks from now on; with nothing given, the blocks' own weights alone again.

        Args:
            beside: what comes with which block.
            apart: (module, name) of a block's parameters that do not stream: the caller puts something in their place.
            checks: called before a block is read, as ``check`` is.
        """
        self.close()
        self._check_all = _all_of((self.check, *checks))
        left = {(id(owner), name) for owner, name in apart}
        for index, own in self._own.items():
            own.take_away()
            more = [
                Cargo(owner, name, False, tensor.data, dtype, 0)
                for owner, name, tensor, dtype in beside.get(index, ())
                if (tensor.device, tensor.dtype) != (self.device, dtype) or is_mapped(tensor)
            ]
            stay = (item for item in own.cargo if (id(item.owner), item.name) not in left)
            self._loads[index] = _laid_out([*stay, *more])

    def brings(self, owner: nn.Module, name: str) -> bool:
        """Whether a parameter of a module is among the blocks' own that are copied."""
        return any(item.owner is owner and item.name == name for own in self._own.values() for item in own.cargo)

    @property
    def slots(self) -> int:
        """Blocks that the device holds at once."""
        return self.prefetch + 1 if self._lane else 1

    @property
    def block_bytes(self) -> int:
        """Of the largest swapped block, as it lies in a slot."""
        return max((load.bytes for load in self._loads.values()), default=0)

    @property
    def moves(self) -> bool:
        """Whether anything is copied: not where the device can use the mapped file itself."""
        return self.block_bytes > 0

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        """The time in which a block's weights are on the device."""
        load = self._loads.get(index)
        if load is None:
            yield
            return
        load.put(self._take(index, load))
        try:
            yield
        finally:
            load.take_away()
            if self._conveyor:
                self._conveyor.give_back()

    def close(self) -> None:
        """Stop the reader and let the buffers go; the next block starts anew."""
        if self._conveyor:
            self._stop()
        self._conveyor = self._slot = None

    def _take(self, index: int, load: Load) -> torch.Tensor:
        if self._lane and self.moves:
            return self._running().take(index)
        self._check_all()
        if self._slot is None:
            with torch.inference_mode(False):
                self._slot = torch.empty(self.block_bytes, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            load.read_into(self._slot)
        return self._slot

    def _running(self) -> Conveyor:
        if self._conveyor is None:
            lane = self._lane(self.device, self.slots, STAGES, self.block_bytes)
            ring = Ring(self.indices, slots=self.slots, stages=STAGES)
            self._conveyor = Conveyor(self._loads, lane, ring, self._check_all)
            # The thread holds the conveyor, never the swap: with the model goes the swap, and with it the thread.
            self._stop = weakref.finalize(self, self._conveyor.close)
        return self._conveyor


def _all_of(checks: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def check() -> None:
        for one in checks:
            one()

    return check


def _with_index(device: torch.device) -> torch.device:
    """"cuda" is the current CUDA device; tensors there name it with its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
