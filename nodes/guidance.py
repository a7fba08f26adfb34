"""Wan Guidance: what is done with the two prompts beside plain classifier-free guidance."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import Any

from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.recipe import ModelRecipe, check_guidance, told_of_guidance
from ..wan_core.sampling.guidance_rules import (
    RULES,
    Guidance,
    NormalisedAttention,
    Projected,
    Rule,
    SkipLayers,
    ZeroStar,
    blocks_of,
    make,
    settings_of,
)
from ..wan_core.sampling.schedules import AUTO, schedule
from . import host
from .base import WanNode
from .hints import worded
from .types import WanModel

# Rules' settings that have another name among the inputs of all.
_INPUTS = {(NormalisedAttention.name, name): f"nag_{name}" for name in settings_of(NormalisedAttention)}


class GuidanceNode(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreGuidance",
            display_name="Wan Guidance",
            category="Wan 2.2/model",
            description="Changes how the positive and the negative prompt become one direction: better pictures at "
            "high cfg, fewer calls of the model, or a negative prompt at cfg 1. How much is Wan Sampler's cfg. Several "
            "of these nodes in a row combine.",
            inputs=[
                WanModel.Input("model", tooltip="The model, or both experts joined by Wan Expert Switch."),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=ZeroStar.name,
                    tooltip="interval: guidance from one noise level to another only; faster. nag: the negative prompt "
                    "within attention; works at cfg 1. slg: the negative prompt without some blocks. cfg_merge: both "
                    "prompts as one batch. tcfg: damps the negative answer. cfg_zero_star: scales it. apg: takes away "
                    "what over-saturates.",
                ),
                _number(
                    ZeroStar,
                    "zero_steps",
                    "With cfg_zero_star: so many first steps leave the noise as it is, without a call of the model. "
                    "The paper: the first 4 % of the steps.",
                ),
                _number(
                    Projected,
                    "momentum",
                    "With apg: what of the direction of the steps before is kept; negative leads away from it, 0 is "
                    "none.",
                ),
                _number(
                    Projected,
                    "norm_threshold",
                    "With apg: the largest size of the difference of both prompts, over the whole latent; 0 is no "
                    "limit.",
                ),
                _number(Projected, "eta", "With apg: how much is left of what over-saturates; 1 leaves all."),
                _number(
                    SkipLayers,
                    "sigma_start",
                    "With interval and slg: the noise level from which on it acts; 1 is the beginning of a run.",
                ),
                _number(
                    SkipLayers,
                    "sigma_end",
                    "With interval and slg: the noise level down to which it acts; 0 is the end of a run.",
                ),
                io.String.Input(
                    "blocks",
                    default=", ".join(map(str, settings_of(SkipLayers)["blocks"])),
                    tooltip="With slg: the blocks that are left out for the negative prompt, counted from 0, with "
                    "commas between.",
                ),
                _number(NormalisedAttention, "scale", "With nag: how far away from the negative prompt."),
                _number(
                    NormalisedAttention,
                    "tau",
                    "With nag: how much larger than without it what a place hears may become.",
                ),
                _number(NormalisedAttention, "alpha", "With nag: the part of it that is mixed in."),
            ],
            outputs=[WanModel.Output(display_name="model")],
        )

    @classmethod
    def check_inputs(
        cls, rule: str | None, blocks: str | None, sigma_start: float | None, sigma_end: float | None
    ) -> None:
        if rule is not None and None not in (blocks, sigma_start, sigma_end):
            _made(rule, {"blocks": blocks, "sigma_start": sigma_start, "sigma_end": sigma_end})

    @classmethod
    def execute(cls, model: ModelRecipe, rule: str, **settings: Any) -> io.NodeOutput:
        guidance = model.guidance.adding(_made(rule, settings))
        guidance.check_network(model.high.config.layers, own=model.own == model.files)
        changed = replace(model, guidance=guidance)
        return io.NodeOutput(changed, ui=host.told(describe(changed)))


def _number(rule: type[Rule], name: str, tooltip: str) -> io.Input:
    """The input for a setting of a rule, by its range there."""
    one = next(one for one in fields(rule) if one.name == name)
    assert one.default is not MISSING
    ends = {"min": one.metadata["least"], "max": one.metadata["greatest"]}
    input_name = _INPUTS.get((rule.name, name), name)
    if isinstance(one.default, int):
        return io.Int.Input(input_name, default=one.default, tooltip=tooltip, **ends)
    return io.Float.Input(input_name, default=one.default, step=0.05, round=0.001, tooltip=tooltip, **ends)


def _made(rule: str, settings: dict[str, Any]) -> Rule:
    """The rule, with those of the settings that are its own."""
    names = {name: _INPUTS.get((rule, name), name) for name in settings_of(RULES[rule])}
    own = {name: settings[given] for name, given in names.items() if given in settings}
    if "blocks" in own:
        own["blocks"] = blocks_of(own["blocks"])
    return make(rule, own)


def describe(model: ModelRecipe) -> str:
    """What it comes to at the variant's own steps and guidance, for the sampler's are not known here."""
    variant = model.variant
    timetable = schedule(AUTO, variant.steps, variant.shift_for(variant.size))
    try:
        notes = check_guidance(model, timetable, variant.guidance)
    except WanError as error:
        return worded(error)
    return "\n".join([told_of_guidance(model, timetable, variant.guidance), *notes])


# What does the same for ComfyUI's samplers, which do guidance themselves.
_THEIRS = {
    "interval": "none of its own",
    "nag": "none that works here",
    "slg": "none that works here",
    "cfg_merge": "nothing: ComfyUI batches both prompts where they fit",
    "tcfg": "Tangential Damping CFG",
    "cfg_zero_star": "CFGZeroStar",
    "apg": "Adaptive Projected Guidance",
}


def without_effect(guidance: Guidance) -> str:
    """What is said where ComfyUI's samplers do guidance by themselves; empty if there are no rules."""
    if not guidance:
        return ""
    instead = "; ".join(f"for {rule.name}: {_THEIRS[rule.name]}" for rule in guidance.rules)
    return (
        "Wan Guidance has no effect here: ComfyUI's samplers join both prompts by themselves. Its nodes, behind this "
        f"one: {instead}. Or use Wan Sampler."
    )
