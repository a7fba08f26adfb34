"""Single passes over tokens where eager PyTorch takes many: Triton kernels, for CUDA devices that have Triton.

Each function below works in place or fills what it is given, and answers whether it did: ``False`` means that the
caller does it in plain PyTorch. What a kernel computes is what its plain twin computes, up to how float32 sums round.
A kernel that fails to compile or to start is told of once and not tried again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps

import torch
from torch import Tensor

log = logging.getLogger(__name__)

OFF = "WAN_CORE_KERNELS"  # the environment variable; "off" leaves everything to PyTorch
_HALF = (torch.bfloat16, torch.float16)
_broken: set[str] = set()  # kernels that failed once
_assumed: ContextVar[bool] = ContextVar("kernels of the meta device", default=False)


@lru_cache(maxsize=16)
def available(device: torch.device) -> bool:
    """Whether kernels can run here: CUDA from compute capability 8.0 (bfloat16), with Triton."""
    if device.type != "cuda" or os.environ.get(OFF, "").lower() in ("off", "0", "false"):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and importlib.util.find_spec("triton") is not None


def suits(x: Tensor) -> bool:
    """Whether kernels take over a tensor's work: half precision without gradients, on a device that can."""
    here = _assumed.get() if x.is_meta else available(x.device)
    return here and x.dtype in _HALF and not torch.is_grad_enabled()


@contextmanager
def assumed(there: bool) -> Iterator[None]:
    """Meanwhile the meta device is one that has kernels, or one that has none; they do nothing there.

    For traces of memory: a kernel that works in place takes none.
    """
    token = _assumed.set(there)
    try:
        yield
    finally:
        _assumed.reset(token)


def _guarded(launch: Callable[..., None]) -> Callable[..., bool]:
    """Only what ``suits``; whatever goes wrong in it is said once."""

    @wraps(launch)
    def run(x: Tensor, *args, **kwargs) -> bool:
        if launch.__name__ in _broken or not suits(x):
            return False
        if x.is_meta:
            return True
        try:
            launch(x, *args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, its cache, its C compiler, the driver
            _broken.add(launch.__name__)
            reason = (str(error).splitlines() or [""])[0]
            log.warning(
                "wan_core: the kernel %s cannot be used (%s: %s); PyTorch's own operations are, and take longer",
                launch.__name__,
                type(error).__name__,
                reason,
            )
            return False
        return True

    return run


@_guarded
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """Layer norm of x [L, dim] with weight and bias [dim], float32, into out [L, dim], which may be x."""
    from . import rows

    rows.layer_norm(x, weight, bias, eps, out)


@_guarded
def rms_norm_(x: Tensor, weight: Tensor, eps: float, table: Tensor | None = None) -> None:
    """RMS norm of x [L, dim] in place; then, with a table [L, pairs, 2] of cosines and sines, the rotation of each
    head's pairs. The norm is rounded to x's dtype before it is rotated.
    """
    from . import rows

    rows.rms_norm_(x, weight, eps, table)


@_guarded
def add_gated_(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """``x += y * gate`` for x and y [L, dim], gate [dim] float32; rounded once."""
    from . import rows

    rows.add_gated_(x, y, gate)


@_guarded
def quantise_rows(x: Tensor, packed: Tensor, scale: Tensor, largest: float) -> None:
    """x [L, columns] -> packed [L, columns], fp8 or int8, and scale [L, 1] float32: each row by its largest value."""
    from . import rows

    rows.quantise_rows(x, packed, scale, largest)


@_guarded
def rescale(out: Tensor, product: Tensor, of_row: Tensor, of_column: Tensor, bias: Tensor | None) -> None:
    """``product * of_row * of_column + bias`` for product [L, columns] of any dtype, into out [L, columns]."""
    from . import rows

    rows.rescale(out, product, of_row, of_column, bias)
