"""Attention backends: one function each, its constraints declared beside it.

Every backend takes queries, keys and values [B, L, heads, head_dim], and what the keys are ("self", "text" or "image"),
and returns [B, L_q, heads, head_dim]. To add one, decorate a function here; menus and error messages read the registry.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ...errors import WanError

Attend = Callable[..., torch.Tensor]  # (q, k, v, *, kind)
KIND = Literal["self", "text", "image"]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and where it can be used."""

    name: str
    run: Attend
    package: str | None  # the module that must be importable
    install: str  # what to do when it is not
    devices: tuple[str, ...] | None = None  # None: any
    dtypes: tuple[torch.dtype, ...] | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        on_device = self.devices is None or device.type in self.devices
        return on_device and (self.dtypes is None or dtype in self.dtypes)


BACKENDS: dict[str, Backend] = {}
_HALF = (torch.float16, torch.bfloat16)


def backend(name: str, *, package: str | None = None, install: str = "", **constraints) -> Callable[[Attend], Attend]:
    def register(run: Attend) -> Attend:
        BACKENDS[name] = Backend(name, run, package, install, **constraints)
        return run

    return register


@backend("sdpa")
def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
    """PyTorch's own scaled_dot_product_attention, which picks a flash kernel where there is one."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@backend("sage", package="sageattention", install="pip install sageattention", devices=("cuda",), dtypes=_HALF)
def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
    """SageAttention: quantised QK (arXiv 2410.02367)."""
    if kind != "self":  # 512 keys gain nothing from it, and it has made NaNs of the image's
        return sdpa(q, k, v)
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


@backend("flash2", package="flash_attn", install="pip install flash-attn", devices=("cuda",), dtypes=_HALF)
def flash2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
    """FlashAttention 2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


@backend(
    "flash3",
    package="flash_attn_interface",
    devices=("cuda",),
    dtypes=_HALF,
    install="build the `hopper` folder of the flash-attention repository (Hopper cards only)",
)
def flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
    """FlashAttention 3 (arXiv 2407.08608)."""
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out


def find_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend of this name, checked: "auto" is SDPA.

    Raises:
        WanError: unknown, not installed (with what to install), or not for this device or dtype.
    """
    if name == "auto":
        return BACKENDS["sdpa"]
    if name not in BACKENDS:
        raise WanError(f"Unknown attention backend {name!r}: expected one of auto, {', '.join(BACKENDS)}.")
    found = BACKENDS[name]
    if not found.installed:
        raise WanError(f"Attention backend {name!r} is not installed: {found.install}. Or choose sdpa.")
    if not found.fits(torch.device(device), dtype):
        raise WanError(
            f"Attention backend {name!r} does not run with {dtype} on {device}: it needs "
            f"{' or '.join(found.devices or ('any device',))} and "
            f"{' or '.join(map(str, found.dtypes or ('any dtype',)))}. Choose sdpa."
        )
    return found
