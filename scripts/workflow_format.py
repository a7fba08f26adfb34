"""A ComfyUI workflow described once, and written in both formats: the editor's JSON and the API's.

Standard library only.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

Schemas = dict[str, dict[str, Any]]  # the server's /object_info
Place = tuple[int, int]
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own, "name.inner"
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC)
ACTIVE, BYPASSED = 0, 4  # LiteGraph's modes
OPTIONAL_SHAPE = 7  # how LiteGraph draws the slot of an optional input
OUR_PACK, COMFYUI = {"cnr_id": "comfyui-wan22", "ver": "0.1.0"}, {"cnr_id": "comfy-core", "ver": "0.3.75"}
_EMPTY = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}  # what a widget without a default shows
EDITOR_ONLY = {"MarkdownNote": {"input": {}, "output": [], "output_name": []}}

# Heights in pixels of the graph, as the editor draws a node of ours: the classic canvas without the title above the
# node's position, Nodes 2.0 (of frontend 1.58, where it is highest) with it. tests/browser compares what is drawn.
TITLE = 30
SLOT = 20  # a row with an input, an output, or one of each
CLASSIC_FRAME, CLASSIC_WIDGET = 22, 24  # a frame counts the places of our texts and previews while they are empty
NODES2_FRAME, NODES2_WIDGET = 76, 28
TEXT_BOX = 30  # that a text of several lines has at least, besides a widget's height


@dataclass(frozen=True)
class Reroute:
    """A point that links are led through; ``after`` is the point before it, nearer to the source."""

    id: int
    pos: Place
    after: Reroute | None


@dataclass(frozen=True)
class Output:
    """One output of a node, and the last reroute on the way to whoever takes it."""

    node: Node
    slot: int
    via: Reroute | None = None


@dataclass(frozen=True)
class Input:
    """One input as the server describes it."""

    name: str
    kind: str
    optional: bool
    options: dict[str, Any]

    @property
    def is_widget(self) -> bool:
        return self.kind in WIDGET_TYPES and not self.options.get("forceInput")


@dataclass(eq=False)
class Node:
    """A node, its widget values and links by input name, and how it looks."""

    id: int
    type: str
    schema: dict[str, Any]
    values: dict[str, Any]
    pos: Place
    size: Place
    title: str | None = None
    mode: int = ACTIVE
    models: list[dict[str, str]] = field(default_factory=list)
    colours: tuple[str, str] | None = None

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)

    def inputs(self, sections: dict[str, Any] | None = None, prefix: str = "") -> Iterator[Input]:
        """In the order of the schema; behind a choice, the inputs that it brings."""
        sections = self.schema["input"] if sections is None else sections
        for section in ("required", "optional"):
            for name, (kind, *rest) in sections.get(section, {}).items():
                options = dict(rest[0]) if rest else {}
                if isinstance(kind, list):
                    kind, options = "COMBO", {"options": kind, **options}
                slot = Input(prefix + name, kind, section == "optional", options)
                yield slot
                if kind == DYNAMIC:
                    yield from self.inputs(chosen(options, self.value(slot)), f"{slot.name}.")

    def value(self, slot: Input) -> Any:
        """What the widget shows: given in the description, else its default."""
        given = self.values.get(slot.name)
        if given is not None and not isinstance(given, Output):
            return given
        if "default" in slot.options:
            return slot.options["default"]
        if slot.kind in (DYNAMIC, "COMBO"):
            first = next(iter(slot.options.get("options", [])), None)
            return first["key"] if slot.kind == DYNAMIC else first
        return _EMPTY[slot.kind]

    def links(self) -> dict[str, Output]:
        return {name: value for name, value in self.values.items() if isinstance(value, Output)}

    @property
    def least(self) -> int:
        """The height that the classic canvas needs, without the title."""
        return self._height(CLASSIC_FRAME, CLASSIC_WIDGET)

    @property
    def bottom(self) -> int:
        """Where the node ends in whichever renderer draws it higher, however high the file says it is."""
        return self.pos[1] + max(self.size[1], self._height(NODES2_FRAME, NODES2_WIDGET) - TITLE)

    def _height(self, frame: int, widget: int) -> int:
        slots = list(self.inputs())
        rows = max(sum(not slot.is_widget for slot in slots), len(self.schema["output"]))
        texts = sum(bool(slot.options.get("multiline")) for slot in slots if slot.is_widget)
        return frame + SLOT * rows + widget * len(list(_widgets_values(self))) + TEXT_BOX * texts


def chosen(options: dict[str, Any], key: str) -> dict[str, Any]:
    """The inputs that a value of a choice brings, in sections as those of a node."""
    return next(option["inputs"] for option in options["options"] if option["key"] == key)


class Graph:
    """A workflow under construction; ``ui`` and ``api`` are its two formats."""

    def __init__(self, name: str, schemas: Schemas) -> None:
        self.name, self.schemas = name, schemas | EDITOR_ONLY
        self.floor = 0  # where the nodes of all groups have ended; see make_workflows.describe
        self.nodes: list[Node] = []
        self.groups: list[dict[str, Any]] = []
        self.reroutes: list[Reroute] = []

    def node(
        self,
        type: str,
        pos: Place,
        size: Place,
        *,
        title: str | None = None,
        mode: int = ACTIVE,
        models: list[dict[str, str]] | None = None,
        colours: tuple[str, str] | None = None,
        **values: Any,
    ) -> Node:
        """A node of this size, or as high as the editor will make it where that is more."""
        made = Node(
            len(self.nodes) + 1, type, self.schemas[type], values, pos, size, title, mode, models or [], colours
        )
        unknown = values.keys() - {slot.name for slot in made.inputs()} - {"text"}
        assert not unknown, f"{type} has no input {unknown}"
        made.size = (size[0], max(size[1], made.least))
        self.nodes.append(made)
        return made

    def note(self, title: str, pos: Place, size: Place, text: str) -> None:
        self.node("MarkdownNote", pos, size, title=title, colours=("#3a3a30", "#2a2a24"), text=text)

    def group(self, title: str, pos: Place, size: Place, colour: str) -> None:
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "bounding": [*pos, *size],
                "color": colour,
                "font_size": 24,
                "flags": {},
            }
        )

    def lead(self, output: Output, *points: Place) -> Output:
        """The same output, led on through new reroutes: beside other nodes instead of beneath them."""
        for point in points:
            self.reroutes.append(Reroute(len(self.reroutes) + 1, point, output.via))
            output = replace(output, via=self.reroutes[-1])
        return output

    def api(self) -> dict[str, Any]:
        """What the editor would send to the server: no notes, no bypassed nodes, literal widget values."""
        return {
            str(node.id): self._api_node(node)
            for node in self.nodes
            if node.mode == ACTIVE and node.type not in EDITOR_ONLY
        }

    def _api_node(self, node: Node) -> dict[str, Any]:
        inputs = {slot.name: node.value(slot) for slot in node.inputs() if slot.is_widget}
        for name, output in node.links().items():
            source = _past_bypassed(output)
            if source:
                inputs[name] = [str(source.node.id), source.slot]
        title = node.title or node.schema.get("display_name") or node.type
        return {"inputs": inputs, "class_type": node.type, "_meta": {"title": title}}

    def ui(self) -> dict[str, Any]:
        """The editor's own format, version 0.4."""
        links = [(output, node, name) for node in self.nodes for name, output in node.links().items()]
        numbers = {(node.id, name): number for number, (_, node, name) in enumerate(links, start=1)}
        extensions = [
            {"id": numbers[node.id, name], "parentId": output.via.id} for output, node, name in links if output.via
        ]
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-wan22/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._ui_node(node, order, numbers, links) for order, node in enumerate(self.nodes)],
            "links": [
                [
                    numbers[node.id, name],
                    output.node.id,
                    output.slot,
                    node.id,
                    _slot_number(node, name),
                    output.node.schema["output"][output.slot],
                ]
                for output, node, name in links
            ],
            "groups": self.groups,
            "config": {},
            "extra": {
                "ds": self._view(),
                "reroutes": [_ui_reroute(reroute, numbers, links) for reroute in self.reroutes],
                "linkExtensions": extensions,
            },
            "version": 0.4,
        }

    def _view(self) -> dict[str, Any]:
        """All groups side by side in a window 1920 pixels wide, clear of the editor's side and top bars."""
        right = max(group["bounding"][0] + group["bounding"][2] for group in self.groups)
        scale = round(1800 / right, 3)
        return {"scale": scale, "offset": [round(85 / scale), round(120 / scale)]}

    def _ui_node(self, node: Node, order: int, numbers: dict, links: list) -> dict[str, Any]:
        properties: dict[str, Any] = {}
        if node.type not in EDITOR_ONLY:
            ours = node.schema["python_module"].startswith("custom_nodes.")
            properties = dict(OUR_PACK if ours else COMFYUI) | {"Node name for S&R": node.type}
        if node.models:
            properties["models"] = node.models
        return {
            "id": node.id,
            "type": node.type,
            "pos": list(node.pos),
            "size": list(node.size),
            "flags": {},
            "order": order,
            "mode": node.mode,
            "inputs": [_ui_input(slot, numbers.get((node.id, slot.name))) for slot in _slots(node)],
            "outputs": [_ui_output(node, slot, numbers, links) for slot in range(len(node.schema["output"]))],
            **({"title": node.title} if node.title else {}),
            "properties": properties,
            "widgets_values": list(_widgets_values(node)),
            **(dict(zip(("color", "bgcolor"), node.colours, strict=True)) if node.colours else {}),
        }


def _past_bypassed(output: Output) -> Output | None:
    """Where a link really comes from: a bypassed node hands on its first input of the same type."""
    while output.node.mode == BYPASSED:
        kind = output.node.schema["output"][output.slot]
        same = [slot.name for slot in output.node.inputs() if slot.kind == kind]
        if not same or same[0] not in output.node.links():
            return None
        output = output.node.links()[same[0]]
    return output


def _slots(node: Node) -> list[Input]:
    """Input slots in the editor's order: sockets, then widgets."""
    return sorted(node.inputs(), key=lambda slot: slot.is_widget)


def _slot_number(node: Node, name: str) -> int:
    return [slot.name for slot in _slots(node)].index(name)


def _ui_input(slot: Input, link: int | None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": slot.name, "type": slot.kind, "link": link}
    if slot.optional:
        made["shape"] = OPTIONAL_SHAPE
    if slot.is_widget:
        made["widget"] = {"name": slot.name}
    return made


def _ui_output(node: Node, slot: int, numbers: dict, links: list) -> dict[str, Any]:
    mine = [numbers[target.id, name] for output, target, name in links if (output.node, output.slot) == (node, slot)]
    return {"name": node.schema["output_name"][slot], "type": node.schema["output"][slot], "links": mine or None}


def _ui_reroute(reroute: Reroute, numbers: dict, links: list) -> dict[str, Any]:
    led = [numbers[node.id, name] for output, node, name in links if reroute in _chain(output.via)]
    parent = {"parentId": reroute.after.id} if reroute.after else {}
    return {"id": reroute.id, **parent, "pos": list(reroute.pos), "linkIds": led}


def _chain(reroute: Reroute | None) -> Iterator[Reroute]:
    while reroute:
        yield reroute
        reroute = reroute.after


def _widgets_values(node: Node) -> Iterator[Any]:
    """Values in the order of the editor's widgets, with the two widgets that the editor adds by itself."""
    if node.type in EDITOR_ONLY:
        yield node.values["text"]
    for slot in node.inputs():
        if slot.is_widget:
            yield node.value(slot)
            if slot.options.get("control_after_generate"):
                yield "randomize"
            if slot.options.get("image_upload"):
                yield "image"
