"""Official numbers for tooltips: those of wan_core's table of variants, in words."""

from __future__ import annotations

from ..wan_core.config import VARIANTS

T2V, I2V, TI2V = VARIANTS["t2v-A14B"], VARIANTS["i2v-A14B"], VARIANTS["ti2v-5B"]
SMALL, I2V_14B, FLF2V, T2V_14B = (VARIANTS[f"{task}"] for task in ("t2v-1.3B", "i2v-14B", "flf2v-14B", "t2v-14B"))

STEPS = f"{T2V.steps} for A14B and I2V-14B, {TI2V.steps} for all others"
CFG_HIGH = f"T2V {T2V.guidance.high:g}, I2V {I2V.guidance.high:g}"
CFG_LOW = f"T2V {T2V.guidance.low:g}, I2V {I2V.guidance.low:g}, 5B and Wan2.1 {TI2V.guidance.low:g}"
SHIFT = (
    f"T2V-A14B {T2V.shift:g}, I2V-A14B {I2V.shift:g}, TI2V-5B {TI2V.shift:g}; Wan2.1: T2V {T2V_14B.shift:g} "
    f"(1.3B {SMALL.shift:g}), I2V {I2V_14B.shift:g} (480p {I2V_14B.shift_480p:g}), FLF2V {FLF2V.shift:g}"
)
BOUNDARIES = f"{T2V.boundary:g} for T2V, {I2V.boundary:g} for I2V"
LENGTHS = (
    f"{T2V.frames} frames are {T2V.frames // T2V.fps} s at {T2V.fps} fps; for the 5B {TI2V.frames} frames are "
    f"{TI2V.frames // TI2V.fps} s at {TI2V.fps} fps"
)
WIDTH, HEIGHT = SMALL.size  # the smaller of the official sizes
