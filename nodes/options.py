"""Nodes that return a changed copy of a recipe."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..wan_core.errors import Hint, WanError
from ..wan_core.external import only_own
from ..wan_core.media import geometry as latents
from ..wan_core.memory.plan import AUTO, plan
from ..wan_core.recipe import PREFETCH, ModelRecipe
from . import host
from .base import WanNode
from .hints import worded
from .types import WanModel

BLOCKS, LIMIT = "blocks", "vram_limit"


class BlockSwap(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreBlockSwap",
            display_name="Wan Block Swap",
            category="Wan 2.2/model",
            description="Streams the weights of some transformer blocks from their file through the device while "
            "others compute. Saves that much device memory, does not change the result, and shows what a run needs.",
            inputs=[
                WanModel.Input("model", tooltip="The model, or both experts joined by Wan Expert Switch."),
                io.Int.Input(
                    "blocks",
                    default=20,
                    min=0,
                    max=100,
                    tooltip="With mode blocks: how many blocks stay off the device: A14B has 40 of about 0.7 GB each "
                    "(bfloat16), the 5B has 30 of about 0.3 GB. More than the model has means all; 0 turns this off.",
                ),
                io.Combo.Input(
                    "mode",
                    options=[BLOCKS, LIMIT, AUTO],
                    default=BLOCKS,
                    optional=True,
                    tooltip="blocks: as many as you say. vram_limit: as few as fit into so many GB. auto: as few as "
                    "fit into what is free when sampling begins, less 1 GB.",
                ),
                io.Float.Input(
                    "vram_limit",
                    default=8.0,
                    min=0.1,
                    max=1000.0,
                    step=0.1,
                    round=0.01,
                    optional=True,
                    tooltip="With mode vram_limit: GB of device memory that sampling may take. Too little is refused, "
                    "with the smallest that works.",
                ),
                io.Int.Input(
                    "prefetch",
                    default=PREFETCH,
                    min=0,
                    max=8,
                    optional=True,
                    tooltip="How many blocks are on the device before their turn. 1 hides the copy behind the "
                    "computation; more evens out a slow disk and takes a block's memory each; 0 is the smallest and "
                    "slowest.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model: ModelRecipe, blocks: int, mode: str = BLOCKS, vram_limit: float = 8.0, prefetch: int = PREFETCH
    ) -> io.NodeOutput:
        only_own(model.files, "Wan Block Swap", Hint.SWAP_HELD)
        swap = min(blocks, model.high.config.layers) if mode == BLOCKS else 0
        limit = {BLOCKS: None, LIMIT: vram_limit, AUTO: AUTO}[mode]
        changed = replace(model, swap_blocks=swap, vram_limit=limit, prefetch=prefetch)
        return io.NodeOutput(changed, ui=host.told(describe(changed)))


def describe(model: ModelRecipe) -> str:
    """The plan at the variant's own size, for the sampler's is not known here; or why it does not fit."""
    width, height = model.variant.size
    shape = (1, *latents.latent_shape(model.variant, width, height, model.variant.frames))
    at = f"{width}x{height}, {model.variant.frames} frames:"
    device = host.device()
    try:
        return f"{at}\n{plan(model, shape, device, free=host.free_bytes(device) + host.engine().bytes_on(device))}"
    except WanError as error:
        return f"{at}\n{worded(error)}"
