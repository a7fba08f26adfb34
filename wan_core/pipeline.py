"""The way from a prompt to a video without ComfyUI: ``generate`` tells it from beginning to end."""

from __future__ import annotations

import logging
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import VAES, VARIANTS, PerExpert, Variant
from .dtypes import resolve_dtype
from .errors import WanError
from .layouts.folder import find_parts
from .layouts.variants import choose
from .loading.clip import ClipFile, read_clip
from .loading.dit import read_dit
from .loading.text import TextFile, read_text_encoder
from .loading.vae import VAEFile, read_vae
from .lookup import look_up
from .media import geometry as latents
from .media.geometry import fitted, image_tensor, video_size
from .memory.devices import available_bytes
from .memory.engine import Engine, largest_matrix, text_bytes
from .memory.plan import AUTO, GB, MARGIN, decode_bytes, plan
from .memory.run import denoise_in_memory
from .models.dit.features.clip_tokens import ClipTokens
from .models.vae.tiles import Tiles, decode_tiled_chunks, encode_tiled_chunks, fitting_tiles
from .recipe import ModelRecipe, pair
from .sampling.denoise import StepReport
from .sampling.experts import Switch
from .sampling.guidance import Condition
from .sampling.schedules import Schedule, schedule
from .sampling.solvers import SOLVERS
from .sampling.starts import Start, begin, check_pictures

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Everything a run needs, as recipes: headers are read, weights are not."""

    dit: ModelRecipe
    vae: VAEFile
    text: TextFile
    clip: ClipFile | None = None  # where the model hears pictures as CLIP tokens


@dataclass(frozen=True)
class Request:
    """What to generate. None means the variant's official value.

    Attributes:
        image, end_image: the first and the last frame.
        size: width and height; with an image its product is the area, and the image decides the aspect ratio.
        seed: negative draws one.
        vae_tile: side of the VAE's tiles in pixels; None: tiles where the memory limit asks for them.
    """

    prompt: str
    negative_prompt: str = ""
    image: Path | None = None
    end_image: Path | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    steps: int | None = None
    shift: float | None = None
    guidance: PerExpert | None = None
    solver: str = "unipc"
    schedule: str = "auto"
    seed: int = -1
    vae_tile: int | None = None

    def completed(self, variant: Variant) -> Request:
        """With every open choice made, and checked before anything is loaded.

        Raises:
            WanError: a size, length, solver or schedule that cannot be; an image that is missing or not wanted.
        """
        done = replace(
            self,
            negative_prompt=self.negative_prompt or variant.negative,
            size=self.size or variant.size,
            frames=self.frames or variant.frames,
            steps=variant.steps if self.steps is None else self.steps,
            shift=variant.shift_for(self.size or variant.size) if self.shift is None else self.shift,
            guidance=self.guidance or variant.guidance,
            seed=self.seed if self.seed >= 0 else random.randint(0, sys.maxsize),
        )
        look_up(SOLVERS, done.solver, "solver")
        done.timetable()
        latents.latent_frames(done.frames)
        check_pictures(variant, done.pictures)
        if not done.pictures:
            latents.latent_shape(variant, *done.size, done.frames)
        return done

    @property
    def pictures(self) -> dict[int, Path]:
        """The images by the number of their frame; the last is -1."""
        return {place: file for place, file in ((0, self.image), (-1, self.end_image)) if file is not None}

    def timetable(self) -> Schedule:
        return schedule(self.schedule, self.steps, self.shift, solver=self.solver)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished latent, and its video on demand.

    Attributes:
        latent: [C, T, h, w], normalised, float32.
        video: decodes as it is iterated: chunks [3, f, H, W] in -1..1, float32.
    """

    latent: torch.Tensor
    seed: int
    video: Callable[[], Iterator[torch.Tensor]]


def read_models(folder: str | Path, task: str, *, dtype: str = "auto", attention: str = "auto") -> Models:
    """Find and understand a checkpoint's parts; no weight is read.

    Args:
        folder: as downloaded: the official layout, ComfyUI's (``diffusion_models/`` ...) or diffusers'.

    Raises:
        WanError: a part is missing, damaged, or belongs to another variant.
    """
    variant = VARIANTS[task]
    parts = find_parts(folder, variant)
    high = _recipe(parts.high, variant, dtype, attention)
    dit = pair(high, _recipe(parts.low, variant, dtype, attention), Switch()) if parts.low else high
    vae = read_vae(parts.vae)
    if vae.config.kind != variant.vae:
        raise WanError(f"{parts.vae} is a {vae.config.kind} VAE, but {variant.display_name} needs {variant.vae} "
                       f"({VAES[variant.vae].checkpoint}).")
    tokenizer = parts.tokenizer if parts.tokenizer and parts.tokenizer.exists() else None
    text = read_text_encoder(parts.text_encoder, tokenizer)
    if text.config.dim != high.high.config.text_dim:
        raise WanError(f"{parts.text_encoder} gives embeddings {text.config.dim} wide, but {parts.high} takes "
                       f"{high.high.config.text_dim}. Use the text encoder of the same checkpoint.")
    return Models(dit, vae, text, read_clip(parts.clip) if parts.clip else None)


def generate(
    models: Models,
    request: Request,
    engine: Engine,
    *,
    device: torch.device,
    text_device: torch.device | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Result:
    """Prompt (and image) -> latent -> video.

    Raises:
        WanError: see ``Request.completed``; everything that can be checked is, before the first weight is read.
    """
    recipe, variant = models.dit, models.dit.variant
    request = request.completed(variant)
    positive, negative = _encode_prompts(models, request, engine, text_device or device)
    start = _start(models, request, engine, device)
    latent = denoise_in_memory(
        engine, recipe, request.guidance, device, start.noise, request.timetable(), request.solver,
        Condition(positive, start.inputs), Condition(negative, start.inputs), given=start.given, on_step=on_step,
    )  # fmt: skip
    if engine.keep_one:
        engine.release("dit")
    return Result(latent[0].cpu(), request.seed, lambda: _decode(models, request, engine, latent, device))


def needs(models: Models, request: Request, device: torch.device, text_device: torch.device) -> str:
    """What a run will need of the device, part by part, from headers alone.

    Raises:
        WanError: a memory limit that sampling does not fit into.
    """
    variant, file = models.dit.variant, models.vae
    room = _room(models, Engine(), device)
    text = text_bytes(models.text, text_device, _dtype_of(models, text_device))
    streamed = f", streamed {largest_matrix(models.text, text_device, _dtype_of(models, text_device)) / GB:.2f} GB"
    latent = (1, *latents.latent_shape(variant, *_video_size(request, variant), request.frames))
    guided = (request.guidance.low, request.guidance.high) != (1, 1)
    free = available_bytes(device)
    sampling = plan(models.dit, latent, device, guided=guided, free=free)
    height, width = (side * VAES[file.config.kind].spatial_stride for side in latent[3:])
    where, tiles = _vae_layout(models, request, (height, width), room, device)
    decode = decode_bytes(file.config, *((tiles.height, tiles.width) if tiles else (height, width)))
    tiled = f" in tiles of {tiles.width}x{tiles.height}" if tiles else ""
    return "\n".join([
        f"{models.dit}, {width}x{height}, {request.frames} frames",
        f"Text encoder: {text / GB:.2f} GB on {text_device}{streamed if text > room else ''}",
        f"Sampling: {sampling}",
        f"VAE decode: {decode / GB:.2f} GB on {where}{tiled}",
    ])  # fmt: skip


def _video_size(request: Request, variant: Variant) -> tuple[int, int]:
    """Width and height of the video; an image decides the aspect ratio."""
    images = [_open_image(file) for file in request.pictures.values()]
    return video_size(variant, request.size, [(image.width, image.height) for image in images])


def _recipe(path: Path, variant: Variant, dtype: str, attention: str) -> ModelRecipe:
    file = read_dit(path)
    chosen = choose(file.config, path, wanted=variant.task)
    return ModelRecipe(file, dtype=dtype, attention=attention, variant=chosen.variant)


def _dtype_of(models: Models, device: torch.device) -> torch.dtype:
    """One dtype for all parts, the DiT's: mixing precisions would only lose the better one."""
    return resolve_dtype(models.dit.dtype, device, models.dit.high.checkpoint.dtype)


def _encode_prompts(
    models: Models, request: Request, engine: Engine, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = _dtype_of(models, device)
    fits = text_bytes(models.text, device, dtype) <= _room(models, engine, device)
    encoder = engine.text_encoder(models.text, device, dtype, resident=fits)
    positive, negative = (encoder([text]) for text in (request.prompt, request.negative_prompt))
    if engine.keep_one:
        del encoder
        engine.release("text")
    return positive, negative


def _room(models: Models, engine: Engine, device: torch.device) -> float:
    """Bytes that a part may take on a device under the run's memory limit."""
    limit = models.dit.vram_limit
    if limit is None or device.type == "cpu":
        return math.inf
    return available_bytes(device) + engine.bytes_on(device) - MARGIN if limit == AUTO else limit * GB


def _start(models: Models, request: Request, engine: Engine, device: torch.device) -> Start:
    variant, originals = models.dit.variant, {place: _open_image(file) for place, file in request.pictures.items()}
    size = video_size(variant, request.size, [(image.width, image.height) for image in originals.values()])
    pictures = {place: image.to(device) for place, image in fitted(variant, originals, size).items()}

    def encode(chunks: Iterator[torch.Tensor], frames: int) -> torch.Tensor:
        return _encode(models, request, engine, chunks, frames, (size[1], size[0]), device)

    start = begin(variant, size, request.frames, request.seed, pictures, encode)
    return replace(start, inputs=(*start.inputs, *_clip_tokens(models, engine, originals, device)))


def _clip_tokens(
    models: Models, engine: Engine, originals: Mapping[int, Image], device: torch.device
) -> tuple[ClipTokens, ...]:
    """What CLIP makes of the pictures as they are, not resized to the video; of models that hear it."""
    if models.clip is None or not originals:
        return ()
    encoder = engine.clip(models.clip, device)
    places = [0, -1] if models.dit.variant.clip > 1 else list(originals)[:1]
    seen = [encoder(image_tensor(originals[place])[None]) for place in places if place in originals]
    if engine.keep_one:
        del encoder
        engine.release("clip")
    return (ClipTokens(torch.cat(seen, dim=1)),)


def _open_image(path: Path) -> Image:
    from PIL import Image as images
    from PIL import UnidentifiedImageError

    try:
        return images.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise WanError(f"{path} is not an image that can be read ({error}).") from error


def _decode(
    models: Models, request: Request, engine: Engine, latent: torch.Tensor, device: torch.device
) -> Iterator[torch.Tensor]:
    """Frames as they are decoded, on the CPU."""
    size = tuple(side * VAES[models.vae.config.kind].spatial_stride for side in latent.shape[3:])
    device, tiles = _vae_layout(models, request, size, _room(models, engine, device), device)
    vae = engine.vae(models.vae, device, torch.float32)  # as the official pipelines do, whatever the DiT runs in
    chunks = decode_tiled_chunks(vae, latent.cpu(), tiles) if tiles else vae.decode_chunks(latent.to(device))
    for chunk in chunks:
        yield chunk[0].cpu()


def _encode(
    models: Models, request: Request, engine: Engine, frames: Iterator[torch.Tensor], count: int, size: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """Chunks [1, 3, f, H, W] -> latent [1, C, T, h, w] on the device."""
    where, tiles = _vae_layout(models, request, size, _room(models, engine, device), device)
    vae = engine.vae(models.vae, where, torch.float32)  # as the official pipelines do, whatever the DiT runs in
    if tiles:
        encoded = list(encode_tiled_chunks(vae, frames, tiles, total_frames=count))
    else:
        encoded = list(vae.encode_chunks((chunk.to(where) for chunk in frames), total_frames=count))
    return torch.cat(encoded, dim=2).to(device)


def _vae_layout(
    models: Models, request: Request, size: tuple[int, int], room: float, device: torch.device
) -> tuple[torch.device, Tiles | None]:
    """Where the VAE runs and in which tiles, for frames of this height and width: what was asked for, else what the
    memory limit leaves room for; the CPU where that is too little for the smallest tile."""
    if request.vae_tile:
        return device, Tiles.square(request.vae_tile)
    if math.isinf(room):
        return device, None
    tiles = fitting_tiles(models.vae.config, *size, room, torch.float32)
    if tiles is None or decode_bytes(models.vae.config, tiles.height, tiles.width) <= room:
        return device, tiles
    log.warning("No tile of %dx%d fits the memory limit: the VAE runs on the CPU.", size[1], size[0])
    return torch.device("cpu"), None
