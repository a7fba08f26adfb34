"""LoRA (arXiv 2106.09685): low-rank updates beside frozen linear layers, and the file they are saved in.

A file holds ``diffusion_model.<layer>.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank] and ``.alpha``; the
update is ``alpha / rank * B @ A`` times the strength, which is how ComfyUI's LoraLoader reads it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WanError
from ..files.write import save_tensors
from ..media.video import unfinished

TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
ALL = "all"  # the target that stands for every layer that can be adapted
_BLOCK = re.compile(r"^blocks\.\d+\.")
_OWNERS = ("blocks.", "img_emb.")  # where those are: in the blocks, and where Wan2.1 takes pictures in
PREFIX = "diffusion_model."


class AdaptedLinear(nn.Module):
    """A frozen linear layer and its low-rank update, which begins at zero."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        bound = base.in_features**-0.5
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        y = self.base(x)
        return y + (low * self.scale).to(y.dtype)

    def update(self) -> Tensor:
        """What merging adds to the weight, [out, in]."""
        return self.scale * (self.lora_B @ self.lora_A)


def add_lora(
    model: nn.Module, rank: int, targets: Sequence[str] = TARGETS, *, alpha: float | None = None, seed: int = 0
) -> dict[str, AdaptedLinear]:
    """Freeze a DiT and put an update beside every linear layer that a target names.

    Args:
        targets: see ``find_targets``.
        alpha: None means the rank, so that the update is B @ A.

    Raises:
        WanError: a rank below 1, or a target that no layer has.
    """
    if rank < 1:
        raise WanError(f"The LoRA rank is {rank}: expected 1 or more.")
    model.requires_grad_(False)
    chosen = find_targets(model, targets)
    generator = torch.Generator().manual_seed(seed)
    adapted = {}
    for name, layer in chosen.items():
        adapted[name] = AdaptedLinear(layer, rank, alpha or rank, generator)
        owner, _, child = name.rpartition(".")
        model.get_submodule(owner)._modules[child] = adapted[name]
    return adapted


def find_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of a DiT's blocks, and of the embedding of its pictures, whose names end in a target.

    Args:
        targets: ends of names, such as ``q``, ``ffn.0`` and, of Wan2.1's I2V, ``k_img`` or ``img_emb.proj.1``; "all"
            is every one of them.

    Raises:
        WanError: a target that no layer has.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.startswith(_OWNERS) and isinstance(layer, nn.Linear)
    }
    _check_targets([target for target in targets if target != ALL] or targets, layers)
    return {name: layer for name, layer in layers.items() if _names(targets, name)}


def _names(targets: Sequence[str], name: str) -> bool:
    return any(target == ALL or f".{name}".endswith(f".{target}") for target in targets)


def describe(adapted: Mapping[str, AdaptedLinear]) -> dict[str, object]:
    """What a run that is gone on with must share."""
    one = next(iter(adapted.values()))
    layers = sorted({_BLOCK.sub("", name) for name in adapted})  # the same in each block
    return {
        "lora_rank": len(one.lora_A),
        "lora_alpha": one.scale * len(one.lora_A),
        "lora_layers": layers,
        "base_dtype": one.base.weight.dtype,
    }


def lora_tensors(adapted: Mapping[str, AdaptedLinear], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a LoRA file."""
    found = {}
    for name, layer in adapted.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().to("cpu", dtype).contiguous()
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().to("cpu", dtype).contiguous()
        found[f"{PREFIX}{name}.alpha"] = torch.tensor(layer.scale * len(layer.lora_A))
    return found


def save_lora(adapted: Mapping[str, AdaptedLinear], file: Path, metadata: Mapping[str, str]) -> None:
    with unfinished(file) as partial:
        save_tensors(lora_tensors(adapted), partial, {"format": "pt", **metadata})


def _check_targets(targets: Sequence[str], layers: Mapping[str, nn.Linear]) -> None:
    unknown = [target for target in targets if not any(_names([target], name) for name in layers)]
    if unknown or not targets:
        ends = dict.fromkeys(
            _BLOCK.sub("", name).removeprefix("self_attn.").removeprefix("cross_attn.") for name in layers
        )
        raise WanError(
            f"LoRA targets {', '.join(unknown) or '(none)'} are no linear layers of this model: choose "
            f"among {','.join(ends)}, or {ALL}."
        )
