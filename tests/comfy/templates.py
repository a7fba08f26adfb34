"""ComfyUI's official templates, read from the package that its requirements install, in the API format.

What the editor does when a prompt is queued: bypassed nodes pass their input on, muted ones and notes disappear,
subgraphs are opened, and widget values are named by the nodes' schemas. `settled` does what the server does with
newer templates: they hold their numbers in nodes of their own and choose between two ways with switches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_server import Client
from comfyui_workflow_templates import get_asset_path
from workflow_format import COMFYUI, WIDGET_TYPES, Node

Api = dict[str, dict[str, Any]]
Schemas = dict[str, dict[str, Any]]  # the server's /object_info
MUTED, BYPASSED = 2, 4  # LiteGraph's modes
INSIDE = -10  # the node that stands for a subgraph's inputs
PRIMITIVES = ("PrimitiveInt", "PrimitiveFloat", "PrimitiveBoolean", "PrimitiveString", "PrimitiveStringMultiline")
SWITCH = "ComfySwitchNode"
SEEDS, AFTER_SEEDS = ("seed", "noise_seed"), ("fixed", "increment", "decrement", "randomize")


@dataclass(frozen=True)
class Value:
    """A widget's value that reaches an input through the boundary of a subgraph."""

    value: Any


def exists(name: str) -> bool:
    """Whether the installed package has a template; they come and go."""
    try:
        return Path(get_asset_path(name, f"{name}.json")).is_file()
    except KeyError:
        return False


def as_written(client: Client) -> bool:
    """Whether the server is the version that the pack's own workflows were written for."""
    return client.get("/system_stats")["system"]["comfyui_version"] == COMFYUI["ver"]


def read(name: str) -> dict[str, Any]:
    return json.loads(Path(get_asset_path(name, f"{name}.json")).read_text(encoding="utf-8"))


def nodes_of(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All nodes, those in subgraphs too."""
    yield from workflow["nodes"]
    for inner in workflow.get("definitions", {}).get("subgraphs", []):
        yield from inner["nodes"]


def to_api(workflow: dict[str, Any], schemas: Schemas) -> Api:
    subgraphs = {inner["id"]: inner for inner in workflow.get("definitions", {}).get("subgraphs", [])}
    return _Scope(workflow, schemas, subgraphs).api()


def settled(graph: Api) -> Api:
    """The same graph with values in the place of primitives, and of switches the branch that they choose."""

    def value(given: Any) -> Any:
        node = graph.get(given[0]) if isinstance(given, list) and given else None
        if node and node["class_type"] in PRIMITIVES:
            return value(node["inputs"]["value"])
        if node and node["class_type"] == SWITCH:
            return value(node["inputs"]["on_true" if value(node["inputs"]["switch"]) else "on_false"])
        return given

    return {
        id: node | {"inputs": {name: value(given) for name, given in node["inputs"].items()}}
        for id, node in graph.items()
        if node["class_type"] not in (*PRIMITIVES, SWITCH)
    }


class _Scope:
    """The workflow, or a subgraph where it is used."""

    def __init__(
        self, graph: dict, schemas: Schemas, subgraphs: dict, outer: _Scope | None = None, instance: dict | None = None
    ):
        self.graph, self.schemas, self.subgraphs = graph, schemas, subgraphs
        self.outer, self.instance = outer, instance
        self.prefix = f"{instance['id']}:" if instance else ""
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(_origin(link) for link in graph["links"])

    def api(self) -> Api:
        made: Api = {}
        for node in self.nodes.values():
            if node.get("mode", 0) in (MUTED, BYPASSED):
                continue
            if node["type"] in self.subgraphs:
                made |= self._open(node).api()
            elif node["type"] in self.schemas:
                made[f"{self.prefix}{node['id']}"] = {"class_type": node["type"], "inputs": self._inputs(node)}
        return made

    def _open(self, node: dict) -> _Scope:
        return _Scope(self.subgraphs[node["type"]], self.schemas, self.subgraphs, self, node)

    def _inputs(self, node: dict) -> dict[str, Any]:
        values = _widgets(self.schemas[node["type"]], node.get("widgets_values") or [])
        for slot in node["inputs"]:
            source = self.source(slot.get("link"))
            if source is not None:
                values[slot["name"]] = source.value if isinstance(source, Value) else source
        return values

    def source(self, link: int | None) -> list | Value | None:
        """[node, slot], a value, or None for what leads nowhere."""
        if link is None:
            return None
        origin, slot = self.links[link]
        if origin == INSIDE:
            return self._from_outside(slot)
        node = self.nodes[origin]
        if node.get("mode", 0) == MUTED:
            return None
        if node.get("mode", 0) == BYPASSED:
            kind = node["outputs"][slot]["type"]
            return next((self.source(given.get("link")) for given in node["inputs"] if given["type"] == kind), None)
        if node["type"] in self.subgraphs:
            inner = self._open(node)
            return inner.source(inner.graph["outputs"][slot]["linkIds"][0])
        return [f"{self.prefix}{origin}", slot]

    def _from_outside(self, slot: int) -> list | Value | None:
        name = self.graph["inputs"][slot]["name"]
        given = next((one for one in self.instance["inputs"] if one["name"] == name), {})
        if given.get("link") is not None:
            return self.outer.source(given["link"])
        widgets = [one["name"] for one in self.graph["inputs"] if one["type"] in WIDGET_TYPES]
        values = self.instance["widgets_values"]
        if name not in widgets or not values:  # without any, the widgets of the nodes inside are shown outside
            return None
        return Value(values[widgets.index(name)])


def _origin(link: list | dict) -> tuple[int, tuple[int, int]]:
    if isinstance(link, dict):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def _widgets(schema: dict[str, Any], values: list) -> dict[str, Any]:
    """Each widget's name and value; those that the file does not have yet show their defaults."""
    rest, node = list(values), Node(0, "", schema, {}, (0, 0), (0, 0))
    named = {}
    for slot in node.inputs():  # a choice that is set brings its inputs next
        if not slot.is_widget:
            continue
        if rest:
            node.values[slot.name] = rest.pop(0)
            if rest and rest[0] in AFTER_SEEDS and (slot.name in SEEDS or slot.options.get("control_after_generate")):
                rest.pop(0)
        named[slot.name] = node.value(slot)
    return named
