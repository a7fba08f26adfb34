"""A whole training of a transformer from a request: what the command line and the node both call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.folder import find_parts
from ..config import VARIANTS, Variant
from ..dtypes import resolve_dtype
from ..errors import WanError
from ..models.load_dit import read_dit
from ..models.load_vae import load_vae
from ..models.text_encoder import load_text_encoder
from ..video import check_writable
from .cache import Cache, Latents, Texts, digest, file_key
from .data import Clip, Frame, check_frame, read_folder, usable
from .dit import Data, DiTTask, Recipe
from .loop import Plan, StepReport, train
from .lora import TARGETS, add_lora
from .model import checkpoint_blocks, load_trained
from .objective import NoiseRange, expert_range
from .parallel import Processes


@dataclass(frozen=True)
class TrainFiles:
    """What a training reads: checkpoints of one variant. ``dit`` is the expert to train."""

    dit: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Request:
    """What to train, on what, and where to.

    Attributes:
        clips: a folder with metadata.csv, or clips of a Python data set.
        rank: of the LoRA; 0 trains all weights.
        boundaries: of the noise levels, as fractions of the timesteps; None is the expert's own.
        steps: 0 takes ``epochs`` instead.
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
    cache: Path | None = None


def experts_of(variant: Variant) -> tuple[str, ...]:
    return ("only",) if variant.boundary is None else ("high", "low")


def files_in(folder: Path, task: str, expert: str) -> TrainFiles:
    """The parts of a checkpoint folder, the wanted expert among them.

    Raises:
        WanError: a part is missing; no such expert.
    """
    variant = VARIANTS[task]
    if expert not in experts_of(variant):
        raise WanError(f"{variant.display_name} has no expert {expert!r}: choose --expert "
                       f"{' or '.join(experts_of(variant))}.")
    parts = find_parts(folder, variant)
    dit = parts.low if expert == "low" else parts.high
    return TrainFiles(dit, parts.vae, parts.text_encoder, parts.tokenizer)


def run(
    request: Request,
    files: TrainFiles,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepReport], None] | None = None,
    tell: Callable[[str], None] = print,
) -> Path:
    """Train, or go on with what ``request.out`` holds, and return the file that was written.

    Raises:
        WanError: see ``read_folder``, ``usable``, ``loop.train`` and the loaders; found before the first step.
    """
    variant = VARIANTS[request.task]
    device = Processes.current().device or torch.device(device)
    check_frame(request.frame, variant.size_multiple)
    noise = _noise(request, variant)
    request.out.mkdir(parents=True, exist_ok=True)
    check_writable(request.out / "state.pt")
    data = prepare(request, files, variant, device, tell)
    dtype = resolve_dtype(None, device) if request.rank else torch.float32
    model = load_trained(read_dit(files.dit), device=device, dtype=dtype)
    adapted = None
    if request.rank:
        adapted = add_lora(model, request.rank, request.targets, alpha=request.alpha, seed=request.seed)
    if request.checkpointing:
        checkpoint_blocks(model, offload=request.checkpoint_offload)
    recipe = Recipe(variant, noise, request.batch, request.caption_dropout, precision=request.precision)
    task = DiTTask(model, data, recipe, adapted=adapted)
    train(task, _plan(request, len(data.shapes)), request.out, on_step=on_step)
    file = request.out / ("lora.safetensors" if request.rank else "model.safetensors")
    if Processes.current().first:
        task.save(file)
    return file


def prepare(
    request: Request, files: TrainFiles, variant: Variant, device: torch.device, tell: Callable[[str], None]
) -> Data:
    """Latents and text embeddings of all clips, on disk; the encoders are gone when this returns."""
    folder = request.cache or request.out / "cache"
    clips = request.clips
    if isinstance(clips, Path):
        clips = read_folder(clips, request.frame, metadata=request.metadata)
    latents = Latents(Cache(folder / "latents"), lambda: load_vae(files.vae, device=device, dtype=torch.float32),
                      file_key(files.vae), variant)  # fmt: skip
    texts = Texts(Cache(folder / "texts"), lambda: load_text_encoder(files.text_encoder, tokenizer=files.tokenizer),
                  file_key(files.text_encoder))  # fmt: skip
    shapes: dict[str, tuple] = {}

    def ready(clip: Clip) -> None:
        shapes[clip.key] = tuple(latents(clip).latent.shape)
        texts(clip.prompt)

    clips = usable(clips, ready, skip_bad=request.skip_bad_clips)
    empty = texts("")
    tell(f"{len(clips)} clips are ready in {folder}.")
    latents.release(), texts.release()
    rows = [clip for clip in clips for _ in range(request.repeat)]

    key = digest(*(clip.key + clip.prompt for clip in rows), latents.vae_key, texts.encoder_key)
    return Data(lambda i: latents(rows[i]), lambda i: texts(rows[i].prompt), empty,
                [shapes[clip.key] for clip in rows], key)  # fmt: skip


def _noise(request: Request, variant: Variant) -> NoiseRange:
    own = expert_range(variant, request.expert, request.shift)
    return NoiseRange(*request.boundaries, own.shift) if request.boundaries else own


def _plan(request: Request, clips: int) -> Plan:
    per_epoch = max(1, -(-clips // (request.batch * request.accumulate * Processes.current().count)))
    return Plan(
        request.steps or request.epochs * per_epoch, request.learning_rate, seed=request.seed, ema=request.ema,
        accumulate=request.accumulate, weight_decay=request.weight_decay, save_every=request.save_every,
        sample_every=request.sample_every,
    )  # fmt: skip
