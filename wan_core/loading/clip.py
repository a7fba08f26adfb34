"""A CLIP vision encoder from a file."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeAlias, cast

import torch

from ..dtypes import resolve_dtype
from ..files.checkpoint import Checkpoint
from ..files.marks import TensorInfo
from ..layouts import clip as layout
from ..layouts.detect import find
from ..models.clip.vit import ClipConfig, ClipVision
from ..quant.base import Packed
from .build import Rules, load_strict
from .file import ModelFile, Understood, read_file

ClipFile: TypeAlias = ModelFile[ClipConfig]


def read_clip(path: str | Path) -> ClipFile:
    """Read a CLIP vision model's header.

    Raises:
        WanError: not there, damaged, or something else than Wan's CLIP.
    """
    return read_file(path, understand_clip)


def understand_clip(checkpoint: Checkpoint) -> Understood[ClipConfig]:
    """Dimensions; our key -> the checkpoint's for every tensor that is used.

    Raises:
        WanError: see ``read_clip``.
    """
    found = find("clip", checkpoint)
    return layout.read_config(checkpoint, found.names, found.place.dialect), layout.used(found.names), ()


def build_clip(
    file: ClipFile, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> ClipVision:
    """The encoder with its weights on the device; arguments as in ``load_clip_vision``."""
    dtype = clip_dtype(file, device, dtype)
    with torch.device("meta"):
        encoder = ClipVision(file.config)
    tensors = cast(Checkpoint, _FlatEmbeddings(file.checkpoint))  # as far as load_strict asks
    rules = Rules(keep_float32=lambda key: "norm" in key)
    load_strict(encoder, tensors, file.names, device=device, dtype=dtype, rules=rules)
    return encoder


def clip_dtype(file: ClipFile, device: torch.device | str, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype to compute in: by default half precision on a GPU, as the official code, else float32."""
    if dtype in (None, "auto"):
        return torch.float32 if torch.device(device).type == "cpu" else torch.float16
    return resolve_dtype(dtype, device, file.checkpoint.dtype)


def load_clip_vision(
    path: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> ClipVision:
    """Load the picture half of Wan2.1's CLIP, ViT-H/14.

    Args:
        path: ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``, ComfyUI's ``clip_vision_h.safetensors``, or
            diffusers' ``image_encoder/`` folder.
        dtype: to compute in; None means float16 on a GPU, as the official code, else float32.

    Returns:
        ``encoder(images [B, 3, H, W] in -1..1, of any size) -> [B, 257, 1280]``, float32; the pictures are prepared as
        the official code does (stretched to a square, bicubic without antialiasing).

    Raises:
        WanError: no such file, a broken one, or one without this encoder.
    """
    return build_clip(read_clip(path), device=device, dtype=dtype)


class _FlatEmbeddings:
    """A checkpoint whose class and position embeddings have no leading dimensions of 1, as one dialect writes them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path = checkpoint.path
        self.tensors = {key: self._flat(info) for key, info in checkpoint.tensors.items()}

    def tensor(self, key: str) -> torch.Tensor:
        return self._checkpoint.tensor(key).reshape(self.tensors[key].shape)

    def reading(self) -> AbstractContextManager[None]:
        return self._checkpoint.reading()

    def packed(self, key: str) -> Packed:
        return self._checkpoint.packed(key)

    @staticmethod
    def _flat(info: TensorInfo) -> TensorInfo:
        from dataclasses import replace

        shape = tuple(info.shape)
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        return replace(info, shape=shape) if len(shape) < len(info.shape) else info
