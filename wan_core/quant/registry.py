"""The quantised formats by name."""

from __future__ import annotations

import torch

from .fp8 import FP8
from .int8 import Int8
from .scaled import Scaled

# What ``dtype`` may say besides a floating-point format: the matrices are packed so while they are loaded, with a
# scale for each output channel, and computed with in the device's default dtype.
MADE_ON_LOAD: dict[str, Scaled] = {
    "fp8_e4m3fn": FP8(torch.float8_e4m3fn),
    "int8": Int8(),
}
