"""The device that is measured: its clock, its memory, and numbers of one kind for all contenders."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from ..peers import random_weights


@dataclass
class Card:
    device: torch.device
    quick: bool = False

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.is_cuda else torch.float32

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)

    def weights(self, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Random ones for a module on the meta device."""
        with torch.device(self.device):
            return {key: value.to(dtype) for key, value in random_weights(module).items()}

    def clear(self) -> None:
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], object], rounds: int = 5, warm: int = 1) -> float:
        """Median over rounds, by the device's own clock."""
        return next(iter(self.interleaved({"": call}, rounds, warm).values()))

    def interleaved(self, calls: Mapping[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, float]:
        """Medians of calls that take turns."""
        for call in calls.values():
            for _ in range(warm):
                call()
        samples: dict[str, list[float]] = {name: [] for name in calls}
        names = list(calls)
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(self._timed(calls[name]))
        return {name: median(found) for name, found in samples.items()}

    def _timed(self, call: Callable[[], object]) -> float:
        if not self.is_cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def peak_gb(self, call: Callable[[], object]) -> float | None:
        """Device memory of a call at its worst moment above what there was before it, in GB."""
        if not self.is_cuda:
            return None
        self.clear()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 1e9


def relative(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance in the norm, of the norm."""
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
