"""How much memory a piece of the model needs, found by running it on the meta device, where tensors have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that live at a time; only those made while this is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to guard against a compiler that is not in use, PyTorch would import it: seconds

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        old = {id(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if id(storage) not in old:  # views and results in place lie where their arguments lie
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        self._seen.pop(key, None)
        self.now -= size


def _storages(tree: object) -> list[torch.UntypedStorage]:
    leaves, _ = tree_flatten(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes that live at once of what a call makes, what it returns included.

    On the meta device only sizes are computed. Workspace inside a kernel is not seen.
    """
    with LiveBytes() as live:
        kept = call()
        del kept
    return live.peak
