"""Whether what models answered are numbers, asked of the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..staging import pinned
from .experts import Expert


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a model: enough to make it once more.

    Attributes:
        step: of the schedule.
        finite: a bool on the device: whether all of the answer is.
    """

    expert: Expert
    x: Tensor
    t: Tensor
    step: int
    finite: Tensor


class Verdict:
    """Of some calls, which was the first whose answer is not finite.

    On CUDA it is known once the device has come so far; elsewhere from the beginning.
    """

    def __init__(self, calls: Sequence[Call]):
        self._calls = tuple(calls)
        self._reached: Any = None  # an event, where the device works by itself
        self._finite = torch.ones(0, dtype=torch.bool)
        if not calls:
            return
        flags = torch.stack([call.finite for call in calls])
        if flags.device.type != "cuda":
            self._finite = flags.cpu()
            return
        self._finite = pinned(len(calls)).view(torch.bool)
        self._finite.copy_(flags, non_blocking=True)
        self._reached = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._reached.record(torch.cuda.current_stream(flags.device))

    def is_known(self) -> bool:
        """Whether nobody needs to wait for it."""
        return self._reached is None or bool(self._reached.query())

    def failed(self) -> Call | None:
        """The first call whose answer is not finite; waits for the device to come so far."""
        if self._reached:
            self._reached.synchronize()
        return next((call for call, finite in zip(self._calls, self._finite.tolist(), strict=True) if not finite), None)
