"""The SentencePiece model of a GGUF text encoder, from the vocabulary in its header.

llama.cpp writes a T5's pieces, scores and kinds into arrays under ``tokenizer.ggml``. From them the SentencePiece file
is put together again, field by field (``sentencepiece_model.proto``), without the package protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .read_gguf import Array, read_header

_PREFIX = "tokenizer.ggml."
_UNIGRAM, _UNKNOWN, _UNUSED = 1, 2, 5


def spiece_model(file: Path) -> bytes | None:
    """The SentencePiece model, or None where the file carries no T5 vocabulary."""
    fields = {key.removeprefix(_PREFIX): value for key, value in read_header(file).fields.items()
              if key.startswith(_PREFIX)}  # fmt: skip
    arrays = [fields.get(name) for name in ("tokens", "scores", "token_type")]
    if fields.get("model") != "t5" or not all(isinstance(array, Array) for array in arrays):
        return None
    tokens, scores, kinds = (array.read() for array in arrays)
    used = max(i for i, kind in enumerate(kinds) if kind != _UNUSED) + 1  # the table's last rows have no piece
    rows = list(zip(tokens[:used], scores[:used], kinds[:used], strict=True))
    pieces = b"".join(_message(1, _piece(*row)) for row in rows)
    return pieces + _message(2, _trainer(rows, fields)) + _message(3, _normaliser(fields))


def _piece(text: str, score: float, kind: int) -> bytes:
    return _message(1, text.encode()) + _float(2, score) + _integer(3, kind)


def _trainer(rows: list[tuple[str, float, int]], fields: Mapping[str, Any]) -> bytes:
    ids = {"unknown_token_id": 40, "bos_token_id": 41, "eos_token_id": 42, "padding_token_id": 43}
    unknown = next((i for i, (_, _, kind) in enumerate(rows) if kind == _UNKNOWN), 0)
    known = {"unknown_token_id": unknown, **fields}
    special = [(number, known[name]) for name, number in ids.items() if name in known]
    names = b"".join(_message(number + 5, rows[i][0].encode()) for number, i in special if i < len(rows))
    numbers = b"".join(_integer(number, i) for number, i in special)
    return _integer(3, _UNIGRAM) + _integer(4, len(rows)) + _integer(35, 1) + numbers + names


def _normaliser(fields: Mapping[str, Any]) -> bytes:
    chars = fields.get("precompiled_charsmap")
    charsmap = bytes(value & 255 for value in chars.read()) if isinstance(chars, Array) else b""
    dummy_prefix, spaces = fields.get("add_space_prefix", True), fields.get("remove_extra_whitespaces", False)
    name = b"precompiled" if charsmap else b"identity"
    return (_message(1, name) + _message(2, charsmap) + _integer(3, int(dummy_prefix)) + _integer(4, int(spaces)))


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _float(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
