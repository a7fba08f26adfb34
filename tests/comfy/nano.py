"""The nano family's files in graphs."""

from __future__ import annotations

from typing import Any

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

EXPERTS = [f"nano_t2v_{noise}_noise.safetensors" for noise in ("high", "low")]


def pair(g: Graph, **switch: Any) -> Out:
    """Both T2V experts joined."""
    high, low = (wan.load(g, name) for name in EXPERTS)
    return g.add("WanCoreExpertSwitch", **{"high": high, "low": low, "mode": "auto", "boundary": 0.875} | switch)


def conditions(g: Graph, prompt: str) -> dict[str, Out]:
    encoder = g.add(
        "WanCoreLoadTextEncoder", text_encoder_name="nano_umt5.safetensors", dtype="float32", device="default"
    )
    return {
        side: g.add("CLIPTextEncode", clip=encoder, text=text)
        for side, text in (("positive", prompt), ("negative", ""))
    }
