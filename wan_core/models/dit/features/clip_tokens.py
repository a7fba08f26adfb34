"""Pictures as CLIP tokens: Wan2.1 I2V and FLF2V, and the Fun models of Wan2.1.

The tokens of one picture (257) or two (514, with learned positions) stand before the text. They have keys and values of
their own in every block (``k_img``, ``v_img``); the queries are the text's, and the two answers are added (official
``wan/modules/model.py``, ``MLPProj`` and ``WanI2VCrossAttention``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ....config import FeatureConfig
from ....errors import WanError
from ..layers import Linear, RMSNorm

PICTURE_TOKENS = 257  # of one picture: the class token and 16 x 16 patches
_EPS = 1e-5  # of the norms around the tokens; the transformer's own are finer


@dataclass(frozen=True)
class ClipTokensConfig(FeatureConfig):
    """``width`` of a CLIP feature; ``positions``: learned ones, 514 in FLF2V and 0 elsewhere."""

    name: ClassVar[str] = "clip_tokens"
    width: int = 1280
    positions: int = 0


@dataclass(frozen=True, eq=False)
class ClipTokens:
    """An input: the CLIP features of one picture, or of two one behind the other.

    Attributes:
        features: [B, 257 or 514, 1280], the stream after all but the last of CLIP's blocks.
    """

    features: torch.Tensor


CONFIG = ClipTokensConfig
NORMS = ("img_emb.proj.0.", "img_emb.proj.4.")
DIFFUSERS = [
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("blocks.{a}.attn2.add_k_proj", "blocks.{a}.cross_attn.k_img"),
    ("blocks.{a}.attn2.add_v_proj", "blocks.{a}.cross_attn.v_img"),
    ("blocks.{a}.attn2.norm_added_k", "blocks.{a}.cross_attn.norm_k_img"),
]


def detect(shapes: Mapping[str, tuple[int, ...]]) -> ClipTokensConfig | None:
    norm = shapes.get("img_emb.proj.0.weight")
    if not norm:
        return None
    positions = shapes.get("img_emb.emb_pos", (1, 0))
    return ClipTokensConfig(norm[0], positions[1])


def attach(dit: nn.Module, config: ClipTokensConfig) -> None:
    dim, eps = dit.config.dim, dit.config.eps
    dit.img_emb = ImageEmbedding(config, dim)
    for block in dit.blocks:
        attention = block.cross_attn
        attention.k_img, attention.v_img = Linear(dim, dim), Linear(dim, dim)
        attention.norm_k_img = RMSNorm(dim, eps)


def branch(dit: nn.Module, inputs: tuple, batch: int) -> ImageBranch:
    """The tokens of the picture; of a picture of zeros where none is given, as VideoX-Fun does, never the text's."""
    given = next((one.features for one in inputs if isinstance(one, ClipTokens)), None)
    if given is None:
        given = torch.zeros(1, PICTURE_TOKENS, dit.config.feature(ClipTokensConfig).width)
    tokens = dit.img_emb(given.to(dit.device, dit.dtype))
    return ImageBranch(tokens.expand(batch, *tokens.shape[1:]))


def context_tokens(config: ClipTokensConfig) -> int:
    return max(config.positions, PICTURE_TOKENS)


def example(config: ClipTokensConfig, batch: int) -> ClipTokens:
    return ClipTokens(torch.empty(batch, context_tokens(config), config.width))


def check_features(features: torch.Tensor, config: ClipTokensConfig) -> None:
    """Whether a model can hear these CLIP features.

    Raises:
        WanError: they are not [B, N, width], or more tokens than the model has positions for.
    """
    if features.ndim != 3 or features.shape[-1] != config.width:
        raise WanError(
            f"The CLIP features have shape {list(features.shape)}; this model takes [B, N, {config.width}]. "
            "Use the CLIP vision model of Wan2.1, ViT-H/14 (clip_vision_h.safetensors)."
        )
    if config.positions and features.shape[1] > config.positions:
        raise WanError(
            f"The CLIP features hold {features.shape[1]} tokens, but this model has positions for "
            f"{config.positions}: a start and an end picture."
        )


class ImageBranch:
    """What every block hears of the pictures."""

    kind = "image"

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens

    def keys_values(self, attention: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        keys = attention.norm_k_img(attention.k_img(self.tokens))
        return tuple(part.unflatten(-1, (attention.heads, -1)) for part in (keys, attention.v_img(self.tokens)))


class ImageEmbedding(nn.Module):
    """CLIP features [B, N, width] -> tokens [B, N, dim]."""

    def __init__(self, config: ClipTokensConfig, dim: int):
        super().__init__()
        self.config = config
        self.proj = nn.Sequential(
            _Norm(config.width, eps=_EPS),
            Linear(config.width, config.width),
            nn.GELU(),
            Linear(config.width, dim),
            _Norm(dim, eps=_EPS),
        )
        if config.positions:
            self.emb_pos = nn.Parameter(torch.empty(1, config.positions, config.width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        check_features(features, self.config)
        if self.config.positions:
            features = features + self.emb_pos[:, : features.shape[1]].to(features)
        return self.proj(features)


class _Norm(nn.LayerNorm):
    """Layer norm in float32 whatever the stream is in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)
