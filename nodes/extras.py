"""What other nodes want from the network behind Wan as ComfyUI MODEL: let be, warned of, or refused.

ComfyUI hands a network its conditions as keyword arguments, and what patches ask for in ``transformer_options``. What
would change the picture and cannot be done here is refused; what is unknown is said on the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..wan_core.errors import WanError

OTHERWISE = "Remove that node, or load the model with ComfyUI's Load Diffusion Model."

# Arguments of ComfyUI's WanModel.forward and its relatives: what they mean, for messages.
_MEANINGS = {
    "time_dim_concat": "context frames (Phantom, Fun)", "reference_latent": "a reference image",
    "context_latents": "references in the context (Bernini)", "vace_context": "VACE", "vace_strength": "VACE",
    "camera_conditions": "camera control", "audio_embed": "audio", "control": "ControlNet",
    "pose_latents": "a pose video (Animate, SCAIL)", "face_pixel_values": "a face video (Animate)",
}  # fmt: skip
# denoise_mask has become per-frame timesteps before.
_WITHOUT_EFFECT = {"denoise_mask", "crossattn_controlnet", "latent_shapes", "attention_mask"}

# What ComfyUI's samplers, context windows and step caches tell a network beside patches.
_KNOWN_OPTIONS = {
    "cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "wrappers", "callbacks", "context_window", "easycache",
    "prefetch_dynamic_vbars", "multigpu_thread_device", "multigpu_thread_pool", "total_blocks", "block_type",
    "block_index", "grid_sizes", "original_shape", "activations_shape", "transformer_index",
}  # fmt: skip
_KERNELS = ("sage", "flash", "xformers", "sdpa", "pytorch", "sub_quad", "split", "basic")
_NOT_ONLY_KERNELS = ("sparse", "sparge", "radial", "nag", "sla", "window", "block", "bsa", "jenga", "topk", "mask")


def refuse_conditions(extras: Mapping[str, object]) -> None:
    """
    Raises:
        WanError: conditions that this network does not have.
    """
    asked = [key for key, value in extras.items() if value is not None and key not in _WITHOUT_EFFECT]
    if asked:
        meanings = dict.fromkeys(_MEANINGS.get(key, key) for key in asked)
        raise WanError(
            f"This Wan model does not understand {' or '.join(meanings)}: use the model that the "
            "conditioning node was made for."
        )


def refuse_patches(options: Mapping[str, Any]) -> None:
    """What nodes want done inside ComfyUI's own network.

    Raises:
        WanError: it would change the result.
    """
    replaced = [name for keyed in (options.get("patches_replace") or {}).values() for name in keyed]
    patches = [name for name, each in (options.get("patches") or {}).items() if each]
    override = options.get("optimized_attention_override")
    changed = override is not None and not _is_kernel(override)
    found = [
        ("blocks (skip-layer guidance)", replaced),
        ("attention layers", patches),
        ("positions (ScaleROPE)", options.get("rope_options")),
        (f"how attention is computed ({_name_of(override)})", changed),
    ]
    named = [meaning for meaning, asked in found if asked]
    if named:
        raise WanError(
            f"A node changes {' and '.join(named)} of ComfyUI's own Wan network, but Wan as ComfyUI MODEL "
            f"runs another. {OTHERWISE}"
        )


def unheard(options: Mapping[str, object]) -> Iterator[str]:
    """Warnings of what a node asks for in vain."""
    override = options.get("optimized_attention_override")
    if override is not None:
        yield (
            f"Warning: a node wants attention computed by {_name_of(override)}, which Wan as ComfyUI MODEL does not "
            "use: choose the kernel in Load Wan Model (attention)."
        )
    known = _KNOWN_OPTIONS | {"patches", "patches_replace", "rope_options", "optimized_attention_override"}
    for key, value in options.items():
        if key not in known and value is not None and value is not False:
            yield (
                f"Warning: a node tells ComfyUI's own Wan network {key}, which Wan as ComfyUI MODEL does not know: "
                "that node may have no effect."
            )


def _is_kernel(override: Callable) -> bool:
    """Whether attention is only computed by other means, by all that can be seen: the names of the functions."""
    names = " ".join(_names(override)).lower()
    return any(word in names for word in _KERNELS) and not any(word in names for word in _NOT_ONLY_KERNELS)


def _name_of(override: object) -> str:
    return next(iter(_names(override)), type(override).__name__)


def _names(override: object) -> Iterator[str]:
    """Names of a function and of those that it holds: ComfyUI wraps the kernel it was given."""
    while hasattr(override, "func"):  # functools.partial
        override = override.func
    held = [cell.cell_contents for cell in getattr(override, "__closure__", None) or () if callable(_held(cell))]
    for function in (*held, override):
        if name := getattr(function, "__name__", None):
            yield name


def _held(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None
