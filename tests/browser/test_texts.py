"""What nodes say, in each frontend and renderer: readable, and as text however hostile the file it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"width": 64, "height": 64, "frames": 5, "steps": 2}
MARKUP = "<img src=x onerror=window.__ran=1>"
NAME = f"a \"b\" 'c' & {MARKUP}<script>window.__ran=1<!--.safetensors"
KEY = f"{MARKUP}<b onclick=alert(1)>&lt;\u202e.lora_up.weight"
SHOWN_KEY = KEY.replace("\u202e", "\\u202e")


@pytest.fixture(scope="module")
def hostile_lora(models: Path) -> Iterator[str]:
    """A LoRA for T2V with one weight that fits, whose name and one of whose keys are what an attacker would choose."""
    (checkpoint,) = (models / "diffusion_models").glob("wan2.2_t2v_high*")
    with safe_open(checkpoint, "pt") as file:
        rows, columns = file.get_slice("blocks.0.self_attn.q.weight").get_shape()
    path = "diffusion_model.blocks.0.self_attn.q"
    folder = models / "loras"
    folder.mkdir(exist_ok=True)
    tensors = {
        f"{path}.lora_down.weight": torch.randn(2, columns),
        f"{path}.lora_up.weight": torch.randn(rows, 2),
        KEY: torch.zeros(1),
    }
    save_file(tensors, folder / "hostile.tmp")
    os.replace(folder / "hostile.tmp", folder / NAME)
    yield NAME
    (folder / NAME).unlink()


@pytest.fixture
def workflow(app, hostile_lora: str, tmp_path: Path) -> Path:
    """The shipped T2V workflow with the LoRA and a block swap between the experts and the sampler."""
    app.page.evaluate("app.refreshComboInNodes()")  # the page may be older than the file
    app.drop(ROOT / "workflows/wan22_t2v_a14b.json")
    app.page.evaluate(_INSERT, [hostile_lora, 3 + 2 * app.nodes2 + (app.frontend == "newest")])
    path = tmp_path / "texts.json"
    path.write_text(app.page.evaluate("JSON.stringify(app.graph.serialize())"))
    return path


_INSERT = """([name, blocks]) => {
    const [sampler] = app.graph.findNodesByType('WanCoreSampler')
    const slot = sampler.findInputSlot('model')
    const lora = LiteGraph.createNode('WanCoreLora')
    const swap = LiteGraph.createNode('WanCoreBlockSwap')
    for (const [node, x] of [[lora, 0], [swap, 420]]) {
        node.pos = [x, 1500]  // below all others
        app.graph.add(node)
    }
    lora.widgets.find(widget => widget.name === 'lora_name').value = name
    swap.widgets.find(widget => widget.name === 'blocks').value = blocks  // other inputs: not cached
    sampler.getInputNode(slot).connect(0, lora, 0)
    lora.connect(0, swap, 0)
    swap.connect(0, sampler, slot)
}"""


def test_texts_are_shown_once_as_text_and_come_back(app, workflow: Path) -> None:
    app.drop(workflow)
    heights = dict(app.page.evaluate(_NODE_HEIGHTS))
    assert texts(app) == {}
    assert app.page.evaluate(_EMPTY_HEIGHT) == 0  # an element that nobody sees would still take the clicks
    app.set_widgets(SIZE)
    before = saved(app)
    app.run()
    shown = texts(app)
    assert SHOWN_KEY in shown["WanCoreLora"] and NAME in shown["WanCoreLora"]
    assert "blocks" in shown["WanCoreBlockSwap"] and "blocks" in shown["WanCoreSampler"]
    check_readable(app, heights)
    assert saved(app) == before | {"seed": saved(app)["seed"]}
    app.screenshot("texts")

    app.run()  # all but the sampler is cached
    assert without(texts(app), "WanCoreSampler") == without(shown, "WanCoreSampler")

    app.drop(workflow)  # a new graph, that the server has all results of
    app.set_widgets(SIZE)
    app.run()
    wait_for_texts(app, 2)
    assert without(texts(app), "WanCoreSampler") == without(shown, "WanCoreSampler")
    assert ran(app) == []


def check_readable(app, heights: dict[str, float]) -> None:
    """Every text is on its node, within it, as high as it says or scrollable, and nothing else shows it."""
    app.fit()
    panels = app.page.locator(".wan-core-text:not(:empty)")
    for index in range(panels.count()):
        panel = panels.nth(index)
        assert panel.is_visible()
        size = panel.evaluate("""element => ({height: element.clientHeight, whole: element.scrollHeight,
            width: element.clientWidth, wide: element.scrollWidth, children: element.children.length})""")
        assert size["height"] >= min(size["whole"], 200) > 16 and size["wide"] <= size["width"], size
        assert size["children"] == 0
    inside = app.page.evaluate(_INSIDE)
    assert inside and all(inside.values()), inside
    now = dict(app.page.evaluate(_NODE_HEIGHTS))
    assert all(now[id] >= height for id, height in heights.items())
    everything = app.page.evaluate("document.body.innerText")
    assert everything.count("one file for both experts") == everything.count("280x720, 81 frames:") == 1, everything
    assert (
        app.page.evaluate(
            "app.graph.nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === '$$node-text-preview').length"
        )
        == 0
    )
    assert ran(app) == []


def ran(app) -> list[str]:
    """Signs that markup became more than text."""
    return app.page.evaluate("""() => [
        ...('__ran' in window ? ['a script ran'] : []),
        ...[...document.querySelectorAll('img[src="x"], [onerror], b[onclick]')].map(element => element.outerHTML)]""")


def texts(app) -> dict[str, str]:
    """What each of our nodes says, by its type; nothing that is empty."""
    return app.page.evaluate(_TEXTS)


def wait_for_texts(app, count: int) -> None:
    app.page.wait_for_function(f"Object.keys(({_TEXTS})()).length >= {count}")


def without(texts: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in texts.items() if key != name}


def saved(app) -> dict[str, Any]:
    return app.page.evaluate("""async () => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreLora')
        const sampler = app.graph.nodes.find(node => node.type === 'WanCoreSampler')
        const {output} = await app.graphToPrompt()
        return {lora: node.serialize().widgets_values, sent: output[node.id], inputs: node.inputs.map(i => i.name),
                count: sampler.serialize().widgets_values.length, seed: output[sampler.id].inputs.seed}
    }""")


_TEXTS = """() => Object.fromEntries(app.graph.nodes.map(node => [node.type,
    node.widgets?.find(widget => widget.name === 'wan_core_text')?.element.innerText]).filter(([, text]) => text))"""

_EMPTY_HEIGHT = """() => Math.max(...[...document.querySelectorAll('.wan-core-text, .wan-core-preview')].map(
    element => (element.closest('.dom-widget') ?? element).getBoundingClientRect().height))"""

_NODE_HEIGHTS = "() => app.graph.nodes.map(node => [String(node.id), node.size[1]])"

# Whether each text lies within its node: by the DOM in Nodes 2.0, by the node's place on the canvas otherwise.
_INSIDE = """() => Object.fromEntries(app.graph.nodes.flatMap(node => {
    const element = node.widgets?.find(widget => widget.name === 'wan_core_text')?.element
    if (!element?.textContent) return []
    const text = element.getBoundingClientRect()
    const drawn = document.querySelector(`[data-node-id="${node.id}"]`)
    const {scale, offset} = app.canvas.ds
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const left = canvas.left + (node.pos[0] + offset[0]) * scale, top = canvas.top + (node.pos[1] + offset[1]) * scale
    const box = drawn?.getBoundingClientRect() ??
        {left, top, right: left + node.size[0] * scale, bottom: top + node.size[1] * scale}
    return [[node.type, text.left >= box.left - 1 && text.right <= box.right + 1 && text.top >= box.top - 1 &&
        text.bottom <= box.bottom + 1]]
}))"""


def test_a_page_loaded_again_shows_them_again(app, workflow: Path) -> None:
    app.drop(workflow)
    app.set_widgets(SIZE)
    app.run()
    wait_for_texts(app, 3)
    shown = texts(app)
    app.page.wait_for_timeout(1500)  # in which the frontend keeps the graph for itself
    app.page.reload()
    app.page.wait_for_function(
        "window.app?.extensionManager && app.graph?.nodes.some(n => n.type === 'WanCoreLora')", timeout=60_000
    )
    wait_for_texts(app, 3)
    assert without(texts(app), "WanCoreSampler") == without(shown, "WanCoreSampler")
    assert texts(app)["WanCoreSampler"].partition("\n")[0] == shown["WanCoreSampler"].partition("\n")[0]
    assert ran(app) == []


def test_an_error_stays_on_its_node_as_text(app, workflow: Path) -> None:
    """ComfyUI's own dialog shows it too, and reads nothing in it as HTML."""
    app.drop(workflow)
    app.set_widgets(SIZE)
    app.page.evaluate(
        """message => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreLora')
        const detail = {node_id: String(node.id), exception_message: message + '\\n'}
        app.api.dispatchEvent(new CustomEvent('wan_core.text', {detail: {node: String(node.id), text: 'before'}}))
        const error = {prompt_id: '1', node_type: node.type, executed: [], exception_type: 'WanError', traceback: [],
                       current_inputs: {}, current_outputs: {}, ...detail}
        app.api.dispatchEvent(new CustomEvent('execution_error', {detail: error}))
    }""",
        f"Error {SHOWN_KEY}",
    )
    assert texts(app)["WanCoreLora"] == f"Error {SHOWN_KEY}"
    app.page.wait_for_timeout(500)
    assert ran(app) == []
    app.page.keyboard.press("Escape")


def test_a_text_can_be_marked_copied_and_scrolled(app, workflow: Path) -> None:
    app.drop(workflow)
    app.fit()
    long = "\n".join(f"line {number} <i>of</i> a long text" for number in range(100))
    tell(app, "WanCoreLora", long)
    app.fit()
    panel = app.page.locator(".wan-core-text:not(:empty)")
    assert panel.inner_text() == long
    where = app.page.evaluate("app.graph.nodes.find(n => n.type === 'WanCoreLora').pos.slice()")
    box = panel.bounding_box()
    assert box["height"] > 40
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    app.page.mouse.move(box["x"] + box["width"] * 0.1, y)
    app.page.mouse.down()
    app.page.mouse.move(x, y + box["height"] * 0.3, steps=8)
    app.page.mouse.up()
    marked = app.page.evaluate("getSelection().toString()")
    assert "<i>of</i>" in marked
    copied = app.page.evaluate("""() => new Promise(done => {
        document.addEventListener('copy', () => done('taken by the editor'), {once: true})
        setTimeout(() => done('left to the browser'), 300)
        document.execCommand('copy')
    })""")
    assert copied == "left to the browser"

    scale = app.page.evaluate("app.canvas.ds.scale")
    app.page.mouse.move(x, y)
    app.page.mouse.wheel(0, 300)
    app.page.wait_for_function("document.querySelector('.wan-core-text:not(:empty)').scrollTop > 0")
    assert app.page.evaluate("app.canvas.ds.scale") == scale
    assert app.page.evaluate("app.graph.nodes.find(n => n.type === 'WanCoreLora').pos.slice()") == where
    tell(app, "WanCoreLora", "short")  # nothing to scroll: the wheel is the canvas's
    app.stand_still()
    view = app.page.evaluate("[app.canvas.ds.scale, ...app.canvas.ds.offset]")
    box = panel.bounding_box()
    app.page.mouse.move(box["x"] + 5, box["y"] + 5)
    app.page.mouse.wheel(0, 300)
    app.page.wait_for_function(
        "view => JSON.stringify([app.canvas.ds.scale, ...app.canvas.ds.offset]) !== JSON.stringify(view)", arg=view
    )


def test_menus_list_file_names_as_text(app, workflow: Path) -> None:
    """As far as the pack can see to it: in the menus of its own nodes."""
    app.drop(workflow)
    app.fit()
    for _ in range(3):  # a click may only close what was open before
        if app.nodes2:
            node = app.page.locator(f"[data-node-id='{app.page.evaluate(_LORA_ID)}']")
            node.get_by_text(NAME[:12], exact=False).first.click()
        else:
            app.page.mouse.click(*app.page.evaluate(_LORA_NAME_AT))
        app.page.wait_for_timeout(2000)
        if app.page.evaluate(_LISTED, NAME):
            break
    assert app.page.evaluate(_LISTED, NAME)
    assert ran(app) == []
    app.page.keyboard.press("Escape")


_LISTED = """name => [...document.querySelectorAll('.litemenu-entry, [role=option], [role=dialog] *, .p-popover *')]
    .some(element => element.textContent.trim() === name)"""

_LORA_ID = "app.graph.nodes.find(node => node.type === 'WanCoreLora').id"

_LORA_NAME_AT = """() => {
    const node = app.graph.nodes.find(node => node.type === 'WanCoreLora')
    const widget = node.widgets.find(widget => widget.name === 'lora_name')
    const {scale, offset} = app.canvas.ds
    const {left, top} = app.canvas.canvas.getBoundingClientRect()
    return [left + (node.pos[0] + node.size[0] / 2 + offset[0]) * scale,
            top + (node.pos[1] + widget.last_y + 10 + offset[1]) * scale]
}"""


def tell(app, kind: str, text: str) -> None:
    """An event as the server sends it."""
    app.page.evaluate(
        """([kind, text]) => {
        const node = String(app.graph.nodes.find(node => node.type === kind).id)
        app.api.dispatchEvent(new CustomEvent('wan_core.text', {detail: {node, text}}))
    }""",
        [kind, text],
    )
