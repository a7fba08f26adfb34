"""Ours beside diffusers and ComfyUI on the CPU, float32: time ratios and peak memory, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from . import document, parts
from .measure import MEMORY_ENVIRONMENT, MEMORY_METHOD, TIME_METHOD, Seconds, can_measure_memory, interleave, ratio
from .parts import Part
from .peers import COMFYUI, DIFFUSERS, OURS, PREPARED

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "cpu.json"
PEERS = (DIFFUSERS, COMFYUI)
MIB = 1024 * 1024
_BEGIN, _END = "<!-- cpu: written by python -m bench cpu -->", "<!-- end of cpu -->"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--rounds", type=int, help="of timing, for each part (default 9; with --quick 2)")
    parser.add_argument("--memory-runs", type=int, default=1, help="processes for each peak; 0 leaves memory out")
    parser.add_argument("--only", choices=parts.GROUPS, help="one model alone")
    parser.add_argument("--quick", action="store_true", help="tiny dimensions: shows that the benchmark works")


def run(options: argparse.Namespace) -> int:
    rounds = options.rounds or (2 if options.quick else 9)
    report = {"machine": machine(), "method": {"time": TIME_METHOD, "memory": MEMORY_METHOD}, "parts": {}}
    for part in parts.select(options.quick, options.only):
        print(f"{part.name}: {part.describe()}", flush=True)
        peaks = {name: peak(part, name, options.memory_runs, options.quick) for name in part.contenders}
        errors, samples = compete(part, rounds)
        report["parts"][part.name] = result = summarise(part, errors, samples, peaks)
        print(table(result), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.out == PUBLISHED and not options.only and options.memory_runs:
        publish(report)
    return 0


@torch.inference_mode()
def compete(part: Part, rounds: int) -> tuple[dict[str, float], dict[str, list[Seconds]]]:
    """Check that all contenders give the same answer, then time them.

    Returns:
        each contender's largest difference to ours, relative to the largest value; and its times.
    """
    weights, inputs = part.weights(), part.inputs()
    calls = {name: part.build(name, weights) for name in part.contenders}
    errors = agreement({name: call(*inputs) for name, call in calls.items()}, part)
    return errors, interleave({name: (lambda call=call: call(*inputs)) for name, call in calls.items()}, rounds)


def agreement(answers: dict[str, torch.Tensor], part: Part) -> dict[str, float]:
    """Largest difference of each answer to ours, relative to ours; a contender that disagrees ends the benchmark."""
    ours = answers[OURS]
    errors = {name: ((answer - ours).abs().max() / ours.abs().max()).item() for name, answer in answers.items()}
    for name, error in errors.items():
        if not error <= part.tolerance:
            raise SystemExit(
                f"{part.name}: {name} and ours differ by {error:.1e} of the largest value; at most "
                f"{part.tolerance:.0e} was expected. A wrong answer is not timed."
            )
    return errors


def peak(part: Part, contender: str, processes: int, quick: bool) -> float | None:
    """Peak memory in MiB, median of processes of its own; None where the system cannot tell, or nobody asked."""
    if not processes or not can_measure_memory():
        return None
    command = [sys.executable, "-m", "bench", "peak", "--part", part.name, "--contender", contender]
    command += ["--quick"] if quick else []
    env = {**os.environ, **MEMORY_ENVIRONMENT}
    found = [subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True) for _ in range(processes)]
    for process in found:
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr}")
    return median(json.loads(process.stdout.splitlines()[-1]) for process in found) / MIB


def summarise(
    part: Part, errors: dict[str, float], samples: dict[str, list[Seconds]], peaks: dict[str, float | None]
) -> dict:
    return {
        "what": part.describe(),
        "contenders": {
            name: {
                "seconds": round(median(s.wall for s in samples[name]), 4),
                "seconds_of_rounds": [round(s.wall, 4) for s in samples[name]],
                "peak_mib": None if peaks[name] is None else round(peaks[name], 1),
                "error": float(f"{errors[name]:.2g}"),
            }
            for name in part.contenders
        },
        "ratios": {
            name: {
                "time": _ratios(samples, name, "wall"),
                "cpu": _ratios(samples, name, "cpu"),
                "memory": _memory_ratios(peaks, name),
            }
            for name in part.contenders
            if name in (OURS, PREPARED)
        },
    }


def _ratios(samples: dict[str, list[Seconds]], ours: str, clock: str) -> dict[str, float]:
    """Ours to each peer, and to the best of them."""
    of = {name: [getattr(s, clock) for s in found] for name, found in samples.items()}
    ratios = {peer: round(ratio(of[ours], of[peer]), 4) for peer in PEERS}
    return {**ratios, "best": max(ratios.values())}


def _memory_ratios(peaks: dict[str, float | None], ours: str) -> dict[str, float] | None:
    if peaks[ours] is None:
        return None
    ratios = {peer: round(peaks[ours] / peaks[peer], 4) for peer in PEERS}
    return {**ratios, "best": max(ratios.values())}


def publish(report: dict) -> None:
    """Ours over the best peer, a row for each part."""
    here, versions = report["machine"], ("torch", "diffusers", "comfyui")
    busy = bool(here["load"]) and here["load"][0] > here["cores"]
    about = f"{here['processor']}, {here['threads']} threads, {', '.join(f'{name} {here[name]}' for name in versions)}."
    if busy:  # then the clock on the wall tells what else ran
        about += (
            f" Other programs were at work (load {here['load'][0]}): of the times only the processor's tells anything."
        )
    lines = [
        about,
        "",
        "| | time | processor's time | peak memory | the same, MiB | the best peer's, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, part in report["parts"].items():
        peers = [part["contenders"][peer]["peak_mib"] for peer in PEERS]
        for ours, ratios in part["ratios"].items():
            shown = {"time": "–" if busy else f"{ratios['time']['best']:.2f}"}
            shown |= {kind: f"{ratios[kind]['best']:.2f}" for kind in ("cpu", "memory")}
            figures = "".join(f" {shown[kind]} |" for kind in ("time", "cpu", "memory"))
            peak_mib = part["contenders"][ours]["peak_mib"]
            lines.append(f"| {name}{ours.removeprefix(OURS)} |{figures} {peak_mib:.0f} | {min(peers):.0f} |")
    document.publish("\n".join(lines) + "\n", _BEGIN, _END)


def table(result: dict) -> str:
    lines = [f"  {'':22}{'seconds':>10}{'peak MiB':>10}{'error':>10}"]
    for name, row in result["contenders"].items():
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}"
        lines.append(f"  {name:22}{row['seconds']:>10.3f}{memory:>10}{row['error']:>10.1e}")
    for name, ratios in result["ratios"].items():
        for kind in ("time", "cpu", "memory"):
            if ratios[kind]:
                shown = "  ".join(f"{peer} {value:.3f}" for peer, value in ratios[kind].items())
                lines.append(f"  {name}, {kind} ratio: {shown}")
    return "\n".join(lines) + "\n"


def machine() -> dict:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "comfyui": _comfyui_version(),
        "dtype": "float32",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _comfyui_version() -> str | None:
    file = Path(os.environ.get("COMFYUI_PATH", "")) / "comfyui_version.py"
    return file.read_text().partition('"')[2].partition('"')[0] if file.exists() else None
