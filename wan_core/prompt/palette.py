"""The palette: terms found by what people call them, written as a list of ids, and rolled with dice.

web/palette_words.js does the same in the editor; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache

from ..errors import WanError
from .conflicts import conflicts
from .synonyms import SYNONYMS
from .vocabulary import GROUPS, Term

TERMS: dict[str, Term] = {term.id: term for group in GROUPS.values() for term in group.terms}
ROLLED = ("style", "time_of_day", "light_source", "lighting_type", "light_angle", "color_tone", "shot_size",
          "composition", "lens", "camera_angle", "camera_movement")  # fmt: skip
_ROLLS = 6

_SEPARATORS = re.compile(r"[,;，；、\n]")
_GAPS = re.compile(r"[\s_-]+")
_EXACT = 1  # the worst rank at which a name is the term's own


def find_terms(query: str) -> list[str]:
    """Ids of the terms that a query may mean, the best first.

    Whole names come first, then synonyms, beginnings of names, beginnings of their words, the same of synonyms, any
    part of a name (Chinese has no gaps between words), and last all terms of a group that is called so. Equals stand
    in the vocabulary's order. A query of nothing finds nothing.
    """
    wanted = _plain(query)
    ranked = [(rank, id) for id in TERMS if (rank := _rank(wanted, id)) is not None] if wanted else []
    return [id for _, id in sorted(ranked, key=lambda found: found[0])]


def parse_palette(text: str) -> list[str]:
    """Term ids of a list such as "golden_hour, rim light，低角度拍摄": ids, or whole names of terms in either language.

    Raises:
        WanError: a name that no term has.
    """
    names = [name.strip() for name in _SEPARATORS.split(text) if name.strip()]
    return list(dict.fromkeys(map(_named, names)))


def roll(seed: int) -> list[str]:
    """As many term ids of different groups as look well, none against another; the same ones for the same seed.

    Args:
        seed: 0 ... 2^32 - 1
    """
    numbers = _Numbers(seed)
    groups = list(ROLLED)
    found: list[str] = []
    while groups and len(found) < _ROLLS:
        group = GROUPS[groups.pop(numbers.below(len(groups)))]
        fitting = [term.id for term in group.terms if not conflicts([*found, term.id])]
        if fitting:
            found.append(fitting[numbers.below(len(fitting))])
    return in_order(found)


def in_order(ids: Iterable[str]) -> list[str]:
    """Without repetitions, in the vocabulary's order."""
    wanted = set(ids)
    return [id for id in TERMS if id in wanted]


class _Numbers:
    """Numbers that look random, made in 32 bits of whole numbers so that JavaScript makes the same (xorshift32)."""

    def __init__(self, seed: int) -> None:
        self.state = (seed * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF or 1

    def below(self, end: int) -> int:
        self.state ^= (self.state << 13) & 0xFFFFFFFF
        self.state ^= self.state >> 17
        self.state ^= (self.state << 5) & 0xFFFFFFFF
        return self.state % end


def _rank(wanted: str, id: str) -> int | None:
    names, synonyms, group = _names(id)
    words = wanted.split(" ")
    tests = (
        wanted in names,
        wanted in synonyms,
        any(name.startswith(wanted) for name in names),
        any(_begins_words(words, name) for name in names),
        any(_begins_words(words, name) for name in synonyms),
        len(wanted) > wanted.isascii() and any(wanted in name for name in (*names, *synonyms)),
        wanted in group,
    )
    return next((rank for rank, passed in enumerate(tests) if passed), None)


def _begins_words(words: list[str], name: str) -> bool:
    have = name.split(" ")
    return all(any(part.startswith(word) for part in have) for word in words)


def _plain(text: str) -> str:
    """As names are compared: "Rim-Light" as "rim light", "colour" as "color"."""
    return _GAPS.sub(" ", text.lower()).strip().replace("colour", "color").replace("’", "'")


@cache
def _names(id: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """A term's own names, its synonyms, and what its group is called."""
    term = TERMS[id]
    group = next(group for group in GROUPS.values() if term in group.terms)
    own = dict.fromkeys(map(_plain, (term.en, term.zh, term.id)))
    called = dict.fromkeys(map(_plain, (group.id, group.en, group.zh)))
    return tuple(own), tuple(map(_plain, SYNONYMS.get(id, ()))), tuple(called)


def _named(name: str) -> str:
    wanted = _plain(name)
    for rank in range(_EXACT + 1):
        for id in TERMS:
            if wanted in _names(id)[rank]:
                return id
    near = find_terms(name)[:3] or get_close_matches(wanted.replace(" ", "_"), TERMS, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise WanError(f"Unknown term in the palette: {name!r}.{hint}")
