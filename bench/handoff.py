"""One sampler over both experts beside two samplers that hand over: how far each ends from a 200-step reference.

A sampler of higher order goes by what it saw at earlier steps. ComfyUI's usual way with a pair, two KSamplerAdvanced,
begins the low-noise half without that; one KSampler over Wan as ComfyUI MODEL does not. Both run here on a real server
from the same noise, along the same sigmas, and change experts at the same step; euler, which remembers nothing, is the
control: there both ways must end in the same place.

ComfyUI's KSampler leaves out the last sigma but one for UniPC, so that its last step is a long one; through
SamplerCustomAdvanced the same sampler takes the sigmas as they are. Both are measured, and our own sampler beside them.

A coarse schedule has no step at the very boundary. What is measured is the solver's error and not where a schedule
happens to put its steps, so that a reference changes experts at the noise level at which the coarse run does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from nano.judge import Mean, held_out_prompts
from scripts.comfy_server import Client, Server, make_base
from wan_core.config import TRAIN_STEPS, VARIANTS
from wan_core.models.vae.vae import normalise
from wan_core.sampling.schedules import schedule

from .cpu import machine

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "handoff.json"
KSAMPLER, CUSTOM, WAN = "KSampler", "SamplerCustomAdvanced", "Wan Sampler"
CASES = (
    (KSAMPLER, "euler"), (KSAMPLER, "uni_pc"), (KSAMPLER, "uni_pc_bh2"), (KSAMPLER, "dpmpp_2m"), (CUSTOM, "uni_pc"),
    (CUSTOM, "uni_pc_bh2"), (WAN, "unipc"), (WAN, "dpm++"),
)  # fmt: skip
NEXT_TO_LAST_LEFT_OUT = ("uni_pc", "uni_pc_bh2")  # KSampler lays out one step more for these and skips the last but one
SHIFT, CFG = 5.0, 3.0
VARIANT = VARIANTS["t2v-A14B"]
METHOD = (
    "Relative RMS distance of the final normalised latent from the reference: heun, simple, 200 steps, through Wan as "
    "ComfyUI MODEL, same noise, experts changed at the same noise level. one: a sampler over both experts; two: a "
    "sampler over each, the noisy latent handed over at the same step (KSamplerAdvanced and SamplerCustomAdvanced over "
    f"two UNETLoaders, Wan Sampler over two Load Wan Model). Scheduler simple, shift {SHIFT:g}, cfg {CFG:g}, float32. "
    "Mean and standard error over seeds; each seed has a prompt of its own."
)


Case = tuple[str, str, int]  # node, sampler, steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    family = ROOT / "nano"
    parser.add_argument("--high", type=Path, default=family / "diffusion_models/nano_t2v_high_noise.safetensors")
    parser.add_argument("--low", type=Path, default=family / "diffusion_models/nano_t2v_low_noise.safetensors")
    parser.add_argument("--text-encoder", type=Path, default=family / "text_encoders/nano_umt5.safetensors")
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 30])
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--note", default="", help="what the files are, for the report")


def run(options: argparse.Namespace) -> int:
    distances: dict[tuple[Case, str], list[float]] = {}
    with TemporaryDirectory() as folder, serve(Path(folder), options) as server:
        for seed, (_, prompt) in enumerate(held_out_prompts(options.seeds)):
            for case, found in measure(server, options, seed, prompt):
                distances.setdefault(case, []).append(found)
            print(f"seed {seed + 1} of {options.seeds}", flush=True)
    rows = summarise(distances)
    print(table(rows))
    report = {
        "machine": machine(),
        "method": METHOD,
        "note": options.note,
        "seeds": options.seeds,
        "files": [options.high.name, options.low.name],
        "size": [options.size, options.size, options.frames],
        "reference_steps": options.reference_steps,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def serve(folder: Path, options: argparse.Namespace) -> Server:
    """A ComfyUI with the pack and the three files, under names that say which is which."""
    comfyui = Path(os.environ.get("COMFYUI_PATH") or max((ROOT / ".cache").glob("comfyui-*")))
    base = make_base(folder, comfyui, ROOT)
    files = {
        "diffusion_models/high_noise": options.high,
        "diffusion_models/low_noise": options.low,
        "text_encoders/text": options.text_encoder,
    }
    for name, file in files.items():
        place = base / "models" / f"{name}.safetensors"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file.resolve(strict=True))
    return Server.start(sys.executable, comfyui, base, "--cpu", "--disable-api-nodes", timeout=1800)


def measure(
    server: Server, options: argparse.Namespace, seed: int, prompt: str
) -> Iterator[tuple[tuple[Case, str], float]]:
    """Case and way ("one" or "two"), distance from the reference."""
    graph = Samples(options, seed, prompt)
    cases = [(*case, steps) for case in CASES for steps in options.steps]
    for level in {change(*case) for case in cases}:
        graph.save(f"reference-{level:.5f}", graph.reference(level, options.reference_steps))
    for node, sampler, steps in cases:
        one, two = graph.ways[node]
        graph.save(f"one-{node}-{sampler}-{steps}", one(sampler, steps))
        graph.save(f"two-{node}-{sampler}-{steps}", two(sampler, steps))
    client = Client(server.url, server.check)
    done = client.run(graph.nodes, timeout=24 * 3600)
    if not done.ok:
        raise SystemExit(f"ComfyUI could not run it: {done.error}\n{server.tail()}")
    for node, sampler, steps in cases:
        reference = read(server, seed, f"reference-{change(node, sampler, steps):.5f}")
        for way in ("one", "two"):
            made = read(server, seed, f"{way}-{node}-{sampler}-{steps}")
            yield ((node, sampler, steps), way), distance(made, reference)


class Samples:
    """A prompt in the API format that samples the same noise in many ways."""

    def __init__(self, options: argparse.Namespace, seed: int, prompt: str):
        self.nodes: dict[str, dict[str, Any]] = {}
        self.seed = seed
        load = {"dtype": "float32", "attention": "auto"}
        self.ours = [
            self.add("WanCoreLoadModel", model_name=f"{level}_noise.safetensors", **load) for level in ("high", "low")
        ]
        self.pair = self._joined("auto", VARIANT.boundary)
        self.both = self.add("WanCoreToModel", model=self.pair, shift=SHIFT)
        self.each = [
            self.add(
                "ModelSamplingSD3",
                shift=SHIFT,
                model=self.add("UNETLoader", unet_name=f"{level}_noise.safetensors", weight_dtype="default"),
            )
            for level in ("high", "low")
        ]
        clip = self.add(
            "WanCoreLoadTextEncoder", text_encoder_name="text.safetensors", dtype="float32", device="default"
        )
        self.sides = {
            "positive": self.add("CLIPTextEncode", clip=clip, text=prompt),
            "negative": self.add("CLIPTextEncode", clip=clip, text=""),
        }
        self.latent = self.add(
            "EmptyHunyuanLatentVideo", width=options.size, height=options.size, length=options.frames, batch_size=1
        )
        self.ways: dict[str, tuple[Callable, Callable]] = {
            KSAMPLER: (self.one, self.two),
            CUSTOM: (self.one_custom, self.two_custom),
            WAN: (self.one_wan, self.two_wan),
        }

    def add(self, kind: str, **inputs: Any) -> list:
        id = str(len(self.nodes) + 1)
        self.nodes[id] = {"class_type": kind, "inputs": inputs}
        return [id, 0]

    def _joined(self, mode: str, boundary: float) -> list:
        return self.add("WanCoreExpertSwitch", high=self.ours[0], low=self.ours[1], mode=mode, boundary=boundary)

    def reference(self, level: float, steps: int) -> list:
        """The low-noise expert works from this noise level on."""
        pair = self._joined("timestep", level + 0.5 / TRAIN_STEPS)
        return self._ksampler(self.add("WanCoreToModel", model=pair, shift=SHIFT), "heun", steps)

    def one(self, sampler: str, steps: int) -> list:
        return self._ksampler(self.both, sampler, steps)

    def _ksampler(self, model: list, sampler: str, steps: int) -> list:
        return self.add(
            "KSampler",
            model=model,
            latent_image=self.latent,
            seed=self.seed,
            steps=steps,
            cfg=CFG,
            sampler_name=sampler,
            scheduler="simple",
            denoise=1.0,
            **self.sides,
        )

    def two(self, sampler: str, steps: int) -> list:
        middle, latent = high_steps(KSAMPLER, sampler, steps), self.latent
        halves = (("enable", 0, middle, "enable"), ("disable", middle, 10000, "disable"))
        for model, (noise, start, end, leftover) in zip(self.each, halves, strict=True):
            latent = self.add(
                "KSamplerAdvanced",
                model=model,
                latent_image=latent,
                noise_seed=self.seed,
                steps=steps,
                cfg=CFG,
                sampler_name=sampler,
                scheduler="simple",
                add_noise=noise,
                start_at_step=start,
                end_at_step=end,
                return_with_leftover_noise=leftover,
                **self.sides,
            )
        return latent

    def one_custom(self, sampler: str, steps: int) -> list:
        return self._custom(self.both, self.sigmas(steps), self._noise(), sampler, self.latent)

    def two_custom(self, sampler: str, steps: int) -> list:
        halves = self.add("SplitSigmas", sigmas=self.sigmas(steps), step=high_steps(CUSTOM, sampler, steps))
        first = self._custom(self.each[0], halves, self._noise(), sampler, self.latent)
        return self._custom(self.each[1], [halves[0], 1], self.add("DisableNoise"), sampler, first)

    def _noise(self) -> list:
        return self.add("RandomNoise", noise_seed=self.seed)

    def sigmas(self, steps: int) -> list:
        return self.add("BasicScheduler", model=self.both, scheduler="simple", steps=steps, denoise=1.0)

    def _custom(self, model: list, sigmas: list, noise: list, sampler: str, latent: list) -> list:
        return self.add(
            "SamplerCustomAdvanced",
            noise=noise,
            sigmas=sigmas,
            latent_image=latent,
            guider=self.add("CFGGuider", model=model, cfg=CFG, **self.sides),
            sampler=self.add("KSamplerSelect", sampler_name=sampler),
        )

    def one_wan(self, solver: str, steps: int) -> list:
        return self._wan(self.pair, solver, steps, self.latent)

    def two_wan(self, solver: str, steps: int) -> list:
        middle = high_steps(WAN, solver, steps)
        first = self._wan(self.ours[0], solver, steps, self.latent, end_step=middle)
        return self._wan(self.ours[1], solver, steps, first, start_step=middle, add_noise=False)

    def _wan(self, model: list, solver: str, steps: int, latent: list, **part: Any) -> list:
        whole = {"start_step": 0, "end_step": 10000, "add_noise": True}
        return self.add(
            "WanCoreSampler",
            model=model,
            latent=latent,
            seed=self.seed,
            steps=steps,
            cfg_high=CFG,
            cfg_low=CFG,
            shift=SHIFT,
            solver=solver,
            schedule="simple",
            denoise=1.0,
            **self.sides,
            **whole | part,
        )

    def save(self, name: str, latent: list) -> None:
        self.add("SaveLatent", samples=latent, filename_prefix=f"{self.seed}/{name}")


def grid(node: str, sampler: str, steps: int) -> Tensor:
    """The noise levels of a node's steps, without the final 0."""
    more = node == KSAMPLER and sampler in NEXT_TO_LAST_LEFT_OUT
    return schedule("simple", steps + more, SHIFT).sigmas[:steps]


def high_steps(node: str, sampler: str, steps: int) -> int:
    """How many steps of the node's grid lie at or above the boundary."""
    return int((grid(node, sampler, steps) >= VARIANT.boundary).sum())


def change(node: str, sampler: str, steps: int) -> float:
    """The noise level of the first step of the low-noise expert."""
    return grid(node, sampler, steps)[high_steps(node, sampler, steps)].item()


def read(server: Server, seed: int, name: str) -> Tensor:
    (file,) = Path(server.base, "output", str(seed)).glob(f"{name}_*.latent")
    raw = load_file(file)["latent_tensor"]
    return normalise(raw, VARIANT.vae)


def distance(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).square().mean().sqrt() / reference.square().mean().sqrt())


def summarise(distances: dict[tuple[Case, str], list[float]]) -> list[dict[str, Any]]:
    rows = []
    for case in dict.fromkeys(case for case, _ in distances):
        one, two = (distances[case, way] for way in ("one", "two"))
        node, sampler, steps = case
        rows.append(
            {
                "node": node,
                "sampler": sampler,
                "steps": steps,
                "change_at_step": high_steps(*case),
                "one": _mean(one),
                "two": _mean(two),
                "two_over_one": _mean([b / a for a, b in zip(one, two, strict=True)]),
                "one_is_nearer": f"{sum(a < b for a, b in zip(one, two, strict=True))} of {len(one)}",
            }
        )
    return rows


def _mean(values: Sequence[float]) -> dict[str, float]:
    found = Mean.of(values)
    return {"mean": round(found.value, 6), "error": round(found.error, 6)}


def table(rows: list[dict[str, Any]]) -> str:
    names = f"{'one run':>20}{'two runs':>20}{'two / one':>18}  one is nearer"
    lines = [f"{'node':23}{'sampler':12}{'steps':>6}{'change':>8}{names}"]
    for row in rows:
        one, two, ratio = (
            f"{row[key]['mean']:.4f} ± {row[key]['error']:.4f}" for key in ("one", "two", "two_over_one")
        )
        lines.append(
            f"{row['node']:23}{row['sampler']:12}{row['steps']:>6}{row['change_at_step']:>8}{one:>20}"
            f"{two:>20}{ratio:>18}  {row['one_is_nearer']}"
        )
    return "\n".join(lines)
