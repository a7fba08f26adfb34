"""Latents, CLIP tokens and text embeddings, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import Variant
from ..files.atomic import unfinished
from ..files.write import save_tensors
from ..loading.text import OnBlock, TextEncoder
from ..models.clip.vit import ClipVision
from ..models.dit.features.clip_tokens import ClipTokens
from ..models.dit.inputs import Concat
from ..models.vae.vae import OnChunk, VideoVAE
from ..sampling.starts import clip_places, known_channels
from .data import Clip, whole_chunks

_BLOCK = 2**20

Maker = Callable[[Sequence[Clip], Sequence[Tensor]], Tensor]  # clips and their videos -> a part of their entries


@dataclass(frozen=True, eq=False)
class Entry:
    """A clip as the transformer sees it.

    Attributes:
        latent: [C, T, h, w], normalised.
        concat: I2V: the condition [20, T, h, w].
        clip: Wan2.1 I2V and FLF2V: what CLIP makes of the picture [257, 1280], or of the first and last one behind the
            other [514, 1280].
        subject: where the subject is, [1, T, h, w] of 0 and 1, if it shall be learnt with more weight.
    """

    latent: Tensor
    concat: Tensor | None
    subject: Tensor | None = None
    clip: Tensor | None = None

    @property
    def inputs(self) -> tuple:
        """What a model is told beside the noisy latent and the text, of a batch of one."""
        concat = () if self.concat is None else (Concat(self.concat[None]),)
        return concat if self.clip is None else (*concat, ClipTokens(self.clip[None]))


class Cache:
    """A folder of safetensors files named by the content they were made from."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        return self._file(key).exists()

    def _file(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        file = self._file(key)
        if (found := _read(file)) is not None:
            return found
        made = {name: tensor.to("cpu", self.dtype).contiguous() for name, tensor in make().items()}
        file.parent.mkdir(exist_ok=True)
        with unfinished(file) as partial:
            save_tensors(made, partial)
        return {name: tensor.float() for name, tensor in made.items()}


def _read(file: Path) -> dict[str, Tensor] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_tensor(name).float() for name in content.keys()}  # noqa: SIM118
    except SafetensorError:
        return None  # cut short by a full disk: made again


class Latents:
    """Clips through a VAE, and their pictures through CLIP where the variant hears it.

    Args:
        on_chunk: called after every few frames; what it raises ends the work.
        clip, clip_key: of CLIP's picture encoder, for variants that need it.
    """

    def __init__(
        self,
        cache: Cache,
        vae: Callable[[], VideoVAE],
        vae_key: str,
        variant: Variant,
        on_chunk: OnChunk | None = None,
        *,
        clip: Callable[[], ClipVision] | None = None,
        clip_key: str = "",
    ):
        self.cache, self.vae_key, self.variant, self.on_chunk = cache, vae_key, variant, on_chunk
        self.clip_key = clip_key
        self._load, self._load_clip = vae, clip
        self._vae: VideoVAE | None = None
        self._clip: ClipVision | None = None

    def __call__(self, clip: Clip) -> Entry:
        video = cache(lambda: whole_chunks(clip.pixels(), clip.name))  # read once, and only if a part is missing

        def held(part: str, make: Maker) -> Tensor:
            return self.cache.get(self._key(clip, part), lambda: {part: make([clip], [video()])[0]})[part]

        parts = {part: held(part, make) for part, make in self._makers().items()}
        return Entry(parts["latent"], parts.get("concat"), clip=parts.get("clip"))

    def prepare(self, clips: Sequence[Clip], batch: int = 8) -> None:
        """Make what is missing, some clips of one size at a time: small pictures are encoded faster together."""
        makers = self._makers()
        missing = [clip for clip in clips if any(self._lacks(clip, part) for part in makers)]
        for start in range(0, len(missing), batch):
            some = [(clip, whole_chunks(clip.pixels(), clip.name)) for clip in missing[start : start + batch]]
            for part, make in makers.items():
                if wanted := [pair for pair in some if self._lacks(pair[0], part)]:
                    for (clip, _), made in zip(wanted, make(*zip(*wanted, strict=True)), strict=True):
                        self.cache.get(self._key(clip, part), partial(dict, {part: made}))

    def _makers(self) -> dict[str, Maker]:
        """The parts of an entry, and how those of some clips are made from their videos."""
        makers: dict[str, Maker] = {"latent": self._encode}
        if self.variant.image == "channels":
            makers["concat"] = self._condition
        if self.variant.clip:
            makers["clip"] = self._see
        return makers

    def _lacks(self, clip: Clip, part: str) -> bool:
        return not self.cache.has(self._key(clip, part))

    def release(self) -> None:
        self._vae = self._clip = None

    def _key(self, clip: Clip, part: str) -> str:
        """Variants that are shown other frames of a clip have other files in one cache."""
        ends = () if part == "latent" or not self.variant.needs_end else ("first and last",)
        return digest(clip.key, self.clip_key if part == "clip" else self.vae_key, part, *ends)

    def _encode(self, clips: Sequence[Clip], videos: Sequence[Tensor]) -> Tensor:
        """Latents [N, C, T, h, w]."""
        return self._through_vae(videos)

    def _condition(self, clips: Sequence[Clip], videos: Sequence[Tensor]) -> Tensor:
        """Conditions [N, 20, T, h, w]: mask and latent of the given frames."""
        return known_channels(self._shown(clips, videos), videos[0].shape[1], self._chunks_through_vae).channels

    def _see(self, clips: Sequence[Clip], videos: Sequence[Tensor]) -> Tensor:
        """CLIP tokens [N, 257 or 514, 1280] of the same pictures that the condition's frames are."""
        if self._clip is None:
            self._clip = cast(Callable, self._load_clip)()
        shown = self._shown(clips, videos)
        places = [clip_places(self.variant, known) for known in shown]
        seen = [torch.stack([known[place] for place in some]) for known, some in zip(shown, places, strict=True)]
        with torch.no_grad():
            return torch.stack([self._clip(pictures).flatten(0, 1) for pictures in seen])

    def _shown(self, clips: Sequence[Clip], videos: Sequence[Tensor]) -> list[dict[int, Tensor]]:
        """The frames of each clip that the model is shown: the pictures that the table names, else the clip's own."""
        if self.variant.needs_end:
            own = [{0: video[:, 0], -1: video[:, -1]} for video in videos]
            return [known | clip.given() for known, clip in zip(own, clips, strict=True)]
        return [clip.given() or {0: video[:, 0]} for clip, video in zip(clips, videos, strict=True)]

    def _chunks_through_vae(self, chunks: Iterator[Tensor], frames: int) -> Tensor:
        return self._through_vae(torch.cat(list(chunks), dim=2))

    def _through_vae(self, videos: Sequence[Tensor] | Tensor) -> Tensor:
        if self._vae is None:
            self._vae = self._load()
        device = next(self._vae.parameters()).device
        batch = videos if isinstance(videos, Tensor) else torch.stack(list(videos))
        return self._vae.encode(batch.to(device), self.on_chunk)


class Texts:
    """Prompts through a text encoder: [n, D] without padding. ``on_block`` may raise to end the work."""

    def __init__(
        self, cache: Cache, encoder: Callable[[], TextEncoder], encoder_key: str, on_block: OnBlock | None = None
    ):
        self.cache, self.encoder_key, self.on_block = cache, encoder_key, on_block
        self._load = encoder
        self._encoder: TextEncoder | None = None

    def __call__(self, prompt: str) -> Tensor:
        return self.cache.get(digest(prompt, self.encoder_key), lambda: self._make(prompt))["text"]

    def release(self) -> None:
        self._encoder = None

    def _make(self, prompt: str) -> dict[str, Tensor]:
        if self._encoder is None:
            self._encoder = self._load()
        ids = self._encoder.tokenizer.encode(prompt)
        return {"text": self._encoder.encode_ids([ids], on_block=self.on_block)[0, : len(ids)]}


def file_key(path: Path, blocks: int = 64) -> str:
    """Of the weights' content: a file's whole up to 64 MB, else 64 evenly spaced megabytes, and its size; a folder's
    (or an index's) files one by one."""
    if path.name.endswith(".index.json"):
        path = path.parent
    if path.is_dir():
        return digest(*(file_key(file) for file in sorted(path.rglob("*.safetensors"))))
    size = path.stat().st_size
    whole = size <= blocks * _BLOCK
    starts = range(0, size, _BLOCK) if whole else (i * (size - _BLOCK) // (blocks - 1) for i in range(blocks))
    content = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            content.update(file.read(_BLOCK))
    return content.hexdigest()[:32]


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def batches_of(shapes: Sequence[tuple], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, a function of seed and epoch: shuffled, each of clips of one shape.

    A shape's last batch is filled up from its beginning.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    groups: dict[tuple, list[int]] = {}
    for i in torch.randperm(len(shapes), generator=generator).tolist():
        groups.setdefault(shapes[i], []).append(i)
    batches = []
    for group in groups.values():
        whole = -(-len(group) // size) * size
        filled = (group * (whole // len(group) + 1))[:whole]
        batches += [filled[i : i + size] for i in range(0, whole, size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
