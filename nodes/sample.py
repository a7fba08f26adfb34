"""Wan Sampler: the story of ``wan_core.pipeline`` with ComfyUI's latents, conditioning, progress and cancel."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io

from ..wan_core.config import PerExpert
from ..wan_core.errors import WanError
from ..wan_core.lookup import look_up
from ..wan_core.lora.balance import is_few_step, unbalanced
from ..wan_core.memory import capacity
from ..wan_core.memory.plan import Plan, check_fits
from ..wan_core.memory.run import denoise_in_memory
from ..wan_core.models.dit.features.clip_tokens import ClipTokens
from ..wan_core.recipe import ModelRecipe, check_guidance, told_of_guidance, working
from ..wan_core.sampling import raw as raws
from ..wan_core.sampling.denoise import Callbacks, Run
from ..wan_core.sampling.guidance import Condition, Side
from ..wan_core.sampling.presets import PRESETS, Preset, check_distilled, replaced, uneven
from ..wan_core.sampling.schedules import AUTO, SCHEDULES, Schedule, from_sigmas, schedule, truncate
from ..wan_core.sampling.solvers import SOLVERS, Fresh, step_seed
from . import host, official
from .base import WanNode
from .conditioning import conditions_of, side, warn_of_gaps, without_clip
from .graph import check_decoders
from .preview import Steps
from .spaces import check_numbers, samples_for
from .types import WanModel

log = logging.getLogger(__name__)

_LAST = 10000
NOT_CONNECTED = object()
CUSTOM = "custom"  # no preset


class Sampler(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreSampler",
            display_name="Wan Sampler",
            category="Wan 2.2/sampling",
            description="Turns noise into a latent video. With two experts one run goes through both.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model, or both experts joined by Wan Expert Switch."),
                io.Conditioning.Input("positive", tooltip="What the video shall show; for I2V with the image added."),
                io.Conditioning.Input("negative", tooltip="What it shall not show; unused where cfg is 1."),
                io.Latent.Input("latent", tooltip="An empty latent, a video to change, or a run to go on with."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Decides the noise. It is drawn on the CPU: a seed means the same video on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=1000,
                    tooltip=f"Steps of the whole schedule. Official: {official.STEPS}; 4 to 8 with a 4-step LoRA.",
                ),
                io.Float.Input(
                    "cfg_high",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip=f"Guidance of the high-noise expert. Official: {official.CFG_HIGH}. 1 turns guidance off "
                    "and halves the time.",
                ),
                io.Float.Input(
                    "cfg_low",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance of the low-noise expert, and of a model that has only one. Official: "
                    f"{official.CFG_LOW}. 1 turns guidance off and halves the time.",
                ),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip=f"Moves the steps towards noise. Official: {official.SHIFT}.",
                ),
                io.Combo.Input(
                    "solver",
                    options=list(SOLVERS),
                    default="unipc",
                    tooltip="unipc is the official default; dpm++ the official alternative; euler is what 4-step LoRAs "
                    "were made for; heun is more exact and takes twice the time; lcm noises anew at each step, as "
                    "FastWan, Self-Forcing and rCM were trained.",
                ),
                io.Combo.Input(
                    "schedule",
                    options=[AUTO, *SCHEDULES],
                    default=AUTO,
                    tooltip="Where the steps lie. auto: the official grid of the solver; simple: ComfyUI's; diffusers: "
                    "that of the library diffusers; the others belong to distilled models: choose their preset.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Below 1 the latent's content is kept in part: video to video.",
                ),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=_LAST,
                    tooltip="The first step to do, counted from 0. Above 0 the latent is what an earlier sampler "
                    "returned, or a video to be noised.",
                ),
                io.Int.Input(
                    "end_step",
                    default=_LAST,
                    min=1,
                    max=_LAST,
                    tooltip="Stop before this step and return the latent with the noise that is left in it, for "
                    "another sampler to go on with.",
                ),
                io.Boolean.Input(
                    "add_noise",
                    default=True,
                    tooltip="Off: the latent has its noise already, because an earlier sampler stopped at end_step.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels from ComfyUI's schedulers; they replace steps, shift and schedule.",
                ),
                io.Boolean.Input(
                    "force",
                    default=False,
                    optional=True,
                    tooltip="On: also what is refused as a likely mistake is sampled, such as a few steps at cfg 1 "
                    "with a 4-step LoRA on one expert only.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[CUSTOM, *PRESETS],
                    default=CUSTOM,
                    optional=True,
                    tooltip="Sets steps, cfg, shift, solver and schedule: the official settings of a model, or those "
                    "of a distilled model or LoRA. custom: as they are set above.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def check_inputs(
        cls,
        steps: int | None,
        shift: float | None,
        solver: str | None,
        schedule: str | None,
        denoise: float | None,
        start_step: int | None,
        end_step: int | None,
        sigmas: object = NOT_CONNECTED,
        preset: str | None = CUSTOM,
    ) -> None:
        known: Any = (0, steps, PerExpert(1, 1), shift, solver, schedule, denoise, start_step, end_step, True)
        values = Settings(*known)  # None: comes from a link
        if preset in PRESETS:
            values = values.under(PRESETS[preset])
        _check_settings(values, has_sigmas=sigmas is not NOT_CONNECTED)

    @classmethod
    def execute(
        cls,
        model: ModelRecipe,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        steps: int,
        cfg_high: float,
        cfg_low: float,
        shift: float,
        solver: str,
        schedule: str,
        denoise: float,
        start_step: int,
        end_step: int,
        add_noise: bool,
        sigmas: torch.Tensor | None = None,
        force: bool = False,
        preset: str = CUSTOM,
    ) -> io.NodeOutput:
        samples_for(latent, model.variant)
        check_decoders(cls.hidden.prompt, cls.hidden.unique_id, model.variant)
        guidance = PerExpert(low=cfg_low, high=cfg_high)
        settings = Settings(
            seed, steps, guidance, shift, solver, schedule, denoise, start_step, end_step, add_noise, sigmas, force
        )
        notes = Notes(model, cls.hidden.unique_id)
        if preset != CUSTOM:
            settings = _preset(preset, settings, model, notes)
        sampled = sample(model, positive, negative, latent, settings, notes)
        return io.NodeOutput(sampled, ui=host.text_output(notes.output))


@dataclass(frozen=True, eq=False)
class Settings:
    """The sampler's widgets; ``sigmas`` replace steps, shift and schedule."""

    seed: int
    steps: int
    guidance: PerExpert
    shift: float
    solver: str
    schedule: str
    denoise: float
    start: int
    end: int
    add_noise: bool
    sigmas: torch.Tensor | None = None
    force: bool = False

    def under(self, preset: Preset) -> Settings:
        """With what a preset sets."""
        shift = self.shift if preset.shift is None else preset.shift
        return replace(
            self,
            steps=preset.steps,
            guidance=preset.guidance,
            shift=shift,
            solver=preset.solver,
            schedule=preset.schedule,
        )

    def timetable(self) -> Schedule:
        if self.sigmas is not None:
            return truncate(from_sigmas(self.sigmas), self.denoise)
        return schedule(self.schedule, self.steps, self.shift, solver=self.solver, denoise=self.denoise)

    @property
    def from_pure_noise(self) -> bool:
        """Whether the run begins where nothing of the latent is left; the official code then takes noise alone."""
        return self.start == 0 and self.denoise > 0.9999 and self.sigmas is None


def _check_settings(settings: Settings, *, has_sigmas: bool) -> None:
    """Refuse at queue time what cannot be; a None comes from a link and is not known yet.

    Raises:
        WanError: an unknown solver or schedule, numbers out of range, a start past the end.
    """
    if settings.solver is not None:
        look_up(SOLVERS, settings.solver, "solver")
    if None in (settings.start, settings.end):
        return
    if settings.end <= settings.start or settings.start < 0:
        raise WanError(
            f"The start step is {settings.start} and the end step {settings.end}: nothing would be done. "
            "The end step must be after the start step, and the start step 0 or more."
        )
    if has_sigmas or None in (settings.steps, settings.shift, settings.solver, settings.schedule, settings.denoise):
        return
    steps = settings.timetable().steps
    if settings.start >= steps:
        raise WanError(
            f"The start step is {settings.start}, but the schedule has {steps} steps: expected 0 to {steps - 1}."
        )


def _preset(name: str, settings: Settings, model: ModelRecipe, notes: Notes) -> Settings:
    """The settings with what a preset sets; what it set is said on the node, and what of the widgets did not count."""
    preset = PRESETS[name]
    notes.noted(f"Preset {name}: {preset.described()}.")
    given = {
        "steps": settings.steps,
        "cfg_high": settings.guidance.high,
        "cfg_low": settings.guidance.low,
        "shift": settings.shift,
        "solver": settings.solver,
        "schedule": settings.schedule,
    }
    if others := replaced(preset, given):
        notes.warned(
            f"Preset {name} stands in place of {', '.join(f'{one} {value}' for one, value in others.items())}."
        )
    if settings.sigmas is not None:
        notes.warned(f"The sigmas that are connected stand in place of the steps, shift and schedule of {name}.")
    if stranger := preset.stranger(model.variant):
        notes.warned(f"Preset {name}: {stranger}")
    return settings.under(preset)


def sample(model: ModelRecipe, positive: list, negative: list, latent: dict, settings: Settings, notes: Notes) -> dict:
    """A LATENT -> the LATENT after the steps, both raw. Everything is checked before the first weight is read.

    Args:
        notes: take what is said of the run.

    Raises:
        WanError: what does not fit together.
    """
    device, kind = host.device(), model.variant.vae
    raw = samples_for(latent, model.variant)
    guided = settings.guidance.guided
    check_fits(model, raw.shape, device, prompts=2 if guided else 1, total=host.total_bytes(device))
    check_numbers(raw)
    raw = raw.cpu()
    timetable = settings.timetable()
    sides = {
        name: side(conditioning, name, model, raw.shape, device, settings.shift, notes.warned)
        for name, conditioning in (("positive", positive), ("negative", negative))
    }
    heard = sides if guided else {"positive": sides["positive"]}
    _check_clip(model, heard, notes)
    _check_loras(model, settings, timetable, notes)
    _check_steps(model, settings, timetable, notes)
    _check_cache(model, settings, timetable, notes)
    _check_guidance(model, settings, timetable, sides, notes)
    clean = raws.from_raw(raw, kind)
    _check_content(clean, latent, settings, timetable, notes)
    noise = _noise(settings.seed, latent, raw.shape)
    start = raws.first_sample(
        clean, noise, timetable, settings.start, add_noise=settings.add_noise, pure=settings.from_pure_noise
    )
    steps = min(settings.end, timetable.steps) - settings.start
    if model.low is None and model.variant.experts == 2 and steps == timetable.steps:
        notes.hinted(f"One expert of {model} does all {steps} steps. Join both with Wan Expert Switch.")
    known = raws.kept(latent.get("noise_mask"), clean, noise, model.variant)
    run = Run(
        timetable,
        settings.solver,
        sides["positive"],
        sides["negative"],
        known,
        settings.start,
        settings.end,
        model.step_cache,
        model.guidance,
        _fresh(settings.seed, latent, raw.shape),
    )
    warn_of_gaps(sides if model.guidance.nag else heard, run, notes.warned)
    with Steps(notes.node_id, model, settings.guidance, timetable, settings.start, settings.end) as shown:
        x = denoise_in_memory(
            host.engine(),
            model,
            settings.guidance,
            device,
            start,
            run,
            Callbacks(shown, shown.block, notes.planned, notes.warned, notes.hinted),
        )
    sampled = raws.stored(x, timetable, settings.end, kind)
    return latent | {"samples": sampled.to(host.storage_device())}


@dataclass(eq=False)
class Notes:
    """What is said of a run on the sampler's node: how it was made where that is not on the node, warnings, and its
    memory where a limit was asked for or ran out.
    """

    model: ModelRecipe
    node_id: str | None = None
    facts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    plan: str = ""

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (*self.facts, *self.hints, *self.warnings, self.plan)))

    @property
    def output(self) -> str:
        """What the node's output keeps: a hint is for whoever watches, and no result of the run."""
        matters = self.warnings or self.model.vram_limit is not None or self.model.swap_blocks
        return "\n".join(filter(None, (*self.facts, *self.warnings, self.plan if matters else "")))

    def planned(self, plan: Plan) -> None:
        log.info("Wan Sampler: %s", str(plan).replace("\n", "; "))
        if self.model.vram_limit is not None or self.model.swap_blocks or self.warnings or self.hints:
            self.plan = str(plan)
            host.show_text(self.node_id, self.text)

    def noted(self, fact: str) -> None:
        log.info("Wan Sampler: %s", fact)
        self.facts += (fact,)
        host.show_text(self.node_id, self.text)

    def hinted(self, note: str) -> None:
        log.warning("Wan Sampler: %s", note)
        self.hints += (note,)
        host.show_text(self.node_id, self.text)

    def warned(self, note: str) -> None:
        log.warning("Wan Sampler: %s", note)
        self.warnings += (note,)
        host.show_text(self.node_id, self.text)


def _check_clip(model: ModelRecipe, sides: Mapping[str, Side], notes: Notes) -> None:
    """Say where a model that hears pictures hears none."""
    bare = [name for name, one in sides.items() if not all(map(_hears_clip, conditions_of(one)))]
    if model.variant.clip and bare:
        notes.warned(without_clip(bare, model.variant))


def _hears_clip(condition: Condition) -> bool:
    return any(isinstance(one, ClipTokens) for one in condition.inputs)


def _check_content(clean: torch.Tensor, latent: dict, settings: Settings, timetable: Schedule, notes: Notes) -> None:
    """Say that a run which begins in the middle has nothing to begin with."""
    first = timetable.sigmas[min(settings.start, timetable.steps - 1)].item()
    if settings.from_pure_noise or first > _NEARLY_ALL:
        return
    if raws.free_content(clean, latent.get("noise_mask")) < _NOTHING:
        asked = f"denoise {settings.denoise:g}" if settings.start == 0 else f"start_step {settings.start}"
        notes.warned(
            f"Warning: the latent is empty, and {asked} keeps {1 - first:.0%} of it: the video will be grey "
            "or dull. Encode a video with Wan VAE Encode, connect the sampler before, or set denoise to 1 and "
            "start_step to 0."
        )


_NEARLY_ALL = 0.99  # of a sample that is noise: what is kept of the latent cannot be seen
_NOTHING = 1e-4  # of a normalised latent, whose values are about 1: less than this is rounding


def _check_loras(model: ModelRecipe, settings: Settings, timetable: Schedule, notes: Notes) -> None:
    """Few steps without guidance need their LoRA on both experts; one that lacks it leaves blurred noise.

    Raises:
        WanError: only one has one, and the user does not insist.
    """
    said = unbalanced(model)
    if said is None or timetable.steps > _FEW_STEPS:
        return
    bare = next(level for level in ("high", "low") if f"the {level}-noise expert (" in said)
    works = bare in working(model, timetable)[settings.start : settings.end]
    if not works or getattr(settings.guidance, bare) != 1:
        return
    found = f"{said} It cannot finish in {timetable.steps} steps at cfg 1"
    if not settings.force and timetable.steps >= _TRIAL:
        raise WanError(
            f"{found}. Set low_name of Wan LoRA to the other file of the pair, or raise steps and "
            f"cfg_{bare}; or switch force on to sample all the same."
        )
    notes.warned(f"Warning: {found}.")


def _check_cache(model: ModelRecipe, settings: Settings, timetable: Schedule, notes: Notes) -> None:
    """Say what a step cache will bring, where that is known.

    Raises:
        WanError: these steps cannot have one.
    """
    if model.step_cache is None:
        return
    experts = working(model, timetable)
    model.step_cache.check(timetable, settings.solver, experts)
    end = min(settings.end, timetable.steps)
    first = next((i for i in range(settings.start, end) if not model.guidance.rests(i)), settings.start)
    notes.hinted(model.step_cache.forecast(timetable, experts, first, end, model.guidance.turns(timetable)))


def _check_steps(model: ModelRecipe, settings: Settings, timetable: Schedule, notes: Notes) -> None:
    """Few steps that distilled models were not trained with: guidance, and an unequal share of two experts.

    Raises:
        WanError: guidance on a distilled model's own steps, and the user does not insist.
    """
    try:
        check_distilled(timetable, settings.solver, settings.guidance, pair=model.low is not None)
    except WanError as error:
        if not settings.force:
            raise WanError(f"{error} Or switch force on to sample all the same.") from error
        notes.warned(f"Warning: {error}")
    guided = settings.guidance.guided
    few = [use.file.path.name for use in model.loras if use.strength and is_few_step(use.file.path)]
    if guided and few and timetable.steps < _FEW_STEPS:
        notes.hinted(f"{few[0]} was trained without guidance, by its name: cfg 1 takes half the time.")
    if share := uneven(working(model, timetable), timetable):
        notes.noted(share)


def _check_guidance(
    model: ModelRecipe, settings: Settings, timetable: Schedule, sides: Mapping[str, Side], notes: Notes
) -> None:
    """Say what guidance rules bring, and where they do nothing.

    Raises:
        WanError: this run cannot have them.
    """
    if not model.guidance:
        return
    end = min(settings.end, timetable.steps)
    said = check_guidance(model, timetable, settings.guidance, settings.start, end)
    levels = timetable.sigmas[settings.start : end].tolist()
    said += model.guidance.check_sides(sides["positive"], sides["negative"], levels)
    for note in said:
        notes.warned(note)
    notes.hinted(f"Guidance: {told_of_guidance(model, timetable, settings.guidance, settings.start, end)}")


_FEW_STEPS = 10
_TRIAL = 4  # fewer steps give no finished video anyway: somebody tries something


def _noise(seed: int, latent: dict, shape: torch.Size) -> torch.Tensor:
    """Noise [B,C,T,h,w]; a latent that was picked out of a batch keeps the noise of its place there."""
    places = _places(latent, shape)
    capacity.check_tensor((max(places) + 1, *shape[1:]), "Noise")
    return raws.noise_of(seed, places, shape[1:])


def _fresh(seed: int, latent: dict, shape: torch.Size) -> Fresh:
    """The noise of each step, for solvers that noise anew."""
    places = _places(latent, shape)
    return lambda step: raws.noise_of(step_seed(seed, step), places, shape[1:])


def _places(latent: dict, shape: torch.Size) -> list[int]:
    """Of each video in its seed's batch."""
    places = latent.get("batch_index") or list(range(shape[0]))
    if len(places) != shape[0]:
        raise WanError(
            f"The latent holds {shape[0]} videos, but its batch_index names {len(places)}: "
            "the node before the sampler made a broken latent."
        )
    return places
