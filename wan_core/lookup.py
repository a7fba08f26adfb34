"""Names that a user chooses, looked up in a registry."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from .errors import WanError

Entry = TypeVar("Entry")


def look_up(registry: Mapping[str, Entry], name: str, what: str) -> Entry:
    """The entry of that name.

    Raises:
        WanError: no such name; it lists those there are and points at the nearest.
    """
    if name in registry:
        return registry[name]
    near = get_close_matches(str(name).lower(), registry, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise WanError(f"Unknown {what} {name!r}: expected one of {', '.join(registry)}.{hint}")
