"""Wan Guidance in a real server, on the nano pair: calls, texts, results, refusals, and where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfy_server import Client, PromptRejected, Run, Server

from tests.comfy import graphs as wan
from tests.comfy import nano
from tests.comfy.graphs import Graph, Out
from wan_core.sampling.guidance_rules import RULES

SETTINGS = {
    "zero_steps": 1, "momentum": -0.75, "norm_threshold": 55.0, "eta": 0.0, "sigma_start": 1.0, "sigma_end": 0.5,
    "blocks": "1", "nag_scale": 11.0, "nag_tau": 2.5, "nag_alpha": 0.25,
}  # fmt: skip
PROMPT = "A red circle moves to the right over the ocean."

pytestmark = pytest.mark.usefixtures("nano_files")


def guided(g: Graph, m: Out, rule: str, **settings: Any) -> Out:
    return g.add("WanCoreGuidance", model=m, rule=rule, **SETTINGS | settings)


def said(run: Run) -> str:
    return " ".join(text["text"] for text in run.of("wan_core.text"))


def drawn(client: Client, server: Server, name: str, *rules: dict, **options: Any) -> tuple[torch.Tensor, str]:
    """A latent of the nano pair, and what the nodes said."""
    g = Graph()
    m = nano.pair(g)
    for rule in rules:
        m = guided(g, m, **rule)
    sides = nano.conditions(g, PROMPT) | {"negative": wan.prompts(g, nano_text(g))["negative"]}
    wan.save_latent(g, wan.sample(g, m, sides, wan.empty(g, m), **{"steps": 6} | options), f"guidance_{name}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return wan.read_latent(server, f"guidance_{name}"), said(run)


def nano_text(g: Graph) -> Out:
    return g.add("WanCoreLoadTextEncoder", text_encoder_name="nano_umt5.safetensors", dtype="float32", device="default")


def test_the_menu_is_the_registry(client: Client) -> None:
    node = client.object_info()["WanCoreGuidance"]
    kind, options = node["input"]["required"]["rule"]
    assert (kind if isinstance(kind, list) else options["options"]) == list(RULES)
    assert list(node["input"]["required"]) == ["model", "rule", *SETTINGS]


@pytest.fixture(scope="module")
def plain(server: Server, nano_files: None) -> torch.Tensor:
    return drawn(Client(server.url, server.check), server, "plain")[0]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_and_is_said(client: Client, server: Server, plain: torch.Tensor, rule: str) -> None:
    ours, text = drawn(client, server, rule, {"rule": rule, "sigma_end": 0.9})
    assert f"Guidance: {rule}" in text and "calls of the model in 6 steps" in text, text
    assert ("instead of 12" in text) == (rule in ("interval", "cfg_merge", "cfg_zero_star"))
    assert ours.isfinite().all() and ours.shape == plain.shape
    if rule == "cfg_merge":
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    else:
        assert (ours - plain).abs().max() > 1e-3


def test_rules_in_a_row_combine(client: Client, server: Server) -> None:
    rows = [{"rule": rule} for rule in ("apg", "cfg_zero_star", "slg", "interval", "nag")]
    together, text = drawn(client, server, "row", *rows)
    turned, _ = drawn(client, server, "turned", *rows[::-1])
    assert torch.equal(together, turned) and together.isfinite().all()
    assert all(rule["rule"] in text for rule in rows)


def test_nag_is_a_negative_prompt_at_cfg_1(client: Client, server: Server) -> None:
    off = {"cfg_high": 1.0, "cfg_low": 1.0}
    plain, _ = drawn(client, server, "cfg1", **off)
    ours, text = drawn(client, server, "nag1", {"rule": "nag"}, **off)
    assert (ours - plain).abs().max() > 1e-3 and "6 calls of the model in 6 steps" in text


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        ([{"rule": "slg", "blocks": "99"}], {}, "slg leaves out the blocks 99, but the model has"),
        ([{"rule": "apg"}, {"rule": "tcfg"}], {}, "Choose one of tcfg and apg"),
        ([{"rule": "apg"}, {"rule": "apg"}], {}, "given twice"),
        ([{"rule": "apg"}], {"cfg_high": 1.0, "cfg_low": 1.0}, "The guidance is 1"),
        ([{"rule": "cfg_zero_star", "zero_steps": 6}], {}, "there are only 6"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_are_read(
    client: Client, server: Server, rules: list[dict], options: dict, message: str
) -> None:
    loads = wan.loads(server)
    g = Graph()
    m = nano.pair(g)
    for rule in rules:
        m = guided(g, m, **rule)
    sides = nano.conditions(g, PROMPT)
    wan.save_latent(g, wan.sample(g, m, sides, wan.empty(g, m), **{"steps": 6} | options), "guidance_no")
    run = client.run(g.nodes)
    assert not run.ok and message in run.error, run.error
    assert wan.loads(server) - loads <= 1  # the text encoder at most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "slg", "blocks": "one"}, "whole numbers with commas"),
        ({"rule": "interval", "sigma_start": 0.1}, "end must be below"),
        ({"rule": "agp"}, "agp"),
        ({"rule": "nag", "nag_alpha": 2.0}, "nag_alpha"),
    ],
)
def test_what_a_node_cannot_be_is_not_queued(client: Client, settings: dict, message: str) -> None:
    g = Graph()
    m = guided(g, nano.pair(g), **settings)
    wan.save_latent(g, wan.sample(g, m, nano.conditions(g, PROMPT), wan.empty(g, m)), "guidance_never")
    with pytest.raises(PromptRejected, match=message):
        client.submit(g.nodes)


def test_a_network_that_comfyui_holds_keeps_its_blocks(client: Client, server: Server) -> None:
    """What works on answers works with it too; what reaches into the network is refused, also of a pair's one half."""
    g = Graph()
    held = [
        g.add("WanCoreFromModel", model=g.add("UNETLoader", unet_name=name, weight_dtype="default"))
        for name in nano.EXPERTS
    ]
    with_rules = guided(g, guided(g, held[1], "apg"), "cfg_zero_star")
    sides = nano.conditions(g, PROMPT)
    wan.save_latent(g, wan.sample(g, with_rules, sides, wan.empty(g, with_rules)), "guidance_held")
    run = client.run(g.nodes)
    assert run.ok and "Guidance: cfg_zero_star" in said(run), run.error
    assert wan.read_latent(server, "guidance_held").isfinite().all()
    for rule in ("nag", "slg", "cfg_merge"):
        g = Graph()
        loaded = g.add("UNETLoader", unet_name=nano.EXPERTS[1], weight_dtype="default")
        low = g.add("WanCoreFromModel", model=loaded)
        high = guided(g, wan.load(g, nano.EXPERTS[0]), rule)
        m = g.add("WanCoreExpertSwitch", high=high, low=low, mode="auto", boundary=0.875)
        wan.save_latent(g, wan.sample(g, m, nano.conditions(g, PROMPT), wan.empty(g, m)), "guidance_mixed")
        run = client.run(g.nodes)
        assert not run.ok and f"{rule} works within the network" in run.error and "Load Wan Model" in run.error


def test_an_expert_at_cfg_1_is_said(client: Client, server: Server) -> None:
    _, text = drawn(client, server, "one", {"rule": "apg"}, cfg_low=1.0)
    assert "low-noise expert has a guidance of 1: apg does nothing there" in text, text


def test_comfyuis_samplers_are_told_of_their_own(client: Client) -> None:
    g = Graph()
    m = guided(g, guided(g, nano.pair(g), "apg"), "cfg_merge")
    native = g.add("WanCoreToModel", model=m, shift=5.0)
    sampler = g.add(
        "KSampler",
        model=native,
        latent_image=wan.empty(g, m),
        seed=1,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
        **nano.conditions(g, PROMPT),
    )
    wan.save_latent(g, sampler, "guidance_native")
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert "Wan Guidance has no effect here" in said(run) and "Adaptive Projected Guidance" in said(run)
