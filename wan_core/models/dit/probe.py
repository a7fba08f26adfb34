"""Where numbers stop being numbers: asked once, when a model's answer is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn


class NotFinite(Exception):
    """The first part of a model that made NaN or infinity; ends the call."""

    def __init__(self, where: str):
        super().__init__(where)
        self.where = where


@contextmanager
def watched(model: nn.Module) -> Iterator[None]:
    """The time in which a call of the model ends at the first part whose answer is not finite. The device is waited
    for at each part.

    Raises:
        NotFinite: named as the part's weights are ("blocks.3.ffn.2"), attention by what holds it
            ("blocks.3.self_attn").
    """
    with ExitStack() as hooks:
        for path, part in model.named_modules():
            if path:
                hooks.callback(part.register_forward_pre_hook(partial(_taken, path)).remove)
                hooks.callback(part.register_forward_hook(partial(_made, path)).remove)
        yield


def _taken(path: str, part: nn.Module, given: tuple) -> None:
    if given and not _is_finite(given[0]):
        holder, _, name = path.rpartition(".")
        raise NotFinite(holder if name == "o" else f"what goes into {path}")


def _made(path: str, part: nn.Module, given: tuple, answer: object) -> None:
    if not _is_finite(answer):
        raise NotFinite(path)


def _is_finite(value: object) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())
