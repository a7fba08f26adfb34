"""Names and defaults of number formats."""

from __future__ import annotations

import torch

from .errors import WanError
from .quant.registry import MADE_ON_LOAD

NAMES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip


def default_dtype(device: torch.device | str, stored: torch.dtype | None = None) -> torch.dtype:
    """bfloat16 where the device is fast in it, else float32.

    A CPU counts as fast only with bf16 instructions (AMX or AVX512-BF16): without them its bf16 matrix products
    run many times slower than float32. On a CPU a float32 file (``stored``) also stays float32, because there is no
    device memory to save and rounding it would only lose precision.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast and stored is not torch.float32 else torch.float32
    return torch.bfloat16 if device.type in ("xpu", "npu") else torch.float32


def resolve_dtype(
    dtype: torch.dtype | str | None, device: torch.device | str, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of the computation.

    From a name or a dtype; None, "auto" and the names of quantised formats mean the default of the device and the
    file's dtype.

    Raises:
        WanError: an unknown name.
    """
    if dtype is None or dtype == "auto" or dtype in MADE_ON_LOAD:
        return default_dtype(device, stored)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in NAMES:
        expected = ", ".join(("auto", *NAMES, *MADE_ON_LOAD))
        raise WanError(f"Unknown dtype {dtype!r}: expected one of {expected}.")
    return NAMES[dtype]
