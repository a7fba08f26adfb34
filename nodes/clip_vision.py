"""Load Wan CLIP Vision, and the object on its socket that ComfyUI's own nodes call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.loading.clip import ClipFile, read_clip
from ..wan_core.media.geometry import image_tensor
from . import host
from .base import WanNode, guarded_methods
from .pictures import pictures

FOLDER = "clip_vision"


class LoadClipVision(WanNode):
    files = ("clip_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreLoadClipVision",
            display_name="Load Wan CLIP Vision",
            category="Wan 2.2/loaders",
            description="Chooses the picture encoder of Wan2.1's I2V and FLF2V models, ViT-H/14. Its weights are read "
            "when a picture is encoded.",
            inputs=[
                io.Combo.Input(
                    "clip_name", options=host.model_names(FOLDER),
                    tooltip="clip_vision_h.safetensors, or the official "
                    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, in ComfyUI's clip_vision folder.",
                ),
            ],
            outputs=[io.ClipVision.Output(display_name="clip_vision")],
        )  # fmt: skip

    @classmethod
    def check_inputs(cls, clip_name: str | None) -> None:
        host.check_file(read_clip, FOLDER, clip_name)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str) -> tuple:
        return host.fingerprint(FOLDER, clip_name, read_clip)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(WanClipVision(host.read_header(read_clip, FOLDER, clip_name)))


class Seen(NamedTuple):
    """A CLIP_VISION_OUTPUT: what ComfyUI's conditioning nodes read of it. Wan uses the last but one block's stream."""

    penultimate_hidden_states: torch.Tensor
    last_hidden_state: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    mm_projected: torch.Tensor | None = None

    def __getitem__(self, key: str | int) -> torch.Tensor | None:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


@guarded_methods("encode_image")
class WanClipVision:
    """A CLIP vision encoder on a CLIP_VISION socket: ComfyUI's interface over the engine's encoder."""

    def __init__(self, file: ClipFile):
        self.file = file

    def encode_image(self, image: torch.Tensor, crop: bool = False) -> Seen:
        """Pictures [B,H,W,3] in 0..1 -> tokens [B,257,1280].

        Prepared as the official code does, stretched to a square without antialiasing; ``crop`` cuts the middle square
        out first, as CLIP Vision Encode with crop center asks.
        """
        encoder = host.engine().clip(self.file, host.text_device("default"))
        shown = torch.stack([image_tensor(one) for one in pictures(image, "image")])
        tokens = encoder(_middle(shown) if crop else shown)
        return Seen(tokens.to(host.storage_device()))


def _middle(shown: torch.Tensor) -> torch.Tensor:
    height, width = shown.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return shown[..., top : top + side, left : left + side]


def tokens_of(seen: object, name: str) -> torch.Tensor:
    """The tokens [B,N,1280] of a CLIP_VISION_OUTPUT, ours or ComfyUI's.

    Raises:
        WanError: it has none.
    """
    tokens = getattr(seen, "penultimate_hidden_states", None)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
        raise WanError(f"The clip_vision_output of the {name} conditioning holds no CLIP tokens. Encode the picture "
                       "with Load Wan CLIP Vision, or with CLIP Vision Encode and clip_vision_h.safetensors.")
    return tokens
