"""What a file is, from its keys alone, so that a wrong choice is named at once."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType
from typing import Literal

from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some
from . import clip, dit, text, vae

Part = Literal["dit", "vae", "text", "clip"]

_PARTS: dict[Part, ModuleType] = {"dit": dit, "vae": vae, "text": text, "clip": clip}
_NAMES: dict[Part, str] = {"dit": "a Wan diffusion model", "vae": "a Wan VAE", "text": "a umT5 text encoder",
                          "clip": "a CLIP vision encoder"}
_ARCHITECTURE = "general.architecture"  # what a GGUF file says of itself
_ARCHITECTURES: dict[Part, tuple[str, ...]] = {"dit": ("wan",), "text": ("t5encoder", "t5"), "vae": (), "clip": ()}
_ANY_ARCHITECTURE = ("pig", "cow")  # what one converter writes for every model
_FOLDERS: dict[Part, str] = {"dit": "Load Wan Model", "vae": "Load Wan VAE", "text": "Load Wan Text Encoder",
                            "clip": "Load Wan CLIP Vision"}


def expect(part: Part, checkpoint: Checkpoint) -> str:
    """The dialect in which a checkpoint holds this part.

    Raises:
        WanError: it holds another part (named, with the loader to use), a LoRA, or unknown keys.
    """
    dialect = _PARTS[part].recognise(checkpoint.tensors.keys())
    if dialect is None or not _fits_architecture(part, checkpoint):
        raise WanError(f"{checkpoint.path} is not {_NAMES[part]}: {_what_it_is(checkpoint)}")
    return dialect


def part_of(checkpoint: Checkpoint) -> Part:
    """Which part of a model a checkpoint holds.

    Raises:
        WanError: none that is known.
    """
    for part, module in _PARTS.items():
        if _fits_architecture(part, checkpoint) and module.recognise(checkpoint.tensors.keys()):
            return part
    raise WanError(f"{checkpoint.path} is no part of a Wan model: {_what_it_is(checkpoint)}")


def _what_it_is(checkpoint: Checkpoint) -> str:
    keys = checkpoint.tensors.keys()
    for part, module in _PARTS.items():
        if _fits_architecture(part, checkpoint) and module.recognise(keys):
            return f"it is {_NAMES[part]}. Load it with {_FOLDERS[part]}."
    if _is_lora(keys):
        return "it is a LoRA. Choose the base model here."
    if stated := checkpoint.metadata.get(_ARCHITECTURE):
        expected = " or ".join(name for names in _ARCHITECTURES.values() for name in names)
        return f"it is a GGUF file of the architecture {stated!r}; expected {expected}."
    return f"none of the known layouts has its keys ({_some(keys, 3) or 'it holds no tensors'})."


def _fits_architecture(part: Part, checkpoint: Checkpoint) -> bool:
    stated = checkpoint.metadata.get(_ARCHITECTURE)
    return stated is None or stated in (*_ARCHITECTURES[part], *_ANY_ARCHITECTURE)


def _is_lora(keys: Collection[str]) -> bool:
    return any(".lora_" in key or key.startswith("lora_") for key in keys)
