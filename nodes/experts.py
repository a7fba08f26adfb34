"""Wan Expert Switch: two models become one."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..wan_core.recipe import ModelRecipe, pair
from ..wan_core.sampling.experts import MODES, Switch
from . import host, official
from .base import WanNode
from .types import WanModel

log = logging.getLogger(__name__)


class ExpertSwitch(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreExpertSwitch",
            display_name="Wan Expert Switch",
            category="Wan 2.2/model",
            description="Joins the high-noise and the low-noise expert of an A14B model. One sampler then runs both, "
            "and hands over at the right step without losing the solver's history. Only one need be in memory.",
            inputs=[
                WanModel.Input("high", tooltip="The high-noise expert, which does the first steps."),
                WanModel.Input("low", tooltip="The low-noise expert, which does the remaining steps."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="What decides the hand-over. auto: the official boundary of the model "
                    f"({official.BOUNDARIES}); timestep: a fraction of the 1000 timesteps; step: a step number; snr: a "
                    "signal-to-noise ratio.",
                ),
                io.Float.Input(
                    "boundary",
                    default=official.T2V.boundary,
                    min=0.0,
                    max=10000.0,
                    step=0.001,
                    round=0.001,
                    tooltip="Ignored in auto. timestep: the low-noise expert works below this fraction (0 to 1); step: "
                    "from this step on, counted from 0; snr: from this ratio on.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )

    @classmethod
    def check_inputs(cls, mode: str | None, boundary: float | None) -> None:
        if mode is not None and boundary is not None:  # None: comes from a link
            _switch(mode, boundary)

    @classmethod
    def execute(cls, high: ModelRecipe, low: ModelRecipe, mode: str, boundary: float) -> io.NodeOutput:
        model = pair(high, low, _switch(mode, boundary))
        for note in model.notes:
            log.log(logging.WARNING if note.startswith("Warning") else logging.INFO, "Wan Expert Switch: %s", note)
        return io.NodeOutput(model, ui=host.told("\n".join(model.notes)))


def _switch(mode: str, boundary: float) -> Switch:
    return Switch(mode) if mode == "auto" else Switch(mode, boundary)
