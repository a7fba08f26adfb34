"""Where a VAE or a text encoder runs: as much of ComfyUI's ModelPatcher as its nodes for choosing a device ask for.

Select VAE Device and Select CLIP Device (newer ComfyUI) take a clone of ``patcher`` and set its devices, or have it
"deep-cloned" for another device; the engine then loads the weights where the clone says.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


class Placement:
    """
    Args:
        load_device: where it runs.
        offload_device: where ComfyUI would keep it meanwhile; the engine keeps it in the file.
        model: a place for ComfyUI's own remarks, shared by all clones.
    """

    def __init__(
        self,
        load_device: torch.device,
        offload_device: torch.device | None = None,
        model: SimpleNamespace | None = None,
    ):
        self.load_device = load_device
        self.offload_device = offload_device or torch.device("cpu")
        self.model = model or SimpleNamespace()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The connected node asks for {name!r} of weights that the Wan engine holds: only their "
            "device can be chosen. If it cannot do without, load the file with ComfyUI's own loader."
        )

    def clone(self, *_: object, **__: object) -> Placement:
        return Placement(self.load_device, self.offload_device, self.model)

    def deepclone_multigpu(self, new_load_device: torch.device, *_: object, **__: object) -> Placement:
        """ComfyUI copies the weights for another device; ours are read for each device from their file."""
        return Placement(new_load_device, self.offload_device, SimpleNamespace(**vars(self.model)))

    def is_dynamic(self) -> bool:
        return False

    def current_loaded_device(self) -> torch.device:
        return self.load_device

    def model_size(self) -> int:
        return 0  # the engine's own entry tells ComfyUI what its weights take

    def loaded_size(self) -> int:
        return 0
