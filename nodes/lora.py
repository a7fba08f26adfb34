"""Wan LoRA: one more LoRA, or a pair of them, on a model."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io

from ..wan_core.config import PerExpert
from ..wan_core.errors import WanError
from ..wan_core.files.checkpoint import open_checkpoint
from ..wan_core.lora.attach import AUTO, with_lora
from ..wan_core.lora.expert_pairs import find_twin
from ..wan_core.lora.scale import config_beside
from ..wan_core.recipe import ModelRecipe
from . import host
from .base import WanNode
from .types import WanModel

log = logging.getLogger(__name__)

FOLDER = "loras"
NONE = "none"
_LAST = 10000


class Lora(WanNode):
    files = ("lora_name", "low_name")

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = host.model_names(FOLDER)
        return io.Schema(
            node_id="WanCoreLora",
            display_name="Wan LoRA",
            category="Wan 2.2/model",
            description="Adds a LoRA to a Wan model, to both experts of a pair at once: files for high and low noise "
            "are found by their names. Chain several. The model's files and what is loaded of them stay as they are.",
            inputs=[
                WanModel.Input("model", tooltip="The model, or both experts joined by Wan Expert Switch."),
                io.Combo.Input(
                    "lora_name",
                    options=names,
                    tooltip="A LoRA for Wan2.2, or for Wan2.1 14B, in ComfyUI's loras folder. Of a pair either file.",
                ),
                io.Float.Input(
                    "strength_high",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="On the high-noise expert, and on a model that is only one. 0 turns it off there and costs "
                    "nothing.",
                ),
                io.Float.Input(
                    "strength_low",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="On the low-noise expert. 0 turns it off there and costs nothing.",
                ),
                io.Combo.Input(
                    "low_name",
                    options=[AUTO, NONE, *names],
                    default=AUTO,
                    tooltip="The file for the low-noise expert. auto: the twin of lora_name, found by name or by what "
                    "Wan Train LoRA wrote into it; without a twin a file that names no noise level goes on both "
                    "experts. none: only the high-noise expert gets lora_name. A file: it, and lora_name on high.",
                ),
                io.Int.Input(
                    "first_step",
                    default=0,
                    min=0,
                    max=_LAST,
                    tooltip="The first step with this LoRA, counted from 0. A 4-step LoRA left out of the first steps "
                    "gives more movement.",
                ),
                io.Int.Input("last_step", default=_LAST, min=0, max=_LAST, tooltip="The last step with this LoRA."),
                io.Boolean.Input(
                    "merge",
                    default=False,
                    optional=True,
                    tooltip="Merge it into the weights once, where they are not quantised and not swapped: steps are a "
                    "few per cent faster, changing a strength takes longer, and on a CPU it needs memory for the "
                    "weights.",
                ),
            ],
            outputs=[WanModel.Output(display_name="model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def check_inputs(
        cls, lora_name: str | None, low_name: str | None, first_step: int | None, last_step: int | None
    ) -> None:
        for name in (lora_name, low_name):
            if name is not None and name not in (AUTO, NONE):
                host.read_header(open_checkpoint, FOLDER, name)
        if first_step is not None and last_step is not None and last_step < first_step:
            raise WanError(f"The LoRA's last step, {last_step}, lies before its first step, {first_step}.")

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, low_name: str, **_: object) -> tuple:
        named = tuple(_fingerprint(name) for name in (lora_name, low_name) if name not in (AUTO, NONE))
        return (*named, _fingerprint_of_twin(lora_name)) if low_name == AUTO else named

    @classmethod
    def execute(
        cls,
        model: ModelRecipe,
        lora_name: str,
        strength_high: float,
        strength_low: float,
        low_name: str,
        first_step: int,
        last_step: int,
        merge: bool = False,
    ) -> io.NodeOutput:
        changed, report = with_lora(
            model,
            host.model_path(FOLDER, lora_name),
            PerExpert(low=strength_low, high=strength_high),
            low=_low(low_name),
            first_step=first_step,
            last_step=None if last_step == _LAST else last_step,
            merge=merge,
        )
        log.info("Wan LoRA: %s", report.replace("\n", "; "))
        return io.NodeOutput(changed, ui=host.told(report))


def _fingerprint(name: str) -> tuple:
    """Changes also with PEFT's settings beside the file, which hold its scale."""
    own = host.fingerprint(FOLDER, name)
    try:
        settings = config_beside(host.model_path(FOLDER, name))
        return (own, host.stamp(settings)) if settings else (own,)
    except (WanError, OSError):
        return (own,)


def _fingerprint_of_twin(name: str) -> tuple:
    """Changes also when a twin comes or goes."""
    try:
        twin = find_twin(host.model_path(FOLDER, name))
        return host.stamp(twin) if twin else ()
    except (WanError, OSError) as error:
        return (str(error),)


def _low(name: str) -> Path | str | None:
    if name == AUTO:
        return AUTO
    return None if name == NONE else host.model_path(FOLDER, name)
