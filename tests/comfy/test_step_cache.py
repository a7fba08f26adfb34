"""Wan Step Cache in a real server: fewer calls of the model, said on the nodes; and where it cannot be."""

from __future__ import annotations

import re

import pytest
import torch
from comfy_server import Client, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out


def cached(g: Graph, m: Out, **settings: object) -> Out:
    defaults = {"policy": "every", "threshold": 0.1, "every": 2, "dense": 0.2, "most": 2}
    return g.add("WanCoreStepCache", model=m, **defaults | settings)


def test_teacache_on_two_experts_is_refused_with_what_to_use(client: Client) -> None:
    """Said on its own node already, and again by the sampler."""
    g = Graph()
    m = wan.model(g, "t2v")
    node = cached(g, m, policy="teacache", tea_model="Wan2.1-T2V-14B")
    wan.save_latent(g, wan.sample(g, node, wan.prompts(g), wan.empty(g, m), steps=12), "step_cache_tea")
    run = client.run(g.nodes)
    assert not run.ok and "use the step cache magnitude" in run.error, run.error
    assert any("use the step cache magnitude" in text["text"] for text in run.of("wan_core.text"))


@pytest.mark.parametrize("policy", ["every", "magnitude", "easy"])
def test_steps_are_left_out_and_said(client: Client, server: Server, policy: str) -> None:
    latents = {}
    for name in ("dense", policy):
        g = Graph()
        m = wan.model(g, "t2v")
        node = cached(g, m, policy=policy, threshold=0.2) if name == policy else m
        sampler = wan.sample(g, node, wan.prompts(g), wan.empty(g, m), steps=12, schedule="simple")
        wan.save_latent(g, sampler, f"step_cache_{policy}_{name}")
        run = client.run(g.nodes)
        assert run.ok, run.error
        latents[name] = wan.read_latent(server, f"step_cache_{policy}_{name}")
        if name == policy:
            said = " ".join(text["text"] for text in run.of("wan_core.text"))
            assert f"Step cache {policy}" in said and "of 12 steps were computed" in said, said
            assert ("decided as the run goes" if policy == "easy" else "times as fast") in said
            last = [news["line"] for news in run.of("wan_core.preview") if "line" in news][-1]
            assert last["step"] == 12 and f"{12 - last['skipped']} of 12 steps were computed" in said
    assert latents["dense"].shape == latents[policy].shape and latents[policy].isfinite().all()
    if policy == "every":
        assert not torch.equal(latents["dense"], latents[policy])


def test_teacache_keeps_what_it_foretold(client: Client) -> None:
    """On the 5B model, for which a polynomial is published: the sampler's figure before the run and after it."""
    g = Graph()
    m = wan.model(g, "ti2v")
    node = cached(g, m, policy="teacache", threshold=0.2, dense=0.1)
    wan.save_latent(g, wan.sample(g, node, wan.prompts(g), wan.empty(g, m), steps=20), "step_cache_tea_5b")
    run = client.run(g.nodes)
    assert run.ok, run.error
    said = "\n".join(text["text"] for text in run.of("wan_core.text"))
    before = re.search(r"the polynomial of Wan2\.2-TI2V-5B: (\d+) of 20 steps will be computed", said)
    after = re.search(r"Step cache teacache: (\d+) of 20 steps were computed", said)
    assert before and after and before[1] == after[1], said


def test_few_steps_are_refused_before_anything_is_loaded(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.model(g, "t2v")
    wan.save_latent(g, wan.sample(g, cached(g, m), wan.prompts(g), wan.empty(g, m), steps=4), "step_cache_few")
    run = client.run(g.nodes)
    assert not run.ok and "there are only 4" in run.error, run.error


def test_comfyuis_samplers_are_told_to_use_their_own(client: Client) -> None:
    g = Graph()
    m = cached(g, wan.model(g, "t2v"))
    native = g.add("WanCoreToModel", model=m, shift=5.0)
    sides = wan.prompts(g)
    latent = wan.empty(g, m)
    sampler = g.add(
        "KSampler",
        model=native,
        latent_image=latent,
        seed=1,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        **sides,
    )
    wan.save_latent(g, sampler, "step_cache_native")
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert any("EasyCache" in text["text"] for text in run.of("wan_core.text"))
