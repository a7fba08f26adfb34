"""Wan2.2 video models in plain PyTorch; works without ComfyUI.

The loaders below are the stable public surface. They are imported when first used, so that importing the
package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading.clip import load_clip_vision
    from .loading.dit import load_dit
    from .loading.text import load_text_encoder
    from .loading.vae import load_vae

__version__ = "0.1.0"
__all__ = ["load_clip_vision", "load_dit", "load_text_encoder", "load_vae"]

_HOMES = {
    "load_clip_vision": ".loading.clip",
    "load_dit": ".loading.dit",
    "load_vae": ".loading.vae",
    "load_text_encoder": ".loading.text",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
