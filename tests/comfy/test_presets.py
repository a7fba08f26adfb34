"""Presets of Wan Sampler in a real server: what they set, what they say, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from comfy_server import Client, PromptRejected, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph

LIGHTX2V = {"steps": 4, "cfg_high": 1.0, "cfg_low": 1.0, "shift": 5.0, "solver": "euler", "schedule": "simple"}


def sampled(client: Client, server: Server, name: str, batch: int = 1, **settings: object) -> tuple[torch.Tensor, str]:
    """A run's latent, and all that was said of it."""
    g = Graph()
    m = wan.model(g, "t2v")
    sampler = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, batch_size=batch), **settings)
    wan.save_latent(g, sampler, f"presets_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return wan.read_latent(server, f"presets_{name}"), "\n".join(text["text"] for text in run.of("wan_core.text"))


def test_a_preset_is_the_same_as_its_values(client: Client, server: Server) -> None:
    """To the bit; it says what it set, and which widgets did not count."""
    by_hand, silent = sampled(client, server, "hand", **LIGHTX2V)
    preset, said = sampled(client, server, "preset", preset="LightX2V-4step", steps=20, solver="unipc")
    assert torch.equal(by_hand, preset)
    assert "Preset" not in silent
    assert (
        "Preset LightX2V-4step: solver euler, schedule simple, 4 steps, shift 5, cfg 1, noise levels 1, 0.9375" in said
    )
    assert "stands in place of steps 20, cfg_high 2.0, cfg_low 3.0, solver unipc, schedule auto" in said


def test_custom_is_as_it_was(client: Client, server: Server) -> None:
    """A prompt saved before there were presets, and one that says custom."""
    old, _ = sampled(client, server, "old")
    new, _ = sampled(client, server, "new", preset="custom")
    assert torch.equal(old, new)


def test_lcm_draws_each_videos_own_noise_and_goes_on_in_the_middle(client: Client, server: Server) -> None:
    """The first of a batch is the video alone; a run in two samplers is the run in one (float32, 1e-5)."""
    rcm = {"preset": "rCM-T2V-4step"}
    alone, said = sampled(client, server, "alone", **rcm)
    batch, _ = sampled(client, server, "batch", batch=2, **rcm)
    assert "noise levels 0.9877, 0.9338, 0.8529, 0.609, 0" in said
    torch.testing.assert_close(batch[:1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch[1:], alone, atol=1e-2)

    g = Graph()
    m, sides = wan.model(g, "t2v"), wan.prompts(g)
    half = wan.sample(g, m, sides, wan.empty(g, m), end_step=2, **rcm)
    wan.save_latent(g, wan.sample(g, m, sides, half, start_step=2, add_noise=False, **rcm), "presets_halves")
    run = client.run(g.nodes)
    assert run.ok, run.error
    torch.testing.assert_close(wan.read_latent(server, "presets_halves"), alone, rtol=1e-4, atol=1e-4)


def test_three_and_one_and_another_model_are_said(client: Client, server: Server) -> None:
    _, said = sampled(client, server, "uneven", **LIGHTX2V | {"shift": 8.0})
    assert "at shift 8 the high-noise expert does 3 and the low-noise expert 1" in said
    _, said = sampled(client, server, "stranger", preset="FastWan-5B-3step")
    assert "made for Wan2.2 TI2V-5B; the model is Wan2.2 T2V-A14B" in said


def test_guidance_on_distilled_steps_is_refused_unless_forced(client: Client, server: Server) -> None:
    wanted = {"steps": 3, "solver": "lcm", "schedule": "fastwan", "shift": 8.0}
    g = Graph()
    m = wan.model(g, "t2v")
    wan.save_latent(g, wan.sample(g, m, wan.prompts(g), wan.empty(g, m), **wanted), "presets_guided")
    run = client.run(g.nodes)
    assert not run.ok and "distilled models" in run.error and "switch force on" in run.error, run.error
    latent, said = sampled(client, server, "forced", force=True, **wanted)
    assert latent.isfinite().all() and "Warning: The schedule fastwan" in said


def test_what_cannot_be_is_refused_when_queued(client: Client) -> None:
    g = Graph()
    m = wan.model(g, "t2v")
    sampler = wan.sample(g, m, wan.prompts(g), wan.empty(g, m), schedule="fastwan", steps=4)
    wan.save_latent(g, sampler, "presets_refused")
    with pytest.raises(PromptRejected, match="list of 3 steps, found 4"):
        client.run(g.nodes)
    g.set(sampler, preset="FastWan")
    with pytest.raises(PromptRejected, match="preset"):
        client.run(g.nodes)
