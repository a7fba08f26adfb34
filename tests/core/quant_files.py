"""Small quantised files for tests, written by the package gguf and after ComfyUI's own layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """[rows, bytes] of a block type: every bit random, but for the float16 scales, which are small finite numbers."""
    weights, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        scale = random.standard_normal(data.shape[:2] + (1,)) * 10.0 ** random.integers(-7, 0, data.shape[:2] + (1,))
        data[..., offset : offset + 2] = scale.astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


# Where the float16 scales lie in a block: random bytes would make infinities and NaNs of them.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def write_gguf(
    file: Path,
    weights: Mapping[str, Tensor],
    kind_of: Callable[[str, Tensor], str],
    *,
    architecture: str = "wan",
    fields: Callable[[GGUFWriter], None] = lambda writer: None,
) -> None:
    """Write weights, each as the type that ``kind_of`` names: one that the package can quantise."""
    writer = GGUFWriter(str(file), architecture)
    fields(writer)
    for key, tensor in weights.items():
        kind = GGMLQuantizationType[kind_of(key, tensor)]
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_matrix(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2


def fp8_scaled(weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float8_e4m3fn) -> dict[str, Tensor]:
    """Every matrix with a scale of its own, in ComfyUI's older marking."""
    made = {"scaled_fp8": torch.zeros(0, dtype=dtype)}
    for key, tensor in weights.items():
        made[key] = tensor.contiguous()
        if is_matrix(key, tensor):
            scale = tensor.abs().max() / torch.finfo(dtype).max
            made[key] = (tensor / scale).to(dtype)
            made[key.removesuffix("weight") + "scale_weight"] = scale
    return made
