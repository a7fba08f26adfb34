"""What is rehearsed: whole runs of the pipeline, both autoencoders, the text encoder; each gives a row of figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import torch

from wan_core import pipeline
from wan_core.config import PATCH, VARIANTS, PerExpert
from wan_core.config import VAES as SPACES
from wan_core.loading.taehv import load_tiny_decoder
from wan_core.lora.files import read_lora
from wan_core.media.geometry import latent_shape
from wan_core.media.preview import Painter, moving_picture
from wan_core.memory.activations import vae_budget
from wan_core.memory.engine import Engine, largest_matrix, text_bytes
from wan_core.memory.plan import Plan, weights_of
from wan_core.models.dit.dit import Block
from wan_core.pipeline import Models, Request, generate
from wan_core.recipe import Loras, LoraUse, ModelRecipe
from wan_core.sampling.denoise import KnownLatent, StepReport
from wan_core.sampling.experts import Switch

from .files import ARCHITECTURES, Shelf
from .machine import Machine
from .tally import Counts

GB = 1e9
STEPS = 4  # of a run: the last is the third of its expert, when all is loaded
SIZES = {"720p": (1280, 720), "480p": (832, 480), "704p": (1280, 704)}


@dataclass(frozen=True)
class Run:
    """A run of the pipeline with few of the model's blocks, at a real size."""

    task: str
    size: str
    solver: str = "unipc"
    dtype: str = "bfloat16"
    stored: str = "bfloat16"
    layers: int = 1
    swap: int = 0
    limit: float | None = None  # GB
    image: bool = False
    end_image: bool = False
    lora: str = ""  # "added" or "merged"
    masked: bool = False  # half of the latent is known, with a soft edge
    previews: bool = False
    guided: bool = False  # both prompts
    kernels: bool = True  # the pack's own
    capability: tuple[int, int] = (9, 0)  # of the card: Hopper

    def __str__(self) -> str:
        said = [self.task, self.size, self.solver]
        said += [self.dtype if self.stored == "bfloat16" else f"{self.stored} in {self.dtype}"]
        said += ["guided"] * self.guided + [f"{self.layers} blocks"] * (self.layers > 1 and not self.swap)
        said += [f"{self.swap} of {self.layers} blocks streamed"] * bool(self.swap)
        said += [f"{self.limit} GB allowed"] * bool(self.limit)
        said += ["image"] * self.image + ["end image"] * self.end_image + [f"LoRA {self.lora}"] * bool(self.lora)
        said += ["compute capability {}.{}".format(*self.capability)] * (self.capability != (9, 0))
        said += [] if self.kernels else ["without Triton"]
        return ", ".join([*said, *["mask"] * self.masked, *["previews"] * self.previews])

    @property
    def latent(self) -> tuple[int, ...]:
        return (1, *latent_shape(VARIANTS[self.task], *SIZES[self.size], VARIANTS[self.task].frames))

    @property
    def tokens(self) -> int:
        _, _, t, h, w = self.latent
        return t * (h // PATCH[1]) * (w // PATCH[2])


RUNS = (
    Run("t2v-A14B", "720p", layers=2, guided=True),
    Run("t2v-A14B", "480p", guided=True),
    Run("t2v-A14B", "480p", kernels=False),
    Run("ti2v-5B", "704p", solver="euler"),
    Run("ti2v-5B", "704p", image=True, guided=True),
    Run("t2v-1.3B", "480p", solver="heun", guided=True),
    Run("i2v-A14B", "480p", solver="dpm++", image=True),
    Run("i2v-14B", "480p", image=True),
    Run("flf2v-14B", "480p", image=True, end_image=True),
    Run("t2v-A14B", "480p", dtype="fp8_e4m3fn"),
    Run("t2v-A14B", "480p", dtype="fp8_e4m3fn", kernels=False),
    Run("t2v-A14B", "480p", dtype="int8"),
    Run("t2v-A14B", "480p", dtype="int8", capability=(8, 9)),
    Run("t2v-A14B", "480p", stored="Q4_K"),
    Run("t2v-A14B", "480p", layers=3, swap=2, guided=True),
    Run("t2v-A14B", "480p", layers=3, limit=4.5, guided=True),
    Run("t2v-A14B", "480p", lora="added"),
    Run("t2v-A14B", "480p", lora="merged"),
    Run("t2v-1.3B", "480p", masked=True),
    Run("t2v-1.3B", "480p", previews=True),
)


@dataclass
class Watched:
    """What a run showed: counts of each step, of the last block, the plan, and the peak while sampling."""

    steps: list[Counts] = field(default_factory=list)
    block: Counts = field(default_factory=Counts)
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)  # what the user was told
    peak: int = 0
    beside: int = 0  # bytes of the other expert, which may stay while this one works
    missing: int = 0  # bytes of the blocks that the rehearsed model lacks, were they resident
    seconds: float = 0.0

    def row(self, run: Run) -> dict:
        """The figures of a run."""
        x = run.tokens * ARCHITECTURES[run.task].dim * 2
        step = self.steps[-2]  # between the reports of the last but two and the last but one: the last is computed
        planned, peak = self.plan.total, self.peak - self.beside
        return {
            "tokens": run.tokens,
            "block_kernels": self.block.kernels,
            "block_gb": self.block.moved / GB,
            "block_between_gb": self.block.between / GB,
            "block_between_x": self.block.between / x,
            "block_tflop": self.block.operations / 1e12,
            "waits": sum(step.waits.values()),
            "waits_where": dict(step.waits),
            "waits_behind": dict(step.behind),
            "waits_at_the_end": dict(self.steps[-1].waits),
            "uploads": step.uploads,
            "pageable_mb": step.pageable / 1e6,
            "peak_gb": peak / GB,
            "planned_gb": planned / GB,
            "over_plan_percent": 100 * (peak - planned) / (planned + self.missing),
        }


def rehearse(run: Run, shelf: Shelf, machine: Machine | None = None) -> Watched:
    """The whole pipeline: prompts, picture, sampling, decoding of the first frames.

    Raises:
        RuntimeError: tensors of two devices met.
    """
    machine, seen, began = (
        machine or Machine(kernels=run.kernels, capability=run.capability),
        Watched(),
        time.perf_counter(),
    )
    models, request = models_of(run, shelf), _request(run, shelf)
    with machine.running(), fresh_caches(), torch.no_grad(), ExitStack() as stack:
        engine = Engine()
        stack.enter_context(_block_counted(machine, seen))
        stack.enter_context(_sampling_watched(machine, seen, run))
        on_step = _stepper(machine, seen)
        paint = _painter(run, shelf, machine) if run.previews else None
        if paint:
            stack.callback(paint.close)
            seen.beside = machine.tally.live.now  # the decoder, which is the previews' and not the sampler's
        result = generate(
            models,
            request,
            engine,
            device=machine.device,
            on_step=lambda report: (on_step(report), paint and paint.offer(report.x0[0])),
        )
        assert result.latent.device.type == "cpu"
        engine.release()
    seen.seconds = time.perf_counter() - began
    return seen


def models_of(run: Run, shelf: Shelf) -> Models:
    variant = VARIANTS[run.task]
    high, low = (shelf.dit(run.task, run.layers, expert=name, stored=run.stored) for name in ("high", "low"))
    recipe = ModelRecipe(
        high,
        low if variant.experts == 2 else None,
        dtype=run.dtype if run.dtype != "bfloat16" or run.stored == "bfloat16" else "auto",
        switch=Switch("step", 1) if variant.experts == 2 else Switch(),
        swap_blocks=run.swap,
        vram_limit=run.limit,
        variant=variant,
    )
    if run.lora:
        use = LoraUse(read_lora(shelf.lora(run.task, run.layers), high), 1.0)
        recipe = replace(recipe, loras=Loras((use,), (use,)), merge_loras=run.lora == "merged")
    clip = shelf.clip() if ARCHITECTURES[run.task].features else None
    return Models(recipe, shelf.vae(run.task), shelf.text(layers=1), clip)


def _request(run: Run, shelf: Shelf) -> Request:
    return Request(
        "a cat",
        image=shelf.picture() if run.image else None,
        end_image=shelf.picture() if run.end_image else None,
        size=SIZES[run.size],
        steps=STEPS,
        solver=run.solver,
        guidance=None if run.guided else PerExpert(1.0, 1.0),
        vae_tile=None if run.image else 512,  # nothing is decoded; small devices must not be refused for it
        seed=1,
    )


def _stepper(machine: Machine, seen: Watched) -> Callable[[StepReport], None]:
    """Ends the counts of a step and begins the next one's."""
    tally = machine.tally
    counts = [tally.begin()]

    def on_step(report: StepReport) -> None:
        seen.steps.append(tally.end(counts[0]))
        counts[0] = tally.begin()

    return on_step


@contextmanager
def _block_counted(machine: Machine, seen: Watched) -> Iterator[None]:
    plain = Block.forward

    def forward(block: Block, *args, **kwargs):
        counts = machine.tally.begin()
        try:
            return plain(block, *args, **kwargs)
        finally:
            seen.block = machine.tally.end(counts)

    with mock.patch.object(Block, "forward", forward):
        yield


@contextmanager
def _sampling_watched(machine: Machine, seen: Watched, run: Run) -> Iterator[None]:
    """Sampling with an empty device at its beginning, so that its peak is the plan's."""
    plain, live = pipeline.denoise_in_memory, machine.tally.live

    def sample(engine: Engine, recipe: ModelRecipe, guidance: PerExpert, device, noise, walk, callbacks):
        engine.release("text", "vae", "clip")
        live.peak = live.now
        if run.masked:
            walk = replace(walk, known=_half_known(noise))
        callbacks = replace(
            callbacks, on_plan=lambda plan: setattr(seen, "plan", plan), on_note=lambda note: seen.notes.append(note)
        )
        result = plain(engine, recipe, guidance, device, noise, walk, callbacks)
        seen.peak = live.peak
        held = [entry.bytes for key, entry in engine._loaded.items() if key[0] == "dit"]
        seen.beside += sum(held) - max(held)
        seen.missing = _missing(run, recipe)
        return result

    with mock.patch.object(pipeline, "denoise_in_memory", sample):
        yield


def _missing(run: Run, recipe: ModelRecipe) -> int:
    if run.swap or run.limit:
        return 0
    weights = weights_of(recipe.high, recipe.dtype, torch.device("cuda", 0))
    return (ARCHITECTURES[run.task].layers - run.layers) * max(weights.blocks)


def _half_known(noise: torch.Tensor) -> KnownLatent:
    mask = torch.linspace(0, 1, noise.shape[-1]).expand(1, 1, 1, 1, -1)
    return KnownLatent(torch.zeros_like(noise), mask, noise)


def _painter(run: Run, shelf: Shelf, machine: Machine) -> Painter:
    channels = SPACES[VARIANTS[run.task].vae].channels
    decoder = load_tiny_decoder(shelf.tiny_decoder(channels), channels).to(machine.device)

    def paint(latent: torch.Tensor, about: object) -> None:
        moving_picture(latent, 16, 256, decoder)
        moving_picture(latent, 16, 256)

    return Painter(paint)


@contextmanager
def fresh_caches() -> Iterator[None]:
    """What the models keep between calls (rotation tables) belongs to a device, and each rehearsal has its own."""
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            if name.startswith(("wan_core.models", "wan_core.media", "wan_core.sampling", "wan_core.quant")):
                for item in list(vars(module).values()):
                    getattr(item, "cache_clear", lambda: None)()


# --- autoencoders


@dataclass(frozen=True)
class Coding:
    """A few frames through an autoencoder, as the command line does it."""

    task: str
    size: str
    tile: int | None = None
    latent_frames: int = 3

    def __str__(self) -> str:
        return f"{VARIANTS[self.task].vae} {self.size}, {f'tiles of {self.tile}' if self.tile else 'whole'}"


CODINGS = (
    Coding("t2v-A14B", "720p"),
    Coding("t2v-A14B", "720p", tile=512),
    Coding("ti2v-5B", "704p"),
    Coding("ti2v-5B", "704p", tile=512),
)


def decoded(coding: Coding, shelf: Shelf) -> dict:
    """Peak beside what the plan says, and what is copied for each latent frame."""
    machine, file = Machine(), shelf.vae(coding.task)
    width, height = SIZES[coding.size]
    stride = SPACES[file.config.kind].spatial_stride
    latent = torch.zeros(file.config.channels, coding.latent_frames, height // stride, width // stride)
    side = min(coding.tile or height, height), min(coding.tile or width, width)
    planned = vae_budget(file.config, *side).total
    with machine.running() as tally, fresh_caches(), torch.no_grad():
        counts, engine = tally.begin(), Engine()
        latent = latent.to(machine.device)
        engine.vae(file, machine.device, torch.float32)
        loaded = counts.pageable + counts.pinned
        for chunk in pipeline.decode(file, latent, engine, machine.device, tile=coding.tile):
            assert chunk.device.type == "cpu" and chunk.shape[2:] == (height, width)
        row = _coding_row(coding, tally.end(counts), loaded)
        return row | {"peak_gb": tally.live.peak / GB, "planned_gb": planned / GB}


def encoded(coding: Coding, shelf: Shelf) -> dict:
    machine, file = Machine(), shelf.vae(coding.task)
    width, height = SIZES[coding.size]
    frames = 4 * coding.latent_frames - 3
    models = Models(None, file, None)
    request = Request("", vae_tile=coding.tile)
    with (
        machine.running() as tally,
        fresh_caches(),
        torch.no_grad(),
        mock.patch.object(pipeline, "_room", lambda *_: float("inf")),
    ):
        counts, engine = tally.begin(), Engine()
        engine.vae(file, machine.device, torch.float32)
        loaded = counts.pageable + counts.pinned
        picture = torch.zeros(1, 3, 1, height, width, device=machine.device)
        chunks = iter([picture] + [picture.expand(1, 3, 4, height, width)] * (coding.latent_frames - 1))
        latent = pipeline._encode(models, request, engine, chunks, frames, (height, width), machine.device)
        assert latent.shape[2] == coding.latent_frames and latent.device == machine.device
        return _coding_row(coding, tally.end(counts), loaded) | {"peak_gb": tally.live.peak / GB}


def _coding_row(coding: Coding, counts: Counts, loaded: int) -> dict:
    each = coding.latent_frames * GB
    return {
        "kernels": counts.kernels,
        "gb_per_latent_frame": counts.moved / each,
        "up_gb_per_latent_frame": (counts.pageable + counts.pinned - loaded) / each,
        "down_gb_per_latent_frame": counts.down / each,
    }


# --- text


def prompt_encoded(shelf: Shelf, *, resident: bool) -> dict:
    """The figures of a prompt of 40 tokens through two blocks of umT5-XXL."""
    machine, file = Machine(), shelf.text(layers=2)
    size = text_bytes if resident else largest_matrix
    with machine.running() as tally, fresh_caches(), torch.no_grad():
        encoder = Engine().text_encoder(file, machine.device, torch.bfloat16, resident=resident)
        counts = tally.begin()
        states = encoder.encode_ids([list(range(2, 42))])
        assert states.device == machine.device
        tally.end(counts)
        return {
            "kernels": counts.kernels,
            "waits": sum(counts.waits.values()),
            "waits_where": dict(counts.waits),
            "peak_gb": tally.live.peak / GB,
            "planned_gb": size(file, machine.device, torch.bfloat16) / GB,
        }


TEXTS = {
    "umT5, resident": partial(prompt_encoded, resident=True),
    "umT5, streamed": partial(prompt_encoded, resident=False),
}
