"""Attention backends: one function each, its constraints declared beside it.

Every backend takes queries, keys and values [B, L, heads, head_dim], and what the keys are ("self", "text" or "image"),
and returns [B, L_q, heads, head_dim]. To add one, decorate a function here; menus and error messages read the registry.

What cross-attention hears is short: 512 keys gain nothing from another kernel, and quantised ones have made NaNs of a
picture's. It is always PyTorch's own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
import torch.nn.functional as F

from ...errors import WanError
from .order import Order, morton

Attend = Callable[..., torch.Tensor]  # (q, k, v, *, kind)
KIND = Literal["self", "text", "image"]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Backend:
    """A way to compute attention, and where it can be used.

    Attributes:
        package: the module that must be importable, and ``needs`` a name in it.
        install: what to do when it is not.
        devices, dtypes: None: any.
        runs_on: whether a CUDA device of this compute capability will do; ``cards`` says in words which do.
        whole: it prepares all keys and values at each call, so that queries must not come a part at a time.
        dense_blocks, dense_steps: how many of a model's first blocks, and which part of a run's first steps, PyTorch's
            own attention does.
        order: in which order it wants the tokens of a grid, see ``order.py``; None for frame by frame, row by row.
    """

    name: str
    run: Attend
    package: str | None = None
    needs: str | None = None
    install: str = ""
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    runs_on: Callable[[Capability], bool] = lambda capability: True
    cards: str = "any card"
    whole: bool = False
    dense_blocks: int = 0
    dense_steps: float = 0.0
    order: Order | None = None

    @property
    def installed(self) -> bool:
        return self.package is None or _importable(self.package, self.needs)

    def fits(self, device: torch.device, dtype: torch.dtype) -> bool:
        if self.devices is not None and device.type not in self.devices:
            return False
        if self.dtypes is not None and dtype not in self.dtypes:
            return False
        return device.type != "cuda" or self.runs_on(torch.cuda.get_device_capability(device))


@lru_cache(maxsize=32)
def _importable(package: str, name: str | None) -> bool:
    """Whether a module is there; with a name, whether it can be imported and has it."""
    try:
        if importlib.util.find_spec(package) is None:
            return False
        return name is None or hasattr(import_module(package), name)
    except Exception:  # a parent that is missing, or a build for another CUDA or another torch
        return False


BACKENDS: dict[str, Backend] = {}
DENSE_BLOCKS, ORDER = "dense_blocks", "order"  # attributes of a way to attend, as of its ``Backend``
WHOLE = "whole"  # the attribute by which a model knows that it must not ask for a part at a time
_HALF = (torch.float16, torch.bfloat16)


def backend(name: str, **constraints) -> Callable[[Attend], Attend]:
    """Register a way to compute self-attention."""

    def register(run: Attend) -> Attend:
        @wraps(run)
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
            return run(q, k, v) if kind == "self" else sdpa(q, k, v)

        setattr(attend, WHOLE, constraints.get("whole", False))
        setattr(attend, DENSE_BLOCKS, constraints.get("dense_blocks", 0))
        setattr(attend, ORDER, constraints.get("order"))
        BACKENDS[name] = Backend(name, attend, **constraints)
        return attend

    return register


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: KIND = "self") -> torch.Tensor:
    """PyTorch's own scaled_dot_product_attention, which picks the kernel: on Hopper cuDNN's, elsewhere flash."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


BACKENDS["sdpa"] = Backend("sdpa", sdpa)


def _sage_version() -> int:
    try:
        return int(version("sageattention").partition(".")[0])
    except (PackageNotFoundError, ValueError):
        return 1


def _sage_runs_on(capability: Capability) -> bool:
    """Version 1 is written in Triton; the kernels of version 2 are built for some cards, and refuse all others."""
    known = {(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)}
    return capability in known if _sage_version() >= 2 else capability >= (8, 0)


@backend(
    "sage",
    package="sageattention",
    install="pip install sageattention gives version 1, for Triton; 2.2, which is faster, is built from its repository",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=_sage_runs_on,
    cards="Ampere, Ada, Hopper or a GeForce Blackwell",
    whole=True,
)
def _sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention: quantised QK, in version 2 PV too (arXiv 2410.02367, 2411.10958)."""
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD")


@backend(
    "sage3",
    package="sageattn3",
    install="build sageattention3_blackwell of the SageAttention repository",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=lambda capability: capability >= (10, 0),
    cards="Blackwell",
    whole=True,
)
def _sage3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SageAttention 3: four-bit numbers (arXiv 2505.11594). Less exact than version 2."""
    from sageattn3 import sageattn3_blackwell

    return sageattn3_blackwell(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


@backend(
    "kitchen",
    package="comfy_kitchen",
    needs="int8_attention",
    install="pip install -U comfy-kitchen (0.2.40 or newer; newer versions of ComfyUI bring it)",
    devices=("cuda",),
    runs_on=lambda capability: capability >= (7, 5),
    cards="Turing or newer",
    whole=True,
)
def _kitchen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """comfy-kitchen's int8 attention, with queries and keys rotated before they are rounded."""
    from comfy_kitchen import int8_attention

    return int8_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@backend(
    "flash2",
    package="flash_attn",
    needs="flash_attn_func",
    install="pip install flash-attn",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=lambda capability: capability >= (8, 0),
    cards="Ampere or newer",
)
def _flash2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention 2 (arXiv 2307.08691)."""
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


@backend(
    "flash3",
    package="flash_attn_interface",
    needs="flash_attn_func",
    install="build the `hopper` folder of the flash-attention repository",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=lambda capability: capability == (9, 0),
    cards="Hopper",
)
def _flash3(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention 3 (arXiv 2407.08608)."""
    from flash_attn_interface import flash_attn_func

    return _first(flash_attn_func(q, k, v))


@backend(
    "flash4",
    package="flash_attn.cute",
    needs="flash_attn_func",
    install="pip install --pre flash-attn-4",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=lambda capability: capability >= (9, 0),
    cards="Hopper or Blackwell",
)
def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """FlashAttention 4, compiled as it is first used."""
    from flash_attn.cute import flash_attn_func

    return _first(flash_attn_func(q, k, v))


SOL_TOKENS = 12_288  # below these the dense kernels are as fast
SOL_HEAD = 128  # numbers in a head
SOL_TAU = 1.0  # higher is faster and further off: standard deviations above which a block of keys is heard exactly


@backend(
    "sol",
    package="comfy_kitchen",
    needs="sol_attn",
    install="pip install -U comfy-kitchen (0.2.40 or newer; newer versions of ComfyUI bring it)",
    devices=("cuda",),
    dtypes=_HALF,
    runs_on=lambda capability: capability >= (8, 0),
    cards="Ampere or newer",
    whole=True,
    dense_blocks=1,
    dense_steps=0.2,
    order=morton,
)
def _sol(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """comfy-kitchen's Sol-Attn (arXiv 2607.24027): 64 tokens together hear some blocks of keys exactly, and of all
    others a summary. The first steps, the first block of the model and short videos are dense."""
    from comfy_kitchen import sol_attn

    if q.shape[1] < SOL_TOKENS or q.shape[-1] != SOL_HEAD:
        return sdpa(q, k, v)
    return sol_attn(q, k, v, tau=SOL_TAU)


def _first(answer: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Some versions also answer the sums of their exponentials."""
    return answer[0] if isinstance(answer, tuple) else answer


def find_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The backend of this name, checked: "auto" is SDPA.

    Raises:
        WanError: unknown, not installed (with what to install), or not for this device or dtype.
    """
    if name == "auto":
        return BACKENDS["sdpa"]
    if name not in BACKENDS:
        raise WanError(f"Unknown attention backend {name!r}: expected one of auto, {', '.join(BACKENDS)}.")
    found, device = BACKENDS[name], torch.device(device)
    if not found.installed:
        raise WanError(f"Attention backend {name!r} is not installed: {found.install}. Or choose sdpa.")
    if not found.fits(device, dtype):
        raise WanError(
            f"Attention backend {name!r} does not run with {dtype} on {_described(device)}: it needs "
            f"{' or '.join(found.devices or ('any device',))} ({found.cards}) and "
            f"{' or '.join(map(str, found.dtypes or ('any dtype',)))}. Choose sdpa."
        )
    return found


def _described(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} (compute capability {major}.{minor})"


def takes_whole(name: str) -> bool:
    """Whether a backend of this name is asked once for all queries: its answer then stands beside them."""
    return name in BACKENDS and BACKENDS[name].whole
