"""Time and memory, measured so that a busy machine disturbs all contenders alike."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

TIME_METHOD = (
    "All contenders live in one process, share the tensors of one state dict, and take turns: A B C, B C A, C A B, … "
    "A ratio is the median over rounds of (ours / peer) within the round. Wall time decides; the ratio of CPU time (all"
    " threads of the process) stands beside it, because other load on the machine disturbs it less."
)
MEMORY_METHOD = (
    "A process for each contender and part: weights loaded, a warm-up at the smallest size, freed memory given back to "
    "the system, then one call at full size. Growth of resident memory from just before the call to the call's "
    "high-water mark, as the kernel counts it (VmHWM, reset through /proc/self/clear_refs). What was there before is "
    "not counted, what a contender keeps for later calls is. glibc's mmap threshold is held at its initial 128 KiB "
    "(MALLOC_MMAP_THRESHOLD_), so that freed buffers leave the process: otherwise the heap's fragmentation, which "
    "differs from run to run by a factor of two, is measured too."
)
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}


@dataclass(frozen=True)
class Seconds:
    """One call: by the clock on the wall, and of CPU time in all threads."""

    wall: float
    cpu: float


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
    """Every call once a round; the order rotates, so that nobody always runs in another's hot or cold caches."""
    names = list(calls)
    samples: dict[str, list[Seconds]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(_timed(calls[name]))
    return samples


def _timed(call: Callable[[], object]) -> Seconds:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def can_measure_memory() -> bool:
    """Only Linux tells a process its own high-water mark and lets it reset it."""
    return _STATUS.exists() and _CLEAR.exists()


def peak_growth(call: Callable[[], object]) -> int:
    """Bytes of resident memory that a call needs at its worst moment, above what there was before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _status("VmRSS")
    kept_alive = call()
    growth = _status("VmHWM") - before
    del kept_alive
    return growth


def _status(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024
