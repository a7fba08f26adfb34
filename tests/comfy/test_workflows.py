"""The workflow files and translations against the nodes as a real server offers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_workflows
import pytest
from comfy_server import Client
from workflow_format import COMFYUI, Graph

from tests.comfy import graphs as wan
from tests.comfy import templates
from tests.comfy.graphs import Video
from wan_core.config import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
SIZE, FRAMES, STEPS = (96, 64), 9, 3
TABLES = {"": make_workflows.WORKFLOWS, " fast": make_workflows.FAST_WORKFLOWS}
each_workflow = pytest.mark.parametrize(
    ("task", "kind"), [(task, kind) for kind, table in TABLES.items() for task in table]
)


def read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@each_workflow
def test_files_are_what_their_description_makes(client: Client, task: str, kind: str) -> None:
    """So widget values stand in the order of the nodes' schemas, and both formats describe one graph.

    Mended by: python scripts/make_workflows.py http://...
    """
    name, prompt = TABLES[kind][task]
    schemas = client.object_info()
    graph = Graph(name, schemas)
    make_workflows.describe(graph, VARIANTS[task], prompt, fast=bool(kind))
    file, twin = read(f"workflows/{name}.json"), read(f"workflows/api/{name}.json")
    if templates.as_written(client):
        assert file == graph.ui()
        assert twin == graph.api()
        return
    assert without_their_slots(file) == without_their_slots(graph.ui())
    assert templates.to_api(file, schemas) == without_titles(graph.api())
    assert twin == with_inputs_of(twin, graph.api())


def without_their_slots(workflow: dict[str, Any]) -> dict[str, Any]:
    """Nodes of other versions of ComfyUI itself have further inputs and outputs, which nothing is linked to."""
    nodes = [dict(node) for node in workflow["nodes"]]
    for node in nodes:
        if node["properties"].get("cnr_id") == COMFYUI["cnr_id"]:
            node["inputs"] = [slot for slot in node["inputs"] if slot["link"]]
            node["outputs"] = [slot for slot in node["outputs"] if slot["links"]]
            del node["widgets_values"]
    return workflow | {"nodes": nodes}


def without_titles(graph: dict[str, Any]) -> dict[str, Any]:
    return {id: {key: node[key] for key in ("class_type", "inputs")} for id, node in graph.items()}


def with_inputs_of(twin: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """``made`` without the inputs that ComfyUI's own nodes have gained since."""
    ours = {id for id, node in made.items() if node["class_type"].startswith("WanCore")}
    return {
        id: node
        if id in ours
        else node | {"inputs": {name: value for name, value in node["inputs"].items() if name in twin[id]["inputs"]}}
        for id, node in made.items()
    }


@pytest.mark.parametrize(
    ("task", "kind", "image"),
    [
        ("t2v-A14B", "", False),
        ("i2v-A14B", "", True),
        ("ti2v-5B", "", True),
        ("ti2v-5B", "", False),
        ("i2v-14B", "", True),
        ("flf2v-14B", "", True),
        ("t2v-A14B", " fast", False),
        ("i2v-A14B", " fast", True),
    ],
)
def test_api_twin_runs(client: Client, task: str, kind: str, image: bool) -> None:
    """At a small size; the fps are the file's. TI2V also without its image, when it goes by the text alone."""
    graph = read(f"workflows/api/{TABLES[kind][task][0]}.json")
    run = client.run(small(graph if image else without_image(graph)))
    assert run.ok, run.error
    assert wan.read_video(client, run) == Video(FRAMES, *SIZE, VARIANTS[task].fps)


def small(graph: dict[str, Any]) -> dict[str, Any]:
    values = {"width": SIZE[0], "height": SIZE[1], "frames": FRAMES, "steps": STEPS, "fit": "exact", "dtype": "float32"}
    for node in graph.values():
        node["inputs"] |= {name: value for name, value in values.items() if name in node["inputs"]}
    return graph


def without_image(graph: dict[str, Any]) -> dict[str, Any]:
    """As the editor sends it when the node that loads the image is bypassed."""
    images = {id for id, node in graph.items() if node["class_type"] == "LoadImage"}
    for node in graph.values():
        node["inputs"] = {k: v for k, v in node["inputs"].items() if not (isinstance(v, list) and v[0] in images)}
    return {id: node for id, node in graph.items() if id not in images}


def test_translations_cover_every_node_and_input(client: Client) -> None:
    offered = {id: node for id, node in client.object_info().items() if id.startswith("WanCore")}
    for language in ("en", "zh"):
        translated = read(f"locales/{language}/nodeDefs.json")
        assert translated.keys() == offered.keys()
        for id, node in offered.items():
            assert translated[id]["inputs"].keys() == set(inputs(node)), id
            assert len(translated[id]["outputs"]) == len(node["output"])


def test_english_texts_are_the_nodes_own(client: Client) -> None:
    english = read("locales/en/nodeDefs.json")
    for id, node in client.object_info().items():
        if id.startswith("WanCore"):
            assert english[id]["display_name"] == node["display_name"]
            assert english[id]["description"] == node["description"]
            tooltips = {name: entry["tooltip"] for name, entry in english[id]["inputs"].items()}
            assert tooltips == {name: options["tooltip"] for name, (_, options) in inputs(node).items()}


def inputs(node: dict[str, Any]) -> dict[str, Any]:
    return node["input"].get("required", {}) | node["input"].get("optional", {})
