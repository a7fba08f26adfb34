"""A whole training of a transformer from a request: what the command line and the node both call."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from ..config import CLIP_CHECKPOINT, VARIANTS, Variant
from ..dtypes import resolve_dtype
from ..errors import Hint, WanError
from ..layouts import comfyui
from ..layouts.folder import find_parts
from ..loading.clip import load_clip_vision, read_clip
from ..loading.compatible import check_compatible
from ..loading.dit import DiTFile, read_dit
from ..loading.text import load_text_encoder, read_text_encoder
from ..loading.vae import load_vae, read_vae
from ..media.geometry import latent_shape
from ..media.video import check_writable
from ..memory.activations import dit_activations
from ..memory.devices import empty_cache, total_bytes
from ..memory.plan import does_not_fit, tokens_of
from ..models.dit.dit import WanDiT
from .cache import Cache, Latents, Texts, digest, file_key
from .data import Clip, ClipProblem, Frame, check_frame, read_folder, usable
from .dit import Data, DiTTask, Recipe, check_variant
from .folder import STATE, check_folder, forget, set_aside
from .loop import Plan, StepReport, check_resumable, train
from .lora import TARGETS, AdaptedLinear, add_lora, find_targets
from .model import CheckpointedRunner, TrainedDiT, load_trained
from .objective import NoiseRange, expert_range
from .parallel import Processes
from .precision import resolve_precision
from .sample import Grids, Sampling, Wish
from .sharded import load_sharded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainFiles:
    """What a training reads: checkpoints of one variant.

    ``dit`` is the expert to train; ``clip`` is CLIP's picture encoder, of Wan2.1's I2V and FLF2V.
    """

    dit: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path | None = None
    clip: Path | None = None


@dataclass(frozen=True)
class Request:
    """What to train, on what, and where to.

    Attributes:
        clips: a folder with metadata.csv, or clips of a Python data set.
        rank: of the LoRA; 0 trains all weights.
        targets: of the LoRA, see ``lora.find_targets``.
        boundaries: of the noise levels, as fractions of the timesteps; None is the expert's own.
        shift: None is the variant's own for the size.
        steps: 0 takes ``epochs`` instead.
        restart: forget an earlier run in ``out`` instead of going on with it.
        dtype: of frozen base weights; None is the device's default. Full training keeps float32.
        root: what the clips of a table must lie in; None is the folder ``clips``.
        sample_every: steps between grids of samples; 0 draws none.
        sample_prompts: of the grids; without any, prompts of the first clips.
        fsdp: with several processes and full training, each holds a part of the model, see ``sharded``.
    """

    task: str
    expert: str
    clips: Path | Sequence[Clip]
    out: Path
    frame: Frame
    metadata: Path | None = None
    repeat: int = 1
    rank: int = 32
    alpha: float | None = None
    targets: Sequence[str] = TARGETS
    boundaries: tuple[float, float] | None = None
    shift: float | None = None
    steps: int = 0
    epochs: int = 1
    batch: int = 1
    accumulate: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    ema: float = 0.0
    caption_dropout: float = 0.1
    seed: int = 0
    precision: str = "auto"
    checkpointing: bool = True
    checkpoint_offload: bool = False
    skip_bad_clips: bool = False
    save_every: int = 0
    sample_every: int = 0
    sample_prompts: Sequence[str] = ()
    sample_steps: int = 20
    dtype: str | None = None
    restart: bool = False
    cache: Path | None = None
    root: Path | None = None
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name in (*_LEAST, "learning_rate", "ema", "caption_dropout", "alpha", "shift"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise WanError(f"{name} is {value}: expected a number.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise WanError(f"{name} is {getattr(self, name)}: expected {least} or more.")
        if not self.learning_rate > 0:
            raise WanError(f"learning_rate is {self.learning_rate}: expected a number above 0, say 1e-4.")
        if self.alpha == 0:
            raise WanError("alpha is 0, with which a LoRA changes nothing: expected another number, say the rank.")
        if not 0 <= self.caption_dropout <= 1:
            raise WanError(f"caption_dropout is {self.caption_dropout}: expected a fraction of the captions, 0 to 1.")
        if self.fsdp and self.rank:
            raise WanError(
                "Sharding is for full training. A LoRA's few weights are trained in every process, beside the whole "
                "frozen model, and only their gradients are exchanged.",
                Hint.NO_SHARDS,
            )


_LEAST = {"rank": 0, "repeat": 1, "steps": 0, "epochs": 1, "batch": 1, "accumulate": 1, "weight_decay": 0,
          "save_every": 0, "sample_every": 0, "sample_steps": 1}  # fmt: skip


def experts_of(variant: Variant) -> tuple[str, ...]:
    return ("only",) if variant.boundary is None else ("high", "low")


def files_in(folder: Path | None, task: str, expert: str, **own: Path | None) -> TrainFiles:
    """The parts of a checkpoint folder, the wanted expert among them; ``own`` are files in place of the folder's.

    Raises:
        WanError: a part is missing; no such expert.
    """
    variant, own = VARIANTS[task], {part: file for part, file in own.items() if file}
    if expert not in experts_of(variant):
        experts = " or ".join(experts_of(variant))
        raise WanError(f"{variant.display_name} has no expert {expert!r}.", Hint.EXPERT, experts=experts)
    dit = "low" if expert == "low" else "high"
    needed = (dit, "vae", "text_encoder", *(("clip",) if variant.clip else ()))
    wanted = [part for part in needed if own.get("dit" if part == dit else part) is None]
    if not wanted:
        return TrainFiles(**cast(dict[str, Path], own))
    if folder is None:
        raise WanError("Where are the weights?", Hint.CLIP_WEIGHTS if variant.clip else Hint.WEIGHTS)
    parts = find_parts(folder, variant, wanted)
    tokenizer = None if "text_encoder" in own else parts.tokenizer
    found = {
        "dit": getattr(parts, dit),
        "vae": parts.vae,
        "text_encoder": parts.text_encoder,
        "tokenizer": tokenizer,
        "clip": parts.clip,
    }
    return TrainFiles(**cast(dict[str, Path], found | own))


@dataclass(frozen=True)
class Hooks:
    """How a run talks to whoever started it.

    Attributes:
        on_step: called after each step.
        on_clip: called with the number of clips made ready, and of all.
        check: called often and with anything; what it (or any other hook) raises ends the run, which keeps its state.
        tell: called with remarks.
        before_load: called once all is checked, and nothing is loaded.
    """

    on_step: Callable[[StepReport], None] | None = None
    on_clip: Callable[[int, int], None] = lambda done, total: None
    check: Callable[..., None] = lambda *anything: None
    tell: Callable[[str], None] = print
    before_load: Callable[[], None] = lambda: None


def run(
    request: Request,
    files: TrainFiles,
    *,
    device: torch.device | str = "cpu",
    text_device: torch.device | str = "cpu",
    hooks: Hooks | None = None,
) -> Path:
    """Train, or go on with what ``request.out`` holds, and return the file that was written.

    Raises:
        WanError: see ``check``, ``usable``, ``loop.train`` and the loaders; found before the first step.
    """
    hooks, variant = hooks or Hooks(), VARIANTS[request.task]
    processes = Processes.current(device)
    device = processes.device or torch.device(device)
    if request.fsdp and processes.count == 1:
        raise WanError("A model is sharded over several processes, and this is the only one.", Hint.PROCESSES)
    base, clips = check(request, files)
    if files.clip and not variant.clip:
        hooks.tell(f"{files.clip.name} takes no part: {variant.display_name} hears no picture through CLIP.")
    _check_memory(request, base, variant, device)
    for folder in (request.out, request.cache or request.out):
        _make_folder(folder)
    check_writable(request.out / STATE)
    if request.restart and processes.first:
        forget(request.out)
    file = request.out / _result(request)
    if processes.first and not request.restart and not (request.out / STATE).exists() and (kept := set_aside(file)):
        hooks.tell(f"{file} of an earlier run is now {kept.name}.")
    processes.wait()
    hooks.before_load()
    data, wishes = prepare(request, clips, files, variant, device, torch.device(text_device), hooks)
    model, adapted = _model(request, base, device)
    recipe = Recipe(
        variant,
        _noise(request, variant),
        request.batch,
        request.caption_dropout,
        precision=request.precision,
        seed=request.seed,
        base=digest(*map(file_key, base.checkpoint.files)),
    )
    task = DiTTask(model, data, recipe, adapted=adapted, on_block=hooks.check)
    if wishes:
        task.sampler = _grids(request, task, wishes, files.vae)
    train(task, _plan(request, len(data.shapes)), request.out, on_step=hooks.on_step)
    task.save(file)
    processes.wait()
    return file


def _result(request: Request) -> str:
    return "lora.safetensors" if request.rank else "model.safetensors"


def _check_memory(request: Request, base: DiTFile, variant: Variant, device: torch.device) -> None:
    """Clips that no training here can hold: their pixels, and one block of the transformer.

    Raises:
        WanError: with what that takes, and what there is.
    """
    frame = request.frame
    pixels, memory = 3 * frame.frames * frame.height * frame.width * 4, total_bytes(torch.device("cpu"))
    what = f"training on {frame.width}x{frame.height} pixels and {frame.frames} frames"
    if pixels > memory:
        raise does_not_fit(what, pixels, memory, torch.device("cpu"))
    shape = (request.batch, *latent_shape(variant, frame.width, frame.height, frame.frames))
    taken = dit_activations(base.config, request.batch, tokens_of(shape), torch.bfloat16)
    memory = total_bytes(device)
    if taken > memory:
        raise does_not_fit(what, taken, memory, device, "Choose a smaller size, fewer frames or a smaller batch.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WanError(f"Cannot make the folder {folder} ({error.strerror}): choose another.") from error


def check(request: Request, files: TrainFiles) -> tuple[DiTFile, list[Clip]]:
    """What headers and the first frames of the clips tell, in seconds and before anything is loaded.

    Raises:
        WanError: a part of another model, quantised weights, a number, size or length that cannot be, a broken table,
            clips that cannot be used, or an output folder that holds another run or files that are not ours.
    """
    variant = VARIANTS[request.task]
    base = check_files(files, variant)
    check_trainable(base, whole=not request.rank)
    check_frame(request.frame, variant.size_multiple)
    _noise(request, variant)
    if request.rank:
        with torch.device("meta"):
            layers = find_targets(WanDiT(base.config), request.targets)
        most = max(max(layer.in_features, layer.out_features) for layer in layers.values())
        if request.rank > most:
            raise WanError(f"The LoRA rank is {request.rank}: expected {most} at most, the width of the widest layer.")
    check_folder(request.out, _result(request), samples=bool(request.sample_every))
    if not request.restart:
        check_resumable(request.out / STATE, _plan(request, 1), steps=bool(request.steps))
    clips = request.clips
    if isinstance(clips, Path):
        clips = read_folder(clips, request.frame, metadata=request.metadata, root=request.root)
    return base, usable(clips, lambda clip: clip.check(), skip_bad=request.skip_bad_clips)


def check_files(files: TrainFiles, variant: Variant) -> DiTFile:
    """
    Raises:
        WanError: parts of different models.
    """
    base, vae, text = read_dit(files.dit), read_vae(files.vae), read_text_encoder(files.text_encoder, files.tokenizer)
    check_variant(base.config, variant, files.dit)
    if variant.clip and files.clip is None:  # what learns without its picture would learn to do without it
        raise WanError(
            f"{variant.display_name} hears its picture through CLIP, whose model is missing: expected "
            f"{comfyui.CLIP_VISION} or {CLIP_CHECKPOINT}.",
            Hint.CLIP,
        )
    check_compatible(variant, base, vae, text, read_clip(files.clip) if variant.clip and files.clip else None)
    return base


def check_trainable(file: DiTFile, *, whole: bool) -> None:
    """Quantised weights are dequantised for a LoRA, which learns a little of how to mend their rounding.

    Raises:
        WanError: quantised weights that are to be trained themselves.
    """
    formats = sorted({info.format.name for info in file.checkpoint.tensors.values() if info.format})
    if formats and whole:
        raise WanError(
            f"{file.checkpoint.path} is quantised ({', '.join(formats)}): training a whole model needs the "
            "weights in bfloat16, float16 or float32. Choose such a file of the same model, or train a "
            "LoRA."
        )
    if formats:
        log.info(
            "wan_core: %s is quantised (%s) and will be dequantised: the training takes as much memory as on "
            "bfloat16 weights, and the LoRA suits these weights best.",
            file.checkpoint.path,
            ", ".join(formats),
        )


def prepare(
    request: Request,
    clips: Sequence[Clip],
    files: TrainFiles,
    variant: Variant,
    device: torch.device,
    text_device: torch.device,
    hooks: Hooks,
) -> tuple[Data, list[Wish]]:
    """Latents, CLIP tokens and text embeddings of all clips, on disk, and what samples are drawn from.

    The encoders are gone when this returns.
    """
    folder = request.cache or request.out / "cache"
    latents = Latents(
        Cache(folder / "latents"),
        lambda: load_vae(files.vae, device=device, dtype=torch.float32),
        file_key(files.vae),
        variant,
        hooks.check,
        clip=lambda: load_clip_vision(cast(Path, files.clip), device=device),
        clip_key=file_key(files.clip) if variant.clip and files.clip else "",
    )
    texts = Texts(
        Cache(folder / "texts"),
        lambda: load_text_encoder(files.text_encoder, tokenizer=files.tokenizer, device=text_device),
        file_key(files.text_encoder),
        hooks.check,
    )
    shapes: dict[str, tuple] = {}
    wanted = len({clip.key for clip in clips})

    def ready(clip: Clip) -> None:
        hooks.check()
        shapes[clip.key] = tuple(latents(clip).latent.shape)
        texts(clip.prompt)
        hooks.on_clip(len(shapes), wanted)

    _share(clips, ready)
    clips = usable(clips, ready, skip_bad=request.skip_bad_clips)
    empty, wishes = texts(""), _wishes(request, clips, shapes, latents, texts)
    hooks.tell(f"{len(clips)} clips are ready in {folder}.")
    latents.release()
    texts.release()
    gc.collect()
    empty_cache()
    rows = [clip for clip in clips for _ in range(request.repeat)]

    encoders = (latents.vae_key, texts.encoder_key, *filter(None, (latents.clip_key,)))
    key = digest(*(clip.key + clip.prompt for clip in rows), *encoders)
    return Data(
        lambda i: latents(rows[i]), lambda i: texts(rows[i].prompt), empty, [shapes[clip.key] for clip in rows], key
    ), wishes


def _share(clips: Sequence[Clip], ready: Callable[[Clip], None]) -> None:
    """With several processes, each encodes its share; afterwards all find everything in the cache."""
    processes = Processes.current()
    if processes.count == 1:
        return
    for clip in clips[processes.rank :: processes.count]:
        with suppress(ClipProblem):  # which all processes will tell alike
            ready(clip)
    processes.wait()


def _wishes(
    request: Request, clips: Sequence[Clip], shapes: dict[str, tuple], latents: Latents, texts: Texts
) -> list[Wish]:
    """The rows of the sample grids: the prompts asked for, or those of the first clips.

    I2V is shown the first clips' images, and so is TI2V where the prompt is the clip's own.
    """
    if not request.sample_every:
        return []
    longest = max(shapes.values(), key=lambda shape: shape[1])
    shown = [clip for clip in clips if shapes[clip.key] == longest]
    prompts = request.sample_prompts or [clip.prompt for clip in shown[:4]]
    frames = VARIANTS[request.task].image == "frame" and not request.sample_prompts
    wishes = []
    for i, prompt in enumerate(prompts):
        entry = latents(shown[i % len(shown)])
        wishes.append(Wish(prompt, texts(prompt), entry.inputs, entry.latent[:, :1] if frames else None))
    return wishes


def _grids(request: Request, task: DiTTask, wishes: Sequence[Wish], vae: Path) -> Grids:
    variant, device = task.recipe.variant, task.model.device
    guidance = variant.guidance.high if request.expert == "high" else variant.guidance.low
    how = Sampling(request.sample_steps, task.recipe.noise.shift, guidance, precision=task.precision)

    def decode(latents: torch.Tensor) -> torch.Tensor:
        decoder = load_vae(vae, device=device, dtype=torch.float32)
        return torch.cat([decoder.decode(latent).cpu() for latent in latents.split(1)])

    shape = max(task.data.shapes, key=lambda shape: shape[1])
    return Grids(task.model, wishes, task.data.empty, shape, how, variant, decode, request.seed)


def _model(request: Request, base: DiTFile, device: torch.device) -> tuple[TrainedDiT, dict[str, AdaptedLinear] | None]:
    dtype = resolve_dtype(request.dtype, device) if request.rank else torch.float32
    if dtype is torch.float16 and resolve_precision(request.precision, device) == "bf16":
        dtype = torch.bfloat16  # autocast computes in it, and does not take the other 16 bits
    if request.fsdp:
        model = load_sharded(base, Processes.current(), device)
    else:
        model = load_trained(base, device=device, dtype=dtype)
    adapted = None
    if request.rank:
        adapted = add_lora(model, request.rank, request.targets, alpha=request.alpha, seed=request.seed)
    if request.checkpointing:
        model.runner = CheckpointedRunner(offload=request.checkpoint_offload)
    return model, adapted


def _noise(request: Request, variant: Variant) -> NoiseRange:
    shift = variant.shift_for((request.frame.width, request.frame.height)) if request.shift is None else request.shift
    own = expert_range(variant, request.expert, shift)
    return NoiseRange(*request.boundaries, own.shift) if request.boundaries else own


def _plan(request: Request, clips: int) -> Plan:
    per_epoch = max(1, -(-clips // (request.batch * request.accumulate * Processes.current().count)))
    return Plan(
        request.steps or request.epochs * per_epoch,
        request.learning_rate,
        seed=request.seed,
        ema=request.ema,
        accumulate=request.accumulate,
        weight_decay=request.weight_decay,
        save_every=request.save_every,
        sample_every=request.sample_every,
    )
