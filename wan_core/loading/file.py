"""A model's file whose header has been read and understood; its weights have not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ..files.checkpoint import Checkpoint, open_checkpoint

log = logging.getLogger(__name__)

Config = TypeVar("Config")
Understood = tuple[Config, dict[str, str], tuple[str, ...]]  # dimensions, our key -> the file's, notes


@dataclass(frozen=True, eq=False)
class ModelFile(Generic[Config]):
    """
    Attributes:
        checkpoint: with the model's own tensors only.
        names: our key -> the checkpoint's key.
        config: dimensions of the model.
        fingerprint: of the files when the header was read.
        notes: what the user should know of how the file was understood.
    """

    checkpoint: Checkpoint
    names: dict[str, str]
    config: Config
    fingerprint: tuple
    notes: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        return self.checkpoint.path


def read_file(path: str | Path, understand: Callable[[Checkpoint], Understood]) -> ModelFile:
    """Read a header: milliseconds for safetensors.

    Args:
        understand: what makes a model of a checkpoint's keys and shapes.

    Raises:
        WanError: not there, damaged, or see ``understand``.
    """
    checkpoint = open_checkpoint(path)
    config, names, notes = understand(checkpoint)
    for note in notes:
        log.warning("wan_core: %s", note)
    checkpoint = checkpoint.only(names.values())
    return ModelFile(checkpoint, names, config, checkpoint.fingerprint, notes)
