"""The shipped workflows, opened and run as a person does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SMALL = {"width": 96, "height": 64, "frames": 9, "length": 9, "steps": 4}

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)


def in_file(workflow: Path) -> dict[str, Any]:
    return json.loads(workflow.read_text(encoding="utf-8"))


def assert_whole(app, workflow: Path) -> None:
    """Every node and link of the file is on the canvas, and the frontend has nothing to complain about."""
    content = in_file(workflow)
    assert app.node_types() == Counter(node["type"] for node in content["nodes"])
    assert sorted(app.links()) == sorted(tuple(link[1:5]) for link in content["links"])
    assert app.missing_nodes() == []
    assert app.alerts() == []


def test_there_are_workflows() -> None:
    assert len(WORKFLOWS) >= 3


@each_workflow
def test_opens_from_the_template_browser(app, workflow: Path) -> None:
    app.open_template(workflow.stem)
    assert_whole(app, workflow)


@each_workflow
def test_dropped_and_run(app, workflow: Path, tmp_path: Path) -> None:
    app.drop(workflow)
    app.screenshot(workflow.stem)
    assert_whole(app, workflow)

    app.set_widgets(SMALL)
    prompt = app.run()["prompt_id"]
    outputs = app.server.client.get(f"/history/{prompt}")[prompt]["outputs"].values()
    (video,) = [file for output in outputs for file in output.get("images", []) if file["filename"].endswith(".mp4")]
    app.screenshot(f"{workflow.stem}-done")
    assert app.crowded() == []  # with what the nodes say and show

    saved = tmp_path / "saved.mp4"
    saved.write_bytes(app.server.client.download(video))
    with av.open(str(saved)) as container:
        assert sum(1 for _ in container.decode(video=0)) == SMALL["frames"]
    app.drop(saved)  # a saved video carries the workflow it was made with
    assert_whole(app, workflow)
