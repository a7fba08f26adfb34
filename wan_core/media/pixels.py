"""Videos as pictures [F,H,W,3] in 0..1, and as the chunks [1,3,f,H,W] in -1..1 that a VAE takes and gives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch

from ..config import TEMPORAL_STRIDE
from .geometry import pixel_frames

log = logging.getLogger(__name__)


def cropped(videos: torch.Tensor, stride: int) -> torch.Tensor:
    """[B,F,H,W,3] -> the middle that the VAE can encode, without the last frames that do not fill a latent frame."""
    _, frames, height, width, _ = videos.shape
    kept, h, w = pixel_frames(1 + (frames - 1) // TEMPORAL_STRIDE), height // stride * stride, width // stride * stride
    if (kept, h, w) != (frames, height, width):
        log.warning("Wan VAE: %d frames of %dx%d are cropped to %d of %dx%d.", frames, width, height, kept, w, h)
    top, left = (height - h) // 2, (width - w) // 2
    return videos[:, :kept, top : top + h, left : left + w]


def pieces(video: torch.Tensor) -> Iterator[torch.Tensor]:
    """[F,H,W,3] in 0..1 -> [1,3,f,H,W] in -1..1, one frame and then four at a time."""
    starts = [0, *range(1, len(video), TEMPORAL_STRIDE)]
    for start, end in zip(starts, [*starts[1:], len(video)], strict=True):
        yield video[start:end].movedim(-1, 0)[None].float() * 2 - 1


def fill(video: torch.Tensor, chunks: Iterable[torch.Tensor]) -> None:
    """[1,3,f,H,W] in -1..1, one after the other, into [F,H,W,3] in 0..1."""
    start = 0
    for chunk in chunks:
        pixels = chunk[0].movedim(0, -1)
        video[start : start + len(pixels)] = pixels.add(1).div(2)
        start += len(pixels)


def blend(video: torch.Tensor, pieces: Iterable[tuple[tuple, torch.Tensor, torch.Tensor]]) -> None:
    """Weighted pieces [1,3,f,H,W] in -1..1 into [F,H,W,3] in 0..1, which is zero before."""
    for place, piece, weight in pieces:
        video[place] += (piece[0].add(1).div(2) * weight).movedim(0, -1).to(video.device)
