"""Load Wan VAE, the VAE object that ComfyUI's own nodes call, and Wan VAE Encode and Decode."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io

from ..wan_core.config import TEMPORAL_STRIDE, VAES
from ..wan_core.dtypes import resolve_dtype
from ..wan_core.errors import WanError
from ..wan_core.layouts import comfyui
from ..wan_core.loading.vae import VAEFile, read_vae
from ..wan_core.mapped import fetch
from ..wan_core.media.geometry import latent_frames, pixel_frames
from ..wan_core.media.pixels import blend, cropped, fill, pieces
from ..wan_core.memory import capacity
from ..wan_core.memory.activations import Work, vae_budget
from ..wan_core.memory.budget import WORKSPACE
from ..wan_core.memory.vae_placement import Place, at_once, place, retried, vae_at
from ..wan_core.models.vae.tiles import Tiles, cut, decoded_tiles, encode_tiled_chunks
from ..wan_core.models.vae.vae import VideoVAE, denormalise, normalise
from . import host
from .base import WanNode, guarded_methods
from .pictures import pictures
from .placement import Placement

log = logging.getLogger(__name__)

FOLDER = "vae"


class LoadVAE(WanNode):
    files = ("vae_name",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreLoadVAE",
            display_name="Load Wan VAE",
            category="Wan 2.2/loaders",
            description="Chooses a Wan video autoencoder: the Wan2.2 VAE for TI2V-5B, the Wan2.1 VAE for all other "
            "models. Its weights are read when something is encoded or decoded.",
            inputs=[
                io.Combo.Input(
                    "vae_name",
                    options=host.model_names(FOLDER),
                    tooltip="A Wan VAE in ComfyUI's vae folder: wan2.2_vae.safetensors or Wan2.2_VAE.pth for the 5B, "
                    "wan_2.1_vae.safetensors or Wan2.1_VAE.pth for all other models.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=host.DTYPES,
                    default="auto",
                    tooltip="Number format of the computation. auto: bfloat16 where the device is fast in it; float32 "
                    "is the most exact.",
                ),
            ],
            outputs=[io.Vae.Output(display_name="vae")],
        )

    @classmethod
    def check_inputs(cls, vae_name: str | None) -> None:
        host.check_file(read_vae, FOLDER, vae_name)

    @classmethod
    def fingerprint_inputs(cls, vae_name: str, dtype: str) -> tuple:
        return host.fingerprint(FOLDER, vae_name, read_vae)

    @classmethod
    def execute(cls, vae_name: str, dtype: str) -> io.NodeOutput:
        resolve_dtype(dtype, "cpu")
        file = host.read_header(read_vae, FOLDER, vae_name)
        return io.NodeOutput(WanVAE(file, dtype), ui=host.told("\n".join(file.notes)))


@guarded_methods("encode", "encode_chunks", "encode_tiled", "decode", "decode_tiled", "get_sd")
class WanVAE:
    """A Wan VAE on a VAE socket: ComfyUI's interface over the engine's VAE.

    Pixels are [F,H,W,3] or [B,F,H,W,3] in 0..1, latents raw [B,C,T,h,w]. Both directions stream: only a few frames
    are on the device at a time, and the user can cancel between them.
    """

    latent_dim = 3
    output_channels = 3
    not_video = False

    def __init__(self, file: VAEFile, dtype: str) -> None:
        spec = VAES[file.config.kind]
        stride = spec.spatial_stride
        self.file = file
        self.dtype = dtype
        self.device = host.vae_device()
        self.patcher = Placement(self.device)
        self.latent_channels = spec.channels
        self.downscale_ratio = (lambda frames: max(0, (frames + 3) // TEMPORAL_STRIDE), stride, stride)
        self.upscale_ratio = (lambda frames: max(0, frames * TEMPORAL_STRIDE - 3), stride, stride)
        self.downscale_index_formula = self.upscale_index_formula = (TEMPORAL_STRIDE, stride, stride)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Pixels -> raw latent. As ComfyUI's VAE: sides are cropped to the stride, frames to 4n + 1."""
        return self._encode(pixel_samples, None)

    def encode_chunks(
        self, chunks: Iterable[torch.Tensor], frames: int, bar: host.Chunks | None = None
    ) -> torch.Tensor:
        """A stream of [1,3,f,H,W] in -1..1 -> raw latent [1,C,T,h,w]."""
        return self._encoded_chunks(self._weights(), chunks, frames, bar)

    def _weights(self) -> VideoVAE:
        return host.engine().vae(self.file, self.patcher.load_device, self.dtype)

    def _encoded_chunks(
        self, vae: VideoVAE, chunks: Iterable[torch.Tensor], frames: int, bar: host.Chunks | None = None
    ) -> torch.Tensor:
        with host.cancellable(vae):
            encoded = list(vae.encode_chunks(chunks, bar or host.Chunks(latent_frames(frames)), total_frames=frames))
        return denormalise(torch.cat(encoded, dim=2), vae.config.kind).to(host.storage_device())

    def decode(self, samples_in: torch.Tensor, vae_options: dict | None = None) -> torch.Tensor:
        """Raw latent -> pixels [B,F,H,W,3], filled chunk by chunk; in tiles where the device has too little memory."""
        return self._decode(samples_in, None)

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        **time: int | None,
    ) -> torch.Tensor:
        """Tiles in pixels, as ComfyUI's VAE. Time is streamed, so tiles in time are not needed."""
        return self._encode(pixel_samples, _tiles(tile_y, tile_x, overlap, 1))

    def _encode(self, pixels: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        videos = self._videos(pixels, tiles)
        height, width = videos.shape[2:4]
        where = self._place((height, width), tiles, "encode")
        return retried(lambda tiles: self._encoded(videos, replace(where, tiles=tiles)), height, width, where.tiles)

    def _encoded(self, videos: torch.Tensor, where: Place) -> torch.Tensor:
        frames, height, width = videos.shape[1:4]
        vae, tiles = vae_at(host.engine(), self.file, where, (height, width), "encode"), where.tiles
        bar = host.Chunks(len(videos) * latent_frames(frames) * self._tile_count((height, width), tiles))
        if tiles is None:
            return torch.cat([self._encoded_chunks(vae, pieces(video), frames, bar) for video in videos])
        with host.cancellable(vae):
            encoded = [torch.cat(list(encode_tiled_chunks(vae, pieces(video), tiles, bar)), dim=2) for video in videos]
        return denormalise(torch.cat(encoded), vae.config.kind).to(host.storage_device())

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int | None = None,
        tile_y: int | None = None,
        overlap: int | None = None,
        **time: int | None,
    ) -> torch.Tensor:
        """Tiles in places of the latent, as ComfyUI's VAE. Time is streamed, so tiles in time are not needed."""
        return self._decode(samples, _tiles(tile_y, tile_x, overlap, self.spacial_compression_decode()))

    def _videos(self, pixels: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        """[B,F,H,W,3] in 0..1 that can be encoded; refuses what no machine of this size can encode."""
        if not torch.is_tensor(pixels) or pixels.ndim not in (3, 4, 5):
            found = list(pixels.shape) if torch.is_tensor(pixels) else type(pixels).__name__
            raise WanError(f"The images are {found}: expected [frames, height, width, 3].")
        frames = pictures(pixels.flatten(0, 1) if pixels.ndim == 5 else pixels, "The images")
        videos = frames.view(*pixels.shape[:-1], 3) if pixels.ndim == 5 else frames[None]
        videos = cropped(videos, self.spacial_compression_encode())
        self.check_encode(*at_once(videos.shape[2:4], tiles))
        return videos

    def check_encode(self, height: int, width: int) -> None:
        """
        Raises:
            WanError: the device cannot encode frames of this size, even in the best case.
        """
        device = self.patcher.load_device
        needed = vae_budget(self.file.config, height, width, self._compute_dtype(), "encode").total
        capacity.check_bytes(needed, f"Encoding frames of {width}x{height}", device, host.total_bytes(device))

    def _check_decode(self, size: Sequence[int], where: Place) -> None:
        """Refuse what cannot be decoded, [B,F,H,W,3], before anything is allocated."""
        host_device = host.storage_device()
        capacity.check_tensor(size, "A video", device=host_device, total=host.total_bytes(host_device))
        device, (height, width) = where.device, at_once(size[2:4], where.tiles)
        needed = vae_budget(self.file.config, height, width, where.dtype).total
        capacity.check_bytes(
            needed,
            f"Decoding frames of {width}x{height} at once",
            device,
            host.total_bytes(device),
            "Choose a (smaller) tile_size, or a smaller size.",
        )

    def _compute_dtype(self) -> torch.dtype:
        return resolve_dtype(self.dtype, self.patcher.load_device, self.file.checkpoint.dtype)

    def _decode(self, samples: torch.Tensor, tiles: Tiles | None) -> torch.Tensor:
        batch, _, frames, height, width = _video_latent(samples, self.latent_channels).shape
        stride = self.spacial_compression_decode()
        height, width = height * stride, width * stride
        size = (batch, pixel_frames(frames), height, width, 3)
        where = self._place((height, width), tiles, "decode")
        self._check_decode(size, where)
        return retried(
            lambda tiles: self._decoded(samples, size, replace(where, tiles=tiles)), height, width, where.tiles
        )

    def _decoded(self, samples: torch.Tensor, size: tuple[int, int, int, int, int], where: Place) -> torch.Tensor:
        batch, frames, tiles = len(samples), samples.shape[2], where.tiles
        vae = vae_at(host.engine(), self.file, where, size[2:4], "decode")
        video = torch.zeros(size, device=host.storage_device())
        bar = host.Chunks(batch * frames * self._tile_count(size[2:4], tiles))
        with host.cancellable(vae):
            for i in range(batch):
                latent = normalise(samples[i : i + 1], vae.config.kind)
                if tiles is None:
                    fill(video[i], vae.decode_chunks(latent, bar))
                else:
                    blend(video[i], decoded_tiles(vae, latent, tiles, bar))
        return video

    def _place(self, size: tuple[int, int], tiles: Tiles | None, work: Work) -> Place:
        """For frames of this height and width: in the tiles that were asked for, else as there is room."""
        device, dtype = self.patcher.load_device, self._compute_dtype()
        if tiles is not None or device.type == "cpu":
            return Place(device, tiles, dtype)
        # What the engine holds makes way, and of that the VAE's weights are there already.
        free = host.free_bytes(device) + host.engine().bytes_on(device) - WORKSPACE
        return place(self.file.config, size, device, dtype, room=free, work=work)

    def _tile_count(self, size: tuple[int, int], tiles: Tiles | None) -> int:
        stride = self.spacial_compression_decode()
        return len(cut(size[0] // stride, size[1] // stride, tiles, stride)) if tiles else 1

    def spacial_compression_encode(self) -> int:
        return VAES[self.file.config.kind].spatial_stride

    def spacial_compression_decode(self) -> int:
        return VAES[self.file.config.kind].spatial_stride

    def temporal_compression_encode(self) -> int:
        return TEMPORAL_STRIDE

    def temporal_compression_decode(self) -> int:
        return TEMPORAL_STRIDE

    def throw_exception_if_invalid(self) -> None:
        """A WanVAE was checked when it was made."""

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The weights by their official names, for VAESave."""
        checkpoint = self.file.checkpoint
        with checkpoint.reading():
            return {own: fetch(checkpoint.tensor(theirs)) for own, theirs in self.file.names.items()}

    def get_ram_usage(self) -> int:
        return 0


def _tiles(height: int | None, width: int | None, overlap: int | None, unit: int) -> Tiles:
    """What ComfyUI asks for, in multiples of ``unit`` pixels; what it leaves open is 512 pixels and 64 shared ones."""
    rows, columns = (side * unit if side else 512 for side in (height, width))
    shared = 64 if overlap is None else overlap * unit
    return Tiles(rows, columns, min(shared, min(rows, columns) // 2))


def _video_latent(samples: torch.Tensor, channels: int) -> torch.Tensor:
    if samples.ndim == 5 and samples.shape[1] == channels:
        return samples
    owner = next((spec for spec in VAES.values() if samples.ndim == 5 and samples.shape[1] == spec.channels), None)
    advice = (
        f"It belongs to the {owner.kind} VAE: load {comfyui.VAES[owner.kind]}." if owner else "It is none of Wan's."
    )
    raise WanError(
        f"The latent has shape {list(samples.shape)}, but this VAE decodes "
        f"[batch, {channels}, frames, height, width]. {advice}"
    )


class VAEEncode(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreVAEEncode",
            display_name="Wan VAE Encode",
            category="Wan 2.2/latent",
            description="Encodes a video (a batch of images), a few frames at a time, so that memory does not grow "
            "with its length.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Load Wan VAE, or ComfyUI's Load VAE."),
                io.Image.Input(
                    "image",
                    tooltip="The frames of one video: 1, 5, 9, ... (4n + 1) images whose sides are multiples "
                    "of 8, or 16 for the Wan2.2 VAE.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, vae: Any, image: torch.Tensor) -> io.NodeOutput:
        image = pictures(image, "image")
        latent_frames(len(image))
        _check_sides(image, vae.spacial_compression_encode())
        with host.cancellable(getattr(vae, "first_stage_model", None)):
            return io.NodeOutput({"samples": vae.encode(image)})


def _check_sides(image: torch.Tensor, stride: int) -> None:
    _, height, width, _ = image.shape
    if height % stride or width % stride:
        nearest = "x".join(str(max(round(side / stride), 1) * stride) for side in (width, height))
        raise WanError(
            f"The images are {width}x{height}; this VAE needs multiples of {stride}. The nearest size is "
            f"{nearest}: resize or crop them first."
        )


class VAEDecode(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreVAEDecode",
            display_name="Wan VAE Decode",
            category="Wan 2.2/latent",
            description="Decodes a latent to a video (a batch of images), a few frames at a time, so that device "
            "memory does not grow with its length; in tiles where frames are too large for it.",
            inputs=[
                io.Vae.Input("vae", tooltip="From Load Wan VAE, or ComfyUI's Load VAE; of the model's kind."),
                io.Latent.Input("samples", tooltip="The latent of one or several videos."),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=32,
                    optional=True,
                    tooltip="Side of the tiles in pixels. 0: whole frames where they fit into the device's memory, "
                    "else the largest tiles that do.",
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=1024,
                    step=16,
                    optional=True,
                    tooltip="What neighbouring tiles share, in pixels. More hides seams better and takes longer.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images")],
        )

    @classmethod
    def execute(cls, vae: Any, samples: dict, tile_size: int = 0, overlap: int = 64) -> io.NodeOutput:
        latent = _video_latent(samples["samples"], getattr(vae, "latent_channels", samples["samples"].shape[1]))
        with host.cancellable(getattr(vae, "first_stage_model", None)):
            if tile_size:
                stride = vae.spacial_compression_decode()
                side = max(1, tile_size // stride)
                images = vae.decode_tiled(latent, tile_x=side, tile_y=side, overlap=min(overlap // stride, side // 2))
            else:
                images = vae.decode(latent)
        return io.NodeOutput(images.reshape(-1, *images.shape[-3:]))
