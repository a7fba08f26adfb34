"""The way from a prompt to a video without ComfyUI: ``generate`` tells it from beginning to end."""

from __future__ import annotations

import itertools
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
from .errors import WanError, is_out_of_memory
from .layouts.folder import parts_from
from .layouts.variants import choose
from .loading.clip import ClipFile, read_clip
from .loading.compatible import check_compatible
from .loading.dit import read_dit
from .loading.published import published_dit, published_text_encoder, published_vae
from .loading.text import TextFile, read_text_encoder
from .loading.vae import VAEFile, read_vae
from .lookup import look_up
from .media import geometry as latents
from .media.geometry import fitted, fitted_size, image_tensor
from .memory import plan as plans
from .memory.activations import Work, vae_budget
from .memory.budget import GB, WORKSPACE
from .memory.devices import available_bytes
from .memory.engine import Engine, largest_matrix, text_bytes
from .memory.plan import AUTO
from .memory.run import denoise_in_memory
from .memory.vae_placement import Place, at_once, next_tiles, place, retried, square_tiles, vae_at
from .models.dit.attention import find_backend
from .models.dit.features.clip_tokens import ClipTokens
from .models.vae.tiles import Tiles, decode_tiled_chunks, encode_tiled_chunks
from .recipe import ModelRecipe, check_guidance, pair, told_of_guidance, working
from .sampling.denoise import Callbacks, Run, StepReport
from .sampling.experts import Switch
from .sampling.guidance import Condition
from .sampling.presets import check_distilled
from .sampling.schedules import Schedule, schedule
from .sampling.solvers import SOLVERS, Fresh, step_seed
from .sampling.starts import Start, begin, check_pictures, clip_places

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

    def completed(self, variant: Variant, *, planned: bool = False) -> Request:
        """With every open choice made, and checked before anything is loaded.

        Args:
            planned: whether it will not run yet, so that the pictures may still be missing.

        Raises:
            WanError: a number, solver or schedule that cannot be; an image that is missing, not wanted, or cannot be
                read.
        """
        done = replace(
            self,
            negative_prompt=self.negative_prompt or variant.negative,
            size=self.size or variant.size,
            frames=variant.frames if self.frames is None else self.frames,
            steps=variant.steps if self.steps is None else self.steps,
            shift=variant.shift_for(self.size or variant.size) if self.shift is None else self.shift,
            guidance=self.guidance or variant.guidance,
            seed=self.seed if self.seed >= 0 else random.randint(0, sys.maxsize),
        )
        done._check_numbers()
        look_up(SOLVERS, done.solver, "solver")
        check_distilled(done.timetable(), done.solver, done.guidance, pair=variant.experts == 2)
        latents.latent_frames(done.frames)
        if done.pictures or not planned:
            check_pictures(variant, done.pictures)
        latents.latent_shape(variant, *video_size(done, variant), done.frames)
        return done

    @property
    def pictures(self) -> dict[int, Path]:
        """The images by the number of their frame; the last is -1."""
        return {place: file for place, file in ((0, self.image), (-1, self.end_image)) if file is not None}

    def _check_numbers(self) -> None:
        if min(self.size) < 1:
            raise WanError(f"The size is {self.size[0]}x{self.size[1]}: expected sides of 1 pixel or more.")
        if not all(map(math.isfinite, (self.guidance.low, self.guidance.high))):
            raise WanError(f"The guidance is {self.guidance.low} and {self.guidance.high}: expected numbers, say 4.")
        if self.seed >= 2**64:
            raise WanError(f"The seed is {self.seed}: expected a number below 2^64.")
        if self.vae_tile is not None:
            square_tiles(self.vae_tile)

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


def read_models(
    folder: str | Path | None,
    task: str,
    *,
    dtype: str = "auto",
    attention: str = "auto",
    own: Mapping[str, Path] | None = None,
) -> Models:
    """Find and understand a checkpoint's parts; no weight is read.

    Args:
        folder: as downloaded: the official layout, ComfyUI's (``diffusion_models/`` ...) or diffusers'.
        own: files in place of the folder's, by the names of ``Parts``; with all of them there need be no folder.

    Raises:
        WanError: a part is missing, damaged, or belongs to another variant.
    """
    variant = VARIANTS[task]
    parts = parts_from(folder, variant, own or {})
    high = _recipe(parts.high, variant, dtype, attention)
    dit = pair(high, _recipe(parts.low, variant, dtype, attention), Switch()) if parts.low else high
    vae = read_vae(parts.vae)
    tokenizer = parts.tokenizer if parts.tokenizer and parts.tokenizer.exists() else None
    text = read_text_encoder(parts.text_encoder, tokenizer)
    clip = read_clip(parts.clip) if parts.clip else None
    check_compatible(variant, high.high, vae, text, clip)
    return Models(dit, vae, text, clip)


def planned_models(
    task: str, *, dtype: str = "auto", attention: str = "auto", own: Mapping[str, Path] | None = None
) -> Models:
    """Models to plan with, and not to run: what no file is given for is as published, in its official format.

    Raises:
        WanError: a file that is damaged, or belongs to another variant.
    """
    variant, own = VARIANTS[task], own or {}

    def expert(part: str, level: str) -> ModelRecipe:
        if part in own:
            return _recipe(own[part], variant, dtype, attention)
        return ModelRecipe(published_dit(variant, level), dtype=dtype, attention=attention, variant=variant)

    if variant.experts == 2:
        dit = pair(expert("high", "high"), expert("low", "low"), Switch())
    else:
        dit = expert("high", "only")
    vae = read_vae(own["vae"]) if "vae" in own else published_vae(variant)
    text = published_text_encoder()
    if "text_encoder" in own:
        text = read_text_encoder(own["text_encoder"], own.get("tokenizer"))
    check_compatible(variant, dit.high, vae, text, None)
    return Models(dit, vae, text)


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
    check_fits(models, request, engine, device)
    positive, negative = _encode_prompts(models, request, engine, text_device or device)
    start = _start(models, request, engine, device)
    timetable = request.timetable()
    for note in check_guidance(recipe, timetable, request.guidance):
        log.warning(note)
    latent = denoise_in_memory(
        engine,
        recipe,
        request.guidance,
        device,
        timetable.first(start.noise),
        Run(
            timetable,
            request.solver,
            Condition(positive, start.inputs),
            Condition(negative, start.inputs),
            start.known,
            cache=recipe.step_cache,
            guidance=recipe.guidance,
            fresh=_fresh(request, start.noise.shape),
        ),
        Callbacks(on_step=on_step),
    )
    if engine.keep_one:
        engine.release("dit")
    return Result(
        latent[0].cpu(),
        request.seed,
        lambda: decode(
            models.vae, latent[0], engine, device, tile=request.vae_tile, room=_room(models, engine, device)
        ),
    )


def _fresh(request: Request, shape: torch.Size) -> Fresh:
    """The noise of each step, for solvers that noise anew."""
    return lambda step: latents.noise(step_seed(request.seed, step), shape[1:])[None]


def check_run(models: Models, request: Request, engine: Engine, device: torch.device) -> None:
    """``check_fits``, and a memory limit or number of blocks that cannot be: all that headers tell of a run.

    Raises:
        WanError: see ``check_fits``, ``check_cache``, ``check_guidance`` and ``plan``.
    """
    check_fits(models, request, engine, device)
    check_cache(models.dit, request.timetable(), request.solver)
    check_guidance(models.dit, request.timetable(), request.guidance)
    plans.plan(models.dit, _latent(models, request), device, prompts=_prompts(request), free=available_bytes(device))


def check_cache(recipe: ModelRecipe, timetable: Schedule, solver: str) -> None:
    """
    Raises:
        WanError: a step cache that these steps cannot have (``StepCache.check``).
    """
    if recipe.step_cache:
        recipe.step_cache.check(timetable, solver, working(recipe, timetable))


def _latent(models: Models, request: Request) -> tuple[int, ...]:
    """The shape of a completed request's latent, [1, C, T, h, w]."""
    variant = models.dit.variant
    return 1, *latents.latent_shape(variant, *video_size(request, variant), request.frames)


def check_fits(models: Models, request: Request, engine: Engine, device: torch.device) -> None:
    """Refuse what the device cannot hold or compute, before anything is loaded or allocated.

    Args:
        request: completed.

    Raises:
        WanError: sampling, or decoding in the tiles that are asked for, takes more memory than there is; an attention
            backend that does not run here.
    """
    find_backend(models.dit.attention, device, _dtype_of(models, device))
    latent = _latent(models, request)
    plans.check_fits(models.dit, latent, device, prompts=_prompts(request))
    size = tuple(side * VAES[models.vae.config.kind].spatial_stride for side in latent[3:])
    check_decode(models.vae, size, device, tile=request.vae_tile, room=_room(models, engine, device))


def check_decode(
    file: VAEFile, size: tuple[int, int], device: torch.device, *, tile: int | None = None, room: float = math.inf
) -> None:
    """Refuse frames of this height and width that cannot be decoded; arguments as of ``decode``.

    Raises:
        WanError: a tile or a frame takes more memory than there is.
    """
    where = _vae_place(file, size, device, room, tile)
    plans.check_frames_fit(file.config, *at_once(size, where.tiles), where.device)


def check_latent(file: VAEFile, latent: torch.Tensor) -> None:
    """
    Raises:
        WanError: no latent [C, T, h, w] of this VAE, or one that holds no numbers.
    """
    spec = VAES[file.config.kind]
    if latent.ndim != 4 or latent.shape[0] != file.config.channels or min(latent.shape) < 1:
        raise WanError(
            f"The latent is {list(latent.shape)}, but {file.checkpoint.path} is a {spec.kind} VAE and takes "
            f"[{file.config.channels}, frames, height, width]: use the VAE that belongs to the model."
        )
    if not torch.isfinite(latent).all():
        raise WanError("The latent holds values that are no numbers (NaN or infinite): the run that made it failed.")


def decode(
    file: VAEFile,
    latent: torch.Tensor,
    engine: Engine,
    device: torch.device,
    *,
    tile: int | None = None,
    room: float = math.inf,
) -> Iterator[torch.Tensor]:
    """A normalised latent [C, T, h, w] -> chunks [3, f, H, W] in -1..1 on the CPU, as they are decoded.

    Args:
        tile: side of the tiles in pixels; None: tiles where ``room``, in bytes, asks for them.

    Out of memory, it goes on in smaller tiles.

    Raises:
        WanError: the smallest tiles are too much for the device.
    """
    size = tuple(side * VAES[file.config.kind].spatial_stride for side in latent.shape[2:])
    where, (latent, done) = _vae_place(file, size, device, room, tile), (latent[None], 0)
    while True:
        try:
            vae, tiles = vae_at(engine, file, where, size, "decode"), where.tiles
            whole = None if tiles else latent.to(where.device)
            chunks = decode_tiled_chunks(vae, latent.cpu(), tiles) if tiles else vae.decode_chunks(whole)
            for number, chunk in enumerate(chunks):
                if number == done:
                    yield chunk[0].cpu()
                    done += 1
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
        chunk = whole = None
        where = replace(where, tiles=next_tiles(*size, where.tiles, said))


def needs(models: Models, request: Request, device: torch.device, text_device: torch.device) -> str:
    """What a run will need of the device, part by part, from headers alone.

    Raises:
        WanError: a memory limit that sampling does not fit into.
    """
    file = models.vae
    room = _room(models, Engine(), device)
    text = text_bytes(models.text, text_device, _dtype_of(models, text_device))
    streamed = f", streamed {largest_matrix(models.text, text_device, _dtype_of(models, text_device)) / GB:.2f} GB"
    latent = _latent(models, request)
    sampling = plans.plan(models.dit, latent, device, prompts=_prompts(request), free=available_bytes(device))
    height, width = (side * VAES[file.config.kind].spatial_stride for side in latent[3:])
    lines = [
        f"{models.dit}, {width}x{height}, {request.frames} frames",
        f"Text encoder: {text / GB:.2f} GB on {text_device}{streamed if text > room else ''}",
        f"Sampling: {sampling}",
    ]
    if models.dit.guidance:
        lines.append(f"Guidance: {told_of_guidance(models.dit, request.timetable(), request.guidance)}")
    try:
        plans.check_fits(models.dit, latent, device, prompts=_prompts(request))
    except WanError as error:
        return "\n".join([*lines, str(error)])
    where = _vae_place(file, (height, width), device, room, request.vae_tile)
    tiles = where.tiles
    taken = vae_budget(file.config, *at_once((height, width), tiles)).total
    tiled = f" in tiles of {tiles.width}x{tiles.height}" if tiles else ""
    return "\n".join([*lines, f"VAE decode: {taken / GB:.2f} GB on {where.device}{tiled}"])


def video_size(request: Request, variant: Variant) -> tuple[int, int]:
    """Width and height of the video; an image decides the aspect ratio."""
    images = [latents.open_image(file) for file in request.pictures.values()]
    return fitted_size(variant, request.size, [(image.width, image.height) for image in images])


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
    """Bytes that a part may take on a device: under the run's memory limit, or of what could be free there."""
    limit = models.dit.vram_limit
    if device.type == "cpu":
        return math.inf
    return available_bytes(device) + engine.bytes_on(device) - WORKSPACE if limit in (None, AUTO) else limit * GB


def _start(models: Models, request: Request, engine: Engine, device: torch.device) -> Start:
    variant = models.dit.variant
    originals = {place: latents.open_image(file) for place, file in request.pictures.items()}
    size = fitted_size(variant, request.size, [(image.width, image.height) for image in originals.values()])
    pictures = dict(fitted(variant, originals, size))

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
    places = clip_places(models.dit.variant, originals)
    seen = [encoder(image_tensor(originals[place])[None]) for place in places]
    if engine.keep_one:
        del encoder
        engine.release("clip")
    return (ClipTokens(torch.cat(seen, dim=1)),)


def _encode(
    models: Models,
    request: Request,
    engine: Engine,
    frames: Iterator[torch.Tensor],
    count: int,
    size: tuple[int, int],
    device: torch.device,
) -> torch.Tensor:
    """Chunks [1, 3, f, H, W] -> latent [1, C, T, h, w] on the device."""
    where = _vae_place(models.vae, size, device, _room(models, engine, device), request.vae_tile, "encode")

    def encode(tiles: Tiles | None) -> list[torch.Tensor]:
        nonlocal frames
        mine, frames = itertools.tee(frames)  # for another try
        vae = vae_at(engine, models.vae, replace(where, tiles=tiles), size, "encode")
        if tiles:
            return list(encode_tiled_chunks(vae, (chunk.cpu() for chunk in mine), tiles, total_frames=count))
        return list(vae.encode_chunks((chunk.to(where.device) for chunk in mine), total_frames=count))

    return torch.cat(retried(encode, *size, where.tiles), dim=2).to(device)


def _vae_place(
    file: VAEFile, size: tuple[int, int], device: torch.device, room: float, tile: int | None, work: Work = "decode"
) -> Place:
    """In tiles of the side that was asked for, else as there is room; in float32 as in the official pipelines."""
    if tile is not None:
        return Place(device, square_tiles(tile), torch.float32)
    return place(file.config, size, device, torch.float32, room=room, work=work)


def _prompts(request: Request) -> int:
    return 2 if request.guidance.guided else 1
