"""The stages of the nano family: what each trains, for how long, from what, and the gate it must pass.

Stages build on each other: the dense ``pilot`` shows whether the world can be learnt at all, and its weights are where
every expert of the 16-channel models starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from wan_core.train.nano.prefixes import PlacedTask, PlaceTask

from wan_core.config import NEGATIVE_PROMPT, VAES, Architecture, VAEConfig, VAEKind, Variant
from wan_core.errors import WanError
from wan_core.loading.text import load_text_encoder
from wan_core.loading.vae import load_vae
from wan_core.media.geometry import latent_frames
from wan_core.train.cache import Cache, Entry, Latents, Texts, file_key
from wan_core.train.data import Clip, Frame
from wan_core.train.dit import Data, save_weights
from wan_core.train.dit import Recipe as DiTRecipe
from wan_core.train.loop import Plan, train
from wan_core.train.model import TrainedDiT, new_dit
from wan_core.train.objective import NoiseRange, expert_range
from wan_core.train.precision import resolve_precision
from wan_core.train.report import sample_grid
from wan_core.train.sample import Sampling
from wan_core.train.vae import Phase, VAERecipe, VAETask, calibrate, new_vae, reconstruct

from .dataset import RandomClips, scenes, subject, training_clips
from .evaluate import Rate
from .judge import ARRANGEMENTS, I2V, T2V, TI2V, VAE_STAGE, Judge, held_out_prompts
from .text import ReaderTask, make_tokenizer, new_encoder, save_encoder, tokenizer_of
from .world import FEW_LOOKS, MANY_LOOKS, Scene


@dataclass(frozen=True)
class Settings:
    """All that decides the result.

    Attributes:
        scale: of the steps of every stage: 1 is the full training, 0.01 tries the way.
    """

    frame: Frame = Frame(64, 64, 17)
    clips: int = 6000
    vae_dim: int = 12
    dim: int = 256
    ffn_dim: int = 512
    layers: int = 3
    shift: float = 5.0
    emphasis: float = 8.0
    batch: int = 24
    scale: float = 1.0
    seed: int = 0
    precision: str = "auto"

    def steps(self, full: int) -> int:
        return max(2, round(full * self.scale))


# The stages whose results are published, where those are not the first of their names.
LAST = {"vae16": "vae16_vivid", "vae48": "vae48_vivid", "ti2v": "ti2v_sharper"}


@dataclass(eq=False)
class Family:
    """The family in a working folder: finished stages lie there as float32 files, unfinished ones as states."""

    settings: Settings
    work: Path
    tell: Callable[[str], None] = print
    seconds: float | None = None  # for one stage

    def file(self, stage: str) -> Path:
        return self.work / stage / "model.safetensors"

    def done(self, stage: str) -> bool:
        return self.file(stage).is_file()

    def need(self, stage: str) -> Path:
        """Where a finished stage's weights lie.

        Raises:
            WanError: it is not finished.
        """
        if not self.done(stage):
            raise WanError(f"Stage {stage} is not finished. Run it: python -m nano --stages {stage}.")
        return self.file(stage)

    @cached_property
    def texts(self) -> Texts:
        file = self.need("text")
        kept = Cache(self.work / "cache" / "texts", dtype=torch.float16)
        return Texts(kept, lambda: load_text_encoder(file, dtype=torch.float32), file_key(file))

    @cached_property
    def clips(self) -> list[Clip]:
        return training_clips(self.settings.clips, self.settings.frame, self.settings.seed)

    @cached_property
    def scenes(self) -> dict[str, Scene]:
        """What the training clips show, by their keys."""
        rows = scenes(self.settings.seed, test=False)
        return {clip.key: scene for clip, (scene, _) in zip(self.clips, rows, strict=False)}

    def latents(self, variant: Variant) -> Latents:
        dtype = torch.bfloat16 if resolve_precision(self.settings.precision, "cpu") == "bf16" else torch.float32
        kept = Cache(self.work / "cache" / "latents", dtype=torch.float16)
        file = self.need(VAE_STAGE[variant.vae])
        return Latents(kept, lambda: load_vae(file, dtype=dtype), file_key(file), variant)

    def data(self, variant: Variant, clips: list[Clip]) -> Data:
        latents = self.latents(variant)
        latents.prepare(clips)
        first = latents(clips[0])
        frame, stride = self.settings.frame, VAES[variant.vae].spatial_stride
        kept: dict[int, Entry] = {}
        texts = cache(lambda words: self.texts(words))

        def entry(i: int) -> Entry:
            if i not in kept:
                kept[i] = replace(latents(clips[i]), subject=subject(self.scenes[clips[i].key], frame, stride))
            return kept[i]

        return Data(
            entry,
            lambda i: texts(clips[i].prompt),
            self.texts(""),
            [tuple(first.latent.shape)] * len(clips),
            f"{len(clips)} {clips[0].key} {latents.vae_key}",
            negative=self.texts(NEGATIVE_PROMPT),
        )

    def config(self, variant: Variant) -> Architecture:
        s = self.settings
        out = 48 if variant.vae == "wan2.2" else 16
        return Architecture(variant.in_channels, out, s.dim, s.ffn_dim, s.layers, 4096, 256, s.dim // 128)

    def dit(self, stage: str, variant: Variant) -> TrainedDiT:
        return self.filled(self.need(stage), variant)

    def filled(self, file: Path, variant: Variant) -> TrainedDiT:
        """A new model with another's weights; input channels that the other has not begin at zero."""
        model = new_dit(self.config(variant), self.settings.seed)
        weights = {key: tensor.float() for key, tensor in load_file(file).items()}
        patch = "patch_embedding.weight"
        missing = model.patch_embedding.weight.shape[1] - weights[patch].shape[1]
        if missing > 0:
            own = weights[patch]
            weights[patch] = torch.cat([own, own.new_zeros(len(own), missing, *own.shape[2:])], dim=1)
        model.load_state_dict(weights)
        return model

    def finish(self, stage: str, weights: dict[str, Tensor]) -> None:
        save_weights(weights, self.file(stage), "fp32", {})

    def judge(self, **stages: str) -> Judge:
        """The judge of the published parts; ``stages`` stand in for some of them, as ``vae16="vae16_decoder"``."""
        used = LAST | stages
        how = Sampling(shift=self.settings.shift, precision=resolve_precision(self.settings.precision, "cpu"))
        return Judge(lambda stage: self.need(used.get(stage, stage)), self.settings.frame, how)


def text(family: Family) -> bool:
    """Tokenizer and text encoder. Gate: a reader names 98 % of the words of held-out captions."""
    settings, folder = family.settings, family.work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    spiece = make_tokenizer()
    tokenizer = tokenizer_of(spiece)
    encoder = new_encoder(tokenizer.size, settings.seed)
    task = ReaderTask(encoder, tokenizer, settings.steps(2000), 32, settings.seed)
    if not walk(family, "text", task, Plan(settings.steps(2500), 3e-4, seed=settings.seed, weight_decay=0.0)):
        return False
    family.tell(f"text: {task.accuracy(300):.3f} of the words of held-out captions are read (gate 0.98)")
    save_encoder(encoder, spiece, family.file("text"), "fp32")
    return True


def curriculum(family: Family, images: float, short: float) -> tuple[Phase, ...]:
    """Single images until a part of the steps is done, five frames until another, whole films at the end."""
    frame = family.settings.frame
    return (
        Phase(images, 1, frame.width, 12),
        Phase(short, min(5, frame.frames), frame.width, 3),
        Phase(1.0, frame.frames, frame.width, 1),
    )


def vae(family: Family, stage: str, kind: VAEKind, channels: int, full_steps: int) -> bool:
    """An autoencoder. Gates: PSNR mean and worst, and shapes still told apart in the reconstructions."""
    settings, frame = family.settings, family.settings.frame
    config = VAEConfig(kind, channels, settings.vae_dim, settings.vae_dim)
    model = new_vae(config, settings.seed)
    steps = settings.steps(full_steps)
    recipe = VAERecipe(curriculum(family, 0.3, 0.7), steps, precision=settings.precision)
    task = VAETask(model, RandomClips(frame), f"world {frame}", recipe)
    task.sampler = lambda step, folder: _vae_samples(family, task, step, folder)
    plan = Plan(steps, 2e-3, seed=settings.seed, optimiser="muon", weight_decay=0.0, ema=0.995, sample_every=1000)
    if not walk(family, stage, task, plan):
        return False
    model.eval().requires_grad_(False)
    calibrate(model, [family.judge().film(scene)[None] for scene, _ in held_out_prompts(24, seed=77)])
    family.finish(stage, model.state_dict())
    vae_gate(family, stage, kind)
    return True


def vae_decoder(
    family: Family,
    stage: str,
    start: str,
    kind: VAEKind,
    channels: int,
    full: int,
    looks: tuple[float, ...] = FEW_LOOKS,
    vivid: float = 0.0,
) -> bool:
    """The decoder goes on alone: what transformers learnt of the latents stays true. Gates as of the whole."""
    settings, frame = family.settings, family.settings.frame
    model = new_vae(VAEConfig(kind, channels, settings.vae_dim, settings.vae_dim), settings.seed)
    model.load_state_dict({key: tensor.float() for key, tensor in load_file(family.need(start)).items()})
    model.encoder.requires_grad_(False)
    model.conv1.requires_grad_(False)
    steps = settings.steps(full)
    recipe = VAERecipe(curriculum(family, 0.5, 0.8), steps, precision=settings.precision)
    task = VAETask(model, RandomClips(frame, looks, vivid), f"world {frame} {looks} {vivid}", recipe)
    plan = Plan(steps, 5e-4, seed=settings.seed + 1, optimiser="muon", weight_decay=0.0, ema=0.99)
    if not walk(family, stage, task, plan):
        return False
    family.finish(stage, model.state_dict())
    vae_gate(family, stage, kind)
    return True


def vae_gate(family: Family, stage: str, kind: VAEKind, count: int = 40) -> None:
    values, rates = family.judge(**{VAE_STAGE[kind]: stage}).reconstruction(kind, count)
    wanted = "30 / 24" if kind == "wan2.1" else "27 / 22"
    family.tell(
        f"{stage}: PSNR {sum(values) / count:.1f} dB, worst {min(values):.1f} (gate {wanted}); of the "
        f"reconstructions {_rates(rates)} (gate: shape 0.9)"
    )


def _vae_samples(family: Family, task: VAETask, step: int, folder: Path) -> None:
    clips = [family.judge().film(scene) for scene, _ in held_out_prompts(4)]
    rows = [row for clip in clips for row in (clip, reconstruct(task.vae, clip))]
    sample_grid(rows, folder / f"samples-{step:06d}.png")


def overfit(family: Family) -> bool:
    """Gate: a dense model learns 16 clips with the right motion."""
    clips = [clip for clip in family.clips if family.scenes[clip.key].camera == "fixed"][:16]
    wanted = [(family.scenes[clip.key], clip.prompt) for clip in clips]
    model = family.dit("place", T2V)
    recipe = DiTRecipe(
        T2V, NoiseRange(0, 1, family.settings.shift), batch=16, caption_dropout=0.1, precision=family.settings.precision
    )
    task = PlacedTask(model, family.data(T2V, clips), recipe)
    if not walk(family, "overfit", task, dit_plan(family.settings, 600)):
        return False
    family.finish("overfit", model.state_dict())
    seen = family.judge().words("overfit", "overfit", T2V, wanted, seeds=(0,))
    family.tell(f"overfit: of 16 clips {_rates(seen.rates)} (gate: motion 0.9)")
    return True


def place(family: Family, stage: str, variant: Variant) -> bool:
    """The first blocks learn where a token is. Gate: 95 % of rows and columns are named."""
    settings, frame = family.settings, family.settings.frame
    model = new_dit(family.config(variant), settings.seed)
    stride = VAES[variant.vae].spatial_stride
    shape = (model.config.out_channels, latent_frames(frame.frames), frame.height // stride, frame.width // stride)
    task = PlaceTask(model, shape, family.texts(""), precision=settings.precision)
    plan = Plan(settings.steps(600), 1e-3, seed=settings.seed, optimiser="muon", warmup=30, weight_decay=0.0)
    if not walk(family, stage, task, plan):
        return False
    family.tell(f"{stage}: {task.accuracy():.3f} of rows and columns are named (gate 0.95)")
    family.finish(stage, model.state_dict())
    return True


def dit_stage(
    family: Family,
    stage: str,
    variant: Variant,
    noise: NoiseRange,
    full_steps: int,
    start: str | None,
    *,
    image_dropout: float = 0.3,
) -> bool:
    """A transformer on the whole data set."""
    model = family.dit(start, variant) if start else new_dit(family.config(variant), family.settings.seed)
    settings = family.settings
    recipe = DiTRecipe(
        variant,
        noise,
        settings.batch,
        image_dropout=image_dropout,
        emphasis=settings.emphasis,
        precision=settings.precision,
    )
    clips = family.clips[: len(family.clips) // 2] if variant.image == "channels" else family.clips
    task = PlacedTask(model, family.data(variant, clips), recipe)
    plan = dit_plan(family.settings, full_steps)
    task.sampler = lambda step, folder: _dit_samples(family, model, step, folder)
    if stage != "pilot":
        plan = replace(plan, sample_every=0)
    if not walk(family, stage, task, plan):
        return False
    family.finish(stage, model.state_dict())
    return True


def pilot(family: Family) -> bool:
    """A dense 16-channel model. Gate: motion of held-out prompts at 0.4 or more."""
    if not dit_stage(family, "pilot", T2V, NoiseRange(0, 1, family.settings.shift), 1500, "place"):
        return False
    pilot_gate(family)
    return True


def pilot_gate(family: Family, count: int = 100) -> None:
    seen = family.judge().words("pilot", "pilot", T2V, held_out_prompts(count), seeds=(0,))
    family.tell(f"pilot: {_rates(seen.rates)} (gate: motion 0.4)")


def dit_plan(settings: Settings, full_steps: int) -> Plan:
    return Plan(
        settings.steps(full_steps),
        1e-3,
        seed=settings.seed,
        optimiser="muon",
        ema=0.998,
        warmup=50,
        weight_decay=0.01,
        sample_every=1000,
    )


def _dit_samples(family: Family, model: TrainedDiT, step: int, folder: Path) -> None:
    judge, rows = family.judge(), held_out_prompts(6)
    judge.dit = lambda stage: model
    videos = [video for video, _ in judge.clips("it", "it", T2V, rows, 1)]
    sample_grid(videos, folder / f"samples-{step:06d}.png", captions=[words for _, words in rows])


def walk(family: Family, stage: str, task, plan: Plan) -> bool:
    """Train a stage, or go on with it; a line every now and then."""
    every = max(1, plan.steps // 50)

    def tell(report) -> None:
        if report.step % every == 0 or report.step == report.steps:
            family.tell(f"{stage}: step {report.step} of {report.steps}, loss {report.loss:.4f}")

    return train(task, plan, family.work / stage, on_step=tell, seconds=family.seconds)


def _rates(rates: dict[str, Rate]) -> str:
    return ", ".join(f"{word} {rate}" for word, rate in rates.items())


def _expert(stage: str, variant: Variant, expert: str, steps: int, start: str | None) -> Callable[[Family], bool]:
    return lambda family: dit_stage(
        family, stage, variant, expert_range(variant, expert, family.settings.shift), steps, start
    )


def gated(train_it: Callable[[Family], bool], which: str) -> Callable[[Family], bool]:
    """A stage, and when it is done the gate of its models."""

    def run(family: Family) -> bool:
        done = train_it(family)
        if done:
            GATES[which](family)
        return done

    return run


def t2v_gate(family: Family, count: int = 100) -> None:
    """The pair on held-out prompts, beside each expert alone and the two exchanged."""
    judge = family.judge()
    for name, experts in ARRANGEMENTS.items():
        seen = judge.words(*experts, T2V, held_out_prompts(count), seeds=(0,))
        family.tell(f"t2v, {name}: {_rates(seen.rates)}; words {seen.share}; explained {seen.explained} dB")
    family.tell("t2v: gate: colour 0.85, ground 0.9, motion 0.6, shape 0.6; the others worse than the pair")


def i2v_gate(family: Family, count: int = 60) -> None:
    seen = family.judge().animated("i2v_high", "i2v_low", I2V, held_out_prompts(count, fixed=True), seeds=(0,))
    family.tell(f"i2v: first frame {seen.first} dB (gate 25), motion {seen.motion} (gate 0.6)")


def ti2v_gate(family: Family, count: int = 60) -> None:
    judge = family.judge()
    seen = judge.words("ti2v", "ti2v", TI2V, held_out_prompts(count), seeds=(0,))
    family.tell(f"ti2v: from text {_rates(seen.rates)}")
    moved = judge.animated("ti2v", "ti2v", TI2V, held_out_prompts(count, fixed=True), seeds=(0,))
    family.tell(f"ti2v: first frame {moved.first} dB (gate 25), motion {moved.motion} (gate 0.6)")


GATES = {"t2v": t2v_gate, "i2v": i2v_gate, "ti2v": ti2v_gate}


def ti2v_more(family: Family, stage: str, start: str, shift: float, steps: int) -> bool:
    """More of the lower noise levels, where shapes form, and of clips from text alone."""
    return dit_stage(family, stage, TI2V, NoiseRange(0, 1, shift), steps, start, image_dropout=0.6)


STAGES: dict[str, Callable[[Family], bool]] = {
    "text": text,
    "vae16": lambda family: vae(family, "vae16", "wan2.1", 16, 3000),
    "vae48": lambda family: vae(family, "vae48", "wan2.2", 48, 3000),
    "vae16_decoder": lambda family: vae_decoder(family, "vae16_decoder", "vae16", "wan2.1", 16, 1500),
    "vae48_decoder": lambda family: vae_decoder(family, "vae48_decoder", "vae48", "wan2.2", 48, 1500),
    "vae16_looks": lambda family: vae_decoder(
        family, "vae16_looks", "vae16_decoder", "wan2.1", 16, 600, MANY_LOOKS),
    "vae48_looks": lambda family: vae_decoder(
        family, "vae48_looks", "vae48_decoder", "wan2.2", 48, 600, MANY_LOOKS),
    "vae16_vivid": lambda family: vae_decoder(
        family, "vae16_vivid", "vae16_looks", "wan2.1", 16, 400, MANY_LOOKS, 0.5),
    "vae48_vivid": lambda family: vae_decoder(
        family, "vae48_vivid", "vae48_looks", "wan2.2", 48, 400, MANY_LOOKS, 0.5),
    "place": lambda family: place(family, "place", T2V),
    "place48": lambda family: place(family, "place48", TI2V),
    "overfit": overfit,
    "pilot": pilot,
    "t2v_high": _expert("t2v_high", T2V, "high", 800, "pilot"),
    "t2v_low": gated(_expert("t2v_low", T2V, "low", 4000, "pilot"), "t2v"),
    "i2v_high": _expert("i2v_high", I2V, "high", 600, "t2v_high"),
    "i2v_low": gated(_expert("i2v_low", I2V, "low", 1200, "t2v_low"), "i2v"),
    "ti2v": _expert("ti2v", TI2V, "only", 2500, "place48"),
    "ti2v_fine": lambda family: ti2v_more(family, "ti2v_fine", "ti2v", 2.0, 3000),
    "ti2v_sharp": lambda family: ti2v_more(family, "ti2v_sharp", "ti2v_fine", 1.0, 8000),
    "ti2v_sharper": gated(lambda family: ti2v_more(family, "ti2v_sharper", "ti2v_sharp", 1.0, 8000), "ti2v"),
}  # fmt: skip
