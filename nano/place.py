"""Teaching a transformer where its tokens are, before it learns anything else.

Wan's self-attention knows relative places only, and in pure noise all tokens are alike: where a token stands shows in
nothing but what its neighbourhood lacks at the edges of the grid. A large model finds that out in time. A small one
does not: without it, 16 clips could not even be learnt by heart (after 500 steps the motion in its samples was at
chance; with a fixed embedding of the place, which the architecture has not, all of it was right after 300). So the
first blocks learn it alone, from pure noise and with a reader that is thrown away.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.models.dit.runner import BlockRunner, Given
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.model import TrainedDiT
from wan_core.train.precision import autocast, resolve_precision

_DEPTH = 2  # blocks after which places are read


class Places(nn.Module):
    """A reader of frame, row and column from the tokens of a latent [C, T, h, w] after some blocks."""

    def __init__(self, dim: int, shape: tuple[int, int, int, int]):
        super().__init__()
        frames, height, width = self.grid = (shape[1], shape[2] // 2, shape[3] // 2)
        torch.manual_seed(0)
        self.votes = nn.Linear(dim, sum(self.grid))
        places = torch.arange(frames * height * width)
        self.wanted = (places // (height * width), places // width % height, places % width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, float]:
        """Tokens [B, L, dim] -> mean cross-entropy, and the share of rows and columns that are named rightly."""
        votes = self.votes(F.layer_norm(tokens.float(), tokens.shape[-1:])).split(self.grid, dim=-1)
        both = list(zip(votes, self.wanted, strict=True))
        loss = sum(F.cross_entropy(vote.flatten(0, 1), wanted.repeat(len(tokens))) for vote, wanted in both)
        right = [(vote.argmax(-1) == wanted).float().mean().item() for vote, wanted in both[1:]]
        return loss / len(both), sum(right) / len(right)


class PlaceTask:
    """The ``Task`` of naming the place of every token of pure noise.

    Args:
        shape: of the latent [C, T, h, w].
        empty: embedding of the empty prompt [n, D].
    """

    def __init__(
        self,
        model: TrainedDiT,
        shape: tuple[int, int, int, int],
        empty: Tensor,
        *,
        batch: int = 24,
        precision: str = "auto",
    ):
        self.model, self.shape, self.empty, self.batch = model, shape, empty, batch
        self.precision = resolve_precision(precision, model.device)
        self.reader = Places(model.config.dim, shape)

    def parameters(self) -> dict[str, nn.Parameter]:
        blocks = nn.ModuleList(self.model.blocks[:_DEPTH])
        early = {f"blocks.{name}": p for name, p in blocks.named_parameters()}
        around = {name: p for name, p in self.model.named_parameters() if not name.startswith(("blocks", "head"))}
        return early | around | {f"reader.{name}": p for name, p in self.reader.named_parameters()}

    def describe(self) -> dict[str, object]:
        return {"model": self.model.config, "shape": self.shape, "batch": self.batch, "precision": self.precision}

    def sample(self, step: int, folder: Path) -> None: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(self.batch, self.model.config.in_channels, *self.shape[1:], generator=generator)
        loss, right = self.reader(self._tokens(noise, torch.rand(self.batch, generator=generator) * 1000))
        return loss, {"right": right}

    @torch.no_grad()
    def accuracy(self, seed: int = 99) -> float:
        """How many rows and columns are named rightly."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(100, self.model.config.in_channels, *self.shape[1:], generator=generator)
        return self.reader(self._tokens(noise, torch.full((100,), 950.0)))[1]

    def _tokens(self, x: Tensor, t: Tensor) -> Tensor:
        model, grid = self.model, self.reader.grid
        with autocast(self.precision, model.device):
            text = model.text_states([self.empty] * len(x), keep=False)
            timed = model._embed_time(t, grid)[1]
            given = Given(timed, model.rope.of(grid, model.device), text, text.attend)
            return BlockRunner().run(model.blocks[:_DEPTH], model._embed_patches(x), given)


class PlacedTask(DiTTask):
    """A transformer in training that must not forget where its tokens are: without the second loss it does so, and the
    motion of 16 clips learnt by heart falls from 0.94 to 0.38."""

    weight = 0.5

    def __init__(self, model: TrainedDiT, data: Data, recipe: Recipe):
        super().__init__(model, data, recipe)
        self.reader = Places(model.config.dim, tuple(data.shapes[0]))
        self._tokens: Tensor | None = None
        model.blocks[_DEPTH - 1].register_forward_hook(self._keep)

    def parameters(self) -> dict[str, nn.Parameter]:
        return super().parameters() | {f"reader.{name}": p for name, p in self.reader.named_parameters()}

    def describe(self) -> dict[str, object]:
        return super().describe() | {"place_weight": self.weight}

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(batch, generator)
        place, right = self.reader(self._tokens)
        return loss + self.weight * place, figures | {"velocity": loss.item(), "places": right}

    def _keep(self, block: nn.Module, given: tuple, tokens: Tensor) -> None:
        self._tokens = tokens
