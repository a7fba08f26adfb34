"""English and Chinese say the same things, and every node has its help page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

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


def leaves(tree: Any) -> list[str]:
    return [tree] if isinstance(tree, str) else [text for branch in tree.values() for text in leaves(branch)]
