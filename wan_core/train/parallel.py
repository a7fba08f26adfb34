"""Several devices: each process trains on batches of its own, and gradients are averaged.

``torchrun`` and ``accelerate launch`` start the processes, and tell each of them about the others in the same
environment variables; torch.distributed does the rest. All processes see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from ..errors import WanError

_PATIENCE = timedelta(hours=4)  # a process may encode a long clip, or draw samples, while the others wait
_BUCKET = 2**24  # numbers that are sent at once


@dataclass(frozen=True)
class Processes:
    """This process among those that were started; alone without any."""

    rank: int
    count: int
    device: torch.device | None  # this process's own; None: the caller's choice

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def current(cls, wanted: torch.device | str | None = None) -> Processes:
        """The first call waits until all processes have come.

        Args:
            wanted: a CPU keeps the processes off the GPUs.

        Raises:
            WanError: more processes than GPUs on this machine.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls(0, 1, None)
        if not distributed.is_initialized():
            _join(_device_of(int(os.environ.get("LOCAL_RANK", 0)), torch.device(wanted or "cuda")))
        return cls(distributed.get_rank(), distributed.get_world_size(), _home())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Afterwards every process holds the same gradients, to the last bit."""
        if self.count == 1:
            return
        for bucket in _buckets(parameter.grad for parameter in parameters if parameter.grad is not None):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            parts = flat.div_(self.count).split([gradient.numel() for gradient in bucket])
            for gradient, mean in zip(bucket, parts, strict=True):
                gradient.copy_(mean.view_as(gradient))

    def mean(self, value: float) -> float:
        return value if self.count == 1 else self._sum(value) / self.count

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process: what all must do together, all must decide together."""
        return flag if self.count == 1 else self._sum(float(flag)) > 0

    def wait(self) -> None:
        """Go on when all have come here."""
        self.any(False)

    @staticmethod
    def leave() -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return total.item()


def _device_of(place: int, wanted: torch.device) -> torch.device:
    cpu = wanted.type == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if place >= torch.cuda.device_count():
        raise WanError(
            f"Process {place + 1} of this machine has no GPU: there are {torch.cuda.device_count()}. Start "
            "as many processes as there are GPUs."
        )
    return torch.device("cuda", place)


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)


def _home() -> torch.device:
    """The device of the group that this process has joined."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in lists of one dtype and a limited size: one message each, and little memory beside them."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        full = sum(held.numel() for held in bucket) + gradient.numel() > _BUCKET
        if bucket and (full or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
