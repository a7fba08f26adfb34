"""The nodes and the command line tell the same story: the same latent from the same files, prompt and seed.

Both run in float32 on one CPU; they differ by rounding on the way through ComfyUI's raw latent space: 1e-4 of the
largest value.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_server import Client, Server
from safetensors.torch import load_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph
from wan_core.config import NEGATIVE_PROMPT
from wan_core.models.vae.vae import normalise

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "A white cat on a surfboard"
STEPS, SHIFT, SEED = 3, 5.0, 11


@pytest.mark.parametrize(
    ("task", "solver", "image"), [("t2v-A14B", "dpm++", False), ("i2v-A14B", "unipc", True), ("ti2v-5B", "unipc", True)]
)
def test_same_latent(client: Client, server: Server, tmp_path: Path, task: str, solver: str, image: bool) -> None:
    picture = server.base / "input/example.png" if image else None
    ours = load_file(command_line(server.base / "models", tmp_path, task, solver, picture))["latent"]

    g, short = Graph(), task.partition("-")[0]
    m, v, encoder = wan.model(g, short), wan.vae(g, short), wan.clip(g)
    sides = {
        "positive": g.add("CLIPTextEncode", clip=encoder, text=PROMPT),
        "negative": g.add("CLIPTextEncode", clip=encoder, text=NEGATIVE_PROMPT),
    }
    if image:
        start = g.add(
            "WanCoreImageToVideo",
            model=m,
            vae=v,
            **sides,
            width=64,
            height=64,
            frames=5,
            fit="area",
            batch_size=1,
            start_image=wan.photograph(g),
        )
        sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
    else:
        latent = wan.empty(g, m, 64, 64, 5)
    sampled = wan.sample(
        g, m, sides, latent, seed=SEED, steps=STEPS, shift=SHIFT, solver=solver, cfg_low=2.0, cfg_high=3.0
    )
    wan.save_latent(g, sampled, f"parity_{short}")
    run = client.run(g.nodes)
    assert run.ok, run.error

    kind = "wan2.2" if short == "ti2v" else "wan2.1"
    raw = wan.read_latent(server, f"parity_{short}")[0]
    nodes = normalise(raw, kind)
    assert nodes.shape == ours.shape
    assert (nodes - ours).abs().max() <= 1e-4 * ours.abs().max()


def command_line(
    models: Path, folder: Path, task: str, solver: str, image: Path | None, end_image: Path | None = None
) -> Path:
    out = folder / "out.safetensors"
    guidance = "2.0,3.0" if task.endswith("A14B") else "2.0"
    arguments = [
        "--task",
        task,
        "--ckpt_dir",
        models,
        "--size",
        "64*64",
        "--frame_num",
        5,
        "--prompt",
        PROMPT,
        "--base_seed",
        SEED,
        "--sample_solver",
        solver,
        "--sample_steps",
        STEPS,
        "--sample_shift",
        SHIFT,
        "--sample_guide_scale",
        guidance,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--save_file",
        folder / "out.mp4",
        "--save_tensors",
        out,
    ]
    arguments += ["--image", image] if image else []
    arguments += ["--end_image", end_image] if end_image else []
    done = subprocess.run(
        [sys.executable, "-m", "wan_core", "generate", *map(str, arguments)],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out
