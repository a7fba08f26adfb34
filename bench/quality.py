"""What is lost by what is saved: faster runs of the nano family, each beside fewer steps that are all computed.

A row's error is the distance of the final latents from those of the whole run, relative to them, over prompts that the
family was not trained on. Its speed is that of the steps: calls of the model in the whole run over those in this one.

To measure something else, write a function of ``GROUPS``: it yields ways, each of which changes the models, the
request, or both.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

import torch

from nano.judge import held_out_prompts
from nano.world import Scene
from wan_core.config import PerExpert
from wan_core.loading.dit import read_dit
from wan_core.loading.text import read_text_encoder
from wan_core.loading.vae import read_vae
from wan_core.memory.engine import Engine
from wan_core.pipeline import Models, Request, generate
from wan_core.recipe import ModelRecipe, pair
from wan_core.sampling.experts import Switch
from wan_core.sampling.magnitudes import Curve, curve
from wan_core.sampling.presets import PRESETS
from wan_core.sampling.step_cache import StepCache
from wan_core.tools.calibrate import calibrate

from . import document, guidance, weights
from .cpu import machine
from .plot import Point, svg

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "quality.json"
PICTURE = ROOT / "docs" / "images" / "quality.svg"
STEPS, FEWER = 40, (30, 24, 20, 16, 12, 8, 4, 2)
DENSE, CACHES, DISTILLED = "fewer steps, all computed", "step caches", "presets, model not distilled"
GUIDANCE = "guidance rules"
PARTS = ("rows", "guidance", "weights")
_SAVES = 1.05  # times as fast, from which guidance counts as a way to be faster
_BEGIN, _END = "<!-- quality: written by python -m bench quality -->", "<!-- end of quality -->"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setting:
    """What every way starts from."""

    models: Models
    request: Request
    quick: bool


@dataclass(frozen=True)
class Way:
    """One way to be faster: its name, the group it is drawn in, and what it changes."""

    name: str
    group: str
    models: Models
    changes: dict = field(default_factory=dict)  # of the request


@dataclass(frozen=True)
class Made:
    """A clip: its latent, its frames [3,F,H,W], and how often the model was called."""

    latent: torch.Tensor
    video: torch.Tensor
    calls: int


# --- the ways


def fewer_steps(setting: Setting) -> Iterator[Way]:
    for steps in (10,) if setting.quick else FEWER:
        yield Way(f"{steps} steps", DENSE, setting.models, {"steps": steps})


def step_caches(setting: Setting) -> Iterator[Way]:
    def way(cache: StepCache) -> Way:
        models = replace(setting.models, dit=replace(setting.models.dit, step_cache=cache))
        return Way(f"{cache.policy} {cache.amount:g}", CACHES, models)

    yield way(StepCache("every", 2))
    if setting.quick:
        return
    yield way(StepCache("every", 3))
    for threshold in (0.02, 0.05, 0.1, 0.2):
        yield way(StepCache("easy", threshold))
    curves = own_curves(setting)
    for threshold in (0.03, 0.06, 0.12):
        yield way(StepCache("magnitude", threshold, curves=curves))


def distilled_steps(setting: Setting) -> Iterator[Way]:
    """Presets as they are, without guidance, on a model that was not distilled: what distillation has to make up for.

    Those that noise anew end elsewhere by design: their distance from the whole run says nothing.
    """
    for name in () if setting.quick else ("LightX2V-4step", "rCM-T2V-4step-ODE"):
        preset = PRESETS[name]
        changes = {"steps": preset.steps, "solver": preset.solver, "schedule": preset.schedule}
        changes |= {"guidance": preset.guidance} | ({} if preset.shift is None else {"shift": preset.shift})
        yield Way(name, DISTILLED, setting.models, changes)


GROUPS: tuple[Callable[[Setting], Iterable[Way]], ...] = (fewer_steps, step_caches, distilled_steps)


def own_curves(setting: Setting) -> dict[str, Curve]:
    """Measured on a prompt that no row is measured on."""
    request = replace(setting.request, prompt=held_out_prompts(1, seed=31)[0][1])
    measured = calibrate(setting.models, request, device=CPU)
    names = ("high", "low")
    return {name: curve(list(one.sigmas), list(one.ratios)) for name, one in zip(names, measured, strict=True)}


# --- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--picture", type=Path, help="an SVG (default: the published one, with the published file)")
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts")
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--only", choices=PARTS, help="measure one part again; the others stay as the file has them")
    parser.add_argument("--quick", action="store_true", help="few steps, two ways: shows that the benchmark works")
    parser.add_argument("--family", type=Path, default=ROOT / "nano", help="folder of the files, laid out as ComfyUI's")


def run(options: argparse.Namespace) -> int:
    setting, scenes = begin(options), held_out_prompts(options.prompts)
    report = {"machine": machine(), "solver": options.solver, "steps": setting.request.steps, "prompts": len(scenes)}
    if options.only and options.out.exists():
        report = json.loads(options.out.read_text(encoding="utf-8")) | report
    if options.only in (None, "rows"):
        report["rows"] = list(faster(setting, [caption for _, caption in scenes]))
    if options.only in (None, "guidance"):
        report["guidance"] = list(guided(setting, scenes))
    if options.only in (None, "weights"):
        report["weights"] = list(quantised(setting, [caption for _, caption in scenes]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if picture := options.picture or (PICTURE if options.out == PUBLISHED else None):
        picture.write_text(svg(list(points(report)), DENSE), encoding="utf-8")
    if options.out == PUBLISHED:
        publish(report)
    return 0


def begin(options: argparse.Namespace) -> Setting:
    request = Request(
        "", " ", size=(64, 64), frames=17, steps=12 if options.quick else STEPS, shift=5.0, seed=7,
        solver=options.solver, guidance=PerExpert(3.0, 3.0),
    )  # fmt: skip
    return Setting(family(options.family), request, options.quick)


def faster(setting: Setting, prompts: Sequence[str]) -> Iterator[dict]:
    """The rows of ``GROUPS``."""
    whole = [made(setting.models, replace(setting.request, prompt=prompt)) for prompt in prompts]
    for way in (way for group in GROUPS for way in group(setting)):
        found = row(way, setting.request, prompts, whole)
        print("{group}: {way:24} {speed:.2f} times as fast, error {error:.4f}".format(**found), flush=True)
        yield found


def guided(setting: Setting, scenes: Sequence[tuple[Scene, str]]) -> Iterator[dict]:
    """The rows of guidance rules, see ``guidance``."""

    def draw(models: Models, prompt: str, scale: float) -> guidance.Clip:
        clip = made(models, replace(setting.request, prompt=prompt, guidance=PerExpert(scale, scale)))
        return guidance.Clip(clip.latent, clip.calls, clip.video)

    ways = guidance.WAYS[:4:3] if setting.quick else guidance.WAYS
    for found in guidance.rows(setting.models, scenes, draw, ways):
        yield found
        seen = f"{found['seen']} of {found['words']} words seen"
        print(f"{found['way']:60} {found['speed']:.2f} times as fast, {seen}, distance {found['distance']:.4f}")


def points(report: dict) -> Iterator[Point]:
    """What is drawn: of guidance, what saves calls on purpose; the other rules are meant to lead elsewhere."""
    for one in report.get("rows", ()):
        yield Point(one["way"], one["group"], one["speed"], one["error"])
    for one in report.get("guidance", ()):
        if one["speed"] > _SAVES:
            yield Point(_short(one["way"]), GUIDANCE, one["speed"], one["distance"])


def _short(rules: str) -> str:
    """``cfg 3, interval (sigma_start 1, sigma_end 0.5)`` -> ``cfg 3, interval to 0.5``; others without settings."""
    name, _, settings = rules.partition(" (")
    end = settings.partition("sigma_end ")[2].partition(")")[0]
    return f"{name} to {end}" if name.endswith("interval") else name


def row(way: Way, request: Request, prompts: Sequence[str], whole: Sequence[Made]) -> dict:
    found = [made(way.models, replace(request, prompt=prompt, **way.changes)) for prompt in prompts]
    pairs = list(zip(found, whole, strict=True))
    return {
        "way": way.name,
        "group": way.group,
        "speed": round(mean(all_.calls / one.calls for one, all_ in pairs), 3),
        "error": round(mean(((one.latent - all_.latent).norm() / all_.latent.norm()).item() for one, all_ in pairs), 4),
        "psnr": round(mean(psnr(one.video, all_.video) for one, all_ in pairs), 1),
    }


def quantised(setting: Setting, prompts: Sequence[str]) -> Iterator[dict]:
    """The rows of quantised weights, see ``weights``."""

    def latents(models: Models) -> list[torch.Tensor]:
        return [made(models, replace(setting.request, prompt=prompt)).latent for prompt in prompts]

    for found in weights.rows(setting.models, latents, weights.FORMATS[1:2] if setting.quick else weights.FORMATS):
        yield found
        print(f"{found['format']:40} {found['bits']:.2f} bits a number, error {found['error']:.4f}", flush=True)


def family(folder: Path) -> Models:
    """The T2V pair."""
    high, low = (
        ModelRecipe(read_dit(folder / f"diffusion_models/nano_t2v_{noise}_noise.safetensors"), dtype="float32")
        for noise in ("high", "low")
    )
    vae, text = folder / "vae/nano_vae16.safetensors", folder / "text_encoders/nano_umt5.safetensors"
    return Models(pair(high, low, Switch()), read_vae(vae), read_text_encoder(text))


def made(models: Models, request: Request) -> Made:
    calls: list[int] = []
    result = generate(models, request, Engine(), device=CPU, on_step=lambda report: calls.append(report.calls))
    return Made(result.latent, torch.cat(list(result.video()), dim=1), sum(calls))


def psnr(video: torch.Tensor, whole: torch.Tensor) -> float:
    """Decibels of videos in -1..1; 99 for equal ones."""
    error = (video - whole).square().mean().item()
    return 99.0 if error == 0 else min(10 * math.log10(4 / error), 99.0)


def publish(report: dict) -> None:
    lines = ["| | | times as fast | error | PSNR, dB |", "| --- | --- | ---: | ---: | ---: |"]
    rows = sorted(report["rows"], key=lambda row: row["speed"])
    lines += ["| {way} | {group} | {speed:.2f} | {error:.4f} | {psnr:.1f} |".format(**row) for row in rows]
    picture = f"![Speed against error](images/{PICTURE.name})\n\n"
    document.publish(picture + "\n".join(lines) + "\n", _BEGIN, _END)
    for part, publisher in (("guidance", guidance.publish), ("weights", weights.publish)):
        if part in report:
            publisher(report[part])
