"""Which container a file is: its first bytes decide, its ending only where they leave it open."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from ..errors import WanError
from .door import shown

Kind = Literal["safetensors", "pickle", "gguf"]

GGUF_MAGIC = b"GGUF"
ENDINGS = (".safetensors", ".sft", ".gguf", ".pth", ".pt", ".bin", ".ckpt")
_SAFETENSORS_ENDINGS = (".safetensors", ".sft")
_PICKLE_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")

# What is downloaded in place of a model, by how it begins. Only these words of ours reach a message.
_OTHERS: tuple[tuple[tuple[bytes, ...], str], ...] = (
    ((b"<!doctype",), "a web page (<!DOCTYPE …)"),
    ((b"<html", b"<head", b"<body"), "a web page (<html …)"),
    ((b"<",), "a text in XML or HTML"),
    ((b"version https://git-lfs",), "a Git LFS pointer instead of the file it stands for"),
    ((b"{", b"["), "a text in JSON"),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"rar!", b"\xfd7zxz", b"bzh", b"\x28\xb5\x2f\xfd"), "a packed archive; unpack it"),
    ((b"\x89png", b"\xff\xd8\xff", b"riff", b"gif8"), "a picture or a video"),
    ((b"\x89hdf",), "an HDF5 file"),
    ((b"\x93numpy",), "an array of NumPy"),
    ((b"ggml", b"lmgg", b"ggjt", b"tjgg"), "a model of GGML, older than GGUF"),
)
_TELLING = 64  # bytes


def kind_of(file: Path) -> Kind:
    """
    Raises:
        WanError: empty, or no container that is read.
    """
    if not file.is_file():
        raise WanError(f"{shown(file)} is no regular file: expected a checkpoint. Name the file itself.")
    size = file.stat().st_size
    if size == 0:
        raise WanError(f"{shown(file)} is empty (0 bytes): the download failed; fetch it again.")
    with file.open("rb") as stream:
        first = stream.read(_TELLING)
    kind = _by_bytes(first, size) or _by_ending(file, first)
    if kind is None:
        raise WanError(
            f"{shown(file)} is neither safetensors nor a PyTorch checkpoint nor GGUF: it is "
            f"{_what_else(first) or 'of an unknown kind'}. If it is a web page or a Git LFS pointer, "
            "download the real file."
        )
    return kind


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(4) == GGUF_MAGIC


def _by_bytes(first: bytes, size: int) -> Kind | None:
    if first[:4] == GGUF_MAGIC:
        return "gguf"
    if first[:4] == b"PK\x03\x04":
        return "pickle"
    if first[8:9] == b"{" and struct.unpack("<Q", first[:8])[0] <= size - 8:
        return "safetensors"
    return "pickle" if first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05" else None


def _by_ending(file: Path, first: bytes) -> Kind | None:
    """A damaged file is called damaged, unless it is plainly something else."""
    if _what_else(first):
        return None
    if file.suffix.lower() in _SAFETENSORS_ENDINGS or first[8:9] == b"{":
        return "safetensors"
    return "pickle" if first[:2] == b"PK" and file.suffix.lower() in _PICKLE_ENDINGS else None


def _what_else(first: bytes) -> str | None:
    start = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    found = next((words for beginnings, words in _OTHERS if start.startswith(beginnings)), None)
    if found is None and len(first) >= 16 and all(9 <= byte < 127 for byte in first):
        return "a text"
    return found
