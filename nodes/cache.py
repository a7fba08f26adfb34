"""Wan Step Cache: which steps are extrapolated instead of computed."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.recipe import ModelRecipe, working
from ..wan_core.sampling.magnitudes import curves_of
from ..wan_core.sampling.schedules import AUTO, schedule
from ..wan_core.sampling.step_cache import POLICIES, StepCache
from . import host
from .base import WanNode
from .types import WanModel

_EASY = POLICIES["easy"]


class StepCacheNode(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreStepCache",
            display_name="Wan Step Cache",
            category="Wan 2.2/model",
            description="Leaves the model out at some steps and extrapolates what it would have said. Faster, with a "
            "slightly different video. For runs of many steps: with a 4-step LoRA there is nothing to leave out.",
            inputs=[
                WanModel.Input("model", tooltip="The model, or both experts joined by Wan Expert Switch."),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default="easy",
                    tooltip="easy: decides as the run goes, by how much the sample changes; for every model. "
                    "magnitude: by published curves of the model; the speed-up is known before. every: one step in so "
                    "many.",
                ),
                io.Float.Input(
                    "threshold",
                    default=_EASY.usual,
                    min=_EASY.least,
                    max=_EASY.greatest,
                    step=0.005,
                    round=0.001,
                    tooltip="With easy and magnitude: how much change may add up before a step is computed. easy: 0.05 "
                    "to 0.2; magnitude: 0.02 to 0.12. More is faster and less exact.",
                ),
                io.Int.Input("every", default=2, min=2, max=4, tooltip="With every: one step of so many is computed."),
                io.Float.Input(
                    "dense",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    round=0.01,
                    tooltip="The part of each expert's steps, from its first, that is always computed. They decide "
                    "what the video shows.",
                ),
                io.Int.Input("most", default=2, min=1, max=10, tooltip="How many steps in a row may be left out."),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls, model: ModelRecipe, policy: str, threshold: float, every: int, dense: float, most: int
    ) -> io.NodeOutput:
        amount = every if policy == "every" else threshold
        cache = StepCache(policy, amount, dense, most, curves_of(model.variant.task))
        return io.NodeOutput(replace(model, step_cache=cache), ui=host.told(describe(model, cache)))


def describe(model: ModelRecipe, cache: StepCache) -> str:
    """What it brings at the variant's own steps, for the sampler's are not known here."""
    variant = model.variant
    plan = schedule(AUTO, variant.steps, variant.shift_for(variant.size))
    experts = working(model, plan)
    try:
        cache.check(plan, "unipc", experts)
    except WanError as error:
        return str(error)
    computed = cache.predicted(plan, experts, 0, plan.steps)
    if computed is None:
        return f"{variant.steps} steps: decided as the run goes; Wan Sampler says how many were computed."
    return f"{variant.steps} steps: {computed} are computed, {plan.steps / computed:.2f} times as fast."
