"""How a run begins: its noise, and how pictures and known frames enter; for nodes, pipeline and training alike.

Two ways: as channels beside the noise, with a mask of what is known (I2V, FLF2V), or as clean first frames of the
latent itself (TI2V). Pictures are [3, H, W] in -1..1 and already of the video's size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Variant
from ..errors import Hint, WanError
from ..media.geometry import condition_chunks, given_mask, latent_shape, noise
from ..models.dit.inputs import Concat
from .denoise import KnownLatent

Pictures = Mapping[int, Tensor]  # frame number, from the end where negative -> picture
EncodeChunks = Callable[[Iterator[Tensor], int], Tensor]  # (chunks [N,3,f,H,W], frames) -> normalised [N,C,T,h,w]


@dataclass(frozen=True, eq=False)
class Start:
    """What sampling begins with.

    Attributes:
        noise: [1, C, T, h, w].
        inputs: of a ``Condition``, for both halves of the guidance.
        known: what is known of the latent itself.
    """

    noise: Tensor
    inputs: tuple[Any, ...] = ()
    known: KnownLatent | None = None


def begin(
    variant: Variant, size: tuple[int, int], frames: int, seed: int, pictures: Pictures, encode: EncodeChunks
) -> Start:
    """The start of a run of this width, height and length.

    Args:
        pictures: known frames by number; empty for text alone.
        encode: through the variant's VAE.

    Raises:
        WanError: a model that animates pictures gets none, one that takes none gets some, or gets them where it cannot
            take them.
    """
    shape = latent_shape(variant, *size, frames)
    start = noise(seed, shape)[None]
    check_pictures(variant, pictures)
    if not pictures:
        return Start(start)
    if variant.image == "channels":
        return Start(start, inputs=(known_channels([pictures], frames, encode),))
    first = encode(iter([pictures[0][None, :, None]]), 1)
    return Start(start, known=clean_frames(first, shape))


def check_pictures(variant: Variant, pictures: Mapping[int, object]) -> None:
    """Whether a model can begin with pictures in these places.

    Raises:
        WanError: see ``begin``.
    """
    name = variant.display_name
    if variant.image == "none" and pictures:
        raise WanError(f"{name} takes no image.", Hint.NO_IMAGE)
    if variant.image == "channels" and not pictures:
        raise WanError(f"{name} animates an image.", Hint.IMAGES)
    if variant.image == "frame" and set(pictures) - {0}:
        raise WanError(f"{name} takes a start image only. Leave the end image out, or use an I2V model.")
    if variant.needs_end and pictures and not {0, -1} <= set(pictures):
        raise WanError(f"{name} goes from a first picture to a last.", Hint.BOTH_IMAGES)


def known_channels(known: Sequence[Pictures], frames: int, encode: EncodeChunks) -> Concat:
    """Known frames of each video as channels [N, 4 + C, T, h, w]: which are known (1), and their latent.

    All that is not known is mid-grey, and encoded with the rest as one clip (official ``image2video.py``).
    """
    each = (condition_chunks(pictures, frames) for pictures in known)
    latent = encode((torch.cat(chunks) for chunks in zip(*each, strict=True)), frames)
    masks = torch.cat([given_mask(list(pictures), frames, *latent.shape[3:]) for pictures in known])
    return Concat(torch.cat([masks.to(latent), latent], dim=1))


def clip_places(variant: Variant, places: Collection[int]) -> list[int]:
    """Which of the known frames a model hears as CLIP tokens, in their order: none, one picture, or first and last."""
    if not variant.clip or not places:
        return []
    return [place for place in (0, -1) if place in places] if variant.clip > 1 else list(places)[:1]


def clean_frames(latent: Tensor, shape: Sequence[int]) -> KnownLatent:
    """First latent frames [N, C, k, h, w] that stay clean throughout, in a latent of ``shape`` [C, T, h, w]."""
    count = latent.shape[2]
    whole = latent.new_zeros(len(latent), *shape)
    whole[:, :, :count] = latent
    mask = latent.new_ones(1, 1, shape[1], 1, 1)
    mask[:, :, :count] = 0
    return KnownLatent(whole, mask, clean=True)
