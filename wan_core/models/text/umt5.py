"""The umT5 text encoder: gated-GELU T5 whose every layer has a relative position bias of its own.

Sources: the official ``wan/modules/t5.py``; Chung et al. 2023 (UniMax, umT5), Raffel et al. 2020 (T5), Shazeer
2020 (gated GELU).
Parameter names are the official checkpoint's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ...config import TextConfig
from ...mapped import rows_of
from ...quant.linear import QuantEmbedding
from ...quant.scratch import Scratch


@dataclass(frozen=True)
class Packing:
    """What the blocks need to know of one batch: prompts lie end to end, without padding."""

    lengths: tuple[int, ...]  # tokens of each prompt
    buckets: dict[int, Tensor]  # of each length that occurs
    scratch: Scratch


class Linear(nn.Module):
    """A matrix without bias that may lie elsewhere, or in another dtype, than the numbers it is applied to.

    So a memory-mapped bfloat16 file serves a float32 computation without a float32 copy of the model.
    """

    may_stay_in_file = True

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor, scratch: Scratch) -> Tensor:
        return F.linear(x, scratch.fitted(self.weight, like=x))


class Embedding(nn.Module):
    """A table of rows; only the rows asked for leave the table's own device and dtype."""

    may_stay_in_file = True
    packed_kind = QuantEmbedding  # what stands here when the table is in a quantised format

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, ids: Tensor, like: Tensor) -> Tensor:
        return rows_of(self.weight, ids.to(self.weight.device)).to(device=like.device, dtype=like.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32, rounded to the weight's dtype before the weight is applied."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (x * scale).to(self.weight.dtype)


class _Table(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class RelativeBias(nn.Module):
    """One learnt number per head and bucket of distance."""

    def __init__(self, buckets: int, heads: int) -> None:
        super().__init__()
        self.embedding = _Table(buckets, heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """[L, L] bucket numbers -> [heads, L, L]."""
        return rearrange(self.embedding.weight[buckets], "q k h -> h q k")


class Attention(nn.Module):
    """Self-attention within each prompt of a packed batch; T5 does not scale the scores."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = Linear(config.dim, config.attention_dim)
        self.k = Linear(config.dim, config.attention_dim)
        self.v = Linear(config.dim, config.attention_dim)
        self.o = Linear(config.attention_dim, config.dim)

    def forward(self, x: Tensor, packing: Packing, biases: Mapping[int, Tensor]) -> Tensor:
        """x [N, D] with N tokens in all; biases [heads, L, L] for each length L that occurs."""
        projected = (layer(x, packing.scratch) for layer in (self.q, self.k, self.v))
        q, k, v = (rearrange(t, "n (h d) -> h n d", h=self.heads).split(packing.lengths, dim=1) for t in projected)
        mixed = [_attend(*one, biases[one[0].shape[1]]) for one in zip(q, k, v, strict=True)]
        return self.o(rearrange(torch.cat(mixed, dim=1), "h n d -> n (h d)"), packing.scratch)


class GELU(nn.Module):
    """The tanh approximation, every step rounded to the dtype of x.

    PyTorch's own rounds once at the end; in half precision the official model's numbers come from these roundings.
    """

    def forward(self, x: Tensor) -> Tensor:
        inner = x + 0.044715 * x.pow(3)
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * inner))


class FeedForward(nn.Module):
    """GELU(tanh)-gated feed-forward layer."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(Linear(config.dim, config.ffn_dim), GELU())
        self.fc1 = Linear(config.dim, config.ffn_dim)
        self.fc2 = Linear(config.ffn_dim, config.dim)

    def forward(self, x: Tensor, scratch: Scratch) -> Tensor:
        project, activation = self.gate
        return self.fc2(self.fc1(x, scratch) * activation(project(x, scratch)), scratch)


class Block(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = RelativeBias(config.buckets, config.heads)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        biases = {length: self.pos_embedding(buckets) for length, buckets in packing.buckets.items()}
        x = clamp_float16(x + self.attn(self.norm1(x), packing, biases))
        return clamp_float16(x + self.ffn(self.norm2(x), packing.scratch))


class Umt5Encoder(nn.Module):
    """Token ids to text states.

    Padding is never computed: the prompts of a batch are packed into one row of tokens for the matrix products and
    attend each within itself. The official encoder masks the padding instead, which gives the same numbers.
    """

    def __init__(self, config: TextConfig) -> None:
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
        x = self.token_embedding(ids[mask], like=self.norm.weight)
        packing = self._packing(mask.sum(dim=1).tolist(), x.device)
        for index, block in enumerate(self.blocks):
            if on_block is not None:
                on_block(index)
            x = block(x, packing)
        states = x.new_zeros(*ids.shape, self.config.dim)
        states[mask.to(x.device)] = self.norm(x)
        return states

    def _packing(self, lengths: list[int], device: torch.device) -> Packing:
        buckets = {n: distance_buckets(n, self.config.buckets, self.config.max_distance) for n in set(lengths)}
        return Packing(tuple(lengths), {n: table.to(device) for n, table in buckets.items()}, Scratch())


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
