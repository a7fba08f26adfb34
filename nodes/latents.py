"""Wan Empty Latent and Wan Image to Video: what sampling begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import node_helpers
import torch
from comfy_api.latest import io

from ..wan_core.config import VAES, Variant
from ..wan_core.errors import WanError
from ..wan_core.media import geometry as latents
from ..wan_core.memory import capacity
from ..wan_core.recipe import ModelRecipe
from ..wan_core.sampling import raw
from . import host, official
from .base import WanNode
from .clip_vision import Seen, look
from .conditioning import clip_tokens
from .pictures import pictures
from .spaces import check_vae
from .types import WanModel
from .vae import WanVAE

_SMALLEST_MULTIPLE = 16  # every Wan model needs sides that are multiples of this


def _size_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "width",
            default=official.WIDTH,
            min=16,
            max=16384,
            step=16,
            tooltip="Width in pixels: a multiple of 16, of 32 for the 5B.",
        ),
        io.Int.Input(
            "height",
            default=official.HEIGHT,
            min=16,
            max=16384,
            step=16,
            tooltip="Height in pixels: a multiple of 16, of 32 for the 5B.",
        ),
        io.Int.Input(
            "frames",
            default=official.T2V.frames,
            min=1,
            max=16385,
            step=4,
            tooltip=f"Length in frames, 4n + 1. {official.LENGTHS}.",
        ),
    ]


def _batch_input() -> io.Input:
    return io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many videos to make at once.")


def _check_numbers(width: int | None, height: int | None, frames: int | None) -> None:
    """Refuse at queue time what no Wan model can do; a None comes from a link and is not known yet."""
    for name, side in (("width", width), ("height", height)):
        if side is not None and (side < 1 or side % _SMALLEST_MULTIPLE):
            nearest = max(round(side / _SMALLEST_MULTIPLE), 1) * _SMALLEST_MULTIPLE
            raise WanError(
                f"The {name} is {side}: it must be a multiple of {_SMALLEST_MULTIPLE} (of 32 for the 5B). "
                f"The nearest is {nearest}."
            )
    if frames is not None:
        latents.latent_frames(frames)


class EmptyLatent(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreEmptyLatent",
            display_name="Wan Empty Latent",
            category="Wan 2.2/latent",
            description="An empty latent video of the shape that the model works on: text to video starts here.",
            inputs=[
                WanModel.Input("model", tooltip="Decides the latent's channels and stride."),
                *_size_inputs(),
                _batch_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def check_inputs(cls, width: int | None, height: int | None, frames: int | None) -> None:
        _check_numbers(width, height, frames)

    @classmethod
    def execute(cls, model: ModelRecipe, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        shape = latents.latent_shape(model.variant, width, height, frames)
        capacity.check_start(model, (batch_size, *shape), host.device(), host.total_bytes(host.device()))
        return io.NodeOutput({"samples": _empty(shape, batch_size)})


def _empty(shape: tuple[int, ...], batch: int) -> torch.Tensor:
    return torch.zeros(batch, *shape, device=host.storage_device())


class ImageToVideo(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreImageToVideo",
            display_name="Wan Image to Video",
            category="Wan 2.2/latent",
            description="Makes images the first (and, with I2V and FLF2V models, the last) frames of the video. For "
            "TI2V-5B the image may be left out: the latent is then empty and the model goes by the text alone.",
            inputs=[
                WanModel.Input("model", tooltip="An I2V, FLF2V or TI2V model: decides how the image enters."),
                io.Vae.Input(
                    "vae", tooltip="Encodes the images: Wan2.2 VAE for TI2V-5B, Wan2.1 VAE for all other models."
                ),
                io.Conditioning.Input("positive", tooltip="The prompt; comes out again with the image added."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; comes out again with the image added."),
                *_size_inputs(),
                io.Combo.Input(
                    "fit",
                    options=["area", "exact"],
                    default="area",
                    tooltip="area: keep the image's aspect ratio, with about width x height pixels, as the official "
                    "code does; exact: scale and crop the image to width x height.",
                ),
                _batch_input(),
                io.Image.Input(
                    "start_image",
                    optional=True,
                    tooltip="The first frame. Several images are the first frames (for TI2V-5B 4n + 1 of them).",
                ),
                io.Image.Input(
                    "end_image",
                    optional=True,
                    tooltip="The last frame (I2V and FLF2V models). Several images are the last frames.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Wan2.1's I2V and FLF2V models only: Load Wan CLIP Vision or ComfyUI's Load CLIP Vision. "
                    "The images are looked at as the official code does.",
                ),
                io.ClipVisionOutput.Input(
                    "clip_vision_output",
                    optional=True,
                    tooltip="Instead of clip_vision: what ComfyUI's CLIP Vision Encode saw (crop none).",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def check_inputs(cls, width: int | None, height: int | None, frames: int | None) -> None:
        _check_numbers(width, height, frames)

    @classmethod
    def execute(
        cls,
        model: ModelRecipe,
        vae: object,
        positive: list,
        negative: list,
        width: int,
        height: int,
        frames: int,
        fit: str,
        batch_size: int,
        start_image: torch.Tensor | None = None,
        end_image: torch.Tensor | None = None,
        clip_vision: object = None,
        clip_vision_output: object = None,
    ) -> io.NodeOutput:
        check_vae(vae, model.variant)
        start, end = (
            image if image is None else pictures(image, name)
            for name, image in (("start_image", start_image), ("end_image", end_image))
        )
        wanted = Wanted(width, height, frames, fit, batch_size, start, end)
        check_images(model.variant, wanted)
        check_room(model, vae, wanted)
        seen = seen_by_clip(model, wanted, clip_vision, clip_vision_output)
        values, latent = _STARTS[model.variant.image](model.variant, vae, wanted)
        values |= seen
        added = (node_helpers.conditioning_set_values(side, values) for side in (positive, negative))
        return io.NodeOutput(*added, latent)


def check_room(model: ModelRecipe, vae: object, wanted: Wanted) -> None:
    """Refuse what no machine of this size can encode or sample. In "area" sides change, and their product stays.

    Raises:
        WanError: see ``capacity``.
    """
    stride = VAES[model.variant.vae].spatial_stride
    shape = (
        wanted.batch,
        VAES[model.variant.vae].channels,
        latents.latent_frames(wanted.frames),
        wanted.height // stride,
        wanted.width // stride,
    )
    capacity.check_start(model, shape, host.device(), host.total_bytes(host.device()))
    if isinstance(vae, WanVAE) and (wanted.start is not None or wanted.end is not None):
        vae.check_encode(wanted.height, wanted.width)


@dataclass(frozen=True, eq=False)
class Wanted:
    """The widgets and images of Wan Image to Video; images are [k,H,W,3] in 0..1."""

    width: int
    height: int
    frames: int
    fit: str
    batch: int
    start: torch.Tensor | None
    end: torch.Tensor | None

    def size(self, variant: Variant) -> tuple[int, int]:
        """Width and height of the video: in "area" of the first image's aspect ratio."""
        image = self.start if self.start is not None else self.end
        asked = self.width, self.height
        if self.fit == "exact" or image is None:
            return asked
        return latents.fitted_size(variant, asked, [(image.shape[2], image.shape[1])])

    def given(self, variant: Variant) -> dict[int, torch.Tensor]:
        """Frame number -> [3,H,W] in -1..1."""
        start = [] if self.start is None else list(self.start[: self.frames].cpu())
        end = [] if self.end is None else list(self.end[-self.frames :].cpu())
        images = dict(enumerate(start)) | dict(enumerate(end, start=self.frames - len(end)))
        return latents.fitted(variant, images, self.size(variant), cover=self.fit == "exact")


def seen_by_clip(model: ModelRecipe, wanted: Wanted, clip: object, seen: object) -> dict[str, object]:
    """The ``clip_vision_output`` of the conditioning: of the start image, or of start and end for FLF2V.

    Raises:
        WanError: both ways are connected, the model hears no CLIP, or another CLIP.
    """
    variant = model.variant
    if clip is None and seen is None:
        return {}
    if clip is not None and seen is not None:
        raise WanError("clip_vision and clip_vision_output are both connected: choose one.")
    if not variant.clip:
        raise WanError(
            f"{variant.display_name} looks at no picture through CLIP: disconnect clip_vision. Wan2.1's I2V "
            "and FLF2V models do."
        )
    if seen is None:
        ends = [
            image[place]
            for image, place in ((wanted.start, slice(1)), (wanted.end, slice(-1, None)))
            if image is not None
        ]
        seen = Seen(torch.cat([look(clip, image) for image in ends[: variant.clip]], dim=1))
    clip_tokens(seen, "new", model)
    return {"clip_vision_output": seen}


def check_images(variant: Variant, wanted: Wanted) -> None:
    """Whether a model can begin with the images that are connected.

    Raises:
        WanError: it takes none, needs some, or cannot take them where they are.
    """
    name, start, end = variant.display_name, wanted.start is not None, wanted.end is not None
    if variant.image == "none" and (start or end):
        raise WanError(f"{name} takes no image. Load an I2V or TI2V-5B model, or remove the image.")
    if variant.image == "frame" and end:
        raise WanError(f"{name} takes a start image only. Remove the end image, or load I2V-A14B.")
    if variant.image == "channels" and not (start or end):
        raise WanError(
            f"{name} animates an image: connect start_image, end_image, or both. For text alone load a T2V "
            "or TI2V-5B model."
        )
    if variant.needs_end and not (start and end):
        raise WanError(f"{name} goes from a first picture to a last: connect start_image and end_image.")


def _without_image(variant: Variant, vae: object, wanted: Wanted) -> tuple[dict, dict]:
    shape = latents.latent_shape(variant, wanted.width, wanted.height, wanted.frames)
    return {}, {"samples": _empty(shape, wanted.batch)}


def _with_channels(variant: Variant, vae: object, wanted: Wanted) -> tuple[dict, dict]:
    """I2V: the given frames in a video that is grey otherwise, encoded; concat_mask is 0 where one is given."""
    width, height = wanted.size(variant)
    shape = latents.latent_shape(variant, width, height, wanted.frames)
    given = wanted.given(variant)
    encoded = _encode(vae, given, wanted.frames)
    mask = raw.concat_mask(given, wanted.frames, *shape[2:])
    values = {"concat_latent_image": encoded, "concat_mask": mask.to(encoded.device)}
    return values, {"samples": _empty(shape, wanted.batch)}


def _encode(vae: Any, given: dict[int, torch.Tensor], frames: int) -> torch.Tensor:
    """Given frames -> raw latent [1,C,T,h,w], with our VAE or ComfyUI's."""
    chunks = latents.condition_chunks(given, frames)
    if isinstance(vae, WanVAE):
        return vae.encode_chunks(chunks, frames)
    video = torch.cat(list(chunks), dim=2)[0].movedim(0, -1)
    with host.cancellable(getattr(vae, "first_stage_model", None)):
        return vae.encode(video.add(1).div(2))


def _with_frame(variant: Variant, vae: object, wanted: Wanted) -> tuple[dict, dict]:
    """TI2V-5B: the image's latent is the first latent frame, and noise_mask 0 keeps it there."""
    if wanted.start is None:
        return _without_image(variant, vae, wanted)
    shape = latents.latent_shape(variant, *wanted.size(variant), wanted.frames)
    given = wanted.given(variant)
    samples, mask = raw.first_frames(_encode(vae, given, len(given)), shape, variant.vae, wanted.batch)
    return {}, {"samples": samples, "noise_mask": mask}


_STARTS = {"none": _without_image, "channels": _with_channels, "frame": _with_frame}
