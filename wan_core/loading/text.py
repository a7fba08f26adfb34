"""Prompts to the text states that the transformer attends to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..config import TEXT_ENCODER_CHECKPOINT, TEXT_LENGTH, TOKENIZER_FOLDER, TextConfig
from ..dtypes import precision_of
from ..errors import WanError
from ..files.checkpoint import Checkpoint
from ..layouts import text as layout
from ..layouts.detect import find
from ..layouts.gguf_tokenizer import spiece_inside
from ..models.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, places_beside, tokenizer_file
from ..models.text.tokenizer_check import problem_of
from ..models.text.umt5 import Umt5Encoder
from .build import Rules, load_strict
from .file import ModelFile, Understood, read_file

log = logging.getLogger(__name__)

OnBlock = Callable[[int], None]


class TextEncoder:
    """A tokenizer and a umT5 encoder that belong together.

    The tokenizer is read from its source when it is first needed.
    """

    def __init__(self, encoder: Umt5Encoder, tokenizer: Tokenizer | bytes | str | Path) -> None:
        self.encoder = encoder
        self._source = tokenizer

    @property
    def config(self) -> TextConfig:
        return self.encoder.config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self._source)
        if tokenizer.size > self.config.vocabulary:
            raise WanError(
                f"The tokenizer {tokenizer.source} knows {tokenizer.size} tokens, but the text encoder only "
                f"{self.config.vocabulary}: they do not belong together. Name the encoder's own tokenizer."
            )
        return tokenizer

    def __call__(self, prompts: Sequence[str] | str, *, on_block: OnBlock | None = None) -> Tensor:
        """Prompts -> [B, 512, D] float32, zero past each prompt's last token.

        ``on_block`` is called with the index of each block before it runs; what it raises cancels the encoding.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.encode_ids([self.tokenizer.encode(prompt) for prompt in prompts], on_block=on_block)

    @torch.no_grad()
    def encode_ids(self, ids: Sequence[Sequence[int]], *, on_block: OnBlock | None = None) -> Tensor:
        """One list of token ids per prompt, each ending in ``</s>`` -> [B, 512, D] float32, as from text.

        Raises:
            WanError: an empty or overlong list, or an id outside the vocabulary.
        """
        _check_ids(ids, self.config.vocabulary)
        lengths = torch.tensor([len(one) for one in ids], dtype=torch.int64)
        padded = torch.zeros(len(ids), TEXT_LENGTH, dtype=torch.int64)
        mask = torch.arange(TEXT_LENGTH)[None, :] < lengths[:, None]
        padded[mask] = torch.tensor([i for one in ids for i in one], dtype=torch.int64)
        return self.encoder(padded, mask, on_block=on_block).float()


@dataclass(frozen=True, eq=False)
class TextFile(ModelFile[TextConfig]):
    """A text encoder, and where its tokenizer is: bytes are the SentencePiece model inside the checkpoint."""

    tokenizer: Tokenizer | bytes | Path = field(kw_only=True)


def read_text_encoder(path: str | Path, tokenizer: Tokenizer | bytes | str | Path | None = None) -> TextFile:
    """Read a text encoder's header and find its tokenizer; arguments as in ``load_text_encoder``.

    Raises:
        WanError: not there, damaged, something else than a umT5 encoder, or no tokenizer.
    """
    path = _text_encoder_in(Path(path))
    source: Tokenizer | bytes | Path = b""

    def understand(checkpoint: Checkpoint) -> Understood[TextConfig]:
        nonlocal source
        config, names, notes = understand_text(checkpoint)
        source, more = _tokenizer_source(checkpoint, tokenizer, config.vocabulary)
        return config, names, (*notes, *more)

    file = read_file(path, understand)
    return TextFile(**vars(file), tokenizer=source)


def understand_text(checkpoint: Checkpoint) -> Understood[TextConfig]:
    """Dimensions; our key -> the checkpoint's for every tensor of the encoder; and what to say of the rest.

    Raises:
        WanError: see ``read_text_encoder``.
    """
    found = find("text", checkpoint)
    config = layout.read_config({ours: checkpoint.tensors[theirs].shape for ours, theirs in found.names.items()})
    with torch.device("meta"):
        wanted = Umt5Encoder(config).state_dict().keys()
    names, notes = found.fit(wanted, checkpoint)
    return config, names, notes


def build_text_encoder(
    file: TextFile, *, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None, resident: bool = True
) -> TextEncoder:
    """The encoder with its matrices on the device; arguments as in ``load_text_encoder``.

    Without ``resident`` they stay mapped and pass through one buffer on the device as they are used.

    Raises:
        WanError: see ``load_strict`` and ``precision_of``.
    """
    device = torch.device(device)
    precision = precision_of(dtype)
    with torch.device("meta"):
        encoder = Umt5Encoder(file.config)
    rules = Rules(
        place=lambda key: _is_small(key) or (resident and device.type != "cpu" and key != layout.TABLE),
        packs=layout.packs,
        make=lambda key: precision.weights if layout.is_matrix(key) else None,
    )
    dtype = precision.on(device, file.checkpoint.dtype)
    load_strict(encoder, file.checkpoint, file.names, device=device, dtype=dtype, rules=rules)
    return TextEncoder(encoder, file.tokenizer)


def load_text_encoder(
    path: str | Path,
    *,
    tokenizer: Tokenizer | bytes | str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
) -> TextEncoder:
    """Load a umT5 text encoder.

    Args:
        path: the official ``.pth``, ComfyUI's safetensors file, a GGUF file, a Hugging Face folder (sharded or not), or
            the folder of a whole official or diffusers checkpoint.
        tokenizer: a folder or file; None takes the one inside the checkpoint or beside it.
        dtype: of the computation; None means bfloat16 where the device is fast in it, else float32.

    Returns:
        ``encoder(["prompt", ...]) -> [B,512,D]`` float32, zero past each prompt's last token.

    The embedding table, of which a prompt needs a few rows, always stays memory-mapped. On a CPU the matrices do too,
    and are cast as they are used if the file's dtype is another.

    Raises:
        WanError: the file is missing, damaged or no umT5 encoder, or there is no tokenizer.
    """
    return build_text_encoder(read_text_encoder(path, tokenizer), device=device, dtype=dtype)


def _text_encoder_in(path: Path) -> Path:
    """The text encoder's part of a whole checkpoint's folder, or the path itself."""
    parts = (path / TEXT_ENCODER_CHECKPOINT, path / "text_encoder")
    return next((part for part in parts if part.exists()), path)


def _tokenizer_source(
    checkpoint: Checkpoint, named: Tokenizer | bytes | str | Path | None, rows: int
) -> tuple[Tokenizer | bytes | Path, tuple[str, ...]]:
    """The tokenizer to use, and what to say of one that was passed over; the places looked at are noted."""
    if isinstance(named, Tokenizer):
        return named, ()
    if named is not None:
        return _checked(named if isinstance(named, bytes) else tokenizer_file(named), checkpoint, rows), ()
    inside = spiece_inside(checkpoint)
    problem = problem_of(inside, rows) if inside else None
    if inside and not problem:
        return inside, ()
    try:
        found = find_tokenizer(checkpoint.path, rows)
    except WanError as error:
        raise WanError(f"The tokenizer inside {checkpoint.path} {problem}. {error}") if problem else error from None
    places = places_beside(checkpoint.path.absolute())
    checkpoint.beside = tuple(places[: places.index(found) + 1])
    passed = [(f"{file}", problem_of(file, rows)) for file in checkpoint.beside[:-1] if file.is_file()]
    if inside:
        passed.insert(0, ("The tokenizer inside it", problem))
    return found, tuple(f"{checkpoint.path.name}: {what} {why}; {found} is used." for what, why in passed)


def _checked(source: bytes | Path, checkpoint: Checkpoint, rows: int) -> bytes | Path:
    """A tokenizer that the user named. One that is too large is refused when it is used."""
    checkpoint.beside = () if isinstance(source, bytes) else (source,)
    if problem := problem_of(source, rows, larger=True):
        what = "The tokenizer given" if isinstance(source, bytes) else str(source)
        raise WanError(
            f"{what} {problem}. Use the tokenizer of the text encoder {checkpoint.path}: the folder "
            f"{TOKENIZER_FOLDER}/ of the official checkpoint."
        )
    return source


def _is_small(key: str) -> bool:
    return "norm" in key or "pos_embedding" in key


def _check_ids(ids: Sequence[Sequence[int]], vocabulary: int) -> None:
    if not ids:
        raise WanError("There is no prompt to encode: expected a list of one or more texts.")
    for one in ids:
        if not 0 < len(one) <= TEXT_LENGTH:
            raise WanError(f"A prompt has {len(one)} tokens; expected 1 to {TEXT_LENGTH}.")
        if not 0 <= min(one) <= max(one) < vocabulary:
            raise WanError(
                f"A prompt has token ids from {min(one)} to {max(one)}, but the text encoder knows "
                f"{vocabulary}. Is the tokenizer another model's?"
            )
