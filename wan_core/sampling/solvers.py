"""Solvers of the flow's equation dx/dsigma = v, from noise (sigma 1) to data (sigma 0).

Each is one function: it sees the sample x, the schedule and ``velocity(x, i)``, the model's answer at step i, and
returns the sample at step i + 1. What it remembers between steps is a `History`. Tensors stay float32; coefficients
are computed in float64 from the schedule's sigmas.

With v = noise - data the clean estimate is x0 = x - sigma * v; alpha = 1 - sigma, lambda = log(alpha / sigma).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedules import Schedule

Velocity = Callable[[Tensor, int], Tensor]
Fresh = Callable[[int], Tensor]  # a step -> noise of the sample's shape, always the same for a step of a run


@dataclass(frozen=True)
class History:
    """What a solver remembers of the steps before.

    Attributes:
        order: of the step before, which the corrector of UniPC repeats.
        x0s: clean estimates of the latest steps, newest last.
        x: the sample that the step before started from, where the solver asks for it.
    """

    order: int = 0
    x0s: tuple[Tensor, ...] = field(default=())
    x: Tensor | None = None

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, ready for a safetensors file."""
        saved = {f"x0.{i}": x0.contiguous() for i, x0 in enumerate(self.x0s)}
        saved["order"] = torch.tensor(self.order)
        if self.x is not None:
            saved["x"] = self.x.contiguous()
        return saved

    @classmethod
    def from_tensors(cls, saved: Mapping[str, Tensor]) -> History:
        count = sum(name.startswith("x0.") for name in saved)
        return cls(int(saved["order"]), tuple(saved[f"x0.{i}"] for i in range(count)), saved.get("x"))

    def to(self, device: torch.device) -> History:
        x = None if self.x is None else self.x.to(device)
        return History(self.order, tuple(x0.to(device) for x0 in self.x0s), x)


Solver = Callable[[Tensor, int, Schedule, Velocity, History], tuple[Tensor, History]]


def unipc(x: Tensor, i: int, schedule: Schedule, velocity: Velocity, history: History) -> tuple[Tensor, History]:
    """UniPC of order 2 with B2(h), predicting x0, corrector on (Zhao et al. 2023, arXiv 2302.04867).

    The model is asked once a step: its answer first corrects the sample that the step before had predicted. The first
    step and the one down to sigma 0 are of order 1, as in the official ``fm_solvers_unipc.py``.
    """
    x0 = x - schedule.sigmas[i].item() * velocity(x, i)
    if history.x0s:
        x = _unipc_corrected(x0, i, schedule, history)
    order = _order(i, schedule, history)
    x0s = (*history.x0s[-1:], x0)
    return _multistep(x, i, schedule, x0s, order), History(order, x0s, x)


def dpm_2m(x: Tensor, i: int, schedule: Schedule, velocity: Velocity, history: History) -> tuple[Tensor, History]:
    """DPM-Solver++(2M), midpoint, predicting x0 (Lu et al. 2022, arXiv 2211.01095).

    The first step and the one down to sigma 0 are of order 1, as in the official ``fm_solvers.py``.
    """
    x0 = x - schedule.sigmas[i].item() * velocity(x, i)
    order = _order(i, schedule, history)
    x0s = (*history.x0s[-1:], x0)
    return _multistep(x, i, schedule, x0s, order), History(order, x0s)


def euler(x: Tensor, i: int, schedule: Schedule, velocity: Velocity, history: History) -> tuple[Tensor, History]:
    """Euler's method, exact for a straight flow (for flow matching: Lipman et al. 2022, arXiv 2210.02747)."""
    sigma, following = _sigmas(schedule, i, i + 1)
    return x + (following - sigma) * velocity(x, i), History(1)


def heun(x: Tensor, i: int, schedule: Schedule, velocity: Velocity, history: History) -> tuple[Tensor, History]:
    """Heun's method of order 2, two model calls a step (Karras et al. 2022, arXiv 2206.00364, algorithm 1).

    The last step is Euler's: there is no timestep beyond it to ask the model at.
    """
    sigma, following = _sigmas(schedule, i, i + 1)
    slope = velocity(x, i)
    predicted = x + (following - sigma) * slope
    if i + 1 == schedule.steps:
        return predicted, History(1)
    slope = (slope + velocity(predicted, i + 1)) / 2
    return x + (following - sigma) * slope, History(2)


def lcm(
    x: Tensor, i: int, schedule: Schedule, velocity: Velocity, history: History, fresh: Fresh | None = None
) -> tuple[Tensor, History]:
    """The clean estimate, noised anew (consistency sampling: Song et al. 2023, arXiv 2303.01469, algorithm 1).

    What models distilled by distribution matching and by rCM were trained with.
    """
    sigma, following = _sigmas(schedule, i, i + 1)
    x0 = x - sigma * velocity(x, i)
    if following == 0:
        return x0, History(1)
    if fresh is None:
        raise ValueError("lcm needs fresh noise")
    return (1 - following) * x0 + following * fresh(i).to(x), History(1)


RENOISES = frozenset({"lcm"})  # solvers that take ``fresh`` noise
SOLVERS: dict[str, Solver] = {"unipc": unipc, "dpm++": dpm_2m, "euler": euler, "heun": heun, "lcm": lcm}


def step_seed(seed: int, step: int) -> int:
    """The seed of a step's fresh noise: a run that goes on in the middle draws what the whole one would have."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _order(i: int, schedule: Schedule, history: History) -> int:
    reaches_zero = schedule.sigmas[i + 1].item() == 0
    return 1 if reaches_zero or not history.x0s else 2


def _multistep(x: Tensor, i: int, schedule: Schedule, x0s: tuple[Tensor, ...], order: int) -> Tensor:
    """The exponential step from sigma[i] to sigma[i+1]: DPM-Solver++ 2M, which is also UniPC's B2 predictor."""
    sigma, target = _sigmas(schedule, i, i + 1)
    lam, lam_target = _lambda(sigma), _lambda(target)
    weight = -(1 - target) * math.expm1(lam - lam_target)
    moved = (target / sigma) * x + weight * x0s[-1]
    if order == 1:
        return moved
    ratio = (_lambda(schedule.sigmas[i - 1].item()) - lam) / (lam_target - lam)
    return moved + (0.5 * weight / ratio) * (x0s[-2] - x0s[-1])


def _unipc_corrected(x0: Tensor, i: int, schedule: Schedule, history: History) -> Tensor:
    """The step from sigma[i-1] to sigma[i] once more, now that x0 at its end is known (UniC)."""
    sigma, target = _sigmas(schedule, i - 1, i)
    lam, lam_target = _lambda(sigma), _lambda(target)
    h = lam_target - lam
    weight = -(1 - target) * math.expm1(-h)
    before = history.x0s[-1]
    assert history.x is not None  # unipc writes it at every step
    moved = (target / sigma) * history.x + weight * before
    if history.order == 1:
        return moved + (0.5 * weight) * (x0 - before)
    ratio = (_lambda(schedule.sigmas[i - 2].item()) - lam) / h
    older, newer = _unic_weights(h, ratio)
    return moved + (older * weight / ratio) * (history.x0s[-2] - before) + (newer * weight) * (x0 - before)


def _unic_weights(h: float, ratio: float) -> tuple[float, float]:
    """rho of UniC-2 with B2(h): the solution of [[1, 1], [ratio, 1]] rho = b, also where ratio is -inf."""
    grown = math.expm1(-h)
    phi_2 = grown / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / grown, 2 * phi_3 / grown
    older = (b_1 - b_2) / (1 - ratio)
    return older, b_1 - older


def _sigmas(schedule: Schedule, *steps: int) -> list[float]:
    return [schedule.sigmas[i].item() for i in steps]


def _lambda(sigma: float) -> float:
    """Half the log of the signal-to-noise ratio; infinite at both ends."""
    if sigma in (0, 1):
        return math.inf if sigma == 0 else -math.inf
    return math.log(1 - sigma) - math.log(sigma)
