"""What every reader of foreign files shares: limits, JSON within limits, and names that are fit to be shown.

What a file says of itself is believed only as far as the file could hold it. A message names tensors and files, with
what a terminal would act on escaped; it never repeats a file's other content, which may be another file's secret.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import WanError

HEADER_LIMIT = 64 * 1024**2  # bytes; real headers have some hundred thousand
MOST_TENSORS = 30_000  # of one file; the largest Wan model has 1,300, and training states some ten thousand
LONGEST_NAME = 8192  # characters of a tensor's name
MOST_DIMENSIONS = 16
_MOST_MARKS = 1_500_000  # brackets and commas of a JSON text: what it may cost to hold it parsed
_SHOWN = 300  # characters of a name in a message
_UNFIT = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # categories of Unicode that are escaped


class Damage(ValueError):
    """What is wrong with a file, in words of ours; becomes a ``WanError`` with the file's name."""


def damaged(file: Path, problem: object) -> WanError:
    return WanError(f"{shown(file)} is truncated or corrupt ({problem}). Download it again.")


def shown(name: object) -> str:
    """A path or a foreign name for a message: on one line, without control characters, not too long."""
    text = str(name)
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} … {text[-_SHOWN // 2 :]}"
    return "".join(_escaped(letter) if unicodedata.category(letter) in _UNFIT else letter for letter in text)


def some(names: Iterable[str], limit: int = 5) -> str:
    """The first of these names, fit for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + more


def _escaped(letter: str) -> str:
    return ascii(letter)[1:-1]


def check_name(name: object) -> str:
    """A tensor's name.

    Raises:
        Damage: no text, too long, or with control characters or halves of surrogate pairs.
    """
    if not isinstance(name, str):
        raise Damage(f"a tensor's name is a {type(name).__name__}, expected a text")
    if len(name) > LONGEST_NAME:
        raise Damage(f"a tensor's name has {len(name)} characters, expected at most {LONGEST_NAME}")
    if not name.isprintable() and any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
        raise Damage(f"a tensor's name has control characters: {shown(name)}")
    return name


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """
    Raises:
        Damage: not a list of sizes.
    """
    if not isinstance(shape, (list, tuple)) or len(shape) > MOST_DIMENSIONS or not all(is_count(n) for n in shape):
        raise Damage(f"the shape of {shown(name)} is no list of up to {MOST_DIMENSIONS} sizes")
    if math.prod(max(n, 1) for n in shape) >= 1 << 59:  # a size of 0 would hide the others, which nothing can hold
        raise Damage(f"the shape of {shown(name)} has sizes that no machine holds")
    return tuple(shape)


def is_count(number: object) -> bool:
    """Whether this can be a size or a place: an integer, not negative, of 63 bits."""
    return type(number) is int and 0 <= number < 1 << 63


def read_json(text: bytes) -> Any:
    """JSON in UTF-8, -16 or -32, with a byte order mark or without, as strict as the standard.

    Raises:
        Damage: none, or too much of it.
    """
    if len(text) > HEADER_LIMIT:
        raise Damage(f"a header of {len(text)} bytes, expected at most {HEADER_LIMIT}")
    if sum(map(text.count, (b"{", b"[", b","))) > _MOST_MARKS:
        raise Damage("a header with millions of entries")
    try:
        return json.loads(text, object_pairs_hook=_without_repetition, parse_constant=_refuse_constant)
    except RecursionError:
        raise Damage("its JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise Damage("its header is no UTF-8") from None
    except Damage:
        raise
    except json.JSONDecodeError as error:
        raise Damage(f"its header is no JSON from byte {error.pos} on") from None
    except ValueError:
        raise Damage("its header has numbers of thousands of digits") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise Damage(f"its header has {shown(twice)} twice")
    return found


def _refuse_constant(name: str) -> None:
    raise Damage(f"its header has {name.lstrip('-')} where a number belongs")
