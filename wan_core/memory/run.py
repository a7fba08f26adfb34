"""Sampling that fits a memory limit, and survives running out of memory: first other models go, then blocks stream."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..config import PerExpert
from ..errors import WanError, is_out_of_memory
from ..recipe import ModelRecipe
from ..sampling.denoise import SILENT, Callbacks, Run, RunState, StepReport, denoise
from .engine import Engine
from .plan import Plan


def denoise_in_memory(
    engine: Engine,
    recipe: ModelRecipe,
    guidance: PerExpert,
    device: torch.device,
    x: Tensor,
    run: Run,
    callbacks: Callbacks = SILENT,
) -> Tensor:
    """``denoise`` with the recipe laid out for the device; out of memory, it goes on with less there.

    Args:
        x: [B,C,T,h,w] at the noise level of ``run.start``.

    Raises:
        WanError: see ``denoise`` and ``plan``; or the device's memory ran out with the smaller plan too.
    """
    prompts = run.prompts(guidance.guided)
    reached = _Reached(RunState(x.to(device), run.start), callbacks)

    def attempt(recipe: ModelRecipe, planned: Plan) -> Tensor:
        if callbacks.on_plan and recipe.own:
            callbacks.on_plan(planned)
        experts = engine.experts(recipe, guidance, device, callbacks)
        try:
            return denoise(reached.state, experts, run, replace(callbacks, on_step=reached)).x
        finally:
            experts.end()

    fitted, planned = engine.fit(recipe, x.shape, device, prompts=prompts)
    tight = False
    while True:
        try:
            return attempt(fitted, planned)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        # Outside the except block, where the error's frames no longer hold tensors.
        steps = reached.state.step - run.start
        ran_out = f"The memory of {device} ran out after {steps} steps. Sampling goes on from there, with "
        if not tight and engine.fit_alone(planned, recipe, x.shape, device, prompts=prompts):
            callbacks.on_note(f"{ran_out}one model at a time on the device.")
            continue
        less = None if tight else engine.fit_less(planned, recipe, x.shape, device, prompts=prompts)
        if less is None:
            engine.release()
            raise WanError(_no_way_out(said))
        (fitted, planned), tight = less, True
        callbacks.on_note(
            f"{ran_out}{planned.swapped} of {planned.layers} blocks streamed (prefetch {planned.prefetch})."
        )


def _no_way_out(said: str) -> str:
    return (
        f"The device's memory ran out, also with fewer weights on it ({said}). Choose a smaller size, fewer frames "
        "or a smaller batch, or close other programs that use the device."
    )


class _Reached:
    """The state after the last finished step, from which a run can go on; passes each report on."""

    def __init__(self, state: RunState, callbacks: Callbacks) -> None:
        self.state, self.on_step = state, callbacks.on_step

    def __call__(self, report: StepReport) -> None:
        if self.on_step:
            self.on_step(report)
        self.state = report.state
