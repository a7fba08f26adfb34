"""English and Chinese say the same things, and every node has its help page."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from wan_core.config import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("en", "zh")
HAN = re.compile(r"[\u4e00-\u9fff]")


def texts(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


def keys(tree: Any, path: str = "") -> set[str]:
    if not isinstance(tree, dict):
        return {path}
    return {key for name, branch in tree.items() for key in keys(branch, f"{path}/{name}")}


@pytest.mark.parametrize("name", ["main.json", "nodeDefs.json", "commands.json", "settings.json"])
def test_both_languages_have_every_text(name: str) -> None:
    english, chinese = texts("en", name), texts("zh", name)
    assert keys(english) == keys(chinese)
    assert all(text.strip() for tree in (english, chinese) for text in leaves(tree))


def test_chinese_is_chinese() -> None:
    for node in texts("zh", "nodeDefs.json").values():
        tooltips = [entry["tooltip"] for entry in node["inputs"].values()]
        assert all(HAN.search(text) for text in [node["display_name"], node["description"], *tooltips])


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_has_a_help_page(language: str) -> None:
    nodes = texts(language, "nodeDefs.json")
    for id, node in nodes.items():
        page = (ROOT / "web/docs" / id / f"{language}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n") or node["display_name"] in page
        assert bool(HAN.search(page)) == (language == "zh")
    assert {path.name for path in (ROOT / "web/docs").iterdir()} == set(nodes)


@pytest.mark.parametrize("language", LANGUAGES)
def test_help_pages_name_inputs_as_the_editor_does(language: str) -> None:
    """A bold name at the head of a list entry is an input, by the label that the editor shows."""
    for id, node in texts(language, "nodeDefs.json").items():
        page = (ROOT / "web/docs" / id / f"{language}.md").read_text(encoding="utf-8")
        labels = {entry["name"] for entry in node["inputs"].values()} | OTHER_NAMES[language]
        heads = [line for line in page.splitlines() if line.startswith("- **")]
        named = {name for line in heads for name in re.findall(r"\*\*(.+?)\*\*", HEAD_END.split(line)[0])}
        assert named <= labels, f"{id}: {named - labels}"


HEAD_END = re.compile(r"[:：]| decides| 决定")
OTHER_NAMES = {"en": {"cfg", "the menus"}, "zh": {"cfg", "各个菜单"}}


NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.mark.parametrize("name", ["nodeDefs.json", "settings.json", "main.json"])
def test_chinese_says_the_same_numbers(name: str) -> None:
    """The English texts are the nodes' own, whose official numbers are those of VARIANTS."""
    for english, chinese in zip(*(leaves(texts(language, name)) for language in LANGUAGES), strict=True):
        lost = Counter(NUMBER.findall(english)) - Counter(NUMBER.findall(chinese))
        assert not lost, (english, chinese)


@pytest.mark.parametrize("id", texts("en", "nodeDefs.json"))
def test_help_pages_say_the_same_numbers(id: str) -> None:
    english, chinese = (
        set(NUMBER.findall((ROOT / f"web/docs/{id}/{language}.md").read_text(encoding="utf-8")))
        for language in LANGUAGES
    )
    assert english == chinese


def test_help_pages_say_the_official_boundaries_and_lengths() -> None:
    high, start, dense = (VARIANTS[task] for task in ("t2v-A14B", "i2v-A14B", "ti2v-5B"))
    page = (ROOT / "web/docs/WanCoreExpertSwitch/en.md").read_text(encoding="utf-8")
    assert f"{high.boundary:g} for T2V, {start.boundary:g} for I2V" in page
    page = (ROOT / "web/docs/WanCoreEmptyLatent/en.md").read_text(encoding="utf-8")
    assert f"{high.frames} frames at {high.fps} fps" in page and f"{dense.frames} at {dense.fps} fps" in page
    sizes = {size for variant in VARIANTS.values() for size in variant.sizes}
    for width, height in re.findall(r"(\d+) × (\d+)", page):
        assert (int(width), int(height)) in sizes


def test_the_editors_own_numbers_are_official() -> None:
    """What the browser offers by itself: sizes and lengths in web/presets.js, the first boundary of a mode."""
    presets = (ROOT / "web/presets.js").read_text(encoding="utf-8")
    offered = {(int(width), int(height)) for width, height in re.findall(r"width: (\d+), height: (\d+)", presets)}
    assert offered == {size for variant in VARIANTS.values() for size in variant.sizes}
    lengths = {(int(frames), int(fps)) for frames, fps in re.findall(r"\((\d+) frames at (\d+) fps\)", presets)}
    assert lengths >= {(variant.frames, variant.fps) for variant in VARIANTS.values() if variant.frames > 1}
    start = re.search(r"timestep: ([\d.]+)", (ROOT / "web/expert_switch.js").read_text(encoding="utf-8"))
    assert start and float(start[1]) == VARIANTS["t2v-A14B"].boundary


def leaves(tree: Any) -> list[str]:
    return [tree] if isinstance(tree, str) else [text for branch in tree.values() for text in leaves(branch)]
