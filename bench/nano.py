"""What the nano family's clips show, measured with image statistics and tracking: the model card's table, and JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from nano.evaluate import Rate, together
from nano.judge import ARRANGEMENTS, FILES, I2V, T2V, TI2V, Judge, Mean, Words, held_out_prompts
from wan_core.train.data import Frame
from wan_core.train.sample import Sampling

from .cpu import machine

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "nano.json"
NEEDED = {"colour": (0.85, 0.95), "ground": (0.90, 0.98), "motion": (0.60, 0.90), "shape": (0.60, 0.85)}
PARTS = ("vae", "t2v", "pairs", "i2v", "ti2v")


@dataclass(frozen=True)
class Row:
    """A line of the table; ``needed`` and ``goal`` are what the family was made to reach."""

    measure: str
    value: float
    error: float | None
    count: int
    needed: float | None = None
    goal: float | None = None

    @property
    def reached(self) -> str:
        if self.needed is None:
            return ""
        return "goal" if self.goal is not None and self.value >= self.goal else str(self.value >= self.needed).lower()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", type=Path, default=ROOT / "nano", help="folder of the files, laid out as ComfyUI's")
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")


def run(options: argparse.Namespace) -> int:
    how = Sampling(steps=options.steps, guidance=options.guidance, precision=options.precision)
    judge = Judge(lambda stage: options.family / FILES[stage], Frame(options.size, options.size, options.frames), how)
    settings = {"sampling": vars(how), "prompts": options.prompts, "seeds": options.seeds}
    for part in options.only:
        rows = []
        for row in MEASURES[part](judge, options.prompts, range(options.seeds)):
            print(line(row), flush=True)
            rows.append(vars(row) | {"reached": row.reached})
        publish(options.out, settings, part, rows)
    return 0


def publish(file: Path, settings: dict, part: str, rows: list[dict]) -> None:
    """Write a part's rows; those of other parts stay if they were measured with the same settings."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = known.get("parts", {}) if {key: known.get(key) for key in settings} == settings else {}
    parts = {name: rows if name == part else kept[name] for name in PARTS if name == part or name in kept}
    file.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), **settings, "parts": parts}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def line(row: Row) -> str:
    """A row of a Markdown table: measure, value, needed, goal, reached."""
    value = f"{row.value:.3g}" if row.error is None else f"{row.value:.3g} ± {row.error:.2g}"
    bounds = ["" if bound is None else f"{bound:g}" for bound in (row.needed, row.goal)]
    return f"| {row.measure} | {value} | {bounds[0]} | {bounds[1]} | {row.reached} |"


def of_vae(judge: Judge, prompts: int, seeds: range) -> Iterator[Row]:
    for kind, name, needed, worst, goal in (("wan2.1", "16", 30, 24, 34), ("wan2.2", "48", 27, 22, 31)):
        values, rates = judge.reconstruction(kind, prompts)
        yield Row(f"{name}-channel VAE, PSNR of reconstructions, mean, dB", mean(values), None, prompts, needed, goal)
        yield Row(f"{name}-channel VAE, PSNR, worst clip, dB", min(values), None, prompts, worst)
        yield of_rate(f"{name}-channel VAE, shape read from reconstructions", rates["shape"], 0.9)


def of_t2v(judge: Judge, prompts: int, seeds: range) -> Iterator[Row]:
    close = ("pair", "low-noise expert alone")  # which many clips must tell apart
    drawn = {name: seeds if name in close else seeds[:1] for name in ARRANGEMENTS}
    found = {name: judge.words(*ARRANGEMENTS[name], T2V, held_out_prompts(prompts), drawn[name]) for name in drawn}
    yield from of_words("T2V", found["pair"])
    for name, seen in found.items():
        yield of_mean(f"T2V, {name}: words right in a clip", seen.share)
        yield of_mean(f"T2V, {name}: explained by the world, dB", seen.explained)
    for name in list(ARRANGEMENTS)[1:]:
        yield _worse(name, found["pair"], found[name])


def _worse(name: str, pair: Words, other: Words) -> Row:
    """By how many standard errors the pair is better, in the words or in how well its clips are explained: of the
    differences between clips of the same prompt and noise."""
    both = ((pair.shares, other.shares), (pair.explanations, other.explanations))
    gaps = [Mean.of([a - b for a, b in zip(ours, theirs, strict=False)]) for ours, theirs in both]
    gap = max(gap.value / max(1e-9, gap.error) for gap in gaps)
    return Row(f"T2V, {name}: worse than the pair by so many standard errors", gap, None, len(other.shares), 2)


def of_pairs(judge: Judge, prompts: int, seeds: range) -> Iterator[Row]:
    rates = judge.pairs("t2v_high", "t2v_low", T2V, max(2, prompts // 4))
    for name, rate in rates.items():
        yield of_rate(f"T2V, {name}: the right statistic moves", rate)
    tones = ("warm / cool", "saturated / desaturated", "high-key / low-key", "day / night")
    total = together({"tone": rates[name]} for name in tones)["tone"]
    yield of_rate("T2V, pairs of colour tone and brightness together", total, 0.90, 0.98)


def of_i2v(judge: Judge, prompts: int, seeds: range) -> Iterator[Row]:
    yield from of_images("I2V", judge, ("i2v_high", "i2v_low"), I2V, prompts, seeds)


def of_ti2v(judge: Judge, prompts: int, seeds: range) -> Iterator[Row]:
    yield from of_words("TI2V from text", judge.words("ti2v", "ti2v", TI2V, held_out_prompts(prompts), seeds))
    yield from of_images("TI2V", judge, ("ti2v", "ti2v"), TI2V, prompts, seeds)


def of_images(name: str, judge: Judge, experts: tuple[str, str], variant, prompts: int, seeds: range) -> Iterator[Row]:
    seen = judge.animated(*experts, variant, held_out_prompts(prompts, fixed=True), seeds)
    yield of_mean(f"{name}, first frame against the image, PSNR, dB", seen.first, 25, 30)
    yield of_rate(f"{name}, motion word followed", seen.motion, 0.60, 0.85)


def of_words(name: str, seen: Words) -> Iterator[Row]:
    for word, rate in seen.rates.items():
        yield of_rate(f"{name}, {word}", rate, *NEEDED.get(word, ()))


def of_rate(measure: str, rate: Rate, needed: float | None = None, goal: float | None = None) -> Row:
    return Row(measure, rate.value, rate.error, rate.count, needed, goal)


def of_mean(measure: str, found: Mean, needed: float | None = None, goal: float | None = None) -> Row:
    return Row(measure, found.value, found.error, found.count, needed, goal)


MEASURES = {"vae": of_vae, "t2v": of_t2v, "pairs": of_pairs, "i2v": of_i2v, "ti2v": of_ti2v}
