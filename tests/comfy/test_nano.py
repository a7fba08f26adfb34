"""The nano family in ComfyUI: prompts are followed, and ComfyUI's own nodes make the same clip of the same files."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_server import Client, Run, Server
from PIL import Image

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from wan_core.sampling.schedules import schedule
from wan_core.train.nano.evaluate import look_at
from wan_core.train.nano.world import Scene

ROOT = Path(__file__).resolve().parents[2]
SIDE, FRAMES, STEPS, SHIFT, GUIDANCE = 64, 17, 16, 5.0, 3.0
EXPERTS = [f"nano_t2v_{noise}_noise.safetensors" for noise in ("high", "low")]
PROMPTS = {
    "A red circle moves to the right over the ocean.": Scene("circle", "red", "ocean", "right"),
    "A white square moves down in front of the brick wall.": Scene("square", "white", "brick wall", "down"),
    "A purple triangle moves to the left over the snow.": Scene("triangle", "purple", "snow", "left"),
    "A yellow circle moves up in front of the grey studio.": Scene("circle", "yellow", "grey studio", "up"),
    "一个蓝色的方块在沙漠上向右移动。": Scene("square", "blue", "desert", "right"),
}


@pytest.fixture(scope="module", autouse=True)
def family(server: Server) -> None:
    """The family beside the random checkpoints."""
    shutil.copytree(ROOT / "nano", server.base / "models", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))


def test_prompts_are_followed(client: Client) -> None:
    """Five prompts, English and Chinese: at least four words of each kind are seen, of shapes and motions three."""
    seen = []
    for prompt, scene in PROMPTS.items():
        g = Graph()
        sides, latent = conditions(g, prompt), empty(g)
        save_frames(g, wan.decode(g, vae(g), ours(g, sides, latent)))
        seen.append((look_at(frames(client, client.run(g.nodes)), scene), scene))
    hits = {word: sum(getattr(found, word) == getattr(scene, word) for found, scene in seen)
            for word in ("colour", "ground", "motion", "shape")}  # fmt: skip
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
    decoded = g.add("VAEDecode", vae=g.add("VAELoader", vae_name="nano_vae16.safetensors"),
                    samples=native(g, conditions(g, prompt), empty(g)))  # fmt: skip
    save_frames(g, decoded)
    theirs = frames(client, client.run(g.nodes))
    psnr = -10 * torch.log10(((mine - theirs) / 2).square().mean()).item()
    print(f"PSNR between our sampler and ComfyUI's nodes: {psnr:.1f} dB")
    assert psnr >= 40


def switch_step() -> int:
    """The first step of the low-noise expert."""
    return int((schedule("simple", STEPS, SHIFT).timesteps >= 875).sum())


def conditions(g: Graph, prompt: str) -> dict[str, Out]:
    encoder = g.add("WanCoreLoadTextEncoder", text_encoder_name="nano_umt5.safetensors", dtype="float32",
                    device="default")  # fmt: skip
    return {side: g.add("CLIPTextEncode", clip=encoder, text=text)
            for side, text in (("positive", prompt), ("negative", ""))}  # fmt: skip


def vae(g: Graph) -> Out:
    return g.add("WanCoreLoadVAE", vae_name="nano_vae16.safetensors", dtype="float32")


def empty(g: Graph) -> Out:
    return g.add("EmptyHunyuanLatentVideo", width=SIDE, height=SIDE, length=FRAMES, batch_size=1)


def ours(g: Graph, sides: dict[str, Out], latent: Out) -> Out:
    high, low = (wan.load(g, name) for name in EXPERTS)
    pair = g.add("WanCoreExpertSwitch", high=high, low=low, mode="step", boundary=switch_step())
    return wan.sample(g, pair, sides, latent, steps=STEPS, shift=SHIFT, cfg_high=GUIDANCE, cfg_low=GUIDANCE,
                      solver="euler", schedule="simple")  # fmt: skip


def native(g: Graph, sides: dict[str, Out], latent: Out) -> Out:
    bounds = ((0, switch_step(), "enable"), (switch_step(), 10000, "disable"))
    for name, (start, end, noise) in zip(EXPERTS, bounds, strict=True):
        model = g.add("UNETLoader", unet_name=name, weight_dtype="default")
        shifted = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
        latent = g.add("KSamplerAdvanced", model=shifted, add_noise=noise, noise_seed=7, steps=STEPS, cfg=GUIDANCE,
                       sampler_name="euler", scheduler="simple", **sides, latent_image=latent, start_at_step=start,
                       end_at_step=end, return_with_leftover_noise=noise)  # fmt: skip
    return latent


def save_frames(g: Graph, images: Out) -> None:
    g.add("SaveImage", images=images, filename_prefix="nano")


def frames(client: Client, run: Run) -> torch.Tensor:
    """The saved pictures as a clip [3, F, H, W] in -1..1."""
    assert run.ok, run.error
    files = sorted((file for file in run.files if file["filename"].endswith(".png")), key=lambda f: f["filename"])
    pictures = [np.asarray(Image.open(io.BytesIO(client.download(file))).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2).float() / 127.5 - 1
