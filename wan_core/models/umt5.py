"""The umT5 text encoder: gated-GELU T5 whose every layer has a relative position bias of its own.

Sources: the official ``wan/modules/t5.py``; Chung et al. 2023 (UniMax, umT5), Raffel et al. 2020 (T5), Shazeer
2020 (gated GELU).
Parameter names are the official checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import TextConfig


class Linear(nn.Module):
    """A matrix without bias that may lie elsewhere, or in another dtype, than the numbers it is applied to.

    A matrix that already fits is used as it is; a memory-mapped one is read and cast for the one product, so a
    bfloat16 file serves a float32 computation without a float32 copy of the model.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(device=x.device, dtype=x.dtype))


class Embedding(nn.Module):
    """A table of rows; only the rows asked for leave the table's own device and dtype."""

    def __init__(self, rows: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor, like: Tensor) -> Tensor:
        return self.weight[ids.to(self.weight.device)].to(device=like.device, dtype=like.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded to the weight's dtype before the weight is applied."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class RelativeBias(nn.Module):
    """One learnt number per head and bucket of distance."""

    def __init__(self, buckets: int, heads: int):
        super().__init__()
        self.embedding = nn.Module()
        self.embedding.weight = nn.Parameter(torch.empty(buckets, heads))

    def forward(self, buckets: Tensor) -> Tensor:
        """[L, L] bucket numbers -> [heads, L, L]."""
        return rearrange(self.embedding.weight[buckets], "q k h -> h q k")


class Attention(nn.Module):
    """Self-attention within each prompt of a packed batch; T5 does not scale the scores."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.dim, config.attention_dim)
        self.k = Linear(config.dim, config.attention_dim)
        self.v = Linear(config.dim, config.attention_dim)
        self.o = Linear(config.attention_dim, config.dim)

    def forward(self, x: Tensor, lengths: Sequence[int], biases: Mapping[int, Tensor]) -> Tensor:
        """x [N, D] with N = sum(lengths) -> [N, D]."""
        q, k, v = (rearrange(layer(x), "n (h d) -> h n d", h=self.heads) for layer in (self.q, self.k, self.v))
        prompts = zip(*(t.split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
        mixed = [_attend(*one, biases[length]) for one, length in zip(prompts, lengths, strict=True)]
        return self.o(rearrange(torch.cat(mixed, dim=1), "h n d -> n (h d)"))


class FeedForward(nn.Module):
    """GELU(tanh)-gated feed-forward layer."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate = nn.Sequential(Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"))
        self.fc1 = Linear(config.dim, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class Block(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativeBias(config.buckets, config.heads)

    def forward(self, x: Tensor, lengths: Sequence[int], buckets: Mapping[int, Tensor]) -> Tensor:
        biases = {length: self.pos_embedding(table) for length, table in buckets.items()}
        x = clamp_float16(x + self.attn(self.norm1(x), lengths, biases))
        return clamp_float16(x + self.ffn(self.norm2(x)))


class Umt5Encoder(nn.Module):
    """Token ids to text states.

    Padding is never computed: the prompts of a batch are packed into one row of tokens for the matrix products and
    attend each within itself. The official encoder masks the padding instead, which gives the same numbers.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.eps)

    def forward(self, ids: Tensor, mask: Tensor, *, on_block: Callable[[int], None] | None = None) -> Tensor:
        """Encode a batch.

        Args:
            ids: [B, L] integers.
            mask: [B, L], nonzero for real tokens, which come first in each row.
            on_block: called with the index of each block before it runs; may raise to cancel.

        Returns:
            [B, L, D] in the encoder's compute dtype (that of its norms), zero where the mask is.
        """
        mask = mask.bool()
        lengths = mask.sum(dim=1).tolist()
        x = self.token_embedding(ids[mask], like=self.norm.weight)
        buckets = {length: self._buckets(length).to(x.device) for length in set(lengths)}
        for index, block in enumerate(self.blocks):
            if on_block is not None:
                on_block(index)
            x = block(x, lengths, buckets)
        states = x.new_zeros(*ids.shape, self.config.dim)
        states[mask.to(x.device)] = self.norm(x)
        return states

    def _buckets(self, length: int) -> Tensor:
        return distance_buckets(length, self.config.buckets, self.config.max_distance)


@lru_cache(maxsize=8)
def distance_buckets(length: int, buckets: int, max_distance: int) -> Tensor:
    """The bucket of key position minus query position, [length, length] int64 on the CPU.

    Half of the buckets are for keys before the query, half for keys after it. In each half the first half counts
    single steps and the rest grows logarithmically up to ``max_distance``. The rounding of the logarithm is that of
    float32, as everywhere T5 is computed.
    """
    positions = torch.arange(length)
    offset = positions[None, :] - positions[:, None]
    half = buckets // 2
    exact = half // 2
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


def clamp_float16(x: Tensor) -> Tensor:
    """Bring infinities of float16 back into range; other dtypes pass unchanged."""
    if x.dtype is not torch.float16:
        return x
    largest = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), largest - 1000, largest).to(x.dtype)
    return x.clamp(-limit, limit)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """[H, L, d] each, bias [H, L, L] -> [H, L, d]; softmax in float32, whatever the dtype of the scores."""
    scores = (q @ k.transpose(-1, -2)).add_(bias)
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v
