"""The aesthetic vocabulary and the prompts made of it."""

from __future__ import annotations

import re

import pytest

from wan_core.errors import WanError
from wan_core.prompt.compose import NONE, choices_for, compose, parse_choice
from wan_core.prompt.vocabulary import GROUPS

TERMS = [term for group in GROUPS.values() for term in group.terms]
SEED = {
    "time_of_day": "daytime", "light_source": "sunny_lighting", "light_angle": "edge_lighting",
    "color_tone": "warm_colors", "saturation": "low_saturation", "shot_size": "extreme_wide_shot",
    "composition": "balanced_composition",
}  # fmt: skip
ASTRONAUTS = "画面中有两名穿着宇航服的人，他们正站在一片广阔的水域中。"


def test_size_of_the_vocabulary():
    assert len(TERMS) >= 130
    asked = {
        "light_source",
        "lighting_type",
        "time_of_day",
        "shot_size",
        "composition",
        "lens",
        "camera_angle",
        "shot_type",
        "color_tone",
        "camera_movement",
        "style",
        "effect",
    }
    assert asked <= set(GROUPS)
    assert all(len(group.terms) >= 3 for group in GROUPS.values())


@pytest.mark.parametrize("part", ["id", "en", "zh"])
def test_every_term_and_wording_is_its_own(part: str):
    values = [getattr(term, part).lower() for term in TERMS]
    assert sorted(values) == sorted(set(values))
    labels = [getattr(group, part) for group in GROUPS.values()]
    assert len(labels) == len(set(labels))


def test_wordings_are_in_their_language():
    for item in (*TERMS, *GROUPS.values()):
        assert re.fullmatch(r"[a-z][a-z0-9_]*", item.id)
        assert item.en.isascii()
        assert item.en == item.en.strip()
        assert "/" not in item.en + item.zh
        assert re.search(r"[\u4e00-\u9fff]", item.zh)
        assert "，" not in item.zh
        assert "," not in item.en


def test_worded_as_the_seeds_prompt():
    expected = "白天，晴天光，边缘光，暖色调，低饱和度，极端全景，平衡构图，" + ASTRONAUTS
    assert compose(ASTRONAUTS, SEED) == expected
    assert compose(ASTRONAUTS, dict(reversed(SEED.items()))) == expected


def test_worded_in_english():
    assert compose("Two astronauts stand in wide water.", SEED) == (
        "Daytime, sunny lighting, edge lighting, warm colors, low saturation, extreme wide shot, balanced composition. "
        "Two astronauts stand in wide water."
    )


@pytest.mark.parametrize(
    ("text", "language", "placement", "expected"),
    [
        ("A cat walks", "en", "after", "A cat walks. Daytime, edge lighting."),
        ("A cat walks.", "auto", "after", "A cat walks. Daytime, edge lighting."),
        ("A cat walks!", "auto", "before", "Daytime, edge lighting. A cat walks!"),
        ("A cat walks", "zh", "before", "白天，边缘光，A cat walks"),
        ("一只猫在走", "auto", "after", "一只猫在走，白天，边缘光"),
        ("一只猫在走。", "auto", "after", "一只猫在走。白天，边缘光。"),
        ("一只猫在走", "en", "before", "Daytime, edge lighting. 一只猫在走"),
        ("", "auto", "before", "Daytime, edge lighting"),
        ("  ", "zh", "after", "白天，边缘光"),
    ],
)
def test_language_and_placement(text: str, language: str, placement: str, expected: str):
    assert compose(text, {"light_angle": "edge_lighting", "time_of_day": "daytime"}, language, placement) == expected


@pytest.mark.parametrize("text", ["a cat, walking", "一只猫。", "", " kept ,  as it is\n"])
def test_no_terms_leave_the_text_unchanged(text: str):
    assert compose(text, {}) == text
    assert compose(text, {"style": None, "lens": NONE}, "zh", "after") == text


@pytest.mark.parametrize(
    ("text", "group", "term", "said"),
    [
        ("A cat in EDGE LIGHTING", "light_angle", "edge_lighting", True),
        ("一只猫，边缘光", "light_angle", "edge_lighting", True),
        ("A medium close-up shot of a cat", "shot_size", "close_up_shot", False),
        ("A medium close-up shot of a cat", "shot_size", "medium_close_up_shot", True),
        ("极端全景，一只猫", "shot_size", "wide_shot", False),
        ("a laptop lighting up", "light_angle", "top_lighting", False),
        ("a noontime walk", "time_of_day", "noon", False),
    ],
)
def test_terms_already_in_the_text_are_not_repeated(text: str, group: str, term: str, said: bool):
    result = compose(text, {group: term})
    assert (result == text) is said


@pytest.mark.parametrize("group", GROUPS)
def test_menus_are_readable_and_parse_back(group: str):
    menu = choices_for(group)
    assert menu[0] == NONE
    assert len(menu) == len(set(menu)) == len(GROUPS[group].terms) + 1
    assert parse_choice(group, NONE) is None
    for entry, term in zip(menu[1:], GROUPS[group].terms, strict=True):
        assert entry.lower() == f"{term.en} / {term.zh}".lower()
        assert parse_choice(group, entry) == parse_choice(group, term.id) == term.id
        assert compose("", {group: entry}, "zh") == compose("", {group: term.id}, "zh") == term.zh


def test_menu_entries_are_saved_in_workflows():
    assert choices_for("light_angle") == [
        "none",
        "Top lighting / 顶光",
        "Side lighting / 侧光",
        "Front lighting / 正面光",
        "Backlighting / 背光",
        "Underlighting / 底光",
        "Edge lighting / 边缘光",
    ]


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(WanError, match="Unknown group of terms: 'light_sorce'. Did you mean 'light_source'"):
        compose("a", {"light_sorce": "daylight"})
    with pytest.raises(WanError, match="Light source.*'daylihgt'.*'daylight'"):
        compose("a", {"light_source": "daylihgt"})
    with pytest.raises(WanError, match="Expected one of: before, after"):
        compose("a", {}, placement="xyz")
    with pytest.raises(WanError, match="language: 'fr'"):
        compose("a", {}, "fr")
