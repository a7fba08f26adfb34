"""A transformer that another program holds and runs: the seam through which ComfyUI's own MODELs come into a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from .config import Architecture
from .errors import Hint, WanError
from .sampling.experts import Model


@dataclass(frozen=True, eq=False)
class ExternalModel:
    """Stands in a recipe where a checkpoint would: the engine neither reads, nor moves, nor changes its weights.

    Attributes:
        name: what its host calls it, usually a file's name.
        dtype: of the computation.
        fingerprint: equal for the same weights with the same changes.
        connect: a device -> the network as ``denoise`` calls it. Called once for a run; nothing is loaded before the
            network's own first call.
        host: who holds it, for messages.
    """

    name: str
    config: Architecture
    dtype: torch.dtype
    fingerprint: tuple
    connect: Callable[[torch.device], Model]
    host: str = "another program"

    @property
    def path(self) -> Path:
        return Path(self.name)


def only_own(files: Iterable[object], what: str, hint: Hint | None = None) -> None:
    """Refuse what can be done to weights of the engine's own only.

    Args:
        what: needs them.
        hint: what the user can do.

    Raises:
        WanError: one of a recipe's files is held elsewhere.
    """
    held = [file for file in files if isinstance(file, ExternalModel)]
    if held:
        names = " and ".join(file.name for file in held)
        raise WanError(f"{what} needs weights that lie here, but {held[0].host} holds {names}.", hint)
