"""The nano family in ComfyUI: prompts are followed, and ComfyUI's own nodes make the same clip of the same files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import Client, Run, Server
from PIL import Image

from nano.evaluate import look_at
from nano.world import Scene
from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from tests.comfy.nano import EXPERTS, conditions, pair
from tests.core.nano_night import IN_COMFYUI, write_as
from wan_core.sampling.schedules import schedule
from wan_core.tools.convert import convert

ROOT = Path(__file__).resolve().parents[2]
SIDE, FRAMES, STEPS, SHIFT, GUIDANCE = 64, 17, 16, 5.0, 3.0
PROMPTS = {
    "A red circle moves to the right over the ocean.": Scene("circle", "red", "ocean", "right"),
    "A white square moves down in front of the brick wall.": Scene("square", "white", "brick wall", "down"),
    "A purple triangle moves to the left over the snow.": Scene("triangle", "purple", "snow", "left"),
    "A yellow circle moves up in front of the grey studio.": Scene("circle", "yellow", "grey studio", "up"),
    "一个蓝色的方块在沙漠上向右移动。": Scene("square", "blue", "desert", "right"),
}


pytestmark = pytest.mark.usefixtures("nano_files")


def test_prompts_are_followed(client: Client) -> None:
    """Five prompts, English and Chinese: at least four words of each kind are seen, of shapes and motions three."""
    seen = []
    for prompt, scene in PROMPTS.items():
        g = Graph()
        sides, latent = conditions(g, prompt), empty(g)
        save_frames(g, wan.decode(g, vae(g), ours(g, sides, latent)))
        seen.append((look_at(frames(client, client.run(g.nodes)), scene), scene))
    hits = {
        word: sum(getattr(found, word) == getattr(scene, word) for found, scene in seen)
        for word in ("colour", "ground", "motion", "shape")
    }
    assert hits["colour"] >= 4 and hits["ground"] >= 4 and hits["motion"] >= 3 and hits["shape"] >= 3, (hits, seen)


def test_native_nodes_make_the_same_clip(client: Client) -> None:
    """UNETLoader, ModelSamplingSD3 and KSamplerAdvanced twice, VAELoader: PSNR of the pictures at least 40 dB.

    Both sample with Euler over ComfyUI's own schedule from the same noise; pictures are stored with 8 bits.
    """
    prompt = next(iter(PROMPTS))
    g = Graph()
    save_frames(g, wan.decode(g, vae(g), ours(g, conditions(g, prompt), empty(g))))
    mine = frames(client, client.run(g.nodes))

    g = Graph()
    decoded = g.add(
        "VAEDecode",
        vae=g.add("VAELoader", vae_name="nano_vae16.safetensors"),
        samples=native(g, conditions(g, prompt), empty(g)),
    )
    save_frames(g, decoded)
    theirs = frames(client, client.run(g.nodes))
    psnr = -10 * torch.log10(((mine - theirs) / 2).square().mean()).item()
    print(f"PSNR between our sampler and ComfyUI's nodes: {psnr:.1f} dB")
    assert psnr >= 40


def test_a_trained_lora_in_every_dialect_that_comfyui_reads(client: Client, server: Server, night_lora: Path) -> None:
    """ComfyUI's LoraLoaderModelOnly makes of each file the latent that our node makes of the trained one: to 1e-3."""
    models = server.base / "models"
    (models / "loras").mkdir(exist_ok=True)
    folder = models / "diffusion_models"
    convert(folder / "nano_ti2v.safetensors", folder / "nano_fp32.safetensors", "fp32")
    g = Graph()
    sides = conditions(g, next(iter(PROMPTS)))
    plain = wan.load(g, "nano_fp32.safetensors")
    latent = g.add("WanCoreEmptyLatent", model=plain, width=SIDE, height=SIDE, frames=FRAMES, batch_size=1)
    settings = {"steps": 4, "shift": SHIFT, "cfg_high": 1.0, "cfg_low": 1.0, "solver": "euler", "schedule": "simple"}
    made = {"without": wan.sample(g, plain, sides, latent, **settings)}
    for dialect in IN_COMFYUI:
        write_as(dialect, night_lora, models / f"loras/night_{dialect}.safetensors")
        made[dialect] = native_lora(g, f"night_{dialect}.safetensors", sides, latent)
    mine = g.add(
        "WanCoreLora",
        model=plain,
        lora_name="night_A_B.safetensors",
        strength_high=1.0,
        strength_low=1.0,
        low_name="auto",
        first_step=0,
        last_step=10000,
    )
    made["mine"] = wan.sample(g, mine, sides, latent, **settings)
    for name, sampled in made.items():
        wan.save_latent(g, sampled, f"night_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    latents = {name: wan.read_latent(server, f"night_{name}") for name in made}
    largest = latents["mine"].abs().max()
    assert (latents["without"] - latents["mine"]).abs().max() > 0.1 * largest
    worst = {name: ((latents[name] - latents["mine"]).abs().max() / largest).item() for name in IN_COMFYUI}
    assert max(worst.values()) <= 1e-3, worst


def native_lora(g: Graph, file: str, sides: dict[str, Out], latent: Out) -> Out:
    unet = g.add("UNETLoader", unet_name="nano_fp32.safetensors", weight_dtype="default")
    model = g.add("LoraLoaderModelOnly", model=unet, lora_name=file, strength_model=1.0)
    model = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
    return g.add(
        "KSampler",
        model=model,
        seed=7,
        steps=4,
        cfg=1.0,
        **sides,
        latent_image=latent,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )


def switch_step() -> int:
    """The first step of the low-noise expert."""
    return int((schedule("simple", STEPS, SHIFT).timesteps >= 875).sum())


def vae(g: Graph) -> Out:
    return g.add("WanCoreLoadVAE", vae_name="nano_vae16.safetensors", dtype="float32")


def empty(g: Graph) -> Out:
    return g.add("EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=FRAMES, batch_size=1)


def ours(g: Graph, sides: dict[str, Out], latent: Out) -> Out:
    model = pair(g, mode="step", boundary=switch_step())
    return wan.sample(
        g,
        model,
        sides,
        latent,
        steps=STEPS,
        shift=SHIFT,
        cfg_high=GUIDANCE,
        cfg_low=GUIDANCE,
        solver="euler",
        schedule="simple",
    )


def native(g: Graph, sides: dict[str, Out], latent: Out) -> Out:
    bounds = ((0, switch_step(), "enable"), (switch_step(), 10000, "disable"))
    for name, (start, end, noise) in zip(EXPERTS, bounds, strict=True):
        model = g.add("UNETLoader", unet_name=name, weight_dtype="default")
        shifted = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
        latent = g.add(
            "KSamplerAdvanced",
            model=shifted,
            add_noise=noise,
            noise_seed=7,
            steps=STEPS,
            cfg=GUIDANCE,
            sampler_name="euler",
            scheduler="simple",
            **sides,
            latent_image=latent,
            start_at_step=start,
            end_at_step=end,
            return_with_leftover_noise=noise,
        )
    return latent


def save_frames(g: Graph, images: Out) -> None:
    g.add("SaveImage", images=images, filename_prefix="nano")


def frames(client: Client, run: Run) -> torch.Tensor:
    """The saved pictures as a clip [3, F, H, W] in -1..1."""
    assert run.ok, run.error
    files = sorted((file for file in run.files if file["filename"].endswith(".png")), key=lambda f: f["filename"])
    pictures = [np.asarray(Image.open(io.BytesIO(client.download(file))).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1
