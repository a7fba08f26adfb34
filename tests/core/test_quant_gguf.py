"""GGUF's block types against the package gguf, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from tests.core.quant_files import random_blocks
from wan_core.quant.base import Packed
from wan_core.quant.gguf import DECODERS, GGUF, block_type

ROWS, BLOCKS = 7, 24
SIZES = {  # weights and bytes of a block in ggml-common.h
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84),
    "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}  # fmt: skip


def random_rows(kind: str) -> np.ndarray:
    return random_blocks(kind, ROWS, BLOCKS * block_type(kind).weights)


@pytest.mark.parametrize("kind", DECODERS)
def test_dequantises_to_the_bits_of_the_package(kind: str):
    data = random_rows(kind)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    ours = Packed(GGUF(kind), {"data": torch.from_numpy(data)}).dequantise()
    assert ours.shape == expected.shape
    assert np.array_equal(ours.numpy().view(np.uint32), expected.view(np.uint32))
    assert np.isfinite(expected).all() and len(np.unique(expected)) > 1000


@pytest.mark.parametrize("kind", DECODERS)
def test_sizes_are_those_of_ggml(kind: str):
    assert block_type(kind)[:2] == SIZES[kind]


def test_every_listed_type_is_there():
    listed = {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}
    assert set(DECODERS) == listed


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
