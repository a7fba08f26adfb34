"""Types of the command line's arguments: whatever is typed becomes a value that can be, or is answered in words."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..errors import WanError

SEEDS = 2**64  # PyTorch's generators take no more
COUNTS = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """Tells mistakes as all other mistakes are told."""

    def error(self, message: str) -> NoReturn:
        """
        Raises:
            WanError: always.
        """
        raise WanError(f"{message[:1].upper()}{message[1:]}. `{self.prog} --help` lists what there is.")


def whole(least: int = 0, most: int = COUNTS) -> Callable[[str], int]:
    """Whole numbers of a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _wrong(f"a whole number from {least} to {most}", text) from None
        if not least <= value <= most:
            raise _wrong(f"a whole number from {least} to {most}", text)
        return value

    return parse


def number(least: float = -1e6, most: float = 1e6, *, above: float | None = None) -> Callable[[str], float]:
    """Numbers of a range; never infinite, never NaN. ``above``: the end that is not in it."""
    low = f"above {above:g}" if above is not None else f"from {least:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _wrong(f"a number {low} to {most:g}", text) from None
        if not (math.isfinite(value) and least <= value <= most) or above is not None and value <= above:
            raise _wrong(f"a number {low} to {most:g}", text)
        return value

    return parse


def path(text: str) -> Path:
    """The name of a file or folder, which need not be there."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected the name of a file or folder, found nothing")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise _wrong("a name that this system can write", text) from None
    if "\0" in text:
        raise _wrong("a name without the character NUL", text)
    return Path(text)


def words(text: str) -> str:
    """Text for a model: any that UTF-8 can write."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong("text in UTF-8", text) from None
    return text


def boolean(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise _wrong("True or False", text)


def size(text: str) -> tuple[int, int]:
    """``1280*720``, also with an x, a multiplication sign or a comma between."""
    sides = text.lower()
    for sign in "x×·,":
        sides = sides.replace(sign, "*")
    try:
        width, height = (int(part) for part in sides.split("*"))
    except ValueError:
        raise _wrong("width*height such as 1280*720", text) from None
    if min(width, height) < 1 or max(width, height) > COUNTS:
        raise _wrong("width*height of 1 pixel or more each, such as 1280*720", text)
    return width, height


def _wrong(expected: str, found: str) -> argparse.ArgumentTypeError:
    shown = found if len(found) <= 80 else found[:77] + "..."
    return argparse.ArgumentTypeError(f"expected {expected}, found {shown!r}")
