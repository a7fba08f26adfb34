"""The picture half of open-clip's XLM-RoBERTa ViT-H/14, from which Wan2.1 takes its image tokens.

Official ``wan/modules/clip.py`` (``VisionTransformer`` with ``use_31_block``): the stream after all blocks but the
last, without the final norm and projection. Module names are the checkpoint's own, of either dialect.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in 0..1, as CLIP was trained
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipConfig:
    """Dimensions of a CLIP vision transformer, all read from the checkpoint.

    Attributes:
        layers: of the checkpoint; the last one is not used.
        positions: tokens of a picture, with the class token.
        fused: queries, keys and values in one matrix, as the official file has them.
    """

    dim: int
    mlp_dim: int
    heads: int
    layers: int
    patch: int
    positions: int
    fused: bool
    eps: float = 1e-5

    @property
    def size(self) -> int:
        """Pixels of a side of the square that the encoder sees."""
        return self.patch * round((self.positions - 1) ** 0.5)


class ClipVision(nn.Module):
    """Pictures to tokens."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_embedding = nn.Parameter(torch.empty(dim))
        self.pos_embedding = nn.Parameter(torch.empty(config.positions, dim))
        self.patch_embedding = nn.Conv2d(3, dim, config.patch, stride=config.patch, bias=False)
        self.pre_norm = Norm(dim, config.eps)
        self.transformer = nn.ModuleList([Block(config) for _ in range(config.layers - 1)])

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1, of any size -> [B, positions, dim], float32."""
        weight = self.patch_embedding.weight
        pixels = prepare(images.to(weight.device), self.config.size).to(weight.dtype)
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_embedding.expand(len(x), 1, -1), x], dim=1) + self.pos_embedding
        x = self.pre_norm(x)
        for block in self.transformer:
            x = block(x)
        return x.float()


def prepare(images: Tensor, size: int) -> Tensor:
    """Pictures [B, 3, H, W] in -1..1 as the encoder was given them: [B, 3, size, size], normalised.

    Stretched to a square by a bicubic filter without antialiasing, as the official ``CLIPModel.visual`` does; other
    programs crop, or smooth first.
    """
    square = F.interpolate(images.float(), size=(size, size), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (square * 0.5 + 0.5 - mean) / std


class Norm(nn.LayerNorm):
    """Layer norm, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.heads, dim = config.heads, config.dim
        if config.fused:
            self.to_qkv = nn.Linear(dim, dim * 3)
        else:
            self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_qkv(x).chunk(3, dim=-1) if hasattr(self, "to_qkv") else (self.q(x), self.k(x), self.v(x))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.norm1 = Norm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = Norm(config.dim, config.eps)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.mlp_dim), nn.GELU(), nn.Linear(config.mlp_dim, config.dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
