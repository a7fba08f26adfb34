"""TeaCache (Liu et al. 2024, arXiv 2411.19108): how far a model's answer is expected to have moved between two steps.

A polynomial turns the relative change of what a timestep is embedded as into the change of the answer. That embedding
sees neither the sample nor the prompt: which steps are left out follows from the timesteps and the model's weights.
Where frames have timesteps of their own, those of the frames that are denoised count. The polynomials were fitted by
TeaCache's authors to the Wan2.1 models, and by LightX2V to TI2V-5B; of models with two experts none is published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..config import Variant
from ..lookup import look_up

Signal = Literal["modulation", "time"]
Embed = Callable[[Tensor], Tensor]  # timesteps [N] -> what a model makes of them [N, D], float32


@dataclass(frozen=True)
class Polynomial:
    """
    Attributes:
        coefficients: highest power first.
        signal: what is compared: the six modulations of the blocks, or the embedding that they are made from.
        usual: the thresholds that were published, for more quality and for more speed.
        task: the model it was fitted to.
    """

    coefficients: tuple[float, ...]
    signal: Signal
    usual: tuple[float, float]
    task: str

    def __call__(self, change: float) -> float:
        total = 0.0
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total


# By the names that the command lines of DiffSynth-Studio and this one take.
POLYNOMIALS: dict[str, Polynomial] = {
    "Wan2.1-T2V-1.3B": Polynomial(
        (-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2), "modulation", (0.05, 0.1),
        "t2v-1.3B",
    ),
    "Wan2.1-T2V-14B": Polynomial(
        (-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1), "modulation", (0.1, 0.2), "t2v-14B"
    ),
    "Wan2.1-I2V-14B-480P": Polynomial(
        (2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1), "modulation", (0.2, 0.3), "i2v-14B"
    ),
    "Wan2.1-I2V-14B-720P": Polynomial(
        (8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2), "modulation", (0.2, 0.3), "i2v-14B"
    ),
    "Wan2.2-TI2V-5B": Polynomial(
        (1.57472669e5, -1.15702395e5, 3.10761669e4, -3.83116651e3, 2.21608777e2, -4.81179567), "time", (0.1, 0.2),
        "ti2v-5B",
    ),
}  # fmt: skip


def polynomial(name: str) -> Polynomial:
    """
    Raises:
        WanError: no such model.
    """
    return look_up(POLYNOMIALS, name, "TeaCache model")


def name_for(variant: Variant, file: str) -> str | None:
    """Which polynomial a model goes by: its own, the 480p or the 720p one by its file's name; None where none is
    published.
    """
    if variant.task == "i2v-14B":
        return "Wan2.1-I2V-14B-480P" if "480" in file else "Wan2.1-I2V-14B-720P"
    task = "t2v-14B" if variant.task == "t2i-14B" else variant.task  # the same network
    return next((name for name, one in POLYNOMIALS.items() if one.task == task), None)


def growths(rule: Polynomial, embedded: Tensor) -> list[float]:
    """The expected change of the answer at each step since the one before; 0 at the first.

    Args:
        embedded: [N, D] of the steps' timesteps.
    """
    found = [0.0]
    for before, now in zip(embedded, embedded[1:], strict=False):
        change = (now - before).abs().mean() / before.abs().mean()
        found.append(rule(change.item()))
    return found
