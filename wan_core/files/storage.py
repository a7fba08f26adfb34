"""How numbers lie in safetensors files: every type that the format knows, in one table."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Storage:
    """``dtype`` is None for what this version (or the PyTorch that is installed) cannot hold: it is named, not read."""

    name: str
    bits: int
    words: str
    dtype: torch.dtype | None

    @property
    def described(self) -> str:
        return f"{self.name} ({self.words})"


def _rows(*rows: tuple[str, int, str, str | None]) -> dict[str, Storage]:
    return {
        name: Storage(name, bits, words, getattr(torch, dtype, None) if dtype else None)
        for name, bits, words, dtype in rows
    }


STORAGES: dict[str, Storage] = _rows(
    ("F64", 64, "double precision", "float64"),
    ("F32", 32, "single precision", "float32"),
    ("F16", 16, "half precision", "float16"),
    ("BF16", 16, "bfloat16", "bfloat16"),
    ("F8_E4M3", 8, "8-bit floats", "float8_e4m3fn"),
    ("F8_E5M2", 8, "8-bit floats", "float8_e5m2"),
    ("F8_E4M3FNUZ", 8, "8-bit floats of AMD", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "8-bit floats of AMD", "float8_e5m2fnuz"),
    ("F8_E8M0", 8, "powers of two, the scales of MX formats", "float8_e8m0fnu"),
    ("F6_E2M3", 6, "6-bit floats", None),
    ("F6_E3M2", 6, "6-bit floats", None),
    ("F4", 4, "4-bit floats", None),
    ("I64", 64, "integers", "int64"),
    ("I32", 32, "integers", "int32"),
    ("I16", 16, "integers", "int16"),
    ("I8", 8, "integers", "int8"),
    ("U64", 64, "integers without sign", "uint64"),
    ("U32", 32, "integers without sign", "uint32"),
    ("U16", 16, "integers without sign", "uint16"),
    ("U8", 8, "bytes", "uint8"),
    ("BOOL", 8, "yes or no", "bool"),
    ("C64", 64, "complex numbers", "complex64"),
)

DTYPES: dict[str, torch.dtype] = {name: one.dtype for name, one in STORAGES.items() if one.dtype is not None}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_]{1,24}")


def named(name: str) -> str:
    """An unknown storage type for a message; what does not look like the name of one is not repeated."""
    return name if _PLAIN_NAME.fullmatch(name) else "a type without a proper name"
