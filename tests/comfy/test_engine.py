"""What the engine keeps, and how it gives it back: re-runs, cancelling, freeing memory, files replaced on disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from comfy_server import Client, Run, Server
from safetensors.torch import load_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

SMALL = {"width": 64, "height": 32, "frames": 5}


def text_to_video(*, frames: int = 5, **settings: object) -> tuple[Graph, Out, Out]:
    """Graph, sampler, decoder."""
    g = Graph()
    m = wan.model(g, "t2v")
    sampled = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, 64, 32, frames), **settings)
    images = wan.decode(g, wan.vae(g, "t2v"), sampled)
    wan.save_video(g, images)
    return g, sampled, images


def mapped_models(server: Server) -> list[str]:
    """Model files that the server maps; not those that are gone, which newer versions' own loaders may still hold."""
    maps = Path(f"/proc/{server.process.pid}/maps").read_text().splitlines()
    folder = str((server.base / "models").resolve())
    return sorted({line.split(maxsplit=5)[5] for line in maps if folder in line and not line.endswith(" (deleted)")})


def own_memory(server: Server) -> int:
    """Bytes in RAM that are the server's own, and no pages of files."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def stored_bytes(server: Server, name: str) -> int:
    """The size of a model's file."""
    return next((server.base / "models").resolve().rglob(name)).stat().st_size


def wait_until(true: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.2)
    return true()


def test_another_seed_loads_no_weights(client: Client, server: Server) -> None:
    g, sampled, _ = text_to_video(seed=1)
    assert client.run(g.nodes).ok
    before = wan.loads(server)
    assert before > 0
    g.set(sampled, seed=2)
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert wan.loads(server) == before
    assert {g.nodes[node]["class_type"] for node in run.executed} == {
        "WanCoreSampler",
        "WanCoreVAEDecode",
        "CreateVideo",
        "SaveVideo",
    }


def test_cancel_while_sampling(client: Client, server: Server) -> None:
    g, sampled, _ = text_to_video(seed=3, steps=900, schedule="simple")
    run, seconds = interrupted_at(client, g, sampled)
    assert run.interrupted
    assert run.error is None
    assert run.progress(sampled.node)[-1][0] < 450
    assert seconds < 5
    before = wan.loads(server)
    g.set(sampled, steps=2)
    assert client.run(g.nodes).ok
    assert wan.loads(server) <= before + 1  # the VAE, if no earlier test had it; nothing was lost by cancelling


def test_cancel_while_decoding(client: Client) -> None:
    g, _, images = text_to_video(seed=4, steps=1, frames=401)
    run, seconds = interrupted_at(client, g, images)
    assert run.interrupted
    assert run.progress(images.node)[-1][0] < 90
    assert seconds < 10
    g, _, _ = text_to_video(seed=5, steps=1)
    assert client.run(g.nodes).ok


def interrupted_at(client: Client, g: Graph, out: Out) -> tuple[Run, float]:
    """Press cancel at a node's first progress; returns the run, and the seconds it took to end."""
    pressed: list[float] = []

    def on_event(kind: str, data: dict) -> None:
        if kind == "progress" and data["node"] == out.node and not pressed:
            pressed.append(time.monotonic())
            client.interrupt()

    run = client.run(g.nodes, on_event=on_event)
    return run, time.monotonic() - pressed[0]


def test_free_memory_gives_everything_back(client: Client, server: Server) -> None:
    """ComfyUI's button: no checkpoint stays mapped, and what was read of one leaves the RAM."""
    g, sampled, _ = text_to_video(seed=6)
    assert client.run(g.nodes).ok
    assert wan.TEXT_ENCODER in {Path(file).name for file in mapped_models(server)}
    before = own_memory(server)
    client.free()
    assert wait_until(lambda: not mapped_models(server)), mapped_models(server)
    read = (wan.expert("t2v", "high"), wan.expert("t2v", "low"), wan.VAES["t2v"])
    size = sum(stored_bytes(server, name) for name in read)
    assert wait_until(lambda: before - own_memory(server) > 0.8 * size), (before - own_memory(server), size)
    g.set(sampled, seed=7)
    assert client.run(g.nodes).ok


def test_a_vae_that_was_saved_is_given_back(client: Client, server: Server) -> None:
    """A node that reads the weights from their file, which the engine holds no part of."""
    client.free()
    g = Graph()
    g.add("VAESave", vae=wan.vae(g, "ti2v"), filename_prefix="vae/saved")
    run = client.run(g.nodes)
    assert run.ok, run.error
    (saved,) = (server.base / "output/vae").glob("saved*.safetensors")
    written, read = load_file(saved), load_file(server.base / "models/vae" / wan.VAES["ti2v"])
    assert written.keys() == read.keys() and all(written[key].equal(read[key]) for key in read)
    client.free()
    assert wait_until(lambda: not mapped_models(server)), mapped_models(server)


def test_unloading_models_alone_keeps_results(client: Client, server: Server) -> None:
    g, sampled, _ = text_to_video(seed=8)
    assert client.run(g.nodes).ok
    client.request("/free", {"unload_models": True})
    assert wait_until(lambda: not mapped_models(server)), mapped_models(server)
    g.set(sampled, seed=9)
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert "CLIPTextEncode" not in {g.nodes[node]["class_type"] for node in run.executed}


@pytest.fixture
def replaceable(server: Server):
    """A model file of this test's own in the server's folder."""
    folder = server.base / "models/diffusion_models"
    file = folder / "replaceable_low_noise.safetensors"
    shutil.copy(folder / wan.expert("t2v", "low"), file)
    yield file
    file.unlink()


def test_a_replaced_file_is_noticed(client: Client, server: Server, replaceable: Path) -> None:
    g = Graph()
    m = wan.load(g, replaceable.name)
    sampled = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SMALL), seed=10, steps=1)
    wan.save_latent(g, sampled, "replaced")
    assert client.run(g.nodes).ok
    first, before = wan.read_latent(server, "replaced"), wan.loads(server)
    assert client.run(g.nodes).executed == []

    other = replaceable.with_name("other")
    shutil.copy(replaceable.with_name(wan.expert("t2v", "high")), other)
    other.rename(replaceable)
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert wan.loads(server) == before + 1
    assert not wan.read_latent(server, "replaced").equal(first)


def test_block_swap_changes_nothing(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "low"))
    sides, latent = wan.prompts(g), wan.empty(g, m, **SMALL)
    for blocks in (0, 1, 100):
        swapped = g.add("WanCoreBlockSwap", model=m, blocks=blocks)
        wan.save_latent(g, wan.sample(g, swapped, sides, latent, steps=2), f"swap{blocks}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    results = [wan.read_latent(server, f"swap{blocks}") for blocks in (0, 1, 100)]
    assert results[0].equal(results[1]) and results[0].equal(results[2])


def test_the_first_of_a_batch_is_the_one_alone(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.model(g, "ti2v")
    sides = wan.prompts(g)
    for batch in (1, 2):
        latent = wan.empty(g, m, **SMALL, batch_size=batch)
        wan.save_latent(g, wan.sample(g, m, sides, latent), f"batch{batch}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    alone, both = (wan.read_latent(server, f"batch{batch}") for batch in (1, 2))
    assert both.shape[0] == 2
    assert (both[:1] - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert (both[1:] - alone).abs().max() > 0.1 * alone.abs().max()


def test_loaders_are_quick(client: Client) -> None:
    """Loader nodes read headers: less than 0.2 s each, also when nothing is known of the file yet."""
    g = Graph()
    wan.sample(
        g,
        wan.model(g, "i2v"),
        wan.prompts(g),
        g.add("EmptyHunyuanLatentVideo", width=16, height=16, length=1, batch_size=1),
    )
    g.add("PreviewAny", source=wan.vae(g, "i2v"))
    g.add("PreviewAny", source=wan.model(g, "i2v"))
    g.add("PreviewAny", source=wan.clip(g))
    client.free()
    starts: list[tuple[float, str | None]] = []
    client.run(
        g.nodes,
        on_event=lambda kind, data: starts.append((time.monotonic(), data["node"])) if kind == "executing" else None,
    )
    took = {node: end - start for (start, node), (end, _) in zip(starts, starts[1:], strict=False)}
    loaders = {node: s for node, s in took.items() if node and "Load" in g.nodes[node]["class_type"]}
    assert len(loaders) == 4
    assert max(loaders.values()) < 0.2, loaders


def test_every_way_to_ask_for_a_swap_gives_the_same_and_shows_its_plan(client: Client, server: Server) -> None:
    """Also a prompt saved before there were modes, whose node has ``blocks`` alone."""
    g = Graph()
    m, sides = wan.load(g, wan.DENSE), wan.prompts(g)
    latent = wan.empty(g, m, 64, 64, 5)
    ways = (
        {"blocks": 1},
        {"blocks": 2, "mode": "blocks", "prefetch": 3},
        {"blocks": 0, "mode": "vram_limit", "vram_limit": 0.5},
        {"blocks": 0, "mode": "auto", "prefetch": 0},
    )
    nodes = []
    for number, way in enumerate(ways):
        nodes.append(g.add("WanCoreBlockSwap", model=m, **way))
        wan.save_latent(g, wan.sample(g, nodes[-1], sides, latent, steps=2), f"way{number}")
    run = client.run(g.nodes)
    assert run.ok, run.error
    results = [wan.read_latent(server, f"way{number}") for number in range(len(ways))]
    assert all(results[0].equal(other) for other in results[1:])
    for node in nodes:
        (text,) = run.history["outputs"][node.node]["text"]
        assert "1280x704, 121 frames" in text and "blocks" in text, text


def test_a_budget_that_is_too_small_is_refused_with_the_smallest(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.DENSE)
    tight = g.add("WanCoreBlockSwap", model=m, blocks=0, mode="vram_limit", vram_limit=0.1, prefetch=1)
    wan.save_latent(g, wan.sample(g, tight, wan.prompts(g), wan.empty(g, m, 1280, 704, 121)), "tight")
    before = wan.loads(server)
    run = client.run(g.nodes)
    assert "does not fit into 0.1 GB" in run.error and "Allow 0." in run.error, run.error
    assert wan.loads(server) - before <= 1  # the text encoder; nothing of the transformer
