"""One queued prompt neither stops the server nor its worker, whatever is in it; and what is long can be cancelled."""

from __future__ import annotations

import math
import time

import pytest
from comfy_server import Client, PromptRejected, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

SMALL = {"width": 64, "height": 64, "frames": 5}
HUGE = {"width": 16384, "height": 16384, "frames": 16385, "batch_size": 64}


def whole_graph() -> tuple[Graph, dict[str, Out]]:
    """Every node between text and video, and their outputs by a short name."""
    g = Graph()
    m, clip = wan.load(g, wan.DENSE), wan.clip(g)
    sides, latent = wan.prompts(g, clip), wan.empty(g, m, **SMALL)
    sampled, vae = wan.sample(g, m, sides, latent, steps=1), wan.vae(g, "ti2v")
    images = wan.decode(g, vae, sampled)
    g.add("PreviewAny", source=images)
    return g, {"load": m, "clip": clip, "empty": latent, "sample": sampled, "vae": vae, "decode": images}


@pytest.mark.parametrize(
    ("node", "values"),
    [
        ("sample", {"steps": 2**31}),
        ("sample", {"steps": 2**63}),
        ("sample", {"steps": -(2**63)}),
        ("sample", {"shift": math.nan}),
        ("sample", {"cfg_low": math.inf}),
        ("sample", {"denoise": math.nan}),
        ("sample", {"seed": -1}),
        ("sample", {"seed": 2**64}),
        ("sample", {"solver": ["a", "b", "c"]}),
        ("sample", {"solver": {"a": 1}}),
        ("sample", {"schedule": None}),
        ("sample", {"end_step": 2**31}),
        ("sample", {"solver": "\ud83d"}),
        ("sample", {"model": 5}),
        ("sample", {"positive": {"a": 1}}),
        ("load", {"model_name": "\ud83d"}),
        ("load", {"model_name": 2**63}),
        ("load", {"dtype": True}),
        ("empty", {"width": 2**31}),
        ("empty", {"batch_size": 2**31}),
        ("empty", {"frames": math.nan}),
        ("decode", {"tile_size": 2**31}),
        ("decode", {"overlap": -5}),
        ("vae", {"dtype": "\x00"}),
    ],
)
def test_hostile_values_are_refused_at_once(client: Client, node: str, values: dict) -> None:
    g, nodes = whole_graph()
    g.set(nodes[node], **values)
    began = time.monotonic()
    try:
        client.submit(g.nodes)
    except PromptRejected as rejected:
        said = str(rejected)
        assert "Unexpected" not in said and len(said) < 10_000, said
    else:  # a null stands for a link until the node runs
        assert list(values.values()) == [None]
    assert client.get("/queue") is not None
    assert time.monotonic() - began < 20, "the web server's loop was held up"


def assert_works(client: Client) -> None:
    """The server's worker is still there."""
    g, _ = whole_graph()
    assert client.run(g.nodes, timeout=120).ok


@pytest.mark.parametrize("text", ["a cat \ud83d on a board", "\udcff", "\x00\x01\x02", "\u202e" * 50])
def test_prompts_of_broken_text(client: Client, text: str) -> None:
    """ComfyUI's own node hands it to our text encoder."""
    g, nodes = whole_graph()
    sides = [Out(node) for node, entry in g.nodes.items() if entry["class_type"] == "CLIPTextEncode"]
    g.set(sides[0], text=text)
    run = client.run(g.nodes, timeout=120)
    assert run.ok or run.error, "neither an answer nor an error"
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        assert "half of a character" in run.error
    assert_works(client)


def test_a_null_is_an_error_when_the_node_runs(client: Client) -> None:
    g, nodes = whole_graph()
    g.set(nodes["sample"], schedule=None)
    run = client.run(g.nodes)
    assert "schedule has no value" in run.error
    assert_works(client)


def test_values_through_links_are_checked_when_the_node_runs(client: Client, server: Server) -> None:
    g, nodes = whole_graph()
    g.set(nodes["sample"], steps=g.add("PrimitiveInt", value=2**31))
    run = client.run(g.nodes)
    assert "2147483648 steps" in run.error and "at most 1000" in run.error
    g, nodes = whole_graph()
    g.set(nodes["empty"], width=g.add("PrimitiveInt", value=17))
    run = client.run(g.nodes)
    assert "multiple of 16" in run.error
    assert_works(client)


def test_sizes_that_no_machine_holds(client: Client) -> None:
    """Refused before anything is allocated, at the first node that would."""
    g, nodes = whole_graph()
    g.set(nodes["empty"], **HUGE)
    began = time.monotonic()
    run = client.run(g.nodes)
    assert "of memory, but" in run.error and "smaller size" in run.error
    assert time.monotonic() - began < 60
    g = Graph()
    m = wan.load(g, wan.DENSE)
    made = g.add(
        "WanCoreImageToVideo",
        model=m,
        vae=wan.vae(g, "ti2v"),
        **wan.prompts(g),
        **HUGE,
        fit="exact",
        start_image=wan.photograph(g),
    )
    g.add("PreviewAny", source=made.at(2))
    assert "of memory, but" in client.run(g.nodes).error


@pytest.mark.parametrize("loader", ["ours", "ComfyUI's"])
def test_encoding_an_image_can_be_cancelled(client: Client, loader: str) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    vae = wan.vae(g, "i2v") if loader == "ours" else g.add("VAELoader", vae_name=wan.VAES["i2v"])
    made = g.add(
        "WanCoreImageToVideo",
        model=m,
        vae=vae,
        **wan.prompts(g),
        width=512,
        height=512,
        frames=81,
        fit="exact",
        batch_size=1,
        start_image=wan.photograph(g),
    )
    g.add("PreviewAny", source=made.at(2))
    pressed = []

    def cancel(kind: str, data: dict) -> None:
        if kind == "executing" and data["node"] == made.node:
            client.interrupt()
            pressed.append(time.monotonic())

    run = client.run(g.nodes, on_event=cancel)
    assert run.interrupted and pressed
    assert time.monotonic() - pressed[0] < 20
    assert_works(client)


def test_comfyui_speaks_of_no_memory_leak(client: Client, server: Server) -> None:
    """Another shift makes another MODEL; the old one goes with its patcher."""
    before = len(server.log.read_text(errors="replace"))
    for shift in (3.0, 4.0, 5.0):
        g = Graph()
        m = wan.load(g, wan.DENSE)
        model = g.add("WanCoreToModel", model=m, shift=shift)
        sampled = g.add(
            "KSampler",
            model=model,
            seed=1,
            steps=1,
            cfg=2.0,
            **wan.prompts(g),
            denoise=1.0,
            latent_image=wan.empty(g, m, **SMALL),
            sampler_name="euler",
            scheduler="simple",
        )
        wan.save_latent(g, sampled, "no_leak")
        run = client.run(g.nodes)
        assert run.ok, run.error
    assert "Potential memory leak" not in server.log.read_text(errors="replace")[before:]
