"""Prompts from a text and chosen terms, worded as Wan's own examples are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from ..errors import WanError
from .palette import TERMS, in_order, parse_palette
from .vocabulary import GROUPS, Group, Term

NONE = "none"  # the first entry of every menu
LANGUAGES = ("auto", "en", "zh")
PLACEMENTS = ("before", "after")

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "…")


def compose(
    text: str, choices: Mapping[str, str | None], language: str = "auto", placement: str = "before", palette: str = ""
) -> str:
    """A prompt with aesthetic terms.

    Args:
        choices: group id -> term id; None or "none" chooses nothing. Terms appear in the vocabulary's order.
        language: of the terms; "auto" is Chinese when the text contains Chinese characters.
        placement: of the terms, before or after the text.
        palette: further terms, as `parse_palette` reads them; several of one group if need be.

    A term that the text already contains, in either language, is not said again.

    Raises:
        WanError: an unknown group, term, language or placement.
    """
    _one_of(language, LANGUAGES, "language")
    _one_of(placement, PLACEMENTS, "placement")
    said = _terms_in(text)
    terms = [term for term in _chosen(choices, palette) if term.id not in said]
    chinese = language == "zh" or (language == "auto" and has_chinese(text))
    if not terms or not text.strip():
        return _listed(terms, chinese) or text
    place = _before if placement == "before" else _after
    return place(text.strip(), terms, chinese)


def choices_for(group: str) -> list[str]:
    """A menu of a group's terms in both languages, such as "Edge lighting / 边缘光"; the first entry is "none".

    Raises:
        WanError: an unknown group.
    """
    return [NONE, *(_entry(term) for term in _find_group(group).terms)]


def parse_choice(group: str, entry: str) -> str | None:
    """The term id of a menu entry, or of an id itself; None for "none" and for nothing.

    Raises:
        WanError: an unknown group or entry.
    """
    found = _find_group(group)
    if entry in ("", NONE):
        return None
    ids = {_entry(term): term.id for term in found.terms} | {term.id: term.id for term in found.terms}
    return _lookup(ids, entry, f"term in {found.en} ({found.id})")


def has_chinese(text: str) -> bool:
    return _HAN.search(text) is not None


def _chosen(choices: Mapping[str, str | None], palette: str) -> list[Term]:
    chosen = [parse_choice(group, choice or NONE) for group, choice in choices.items()]
    return [TERMS[id] for id in in_order([*filter(None, chosen), *parse_palette(palette)])]


def _find_group(id: str) -> Group:
    return _lookup(GROUPS, id, "group of terms")


def _entry(term: Term) -> str:
    return f"{_capitalised(term.en)} / {term.zh}"


def _before(text: str, terms: list[Term], chinese: bool) -> str:
    return f"{_listed(terms, chinese)}{'，' if chinese else '. '}{text}"


def _after(text: str, terms: list[Term], chinese: bool) -> str:
    ended = text.endswith(_SENTENCE_ENDS)
    if chinese:
        return f"{text}{'' if ended else '，'}{_listed(terms, chinese)}{'。' if ended else ''}"
    return f"{text}{'' if ended else '.'} {_listed(terms, chinese)}."


def _listed(terms: list[Term], chinese: bool) -> str:
    if chinese:
        return "，".join(term.zh for term in terms)
    return _capitalised(", ".join(term.en for term in terms))


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _terms_in(text: str) -> set[str]:
    """Ids of the terms that a text names; "medium close-up shot" does not name "close-up shot"."""
    pattern, ids = _wordings()
    return {ids[match.group().lower()] for match in pattern.finditer(text)}


@cache
def _wordings() -> tuple[re.Pattern, dict[str, str]]:
    terms = [term for group in GROUPS.values() for term in group.terms]
    ids = {wording.lower(): term.id for term in terms for wording in (term.en, term.zh)}
    longest_first = sorted(ids, key=len, reverse=True)
    return re.compile("|".join(map(_whole, longest_first)), re.IGNORECASE), ids


def _whole(wording: str) -> str:
    """A pattern of whole words; Chinese has no gaps between words to look for."""
    return rf"(?<!\w){re.escape(wording)}(?!\w)" if wording.isascii() else re.escape(wording)


def _lookup(table: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        near = get_close_matches(name, table, n=3, cutoff=0.5)
        hint = f"Did you mean {_either(near)}?" if near else f"Expected one of: {', '.join(table)}."
        raise WanError(f"Unknown {kind}: {name!r}. {hint}")
    return table[name]


def _one_of(value: str, allowed: Iterable[str], kind: str) -> None:
    _lookup({name: name for name in allowed}, value, kind)


def _either(names: list[str]) -> str:
    return " or ".join(repr(name) for name in names)
