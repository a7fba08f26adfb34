"""The palette of Wan Aesthetic Prompt, in each frontend and renderer, used with mouse and keyboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
T2V = ROOT / "workflows/wan22_t2v_a14b.json"
NODE = "WanCoreAestheticPrompt"
LINE = "golden hour, rim light, low angle"
TERMS = ["golden_hour", "edge_lighting", "low_angle_shot"]
SIZE = {"width": 64, "height": 64, "frames": 5, "steps": 2}
MARKUP = "<img src=x onerror=window.__ran=1>"


@pytest.fixture
def palette(app):
    app.drop(T2V)
    centre(app)
    return app


def test_one_line_makes_a_look_that_is_sent_and_comes_back(palette) -> None:
    app = palette
    set_text(app, "A cat.")
    before = inputs(app)
    assert before["palette"] == "" and before["style"] == "none"
    field(app).click()
    field(app).fill(LINE)
    app.page.keyboard.press("Enter")
    assert chips(app) == TERMS and field(app).input_value() == ""
    wanted = "Golden hour, edge lighting, low angle shot. A cat."
    assert shown_prompt(app) == wanted
    assert inputs(app) == before | {"palette": ", ".join(TERMS)}
    picture(app, "palette")

    app.set_widgets(SIZE)
    prompt = app.run()["prompt_id"]
    ran = app.server.client.get(f"/history/{prompt}")[prompt]["prompt"][2]
    assert [node["inputs"]["palette"] for node in ran.values() if node["class_type"] == NODE] == [", ".join(TERMS)]

    app.page.wait_for_timeout(1500)  # in which the frontend keeps the graph for itself
    app.page.reload()
    app.page.wait_for_function(
        f"window.app?.extensionManager && app.graph?.nodes.some(n => n.type === '{NODE}')", timeout=60_000
    )
    centre(app)
    assert chips(app) == TERMS and shown_prompt(app) == wanted


def test_three_clicks_make_it_too(palette) -> None:
    app = palette
    set_text(app, "一只猫。")
    field(app).click()
    popup = app.page.locator(".wan-core-popup")
    popup.get_by_text("Golden hour", exact=True).click()
    field(app).click()
    popup.get_by_text("Edge lighting", exact=True).click()
    assert chips(app) == TERMS[:2]
    assert shown_prompt(app) == "黄金时刻，边缘光，一只猫。"


def test_keys(palette) -> None:
    app = palette
    page = app.page
    nodes = app.node_types()
    field(app).click()
    page.keyboard.type("rim")
    page.keyboard.press("Enter")  # the best match, that the list marks
    page.keyboard.type("golden hour, low an")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # the first of the list, and what stands before it
    assert chips(app) == TERMS
    page.keyboard.press("Backspace")
    assert chips(app) == TERMS[:2]
    page.keyboard.press("Escape")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Delete")  # the first chip, not the node
    assert chips(app) == TERMS[1:2] and app.node_types() == nodes
    page.keyboard.press("Enter")  # on a chip as on its button
    assert chips(app) == []
    field(app).fill("no such thing, fog")
    page.keyboard.press("Enter")
    assert chips(app) == ["fog"] and field(app).input_value() == "no such thing"
    assert "no such thing" in page.locator(".wan-core-popup").inner_text()
    page.keyboard.press("Escape")


def test_what_contradicts_is_marked(palette) -> None:
    app = palette
    field(app).fill("day, night, rim light")
    app.page.keyboard.press("Enter")
    marked = app.page.locator(".wan-core-conflict")
    assert [chip.get_attribute("data-term") for chip in marked.all()] == ["daytime", "nighttime"]
    assert "Daytime ↔ Nighttime" in app.page.locator(".wan-core-palette").inner_text()
    picture(app, "palette-conflict")
    app.page.locator("[data-term=nighttime]").click()
    assert chips(app) == ["daytime", "edge_lighting"] and marked.count() == 0
    app.set_widgets({"palette": f"fog, {MARKUP}"})  # as a workflow may say that another hand wrote
    assert chips(app) == ["fog"]
    assert f"No such term: {MARKUP}" in app.page.locator(".wan-core-palette").inner_text()


def test_menus_of_older_workflows_are_chips(palette, tmp_path: Path) -> None:
    """Saved before there was a palette: the same values, the same prompt; and the menus are there, out of sight."""
    app = palette
    older = app.page.evaluate(_OLDER, NODE)
    path = tmp_path / "older.json"
    path.write_text(json.dumps(older))
    app.drop(path)
    centre(app)
    now = inputs(app)
    assert (now["style"], now["light_angle"], now["palette"]) == (
        "Film noir style / 黑色电影风格", "Edge lighting / 边缘光", "")  # fmt: skip
    assert chips(app) == ["film_noir", "edge_lighting"]
    field(app).fill("fog")
    app.page.keyboard.press("Enter")
    app.page.locator("[data-term=film_noir]").click()
    assert inputs(app) == now | {"style": "none", "palette": "fog"}
    assert chips(app) == ["fog", "edge_lighting"]

    hidden = app.page.evaluate(_HIDDEN, NODE)
    assert {"style", "effect", "palette"} <= set(hidden) and not {"text", "language", "placement"} & set(hidden)
    app.page.get_by_label("Show or hide the menus").click()
    assert app.page.evaluate(_HIDDEN, NODE) == ["palette"]
    if app.nodes2:
        if app.frontend == "pinned":  # reads what is hidden once, when the workflow is opened
            path.write_text(json.dumps(app.page.evaluate("app.graph.serialize()")))
            app.drop(path)
            centre(app)
        id = app.page.evaluate("type => app.graph.nodes.find(node => node.type === type).id", NODE)
        app.page.locator(f"[data-node-id='{id}']").get_by_text("camera movement").first.wait_for(timeout=5000)
    picture(app, "palette-menus")
    app.set_widgets({"style": "Anime style / 二次元风格"})
    assert chips(app) == ["anime_style", "fog", "edge_lighting"]


def test_looks_and_dice(palette) -> None:
    app = palette
    page = app.page
    page.get_by_role("button", name="Looks").click()
    page.locator(".wan-core-popup").get_by_text("Sunset romance", exact=True).click()
    romance = ["dusk", "soft_lighting", "edge_lighting", "warm_colors", "center_composition"]
    assert chips(app) == romance
    field(app).fill("fog")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Looks").click()
    picture(app, "palette-looks", place=False)
    page.get_by_label("Name for the chosen terms").fill(MARKUP)
    page.keyboard.press("Enter")

    page.get_by_role("button", name="Roll the dice").click()
    page.locator(".wan-core-popup input").fill("7")
    page.keyboard.press("Enter")
    first = chips(app)
    page.locator(".wan-core-popup input").fill("8")
    page.keyboard.press("Enter")
    assert len(first) == 6 and chips(app) != first
    page.locator(".wan-core-popup input").fill("7")
    page.keyboard.press("Enter")
    assert chips(app) == first
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Looks").click()
    page.locator(".wan-core-popup").get_by_text(MARKUP, exact=True).click()
    assert sorted(chips(app)) == sorted([*romance, "fog"])
    assert MARKUP in app.server.client.get("/settings")["wan_core.Palette.Looks"]
    assert page.evaluate("'__ran' in window || document.querySelectorAll('img[src=x]').length > 0") is False
    page.get_by_role("button", name="Looks").click()
    page.get_by_label(f"× {MARKUP}").click()
    page.wait_for_timeout(300)
    assert app.server.client.get("/settings")["wan_core.Palette.Looks"] == {}


def test_light_theme(palette) -> None:
    app = palette
    field(app).fill(LINE + ", day")
    app.page.keyboard.press("Enter")
    app.page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    try:
        app.page.wait_for_timeout(500)
        field(app).click()
        picture(app, "palette-light", place=False)
        background, text = app.page.evaluate(_COLOURS)
        assert background > 180 > 120 > text
    finally:
        app.page.evaluate("app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")
        app.page.wait_for_timeout(300)


def field(app) -> Any:
    return app.page.locator(".wan-core-palette input")


def chips(app) -> list[str]:
    return [chip.get_attribute("data-term") for chip in app.page.locator(".wan-core-chip").all()]


def shown_prompt(app) -> str:
    return app.page.locator(".wan-core-prompt").inner_text()


def inputs(app) -> dict[str, Any]:
    sent = app.page.evaluate("async () => (await app.graphToPrompt()).output")
    (found,) = [node["inputs"] for node in sent.values() if node["class_type"] == NODE]
    return found


def set_text(app, text: str) -> None:
    app.page.evaluate(
        """([type, text]) => {
        const widget = app.graph.nodes.find(node => node.type === type).widgets.find(({name}) => name === 'text')
        widget.value = text
        widget.callback?.(text)
    }""",
        [NODE, text],
    )


def centre(app) -> None:
    app.page.evaluate(_CENTRE, NODE)
    app.stand_still()


def picture(app, name: str, place: bool = True) -> None:
    if place:
        centre(app)
    state = f"{app.frontend}-{'nodes2' if app.nodes2 else 'nodes1'}"
    from .conftest import SCREENSHOTS

    app.page.screenshot(path=SCREENSHOTS / f"{name}-{state}.png")


_CENTRE = """type => {
    const {pos, size} = app.graph.nodes.find(node => node.type === type)
    const {ds, canvas} = app.canvas
    const {width, height} = canvas.getBoundingClientRect()
    ds.scale = 1
    ds.offset = [width / 2 - pos[0] - size[0] / 2, height / 2 - pos[1] - size[1] / 2]
    app.canvas.setDirty(true, true)
}"""

_OLDER = """type => {
    const saved = app.graph.serialize()
    const node = saved.nodes.find(node => node.type === type)
    node.inputs = node.inputs.filter(({name}) => name !== 'palette')
    node.widgets_values = node.widgets_values.slice(0, 21)
    node.widgets_values[1] = 'Film noir style / 黑色电影风格'
    node.widgets_values[6] = 'Edge lighting / 边缘光'
    return saved
}"""

_HIDDEN = """type => app.graph.nodes.find(node => node.type === type).widgets
    .filter(({hidden}) => hidden).map(({name}) => name)"""

_COLOURS = """() => {
    const style = getComputedStyle(document.querySelector('.wan-core-prompt'))
    const grey = colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part) / 3, 0)
    return [grey(style.backgroundColor), grey(style.color)]
}"""
