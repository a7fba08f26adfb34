"""The loop from noise to a latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import WanError
from ..lookup import look_up
from .experts import Experts
from .guidance import Condition, OnBlock, guided
from .schedules import Schedule
from .solvers import SOLVERS, History


@dataclass(frozen=True, eq=False)
class KnownLatent:
    """Parts of the video that are known.

    The model sees them at the noise level of the step (or clean), and its clean estimate is replaced by them there, so
    that the flow leads to them; a mask between 0 and 1 blends. This is how ComfyUI's samplers read a noise_mask.

    Attributes:
        latent: [B,C,T,h,w] clean and normalised.
        mask: five dimensions that broadcast to the latent; 1 = denoise, 0 = keep, between = a blend.
        noise: what kept places are noised with; the noise that the run started from. Not used when ``clean``.
        clean: True for TI2V, which was trained on clean frames beside noisy ones: kept places stay clean throughout,
            and the model is told of each latent frame the timestep times the part of it that is noisy, hence 0 for one
            wholly kept.
    """

    latent: Tensor
    mask: Tensor
    noise: Tensor | None = None
    clean: bool = False

    def __post_init__(self):
        if not self.clean and self.noise is None:
            raise ValueError("kept places need noise unless they are clean")

    def put_back(self, x: Tensor) -> Tensor:
        """x with the wholly kept places exactly as given."""
        return torch.where(self.mask == 0, self.latent, x)

    def seen(self, x: Tensor, sigma: float) -> Tensor:
        """x as the model must see it at a noise level."""
        known = self.latent if self.clean else noised(self.latent, self.noise, sigma)
        return (1 - self.mask) * known + self.mask * x

    def flow(self, v: Tensor, x: Tensor, seen: Tensor, sigma: float) -> Tensor:
        """The velocity at the solver's x that leads to the blend of the model's clean estimate and the known latent.

        Equal to v, to the last bit, where all is denoised.
        """
        return self.mask * (v + (x - seen) / sigma) + (1 - self.mask) * (x - self.latent) / sigma

    def frame_timesteps(self, t: Tensor) -> Tensor:
        """[B] -> [B,T] for a clean model, else t as it is; on the CPU."""
        return t[:, None] * self._noisy.to(t) if self.clean else t

    @cached_property
    def _noisy(self) -> Tensor:
        """The part of each latent frame that is denoised, [B,T]: the device is waited for once, not at each step."""
        one_channel = self.latent[:, :1].shape
        return self.mask.mean(dim=1, keepdim=True).expand(one_channel).mean(dim=(1, 3, 4)).cpu()

    def to(self, device: torch.device) -> KnownLatent:
        noise = None if self.noise is None else self.noise.to(device, torch.float32)
        latent, mask = (part.to(device, torch.float32) for part in (self.latent, self.mask))
        return KnownLatent(latent, mask, noise, self.clean)


@dataclass(frozen=True, eq=False)
class StepReport:
    """A step that has just been done.

    Attributes:
        index: the step in the schedule, from 0.
        done: steps done in this run, of ``total``.
        sigma: the noise level that is left in ``x``.
        expert: "high", "low" or "only".
        x: the sample after the step.
        x0: the clean estimate that the step was made with.
        history: the solver's; with x it is all that is needed to go on from here.
    """

    index: int
    done: int
    total: int
    sigma: float
    expert: str
    x: Tensor
    x0: Tensor
    history: History


def noised(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A clean latent at a noise level: where a video-to-video run starts."""
    return sigma * noise + (1 - sigma) * latent


@torch.no_grad()
def denoise(
    x: Tensor,
    experts: Experts,
    schedule: Schedule,
    solver: str,
    positive: Condition,
    negative: Condition | None,
    *,
    given: KnownLatent | None = None,
    start: int = 0,
    end: int | None = None,
    history: History | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_block: OnBlock | None = None,
) -> tuple[Tensor, History]:
    """Walk x down the schedule.

    Args:
        x: [B,C,T,h,w] at the noise level of ``start``: pure noise for a full run, `noised` for video-to-video, what an
            earlier run returned to go on with it.
        start, end: the steps to do, ``end`` excluded; an end past the last step means the last.
        history: what an earlier run returned. Without it a later start begins at order 1.
        on_step, on_block: called after each step, and by the model at each block; both may raise to cancel.

    Returns:
        x at the noise level of ``end`` (float32), and the solver's history.

    Raises:
        WanError: an unknown solver, a start past the end, a history of another step, or values that are not finite.
    """
    step = look_up(SOLVERS, solver, "solver")
    end = schedule.steps if end is None else min(end, schedule.steps)
    x = _checked_finite(x.float())
    history = (history or History()).to(x.device)
    _check_range(start, end, schedule, history)
    given = given.to(x.device) if given else None
    velocity = _Velocity(experts, schedule, positive, negative, given, on_block)

    if given and given.clean:
        x = given.put_back(x)
    for i in range(start, end):
        experts.announce(i, schedule)
        x, history = step(x, i, schedule, velocity, history)
        sigma = schedule.sigmas[i + 1].item()
        if given and (given.clean or sigma == 0):
            x = given.put_back(x)
        if on_step:
            expert = experts.at(i, schedule).name
            on_step(StepReport(i, i + 1 - start, end - start, sigma, expert, x, velocity.x0, history))
    return x, history


class _Velocity:
    """What a solver calls: the guided model at a step, with the given parts in place. Keeps its last clean estimate."""

    def __init__(
        self,
        experts: Experts,
        schedule: Schedule,
        positive: Condition,
        negative: Condition | None,
        given: KnownLatent | None,
        on_block: OnBlock | None,
    ):
        self.experts, self.schedule = experts, schedule
        self.positive, self.negative = positive, negative
        self.given, self.on_block = given, on_block
        self.x0: Tensor | None = None

    def __call__(self, x: Tensor, i: int) -> Tensor:
        sigma = self.schedule.sigmas[i].item()
        t = torch.full((x.shape[0],), self.schedule.timesteps[i].item())  # on the CPU, where models compare them
        if self.given is None:
            v = self._guided(x, t, i)
        else:
            seen = self.given.seen(x, sigma)
            v = self.given.flow(self._guided(seen, self.given.frame_timesteps(t), i), x, seen, sigma)
        self.x0 = x - sigma * v
        return v

    def _guided(self, x: Tensor, t: Tensor, i: int) -> Tensor:
        expert = self.experts.at(i, self.schedule)
        expert.begin(i)
        v = guided(expert.model, x, t, self.positive, self.negative, expert.guidance, self.on_block)
        if not torch.isfinite(v).all():
            raise WanError(_not_finite(i, self.schedule, expert.name))
        return v


def _not_finite(i: int, schedule: Schedule, expert: str) -> str:
    who = "the model" if expert == "only" else f"the {expert}-noise expert"
    return (
        f"Step {i + 1} of {schedule.steps}: {who} answered with NaN or infinity at timestep "
        f"{schedule.timesteps[i].item():g}. Load it in bfloat16 or float32 instead of float16, choose the "
        "attention 'sdpa', lower the LoRA strengths, and check that the file is complete."
    )


def _checked_finite(x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise WanError("The latent to start from holds NaN or infinity: check the node that made it.")
    return x


def _check_range(start: int, end: int, schedule: Schedule, history: History) -> None:
    if not 0 <= start < schedule.steps:
        raise WanError(
            f"The start step is {start}, but the schedule has {schedule.steps} steps: "
            f"expected 0 to {schedule.steps - 1}."
        )
    if end <= start:
        raise WanError(f"The end step {end} is not after the start step {start}: nothing would be done.")
    if history.step not in (None, start):
        raise WanError(
            f"The saved run goes on at step {history.step}, but the start step is {start}: "
            f"start at {history.step}, or without its history."
        )
