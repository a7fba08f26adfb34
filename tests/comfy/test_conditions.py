"""Several prompts on a side, with ranges, weights and masks: our sampler against ComfyUI's around its own network."""

from __future__ import annotations

import pytest
from comfy_server import Client, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from tests.comfy.test_native import assert_same, native, ours, run_both, theirs


def say(g: Graph, text: str) -> Out:
    return g.add("CLIPTextEncode", clip=wan.clip(g), text=text)


def during(g: Graph, conditioning: Out, start: float, end: float) -> Out:
    return g.add("ConditioningSetTimestepRange", conditioning=conditioning, start=start, end=end)


def weighed(g: Graph, conditioning: Out, strength: float) -> Out:
    return g.add("ConditioningSetAreaStrength", conditioning=conditioning, strength=strength)


def both(g: Graph, first: Out, second: Out) -> Out:
    return g.add("ConditioningCombine", conditioning_1=first, conditioning_2=second)


def masked(g: Graph, conditioning: Out, strength: float) -> Out:
    """On the left half."""
    black = g.add("SolidMask", value=0.0, width=64, height=64)
    white = g.add("SolidMask", value=1.0, width=32, height=64)
    half = g.add("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")
    return g.add(
        "ConditioningSetMask", conditioning=conditioning, mask=half, strength=strength, set_cond_area="default"
    )


def combined(g: Graph, sides: dict[str, Out]) -> dict[str, Out]:
    return {"positive": both(g, weighed(g, sides["positive"], 0.3), say(g, "a dog")), "negative": sides["negative"]}


def in_turn(g: Graph, sides: dict[str, Out]) -> dict[str, Out]:
    """The negative prompt changes at another step than the positive one; for a while two positive ones apply."""
    positive = both(g, during(g, sides["positive"], 0.0, 0.6), during(g, say(g, "a dog"), 0.3, 1.0))
    return {
        "positive": positive,
        "negative": both(g, during(g, sides["negative"], 0.0, 0.1), during(g, say(g, "grey"), 0.1, 1.0)),
    }


def in_places(g: Graph, sides: dict[str, Out]) -> dict[str, Out]:
    return {"positive": both(g, masked(g, sides["positive"], 0.7), say(g, "a dog")), "negative": sides["negative"]}


def with_a_default(g: Graph, sides: dict[str, Out]) -> dict[str, Out]:
    """The second prompt takes the half that the first one leaves."""
    positive = g.add(
        "ConditioningSetDefaultCombine", cond=masked(g, sides["positive"], 1.0), cond_DEFAULT=say(g, "a dog")
    )
    return {"positive": positive, "negative": sides["negative"]}


@pytest.mark.parametrize("how", [combined, in_turn, in_places, with_a_default], ids=lambda how: how.__name__)
def test_sides_of_several_prompts(client: Client, server: Server, how) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    m = wan.load(g, name)
    plain = wan.prompts(g)
    sides, latent = how(g, plain), wan.empty(g, m)
    run = run_both(
        client, server, g, f"sides_{how.__name__}", ours(g, m, sides, latent), theirs(g, native(g, name), sides, latent)
    )
    assert_same(*run)
    wan.save_latent(g, ours(g, m, plain, latent), "sides_plain")
    done = client.run(g.nodes)
    assert done.ok, done.error
    alone = wan.read_latent(server, "sides_plain")
    assert (run[0] - alone).abs().max() > 0.01 * alone.abs().max()  # the other prompts were heard


def test_a_gap_between_ranges_is_said(client: Client, server: Server) -> None:
    """There the clean estimate is 0, as in ComfyUI."""
    g, name = Graph(), wan.expert("t2v", "low")
    m, sides = wan.load(g, name), wan.prompts(g)
    sides["negative"] = both(g, during(g, sides["negative"], 0.0, 0.1), during(g, say(g, "grey"), 0.5, 1.0))
    latent = wan.empty(g, m)
    mine = ours(g, m, sides, latent)
    assert_same(*run_both(client, server, g, "sides_gap", mine, theirs(g, native(g, name), sides, latent)))
    assert "no negative prompt applies" in server.said()
