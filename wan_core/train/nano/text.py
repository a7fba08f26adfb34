"""The nano text encoder: a thin umT5 whose states make plain what a caption says.

A random encoder tells words apart, but not which word belongs to which ("left" of a motion, a pan or a composition). So
it is trained to let a small reader name every word of the scene from its states; the reader is thrown away.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...checkpoint import text as text_keys
from ...config import TextConfig
from ...models.tokenizer import Tokenizer, load_tokenizer, train_tiny_tokenizer
from ...models.umt5 import Umt5Encoder
from ..dit import save_weights
from .captions import caption
from .dataset import held_out
from .world import CAMERAS, COLOURS, GROUNDS, LOOKS, MOTIONS, SHAPES, Scene, random_scene

WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "ground": tuple(GROUNDS), "motion": tuple(MOTIONS),
    "camera": tuple(CAMERAS), **LOOKS,
}  # fmt: skip
_LAYERS, _THIN = 24, 4  # programs know a umT5-XXL by its depth and its width of 4096
assert set(WORDS) <= {f.name for f in fields(Scene)}


def make_tokenizer(captions: int = 4000, vocabulary: int = 512) -> bytes:
    """A SentencePiece model of the world's captions; half of its pieces are single bytes, for all other text."""
    random = np.random.default_rng(7)
    texts = [caption(random_scene(random), random) for _ in range(captions)]
    return train_tiny_tokenizer(texts, vocabulary)


def new_encoder(vocabulary: int, seed: int) -> Umt5Encoder:
    """Fresh weights: rows of the table are random, layers answer little."""
    encoder = Umt5Encoder(TextConfig(vocabulary, 4096, _THIN, _THIN, 1, _LAYERS))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.fill_(1.0)
            elif name == text_keys.TABLE or "pos_embedding" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    return encoder


class Reader(nn.Module):
    """For each kind of word a query that looks over the text's states, and a vote."""

    def __init__(self, dim: int, width: int = 64):
        super().__init__()
        self.keys = nn.Linear(dim, width)
        self.values = nn.Linear(dim, width)
        self.queries = nn.Parameter(torch.randn(len(WORDS), width))
        self.votes = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in WORDS.items()})

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, Tensor]:
        scores = self.queries @ self.keys(states).transpose(1, 2) / self.queries.shape[1] ** 0.5  # b kinds l
        heard = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ self.values(states)
        return {name: vote(heard[:, i]) for i, (name, vote) in enumerate(self.votes.items())}


class TextTask:
    """The ``Task`` of training encoder and reader together."""

    def __init__(self, encoder: Umt5Encoder, tokenizer: Tokenizer, batch: int, seed: int):
        self.encoder, self.tokenizer, self.batch = encoder, tokenizer, batch
        torch.manual_seed(seed)  # of the reader's weights
        self.reader = Reader(encoder.config.dim)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(nn.ModuleDict({"encoder": self.encoder, "reader": self.reader}).named_parameters())

    def describe(self) -> dict[str, object]:
        return {"text": self.encoder.config, "batch": self.batch}

    def sample(self, step: int, folder: Path) -> None: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        loss, right = self._read(random, self.batch, test=False)
        return loss, {"right": right}

    @torch.no_grad()
    def accuracy(self, count: int, seed: int = 901) -> float:
        """How many of the words are read rightly from captions of scenes held out from training."""
        return self._read(np.random.default_rng(seed), count, test=True)[1]

    def _read(self, random: np.random.Generator, count: int, *, test: bool) -> tuple[Tensor, float]:
        scenes = []
        while len(scenes) < count:
            scene = random_scene(random)
            if held_out(scene) == test:
                scenes.append(scene)
        ids, mask = pad_ids([self.tokenizer.encode(caption(scene, random)) for scene in scenes])
        votes = self.reader(self.encoder(ids, mask), mask)
        loss, right = torch.zeros(()), []
        for name, words in WORDS.items():
            wanted = torch.tensor([words.index(getattr(scene, name)) for scene in scenes])
            loss = loss + F.cross_entropy(votes[name], wanted)
            right.append((votes[name].argmax(-1) == wanted).float().mean().item())
        return loss / len(WORDS), float(np.mean(right))


def pad_ids(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    return ids, mask


def save_encoder(encoder: Umt5Encoder, spiece: bytes, file: Path, dtype: str) -> None:
    """As ComfyUI's own files: Hugging Face's keys, the tokenizer inside."""
    renames = text_keys.DIALECTS["huggingface"]
    weights = {renames.to_theirs(key): tensor for key, tensor in encoder.state_dict().items()}
    held = {key: tensor.half() if dtype == "fp16" else tensor for key, tensor in weights.items()}
    held[text_keys.SPIECE_MODEL] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_weights(held, file, "auto", {})


def tokenizer_of(spiece: bytes) -> Tokenizer:
    return load_tokenizer(spiece)
