"""Wan Aesthetic Prompt: words that Wan was trained to understand, chosen from menus or the palette."""

from __future__ import annotations

from comfy_api.latest import io

from ..wan_core.prompt.compose import LANGUAGES, NONE, PLACEMENTS, choices_for, compose
from ..wan_core.prompt.palette import parse_palette
from ..wan_core.prompt.vocabulary import GROUPS, Group
from .base import WanNode


class AestheticPrompt(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreAestheticPrompt",
            display_name="Wan Aesthetic Prompt",
            category="Wan 2.2/prompt",
            description="Adds terms of light, lens, composition, movement and style to a prompt, in the wording of "
            "Wan's own examples. Connect the result to the text of CLIP Text Encode.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt. A term that it contains already is not said twice.",
                ),
                *(_menu(group) for group in GROUPS.values()),
                io.Combo.Input(
                    "language",
                    options=list(LANGUAGES),
                    default="auto",
                    tooltip="Language of the terms. auto: Chinese when the text contains Chinese, else English.",
                ),
                io.Combo.Input(
                    "placement",
                    options=list(PLACEMENTS),
                    default="before",
                    tooltip="Where the terms go: before the text, as in Wan's examples, or after it.",
                ),
                io.String.Input(
                    "palette",
                    optional=True,
                    default="",
                    tooltip="Further terms, separated by commas, in either language: golden hour, rim light, low "
                    "angle shot. The editor writes them here as chips.",
                ),
            ],
            outputs=[io.String.Output(display_name="prompt")],
        )

    @classmethod
    def check_inputs(cls, palette: str | None = None) -> None:
        parse_palette(palette or "")

    @classmethod
    def execute(
        cls, text: str, language: str, placement: str, palette: str | None = None, **choices: str
    ) -> io.NodeOutput:
        return io.NodeOutput(compose(text, choices, language, placement, palette or ""))


def _menu(group: Group) -> io.Input:
    return io.Combo.Input(
        group.id,
        options=choices_for(group.id),
        default=NONE,
        display_name=group.id.replace("_", " "),
        tooltip=f"{group.en} ({group.zh}). none adds nothing.",
    )
