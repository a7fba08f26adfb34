"""What both video autoencoders share: streaming, normalisation and the checks of their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ...config import TEMPORAL_STRIDE, VAES, VAEConfig, VAEKind, VAESpec
from ...errors import WanError
from .layers import Decoder, Encoder, FrameCache, PointConv3d

OnChunk = Callable[[int, int], None]  # chunks done, chunks in all; may raise to cancel

TEMPORAL = (False, True, True)  # which of the encoder's downsamplers also halve the frames; the decoder mirrors them

# Mean and standard deviation of each latent channel: the constants of Wan2_1_VAE and Wan2_2_VAE in the official
# wan/modules/vae2_1.py and vae2_2.py (diffusers carries the same as latents_mean and latents_std).
LATENT_MEAN: dict[VAEKind, tuple[float, ...]] = {
    "wan2.1": (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    "wan2.2": (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
}  # fmt: skip
LATENT_STD: dict[VAEKind, tuple[float, ...]] = {
    "wan2.1": (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    "wan2.2": (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
}  # fmt: skip


def normalise(raw: torch.Tensor, kind: VAEKind) -> torch.Tensor:
    """Raw latent [..., C, T, h, w] -> (raw - mean) / std of each channel, float32: where diffusion works."""
    return (raw.float() - _constant(LATENT_MEAN[kind], raw)) / _constant(LATENT_STD[kind], raw)


def denormalise(latent: torch.Tensor, kind: VAEKind) -> torch.Tensor:
    """The inverse of ``normalise``."""
    return latent.float() * _constant(LATENT_STD[kind], latent) + _constant(LATENT_MEAN[kind], latent)


def _constant(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device).view(-1, 1, 1, 1)


class VideoVAE(nn.Module):
    """A causal video autoencoder: one latent frame for the first frame of a video, then one for every four.

    Videos are [B, 3, F, H, W] in -1..1, latents normalised [B, C, T, H / stride, W / stride]. Computes in the dtype
    and on the device of its weights, returns float32 on the device of its input.
    """

    fold: int  # side of the square of pixels that are folded into channels before the first layer

    def __init__(self, config: VAEConfig, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.conv1 = PointConv3d(2 * config.channels, 2 * config.channels)
        self.conv2 = PointConv3d(config.channels, config.channels)
        self.decoder = decoder

    @property
    def spec(self) -> VAESpec:
        return VAES[self.config.kind]

    @torch.no_grad()
    def encode(self, video: torch.Tensor, on_chunk: OnChunk | None = None) -> torch.Tensor:
        """Video [B, 3, F, H, W] in -1..1 -> normalised latent [B, C, (F + 3) / 4, h, w].

        Raises:
            WanError: F is not 4n + 1, or a side is no multiple of the stride.
        """
        self._check_video(video)
        check_frame_count(video.shape[2])
        chunks = self.encode_chunks([video], on_chunk, total_frames=video.shape[2])
        return torch.cat(list(chunks), 2)

    @torch.no_grad()
    def encode_all(self, chunks: Iterable[torch.Tensor], frames: int) -> torch.Tensor:
        """Chunks [B,3,f,H,W] of a video of so many frames -> its latent [B,C,T,h,w]."""
        return torch.cat(list(self.encode_chunks(chunks, total_frames=frames)), dim=2)

    @torch.no_grad()
    def decode(self, latent: torch.Tensor, on_chunk: OnChunk | None = None) -> torch.Tensor:
        """Normalised latent [B, C, T, h, w] -> video [B, 3, 4 T - 3, H, W] in -1..1."""
        self._check_latent(latent)
        b, _, t, h, w = latent.shape
        stride = self.spec.spatial_stride
        video = latent.new_empty(b, 3, TEMPORAL_STRIDE * (t - 1) + 1, h * stride, w * stride, dtype=torch.float32)
        start = 0
        for chunk in self.decode_chunks(latent, on_chunk):
            video[:, :, start : start + chunk.shape[2]] = chunk
            start += chunk.shape[2]
        return video

    @torch.no_grad()
    def encode_chunks(
        self, frames: Iterable[torch.Tensor], on_chunk: OnChunk | None = None, *, total_frames: int = 0
    ) -> Iterator[torch.Tensor]:
        """A stream of [B, 3, f, H, W], any f each -> a stream of latent frames [B, C, 1, h, w].

        Args:
            total_frames: of the whole stream if known, only to tell ``on_chunk`` (else its total is 0).

        Raises:
            WanError: as ``encode``; a wrong number of frames shows only at the end of the stream.
        """
        cache = FrameCache()
        total = latent_frames(total_frames) if total_frames else 0
        for done, chunk in enumerate(self._regroup(frames), start=1):
            latent = self._encode_chunk(chunk, cache).to(chunk.device)
            if on_chunk is not None:
                on_chunk(done, total)
            yield latent

    @torch.no_grad()
    def decode_chunks(self, latent: torch.Tensor, on_chunk: OnChunk | None = None) -> Iterator[torch.Tensor]:
        """Normalised latent [B, C, T, h, w] -> a stream of [B, 3, 1, H, W], then [B, 3, 4, H, W] each."""
        self._check_latent(latent)
        cache = FrameCache()
        for done, frame in enumerate(latent.split(1, dim=2), start=1):
            video = self._decode_chunk(frame, cache).to(latent.device)
            if on_chunk is not None:
                on_chunk(done, latent.shape[2])
            yield video

    def _encode_chunk(self, video: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """[B, 3, 1 or 4n, H, W] (at the start of a video 1 + 4n) -> [B, C, n, h, w]."""
        weight = self.conv1.weight
        x = fold_pixels(video.to(weight.device, weight.dtype), self.fold)
        moments = self.conv1(self.encoder(x, cache))
        cache.first = False
        return normalise(moments[:, : self.config.channels], self.config.kind)

    def _decode_chunk(self, latent: torch.Tensor, cache: FrameCache) -> torch.Tensor:
        """[B, C, n, h, w] -> [B, 3, 4n, H, W], three frames fewer at the start of a video."""
        weight = self.conv2.weight
        raw = denormalise(latent.to(weight.device), self.config.kind).to(weight.dtype)
        pixels = self.decoder(self.conv2(raw.contiguous(memory_format=torch.channels_last_3d)), cache)
        cache.first = False
        return unfold_pixels(pixels, self.fold).float().clamp_(-1, 1)

    def _regroup(self, stream: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Any chunks of frames -> one frame, then four and four."""
        waiting: list[torch.Tensor] = []
        size, count = 1, 0
        for piece in stream:
            self._check_video(piece)
            for i in range(piece.shape[2]):
                waiting.append(piece[:, :, i : i + 1])
                count += 1
                if len(waiting) == size:
                    yield torch.cat(waiting, 2)
                    waiting, size = [], TEMPORAL_STRIDE
        check_frame_count(count)

    def _check_video(self, video: torch.Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != 3:
            raise WanError(f"A video must be [batch, 3, frames, height, width]; found {list(video.shape)}.")
        stride = self.spec.spatial_stride
        height, width = video.shape[3:]
        if height % stride or width % stride or not height or not width:
            nearest = f"{nearest_multiple(width, stride)}x{nearest_multiple(height, stride)}"
            raise WanError(
                f"Frames of {width}x{height} do not fit the {self.config.kind} VAE: both sides must be "
                f"multiples of {stride}. The nearest valid size is {nearest}."
            )

    def _check_latent(self, latent: torch.Tensor) -> None:
        if latent.ndim != 5 or latent.shape[1] != self.config.channels or not latent.numel():
            raise WanError(
                f"The {self.config.kind} VAE decodes latents of [batch, {self.config.channels}, frames, "
                f"height, width]; found {list(latent.shape)}." + self._other_kind(latent)
            )

    def _other_kind(self, latent: torch.Tensor) -> str:
        for kind, spec in VAES.items():
            if latent.ndim == 5 and kind != self.config.kind and latent.shape[1] == spec.channels:
                return f" Such a latent belongs to the {kind} VAE: load {spec.checkpoint}."
        return ""


def latent_frames(frames: int) -> int:
    """Latent frames of a video of so many frames."""
    return 1 + (frames - 1) // TEMPORAL_STRIDE


def check_frame_count(frames: int) -> None:
    if frames % TEMPORAL_STRIDE != 1:
        below = max(1, frames - (frames - 1) % TEMPORAL_STRIDE)
        valid = str(below) if frames < below else f"{below} or {below + TEMPORAL_STRIDE}"
        raise WanError(f"A video of {frames} frames cannot be encoded: expected a multiple of 4 plus 1. Use {valid}.")


def nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def fold_pixels(video: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 3, F, H, W] -> [B, 3 side², F, H / side, W / side], channels innermost in memory.

    A folded pixel's channels are colour, then column, then row, as in the official code.
    """
    b, c, f, h, w = video.shape
    blocks = video.view(b, c, f, h // side, side, w // side, side).permute(0, 2, 3, 5, 1, 6, 4)
    return blocks.flatten(4).contiguous().permute(0, 4, 1, 2, 3)


def unfold_pixels(x: torch.Tensor, side: int) -> torch.Tensor:
    """The inverse of ``fold_pixels``: [B, 3 side², F, h, w] -> [B, 3, F, side h, side w]."""
    blocks = x.unflatten(1, (3, side, side))  # b c column row f h w
    return blocks.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)
