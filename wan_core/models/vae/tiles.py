"""Autoencoders on frames that are too large at once: overlapping tiles, blended where they meet.

Convolutions see a tile's edge as the picture's edge, so the outer part of an overlap is thrown away; in its middle one
tile fades into the next. The attention in the middle of the networks sees a tile instead of the whole frame: the one
thing that tiling changes however wide the overlap is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import TypeVar, cast

import torch
from torch import Tensor

from ...config import TEMPORAL_STRIDE
from ...errors import WanError
from .layers import FrameCache
from .vae import OnChunk, VideoVAE, check_frame_count, latent_frames

HELD = 3 * 2**29  # bytes of pixels that a stream in tiles holds: 145 frames of 1280x720


@dataclass(frozen=True)
class Tiles:
    """How frames are cut, in pixels.

    Attributes:
        overlap: what neighbours share at least.
        ramp: the middle of an overlap in which one tile fades into the next; None means half of the overlap.
    """

    height: int
    width: int
    overlap: int = 64
    ramp: int | None = None

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 2 * self.overlap or self.overlap < 0:
            raise WanError(
                f"Tiles of {self.width}x{self.height} with an overlap of {self.overlap}: an overlap can be "
                "half a tile at most. Choose larger tiles or a smaller overlap."
            )
        if self.ramp is not None and not 0 <= self.ramp <= self.overlap:
            raise WanError(f"A ramp of {self.ramp} does not fit into an overlap of {self.overlap}.")

    @classmethod
    def square(cls, side: int) -> Tiles:
        """Tiles of this side, with the overlap that is used where none is asked for."""
        return cls(side, side, min(64, side // 4))


@dataclass(frozen=True, eq=False)
class Tile:
    """A part of the latent's rows and columns, and what its latent and its pixels weigh in the whole."""

    rows: slice
    columns: slice
    latent_weight: Tensor  # [h, w]
    pixel_weight: Tensor  # [H, W]

    def pixels(self, stride: int) -> tuple[slice, slice]:
        rows, columns = (slice(part.start * stride, part.stop * stride) for part in (self.rows, self.columns))
        return rows, columns


def cut(height: int, width: int, tiles: Tiles, stride: int) -> list[Tile]:
    """The tiles of a latent of this height and width; one, if it fits into one. Weights of all tiles add up to 1."""
    ramp = tiles.overlap // 2 if tiles.ramp is None else tiles.ramp
    overlap = ceil(tiles.overlap / stride)
    rows = _side(height, max(1, tiles.height // stride), overlap)
    columns = _side(width, max(1, tiles.width // stride), overlap)

    def weight(i: int, j: int, scale: int) -> Tensor:
        return torch.outer(
            *(_weight(side, index, scale, ramp * scale / stride) for side, index in ((rows, i), (columns, j)))
        )

    return [
        Tile(rows[i], columns[j], weight(i, j, 1), weight(i, j, stride))
        for i in range(len(rows))
        for j in range(len(columns))
    ]


def _side(length: int, size: int, overlap: int) -> list[slice]:
    """Evenly spread pieces of one side that share ``overlap`` at least."""
    if length <= size:
        return [slice(0, length)]
    count = ceil((length - overlap) / (size - overlap))
    starts = [round(i * (length - size) / (count - 1)) for i in range(count)]
    return [slice(start, start + size) for start in starts]


def _weight(pieces: list[slice], index: int, scale: int, ramp: float) -> Tensor:
    """The weight of a piece at each of its places, [size * scale]: rises where it meets the one before, falls where it
    meets the next."""
    piece = pieces[index]
    places = torch.arange(piece.start * scale, piece.stop * scale) + 0.5
    weight = torch.ones(len(places)) if index == 0 else _rise(places, pieces[index - 1], piece, scale, ramp)
    if index + 1 < len(pieces):
        weight -= _rise(places, piece, pieces[index + 1], scale, ramp)
    return weight  # of all pieces this adds up to 1, however close the ramps are


def _rise(places: Tensor, before: slice, after: slice, scale: int, ramp: float) -> Tensor:
    """0 to 1 around the middle of what two pieces share."""
    middle = (before.stop + after.start) * scale / 2
    return ((places - middle) / max(ramp, 1e-6) + 0.5).clamp(0, 1)


@torch.no_grad()
def decode_tiled(vae: VideoVAE, latent: Tensor, tiles: Tiles, on_chunk: OnChunk | None = None) -> Tensor:
    """Normalised latent [B, C, T, h, w] -> video [B, 3, 4 T - 3, H, W] in -1..1, on the latent's device.

    Args:
        on_chunk: told of every latent frame of every tile; may raise to cancel.
    """
    b, _, t, h, w = latent.shape
    stride = vae.spec.spatial_stride
    video = latent.new_zeros(b, 3, TEMPORAL_STRIDE * (t - 1) + 1, h * stride, w * stride, dtype=torch.float32)
    for (frames, rows, columns), chunk, weight in decoded_tiles(vae, latent, tiles, on_chunk):
        video[..., frames, rows, columns] += chunk * weight
    return video


@torch.no_grad()
def decoded_tiles(
    vae: VideoVAE, latent: Tensor, tiles: Tiles, on_chunk: OnChunk | None = None
) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, Tensor]]:
    """Pieces of the video in any order: its frames, rows and columns, [B, 3, f, H, W], and its weight [H, W].

    One tile after the other, each through all frames: the device holds one tile at a time.
    """
    vae._check_latent(latent)
    frames, stride = latent.shape[2], vae.spec.spatial_stride
    grid = cut(latent.shape[3], latent.shape[4], tiles, stride)
    report = _Report(on_chunk, len(grid) * frames)
    for tile in grid:
        weight = tile.pixel_weight.to(latent.device)
        start = 0
        for chunk in vae.decode_chunks(latent[..., tile.rows, tile.columns], report):
            yield (slice(start, start + chunk.shape[2]), *tile.pixels(stride)), chunk, weight
            start += chunk.shape[2]


@torch.no_grad()
def decode_tiled_chunks(
    vae: VideoVAE, latent: Tensor, tiles: Tiles, on_chunk: OnChunk | None = None
) -> Iterator[Tensor]:
    """The same as a stream: [B, 3, 1, H, W], then [B, 3, 4, H, W] each, so that the video need not fit into memory.

    A tile goes through many frames, see ``HELD``, before the next one's turn: what it remembers of the frames before
    stays on the device meanwhile. Between such stretches of a long video it waits on the latent's device.
    """
    vae._check_latent(latent)
    b, _, _, h, w = latent.shape
    stride = vae.spec.spatial_stride
    grid = cut(h, w, tiles, stride)
    caches = [FrameCache() for _ in grid]
    report = _Report(on_chunk, len(grid) * latent.shape[2])
    counts = [1] + [TEMPORAL_STRIDE] * (latent.shape[2] - 1)
    frame_bytes = TEMPORAL_STRIDE * 3 * 4 * b * h * w * stride**2
    for parts, last in _stretches(zip(latent.split(1, dim=2), counts, strict=True), frame_bytes):
        sizes = [count for _, count in parts]
        whole = latent.new_zeros(b, 3, sum(sizes), h * stride, w * stride, dtype=torch.float32)
        pieces = whole.split(sizes, dim=2)
        for tile, cache in zip(grid, caches, strict=True):
            rows, columns = tile.pixels(stride)
            weight = tile.pixel_weight.to(vae.conv1.weight.device)
            with _visiting(vae, cache, latent.device, last):
                for (frame, _), piece in zip(parts, pieces, strict=True):
                    made = vae._decode_chunk(frame[..., tile.rows, tile.columns].contiguous(), cache)
                    piece[..., rows, columns] += made.mul_(weight).to(whole.device)
                    report()
        yield from pieces


@torch.no_grad()
def encode_tiled(vae: VideoVAE, video: Tensor, tiles: Tiles, on_chunk: OnChunk | None = None) -> Tensor:
    """Video [B, 3, F, H, W] in -1..1 -> normalised latent [B, C, (F + 3) / 4, h, w], on the video's device."""
    vae._check_video(video)
    check_frame_count(video.shape[2])
    chunks = encode_tiled_chunks(vae, [video], tiles, on_chunk, total_frames=video.shape[2])
    return torch.cat(list(chunks), dim=2)


@torch.no_grad()
def encode_tiled_chunks(
    vae: VideoVAE, frames: Iterable[Tensor], tiles: Tiles, on_chunk: OnChunk | None = None, *, total_frames: int = 0
) -> Iterator[Tensor]:
    """A stream of [B, 3, f, H, W], any f each -> a stream of latent frames [B, C, 1, h, w]."""
    stride = vae.spec.spatial_stride
    grid: list[Tile] = []
    caches: list[FrameCache] = []
    report = _Report(on_chunk, 0)
    for chunks, last in _stretches(vae._regroup(frames)):
        b, _, _, *size = chunks[0].shape
        h, w = (side // stride for side in size)
        if not grid:
            grid = cut(h, w, tiles, stride)
            caches = [FrameCache() for _ in grid]
            report.total = len(grid) * latent_frames(total_frames) if total_frames else 0
        whole = torch.zeros(b, vae.config.channels, len(chunks), h, w, device=chunks[0].device)
        pieces = whole.split(1, dim=2)
        for tile, cache in zip(grid, caches, strict=True):
            rows, columns = tile.pixels(stride)
            weight = tile.latent_weight.to(vae.conv1.weight.device)
            with _visiting(vae, cache, whole.device, last):
                for chunk, piece in zip(chunks, pieces, strict=True):
                    made = vae._encode_chunk(chunk[..., rows, columns].contiguous(), cache)
                    piece[..., tile.rows, tile.columns] += made.mul_(weight).to(whole.device)
                    report()
        yield from pieces


Part = TypeVar("Part")


def _stretches(parts: Iterable[Part], part_bytes: int | None = None) -> Iterator[tuple[list[Part], bool]]:
    """Consecutive parts of a video, as many as ``HELD`` bytes hold; and whether they are the last.

    Args:
        part_bytes: of a part; None: those of the part, a tensor.
    """
    stretch: list[Part] = []
    held = 0
    for part in parts:
        size = cast(Tensor, part).nbytes if part_bytes is None else part_bytes
        if stretch and held + size > HELD:
            yield stretch, False
            stretch, held = [], 0
        stretch.append(part)
        held += size
    if stretch:
        yield stretch, True


@contextmanager
def _visiting(vae: VideoVAE, cache: FrameCache, home: torch.device, last: bool) -> Iterator[None]:
    """One tile's turn: its memory of earlier frames is on the device, then at home; after the last turn it is gone."""
    cache.move(vae.conv1.weight.device)
    yield
    if last:
        cache.clear()
    else:
        cache.move(home)


@dataclass
class _Report:
    """Counts chunks of all tiles."""

    on_chunk: OnChunk | None
    total: int
    done: int = 0

    def __call__(self, *_of_this_tile: int) -> None:
        self.done += 1
        if self.on_chunk is not None:
            self.on_chunk(self.done, self.total)
