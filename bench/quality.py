"""What is lost by what is saved: faster runs of the nano family, each beside fewer steps that are all computed.

A row's error is the distance of the final latents from those of the whole run, relative to them, over prompts that the
family was not trained on. Its speed is that of the steps: whole run over the steps in which the model is asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
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
from wan_core.sampling.step_cache import StepCache

from . import document, guidance, weights
from .cpu import machine

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "quality.json"
STEPS, FEWER = 40, (30, 24, 20, 16)
CACHES = (
    StepCache("every", 2),
    StepCache("every", 3),
    *(StepCache("easy", threshold) for threshold in (0.02, 0.05, 0.1, 0.2)),
)
PARTS = ("rows", "guidance", "weights")
_BEGIN, _END = "<!-- quality: written by python -m bench quality -->", "<!-- end of quality -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--prompts", type=int, default=4, help="held-out prompts")
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--quick", action="store_true", help="few steps, two ways: shows that the benchmark works")
    parser.add_argument("--only", choices=PARTS, help="measure one part again; the others stay as the file has them")
    parser.add_argument("--family", type=Path, default=ROOT / "nano", help="folder of the files, laid out as ComfyUI's")


def run(options: argparse.Namespace) -> int:
    models, scenes = family(options.family), held_out_prompts(options.prompts)
    steps = 12 if options.quick else STEPS
    report = {"machine": machine(), "solver": options.solver, "steps": steps, "prompts": len(scenes)}
    if options.only and options.out.exists():
        report = json.loads(options.out.read_text(encoding="utf-8")) | report
    if options.only in (None, "rows"):
        report["rows"] = list(faster(models, [caption for _, caption in scenes], steps, options))
    if options.only in (None, "guidance"):
        report["guidance"] = list(guided(models, scenes, steps, options))
    if options.only in (None, "weights"):
        report["weights"] = list(quantised(models, [caption for _, caption in scenes], steps, options))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.out == PUBLISHED:
        publish(report)
    return 0


def faster(models: Models, prompts: list[str], steps: int, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of fewer steps and of step caches."""
    engine, (fewer, caches) = Engine(), ((10,), CACHES[:1]) if options.quick else (FEWER, CACHES)
    whole = [latent(models, engine, prompt, steps, options.solver) for prompt in prompts]
    for row in ways(models, engine, prompts, whole, options.solver, fewer, caches, steps):
        yield row
        print(f"{row['way']:40} {row['speed']:.2f} times as fast, error {row['error']:.4f}", flush=True)


def guided(
    models: Models, scenes: Sequence[tuple[Scene, str]], steps: int, options: argparse.Namespace
) -> Iterator[dict]:
    """The rows of guidance rules, see ``guidance``."""
    engine = Engine()

    def draw(made: Models, prompt: str, scale: float) -> guidance.Clip:
        calls: list[int] = []
        made_of = request(prompt, steps, options.solver, scale)
        result = generate(
            made, made_of, engine, device=torch.device("cpu"), on_step=lambda report: calls.append(report.calls)
        )
        return guidance.Clip(result.latent, sum(calls), torch.cat(list(result.video()), dim=1))

    for row in guidance.rows(models, scenes, draw, guidance.WAYS[:4:3] if options.quick else guidance.WAYS):
        yield row
        seen = f"{row['seen']} of {row['words']} words seen"
        print(f"{row['way']:60} {row['speed']:.2f} times as fast, {seen}, distance {row['distance']:.4f}", flush=True)


def quantised(models: Models, prompts: Sequence[str], steps: int, options: argparse.Namespace) -> Iterator[dict]:
    """The rows of quantised weights, see ``weights``."""
    formats = weights.FORMATS[1:2] if options.quick else weights.FORMATS

    def latents(made: Models) -> list[torch.Tensor]:
        engine = Engine()
        return [latent(made, engine, prompt, steps, options.solver) for prompt in prompts]

    for row in weights.rows(models, latents, formats):
        yield row
        print(f"{row['format']:40} {row['bits']:.2f} bits a number, error {row['error']:.4f}", flush=True)


def family(folder: Path) -> Models:
    """The T2V pair."""
    high, low = (
        ModelRecipe(read_dit(folder / f"diffusion_models/nano_t2v_{noise}_noise.safetensors"), dtype="float32")
        for noise in ("high", "low")
    )
    vae, text = folder / "vae/nano_vae16.safetensors", folder / "text_encoders/nano_umt5.safetensors"
    return Models(pair(high, low, Switch()), read_vae(vae), read_text_encoder(text))


def ways(
    models: Models,
    engine: Engine,
    prompts: list[str],
    whole: list[torch.Tensor],
    solver: str,
    fewer: Sequence[int],
    caches: Sequence[StepCache],
    all_steps: int,
) -> Iterator[dict]:
    def row(way: str, made: Models, steps: int) -> dict:
        asked: list[int] = []
        found = [latent(made, engine, prompt, steps, solver, asked) for prompt in prompts]
        errors = [((one - all_).norm() / all_.norm()).item() for one, all_ in zip(found, whole, strict=True)]
        return {"way": way, "speed": round(all_steps / mean(asked), 3), "error": round(mean(errors), 4)}

    for steps in fewer:
        yield row(f"{steps} steps, all computed", models, steps)
    for cache in caches:
        cached = replace(models, dit=replace(models.dit, step_cache=cache))
        yield row(f"{all_steps} steps, step cache {cache.policy} {cache.amount:g}", cached, all_steps)


def latent(
    models: Models, engine: Engine, prompt: str, steps: int, solver: str, asked: list[int] | None = None
) -> torch.Tensor:
    """A clip's latent; how many steps were computed goes to ``asked``."""
    computed: list[bool] = []
    made = generate(
        models,
        request(prompt, steps, solver),
        engine,
        device=torch.device("cpu"),
        on_step=lambda report: computed.append(report.computed),
    )
    if asked is not None:
        asked.append(sum(computed))
    return made.latent


def request(prompt: str, steps: int, solver: str, scale: float = 3.0) -> Request:
    return Request(
        prompt,
        " ",
        size=(64, 64),
        frames=17,
        steps=steps,
        shift=5.0,
        seed=7,
        solver=solver,
        guidance=PerExpert(scale, scale),
    )


def publish(report: dict) -> None:
    lines = ["| | times as fast | error |", "| --- | ---: | ---: |"]
    rows = sorted(report["rows"], key=lambda row: row["speed"])
    lines += [f"| {row['way']} | {row['speed']:.2f} | {row['error']:.4f} |" for row in rows]
    document.publish("\n".join(lines) + "\n", _BEGIN, _END)
    guidance.publish(report["guidance"])
    weights.publish(report["weights"])
