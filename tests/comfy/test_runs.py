"""Whole graphs of our own nodes on a real server, from the loaders to the mp4."""

from __future__ import annotations

import pytest
from comfy_server import Client

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out, Video

SIZE = (96, 64)


def full_graph(task: str, *, image: bool, seed: int = 7, fps: float = 16.0) -> tuple[Graph, Out]:
    g = Graph()
    m, v, sides = wan.model(g, task), wan.vae(g, task), wan.prompts(g)
    if task == "t2v":
        latent = wan.empty(g, m, *SIZE, frames=9)
    else:
        shot = {"start_image": wan.photograph(g)} if image else {}
        start = g.add(
            "WanCoreImageToVideo",
            model=m,
            vae=v,
            **sides,
            width=SIZE[0],
            height=SIZE[1],
            frames=9,
            fit="exact",
            batch_size=1,
            **shot,
        )
        sides, latent = {"positive": start, "negative": start.at(1)}, start.at(2)
    sampled = wan.sample(g, m, sides, latent, seed=seed)
    wan.save_video(g, wan.decode(g, v, sampled), fps)
    return g, sampled


@pytest.mark.parametrize(
    ("task", "image", "fps"), [("t2v", False, 16), ("i2v", True, 16), ("ti2v", True, 24), ("ti2v", False, 24)]
)
def test_from_loaders_to_mp4(client: Client, task: str, image: bool, fps: int) -> None:
    g, sampled = full_graph(task, image=image, fps=fps)
    run = client.run(g.nodes)
    assert run.ok, run.error
    assert wan.read_video(client, run) == Video(9, *SIZE, fps)
    assert run.progress(sampled.node)[-1] == (3, 3)
    assert len([p for p in run.previews if p.node == sampled.node]) == 3
