"""Names and defaults of number formats."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import WanError
from .quant.registry import MADE_ON_LOAD
from .quant.scaled import Scaled

NAMES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip

# AMD's RDNA2 and older, by the beginning of their architecture's name; the capability that they report says nothing.
_WITHOUT_BF16 = ("gfx101", "gfx103", "gfx900", "gfx906", "gfx80")


def default_dtype(device: torch.device | str, stored: torch.dtype | None = None) -> torch.dtype:
    """bfloat16 where the device is fast in it, else float32.

    A CPU counts as fast only with bf16 instructions (AMX or AVX512-BF16): without them its bf16 matrix products
    run many times slower than float32. On a CPU a float32 file (``stored``) also stays float32, because there is no
    device memory to save and rounding it would only lose precision.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if torch.version.hip:
            architecture = torch.cuda.get_device_properties(device).gcnArchName
            return torch.float16 if architecture.startswith(_WITHOUT_BF16) else torch.bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu":
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if fast and stored is not torch.float32 else torch.float32
    return torch.bfloat16 if device.type in ("xpu", "npu") else torch.float32


class Precision(NamedTuple):
    """The two things that a ``dtype`` option names with one word.

    Attributes:
        compute: what is computed in; None: the default of the device and the file.
        weights: what matrices are packed into while they are loaded; None: they stay as the file has them.
    """

    compute: torch.dtype | None = None
    weights: Scaled | None = None

    def on(self, device: torch.device | str, stored: torch.dtype | None = None) -> torch.dtype:
        """The dtype of the computation on a device, for a file of this dtype."""
        return self.compute or default_dtype(device, stored)


def precision_of(dtype: torch.dtype | str | None) -> Precision:
    """From a name or a dtype; None and "auto" choose neither, the name of a quantised format chooses the weights'.

    Raises:
        WanError: an unknown name.
    """
    if dtype is None or dtype == "auto":
        return Precision()
    if isinstance(dtype, torch.dtype):
        return Precision(compute=dtype)
    if dtype in MADE_ON_LOAD:
        return Precision(weights=MADE_ON_LOAD[dtype])
    if dtype not in NAMES:
        expected = ", ".join(("auto", *NAMES, *MADE_ON_LOAD))
        raise WanError(f"Unknown dtype {dtype!r}: expected one of {expected}.")
    return Precision(compute=NAMES[dtype])


def resolve_dtype(
    dtype: torch.dtype | str | None, device: torch.device | str, stored: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of the computation by an option; see ``precision_of`` and ``Precision.on``."""
    return precision_of(dtype).on(device, stored)
