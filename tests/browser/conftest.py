"""A real browser on a real ComfyUI: each frontend, with "Nodes 2.0" off and on."""

from __future__ import annotations

import base64
import json
import mimetypes
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from comfy_server import PACK, Server
from playwright.sync_api import Browser, ConsoleMessage, Page, Response, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = Path(os.environ.get("WAN_TEST_SCREENSHOTS") or ROOT / ".cache/screenshots")
FRONTENDS = ("pinned", "newest")  # the one ComfyUI pins; the one that users of a current ComfyUI have
ROOM = 10  # pixels of the graph that shipped nodes keep between them
SCREEN = {"width": 1600, "height": 1000}
CHROMIUM_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
                  "--disable-background-networking", "--disable-sync")  # fmt: skip

# Errors in the browser's console that ComfyUI itself makes; everything else fails the test in which it appears.
# Each is a pattern on "message @ source".
COMFYUIS_OWN_ERRORS = (
    # Files a new user does not have yet, and an interface of newer servers that the newest frontend asks 0.3.75 for.
    r"Failed to load resource.*404.* @ .*/(user\.css|favicon\.ico|api/userdata.*|api/jobs.*)",
    r"Failed to load resource.*404.* @ .*/templates/index_logo\.json",
    r"JobsApiError: Failed to fetch jobs",
    # --disable-api-nodes forbids the frontend the internet, and it complains about that.
    r"violates the (following|document's) Content Security Policy",
    # A figure that frontend 1.49.6 watches before there is a graph; the pack's own openGraph asks first.
    r"ComfyApp graph accessed before initialization @ .*/assets/",
    # A settings listener of frontend 1.32.9 that runs before the first workflow is open.
    r"TypeError: Cannot read properties of undefined \(reading 'id'\)\s+at onChange \(.*/assets/index-",
)


class App:
    """ComfyUI in a browser's page, used as a person does: dropping files, opening templates, pressing Run."""

    def __init__(self, page: Page, server: Server, frontend: str, nodes2: bool) -> None:
        self.page, self.server, self.frontend, self.nodes2 = page, server, frontend, nodes2
        self.errors: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self._note(f"{error.stack or error}"))
        page.on("response", self._on_response)

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._note(f"{message.text} @ {message.location.get('url', '')}")

    def _on_response(self, response: Response) -> None:
        if response.status >= 400 and PACK in response.url:
            self._note(f"{response.status} @ {response.url}")

    def _note(self, error: str) -> None:
        if not any(re.search(pattern, error, re.DOTALL) for pattern in COMFYUIS_OWN_ERRORS):
            self.errors.append(error)

    def open(self) -> None:
        """Load the page as a new visitor, with an empty graph."""
        self.server.client.set_setting("Comfy.VueNodes.Enabled", self.nodes2)
        self.page.goto(self.server.url)
        self.page.wait_for_function("window.app?.extensionManager && app.graph?.nodes.length", timeout=60_000)
        self.clear()

    def clear(self) -> None:
        self.page.keyboard.press("Escape")
        self.page.evaluate("app.graph.clear()")

    def command(self, name: str) -> None:
        self.page.evaluate("name => app.extensionManager.command.execute(name)", name)

    def drop(self, path: Path) -> None:
        """Drop a file (a workflow, or a picture or video made with one) onto the empty canvas, wait for its graph."""
        self.clear()
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self.page.evaluate(_DROP, [path.name, kind, base64.b64encode(path.read_bytes()).decode()])
        self.wait_for_graph()

    def open_template(self, name: str) -> None:
        """Open one of the pack's workflows from the template browser."""
        self.clear()
        self.command("Comfy.BrowseTemplates")
        dialog = self.page.get_by_role("dialog").first
        dialog.locator("nav").get_by_text(PACK, exact=True).last.click()
        dialog.get_by_test_id(f"template-workflow-{name}").click()
        self.wait_for_graph()

    def wait_for_graph(self) -> None:
        """Wait until nodes have appeared and none was added for half a second."""
        self.page.evaluate("window.__settled = null")
        self.page.wait_for_function(_SETTLED, timeout=30_000)

    def node_types(self) -> Counter[str]:
        return Counter(self.page.evaluate("app.graph.nodes.map(node => node.type)"))

    def links(self) -> list[tuple[int, int, int, int]]:
        """Every link whose two ends exist: origin node and slot, target node and slot."""
        return [tuple(map(int, link)) for link in self.page.evaluate(_LINKS)]

    def crowded(self) -> list[tuple[str, str]]:
        """Nodes that are drawn less than ROOM apart, by their ids."""
        self.fit()
        boxes = self.page.evaluate(_DOM_BOXES if self.nodes2 else _BOXES)
        assert len(boxes) == self.node_types().total()
        return [(a[0], b[0]) for a, b in combinations(boxes, 2) if near(a[1:], b[1:])]

    def missing_nodes(self) -> list[str]:
        """Types on the canvas that the server does not offer."""
        known = "type => type in LiteGraph.registered_node_types"
        return self.page.evaluate(f"app.graph.nodes.map(node => node.type).filter(type => !({known})(type))")

    def shown_nodes(self) -> int:
        """Nodes drawn as DOM elements, which only Nodes 2.0 does."""
        return self.page.locator("[data-node-id]").count()

    def alerts(self) -> list[str]:
        """What the frontend tells the user in messages and dialogs: an invalid workflow, missing nodes or models."""
        shown = self.page.locator(".p-toast-message, [role=dialog], [data-testid=error-overlay]")
        return shown.all_inner_texts()

    def set_widgets(self, values: dict[str, Any]) -> None:
        """Set every widget of these names, in whichever node, as if typed in."""
        self.page.evaluate(_SET_WIDGETS, values)

    def run(self, timeout: float = 120) -> dict[str, Any]:
        """Press Run and wait for the end: {prompt_id, ...} of success; an error of the server fails here."""
        self.page.evaluate(_LISTEN)
        self.page.get_by_test_id("queue-button").first.click()
        self.page.wait_for_function("window.__ended", timeout=timeout * 1000)
        kind, detail = self.page.evaluate("window.__ended")
        assert kind == "execution_success", f"{kind}: {json.dumps(detail, indent=1)[:3000]}"
        return detail

    def fit(self) -> None:
        """The whole graph on the screen. The view moves there in an animation, and nodes may still be laid out; before
        that the canvas may still have to follow a new size of the screen, for which it would be fitted."""
        self.stand_still()
        self.command("Comfy.Canvas.FitView")
        self.stand_still()

    def stand_still(self) -> None:
        self.page.evaluate("window.__still = [null, 0, 0]")
        self.page.wait_for_function(_STILL, polling="raf", timeout=60_000)

    def screenshot(self, name: str) -> Path:
        """A picture of the whole graph under .cache/screenshots, on a screen large enough to read it."""
        self.page.set_viewport_size({"width": 2560, "height": 1440})
        self.fit()
        path = SCREENSHOTS / f"{name}-{self.frontend}-{'nodes2' if self.nodes2 else 'nodes1'}.png"
        self.page.screenshot(path=path)
        self.page.set_viewport_size(SCREEN)
        return path


def near(a: list[float], b: list[float]) -> bool:
    return a[0] < b[2] + ROOM and b[0] < a[2] + ROOM and a[1] < b[3] + ROOM and b[1] < a[3] + ROOM


# Ids and places, in pixels of the graph: titles stand above a node's position.
_BOXES = """() => app.graph.nodes.map(({id, pos, size}) =>
    [String(id), pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]])"""

_DOM_BOXES = """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
    const {left, top, right, bottom} = element.getBoundingClientRect()
    return [element.dataset.nodeId, ...[left, top, right, bottom].map(place => place / app.canvas.ds.scale)]
})"""

# True once neither canvas, view nor a node has changed for 8 frames and 300 milliseconds: large screens are drawn here
# without a GPU, ten times a second, and what is put off is put off by the clock.
_STILL = """() => {
    const boxes = [...document.querySelectorAll('[data-node-id]')].map(element => element.getBoundingClientRect())
    const {width, height} = app.canvas.canvas
    const now = JSON.stringify([innerWidth, width, height, app.canvas.ds.scale, [...app.canvas.ds.offset], boxes])
    const [before, frames, since] = window.__still
    window.__still = now === before ? [now, frames + 1, since] : [now, 0, performance.now()]
    return frames >= 8 && now === before && performance.now() - since >= 300
}"""
_DROP = """([name, type, data]) => {
    const file = new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name, {type})
    const dataTransfer = new DataTransfer()
    dataTransfer.items.add(file)
    const event = {bubbles: true, cancelable: true, dataTransfer, clientX: 900, clientY: 600}
    for (const kind of ['dragenter', 'dragover', 'drop'])
        document.querySelector('#graph-canvas').dispatchEvent(new DragEvent(kind, event))
}"""

_SETTLED = """() => {
    const count = app.graph.nodes.length + app.graph.links.size
    if (window.__settled?.count !== count) window.__settled = {count, since: performance.now()}
    return count > 0 && performance.now() - window.__settled.since > 500
}"""

_LINKS = """() => [...app.graph.links.values()]
    .filter(link => app.graph.getNodeById(link.origin_id) && app.graph.getNodeById(link.target_id))
    .map(link => [link.origin_id, link.origin_slot, link.target_id, link.target_slot])"""

_SET_WIDGETS = """values => {
    for (const node of app.graph.nodes)
        for (const widget of node.widgets ?? [])
            if (widget.name in values) {
                widget.value = values[widget.name]
                widget.callback?.(widget.value)
            }
}"""

_LISTEN = """() => {
    window.__ended = null
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted', 'promptQueueFailed'])
        app.api.addEventListener(kind, event => { window.__ended ??= [kind, event.detail] }, {once: true})
}"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("WAN_TEST_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.fail("No Chromium: run `python scripts/test.py`, or name one in WAN_TEST_CHROMIUM.")
    shutil.rmtree(SCREENSHOTS, ignore_errors=True)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*CHROMIUM_FLAGS])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def server_with(start_server: Callable[..., Server], request: pytest.FixtureRequest) -> Callable[[str], Server]:
    """The server of a frontend, started once; the pinned one is the server that all other tests share."""
    started: dict[str, Server] = {}

    def start_frontend() -> Server:
        return start_server("newest", "--front-end-root", str(request.getfixturevalue("newest_frontend")))

    def get(frontend: str) -> Server:
        if frontend not in started:
            started[frontend] = start_frontend() if frontend == "newest" else request.getfixturevalue("server")
        return started[frontend]

    return get


@pytest.fixture(
    scope="session",
    params=[(name, nodes2) for name in FRONTENDS for nodes2 in (False, True)],
    ids=lambda param: f"{param[0]}-{'nodes2' if param[1] else 'nodes1'}",
)
def opened(request: pytest.FixtureRequest, browser: Browser, server_with: Callable[[str], Server]) -> Iterator[App]:
    frontend, nodes2 = request.param
    context = browser.new_context(viewport=SCREEN, locale="en-US")
    context.add_init_script("localStorage.vueNodesBannerDismissed = true")
    app = App(context.new_page(), server_with(frontend), frontend, nodes2)
    app.open()
    yield app
    context.close()


@pytest.fixture
def app(opened: App, request: pytest.FixtureRequest) -> Iterator[App]:
    """The open page with an empty graph. An error in its console, also while it was opened, fails the test."""
    opened.clear()
    yield opened
    opened.page.screenshot(path=SCREENSHOTS / "last" / (re.sub(r"[^\w.-]+", "-", request.node.name) + ".png"))
    errors, opened.errors = opened.errors, []
    assert not errors, "errors in the browser's console:\n" + "\n".join(errors)
