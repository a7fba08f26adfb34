"""Wan Prompt Extend in each frontend and renderer: its settings, what it shows, and that no workflow holds a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.language_server import ENGLISH, KEY, LanguageServer, language_server, refuses

SCREENSHOTS = Path(__file__).resolve().parents[2] / ".cache/screenshots"
SETTINGS = "wan_core.PromptExtension."


@pytest.fixture(scope="module")
def running() -> Iterator[LanguageServer]:
    with language_server() as server:
        yield server


@pytest.fixture
def language(running: LanguageServer, app) -> Iterator[LanguageServer]:
    running.again()
    yield running
    for end in ("Address", "Key"):
        app.server.client.set_setting(f"{SETTINGS}OpenAI{end}", "")


def test_server_and_key_are_set_and_used_and_shown(app, language) -> None:
    """As a person does it: the settings, the node, Run; then a failure, and the page loaded again."""
    page = app.page
    app.command("Comfy.ShowSettingsDialog")
    dialog = page.get_by_role("dialog").first
    dialog.get_by_text("Wan", exact=True).first.click()
    address, key = (
        dialog.locator(f"[id='{SETTINGS}OpenAI{end}'] input, input[id='{SETTINGS}OpenAI{end}']").first
        for end in ("Address", "Key")
    )
    address.fill(language.openai)
    address.press("Tab")
    key.fill(KEY)
    key.press("Tab")
    assert key.get_attribute("type") == "password"
    page.screenshot(path=SCREENSHOTS / f"extend-settings-{app.frontend}-{'nodes2' if app.nodes2 else 'nodes1'}.png")
    page.keyboard.press("Escape")
    page.wait_for_function("!document.querySelector('[role=dialog]')")
    saved = app.server.client.get("/settings")
    assert (saved[f"{SETTINGS}OpenAIAddress"], saved[f"{SETTINGS}OpenAIKey"]) == (language.openai, KEY)

    page.evaluate(_BUILD, f"a cat {app.frontend} {app.nodes2}")
    app.wait_for_graph()
    names = page.evaluate("app.graph.nodes.find(node => node.type === 'WanCorePromptExtend').widgets.map(w => w.name)")
    assert not [name for name in names if "control" in name], "each run would ask, and pay, again"
    app.run()
    page.wait_for_function("text => document.querySelector('.wan-core-text')?.textContent === text", arg=ENGLISH)
    app.fit()
    assert page.locator(".wan-core-text:not(:empty)").first.is_visible()
    app.screenshot("extend-answer")
    workflow = page.evaluate("JSON.stringify([app.graph.serialize(), app.graph.extra])")
    assert KEY not in workflow and language.openai not in workflow

    language.forever = refuses(401, "Incorrect API key.")
    app.set_widgets({"text": f"a dog {app.frontend} {app.nodes2}"})
    app.run()
    page.wait_for_function("document.querySelector('.wan-core-text')?.textContent.includes('refuses the key')")
    app.fit()
    app.screenshot("extend-failure")


_BUILD = """text => {
    app.graph.clear()
    const make = (kind, pos, values) => {
        const node = LiteGraph.createNode(kind)
        node.pos = pos
        for (const widget of node.widgets) if (widget.name in values) widget.value = values[widget.name]
        app.graph.add(node)
        return node
    }
    const node = make('WanCorePromptExtend', [100, 100], {text, method: 'openai', model: 'any'})
    node.connect(0, make('PreviewAny', [700, 100], {}), 0)
}"""
