"""Sampling that fits a memory limit, and survives running out of memory: first other models go, then blocks stream."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..config import PerExpert
from ..errors import WanError
from ..recipe import ModelRecipe
from ..sampling.denoise import KnownLatent, StepReport, denoise
from ..sampling.guidance import Condition, OnBlock
from ..sampling.schedules import Schedule
from ..sampling.solvers import History
from .engine import Engine
from .plan import Plan

log = logging.getLogger(__name__)

OnStep = Callable[[StepReport], None]


def denoise_in_memory(
    engine: Engine,
    recipe: ModelRecipe,
    guidance: PerExpert,
    device: torch.device,
    x: Tensor,
    schedule: Schedule,
    solver: str,
    positive: Condition,
    negative: Condition | None,
    *,
    given: KnownLatent | None = None,
    start: int = 0,
    end: int | None = None,
    on_step: OnStep | None = None,
    on_block: OnBlock | None = None,
    on_plan: Callable[[Plan], None] | None = None,
    on_note: Callable[[str], None] = log.warning,
) -> Tensor:
    """``denoise`` with the recipe laid out for the device; out of memory, it goes on with less there.

    Args:
        on_plan: called with each plan before its weights are loaded.
        on_note: called with what the user should know.

    Raises:
        WanError: see ``denoise`` and ``plan``; or the device's memory ran out with the smaller plan too.
    """
    guided = (guidance.low, guidance.high) != (1, 1)
    done = _Done(x.to(device), start, on_step)

    def run(recipe: ModelRecipe, planned: Plan) -> Tensor:
        if on_plan and recipe.own:
            on_plan(planned)
        experts = engine.experts(recipe, guidance, device)
        return denoise(
            done.x,
            experts,
            schedule,
            solver,
            positive,
            negative,
            given=given,
            start=done.next,
            end=end,
            history=done.history,
            on_step=done,
            on_block=on_block,
        )[0]

    fitted, planned = engine.fit(recipe, x.shape, device, guided=guided)
    tight = False
    while True:
        try:
            return run(fitted, planned)
        except torch.OutOfMemoryError as error:
            said = str(error).partition("\n")[0]
        # Outside the except block, where the error's frames no longer hold tensors.
        ran_out = f"The memory of {device} ran out after {done.next - start} steps. Sampling goes on from there, with "
        if not tight and engine.fit_alone(planned, recipe, x.shape, device, guided=guided):
            on_note(f"{ran_out}one model at a time on the device.")
            continue
        less = None if tight else engine.fit_less(planned, recipe, x.shape, device, guided=guided)
        if less is None:
            engine.release()
            raise WanError(_no_way_out(said))
        (fitted, planned), tight = less, True
        on_note(f"{ran_out}{planned.swapped} of {planned.layers} blocks streamed (prefetch {planned.prefetch}).")


def _no_way_out(said: str) -> str:
    return (
        f"The device's memory ran out, also with fewer weights on it ({said}). Choose a smaller size, fewer frames "
        "or a smaller batch, or close other programs that use the device."
    )


class _Done:
    """Where a run is, so that it can go on from its last finished step; passes each report on."""

    def __init__(self, x: Tensor, start: int, on_step: OnStep | None):
        self.x, self.next = x, start
        self.history: History | None = None
        self.start, self.on_step = start, on_step

    def __call__(self, report: StepReport) -> None:
        before = report.index + 1 - self.start - report.done  # steps done before this attempt began
        if self.on_step:
            self.on_step(replace(report, done=report.done + before, total=report.total + before))
        self.x, self.next, self.history = report.x, report.index + 1, report.history
