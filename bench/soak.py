"""A server that works for hours: memory, threads and open files after many prompts and many interrupts."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.comfy_server import Client, Graph, Run, Server, make_base
from wan_core.tools.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "soak.json"
MEGABYTE = 1e6
METHOD = (
    "One ComfyUI on a CPU with small random checkpoints. Each prompt changes the seed, so that it samples with both "
    "experts, decodes and saves anew; every fifth also goes through Wan as ComfyUI MODEL, every seventh begins with an "
    "image. An interrupt is sent at the sampler's first step. Figures are the server's own process: after the first "
    "prompts, which load everything, and at the end of each part."
)
WARM_UP = 20  # prompts until everything has been loaded and cached once


@dataclass(frozen=True)
class Footprint:
    """Of a process, as Linux counts it."""

    megabytes: float
    threads: int
    files: int

    @classmethod
    def of(cls, process: int) -> Footprint:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        resident = int(lines["VmRSS"].split()[0]) * 1024 / MEGABYTE
        return cls(round(resident, 1), int(lines["Threads"]), len(os.listdir(f"/proc/{process}/fd")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--comfyui", type=Path, default=None, help="ComfyUI's folder (default: COMFYUI_PATH)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--interrupts", type=int, default=50)
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")


def run(options: argparse.Namespace) -> int:
    comfyui = options.comfyui or Path(os.environ.get("COMFYUI_PATH") or next((ROOT / ".cache").glob("comfyui-*")))
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder), comfyui, ROOT)
        for task in ("t2v-A14B", "ti2v-5B"):
            write_tiny(base / "models", task, layout="comfyui")
        with Server.start(
            sys.executable,
            comfyui,
            base,
            "--cpu",
            "--disable-api-nodes",
            "--preview-method",
            "latent2rgb",
            env={"OMP_NUM_THREADS": "1"},
        ) as server:
            report = measure(server, options.prompts, options.interrupts)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"method": METHOD} | report, indent=1) + "\n", encoding="utf-8")
    for name, value in report.items():
        print(f"{name}: {value}")
    return 0


def measure(server: Server, prompts: int, interrupts: int) -> dict:
    client, failed = Client(server.url, server.check), 0
    footprints = {}
    for number in range(WARM_UP + prompts):
        if number == WARM_UP:
            footprints["warm"] = Footprint.of(server.process.pid)
        failed += not client.run(graph(number)).ok
    footprints["after_prompts"] = Footprint.of(server.process.pid)
    stopped = sum(interrupted(client, WARM_UP + prompts + number).interrupted for number in range(interrupts))
    footprints["after_interrupts"] = Footprint.of(server.process.pid)
    answers = client.run(graph(WARM_UP + prompts + interrupts)).ok
    return {
        "prompts": prompts,
        "failed": failed,
        "interrupts": interrupts,
        "interrupted": stopped,
        "answers_afterwards": answers,
    } | {name: asdict(seen) for name, seen in footprints.items()}


def interrupted(client: Client, number: int) -> Run:
    sampler = next(node for node, entry in graph(number).items() if entry["class_type"] == "WanCoreSampler")

    def press(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == sampler and data["value"] == 1:
            with contextlib.suppress(OSError):
                client.interrupt()

    return client.run(graph(number, steps=30), on_event=press)


def graph(number: int, steps: int = 3) -> Graph:
    """A prompt that no other number gives, so that nothing is taken from ComfyUI's cache but the loaders."""
    nodes: Graph = {}

    def add(kind: str, **inputs: object) -> list:
        nodes[str(len(nodes) + 1)] = {"class_type": kind, "inputs": inputs}
        return [str(len(nodes)), 0]

    def load(name: str) -> list:
        return add("WanCoreLoadModel", model_name=name, dtype="float32", attention="auto")

    picture = number % 7 == 6
    if picture:
        model, vae = load("wan2.2_ti2v_5B_fp16.safetensors"), "wan2.2_vae.safetensors"
    else:
        high, low = (load(f"wan2.2_t2v_{level}_noise_14B_fp8_scaled.safetensors") for level in ("high", "low"))
        model = add("WanCoreExpertSwitch", high=high, low=low, mode="auto", boundary=0.875)
        vae = "wan_2.1_vae.safetensors"
    clip = add(
        "WanCoreLoadTextEncoder",
        text_encoder_name="umt5_xxl_fp8_e4m3fn_scaled.safetensors",
        dtype="float32",
        device="cpu",
    )
    vae = add("WanCoreLoadVAE", vae_name=vae, dtype="float32")
    positive, negative = (add("CLIPTextEncode", clip=clip, text=text) for text in (f"a cat, {number}", "blurry"))
    size = {"width": 64, "height": 64, "frames": 9, "batch_size": 1}
    latent = add("WanCoreEmptyLatent", model=model, **size)
    if picture:
        start = add(
            "WanCoreImageToVideo",
            model=model,
            vae=vae,
            positive=positive,
            negative=negative,
            fit="exact",
            start_image=add("LoadImage", image="example.png"),
            **size,
        )
        positive, negative, latent = start, [start[0], 1], [start[0], 2]
    sampled = add(
        "WanCoreSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent=latent,
        seed=number,
        steps=steps,
        cfg_high=2.0,
        cfg_low=3.0,
        shift=5.0,
        solver="unipc",
        schedule="auto",
        denoise=1.0,
        start_step=0,
        end_step=10000,
        add_noise=True,
    )
    if number % 5 == 4:
        native = add("WanCoreToModel", model=model, shift=4 + number % 11 / 10)
        sampled = add(
            "KSampler",
            model=native,
            positive=positive,
            negative=negative,
            latent_image=sampled,
            seed=number,
            steps=2,
            cfg=2.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=0.5,
        )
    images = add("WanCoreVAEDecode", vae=vae, samples=sampled)
    add(
        "SaveAnimatedWEBP",
        images=images,
        filename_prefix="soak",
        fps=16.0,
        lossless=False,
        quality=80,
        method="default",
    )
    return nodes
