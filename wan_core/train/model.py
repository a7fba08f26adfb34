"""The diffusion transformer as it is trained: float32 islands, short texts, checkpointed blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..config import TEXT_LENGTH, Architecture
from ..errors import WanError
from ..loading.build import load_strict
from ..loading.dit import DiTFile
from ..models.dit.dit import TextStates, WanDiT
from ..models.dit.layers import PerSegment
from ..models.dit.runner import BlockRunner
from .precision import full_precision


class TrainedDiT(WanDiT):
    """The same function as WanDiT, with what a step of training needs around it.

    Under autocast the residual stream, the embedding of time and the head stay float32.
    """

    def __init__(self, config: Architecture) -> None:
        super().__init__(config)
        inner = self.head.forward
        self.head.forward = partial(_in_float32, self, inner)  # type: ignore[method-assign]

    def text_states(self, context: Tensor | Sequence[Tensor], *, keep: bool = True, inputs: tuple = ()) -> TextStates:
        """Text [B, 512, D] as always, or a list of prompts [n, D] without their padding."""
        if isinstance(context, Tensor):
            return super().text_states(context, keep=keep, inputs=inputs)
        rows, bias = pad_texts(context)
        states = super().text_states(rows, inputs=inputs)
        return BriefText(states.embedded, self.config.layers, bias.to(self.device), states.branches)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | Sequence[Tensor] | TextStates,
        *,
        inputs: tuple = (),
        **options: Any,
    ) -> Tensor:
        text = context if isinstance(context, TextStates) else self.text_states(context, keep=False, inputs=inputs)
        self.attend = text.attend if isinstance(text, BriefText) else _attend
        return super().forward(x, t, text, **options)

    def _embed_patches(self, x: Tensor) -> Tensor:
        return _in_float32(self, super()._embed_patches, x)

    def _embed_time(self, t: Tensor, grid: tuple[int, int, int]) -> tuple[PerSegment, PerSegment]:
        return _in_float32(self, super()._embed_time, t, grid)


Made = TypeVar("Made")


def _in_float32(model: WanDiT, function: Callable[..., Made], *args: Any) -> Made:
    with full_precision(model.device):
        return function(*args)


class BriefText(TextStates):
    """Texts of a batch padded to the longest plus one row, which stands for all padding up to 512.

    Cross-attention sees 512 rows, of which the padding is many times the same. A softmax over n equal scores is one
    over a single score raised by log(n), so the result is that of 512 rows at a tenth of the work.
    """

    def __init__(self, embedded: Tensor, layers: int, bias: Tensor, branches: tuple = ()):
        super().__init__(embedded, layers, keep=False, branches=branches)
        self.bias = bias  # [B, 1, 1, L]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, kind: str) -> Tensor:
        return _attend(q, k, v, self.bias if kind == "text" else None)


_FEW_SCORES = 2**22  # of one call, below which they are kept for the gradients


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, kind: str = "self") -> Tensor:
    """Attention of [B, L, heads, head_dim]; scores are raised by ``bias``.

    On a CPU the fused kernel's gradients take three times as long as plain matrix products for clips of a few hundred
    tokens.
    """
    q, k, v = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))
    if q.device.type != "cpu" or q.shape[:2].numel() * q.shape[2] * k.shape[2] > _FEW_SCORES:
        bias = None if bias is None else bias.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    scores = scores.float() if bias is None else scores.float() + bias
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [n, D] -> rows [B, L, D], zeros behind each, and what each row's score is raised by [B, 1, 1, L]."""
    longest = max(len(text) for text in texts)
    if longest > TEXT_LENGTH:
        raise WanError(f"A text embedding has {longest} rows: expected {TEXT_LENGTH} at most.")
    rows = texts[0].new_zeros(len(texts), longest + 1, texts[0].shape[1], dtype=torch.float32)
    bias = torch.full((len(texts), 1, 1, longest + 1), -math.inf)
    for i, text in enumerate(texts):
        rows[i, : len(text)] = text
        bias[i, ..., : len(text)] = 0
        if len(text) < TEXT_LENGTH:
            bias[i, ..., len(text)] = math.log(TEXT_LENGTH - len(text))
    return rows, bias


class CheckpointedRunner(BlockRunner):
    """Forgets what happens inside a block, the text's keys and values too, and computes it again for the gradients.

    Args:
        offload: what goes into each block is kept in main memory instead of on the device.
    """

    def __init__(self, *, offload: bool = False):
        self.offload = offload

    def step(self, *args: Any) -> Tensor:
        plain = super().step
        if not torch.is_grad_enabled():
            return plain(*args)
        kept = torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()) if self.offload else nullcontext()
        with kept:
            return checkpoint(plain, *args, use_reentrant=False)


def load_trained(
    file: DiTFile, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TrainedDiT:
    """A checkpoint's model with weights of its own that may be written to."""
    with torch.device("meta"):
        model = TrainedDiT(file.config)
    load_strict(model, file.checkpoint, file.names, device=device, dtype=dtype)
    return model.requires_grad_(True)


def new_dit(config: Architecture, seed: int) -> TrainedDiT:
    """Fresh weights: the official initialisation, which begins with a head that answers 0."""
    model = TrainedDiT(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_initial(name, parameter, generator))
    return model


def _initial(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if "norm" in name or name.startswith("img_emb.") and like.ndim == 1:  # its norms are numbered
        return torch.zeros_like(like) if name.endswith("bias") else torch.ones_like(like)
    if name.endswith("modulation"):
        return torch.randn(like.shape, generator=generator) / math.sqrt(like.shape[-1])
    if name.endswith(("bias", "emb_pos")) or name == "head.head.weight":
        return torch.zeros_like(like)
    if name.startswith(("text_embedding", "time_embedding")):
        return torch.randn(like.shape, generator=generator) * 0.02
    matrix = like.flatten(1)
    bound = math.sqrt(6 / sum(matrix.shape))
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)
