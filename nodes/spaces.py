"""Whether a LATENT, which is in the VAE's raw space, and a VAE of ComfyUI fit a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..wan_core.config import VAES, Variant
from ..wan_core.errors import WanError
from ..wan_core.layouts import comfyui


def samples_for(latent: Mapping, variant: Variant) -> torch.Tensor:
    """The raw samples [B,C,T,h,w] of a LATENT that fits the model.

    Raises:
        WanError: an image latent, or one of another VAE; it says which node makes the right one.
    """
    samples, spec = latent["samples"], VAES[variant.vae]
    if samples.ndim == 5 and samples.shape[1] == spec.channels:
        return samples
    raise WanError(
        f"The latent has shape {list(samples.shape)}, but {variant.display_name} works on "
        f"[batch, {spec.channels}, frames, height / {spec.spatial_stride}, width / {spec.spatial_stride}]"
        f"{_whose(samples)}. Use {_MAKERS[spec.channels]}; encode videos with "
        f"{comfyui.VAES[spec.kind]}."
    )


def check_numbers(samples: torch.Tensor) -> None:
    """
    Raises:
        WanError: a latent without values, or with some that are not numbers: so would be the whole video.
    """
    if not samples.numel() or not torch.isfinite(samples).all():
        raise WanError(
            f"The latent of shape {list(samples.shape)} is no video: it is empty or holds values that are "
            "not numbers (NaN), which the node before it made."
        )


_MAKERS = {
    16: "Wan Empty Latent, or ComfyUI's EmptyHunyuanLatentVideo",
    48: "Wan Empty Latent, or ComfyUI's Wan22ImageToVideoLatent",
}


def _whose(samples: torch.Tensor) -> str:
    if samples.ndim == 4:
        return ": this is the latent of an image"
    owner = next((spec.kind for spec in VAES.values() if samples.shape[1] == spec.channels), None)
    return f": this is a latent of the {owner} VAE" if owner else ""


def check_vae(vae: object, variant: Variant) -> None:
    """Refuse a VAE of the other kind by its number of latent channels.

    Raises:
        WanError: it names the file to use.
    """
    channels, spec = getattr(vae, "latent_channels", None), VAES[variant.vae]
    if channels not in (None, spec.channels):
        raise wrong_vae(f"This VAE makes latents of {channels} channels", variant)


def wrong_vae(found: str, variant: Variant) -> WanError:
    spec = VAES[variant.vae]
    return WanError(
        f"{found}, but {variant.display_name} works in the {spec.channels} channels of the {spec.kind} "
        f"VAE. Load {comfyui.VAES[spec.kind]} (the official {spec.checkpoint})."
    )
