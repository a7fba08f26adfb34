"""Renaming of checkpoint keys as data, usable in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property


class Renames:
    """A table of (their module path, our module path); ``{a}``, ``{b}``, ``{c}`` stand for numbers.

    A row renames the module itself and everything below it, so ``("blocks.{a}.attn1.to_q", "blocks.{a}.self_attn.q")``
    covers its weight, bias and whatever a quantised format hangs there. The longest matching row wins. Our own names
    are the official ones.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]):
        self.rows = tuple(rows)

    def to_own(self, key: str) -> str | None:
        """Our name of their key, or None when no row knows it."""
        return _rename(key, self._forward)

    def to_theirs(self, key: str) -> str | None:
        """Their name of our key, or None when no row knows it."""
        return _rename(key, self._backward)

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern, str]]:
        return _compile(self.rows)

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern, str]]:
        return _compile((own, theirs) for theirs, own in self.rows)


IDENTITY = Renames([("", "")])


def _compile(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    longest_first = sorted(rows, key=lambda row: -len(row[0]))
    return [(_pattern(source), target) for source, target in longest_first]


def _pattern(template: str) -> re.Pattern:
    numbered = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>\\d+)", re.escape(template))
    rest = r"(?P<rest>.*)" if not template else r"(?P<rest>(?:\..*)?)"
    return re.compile(numbered + rest)


def _rename(key: str, compiled: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, target in compiled:
        if match := pattern.fullmatch(key):
            numbers = match.groupdict()
            rest = numbers.pop("rest")
            return target.format(**numbers) + rest
    return None
