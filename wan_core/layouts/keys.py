"""Renaming of checkpoint keys as data, usable in both directions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from ..files.door import shown

MOST_BLOCKS = 512  # of one stack; the largest Wan model has 40
_NUMBER = re.compile(r"0|[1-9][0-9]{0,1000}")


class Renames:
    """A table of (their module path, our module path); ``{a}``, ``{b}``, ``{c}`` stand for numbers.

    A row renames the module itself and everything below it, so ``("blocks.{a}.attn1.to_q", "blocks.{a}.self_attn.q")``
    covers its weight, bias and whatever a quantised format hangs there. The longest matching row wins. Our own names
    are the official ones.
    """

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self.rows = tuple(rows)

    def to_own(self, key: str) -> str | None:
        """Our name of their key, or None when no row knows it."""
        return _rename(key, self._forward)

    def to_theirs(self, key: str) -> str | None:
        """Their name of our key, or None when no row knows it."""
        return _rename(key, self._backward)

    def renamed(self, key: str) -> str:
        """The same of a key that is known to have a row."""
        theirs = self.to_theirs(key)
        if theirs is None:
            raise KeyError(key)
        return theirs

    @cached_property
    def _forward(self) -> list[tuple[re.Pattern[str], str]]:
        return _compile(self.rows)

    @cached_property
    def _backward(self) -> list[tuple[re.Pattern[str], str]]:
        return _compile((own, theirs) for theirs, own in self.rows)


IDENTITY = Renames([("", "")])


def block_of(key: str, stack: str = "blocks.") -> int | None:
    """The number of the block that a key belongs to: 3 for ``blocks.3.ffn.0.weight``; None for any other key."""
    if not key.startswith(stack):
        return None
    number = key[len(stack) :].partition(".")[0]
    return int(number) if _NUMBER.fullmatch(number) else None


def count_blocks(keys: Iterable[str], stack: str = "blocks.") -> int:
    """How many blocks a stack has: their numbers are 0, 1, 2 … without a gap, however large the last one is.

    Args:
        keys: of what every block has, such as one of its matrices: other keys with a number may be left over from
            something else.

    Raises:
        ValueError: a block is missing, or there are more than any model has; says which.
    """
    there = {number for key in keys if (number := block_of(key, stack)) is not None}
    count = next(number for number in range(len(there) + 1) if number not in there)
    if beyond := sorted(there - set(range(count))):
        raise ValueError(f"{stack}{count} (the file goes on with {shown(f'{stack}{beyond[0]}')})")
    if count > MOST_BLOCKS:
        raise ValueError(f"{stack}* ({count} of them, expected at most {MOST_BLOCKS})")
    return count


def refuse_empty(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: a tensor of a model without numbers; says which.
    """
    if empty := next((key for key, shape in shapes.items() if 0 in shape), None):
        raise ValueError(f"{empty} (it has no numbers)")


def _compile(rows: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    longest_first = sorted(rows, key=lambda row: -len(row[0]))
    return [(_pattern(source), target) for source, target in longest_first]


def _pattern(template: str) -> re.Pattern[str]:
    numbered = re.sub(r"\\\{([a-z])\\\}", r"(?P<\1>[0-9]+)", re.escape(template))
    rest = r"(?P<rest>.*)" if not template else r"(?P<rest>(?:\..*)?)"
    return re.compile(numbered + rest)


def _rename(key: str, compiled: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, target in compiled:
        if match := pattern.fullmatch(key):
            numbers = match.groupdict()
            rest = numbers.pop("rest")
            return target.format(**numbers) + rest
    return None
