"""The moving preview on the sampler's node, in each frontend and renderer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[2]
SIZE = {"width": 64, "height": 64, "frames": 33, "steps": 6}  # nine latent frames: a picture of two seconds


def test_preview_moves(app, tmp_path: Path) -> None:
    app.drop(ROOT / "workflows/wan22_ti2v_5b.json")
    app.page.evaluate("app.graph.nodes.find(node => node.type === 'LoadImage').mode = 4")
    before = serialized(app)
    assert app.page.evaluate(_HEIGHT) == 0

    app.set_widgets(SIZE | {"seed": 1 + app.nodes2})  # a run that the server has done before is not done again
    app.run()
    picture = app.page.locator(".wan-core-preview img")
    app.page.wait_for_function("document.querySelector('.wan-core-preview img')?.naturalWidth")
    assert app.page.locator(".wan-core-preview div").inner_text().startswith("step 6 of 6\nsigma 0.00")
    assert app.page.evaluate(_HEIGHT) > 60

    app.screenshot("preview")
    app.fit()  # the screen is small again
    first = look(picture, tmp_path / "first.png", app)
    assert min(first.size) >= 60
    looks = (look(picture, tmp_path / f"{number}.png", app) for number in range(40))  # a busy browser draws seldom
    assert any(differ(first, later) for later in looks)
    assert still_previews(app) == 0
    assert serialized(app) == before | {"widgets": serialized(app)["widgets"]}
    assert "wan_core_preview" not in json.dumps(serialized(app))


_HEIGHT = "[...document.querySelectorAll('.wan-core-preview')].reduce((sum, element) => sum + element.offsetHeight, 0)"


def look(picture: Any, path: Path, app) -> Image.Image:
    app.page.screenshot(path=path, clip=picture.bounding_box())
    app.page.wait_for_timeout(400)
    return Image.open(path).convert("RGB")


def differ(first: Image.Image, second: Image.Image) -> bool:
    """By more than what scaling or a cursor could do: somewhere a colour has changed by a tenth."""
    return max(high for _, high in ImageChops.difference(first, second).getextrema()) > 25


def still_previews(app) -> int:
    """Pictures that the frontend itself shows on the sampler."""
    return app.page.evaluate("""() => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreSampler')
        const drawn = node.widgets.filter(widget => widget.name.startsWith('$$canvas-image')).length
        const element = document.querySelector(`[data-node-id="${node.id}"]`)
        return drawn + (element ? element.querySelectorAll('img:not(.wan-core-preview img)').length : 0)
    }""")


def serialized(app) -> dict[str, Any]:
    """What the sampler would be saved and sent as."""
    return app.page.evaluate("""async () => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreSampler')
        const sent = (await app.graphToPrompt()).output[node.id]
        const {widgets_values, inputs} = node.serialize()
        return {widgets: widgets_values, count: widgets_values.length, inputs: inputs.map(input => input.name),
                sent: Object.keys(sent.inputs)}
    }""")


def test_a_new_run_clears_the_picture_and_late_news_are_passed_over(app) -> None:
    app.drop(ROOT / "workflows/wan22_t2v_a14b.json")
    line = {"step": 3, "steps": 20, "expert": "high", "sigma": 0.934, "left": 250}
    tell(app, run=2, line=line)
    text = app.page.locator(".wan-core-preview div")
    assert text.inner_text().startswith("high-noise expert · step 3 of 20\nsigma 0.93 · 4:")
    tell(app, run=2, picture=PIXEL)
    picture = app.page.locator(".wan-core-preview img")
    picture.wait_for(state="attached")
    assert picture.get_attribute("hidden") is None
    app.page.wait_for_function("!document.querySelector('.wan-core-preview div').textContent.includes('4:10')")

    tell(app, run=3, line=line | {"step": 0, "left": None})
    assert text.inner_text() == "high-noise expert · starting…\nsigma 0.93"
    assert picture.get_attribute("hidden") is not None
    tell(app, run=2, picture=PIXEL)
    assert picture.get_attribute("hidden") is not None

    app.page.evaluate("app.graph.remove(app.graph.nodes.find(node => node.type === 'WanCoreSampler'))")
    tell(app, run=4, line=line)  # to nobody
    app.page.wait_for_function("!document.querySelector('.wan-core-preview')")


PIXEL = "data:image/webp;base64,UklGRhoAAABXRUJQVlA4TA0AAAAvAAAAEAcQERGIiP4HAA=="


def tell(app, **news: Any) -> None:
    """An event as the server sends it, to the sampler on the canvas."""
    app.page.evaluate(
        """news => {
        const node = app.graph.nodes.find(node => node.type === 'WanCoreSampler')
        window.__sampler ??= node?.id
        app.api.dispatchEvent(new CustomEvent('wan_core.preview', {detail: {node: String(window.__sampler), ...news}}))
    }""",
        news,
    )
