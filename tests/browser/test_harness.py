"""The browser harness against nodes of ComfyUI's own: what our workflows' tests rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BLUR = {
    "last_node_id": 3,
    "last_link_id": 2,
    "nodes": [
        {"id": 1, "type": "LoadImage", "pos": [60, 120], "size": [280, 320], "inputs": [],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}], "widgets_values": ["example.png", "image"]},
        {"id": 2, "type": "ImageBlur", "pos": [400, 120], "size": [270, 82],
         "inputs": [{"name": "image", "type": "IMAGE", "link": 1}],
         "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [2]}], "widgets_values": [3, 1.0]},
        {"id": 3, "type": "SaveImage", "pos": [720, 120], "size": [280, 270],
         "inputs": [{"name": "images", "type": "IMAGE", "link": 2}], "outputs": [], "widgets_values": ["browser"]},
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
    assert not app.missing_nodes()
    app.set_widgets({"blur_radius": 5})
    prompt = app.run()["prompt_id"]
    saved = app.server.client.get(f"/history/{prompt}")[prompt]["outputs"]["3"]["images"][0]

    again = tmp_path / "saved.png"
    again.write_bytes(app.server.client.download(saved))
    app.drop(again)  # the image carries the workflow it was made with
    assert app.links() == [(1, 0, 2, 0), (2, 0, 3, 0)]


def test_missing_node_is_seen(app, tmp_path: Path) -> None:
    strange = BLUR | {"nodes": [*BLUR["nodes"], {"id": 4, "type": "NoSuchNode", "pos": [60, 520], "size": [200, 60]}]}
    path = tmp_path / "strange.json"
    path.write_text(json.dumps(strange))
    app.drop(path)
    assert app.missing_nodes() == ["NoSuchNode"]


def test_nodes2_is_what_the_setting_says(app, blur: Path) -> None:
    app.drop(blur)
    app.page.wait_for_timeout(500)
    assert app.shown_nodes() == (3 if app.nodes2 else 0)
