"""What the pack adds to the editor, in each frontend and renderer: layout, menus, labels, help pages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from comfy_server import PACK

from tests.comfy import templates

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
NODES = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))

each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)


@each_workflow
def test_as_the_editor_reads_it(app, workflow: Path) -> None:
    """It would send the API twin, on other versions of ComfyUI with the inputs that its nodes have gained; and draws
    every node apart: Nodes 2.0 may make one larger than the file says."""
    app.drop(workflow)
    sent = app.page.evaluate("async () => (await app.graphToPrompt()).output")
    twin = json.loads((workflow.parent / "api" / workflow.name).read_text(encoding="utf-8"))
    if not templates.as_written(app.server.client):
        twin = templates.to_api(json.loads(workflow.read_text(encoding="utf-8")), app.server.client.object_info())
    assert bare(sent) == bare(twin)

    assert app.crowded() == []


def bare(graph: dict[str, Any]) -> dict[str, Any]:
    return {id: (node["class_type"], node["inputs"]) for id, node in graph.items()}


def test_image_of_ti2v_can_be_bypassed(app) -> None:
    """As Ctrl+B does it: the image node is left out, and nothing is connected in its place."""
    app.drop(ROOT / "workflows/wan22_ti2v_5b.json")
    app.page.evaluate("app.graph.nodes.find(node => node.type === 'LoadImage').mode = 4")
    sent = app.page.evaluate("async () => (await app.graphToPrompt()).output")
    by_type = {node["class_type"]: node["inputs"] for node in sent.values()}
    assert "LoadImage" not in by_type
    assert "start_image" not in by_type["WanCoreImageToVideo"]


def test_expert_switch_says_what_the_boundary_means(app) -> None:
    app.drop(ROOT / "workflows/wan22_t2v_a14b.json")
    assert boundary(app) == ["boundary", True, 0.875]
    for mode, label, start in (("step", "from step", 20), ("snr", "from SNR", 0.02), ("timestep", "below", 0.875)):
        app.set_widgets({"mode": mode})
        assert boundary(app) == [label, False, start]


def boundary(app) -> list[Any]:
    return app.page.evaluate("""() => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreExpertSwitch')
        const {label, disabled, value} = node.widgets.find(widget => widget.name === 'boundary')
        return [label, disabled, value]
    }""")


@pytest.mark.parametrize(
    ("node", "path", "expected"),
    [
        ("WanCoreSampler", ["Wan: presets", "I2V-A14B"], {"preset": "I2V-A14B", "steps": 40, "cfg_high": 3.5}),
        ("WanCoreSampler", ["Wan: presets", "LightX2V-4step"], {"steps": 4, "cfg_low": 1, "solver": "euler"}),
        ("WanCoreEmptyLatent", ["Wan: size", "14B, 1.3B: 480 × 832"], {"width": 480, "height": 832, "frames": 81}),
    ],
)
def test_presets_beside_the_selected_node(app, node: str, path: list[str], expected: dict[str, Any]) -> None:
    app.drop(ROOT / "workflows/wan22_t2v_a14b.json")
    app.fit()
    app.page.evaluate(_SELECT, node)
    app.page.locator("button:has(.pi-sliders-h)").first.click()
    for entry in path:
        app.page.locator(".litecontextmenu").get_by_text(entry, exact=True).first.click()
    values = app.page.evaluate(_VALUES, node)
    assert values | expected == values


_SELECT = """type => {
    app.canvas.selectNode(app.graph.nodes.find(node => node.type === type))
    app.canvas.setDirty(true, true)
}"""

_VALUES = """type => Object.fromEntries(
    app.graph.nodes.find(node => node.type === type).widgets.map(({name, value}) => [name, value]))"""


@pytest.mark.parametrize("language", ["en", "zh"])
def test_help_pages_are_served(app, language: str) -> None:
    for id in NODES:
        page = app.server.client.request(f"/extensions/{PACK}/docs/{id}/{language}.md").decode()
        assert page == (ROOT / "web/docs" / id / f"{language}.md").read_text(encoding="utf-8")
