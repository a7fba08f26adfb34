"""The Wan diffusion transformer (official ``wan/modules/model.py``; arXiv 2503.20314).

Module names are the official checkpoint's key names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ...config import PATCH, Architecture
from ...errors import Hint, WanError
from .attention import ORDER, WHOLE, Attend, sdpa
from .features import FEATURES, Branch, feature_of
from .layers import (
    SLICE,
    Linear,
    Modulation,
    PerSegment,
    RMSNorm,
    add_gated,
    layer_norm,
    linear_float32,
    linear_gelu,
    modulate,
    modulated_norm,
    out_of_place,
    sinusoid,
)
from .nag import Nag, Opposite
from .rope import RopeTables, rotate
from .runner import BlockRunner, Given

Segments = list[tuple[int, int, Modulation]]
TOKENS_AT_ONCE = 8192  # of a long video, where a whole second copy of the tokens would not fit


def over(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``layer(x)`` for x [B, L, ...]; of a long x in inference, written over x some tokens at a time."""
    if out_of_place() or x.shape[1] <= TOKENS_AT_ONCE:
        return layer(x)
    for part in x.split(TOKENS_AT_ONCE, dim=1):
        part.copy_(layer(part))
    return x


class TextStates:
    """A prompt as one DiT sees it: the embedded text, and each block's keys and values, computed when first needed.

    ``branches`` are other sources that cross-attention hears beside the text, such as a picture's CLIP tokens.
    ``keep=False`` computes keys and values anew on every call, for devices where they do not fit.
    """

    def __init__(self, embedded: torch.Tensor, layers: int, *, keep: bool = True, branches: tuple[Branch, ...] = ()):
        self.embedded = embedded  # [B, L, dim]
        self.keep = keep
        self.branches = branches
        self._of_block: list[tuple[Source, ...] | None] = [None] * layers

    def __len__(self) -> int:
        return len(self.embedded)

    def of_block(self, index: int, attention: CrossAttention) -> tuple[Source, ...]:
        """The text's keys and values in a block, then those of each branch."""
        if self._of_block[index] is not None:
            return self._of_block[index]
        states = (
            Source("text", *attention.keys_values(self.embedded)),
            *(Source(branch.kind, *branch.keys_values(attention)) for branch in self.branches),
        )
        if self.keep:
            self._of_block[index] = states
        return states

    def against(self, negative: TextStates, nag: Nag) -> OpposedStates:
        """These states, their text heard against another one's; both keep what they have computed."""
        return OpposedStates(self, negative, nag)


class OpposedStates(TextStates):
    """A prompt heard against another one within attention; of the other one the text alone."""

    def __init__(self, own: TextStates, negative: TextStates, nag: Nag):
        super().__init__(own.embedded, 0, keep=False, branches=own.branches)
        self.own, self.negative, self.nag = own, negative, nag

    def of_block(self, index: int, attention: CrossAttention) -> tuple[Source, ...]:
        text, *branches = self.own.of_block(index, attention)
        other = self.negative.of_block(index, attention)[0]
        return text._replace(opposite=Opposite(other.keys, other.values, self.nag)), *branches


class Source(NamedTuple):
    """What cross-attention hears: of a kind, its keys and its values [B, L, heads, head_dim], and what it is heard
    against."""

    kind: str
    keys: torch.Tensor
    values: torch.Tensor
    opposite: Opposite | None = None


class SelfAttention(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.heads = config.heads
        for name in "qkvo":
            setattr(self, name, Linear(config.dim, config.dim))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def queries_keys_values(
        self, x: torch.Tensor, rope: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens [B, L, dim] -> rotated queries, rotated keys and values, each [B, L, heads, head_dim].

        May overwrite x, with the values.
        """
        q = self._rotated(self.norm_q, self.q(x), rope)
        k = self._rotated(self.norm_k, self.k(x), rope)
        return q, k, split_heads(over(self.v, x), self.heads)

    def _rotated(self, norm: RMSNorm, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        if out_of_place():
            return rotate(split_heads(norm(x), self.heads), rope)
        return norm.apply_rotated_(x, rope, self.heads)


class CrossAttention(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.heads = config.heads
        for name in "qkvo":
            setattr(self, name, Linear(config.dim, config.dim))
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def keys_values(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Text [B, L, dim] -> keys and values [B, L, heads, head_dim]."""
        return split_heads(self.norm_k(self.k(text)), self.heads), split_heads(self.v(text), self.heads)

    def forward(self, x: torch.Tensor, sources: tuple[Source, ...], attend: Attend) -> torch.Tensor:
        """Tokens [B, L, dim] -> the sum of what they hear of each source."""
        q = self.q(x)
        q = split_heads(self.norm_q(q) if out_of_place() else self.norm_q.apply_(q), self.heads)
        first, *others = sources
        if not others and first.opposite is None:
            heard = attend(q, first.keys, first.values, kind=first.kind)
        else:  # some tokens at a time: a second whole answer would not fit
            heard = over(lambda part: _sum_of(part, sources, attend), q)
        del q
        return self.o(heard.flatten(2))


def _sum_of(q: torch.Tensor, sources: tuple[Source, ...], attend: Attend) -> torch.Tensor:
    first, *others = sources
    answer = attend(q, first.keys, first.values, kind=first.kind)
    if (opposite := first.opposite) is not None:
        answer = opposite.nag.steered(answer, attend(q, opposite.keys, opposite.values, kind=first.kind))
    for source in others:
        more = attend(q, source.keys, source.values, kind=source.kind)
        answer = answer + more if out_of_place() else answer.add_(more)
    return answer


class AffineNorm(nn.Module):
    """Layer norm with weight and bias, computed in float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer_norm(x, self.eps, self.weight.float(), self.bias.float())


class FeedForward(nn.Sequential):
    """Linear, GELU(tanh), linear; in inference a long x is overwritten bit by bit: the wide middle stays small."""

    def __init__(self, dim: int, ffn_dim: int):
        super().__init__(Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), Linear(ffn_dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if out_of_place():
            return super().forward(x)
        return over(lambda part: self[2](linear_gelu(self[0], part)), x)


class Block(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.norm3 = AffineNorm(config.dim, config.eps)
        self.ffn = FeedForward(config.dim, config.ffn_dim)
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim))

    def forward(
        self, x: torch.Tensor, timed: PerSegment, rope: torch.Tensor, sources: tuple[Source, ...], attend: Attend
    ) -> torch.Tensor:
        """Tokens [B, L, dim] -> the same; overwrites x unless ``out_of_place``.

        Args:
            timed: the six modulations of the timestep.
            sources: keys and values of the text, and of what else is heard.
        """
        attention, feed_forward = self._modulations(timed)
        # The hungriest moment: tokens, queries, keys and values. What attention answers takes the queries' place.
        q, k, v = self.self_attn.queries_keys_values(modulated_norm(x, attention, self.eps), rope)
        if getattr(attend, WHOLE, False):
            seen = attend(q, k, v, kind="self").flatten(2)
        else:
            seen = over(lambda part, k=k, v=v: attend(part, k, v, kind="self"), q).flatten(2)
        del q, k, v
        x = add_gated(x, self.self_attn.o(seen), attention)
        del seen
        heard = self.cross_attn(self.norm3(x), sources, attend)
        x = x + heard if out_of_place() else x.add_(heard)
        del heard
        return add_gated(x, self.ffn(modulated_norm(x, feed_forward, self.eps)), feed_forward)

    def _modulations(self, timed: PerSegment) -> tuple[Segments, Segments]:
        attention, feed_forward = [], []
        for start, end, e in timed.segments():  # e [B, 6, dim]
            six = (e + self.modulation.float()).chunk(6, dim=1)
            attention.append((start, end, Modulation(*six[:3])))
            feed_forward.append((start, end, Modulation(*six[3:])))
        return attention, feed_forward


class Head(nn.Module):
    def __init__(self, config: Architecture):
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_channels * PATCH[0] * PATCH[1] * PATCH[2])
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: torch.Tensor, timed: PerSegment) -> torch.Tensor:
        """Tokens [B, L, dim] -> patches [B, L, channels * 4], float32."""
        parts = []
        for start, end, e in timed.segments():  # e [B, dim]
            shift, scale = (e[:, None] + self.modulation.float()).chunk(2, dim=1)
            for part in x[:, start:end].split(SLICE, dim=1):
                parts.append(linear_float32(self.head, modulate(part.float(), shift, scale, self.eps)))
        return torch.cat(parts, dim=1)


class WanDiT(nn.Module):
    """Predicts the flow velocity (noise minus data) of a noisy latent video.

    ``attend`` is the attention backend and ``runner`` how the blocks are gone through, both replaceable after
    construction; ``swap`` brings a block's weights to the device and takes them away again (``BlockSwap``), or is None
    when all are resident. ``adaptation`` is what LoRAs did to it, or None.
    """

    def __init__(self, config: Architecture):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, dim * 6))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.layers)])
        self.head = Head(config)
        for feature in config.features:
            feature_of(feature).attach(self, feature)
        self.attend: Attend = sdpa
        self.runner = BlockRunner()
        self.rope = RopeTables(config.dim // config.heads)
        self.swap: Any = None  # memory/stream/swap.py's, further up
        self.adaptation: Any = None  # lora/apply.py's, further up

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the residual stream."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def text_states(self, context: torch.Tensor, *, keep: bool = True, inputs: tuple = ()) -> TextStates:
        """Embed text [B, L, text_dim], and what the features make of their inputs, for many calls of ``forward``.

        Raises:
            WanError: embeddings of another width than this model's.
        """
        if context.shape[-1] != self.config.text_dim:
            raise WanError(
                f"The text embedding is {context.shape[-1]} wide, but this model takes {self.config.text_dim}.",
                Hint.TEXT_ENCODER,
            )
        embedded = self.text_embedding(context.to(self.device, self.dtype))
        return TextStates(embedded, self.config.layers, keep=keep, branches=self.branches(inputs, len(embedded)))

    def branches(self, inputs: tuple, batch: int) -> tuple[Branch, ...]:
        """What this network's features add to cross-attention for these inputs."""
        made = (feature_of(config).branch(self, inputs, batch) for config in self.config.features)
        return tuple(branch for branch in made if branch is not None)

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        context: torch.Tensor | TextStates,
        *,
        on_block: Callable[[int], None] | None = None,
        inputs: tuple = (),
        skip: Collection[int] = (),
    ) -> torch.Tensor:
        """
        Args:
            x: noisy latent, with condition channels if the model takes them, [B, C_in, T, h, w], normalised.
            t: timestep 0..1000, [B], or [B, T] with one for each latent frame; best on the CPU: it is looked at.
            context: text embedding [B, L, text_dim], or what ``text_states`` made of it.
            on_block: called with the block's index before each block; may raise to cancel.
            inputs: what the network's features take, such as ``ClipTokens``; part of ``text_states`` where those are
                given.
            skip: blocks that are left out.

        Returns:
            velocity [B, C_out, T, h, w], float32.
        """
        self._check(x, t)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._is_trained(x, context)):
            text = context if isinstance(context, TextStates) else self.text_states(context, keep=False, inputs=inputs)
            return self._velocity(x, t, text, on_block, skip)

    def _is_trained(self, x: torch.Tensor, context: torch.Tensor | TextStates) -> bool:
        """Whether gradients have anywhere to go; without them the lighter in-place path is taken."""
        text = context.embedded if isinstance(context, TextStates) else context
        return x.requires_grad or text.requires_grad or any(p.requires_grad for p in self.parameters())

    def _velocity(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text: TextStates,
        on_block: Callable[[int], None] | None,
        skip: Collection[int],
    ) -> torch.Tensor:
        height, width = x.shape[-2:]
        x = _pad_to_patches(x)
        grid = (x.shape[2], x.shape[3] // PATCH[1], x.shape[4] // PATCH[2])
        timed, six = self._embed_time(t, grid)
        tokens, numbers, places = self._embed_patches(x), None, None
        if (order := getattr(self.attend, ORDER, None)) and len(six.bounds) == 1:  # else segments would be mixed
            rope, numbers, places = self.rope.in_order(grid, self.device, order)
            tokens = tokens[:, numbers]
        else:
            rope = self.rope.of(grid, self.device)
        given = Given(six, rope, text, self.attend, self._weights_of, on_block, skip)
        tokens = self.runner.run(self.blocks, tokens, given)
        patches = self.head(tokens, timed)
        patches = patches if places is None else patches[:, places]
        return unpatchify(patches, grid)[..., :height, :width]

    def _check(self, x: torch.Tensor, t: torch.Tensor) -> None:
        if x.ndim != 5 or x.shape[1] != self.config.in_channels:
            raise WanError(f"The latent has shape {list(x.shape)}; expected [B, {self.config.in_channels}, T, h, w].")
        if t.shape not in (x.shape[:1], (x.shape[0], x.shape[2])):
            raise WanError(
                f"Timesteps have shape {list(t.shape)}; expected [{x.shape[0]}] or "
                f"[{x.shape[0]}, {x.shape[2]}] (one for each latent frame)."
            )

    def _embed_patches(self, x: torch.Tensor) -> torch.Tensor:
        # A convolution whose stride is its kernel is a matrix product over patches, and faster as one.
        x = x.to(self.device, self.dtype)
        patches = rearrange(x, "b c t (h p) (w q) -> b (t h w) (c p q)", p=PATCH[1], q=PATCH[2])
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _embed_time(self, t: torch.Tensor, grid: tuple[int, int, int]) -> tuple[PerSegment, PerSegment]:
        """Timesteps -> their embedding (for the head) and its six modulations (for the blocks), run by run."""
        columns, bounds = _segments(t, frames=grid[0], tokens_per_frame=grid[1] * grid[2])
        first, activation, second = self.time_embedding
        waves = sinusoid(columns, self.config.freq_dim).to(self.device)
        e = linear_float32(second, activation(linear_float32(first, waves)))
        six = linear_float32(self.time_projection[1], F.silu(e), parts=6).unflatten(-1, (6, -1))
        return PerSegment(bounds, e), PerSegment(bounds, six)

    def _weights_of(self, index: int) -> AbstractContextManager:
        return self.swap.block(index) if self.swap else nullcontext()


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1))


def _segments(
    t: torch.Tensor, *, frames: int, tokens_per_frame: int
) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
    """Timesteps -> the distinct consecutive ones [B, runs] and the token range of each."""
    if t.ndim == 1:
        return t[:, None], ((0, frames * tokens_per_frame),)
    of_frame = t.T.tolist()
    starts = [0] + [i for i in range(1, frames) if of_frame[i] != of_frame[i - 1]]
    ends = [*starts[1:], frames]
    bounds = tuple((a * tokens_per_frame, b * tokens_per_frame) for a, b in zip(starts, ends, strict=True))
    return t[:, starts], bounds


def _pad_to_patches(x: torch.Tensor) -> torch.Tensor:
    """Sizes that are no multiple of the patch are padded circularly, as ComfyUI does; the result is cropped again."""
    down, right = -x.shape[-2] % PATCH[1], -x.shape[-1] % PATCH[2]
    return F.pad(x, (0, right, 0, down, 0, 0), mode="circular") if down or right else x


def unpatchify(patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """Patches [B, tokens, channels * 4] of a grid (frames, rows, columns) -> [B, channels, T, h, w]."""
    t, h, w = grid
    return rearrange(patches, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h, w=w, p=PATCH[1], q=PATCH[2])


def keeps_float32(key: str) -> bool:
    """Weights that stay float32 in a half-precision model: small, and every step multiplies by them."""
    return _is_norm(key) or key.endswith("modulation") or key.startswith(("time_embedding.", "head."))


def may_stay_in_file(key: str) -> bool:
    """Whether a weight, by its full name, is the matrix of a ``Linear``, which can read it from its file."""
    return key.endswith(".weight") and not _is_norm(key) and not key.startswith("patch_embedding.")


_NORMS = tuple(prefix for feature in FEATURES for prefix in feature.NORMS)


def _is_norm(key: str) -> bool:
    return "norm" in key or key.startswith(_NORMS)
