"""CONDITIONING, as ComfyUI's nodes write it, turned into what the model is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from ..wan_core.config import Variant
from ..wan_core.errors import WanError
from ..wan_core.models.dit.features.clip_tokens import ClipTokens, ClipTokensConfig, check_features
from ..wan_core.recipe import ModelRecipe
from ..wan_core.sampling import raw
from ..wan_core.sampling.denoise import Run
from ..wan_core.sampling.guidance import Condition, Entry, Side, entries, sigma_at, silent
from . import keys
from .clip_vision import tokens_of

IMAGE_CHANNELS = 16  # of the given frames' latent, beside the four of their mask


def side(
    conditioning: list,
    name: str,
    model: ModelRecipe,
    shape: torch.Size,
    device: torch.device,
    shift: float,
    warn: Callable[[str], None],
) -> Side:
    """One side of the guidance: a condition, or several with ranges and weights.

    Args:
        conditioning: [[embedding [B,L,D], dict], ...], from ComfyUI's nodes or ours.
        name: "positive" or "negative", for messages.
        shape: of the latent to be sampled, [B,C,T,h,w].
        shift: by which percentages become noise levels.
        warn: told of keys that have no effect.

    Raises:
        WanError: an embedding of another width, or keys that ask for another model.
    """
    whole = [_condition(text, options, name, model, shape, device, warn) for text, options in conditioning]
    if len(whole) == 1 and not keys.ranged(conditioning[0][1]):
        return whole[0]
    both = zip(whole, (options for _, options in conditioning), strict=True)
    return tuple(_entry(condition, options, shape, shift) for condition, options in both)


def _entry(condition: Condition, options: Mapping[str, Any], shape: torch.Size, shift: float) -> Entry:
    start = max(options.get("start_percent", 0.0), options.get("clip_start_percent", 0.0))
    end = min(options.get("end_percent", 1.0), options.get("clip_end_percent", 1.0))
    weight, mask = options.get("strength", 1.0), options.get("mask")
    if mask is not None:
        weight = raw.entry_weight(mask, options.get("mask_strength", 1.0) * weight, shape)
    return Entry(condition, sigma_at(start, shift), sigma_at(end, shift), weight, rest="default" in options)


def warn_of_gaps(sides: Mapping[str, Side], run: Run, warn: Callable[[str], None]) -> None:
    """Say at which steps a side of the guidance has no prompt."""
    sigmas = run.schedule.sigmas[:-1].tolist()
    for name, one in sides.items():
        bare = [i + 1 for i in silent(one, sigmas) if run.start <= i < run.last]
        if bare:
            warn(
                f"Warning: at step {', '.join(map(str, bare))} no {name} prompt applies: as in ComfyUI's samplers the "
                "model is not asked for it there. Let the ranges of Conditioning (Timestep Range) meet."
            )


def conditions_of(side: Side) -> list[Condition]:
    return [entry.condition for entry in entries(side)]


def _condition(
    text: torch.Tensor,
    options: dict,
    name: str,
    model: ModelRecipe,
    shape: torch.Size,
    device: torch.device,
    warn: Callable[[str], None],
) -> Condition:
    _check_text(text, name, model, batch=shape[0])
    _check_keys(options, name, model.variant, warn)
    tokens = _clip_tokens(options, name, model, shape[0], warn)
    if model.variant.image != "channels":
        return Condition(text, tokens)
    image = _given_image(options, name, model.variant, shape).to(device)
    channels = raw.given_channels(image, options.get("concat_mask"), shape, model.variant.vae)
    return Condition(text, (channels, *tokens))


def _clip_tokens(
    options: Mapping[str, object], name: str, model: ModelRecipe, batch: int, warn: Callable[[str], None]
) -> tuple[ClipTokens, ...]:
    """What CLIP saw, of models that hear it; what is of no use is said."""
    seen = options.get("clip_vision_output")
    if seen is None:
        return ()
    if not model.variant.clip:
        warn(without_effect("clip_vision_output", name, model.variant))
        return ()
    tokens = clip_tokens(seen, name, model)
    if len(tokens) not in (1, batch):
        warn(
            f"Warning: CLIP saw {len(tokens)} pictures for the {name} conditioning, but there "
            f"{'is 1 video' if batch == 1 else f'are {batch} videos'}: the first picture is used."
        )
        tokens = tokens[:1]
    return (ClipTokens(tokens),)


def clip_tokens(seen: object, name: str, model: ModelRecipe) -> torch.Tensor:
    """The CLIP tokens [B,N,1280] that a conditioning carries.

    Raises:
        WanError: there are none, or not what the model takes.
    """
    tokens = tokens_of(seen, f"the {name} conditioning")
    check_features(tokens, cast(ClipTokensConfig, model.high.config.feature(ClipTokensConfig)))
    return tokens


def without_clip(names: Sequence[str], variant: Variant) -> str:
    """The warning that these sides of the guidance carry no CLIP tokens."""
    carry = "carries" if len(names) == 1 else "carry"
    sides = " and the ".join(names)
    return (
        f"Warning: the {sides} conditioning {carry} no CLIP tokens, which {variant.display_name} was trained "
        "with: those of an empty picture are used. Connect clip_vision of Wan Image to Video."
    )


def _given_image(options: dict, name: str, variant: Variant, shape: torch.Size) -> torch.Tensor:
    """The raw latent of the given frames, [N,16,T,h,w].

    Raises:
        WanError: there is none, or one of another length or VAE.
    """
    image = options.get("concat_latent_image")
    if image is None:
        raise WanError(
            f"{variant.display_name} animates an image, but the {name} conditioning carries none. Put Wan "
            "Image to Video (or ComfyUI's WanImageToVideo) between the prompts and the sampler, or load a "
            "T2V model."
        )
    if image.ndim != 5 or image.shape[1] != IMAGE_CHANNELS or image.shape[2] != shape[2]:
        raise WanError(
            f"The image latent in the {name} conditioning has shape {list(image.shape)}; "
            f"{variant.display_name} expects [1, {IMAGE_CHANNELS}, {shape[2]}, {shape[3]}, {shape[4]}] for "
            "this latent. Use the same number of frames in both, and the Wan2.1 VAE."
        )
    return image


def _check_text(text: torch.Tensor, name: str, model: ModelRecipe, batch: int) -> None:
    width = model.high.config.text_dim
    if text.ndim != 3 or text.shape[-1] != width:
        raise WanError(
            f"The {name} prompt was encoded {text.shape[-1]} wide, but {model} takes {width}: another "
            "text encoder made it. Use Load Wan Text Encoder with umT5-XXL "
            "(umt5_xxl_fp8_e4m3fn_scaled.safetensors), or ComfyUI's CLIPLoader with type wan."
        )
    if len(text) not in (1, batch):
        raise WanError(
            f"The {name} conditioning holds a batch of {len(text)} prompts for {batch} latents: expected 1 or {batch}."
        )


def _check_keys(options: dict, name: str, variant: Variant, warn: Callable[[str], None]) -> None:
    check_model_keys(options, name, variant)
    for key in keys.asking(options):
        if key in keys.SAMPLERS_OWN:
            raise WanError(
                f"The {name} conditioning uses {keys.SAMPLERS_OWN[key]} ({key}), which Wan Sampler does not "
                "do. Remove the node that adds it."
            )
        warn(without_effect(key, name, variant))
    if "concat_latent_image" in options and variant.image != "channels":
        raise WanError(
            f"The {name} conditioning carries an image for an I2V model, but {variant.display_name} "
            f"{_INSTEAD[variant.image]}"
        )


def check_model_keys(options: Mapping[str, object], name: str, variant: Variant) -> None:
    """
    Raises:
        WanError: a key that only another model understands.
    """
    for key in keys.asking(options):
        if key in keys.NEEDS_MODEL:
            raise WanError(
                f"The {name} conditioning carries {key}, which needs {keys.NEEDS_MODEL[key]}; this is "
                f"{variant.display_name}. Remove the node that adds it."
            )


def without_effect(key: str, name: str, variant: Variant) -> str:
    """The warning that a key changes nothing."""
    return (
        f"Warning: the {name} conditioning carries {key}, which {variant.display_name} does not use: the node that "
        "adds it has no effect."
    )


_INSTEAD = {
    "none": "takes none. Load wan2.2_i2v_high_noise_14B and wan2.2_i2v_low_noise_14B, or leave the image out.",
    "frame": "takes it as the first latent frame. Use Wan Image to Video, or ComfyUI's Wan22ImageToVideoLatent.",
}
