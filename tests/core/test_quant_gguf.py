"""GGUF's block types against the package gguf, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tests.core.quant_files import random_blocks
from wan_core.quant.base import Packed
from wan_core.quant.gguf import BLOCK_TYPES, GGUF

ROWS, BLOCKS = 7, 24


def random_rows(kind: str) -> np.ndarray:
    return random_blocks(kind, ROWS, BLOCKS * BLOCK_TYPES[kind].weights)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_dequantises_to_the_bits_of_the_package(kind: str):
    data = random_rows(kind)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    ours = Packed(GGUF(kind), {"data": torch.from_numpy(data)}).dequantise()
    assert ours.shape == expected.shape
    assert np.array_equal(ours.numpy().view(np.uint32), expected.view(np.uint32))
    assert np.isfinite(expected).all() and len(np.unique(expected)) > 1000


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_sizes_are_those_of_the_package(kind: str):
    assert BLOCK_TYPES[kind][:2] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


def test_every_listed_type_is_there():
    listed = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
    assert set(BLOCK_TYPES) == listed


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "IQ4_XS"])
def test_rows_and_slices_of_rows_dequantise_like_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch):
    packed = Packed(GGUF(kind), {"data": torch.from_numpy(random_rows(kind))})
    whole = packed.dequantise()
    chosen = torch.tensor([5, 0, 5])
    some = Packed(packed.format, packed.format.rows(packed.parts, chosen)).dequantise()
    assert torch.equal(some, whole[chosen])
    monkeypatch.setattr("wan_core.quant.base._AT_ONCE", {"cpu": 3 * whole.shape[1]})  # three rows in one go
    assert torch.equal(packed.dequantise(), whole)
    assert torch.equal(packed.dequantise(torch.bfloat16), whole.to(torch.bfloat16))
