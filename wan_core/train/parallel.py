"""Several devices: each process trains on batches of its own, gradients are averaged (through accelerate)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import WanError


@dataclass(frozen=True, eq=False)
class Processes:
    """This process among those that ``accelerate launch`` (or torchrun) started; alone without them."""

    rank: int
    count: int
    device: torch.device | None  # this process's own; None: the caller's choice

    @property
    def first(self) -> bool:
        return self.rank == 0

    @classmethod
    def current(cls) -> Processes:
        """
        Raises:
            WanError: several processes, but accelerate is not installed.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return cls(0, 1, None)
        if importlib.util.find_spec("accelerate") is None:
            raise WanError("Training was started in several processes, which needs accelerate: pip install accelerate.")
        from accelerate import PartialState

        state = PartialState()
        return cls(state.process_index, state.num_processes, state.device)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = reduce(parameter.grad, "mean")
