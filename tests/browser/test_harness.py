"""The browser harness against nodes of ComfyUI's own: what our workflows' tests rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


def node(order: int, kind: str, widgets: list, **sockets: list) -> dict:
    place = {"id": order + 1, "order": order, "pos": [60 + 340 * order, 120], "size": [280, 300]}
    return place | {"type": kind, "flags": {}, "mode": 0, "properties": {}, "widgets_values": widgets, **sockets}


BLUR = {
    "last_node_id": 3,
    "last_link_id": 2,
    "nodes": [
        node(0, "LoadImage", ["example.png", "image"], outputs=[{"name": "IMAGE", "type": "IMAGE", "links": [1]}]),
        node(1, "ImageBlur", [3, 1.0], inputs=[{"name": "image", "type": "IMAGE", "link": 1}],
             outputs=[{"name": "IMAGE", "type": "IMAGE", "links": [2]}]),
        node(2, "SaveImage", ["browser"], inputs=[{"name": "images", "type": "IMAGE", "link": 2}]),
    ],
    "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 2, 0, 3, 0, "IMAGE"]],
    "groups": [],
    "version": 0.4,
}  # fmt: skip


@pytest.fixture
def blur(tmp_path: Path) -> Path:
    path = tmp_path / "blur.json"
    path.write_text(json.dumps(BLUR))
    return path


def test_drop_and_run(app, blur: Path, tmp_path: Path) -> None:
    app.drop(blur)
    assert sorted(app.node_types()) == ["ImageBlur", "LoadImage", "SaveImage"]
    assert app.links() == [(1, 0, 2, 0), (2, 0, 3, 0)]
    assert not app.missing_nodes() and not app.alerts()
    app.set_widgets({"blur_radius": 5})
    prompt = app.run()["prompt_id"]
    saved = app.server.client.get(f"/history/{prompt}")[prompt]["outputs"]["3"]["images"][0]

    again = tmp_path / "saved.png"
    again.write_bytes(app.server.client.download(saved))
    app.drop(again)  # the image carries the workflow it was made with
    assert app.links() == [(1, 0, 2, 0), (2, 0, 3, 0)]


def test_missing_node_is_seen(app, tmp_path: Path) -> None:
    strange = BLUR | {"nodes": [*BLUR["nodes"], node(3, "NoSuchNode", [])]}
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(strange))
    app.drop(path)
    assert app.missing_nodes() == ["NoSuchNode"]
    assert app.alerts()


def test_nodes2_is_what_the_setting_says(app, blur: Path) -> None:
    app.drop(blur)
    app.fit()
    assert app.shown_nodes() == (3 if app.nodes2 else 0)
