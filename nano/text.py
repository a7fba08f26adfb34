"""The nano text encoder: a thin umT5 whose tokenizer has the world's wordings as whole pieces.

Words are bound where they are cut: "left" of a motion, of a pan and of a composition are three pieces. So the encoder
need not learn to tell them apart: its random table and thin random layers give every piece a direction of its own
among 4096, and a small reader shows that every word of a scene can be read from its states.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.config import TextConfig
from wan_core.layouts import text as text_keys
from wan_core.models.text.tokenizer import Tokenizer, load_tokenizer, train_tiny_tokenizer
from wan_core.models.text.umt5 import Umt5Encoder
from wan_core.train.dit import save_weights

from .captions import caption, phrases
from .dataset import held_out
from .world import CAMERAS, COLOURS, GROUNDS, LOOKS, MOTIONS, SHAPES, Scene, random_scene

WORDS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "ground": tuple(GROUNDS), "motion": tuple(MOTIONS),
    "camera": tuple(CAMERAS), **LOOKS,
}  # fmt: skip
_LAYERS, _THIN = 24, 4  # programs know a umT5-XXL by its depth and its width of 4096
assert set(WORDS) <= {f.name for f in fields(Scene)}


def make_tokenizer(captions: int = 4000, vocabulary: int = 512) -> bytes:
    """A SentencePiece model of the world's captions, its phrases and, for all other text, single bytes."""
    random = np.random.default_rng(7)
    texts = [caption(random_scene(random), random) for _ in range(captions)]
    return train_tiny_tokenizer(texts, vocabulary, phrases=phrases(), fold_case=True)


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


def states_of(encoder: Umt5Encoder, tokenizer: Tokenizer, captions: list[str]) -> tuple[Tensor, Tensor]:
    """The states [N, L, 4096] and their mask [N, L]."""
    ids, mask = pad_ids([tokenizer.encode(words) for words in captions])
    with torch.no_grad():
        parts = [encoder(*part) for part in zip(ids.split(50), mask.split(50), strict=True)]
    return torch.cat(parts), mask


class ReaderTask:
    """The ``Task`` of teaching a reader what the states of captions say; the encoder stays as it is."""

    def __init__(self, encoder: Umt5Encoder, tokenizer: Tokenizer, captions: int, batch: int, seed: int):
        self.encoder, self.tokenizer, self.batch = encoder, tokenizer, batch
        torch.manual_seed(seed)  # of the reader's weights
        self.reader = Reader(encoder.config.dim)
        random = np.random.default_rng(seed)
        self.scenes = _scenes(random, captions, test=False)
        self.states, self.mask = states_of(encoder, tokenizer, [caption(scene, random) for scene in self.scenes])

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.reader.named_parameters())

    def describe(self) -> dict[str, object]:
        return {"text": self.encoder.config, "batch": self.batch, "captions": len(self.scenes)}

    def sample(self, step: int, folder: Path) -> None: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(self.scenes), (self.batch,), generator=generator)
        votes = self.reader(self.states[picked], self.mask[picked])
        loss, right = _judge(votes, [self.scenes[i] for i in picked])
        return loss, {"right": right}

    @torch.no_grad()
    def accuracy(self, count: int, seed: int = 901) -> float:
        """How many of the words are read rightly from captions of scenes held out from training."""
        random = np.random.default_rng(seed)
        scenes = _scenes(random, count, test=True)
        votes = self.reader(*states_of(self.encoder, self.tokenizer, [caption(scene, random) for scene in scenes]))
        return _judge(votes, scenes)[1]


def _scenes(random: np.random.Generator, count: int, *, test: bool) -> list[Scene]:
    scenes = []
    while len(scenes) < count:
        scene = random_scene(random)
        if held_out(scene) == test:
            scenes.append(scene)
    return scenes


def _judge(votes: dict[str, Tensor], scenes: list[Scene]) -> tuple[Tensor, float]:
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
