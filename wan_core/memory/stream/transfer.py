"""What one block brings to the device, and the memory it passes through on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import nn

from ...mapped import read_into
from ...staging import PIECE, pinned

ALIGNMENT = 256  # bytes; a tensor's place in a slot

Key = Callable[[str], bool]


@dataclass(frozen=True)
class TensorSlot:
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

    @property
    def is_cast(self) -> bool:
        return self.stored.dtype != self.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """Its place in a buffer of bytes, as a tensor."""
        return buffer[self.offset : self.end].view(self.dtype).view(self.stored.shape)

    def put(self, tensor: torch.Tensor) -> None:
        if self.is_parameter:
            self.owner._parameters[self.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            self.owner._buffers[self.name] = tensor


@dataclass(frozen=True)
class Part:
    """Some consecutive numbers of a tensor.

    Attributes:
        stored: [N], as they lie in the file.
        dtype: on the device.
        offset, staged: of their bytes in the slot, and in the stage.
    """

    stored: torch.Tensor
    dtype: torch.dtype
    offset: int
    staged: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.stored.numel() * self.dtype.itemsize

    @property
    def staged_end(self) -> int:
        return self.staged + self.stored.nbytes

    @property
    def is_cast(self) -> bool:
        return self.stored.dtype != self.dtype

    def staged_view(self, stage: torch.Tensor) -> torch.Tensor:
        return stage[self.staged : self.staged_end].view(self.stored.dtype)


@dataclass(frozen=True)
class Piece:
    """What passes through a stage at once: parts that are all cast on the device, or all not."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """In the stage."""
        return self.parts[-1].staged_end

    def read_into(self, stage: torch.Tensor) -> None:
        """Read from the file, as it is stored."""
        read_into((part.stored, part.staged_view(stage)) for part in self.parts)

    def copy(self, stage: torch.Tensor, slot: torch.Tensor) -> None:
        """From a stage into a slot, in the device's dtypes."""
        first, last = self.parts[0], self.parts[-1]
        if not first.is_cast:  # stage and slot are laid out alike
            slot[first.offset : last.end].copy_(stage[first.staged : last.staged_end], non_blocking=True)
            return
        for part in self.parts:
            _cast(part.staged_view(stage), slot[part.offset : part.end].view(part.dtype))


@dataclass(frozen=True)
class BlockTransfer:
    """All that one block brings to the device; what is cast on the way comes last."""

    tensors: tuple[TensorSlot, ...]

    @property
    def bytes(self) -> int:
        """On the device."""
        return self.tensors[-1].end if self.tensors else 0

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """In their order, none of more than ``PIECE`` bytes."""
        made: list[list[Part]] = []
        for part in (part for item in self.tensors for part in _parts(item)):
            last = made[-1][-1] if made else None
            begin = -(-last.staged_end // ALIGNMENT) * ALIGNMENT if last else 0
            if last is None or part.is_cast != last.is_cast or begin + part.stored.nbytes > PIECE:
                made.append([part])
            else:
                made[-1].append(replace(part, staged=begin))
        return tuple(Piece(tuple(parts)) for parts in made)

    def read_into(self, buffer: torch.Tensor) -> None:
        """Read from the file, in the device's dtypes."""
        read_into((item.stored, item.view(buffer)) for item in self.tensors)

    def put(self, buffer: torch.Tensor) -> None:
        for item in self.tensors:
            item.put(item.view(buffer))

    def take_away(self) -> None:
        for item in self.tensors:
            item.put(torch.empty_like(item.stored, device="meta"))


def _cast(stored: torch.Tensor, place: torch.Tensor) -> None:
    """Fewer bytes, or as many, than converted ones, and a device casts faster."""
    place.copy_(stored.to(place.device, non_blocking=True))


def _parts(item: TensorSlot) -> Iterator[Part]:
    """A tensor in parts that fit into a piece; whole pieces but for the last, so that what follows stays aligned."""
    offset, most = item.offset, PIECE // ALIGNMENT * ALIGNMENT
    for some in item.stored.contiguous().view(-1).split(most // item.stored.element_size()):
        yield Part(some, item.dtype, offset)
        offset += some.numel() * item.dtype.itemsize


def transfer_of(block: nn.Module, device: torch.device, dtype: torch.dtype, keep_float32: Key) -> BlockTransfer:
    """What must be moved of a block whose tensors are mapped: parameters in the dtype of the computation (or float32),
    buffers as they are. What is right as it lies in the file stays there.
    """
    slots = []
    for path, owner in block.named_modules():
        for is_parameter, tensors in ((True, owner._parameters), (False, owner._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                full = f"{path}.{name}" if path else name
                target = _target_dtype(full, tensor, is_parameter, dtype, keep_float32)
                if tensor.device == device and tensor.dtype == target:
                    continue
                slots.append(TensorSlot(owner, name, is_parameter, tensor.data, target, 0))
    return laid_out(slots)


def laid_out(tensors: Iterable[TensorSlot]) -> BlockTransfer:
    """Each tensor at a place of its own in the slot."""
    placed, offset = [], 0
    for item in sorted(tensors, key=lambda item: item.is_cast):
        placed.append(replace(item, offset=offset))
        offset = -(-placed[-1].end // ALIGNMENT) * ALIGNMENT
    return BlockTransfer(tuple(placed))


def _target_dtype(
    name: str, tensor: torch.Tensor, is_parameter: bool, dtype: torch.dtype, keep_float32: Key
) -> torch.dtype:
    if not is_parameter or not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if keep_float32(name) else dtype


class TransferBackend(Protocol):
    """The memory that blocks pass through, and how one place waits for another. Calls but ``stage`` return at once.

    Made of a device, the number of slots and of stages, and the bytes of each slot and of each stage.
    """

    @property
    def slots(self) -> Sequence[torch.Tensor]: ...

    def stage(self, index: int) -> torch.Tensor:
        """A staging buffer, once nothing reads from it any more."""

    def copy(self, stage: int, slot: int, piece: Piece) -> None:
        """Begin to copy part of a block, after the last computation with the slot."""

    def enter(self, slot: int) -> None:
        """Let the computation that follows wait for the copies that have begun."""

    def leave(self, slot: int) -> None:
        """The computation that has been asked for so far is the last with this slot's present content."""

    def close(self) -> None:
        """Wait until no copy is under way."""


class HostBackend:
    """Plain memory and copies that are done when they return: for any device without streams."""

    @torch.inference_mode(False)  # ComfyUI runs nodes in inference mode, and another thread writes into these
    def __init__(self, device: torch.device, slots: int, stages: int, size: int, staged: int):
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.stages = [torch.empty(staged, dtype=torch.uint8) for _ in range(stages)]

    def stage(self, index: int) -> torch.Tensor:
        return self.stages[index]

    def copy(self, stage: int, slot: int, piece: Piece) -> None:
        piece.copy(self.stages[stage], self.slots[slot])

    def enter(self, slot: int) -> None: ...

    def leave(self, slot: int) -> None: ...

    def close(self) -> None: ...


class CudaBackend:
    """Pinned staging buffers and a stream of its own for copies; events order it and the computation."""

    @torch.inference_mode(False)
    def __init__(self, device: torch.device, slots: int, stages: int, size: int, staged: int):
        self.device = device
        self.slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self.stages = [pinned(staged) for _ in range(stages)]
        self.stream = torch.cuda.Stream(device)
        self._ready = [torch.cuda.Event() for _ in range(slots)]  # the slot's latest copy is done
        self._free = [torch.cuda.Event() for _ in range(slots)]  # the slot's last computation is done
        self._drained = [torch.cuda.Event(blocking=True) for _ in range(stages)]  # the stage's copy is done
        for event in self._free:  # a slot may be memory that kernels under way still use for something else
            event.record(torch.cuda.current_stream(device))

    def stage(self, index: int) -> torch.Tensor:
        self._drained[index].synchronize()
        return self.stages[index]

    def copy(self, stage: int, slot: int, piece: Piece) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self._free[slot])
            piece.copy(self.stages[stage], self.slots[slot])
            self._ready[slot].record(self.stream)
            self._drained[stage].record(self.stream)

    def enter(self, slot: int) -> None:
        torch.cuda.current_stream(self.device).wait_event(self._ready[slot])

    def leave(self, slot: int) -> None:
        self._free[slot].record(torch.cuda.current_stream(self.device))

    def close(self) -> None:
        self.stream.synchronize()


# Of devices that prefetch.
BACKENDS: dict[str, Callable[[torch.device, int, int, int, int], TransferBackend]] = {"cuda": CudaBackend}
