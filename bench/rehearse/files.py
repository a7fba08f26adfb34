"""Checkpoints of the real shapes that take no space on the disk, and what a run needs beside them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from bench.sparse import shapes_of, write_sparse
from wan_core.config import VARIANTS
from wan_core.files.gguf import MAGIC, type_numbers
from wan_core.layouts import text as text_keys
from wan_core.loading.clip import ClipFile, read_clip
from wan_core.loading.dit import DiTFile, read_dit
from wan_core.loading.published import TEXT_CONFIG, VAE_CONFIGS, architecture_of
from wan_core.loading.text import TextFile, read_text_encoder
from wan_core.loading.vae import VAE_CLASSES, VAEFile, read_vae
from wan_core.models.clip.vit import ClipConfig, ClipVision
from wan_core.models.dit.dit import WanDiT
from wan_core.models.text.tokenizer import load_tokenizer
from wan_core.models.text.umt5 import Umt5Encoder
from wan_core.models.vae.taehv import TinyConfig, TinyDecoder, published_key
from wan_core.quant.gguf import DECODERS, block_type

ROOT = Path(__file__).resolve().parents[2]
_ALIGNMENT = 32  # bytes, of tensors in a GGUF file

ARCHITECTURES = {task: architecture_of(VARIANTS[task]) for task in VARIANTS}
_CLIP = ClipConfig(1280, 5120, 16, layers=3, patch=14, positions=257, fused=True)  # of 32 layers
_TAEHV = {16: TinyConfig(16, (256, 128, 64, 64), (1, 2, 2), 1), 48: TinyConfig(48, (256, 128, 64, 64), (1, 2, 2), 2)}


class Shelf:
    """A folder of such files, each made when it is first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    def dit(self, task: str, layers: int, *, expert: str = "high", stored: str = "bfloat16") -> DiTFile:
        """``stored``: a dtype, or a type of GGUF's for the matrices."""
        shapes = shapes_of(lambda: WanDiT(replace(ARCHITECTURES[task], layers=layers)))
        name = f"{task}_{expert}_noise_{layers}_{stored}"
        if stored in DECODERS:
            return read_dit(self._made(f"{name}.gguf", lambda file: write_sparse_gguf(file, shapes, stored)))
        dtype = getattr(torch, stored)
        return read_dit(self._made(f"{name}.safetensors", lambda file: write_sparse(file, shapes, dtype)))

    def vae(self, task: str) -> VAEFile:
        kind = VARIANTS[task].vae
        shapes = shapes_of(lambda: VAE_CLASSES[kind](VAE_CONFIGS[kind]))
        return read_vae(self._made(f"{kind}.safetensors", lambda file: write_sparse(file, shapes, torch.float32)))

    def text(self, layers: int) -> TextFile:
        shapes = shapes_of(lambda: Umt5Encoder(replace(TEXT_CONFIG, layers=layers)))
        file = self._made(f"umt5_{layers}.safetensors", lambda file: write_sparse(file, shapes))
        with safe_open(ROOT / "nano/text_encoders/nano_umt5.safetensors", "pt") as nano:
            spiece = bytes(nano.get_tensor(text_keys.SPIECE_MODEL).tolist())
        return read_text_encoder(file, load_tokenizer(spiece))

    def clip(self) -> ClipFile:
        shapes = {f"visual.{key}": shape for key, shape in shapes_of(lambda: ClipVision(_CLIP)).items()}
        last = f"visual.transformer.{_CLIP.layers - 2}."  # of the file; the encoder leaves it out
        more = {key.replace(last, f"visual.transformer.{_CLIP.layers - 1}."): shape for key, shape in shapes.items()}
        return read_clip(self._made("clip.safetensors", lambda file: write_sparse(file, shapes | more, torch.float16)))

    def lora(self, task: str, layers: int, rank: int = 32) -> Path:
        """Of every matrix of the blocks."""
        shapes = {}
        for key, shape in shapes_of(lambda: WanDiT(replace(ARCHITECTURES[task], layers=layers))).items():
            if key.startswith("blocks.") and key.endswith(".weight") and len(shape) == 2:
                name = f"diffusion_model.{key.removesuffix('.weight')}"
                shapes |= {f"{name}.lora_A.weight": (rank, shape[1]), f"{name}.lora_B.weight": (shape[0], rank)}
        return self._made(f"{task}_{layers}_lora.safetensors", lambda file: write_sparse(file, shapes))

    def tiny_decoder(self, channels: int) -> Path:
        shapes = shapes_of(lambda: TinyDecoder(_TAEHV[channels]))
        theirs = {published_key(key): shape for key, shape in shapes.items()}
        return self._made(f"taehv_{channels}.safetensors", lambda file: write_sparse(file, theirs, torch.float16))

    def picture(self, size: tuple[int, int] = (1280, 720)) -> Path:
        return self._made("picture.png", lambda file: Image.new("RGB", size, (90, 120, 60)).save(file))

    def _made(self, name: str, make) -> Path:
        file = self.folder / name
        if not file.exists():
            make(file)
        return file


def write_sparse_gguf(file: Path, shapes: Mapping[str, tuple[int, ...]], blocks: str) -> None:
    """A GGUF file of zeros: the matrices of the blocks of a type, all else in float32."""
    entries, end = [], 0
    weights, size, *_ = block_type(blocks)
    for key, shape in shapes.items():
        count = torch.Size(shape).numel()
        packed = key.startswith("blocks.") and key.endswith(".weight") and len(shape) == 2
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        name = struct.pack("<Q", len(key)) + key.encode()
        entries.append(name + dims + struct.pack("<IQ", type_numbers()[blocks if packed else "F32"], end))
        end += count // weights * size if packed else 4 * count
        end += -end % _ALIGNMENT
    field = b"general.architecture"
    head = MAGIC + struct.pack("<IQQ", 3, len(entries), 1)
    head += struct.pack("<Q", len(field)) + field + struct.pack("<IQ", 8, 3) + b"wan" + b"".join(entries)
    with file.open("wb") as stream:
        stream.write(head + bytes(-len(head) % _ALIGNMENT))
        stream.truncate(stream.tell() + end)
