"""What models compute with, beside their weights: found by tracing the real modules on the meta device.

Nothing here is a formula that could differ from the code it speaks of. Numbers are kept, for a trace takes a tenth of a
second. Kernels' own workspace is not seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, cast

import torch

from .. import kernels
from ..config import TEMPORAL_STRIDE, TEXT_LENGTH, Architecture, VAEConfig
from ..models.dit.attention import WHOLE
from ..models.dit.dit import CrossAttention, TextStates, WanDiT, keeps_float32, unpatchify
from ..models.dit.features import feature_of
from ..models.dit.layers import PerSegment
from ..models.dit.nag import Nag
from .budget import Budget
from .tracing import peak_bytes

if TYPE_CHECKING:
    from ..models.clip.vit import ClipConfig
    from ..models.text.umt5 import TextConfig

_MOST_TOKENS, _MOST_VIDEOS = 131072, 4  # that are traced; memory grows evenly from half of that on


def dit_activations(
    config: Architecture,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    fused: bool = False,
    whole_attention: bool = False,
    against: bool = False,
    compiled: bool = False,
) -> int:
    """The peak of a call: inside a block, or where its tokens become a velocity; with the rotation table.

    Args:
        fused: with the pack's own kernels, which make no float32 copies.
        whole_attention: self-attention answers for all tokens at once (``takes_whole``); what its kernels take for
            themselves, such as queries and keys in int8, is counted as one copy of the tokens.
        against: a text is heard against another one (``models.dit.nag``).
        compiled: blocks write over nothing and take nothing apart; a compiler, which joins steps, takes no more.
    """
    how = {"fused": fused, "whole_attention": whole_attention, "against": against, "compiled": compiled}
    trace = partial(_traced, config, dtype=dtype, **how)

    def of_videos(count: int) -> int:
        return _further(lambda length: trace(count, length), tokens, _MOST_TOKENS)

    return _further(of_videos, batch, _MOST_VIDEOS)


def _further(measured: Callable[[int], int], size: int, most: int) -> int:
    """What is measured up to a size, and beyond on the straight line through its last half."""
    if size <= most:
        return measured(size)
    middle, end = measured(most // 2), measured(most)
    return end + (end - middle) * (size - most) // (most - most // 2)


@lru_cache(maxsize=64)
def _traced(
    config: Architecture,
    batch: int,
    tokens: int,
    *,
    dtype: torch.dtype,
    fused: bool,
    whole_attention: bool,
    against: bool = False,
    compiled: bool = False,
) -> int:
    with torch.device("meta"), kernels.assumed(fused):
        dit = WanDiT(replace(config, layers=1)).requires_grad_(False)
        for name, parameter in dit.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if keeps_float32(name) else dtype)
        dit.attend = _whole if whole_attention else _in_parts
        table = torch.empty(tokens, 1, config.dim // config.heads // 2, 2)
        embedded = torch.empty(batch, TEXT_LENGTH, config.dim, dtype=dtype)
        inputs = tuple(feature_of(feature).example(feature, batch) for feature in config.features)
        text = TextStates(embedded, 1, keep=False, branches=dit.branches(inputs, batch))
        text = text.against(text, Nag(11.0, 2.5, 0.25)) if against else text
        segments = ((0, tokens),)
        six = PerSegment(segments, torch.empty(batch, 1, 6, config.dim))
        embedded_time = PerSegment(segments, torch.empty(batch, 1, config.dim))

        def block() -> torch.Tensor:
            x = torch.empty(batch, tokens, config.dim, dtype=dtype)
            attention = cast(CrossAttention, dit.blocks[0].cross_attn)
            sources = text.of_block(0, attention)
            with torch.set_grad_enabled(compiled):  # nothing wants gradients: only the formulas are theirs
                return dit.blocks[0](x, six, table, sources, dit.attend)

        def head() -> torch.Tensor:
            x = torch.empty(batch, tokens, config.dim, dtype=dtype)
            return unpatchify(dit.head(x, embedded_time), (1, 1, tokens))

        return max(peak_bytes(block), peak_bytes(head)) + table.nbytes


def _in_parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
    return torch.empty_like(q)


def _whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, kind: str) -> torch.Tensor:
    if kind != "self":  # the text is always heard in parts
        return torch.empty_like(q)
    rounded = torch.empty_like(q)
    answer = torch.empty_like(q)
    del rounded
    return answer


setattr(_whole, WHOLE, True)


@lru_cache(maxsize=16)
def text_activations(config: TextConfig, dtype: torch.dtype, tokens: int = TEXT_LENGTH) -> int:
    """The peak of encoding one prompt of so many tokens."""
    from ..models.text.umt5 import Block, Packing
    from ..quant.scratch import Scratch

    with torch.device("meta"):
        block = Block(config).to(dtype)
        packing = Packing((tokens,), {tokens: torch.empty(tokens, tokens, dtype=torch.int64)}, Scratch())
        return peak_bytes(lambda: block(torch.empty(tokens, config.dim, dtype=dtype), packing))


@lru_cache(maxsize=16)
def clip_activations(config: ClipConfig, dtype: torch.dtype, side: int = 2048) -> int:
    """The peak of encoding one picture of so many pixels a side."""
    from ..models.clip.vit import ClipVision

    with torch.device("meta"):
        clip = ClipVision(config).to(dtype)
        return peak_bytes(lambda: clip(torch.empty(1, 3, side, side)))


Work = Literal["encode", "decode"]


@lru_cache(maxsize=64)
def vae_budget(
    config: VAEConfig, height: int, width: int, dtype: torch.dtype = torch.float32, work: Work = "decode"
) -> Budget:
    """What an autoencoder needs for frames of this size (pixels; or for one tile of it), however many they are: the
    third latent frame is as hungry as any later one.
    """
    from ..loading.vae import VAE_CLASSES

    with torch.device("meta"):
        vae = VAE_CLASSES[config.kind](config).to(dtype)
        stride = vae.spec.spatial_stride

        def walk() -> None:
            if work == "encode":
                video = torch.empty(1, 3, 2 * TEMPORAL_STRIDE + 1, height, width)
                deque(vae.encode_chunks([video]), maxlen=0)
            else:
                latent = torch.empty(1, config.channels, 3, height // stride, width // stride)
                deque(vae.decode_chunks(latent), maxlen=0)

        return Budget(sum(p.nbytes for p in vae.parameters()), activations=peak_bytes(walk))
