"""The SentencePiece model of a GGUF text encoder, from the vocabulary in its header.

llama.cpp writes a T5's pieces, scores and kinds into arrays under ``tokenizer.ggml``. From them the SentencePiece file
is put together again, field by field (``sentencepiece_model.proto``). The package sentencepiece tells neither which
pieces a user defined nor how text is normalised, and its own reader of such files needs protobuf, which ComfyUI lacks:
so the few fields are read and written here, and every result is loaded by sentencepiece before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WanError
from ..files.checkpoint import Checkpoint
from ..files.door import damaged, shown
from ..files.gguf import Array, read_header
from ..files.kind import is_gguf
from ..mapped import fetch
from ..models.text.tokenizer import SPIECE_FILE, find_tokenizer
from ..models.text.tokenizer_check import problem_of
from .text import spiece_key

_PREFIX = "tokenizer.ggml."
# The header's name of a special token -> where the trainer's part of the file has its id, and the id by default.
_IDS = {"unknown_token_id": (40, 0), "bos_token_id": (41, 1), "eos_token_id": (42, 2), "padding_token_id": (43, -1)}
_ARRAYS = ("tokens", "scores", "token_type")
_KINDS = ((8,), (6, 12), (0, 1, 2, 3, 4, 5, 10, 11))  # of the arrays: texts, fractions, integers
_UNIGRAM = 1
_NORMAL, _UNKNOWN, _UNUSED = 1, 2, 5


def spiece_model(file: Path) -> bytes | None:
    """The SentencePiece model, or None where the file is no GGUF, or carries no T5 vocabulary.

    Raises:
        WanError: the vocabulary's parts do not go together.
    """
    if not is_gguf(file):
        return None
    fields = {
        key.removeprefix(_PREFIX): value for key, value in read_header(file).fields.items() if key.startswith(_PREFIX)
    }
    arrays = [array for name in _ARRAYS if isinstance(array := fields.get(name), Array)]
    if fields.get("model") != "t5" or len(arrays) != len(_ARRAYS):
        return None
    fitting = all(array.kind in kinds for array, kinds in zip(arrays, _KINDS, strict=True))
    if not fitting or len({array.count for array in arrays}) != 1:
        raise WanError(
            f"{shown(file)} has a vocabulary whose pieces, scores and kinds do not go together. Convert the "
            "text encoder again, or name the tokenizer: google/umt5-xxl of the official checkpoint."
        )
    tokens, scores, kinds = (array.read() for array in arrays)
    used = 1 + max((i for i, kind in enumerate(kinds) if kind != _UNUSED), default=-1)  # later rows have no piece
    rows = list(zip(tokens[:used], scores[:used], kinds[:used], strict=True))
    try:
        pieces = b"".join(_message(1, _piece(*row)) for row in rows)
        return pieces + _message(2, _trainer(rows, fields)) + _message(3, _normaliser(fields))
    except (struct.error, OverflowError, ValueError, TypeError) as error:
        raise damaged(file, f"its vocabulary has {type(error).__name__} in it") from error


def gguf_vocabulary(spiece: bytes, rows: int) -> dict[str, Any]:
    """A SentencePiece model as GGUF header fields, filled up with unused pieces to the rows of the embedding table.

    Raises:
        WanError: no SentencePiece model.
    """
    try:
        return _vocabulary(spiece, rows)
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise WanError(
            f"The text encoder's tokenizer is no SentencePiece model ({len(spiece)} bytes). Expected "
            f"{SPIECE_FILE} of google/umt5-xxl; download it again."
        ) from error


def _vocabulary(spiece: bytes, rows: int) -> dict[str, Any]:
    parts = list(_fields(spiece))
    pieces = [dict(_fields(content)) for number, content in parts if number == 1]
    trainer, normaliser = (dict(_fields(dict(parts).get(number, b""))) for number in (2, 3))
    padding = range(len(pieces), rows)
    values = {
        "model": "t5",
        "tokens": [piece[1] for piece in pieces] + [f"[PAD{i}]".encode() for i in padding],
        "scores": [struct.unpack("<f", piece[2])[0] for piece in pieces] + [-10000.0 for _ in padding],
        "token_type": [piece.get(3, _NORMAL) for piece in pieces] + [_UNUSED for _ in padding],
        "add_space_prefix": bool(normaliser.get(3, True)),
        "remove_extra_whitespaces": bool(normaliser.get(4, True)),
        **{name: trainer.get(number, default) for name, (number, default) in _IDS.items()},
    }
    if normaliser.get(2):
        values["precompiled_charsmap"] = list(struct.unpack(f"{len(normaliser[2])}b", normaliser[2]))
    return {_PREFIX + name: value for name, value in values.items() if not (isinstance(value, int) and value >> 31)}


def spiece_inside(checkpoint: Checkpoint) -> bytes | None:
    """The SentencePiece model that a text encoder's file carries."""
    if key := spiece_key(checkpoint):
        return fetch(checkpoint.tensor(key)).to(torch.uint8).numpy().tobytes()
    return spiece_model(checkpoint.files[0])


def spiece_beside(checkpoint: Checkpoint, rows: int | None = None) -> bytes | None:
    """The SentencePiece model inside a text encoder's file or beside it that belongs to a table of so many rows."""
    inside = spiece_inside(checkpoint)
    if inside and (rows is None or problem_of(inside, rows) is None):
        return inside
    try:
        return find_tokenizer(checkpoint.path, rows, (SPIECE_FILE,)).read_bytes()
    except WanError:
        return None


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + _float(2, score) + _integer(3, kind)


def _trainer(rows: list[tuple[str, float, int]], fields: Mapping[str, Any]) -> bytes:
    unknown = next((i for i, (_, _, kind) in enumerate(rows) if kind == _UNKNOWN), 0)
    known = {"unknown_token_id": unknown, **fields}
    special = [(number, known[name]) for name, (number, _) in _IDS.items() if type(known.get(name)) is int]
    names = b"".join(_message(number + 5, rows[i][0].encode()) for number, i in special if 0 <= i < len(rows))
    numbers = b"".join(_integer(number, i) for number, i in special)
    return _integer(3, _UNIGRAM) + _integer(4, len(rows)) + _integer(35, 1) + numbers + names


def _normaliser(fields: Mapping[str, Any]) -> bytes:
    chars = fields.get("precompiled_charsmap")
    charsmap = b""
    if isinstance(chars, Array) and chars.kind in _KINDS[2]:
        charsmap = bytes(value & 255 for value in chars.read())
    dummy_prefix, spaces = fields.get("add_space_prefix", True), fields.get("remove_extra_whitespaces", False)
    name = b"precompiled" if charsmap else b"identity"
    flags = _integer(3, int(bool(dummy_prefix))) + _integer(4, int(bool(spaces)))
    return _message(1, name) + _message(2, charsmap) + flags


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and content of each field: integers, or bytes of everything else."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == 0:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, at = _read_varint(data, at)
        yield tag >> 3, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
