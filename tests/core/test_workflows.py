"""The workflow files, read as a person and as ComfyUI's template browser would: no server needed."""

from __future__ import annotations

import json
import re
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from workflow_format import NODES2_FRAME, NODES2_WIDGET, SLOT, TITLE

from wan_core.config import VARIANTS, Variant
from wan_core.layouts.comfyui import NAMES
from wan_core.layouts.comfyui import VAES as COMFY_VAES
from wan_core.sampling.presets import PRESETS

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
TASKS = {"t2v-A14B": "wan22_t2v_a14b", "i2v-A14B": "wan22_i2v_a14b", "ti2v-5B": "wan22_ti2v_5b",
         "i2v-14B": "wan21_i2v_14b_480p", "flf2v-14B": "wan21_flf2v_14b",
         "t2v-A14B fast": "wan22_t2v_a14b_4steps", "i2v-A14B fast": "wan22_i2v_a14b_4steps"}  # fmt: skip
SIZES = {"i2v-14B": (832, 480)}
FAST = PRESETS["LightX2V-4step"].values | {"preset": "LightX2V-4step"}
ROOM = 10  # pixels that nodes keep between them

each_task = pytest.mark.parametrize("task", TASKS)


def ui(task: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{TASKS[task]}.json").read_text(encoding="utf-8"))


def api(task: str) -> dict[str, Any]:
    return json.loads((FOLDER / "api" / f"{TASKS[task]}.json").read_text(encoding="utf-8"))


def variant_of(task: str) -> Variant:
    return VARIANTS[task.removesuffix(" fast")]


def values(task: str, class_type: str) -> list[dict[str, Any]]:
    return [node["inputs"] for node in api(task).values() if node["class_type"] == class_type]


def test_no_workflow_without_a_twin() -> None:
    names = {path.stem for path in FOLDER.glob("*.json")}
    assert names == {path.stem for path in (FOLDER / "api").glob("*.json")} == set(TASKS.values())


@each_task
def test_links_agree_with_slots(task: str) -> None:
    content = ui(task)
    nodes = {node["id"]: node for node in content["nodes"]}
    for number, origin, output, target, slot, kind in content["links"]:
        source, taken = nodes[origin]["outputs"][output], nodes[target]["inputs"][slot]
        assert number in source["links"] and taken["link"] == number
        assert kind == source["type"] == taken["type"]
    told = [slot["link"] for node in nodes.values() for slot in node["inputs"] if slot["link"] is not None]
    assert sorted(told) == sorted(link[0] for link in content["links"])
    assert content["last_link_id"] == len(content["links"]) and content["last_node_id"] == max(nodes)


@each_task
def test_reroutes_belong_to_links(task: str) -> None:
    extra = ui(task)["extra"]
    reroutes = {reroute["id"]: reroute for reroute in extra["reroutes"]}
    assert all(reroute.get("parentId", 1) in reroutes for reroute in reroutes.values())
    for link in extra["linkExtensions"]:
        reroute = reroutes[link["parentId"]]
        while True:
            assert link["id"] in reroute["linkIds"]
            if "parentId" not in reroute:
                break
            reroute = reroutes[reroute["parentId"]]


@each_task
def test_nodes_lie_apart_and_inside_groups(task: str) -> None:
    """In both renderers: Nodes 2.0 makes a node as high as its widgets, whatever the file says."""
    content = ui(task)
    boxes = {node["id"]: box(*node["pos"], *drawn_size(node), above=TITLE) for node in content["nodes"]}
    groups = [box(*group["bounding"]) for group in content["groups"]]
    for (a, first), (b, second) in combinations(boxes.items(), 2):
        assert not overlap(first, second, ROOM), f"nodes {a} and {b}"
    for node in content["nodes"]:
        inside = [group for group in groups if overlap(boxes[node["id"]], group)]
        assert len(inside) == (node["type"] != "MarkdownNote"), node["type"]


def drawn_size(node: dict[str, Any]) -> tuple[float, float]:
    width, height = node["size"]
    sockets = sum("widget" not in slot for slot in node["inputs"])
    rows, widgets = max(sockets, len(node["outputs"])), len(node["widgets_values"])
    return width, max(height, NODES2_FRAME + SLOT * rows + NODES2_WIDGET * widgets - TITLE)


@each_task
def test_groups_go_from_left_to_right(task: str) -> None:
    groups = ui(task)["groups"]
    assert [group["title"][0] for group in groups] == list("12345")
    assert all(a["bounding"][0] + a["bounding"][2] < b["bounding"][0] for a, b in pairwise(groups))
    assert len({group["color"] for group in groups}) == len(groups)


@each_task
def test_data_flows_from_left_to_right(task: str) -> None:
    """Of two linked nodes the source is further left; Save Video stands beneath what it saves."""
    content = ui(task)
    nodes = {node["id"]: node for node in content["nodes"]}
    for _, origin, _, target, _, _ in content["links"]:
        right = nodes[origin]["pos"][0] + nodes[origin]["size"][0]
        assert right < nodes[target]["pos"][0] or nodes[target]["type"] == "SaveVideo"


@each_task
def test_every_model_file_says_where_to_get_it(task: str) -> None:
    """As in ComfyUI's own templates: name, address and folder of each file, the name being the widget's value."""
    loaders = [node for node in ui(task)["nodes"] if node["type"].startswith(("WanCoreLoad", "WanCoreLora"))]
    assert len(loaders) == variant_of(task).experts + 2 + task.endswith("fast") + (variant_of(task).clip > 0)
    for node in loaders:
        assert node["properties"]["models"][0]["name"] == node["widgets_values"][0]
        for file in node["properties"]["models"]:
            address = rf"https://huggingface\.co/Comfy-Org/.+/{file['directory']}/{file['name']}"
            assert re.fullmatch(address, file["url"])
            assert file["directory"] in ("diffusion_models", "text_encoders", "vae", "loras", "clip_vision")
        assert len(node["properties"]["models"]) == (2 if node["type"] == "WanCoreLora" else 1)


@each_task
def test_settings_are_the_official_ones(task: str) -> None:
    variant = variant_of(task)
    (sampler,) = values(task, "WanCoreSampler")
    size = SIZES.get(task, variant.size)
    wanted = FAST if task.endswith("fast") else official(variant) | {"shift": variant.shift_for(size)}
    assert sampler | wanted == sampler
    assert [node["lora_name"] for node in values(task, "WanCoreLora")] == (
        [NAMES[variant.task].loras[0]] if task.endswith("fast") else []
    )
    (start,) = values(task, "WanCoreEmptyLatent") + values(task, "WanCoreImageToVideo")
    assert (start["width"], start["height"], start["frames"]) == (*size, variant.frames)
    assert values(task, "CreateVideo")[0]["fps"] == variant.fps
    assert variant.negative in [node["text"] for node in values(task, "CLIPTextEncode")]
    assert [node["model_name"] for node in values(task, "WanCoreLoadModel")] == list(NAMES[variant.task].models)
    assert values(task, "WanCoreLoadVAE")[0]["vae_name"] == COMFY_VAES[variant.vae]
    assert [node["boundary"] for node in values(task, "WanCoreExpertSwitch")] == [variant.boundary][
        : variant.experts - 1
    ]


def official(variant: Variant) -> dict[str, Any]:
    guidance = {"cfg_high": variant.guidance.high, "cfg_low": variant.guidance.low}
    return {
        "steps": variant.steps,
        **guidance,
        "shift": variant.shift,
        "solver": "unipc",
        "schedule": "auto",
        "denoise": 1.0,
    }


def test_sizes_of_the_menus_are_the_official_ones() -> None:
    text = (FOLDER.parent / "web/presets.js").read_text(encoding="utf-8")
    table = re.search(r"export const SIZE = (\{.*?\n\})", text, re.S)[1]
    sizes = json.loads(re.sub(r"(?<=[{,] )(\w+):", r'"\1":', table).replace("'", '"'))
    offered = {(size["width"], size["height"]) for size in sizes.values()}
    assert offered == {size for variant in VARIANTS.values() for size in variant.sizes}


def test_presets_of_the_editor_are_the_tables() -> None:
    """web/sampler_presets.js is what scripts/make_presets.py writes."""
    import runpy

    make = runpy.run_path(str(FOLDER.parent / "scripts/make_presets.py"))
    assert make["FILE"].read_text(encoding="utf-8") == make["written"]()


@each_task
def test_thumbnail_for_the_template_browser(task: str) -> None:
    with Image.open(FOLDER / f"{TASKS[task]}.jpg") as image:
        assert image.format == "JPEG" and image.width >= 400
    assert (FOLDER / f"{TASKS[task]}.jpg").stat().st_size < 150_000


def box(x: float, y: float, width: float, height: float, above: float = 0) -> tuple[float, float, float, float]:
    return x, y - above, x + width, y + height


def overlap(a: tuple, b: tuple, room: float = 0) -> bool:
    return a[0] < b[2] + room and b[0] < a[2] + room and a[1] < b[3] + room and b[1] < a[3] + room
