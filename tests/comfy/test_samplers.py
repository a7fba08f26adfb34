"""Wan as ComfyUI MODEL under ComfyUI's own samplers: all of them run; cancel, previews and memory behave."""

from __future__ import annotations

import io
import time

import pytest
import torch
from comfy_server import Client, Server
from PIL import Image

from tests.comfy import graphs as wan
from tests.comfy import nano
from tests.comfy.graphs import Graph, Out
from tests.comfy.test_engine import mapped_models, own_memory, stored_bytes, wait_until

SAMPLERS = (
    "euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral",
    "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "ddim", "uni_pc", "uni_pc_bh2", "lcm", "ipndm", "deis",
    "res_multistep", "gradient_estimation", "er_sde", "seeds_2", "sa_solver", "euler_cfg_pp",
)  # fmt: skip
SCHEDULERS = ("simple", "normal", "beta", "sgm_uniform")
STEPS = 4


def to_model(g: Graph, task: str = "t2v") -> tuple[Out, Out]:
    """Our model, and the same as a MODEL."""
    m = wan.model(g, task)
    return m, g.add("WanCoreToModel", model=m, shift=5.0)


def sampled(
    g: Graph, model: Out, latent: Out, sampler: str = "euler", scheduler: str = "simple", **settings: object
) -> Out:
    plain = {"seed": 3, "steps": STEPS, "cfg": 2.0, "denoise": 1.0}
    return g.add(
        "KSampler",
        model=model,
        **wan.prompts(g),
        latent_image=latent,
        sampler_name=sampler,
        scheduler=scheduler,
        **plain | settings,
    )


@pytest.mark.usefixtures("nano_files")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_samplers_and_schedulers_give_numbers(client: Client, server: Server, scheduler: str) -> None:
    """Through both trained experts; no two samplers are the same by accident of being ignored."""
    g = Graph()
    m = nano.pair(g)
    model = g.add("WanCoreToModel", model=m, shift=5.0)
    latent, sides = wan.empty(g, m, 64, 64, 5), nano.conditions(g, "A red circle moves up over the ocean.")
    for name in SAMPLERS:
        made = g.add(
            "KSampler",
            model=model,
            **sides,
            latent_image=latent,
            sampler_name=name,
            scheduler=scheduler,
            seed=3,
            steps=STEPS,
            cfg=2.0,
            denoise=1.0,
        )
        wan.save_latent(g, made, latent_name(scheduler, name))
    run = client.run(g.nodes)
    assert run.ok, run.error
    results = {name: wan.read_latent(server, latent_name(scheduler, name)) for name in SAMPLERS}
    wrong = [name for name, result in results.items() if not torch.isfinite(result).all() or result.std() < 0.1]
    assert not wrong, wrong
    assert len({result.numpy().tobytes() for result in results.values()}) >= len(SAMPLERS) - 2


def latent_name(scheduler: str, sampler: str) -> str:
    """None begins with another one."""
    return f"samplers_{scheduler}_{sampler.replace('_', '-')}"


def test_cancel_stops_within_a_step(client: Client, server: Server) -> None:
    """A step takes most of a second here; the next run finds all in order."""
    g = Graph()
    m, model = to_model(g)
    sampler = sampled(g, model, wan.empty(g, m, 256, 256, 17), steps=200)
    wan.save_latent(g, sampler, "samplers_cancelled")
    pressed: list[float] = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == sampler.node and not pressed:
            pressed.append(time.monotonic())
            client.interrupt()

    run = client.run(g.nodes, on_event=on_event)
    assert run.interrupted and run.error is None
    assert run.progress(sampler.node)[-1][0] <= 3
    before = wan.loads(server)
    g.set(sampler, steps=2, latent_image=wan.empty(g, m, 32, 32, 1))
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert wan.loads(server) <= before + 1  # the other expert, if it had not been needed yet


@pytest.mark.parametrize("task", ["t2v", "ti2v"])
def test_previews_arrive(client: Client, task: str) -> None:
    """One picture a step, of the latent's size, not of one colour: the latent formats fit."""
    g = Graph()
    m, model = to_model(g, task)
    sampler = sampled(g, model, wan.empty(g, m, 128, 64, 5))
    wan.save_latent(g, sampler, "samplers_preview")
    run = client.run(g.nodes)
    assert run.ok, run.error
    pictures = [Image.open(io.BytesIO(p.image)).convert("RGB") for p in run.previews if p.node == sampler.node]
    assert len(pictures) == STEPS
    for picture in pictures:
        assert picture.width == 2 * picture.height
        assert max(high - low for low, high in picture.getextrema()) > 20


def test_comfyui_knows_what_the_engine_holds(client: Client, server: Server) -> None:
    """To ComfyUI the MODEL has no bytes, so that it moves none; the engine's own entry has them, and leaves on asking.

    On a CPU its figures of free memory are those of the system.
    """
    g = Graph()
    m, model = to_model(g)
    sampler = sampled(g, model, wan.empty(g, m, 32, 32, 1), seed=11)
    wan.save_latent(g, sampler, "samplers_memory")
    said = len(server.said())
    run = client.run(g.nodes)
    assert run.ok, run.error
    log = server.said(said)
    loads = [line for line in log.partition("Requested to load WAN21")[2].splitlines() if "loaded completely" in line]
    assert " 0.00 MB loaded" in loads[0], loads
    (device,) = client.get("/system_stats")["devices"]
    assert 0 < device["vram_free"] <= device["vram_total"] and 0 <= device["torch_vram_free"] <= device["vram_total"]
    before, size = own_memory(server), stored_bytes(server, wan.expert("t2v", "high"))
    client.free()
    assert wait_until(lambda: before - own_memory(server) > 0.8 * size)
    assert wait_until(lambda: not mapped_models(server)), mapped_models(server)
    g.set(sampler, seed=12)
    again = client.run(g.nodes)
    assert again.ok, again.error
