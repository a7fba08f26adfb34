"""Wan Step Cache: which steps are extrapolated instead of computed."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.loading.step_caches import step_cache
from ..wan_core.recipe import ModelRecipe, working
from ..wan_core.sampling.schedules import AUTO, schedule
from ..wan_core.sampling.step_cache import POLICIES, StepCache
from ..wan_core.sampling.teacache import POLYNOMIALS
from . import host
from .base import WanNode
from .hints import worded
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
                    "magnitude: by the model's curves, measured or published; the speed-up is known before. teacache: "
                    "by a published polynomial; known before too. every: one step in so many.",
                ),
                io.Float.Input(
                    "threshold",
                    default=_EASY.usual,
                    min=_EASY.least,
                    max=_EASY.greatest,
                    step=0.005,
                    round=0.001,
                    tooltip="With easy, magnitude and teacache: how much change may add up before a step is computed. "
                    "easy: 0.05 to 0.2; magnitude: 0.02 to 0.12; teacache: 0.05 to 0.1 (1.3B), 0.1 to 0.2 (14B), 0.2 "
                    "to 0.3 (I2V). More is faster and less exact.",
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
                io.Combo.Input(
                    "tea_model",
                    options=[AUTO, *POLYNOMIALS],
                    default=AUTO,
                    optional=True,
                    tooltip="With teacache: whose polynomial. auto: the model's own; of I2V-14B the 480P one where the "
                    "file's name says 480.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model: ModelRecipe,
        policy: str,
        threshold: float,
        every: int,
        dense: float,
        most: int,
        tea_model: str = AUTO,
    ) -> io.NodeOutput:
        cache = step_cache(
            policy,
            model.variant,
            model.high,
            model.low,
            amount=every if policy == "every" else threshold,
            dense=dense,
            most=most,
            tea_model=None if tea_model == AUTO else tea_model,
        )
        return io.NodeOutput(replace(model, step_cache=cache), ui=host.told(describe(model, cache)))


def describe(model: ModelRecipe, cache: StepCache) -> str:
    """What it brings at the variant's own steps, for the sampler's are not known here."""
    variant = model.variant
    timetable = schedule(AUTO, variant.steps, variant.shift_for(variant.size))
    experts = working(model, timetable)
    try:
        cache.check(timetable, "unipc", experts)
    except WanError as error:
        return worded(error)
    said = cache.forecast(timetable, experts, 0, timetable.steps)
    return f"{said} That is for the official steps at shift {timetable.shift:g}; Wan Sampler says it for its own."
