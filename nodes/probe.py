"""Whether this ComfyUI has what a node relies on: asked before it is used, so that a fault of ours is no "version"."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ..wan_core.errors import WanError


def need(node: str, names: Mapping[str, Iterable[str]], accepts: Mapping[str, Iterable[str]], instead: str) -> None:
    """
    Args:
        node: by its display name.
        names: module -> dotted names in it.
        accepts: "module:name" of something that is called -> keyword arguments it must take.
        instead: the node to use.

    Raises:
        WanError: something is missing, with its name.
    """
    lacking = [f"{module}.{name}" for module, each in names.items() for name in each if not _has(module, name)]
    lacking += [
        f"{called}({word}=...)"
        for called, words in accepts.items()
        if not lacking
        for word in words
        if not _takes(called, word)
    ]
    if lacking:
        raise unknown_version(node, lacking, instead)


def need_attributes(node: str, found: Any, names: Iterable[str], instead: str) -> None:
    """``need``, of an object that another node made."""
    lacking = [f"{type(found).__name__}.{name}" for name in names if not hasattr(found, name)]
    if lacking:
        raise unknown_version(node, lacking, instead)


def unknown_version(node: str, lacking: Iterable[str], instead: str) -> WanError:
    return WanError(
        f"{node} does not know this version of ComfyUI (it has no {', '.join(lacking)}). Use {instead}, or "
        "the ComfyUI version that the README names."
    )


def _has(module: str, name: str) -> bool:
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def _takes(called: str, word: str) -> bool:
    module, _, name = called.partition(":")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return word in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
