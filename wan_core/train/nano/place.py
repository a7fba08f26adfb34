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

from ...models.rope import rope_table
from ..model import TrainedDiT
from ..precision import autocast, resolve_precision


class PlaceTask:
    """The ``Task`` of naming frame, row and column of every token of pure noise after the first ``depth`` blocks.

    Args:
        shape: of the latent [C, T, h, w].
        empty: embedding of the empty prompt [n, D].
    """

    def __init__(
        self, model: TrainedDiT, shape: tuple[int, int, int, int], empty: Tensor, *, depth: int = 2, batch: int = 24,
        precision: str = "auto",
    ):  # fmt: skip
        self.model, self.shape, self.empty, self.depth, self.batch = model, shape, empty, depth, batch
        self.precision = resolve_precision(precision, model.device)
        frames, height, width = shape[1], shape[2] // 2, shape[3] // 2
        self.grid = (frames, height, width)
        torch.manual_seed(0)  # of the reader's weights
        self.reader = nn.Linear(model.config.dim, sum(self.grid))
        places = torch.arange(frames * height * width)
        self.wanted = (places // (height * width), places // width % height, places % width)

    def parameters(self) -> dict[str, nn.Parameter]:
        blocks = nn.ModuleList(self.model.blocks[: self.depth])
        early = {f"blocks.{name}": p for name, p in blocks.named_parameters()}
        around = {name: p for name, p in self.model.named_parameters() if not name.startswith(("blocks", "head"))}
        return early | around | {f"reader.{name}": p for name, p in self.reader.named_parameters()}

    def describe(self) -> dict[str, object]:
        return {"model": self.model.config, "shape": self.shape, "depth": self.depth, "batch": self.batch,
                "precision": self.precision}  # fmt: skip

    def sample(self, step: int, folder: Path) -> None: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        noise = torch.randn(self.batch, self.model.config.in_channels, *self.shape[1:], generator=generator)
        timesteps = torch.rand(self.batch, generator=generator) * 1000
        votes = self._read(noise, timesteps)
        loss = sum(F.cross_entropy(vote.flatten(0, 1), wanted.repeat(self.batch))
                   for vote, wanted in zip(votes, self.wanted, strict=True))  # fmt: skip
        return loss / 3, {"right": self._right(votes)}

    @torch.no_grad()
    def accuracy(self, seed: int = 99) -> float:
        """How many rows and columns are named rightly."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(100, self.model.config.in_channels, *self.shape[1:], generator=generator)
        return self._right(self._read(noise, torch.full((100,), 950.0)))

    def _read(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Votes for frame, row and column, [B, L, places] each."""
        model = self.model
        with autocast(self.precision, model.device):
            text = model.text_states([self.empty] * len(x), keep=False)
            timed = model._embed_time(t, self.grid)[1]
            rope = rope_table(self.grid, model.config.dim // model.config.heads, model.device)
            tokens = model._embed_patches(x)
            for index in range(self.depth):
                tokens = model.blocks[index](tokens, timed, rope, text, index, text.attend)
        votes = self.reader(F.layer_norm(tokens.float(), tokens.shape[-1:]))
        return votes.split(self.grid, dim=-1)

    def _right(self, votes: tuple[Tensor, ...]) -> float:
        hits = [(vote.argmax(-1) == wanted).float().mean() for vote, wanted in zip(votes, self.wanted, strict=True)]
        return torch.stack(hits[1:]).mean().item()
