"""Nodes that return a changed copy of a recipe."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..wan_core.recipe import ModelRecipe
from .types import WanModel


class BlockSwap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreBlockSwap",
            display_name="Wan Block Swap",
            category="Wan 2.2/model",
            description="Keeps the weights of some transformer blocks off the device and brings each over when its "
            "turn comes. Saves that much device memory, costs time at every step, and does not change the result.",
            inputs=[
                WanModel.Input("model", tooltip="The model, or both experts joined by Wan Expert Switch."),
                io.Int.Input(
                    "blocks", default=20, min=0, max=100,
                    tooltip="How many blocks stay off the device: A14B has 40 of about 0.7 GB each (bfloat16), the 5B "
                    "has 30 of about 0.3 GB. More than the model has means all; 0 turns this off.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelRecipe, blocks: int) -> io.NodeOutput:
        return io.NodeOutput(replace(model, swap_blocks=min(blocks, model.high.config.layers)))
