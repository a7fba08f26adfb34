"""Noise levels of a run: the sigmas that the solver walks down and the timesteps that the model is told.

Every grid that Wan is sampled on is kept under its own name, because they differ in the first and last steps. All
place their steps evenly, then shift them towards noise: ``shift * s / (1 + (shift - 1) * s)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..config import TRAIN_STEPS
from ..errors import WanError
from ..lookup import look_up

AUTO = "auto"
MOST_STEPS = 10_000
Levels = TypeVar("Levels", np.ndarray, Tensor)
_ONE = 0.9999  # ComfyUI's KSampler takes any denoise above this for the whole way


@dataclass(frozen=True, eq=False)
class Schedule:
    """One run's noise levels.

    Attributes:
        sigmas: float64 [N+1], strictly falling, values that float32 holds exactly (every reference solves in float32).
            They end in 0 unless a user's own sigmas stop earlier.
        timesteps: float64 [N], what the model is told, 0 (clean) to 1000 (noise).
        shift: None when the sigmas came from elsewhere.
        scaled: whether a whole run begins with noise times the first sigma; the official code begins with noise.
    """

    name: str
    sigmas: Tensor
    timesteps: Tensor
    shift: float | None = None
    scaled: bool = False

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def first(self, noise: Tensor) -> Tensor:
        """The sample that a run from pure noise begins with."""
        return noise * self.sigmas[0].item() if self.scaled else noise


def schedule(name: str, steps: int, shift: float, *, solver: str = "unipc", denoise: float = 1.0) -> Schedule:
    """A schedule by name; "auto" is the official grid of the solver.

    Raises:
        WanError: an unknown name, fewer than one step, a shift of 0 or less, denoise outside (0, 1].
    """
    if name == AUTO:
        name = "dpm++" if solver == "dpm++" else "unipc"
    made = look_up(SCHEDULES, name, "schedule")(steps, shift)
    return truncate(made, denoise)


def truncate(whole: Schedule, denoise: float) -> Schedule:
    """The last part of a finer schedule, with as many steps, for starting from a half-noised latent.

    As ComfyUI's KSampler counts: ``int(steps / denoise)`` steps are laid out, the last ``steps`` are walked.

    Raises:
        WanError: denoise outside (0, 1], or below 1 with sigmas of the user's own.
    """
    if not 0 < denoise <= 1:
        raise WanError(f"denoise is {denoise}: expected more than 0 and at most 1 (1 starts from pure noise).")
    if denoise > _ONE:
        return whole
    if whole.shift is None:
        raise WanError(
            f"denoise is {denoise}, but the sigmas are given: cut the sigmas instead (SplitSigmasDenoise) "
            "and leave denoise at 1."
        )
    if whole.name in FIXED:
        raise WanError(
            f"denoise is {denoise}, but {whole.name} is a list of steps that a model was trained for: leave denoise at "
            "1, or use the schedule simple."
        )
    finer = SCHEDULES[whole.name](int(whole.steps / denoise), whole.shift)
    return Schedule(whole.name, finer.sigmas[-whole.steps - 1 :], finer.timesteps[-whole.steps :], whole.shift)


def from_sigmas(sigmas: Tensor | Sequence[float]) -> Schedule:
    """A schedule from noise levels made elsewhere (ComfyUI's SIGMAS); the model is told sigma * 1000.

    Raises:
        WanError: fewer than two values, values outside 0..1, or not strictly falling.
    """
    levels = torch.as_tensor(sigmas, dtype=torch.float32, device="cpu").reshape(-1)
    return _checked("sigmas", levels.double(), _float_timesteps(levels[:-1]), None)


def official_unipc(steps: int, shift: float) -> Schedule:
    """The grid of the official ``FlowUniPCMultistepScheduler``: from 0.999 (rounded to float32) down, then shifted."""
    _check(steps, shift)
    highest = float(np.float32(1 - 1 / TRAIN_STEPS))
    return _integer_schedule("unipc", _shifted(np.linspace(highest, 0, steps + 1)[:-1], shift), shift)


def official_dpm(steps: int, shift: float) -> Schedule:
    """The grid of the official ``get_sampling_sigmas`` for DPM++: from exactly 1 down, then shifted."""
    _check(steps, shift)
    return _integer_schedule("dpm++", _shifted(np.linspace(1, 0, steps + 1)[:-1], shift), shift)


def diffusers(steps: int, shift: float) -> Schedule:
    """The grid of diffusers' ``UniPCMultistepScheduler`` with flow sigmas: from 1 towards 1/1000, then shifted.

    A first sigma of 1 is lowered by 1e-6, where diffusers avoids log(0).
    """
    _check(steps, shift)
    sigmas = _shifted(np.linspace(1, 1 / TRAIN_STEPS, steps + 1)[:-1], shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6
    return _integer_schedule("diffusers", sigmas, shift)


def simple(steps: int, shift: float) -> Schedule:
    """ComfyUI's "simple" scheduler after ModelSamplingSD3: every (1000/steps)th of a thousand shifted levels.

    Computed in float32 and in ComfyUI's order, so that the values are ComfyUI's to the last bit; its timesteps are not
    rounded to integers.
    """
    _check(steps, shift)
    levels = _thousand(shift)
    stride = TRAIN_STEPS / steps
    picked = torch.stack([levels[-1 - int(i * stride)] for i in range(steps)])
    return _checked("simple", _with_zero(picked.double()), _float_timesteps(picked), shift)


def _listed(name: str, of: Sequence[int], *, warp: bool) -> Callable[[int, float], Schedule]:
    """Timesteps that a model was distilled at, 1000 to 1.

    Args:
        warp: they count the places of a thousand levels before the shift, and the model is told the level that is
            there. Otherwise the model is told the numbers themselves, and the solver goes by the nearest level.
    """

    def made(steps: int, shift: float) -> Schedule:
        _check(steps, shift)
        _check_count(name, steps, len(of))
        levels = _thousand(shift)
        if warp:
            picked = torch.stack([levels[timestep - 1] for timestep in of])
            told = _float_timesteps(picked)
        else:
            told = torch.tensor(of, dtype=torch.float64)
            picked = torch.stack([levels[(levels * TRAIN_STEPS - timestep).abs().argmin()] for timestep in of])
        return _checked(name, _with_zero(picked.double()), told, shift)

    return made


_RCM_ANGLES = (1.5, 1.4, 1.0)  # after the first, in radians: sigma = sin / (cos + sin)


def _rcm(name: str, highest: float) -> Callable[[int, float], Schedule]:
    """The grid of rCM (arXiv 2510.08431) and TurboDiffusion; ``highest`` is noise over data at the first step.

    A run begins with noise times the first sigma. There is no shift.
    """

    def made(steps: int, shift: float) -> Schedule:
        _check(steps, shift)
        most = len(_RCM_ANGLES) + 1
        if steps > most:
            raise WanError(f"{name} has 1 to {most} steps, found {steps}.")
        angles = torch.tensor([math.atan(highest), *_RCM_ANGLES[: steps - 1]], dtype=torch.float64)
        sigmas = (angles.sin() / (angles.cos() + angles.sin())).float()
        made = _checked(name, _with_zero(sigmas.double()), _float_timesteps(sigmas.double()), shift)
        return replace(made, scaled=True)

    return made


# The steps of distilled models: which ones belongs to their training. Self-Forcing (arXiv 2506.08009), FastWan
# (FastVideo), CausVid (arXiv 2412.07772), rCM.
FIXED: dict[str, Callable[[int, float], Schedule]] = {
    "self-forcing": _listed("self-forcing", (1000, 750, 500, 250), warp=True),
    "fastwan": _listed("fastwan", (1000, 757, 522), warp=False),
    "causvid": _listed("causvid", (999, 934, 862, 756, 603, 410, 250, 140, 74), warp=False),
    "rcm-80": _rcm("rcm-80", 80),
    "rcm-200": _rcm("rcm-200", 200),
    "rcm-1600": _rcm("rcm-1600", 1600),
}

SCHEDULES: dict[str, Callable[[int, float], Schedule]] = {
    "unipc": official_unipc,
    "dpm++": official_dpm,
    "simple": simple,
    "diffusers": diffusers,
    **FIXED,
}


def _thousand(shift: float) -> Tensor:
    """A thousand shifted levels, rising to 1, float32: computed as ComfyUI does."""
    even = (torch.arange(1, TRAIN_STEPS + 1) / TRAIN_STEPS) * TRAIN_STEPS / TRAIN_STEPS
    return even if shift == 1 else _shifted(even, shift)


def _shifted(sigmas: Levels, shift: float) -> Levels:
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _integer_schedule(name: str, sigmas: np.ndarray, shift: float) -> Schedule:
    """The model is told whole timesteps, cut off from float64; the solver keeps the sigma, rounded to float32."""
    timesteps = torch.from_numpy(sigmas * TRAIN_STEPS).to(torch.int64).double()
    solved = torch.from_numpy(sigmas).float().double()
    return _checked(name, _with_zero(solved), timesteps, shift)


def _float_timesteps(sigmas: Tensor) -> Tensor:
    return (sigmas * TRAIN_STEPS).double()


def _with_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check(steps: int, shift: float) -> None:
    if not 1 <= steps <= MOST_STEPS:
        raise WanError(f"{steps} steps: at least 1 is needed, and at most {MOST_STEPS} make sense.")
    if not 0 < shift < float("inf"):
        raise WanError(f"shift is {shift}: expected a number above 0 (Wan uses 3 to 12; 1 shifts nothing).")


def _check_count(name: str, found: int, expected: int) -> None:
    if found != expected:
        raise WanError(f"{name} is a list of {expected} steps, found {found}: set the steps to {expected}.")


def _checked(name: str, sigmas: Tensor, timesteps: Tensor, shift: float | None) -> Schedule:
    if len(sigmas) < 2:
        raise WanError(f"A schedule of {len(sigmas)} sigmas has no step: at least two are needed.")
    if not (torch.isfinite(sigmas).all() and sigmas.min() >= 0 and sigmas.max() <= 1):
        raise WanError(
            f"Sigmas from {sigmas.max().item():g} to {sigmas.min().item():g}: Wan is a flow model and "
            "expects them within 0..1. Use a scheduler that was given the Wan model."
        )
    falls = sigmas.diff() < 0
    if not falls.all():
        place = int((~falls).nonzero()[0])
        raise WanError(
            f"Sigmas must fall at every step, but number {place + 1} is {sigmas[place + 1].item():g} after "
            f"{sigmas[place].item():g}: use fewer steps, or other sigmas."
        )
    return Schedule(name, sigmas, timesteps, shift)
