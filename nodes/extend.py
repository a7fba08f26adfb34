"""Wan Prompt Extend: a short prompt, or a picture alone, written out by a language model."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import comfy.model_management as management
import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.prompt.extension import KEEP, METHODS, ON_FAILURE
from . import host
from .base import WanNode
from .pictures import pictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..wan_core.prompt.extension.extend import PromptExtender
    from ..wan_core.prompt.extension.local_qwen import LocalQwen, Place
    from ..wan_core.prompt.extension.servers import ServerMethod

LANGUAGES = ["auto", "en", "zh"]
FOLDER = "LLM"  # of models/, where other packs look for language models too
SETTINGS = {
    "openai": "OpenAI",
    "dashscope": "DashScope",
}  # the middle of our settings' names in web/extension_settings.js
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_UNKNOWN = object()


class PromptExtend(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCorePromptExtend",
            display_name="Wan Prompt Extend",
            category="Wan 2.2/prompt",
            description="A language model writes a short prompt out as Wan was trained on, or makes one of a picture "
            "alone. Connect the result to the text of CLIP Text Encode. Keys are set in ComfyUI's settings or in the "
            "environment, never here.",
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="The prompt to extend. With an image it may stay empty.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="local_qwen: a model in models/LLM, on this machine. dashscope: Alibaba Cloud. openai: any "
                    "server of that kind, also one of your own.",
                ),
                io.String.Input(
                    "model",
                    default="",
                    tooltip="The language model. Empty: Qwen2.5 as in the official script, qwen-plus (with an image "
                    "qwen-vl-max) for dashscope; openai needs a name.",
                ),
                io.Combo.Input(
                    "language",
                    options=LANGUAGES,
                    default="auto",
                    tooltip="Of the extended prompt. auto: Chinese when the text contains Chinese, else English.",
                ),
                io.Int.Input(  # not called seed: the editor would draw a new one, and so ask again, for every run
                    "variation",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    tooltip="The seed of the language model: another number asks for another version.",
                ),
                io.Combo.Input(
                    "on_failure",
                    options=list(ON_FAILURE),
                    default=KEEP,
                    tooltip="Where no answer comes: go on with the text as it is, and say so; or stop.",
                ),
                io.Int.Input(
                    "timeout",
                    default=120,
                    min=1,
                    max=3600,
                    tooltip="Seconds to wait for the answer, all tries together; of local_qwen without the loading.",
                ),
                io.Image.Input(
                    "image", optional=True, tooltip="The first frame of an image-to-video model; it is sent small."
                ),
                io.Image.Input("end_image", optional=True, tooltip="The last frame, where there is one."),
            ],
            outputs=[io.String.Output(display_name="prompt")],
        )

    @classmethod
    def check_inputs(cls, method: str | None, model: str | None, text: str | None, image: object = _UNKNOWN) -> None:
        if text is not None and not text.strip() and image is _UNKNOWN:
            raise WanError("There is nothing to extend: write a text, connect an image, or both.")
        if method is None or model is None:
            return
        asked = _method(method, model, image is not _UNKNOWN, 1)
        if method in SETTINGS:
            asked.check()
        else:
            _check_local(cast("LocalQwen", asked))

    @classmethod
    def fingerprint_inputs(cls, method: str, model: str, **_: object) -> tuple:
        """A failed question is asked again the next time, and so is one whose server was changed in the settings."""
        if method is None or model is None:
            return ()
        identity = _method(method, model, False, 1).identity
        return (*identity, extender().failures[identity])

    @classmethod
    def execute(
        cls,
        text: str,
        method: str,
        model: str,
        language: str,
        variation: int,
        on_failure: str,
        timeout: int,
        image: torch.Tensor | None = None,
        end_image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        seen = [
            _picture(frames, name)
            for name, frames in (("image", image), ("end_image", end_image))
            if frames is not None
        ]
        asked = _method(method, model, bool(seen), timeout)
        host.show_text(host.current_node(), f"Asking {' '.join(filter(None, (method, model)))} …")
        result = extender().extend(
            asked,
            text,
            pictures=seen,
            language=language,
            seed=variation,
            on_failure=on_failure,
            check=host.check_cancelled,
        )
        if method not in SETTINGS:
            management.soft_empty_cache()
        return io.NodeOutput(result.prompt, ui=host.told("\n\n".join([*result.notes, result.prompt])))


@cache
def extender() -> PromptExtender:
    """The process's one, which owns the last answers."""
    from ..wan_core.prompt.extension.extend import PromptExtender

    return PromptExtender()


def _picture(frames: torch.Tensor, name: str) -> Image:
    """The first of a batch."""
    from PIL import Image as images

    frame = pictures(frames, name)[0].clamp(0, 1).mul(255).round().to(torch.uint8)
    return images.fromarray(frame.cpu().numpy())


# --- servers


def _method(method: str, model: str, seen: bool, seconds: float) -> ServerMethod | LocalQwen:
    if method not in SETTINGS:
        from ..wan_core.prompt.extension.local_qwen import LocalQwen

        return LocalQwen(model.strip(), find_model, place, seen, seconds)
    from ..wan_core.prompt.extension.servers import PROTOCOLS, ServerMethod

    protocol = PROTOCOLS[method]
    return ServerMethod(protocol, protocol.endpoint(_settings(SETTINGS[method]), os.environ), model.strip(), seconds)


def _settings(title: str) -> dict[str, str]:
    """The address and the key of a kind of server in ComfyUI's settings.

    Several users of one ComfyUI have settings each, and a node does not know whose it runs for: they have none here.
    """
    if args.multi_user:
        return {}
    try:
        file = Path(folder_paths.get_user_directory(), "default", "comfy.settings.json")
        saved = json.loads(file.read_text(encoding="utf-8"))
        found = {
            name: saved.get(f"wan_core.PromptExtension.{title}{end}")
            for name, end in (("url", "Address"), ("key", "Key"))
        }
    except (OSError, ValueError, AttributeError):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, str)}


# --- local models


def _check_local(asked: LocalQwen) -> None:
    """Without importing transformers, which takes seconds."""
    if find_spec("transformers") is None:
        asked.check()
    asked.folder()


def find_model(name: str) -> Path | None:
    """A folder in models/LLM, by its own name or that of its model (Qwen/Qwen2.5-7B-Instruct); or one that Hugging
    Face's library has fetched.

    Folders are listed and compared: a name is never made part of a path.
    """
    known = folder_paths.folder_names_and_paths
    if FOLDER not in known:
        folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    own = name.rpartition("/")[2] if _HUB_NAME.fullmatch(name) else name
    for base in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for config in (*base.glob("*/config.json"), *base.glob("*/*/config.json")):
            folder = config.parent
            if folder.name == own or folder.relative_to(base).as_posix() == name:
                return folder
    from ..wan_core.prompt.extension.local_qwen import in_cache

    return in_cache(name)


def place(weights: int) -> Place:
    """Where a language model runs; ComfyUI's models and ours move away for it."""
    from ..wan_core.memory.language_model import place_for

    device = host.device()
    if device.type != "cpu":
        management.free_memory(int(weights * 1.2), device)
    return place_for(weights, device, host.free_bytes(device))
