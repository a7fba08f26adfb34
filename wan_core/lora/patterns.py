"""Numbers for modules by name, as PEFT's ``alpha_pattern`` and ``rank_pattern`` state them.

PEFT takes the first pattern, in their order, that matches a module's whole name or its end from a dot on. Nearly all
are plain names, which are looked up. The rest are regular expressions from somebody's file: only those that cannot
take long are compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

_PLAIN = re.compile(r"\^?(?:[\w-]|\.|\\\.)+\$?")
_PIECE = re.compile(
    r"(?P<group>\((?:\?:)?[\w.|\\-]*\))"  # a choice of names
    r"|(?P<one>\\[.dw-]|\[[\w^-]{1,40}\]|[\w.^$|-])(?P<many>[+*?]?)"
)
_LONGEST = 300
_COST = 64  # of a repetition: about the length of a module's name
_COST_OF_ALL = _COST**3


class Patterns(Mapping):
    """Pattern -> number, without those that are no names and too dear to try."""

    def __init__(self, numbers: Mapping[str, float] | None = None) -> None:
        self._numbers: dict[str, float] = {}
        self._names: dict[str, int] = {}  # a plain name -> its place among the patterns
        self._expressions: list[tuple[int, re.Pattern]] = []
        budget = _COST_OF_ALL
        for place, (pattern, number) in enumerate((numbers or {}).items()):
            if _PLAIN.fullmatch(pattern) and len(pattern) <= _LONGEST:
                self._names.setdefault(pattern.removesuffix("$").replace("\\.", "."), place)
            elif (cost := _cost(pattern)) and cost <= budget:
                budget -= cost
                self._expressions.append((place, re.compile(rf"(.*\.)?({pattern})$")))
            else:
                continue
            self._numbers[pattern] = number
        self._order = list(numbers or {})

    def find(self, names: Sequence[str], otherwise: float | None) -> float | None:
        """The number of the first pattern that matches any of a module's names."""
        places = [place for name in names if (place := self._place(name)) is not None]
        return self._numbers[self._order[min(places)]] if places else otherwise

    def _place(self, name: str) -> int | None:
        parts = name.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        places = [self._names[end] for end in (*ends, f"^{name}") if end in self._names]
        places += [place for place, expression in self._expressions if expression.match(name)]
        return min(places, default=None)

    def __getitem__(self, pattern: str) -> float:
        return self._numbers[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def _cost(pattern: str) -> int | None:
    """About how many ways of matching there are; None for what is no such expression."""
    if len(pattern) > _LONGEST:
        return None
    cost, place = 1, 0
    while place < len(pattern):
        piece = _PIECE.match(pattern, place)
        if piece is None:
            return None
        place = piece.end()
        if pattern[place : place + 1] in tuple("+*?{"):
            return None  # a repeated choice, or a repetition of a repetition
        if piece["group"]:
            cost *= 1 + piece["group"].count("|")
        elif piece["one"] == "|":
            cost += 1
        elif piece["many"]:
            cost *= 2 if piece["many"] == "?" else _COST
        if cost > _COST_OF_ALL:
            return None
    try:
        re.compile(pattern)
    except re.error:
        return None
    return cost
