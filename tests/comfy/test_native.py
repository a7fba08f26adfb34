"""Wan as ComfyUI MODEL: both experts behind one native MODEL do what our own sampler does."""

from __future__ import annotations

import pytest
import torch
from comfy_server import Client, Server
from safetensors.torch import save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

STEPS, SHIFT, SEED = 6, 5.0, 3
PLAIN = {"denoise": 1.0, "sampler_name": "euler", "scheduler": "simple"}


def ours(g: Graph, m: Out, sides: dict[str, Out], latent: Out, **settings: object) -> Out:
    return wan.sample(g, m, sides, latent, seed=SEED, steps=STEPS, shift=SHIFT, cfg_high=3.0, cfg_low=3.0,
                      **{"solver": "euler", "schedule": "simple"} | settings)  # fmt: skip


def theirs(g: Graph, model: Out, sides: dict[str, Out], latent: Out, **settings: object) -> Out:
    return g.add("KSampler", model=model, seed=SEED, steps=STEPS, cfg=3.0, **sides, latent_image=latent,
                 **PLAIN | settings)  # fmt: skip


def to_model(g: Graph, m: Out) -> Out:
    return g.add("WanCoreToModel", model=m, shift=SHIFT)


def run_both(client: Client, server: Server, g: Graph, name: str, mine: Out, native: Out) -> tuple[torch.Tensor, ...]:
    for which, latent in (("mine", mine), ("native", native)):
        wan.save_latent(g, latent, f"{name}_{which}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return tuple(wan.read_latent(server, f"{name}_{which}") for which in ("mine", "native"))


def assert_close(mine: torch.Tensor, native: torch.Tensor) -> None:
    """To the rounding of ComfyUI's way through x0 and its float32 sigmas: 1e-4 of the largest value."""
    assert mine.shape == native.shape and mine.std() > 0.1
    assert (mine - native).abs().max() <= 1e-4 * native.abs().max()


@pytest.mark.parametrize("mode", [{"mode": "auto"}, {"mode": "step", "boundary": 2}, {"mode": "snr", "boundary": 0.05}])
def test_ksampler_equals_our_sampler(client: Client, server: Server, mode: dict) -> None:
    g = Graph()
    m, sides = wan.model(g, "t2v", **mode), wan.prompts(g)
    latent = wan.empty(g, m)
    made = run_both(client, server, g, f"tomodel_{mode['mode']}", ours(g, m, sides, latent),
                    theirs(g, to_model(g, m), sides, latent))  # fmt: skip
    assert_close(*made)


@pytest.mark.parametrize("task", ["i2v", "ti2v"])
def test_images_reach_the_model(client: Client, server: Server, task: str) -> None:
    """Through our conditioning node, and the same through a native sampler."""
    g = Graph()
    m, v = wan.model(g, task), wan.vae(g, task)
    start = g.add("WanCoreImageToVideo", model=m, vae=v, **wan.prompts(g), width=64, height=64, frames=5, fit="exact",
                  batch_size=1, start_image=wan.photograph(g))  # fmt: skip
    sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
    made = run_both(client, server, g, f"tomodel_{task}", ours(g, m, sides, latent),
                    theirs(g, to_model(g, m), sides, latent))  # fmt: skip
    assert_close(*made)


def test_patches_and_caches_of_comfyui_work(client: Client, server: Server) -> None:
    """ModelSamplingSD3 replaces the shift; EasyCache skips steps and still ends in numbers."""
    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    latent, model = wan.empty(g, m), g.add("WanCoreToModel", model=m, shift=1.0)
    shifted = g.add("ModelSamplingSD3", model=model, shift=SHIFT)
    made = run_both(client, server, g, "tomodel_shift", ours(g, m, sides, latent), theirs(g, shifted, sides, latent))
    assert_close(*made)
    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    cached = g.add("EasyCache", model=to_model(g, m), reuse_threshold=3.0, start_percent=0.1, end_percent=0.95,
                   verbose=False)  # fmt: skip
    _, skipped = run_both(client, server, g, "tomodel_cache", ours(g, m, sides, wan.empty(g, m)),
                          theirs(g, cached, sides, wan.empty(g, m)))  # fmt: skip
    assert torch.isfinite(skipped).all() and (skipped - made[0]).abs().max() > 1e-4


def test_native_lora_nodes_are_told_where_to_go(client: Client, server: Server) -> None:
    folder = server.base / "models/loras"
    folder.mkdir(exist_ok=True)
    layer = "diffusion_model.blocks.0.self_attn.q"
    weights = {f"{layer}.lora_A.weight": torch.zeros(1, 256), f"{layer}.lora_B.weight": torch.zeros(256, 1)}
    save_file(weights, folder / "nothing.safetensors")
    g = Graph()
    m = wan.model(g, "t2v")
    patched = g.add("LoraLoaderModelOnly", model=to_model(g, m), lora_name="nothing.safetensors", strength_model=1.0)
    wan.save_latent(g, theirs(g, patched, wan.prompts(g), wan.empty(g, m)), "tomodel_lora")
    run = client.run(g.nodes)
    assert not run.ok and "Wan LoRA" in str(run.error)
