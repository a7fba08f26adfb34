"""Load Wan CLIP Vision, and the object on its socket that ComfyUI's own nodes call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io

from ..wan_core.errors import WanError
from ..wan_core.loading.clip import ClipFile, read_clip
from ..wan_core.media.geometry import image_tensor, middle_square, stretched
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
                    "clip_name",
                    options=host.model_names(FOLDER),
                    tooltip="clip_vision_h.safetensors, or the official "
                    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth, in ComfyUI's clip_vision folder.",
                )
            ],
            outputs=[io.ClipVision.Output(display_name="clip_vision")],
        )

    @classmethod
    def check_inputs(cls, clip_name: str | None) -> None:
        host.check_file(read_clip, FOLDER, clip_name)

    @classmethod
    def fingerprint_inputs(cls, clip_name: str) -> tuple:
        return host.fingerprint(FOLDER, clip_name, read_clip)

    @classmethod
    def execute(cls, clip_name: str) -> io.NodeOutput:
        return io.NodeOutput(WanClipVision(host.read_header(read_clip, FOLDER, clip_name)))


@dataclass(frozen=True, eq=False)
class Seen:
    """A CLIP_VISION_OUTPUT for Wan: the stream before the last block, by ComfyUI's name for it, [B,N,1280]."""

    penultimate_hidden_states: torch.Tensor

    def __getitem__(self, key: str) -> torch.Tensor:
        return getattr(self, key)

    def __getattr__(self, name: str) -> object:  # still an AttributeError, for whoever asks whether it is there
        raise AttributeError(
            f"A node wants {name} of what Load Wan CLIP Vision saw. It computes what Wan uses only "
            "(penultimate_hidden_states): for that node use ComfyUI's Load CLIP Vision."
        )


@guarded_methods("encode_image")
class WanClipVision:
    """A CLIP vision encoder on a CLIP_VISION socket: ComfyUI's interface over the engine's encoder."""

    def __init__(self, file: ClipFile) -> None:
        self.file = file

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Seen:
        """Pictures [B,H,W,3] in 0..1 -> tokens [B,257,1280].

        Prepared as the official code does, stretched to a square without antialiasing; ``crop``, on by default as in
        ComfyUI, cuts the middle square out first, as CLIP Vision Encode with crop center asks.
        """
        encoder = host.engine().clip(self.file, host.text_device("default"))
        shown = torch.stack([image_tensor(one) for one in pictures(image, "image")])
        tokens = encoder(middle_square(shown) if crop else shown)
        return Seen(tokens.to(host.storage_device()))


def look(clip: Any, image: torch.Tensor) -> torch.Tensor:
    """Pictures [B,H,W,3] in 0..1 -> tokens [B,257,1280], by our CLIP or ComfyUI's, prepared as the official code does.

    ComfyUI's would smooth the picture before it is made small; of one that is small already it takes the pixels as they
    are, rounded to 8 bits.

    Raises:
        WanError: there is no encoder on the socket.
    """
    if not callable(getattr(clip, "encode_image", None)):
        raise WanError(
            "What is connected to clip_vision encodes no images: connect Load Wan CLIP Vision, or ComfyUI's "
            "Load CLIP Vision with clip_vision_h.safetensors."
        )
    if not isinstance(clip, WanClipVision):
        image = stretched(image, getattr(clip, "image_size", 224))
    return tokens_of(clip.encode_image(image, crop=False), "clip_vision")


def tokens_of(seen: object, source: str) -> torch.Tensor:
    """The tokens [B,N,1280] of a CLIP_VISION_OUTPUT, ours or ComfyUI's.

    Args:
        source: where it comes from, for messages.

    Raises:
        WanError: it has none.
    """
    tokens = getattr(seen, "penultimate_hidden_states", None)
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 3:
        raise WanError(
            f"The clip_vision_output of {source} holds no CLIP tokens. Encode the picture with Load Wan "
            "CLIP Vision, or with CLIP Vision Encode and clip_vision_h.safetensors."
        )
    return tokens
