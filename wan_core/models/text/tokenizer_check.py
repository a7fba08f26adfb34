"""Whether a tokenizer is umT5's: another model's gives ids that the encoder takes, and reads as other words.

The real vocabulary is known by a few of its pieces. Small encoders have small vocabularies in umT5's manner
(``train_tiny_tokenizer``): its special tokens at its places, a piece for each byte, and not much less than the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ...errors import WanError

REAL_ROWS = 256384  # of umT5-XXL's embedding table
_REAL_SIZES = (256000, REAL_ROWS)  # pieces in the SentencePiece model, and more in tokenizer.json
_REAL_PIECES = {
    4: "[eod]", 259: "<0xF2>", 312: "▁the", 431: "的", 439: "ing", 3231: "▁water", 6283: "▁cat", 8854: "▁видео",
    100000: "кът", 200000: "icida", 255999: "啕",
}  # fmt: skip
_SPECIAL = {0: "<pad>", 1: "</s>", 2: "<s>", 3: "<unk>"}
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Pieces:
    """A vocabulary: ``at`` gives the piece of an id, ``has`` says whether there is such a piece."""

    size: int
    at: Callable[[int], str | None]
    has: Callable[[str], bool]


def problem_of(source: bytes | Path, rows: int, *, larger: bool = False) -> str | None:
    """Why a tokenizer does not belong to a text encoder whose table has so many rows, or None.

    A file that cannot be read is a problem too; the answer is kept until the file changes. With ``larger`` one that has
    more tokens than rows is none.
    """
    if isinstance(source, bytes):
        return _problem(source, rows, larger)
    try:
        state = source.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return _problem_of_file(source, rows, larger, (state.st_size, state.st_mtime_ns))


@lru_cache(maxsize=64)
def _problem_of_file(file: Path, rows: int, larger: bool, state: tuple[int, int]) -> str | None:
    return _problem(file, rows, larger)


def _problem(source: bytes | Path, rows: int, larger: bool) -> str | None:
    try:
        pieces = _pieces_of(source)
    except (WanError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"is no readable tokenizer ({str(error)[:100]})"
    return _foreign(pieces) or _misfit(pieces, rows, larger)


def _foreign(pieces: Pieces) -> str | None:
    for i, piece in _SPECIAL.items():
        if i >= pieces.size or pieces.at(i) != piece:
            return f"is not umT5's: its token {i} is {pieces.at(i) if i < pieces.size else None!r}, expected {piece!r}"
    if not all(map(pieces.has, _BYTES)):
        return "is not umT5's: it has no tokens for single bytes"
    return None


def _misfit(pieces: Pieces, rows: int, larger: bool) -> str | None:
    if pieces.size > rows:
        return None if larger else f"knows {pieces.size} tokens, but the text encoder only {rows}"
    if rows < _REAL_SIZES[0]:
        few = pieces.size * 2 < rows
        return f"knows only {pieces.size} of the text encoder's {rows} tokens" if few else None
    if not _REAL_SIZES[0] <= pieces.size <= _REAL_SIZES[1]:
        return f"is not umT5's: it knows {pieces.size} tokens, expected {_REAL_SIZES[0]} to {_REAL_SIZES[1]}"
    wrong = next((i for i, piece in _REAL_PIECES.items() if pieces.at(i) != piece), None)
    return (
        None
        if wrong is None
        else (f"is not umT5's: its token {wrong} is {pieces.at(wrong)!r}, expected {_REAL_PIECES[wrong]!r}")
    )


def _pieces_of(source: bytes | Path) -> Pieces:
    if isinstance(source, Path) and source.suffix.lower() == ".json":
        return _pieces_of_json(json.loads(source.read_bytes().decode("utf-8-sig")))
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_proto=source if isinstance(source, bytes) else source.read_bytes())
    except RuntimeError as error:
        raise ValueError("no SentencePiece model") from error
    size, unknown = processor.get_piece_size(), processor.unk_id()
    return Pieces(
        size,
        lambda i: processor.id_to_piece(i) if i < size else None,
        lambda piece: processor.piece_to_id(piece) != unknown,
    )


def _pieces_of_json(description: dict) -> Pieces:
    vocabulary = description["model"]["vocab"]
    if isinstance(vocabulary, dict):  # other kinds than umT5's have it so
        by_number = {i: piece for piece, i in vocabulary.items()}
        return Pieces(len(vocabulary), by_number.get, vocabulary.__contains__)
    names = [piece for piece, _ in vocabulary]
    known = set(names)
    return Pieces(len(names), lambda i: names[i] if i < len(names) else None, known.__contains__)
