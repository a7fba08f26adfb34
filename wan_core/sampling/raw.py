"""Latents and masks as other programs keep them, and what becomes of them in a run.

The conventions are ComfyUI's: latents are raw (not normalised), all zeros mean an empty one; a ``noise_mask`` is 1
where is denoised; a ``concat_mask`` is 0 where a frame is given; a latent that is still noisy is kept divided by
1 - sigma. Everything returned is normalised unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..config import VAEKind, Variant
from ..errors import WanError
from ..media.geometry import given_mask, noise
from ..models.dit.inputs import Concat
from ..models.vae.vae import denormalise, normalise
from .denoise import KnownLatent, noised
from .schedules import Schedule

MASK_CHANNELS = 4  # of a given frame's mask: one for each pixel frame of a latent frame


def from_raw(raw: Tensor, kind: VAEKind) -> Tensor:
    """Raw [B,C,T,h,w] -> normalised, float32; an empty latent stays empty."""
    return normalise(raw, kind) if raw.any() else raw.float()


def stored(x: Tensor, schedule: Schedule, end: int, kind: VAEKind) -> Tensor:
    """The sample after step ``end`` as a raw latent; what is still noisy is divided by its share of the data.

    Hence a run may be begun here and ended by another program's sampler, or the other way round.
    """
    sigma = schedule.sigmas[min(end, schedule.steps)].item()
    return denormalise(x / (1 - sigma) if sigma < 1 else x, kind)


def first_sample(
    clean: Tensor, noise: Tensor, schedule: Schedule, start: int, *, add_noise: bool, pure: bool
) -> Tensor:
    """The sample at the noise level of the start step.

    Args:
        clean: of ``from_raw``; where ``add_noise`` is off, what an earlier run ``stored``.
        noise: of the whole run.
        pure: whether the run begins with noise alone, whatever the first sigma is, as the official code does; the
            schedule may scale it.
    """
    if pure:
        return schedule.first(noise) if add_noise else clean
    sigma = schedule.sigmas[min(start, schedule.steps - 1)].item()
    if add_noise:
        return noised(clean, noise, sigma)
    return clean * (1 - sigma) if sigma < 1 else clean


def noise_of(seed: int, places: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Noise [B,C,T,h,w] of the videos at these places of a seed's batch; ``shape`` is [C,T,h,w]."""
    return noise(seed, (max(places) + 1, *shape))[list(places)]


def kept(mask: Tensor | None, clean: Tensor, noise: Tensor, variant: Variant) -> KnownLatent | None:
    """What a ``noise_mask`` keeps of a clean latent."""
    if mask is None:
        return None
    return KnownLatent(clean, fitted_mask(mask, clean), noise, clean=variant.image == "frame")


def free_content(clean: Tensor, mask: Tensor | None) -> float:
    """The largest value of a latent where it is denoised."""
    return (clean if mask is None else clean * fitted_mask(mask, clean)).abs().max().item()


def fitted_mask(mask: Tensor, like: Tensor) -> Tensor:
    """A mask of three to five dimensions, resized trilinearly to a latent [B,C,T,h,w] of its dtype and device."""
    mask = mask.float()
    mask = mask if mask.ndim == 5 else mask.reshape(1, 1, -1, *mask.shape[-2:])
    mask = functional.interpolate(mask, size=like.shape[2:], mode="trilinear")
    channels = like.shape[1]
    if mask.shape[1] < channels:
        mask = mask.repeat(1, channels, 1, 1, 1)[:, :channels]
    copies = math.ceil(len(like) / len(mask))
    return mask.repeat(copies, 1, 1, 1, 1)[: len(like)].to(like)


def entry_weight(mask: Tensor, strength: float, shape: Sequence[int]) -> Tensor:
    """The weight of a conditioning's entry from its mask: [1 or B,1,1 or T,h,w].

    Args:
        mask: [H,W], or [N,H,W] of one frame or each latent frame.
        shape: of the latent to be sampled, [B,C,T,h,w].

    Raises:
        WanError: a mask of another number of frames.
    """
    frames, height, width = shape[2:]
    mask = mask.float().reshape(-1, *mask.shape[-2:])
    if len(mask) not in (1, frames):
        raise WanError(f"A mask has {len(mask)} frames: expected 1, or {frames} as the latent has.")
    mask = mask[None]
    if mask.shape[-2:] != (height, width):
        mask = functional.interpolate(mask, size=(height, width), mode="bilinear")
    return mask[:, None] * strength


def given_channels(image: Tensor, mask: Tensor | None, shape: Sequence[int], kind: VAEKind) -> Concat:
    """The channels beside the noise, [B,4+C,T,h,w]: which frames are given (1), and their normalised latent.

    Args:
        image: raw [N,C,T,h',w'].
        mask: ``concat_mask`` [N,c,t,h',w']; one that has no four channels counts by their mean, one that is too short
            gives nothing after its end; None gives no frame.
        shape: of the latent to be sampled.
    """
    batch, frames = shape[0], shape[2]
    latent = in_batch(normalise(resized(image, *shape[-2:]), kind), batch)
    if mask is None:
        given = latent.new_zeros(batch, MASK_CHANNELS, *shape[2:])
    else:
        mask = mask.to(latent)
        mask = mask if mask.shape[1] == MASK_CHANNELS else mask.mean(dim=1, keepdim=True)
        given = resized(1 - mask, *shape[-2:])[:, :, :frames]
        given = functional.pad(given, (0, 0, 0, 0, 0, frames - given.shape[2]))
        given = in_batch(given.expand(-1, MASK_CHANNELS, -1, -1, -1), batch)
    return Concat(torch.cat([given, latent], dim=1))


def concat_mask(places: Collection[int], frames: int, height: int, width: int) -> Tensor:
    """The ``concat_mask`` [1,4,T,h,w] of the frames given at these places."""
    return 1 - given_mask(list(places), frames, height, width)


def first_frames(encoded: Tensor, shape: Sequence[int], kind: VAEKind, batch: int) -> tuple[Tensor, Tensor]:
    """A raw latent [B,C,T,h,w] that begins with these frames, and the ``noise_mask`` [B,1,T,h,w] that keeps them.

    Args:
        encoded: raw [1,C,k,h,w].
        shape: [C,T,h,w].
    """
    count = encoded.shape[2]
    samples = denormalise(torch.zeros(1, *shape), kind).to(encoded)
    samples[:, :, :count] = encoded
    mask = encoded.new_ones(1, 1, *shape[1:])
    mask[:, :, :count] = 0
    return samples.repeat(batch, 1, 1, 1, 1), mask.repeat(batch, 1, 1, 1, 1)


def resized(x: Tensor, height: int, width: int) -> Tensor:
    """[B,C,T,h,w], frame by frame: the middle of the new aspect ratio, scaled bilinearly without antialiasing."""
    old_height, old_width = x.shape[-2:]
    if (old_height, old_width) == (height, width):
        return x
    old, new = old_width / old_height, width / height
    left = round((old_width - old_width * (new / old)) / 2) if old > new else 0
    top = round((old_height - old_height * (old / new)) / 2) if old < new else 0
    middle = x[..., top : old_height - top, left : old_width - left]
    flat = functional.interpolate(middle.flatten(1, 2), size=(height, width), mode="bilinear")
    return flat.reshape(*x.shape[:3], height, width)


def in_batch(x: Tensor, batch: int) -> Tensor:
    """As many as the batch has: fewer are spread over it, of more every so many-th is taken, the first of one."""
    if len(x) == batch:
        return x
    if batch == 1:
        return x[:1]
    if len(x) > batch:
        each = (min(round(i * (len(x) - 1) / (batch - 1)), len(x) - 1) for i in range(batch))
    else:
        each = (min(int((i + 0.5) * len(x) / batch), len(x) - 1) for i in range(batch))
    return x[list(each)]
