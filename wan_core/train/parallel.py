"""Several devices: each process trains on batches of its own, and gradients are averaged.

``torchrun`` and ``accelerate launch`` start the processes, and tell each of them about the others in the same
environment variables; torch.distributed does the rest. All processes see the same files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import WanError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_PATIENCE = timedelta(hours=4)  # a process may encode a long clip, or draw samples, while the others wait

Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


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

    def together(self, loss: Loss, parameters: Iterable[nn.Parameter]) -> Losses:
        """A loss whose gradients are averaged over all processes, by torch's DDP, while they are computed.

        Of a sharded model (``sharded.py``) the gradients are averaged already.
        """
        parameters = list(parameters)
        alone = self.count == 1 or any(map(is_part, parameters))
        return Losses(loss, parameters, alone=alone)

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


def is_part(value: object) -> TypeGuard[DTensor]:
    """Whether a tensor is torch's DTensor, shared out over processes: by its method, as importing it takes long."""
    return hasattr(value, "full_tensor")


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


class Losses:
    """A loss of many batches, each process's own; after the last of a step every process holds the same gradients.

    Args:
        loss: batch number, chance -> the loss, and figures for the log.
        parameters: what is trained. Each process must begin with the same values; one that a batch does not touch
            counts as a gradient of 0 where it touches it in another process.
        alone: whether nobody else must hear of the gradients.
    """

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter], *, alone: bool) -> None:
        self._call: Loss | DistributedDataParallel = loss if alone else _parallel(_Module(loss, parameters))

    def backward(
        self, batch: int, generator: torch.Generator, *, of: int, last: bool
    ) -> tuple[float, dict[str, float]]:
        """Add the gradients of one of a step's ``of`` batches; returns its loss and figures.

        Args:
            last: whether it is the last of the step, with which processes hear of each other.
        """
        call = self._call
        with nullcontext() if last or not isinstance(call, DistributedDataParallel) else call.no_sync():
            loss, figures = call(batch, generator)
            (loss / of).backward()
        return loss.item(), figures


class _Module(nn.Module):
    """A loss as a module, which DDP asks for its parameters; the model itself is not its child, whose frozen weights
    and buffers need no copying."""

    def __init__(self, loss: Loss, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.loss = loss
        self.trained = nn.ParameterList(parameters)

    def forward(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        return self.loss(batch, generator)


def _parallel(module: _Module) -> DistributedDataParallel:
    # Said once where every parameter was used, which is no news.
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
    return DistributedDataParallel(module, find_unused_parameters=True, gradient_as_bucket_view=True)
