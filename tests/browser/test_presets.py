"""The preset widget of Wan Sampler and the step cache's node, in each frontend and renderer, used with the mouse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from wan_core.sampling.guidance_rules import RULES, settings_of

ROOT = Path(__file__).resolve().parents[2]
T2V = ROOT / "workflows/wan22_t2v_a14b.json"
SIZE = {"width": 64, "height": 64, "frames": 5}


@pytest.fixture
def sampler(app):
    app.drop(T2V)
    app.fit()
    return app


def test_choosing_a_preset_fills_in_what_it_sets_and_says_so(sampler) -> None:
    app = sampler
    before = values(app)
    assert before["preset"] == "custom"
    choose(app, "WanCoreSampler", "preset", "FastWan-1.3B-3step")
    wanted = {"steps": 3, "cfg_high": 1, "cfg_low": 1, "shift": 8, "solver": "lcm", "schedule": "fastwan"}
    assert values(app) == before | wanted | {"preset": "FastWan-1.3B-3step"}
    said = text(app)
    assert said.startswith("FastWan-1.3B-3step: solver lcm, schedule fastwan, 3 steps, shift 8, cfg 1, noise levels 1,")
    app.screenshot("preset")
    app.fit()

    sent = app.page.evaluate("async () => (await app.graphToPrompt()).output")
    (inputs,) = [node["inputs"] for node in sent.values() if node["class_type"] == "WanCoreSampler"]
    assert inputs | wanted | {"preset": "FastWan-1.3B-3step"} == inputs

    choose(app, "WanCoreSampler", "preset", "rCM-T2V-4step")  # which has no shift
    assert values(app)["schedule"] == "rcm-80" and values(app)["shift"] == 8


def test_changing_what_a_preset_set_makes_it_custom(sampler) -> None:
    app = sampler
    choose(app, "WanCoreSampler", "preset", "LightX2V-4step")
    choose(app, "WanCoreSampler", "solver", "euler")  # what it is already
    assert values(app)["preset"] == "LightX2V-4step"
    choose(app, "WanCoreSampler", "solver", "dpm++")
    now = values(app)
    assert (now["preset"], now["solver"], now["steps"]) == ("custom", "dpm++", 4) and text(app) == ""


def test_a_saved_preset_comes_back_and_an_older_workflow_is_custom(app, tmp_path: Path) -> None:
    app.drop(ROOT / "workflows/wan22_t2v_a14b_4steps.json")
    assert values(app)["preset"] == "LightX2V-4step" and values(app)["steps"] == 4
    older = app.page.evaluate("""() => {
        const saved = app.graph.serialize()
        for (const node of saved.nodes)
            if (node.type === 'WanCoreSampler') {
                node.widgets_values.pop()
                node.inputs = node.inputs.filter(input => input.name !== 'preset')
            }
        return JSON.stringify(saved)
    }""")
    path = tmp_path / "older.json"
    path.write_text(older)
    app.drop(path)
    assert values(app)["preset"] == "custom" and values(app)["steps"] == 4


def test_a_run_shows_the_preset_and_which_steps_are_left_out(app) -> None:
    """With Wan Step Cache before the sampler: foretold on both nodes, counted while it runs, told at the end."""
    app.drop(T2V)
    app.page.evaluate(_INSERT_CACHE)
    app.set_widgets(SIZE | {"seed": 11 + 2 * app.nodes2 + (app.frontend == "newest")})
    choose(app, "WanCoreSampler", "preset", "I2V-A14B")
    choose(app, "WanCoreStepCache", "policy", "every")
    app.page.evaluate(_LINES)
    app.run()
    assert "Step cache every: " in text(app, "WanCoreStepCache") and "times as fast" in text(app, "WanCoreStepCache")
    said = text(app)
    assert "Preset I2V-A14B: solver unipc, schedule auto, 40 steps, shift 5, cfg 3.5." in said
    assert "40 steps were computed" in said and "the model is Wan2.2 T2V" in said
    lines = app.page.evaluate("window.__lines")
    skipped = [line["skipped"] for line in lines]
    assert skipped == sorted(skipped) and skipped[-1] > 10
    assert "steps left out" in app.page.locator(".wan-core-preview div").inner_text()
    app.screenshot("step-cache")


def test_the_step_cache_greys_what_its_policy_does_not_read(app) -> None:
    app.drop(T2V)
    app.page.evaluate(_INSERT_CACHE)
    assert greyed(app) == {"every", "tea_model"} and values(app, "WanCoreStepCache")["threshold"] == 0.1
    for policy, expected, threshold in (
        ("magnitude", {"every", "tea_model"}, 0.06),
        ("teacache", {"every"}, 0.1),
        ("every", {"threshold", "tea_model"}, 0.1),
    ):
        choose(app, "WanCoreStepCache", "policy", policy)
        assert greyed(app) == expected and values(app, "WanCoreStepCache")["threshold"] == threshold
    saved = app.page.evaluate("JSON.stringify(app.graph.serialize())")
    app.page.evaluate("saved => app.loadGraphData(JSON.parse(saved))", saved)
    app.wait_for_graph()
    assert greyed(app) == {"threshold", "tea_model"}


def test_guidance_greys_what_its_rule_does_not_read(app) -> None:
    """As the rules' own settings are; a rule without any greys them all."""
    app.drop(T2V)
    app.page.evaluate(_INSERT_CACHE.replace("WanCoreStepCache", "WanCoreGuidance"))
    inputs = {rule.name: {name: name for name in settings_of(rule)} for rule in RULES.values()}
    inputs["nag"] = {name: f"nag_{name}" for name in inputs["nag"]}
    every = {name for own in inputs.values() for name in own.values()}
    for rule in [*RULES, "cfg_zero_star"]:
        choose(app, "WanCoreGuidance", "rule", rule)
        assert greyed(app, "WanCoreGuidance") == every - set(inputs[rule].values()), rule


def greyed(app, kind: str = "WanCoreStepCache") -> set[str]:
    widgets = f"app.graph.findNodesByType('{kind}')[0].widgets"
    return set(app.page.evaluate(f"{widgets}.filter(({{disabled}}) => disabled).map(({{name}}) => name)"))


_INSERT_CACHE = """() => {
    const [sampler] = app.graph.findNodesByType('WanCoreSampler')
    const slot = sampler.findInputSlot('model')
    const cache = LiteGraph.createNode('WanCoreStepCache')
    cache.pos = [0, 1500]  // below all others
    app.graph.add(cache)
    sampler.getInputNode(slot).connect(0, cache, 0)
    cache.connect(0, sampler, slot)
}"""

_LINES = """() => {
    window.__lines = []
    app.api.addEventListener('wan_core.preview', ({detail}) => detail.line && window.__lines.push(detail.line))
}"""


# --- as a person does it


def choose(app, node: str, widget: str, value: str) -> None:
    """Pick an entry of a menu on a node with the mouse."""
    (choose_in_dom if app.nodes2 else choose_on_canvas)(app, node, widget, value)
    app.page.wait_for_function(_IS, arg=[node, widget, value])


def choose_on_canvas(app, node: str, widget: str, value: str) -> None:
    look_at(app, node)
    place = app.page.evaluate(_PLACE, [node, widget])
    app.page.mouse.click(place["x"], place["y"])
    app.page.locator(".litecontextmenu .litemenu-entry").get_by_text(value, exact=True).first.click()


def choose_in_dom(app, node: str, widget: str, value: str) -> None:
    look_at(app, node)
    id = app.page.evaluate("type => app.graph.nodes.find(node => node.type === type).id", node)
    row = app.page.locator(f"[data-node-id='{id}'] .lg-node-widget").filter(
        has=app.page.get_by_text(widget, exact=True)
    )
    row.get_by_role("combobox").first.click()
    app.page.get_by_role("option", name=value, exact=True).first.click()


def look_at(app, node: str) -> None:
    """The node in the middle of the screen, as large as it is."""
    app.page.evaluate(_CENTRE, node)
    app.stand_still()


def values(app, node: str = "WanCoreSampler") -> dict[str, Any]:
    found = app.page.evaluate(
        """type => Object.fromEntries(
        app.graph.nodes.find(node => node.type === type).widgets.map(({name, value}) => [name, value]))""",
        node,
    )
    return {name: value for name, value in found.items() if not name.startswith("wan_core_")}


def text(app, node: str = "WanCoreSampler") -> str:
    """What a node says, whole."""
    return app.page.evaluate(
        """type => app.graph.nodes.find(node => node.type === type).widgets
        .find(({name}) => name === 'wan_core_text').element.textContent""",
        node,
    )


_IS = """([type, name, value]) => app.graph.nodes.find(node => node.type === type)
    .widgets.find(widget => widget.name === name).value === value"""

_CENTRE = """type => {
    const {pos, size} = app.graph.nodes.find(node => node.type === type)
    const {ds, canvas} = app.canvas
    const {width, height} = canvas.getBoundingClientRect()
    ds.scale = 1
    ds.offset = [width / 2 - pos[0] - size[0] / 2, height / 2 - pos[1] - size[1] / 2]
    app.canvas.setDirty(true, true)
}"""

_PLACE = """([type, name]) => {
    const node = app.graph.nodes.find(node => node.type === type)
    const widget = node.widgets.find(widget => widget.name === name)
    const {ds, canvas} = app.canvas
    const {left, top} = canvas.getBoundingClientRect()
    const [x, y] = [node.pos[0] + node.size[0] / 2, node.pos[1] + (widget.last_y ?? widget.y) + 10]
    return {x: left + (x + ds.offset[0]) * ds.scale, y: top + (y + ds.offset[1]) * ds.scale}
}"""
