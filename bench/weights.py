"""What the nano T2V pair loses by quantised weights: files as ``wan_core convert`` writes them, beside bfloat16.

The family's own files are fp8 already, which would lose nothing by being rounded to fp8 again. So its numbers are first
spread at random over what fp8 rounds to them: a model that never was rounded, and is as good. On a CPU all formats are
computed with in float32: a row's error is that of the weights alone, not of a card's products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from wan_core.files.write import save_tensors
from wan_core.loading.dit import DiTFile, read_dit
from wan_core.pipeline import Models
from wan_core.quant.base import Packed
from wan_core.tools.convert import convert

from . import document

FORMATS = ("bf16", "fp8_scaled", "int8", "mxfp8", "nvfp4", "gguf:Q8_0", "gguf:Q5_1", "gguf:Q5_0", "gguf:Q4_1",
           "gguf:Q4_0")  # fmt: skip
_BEGIN, _END = "<!-- weights: written by python -m bench quality -->", "<!-- end of weights -->"

Latents = Callable[[Models], list[Tensor]]  # of all prompts


def rows(models: Models, latents: Latents, formats: Sequence[str] = FORMATS) -> Iterator[dict]:
    """For each format the bits that a number takes, and the error of the final latents, relative to the unrounded."""
    with TemporaryDirectory() as folder:
        own = enumerate(models.dit.own)
        exact = [_unrounded(file, Path(folder, f"exact{i}.safetensors"), seed=i) for i, file in own]
        whole = latents(_with(models, exact))
        for name in formats:
            stem = name.replace(":", "-")
            made = [_converted(file, name, Path(folder, f"{stem}{i}")) for i, file in enumerate(exact)]
            found = latents(_with(models, made))
            errors = [((one - all_).norm() / all_.norm()).item() for one, all_ in zip(found, whole, strict=True)]
            yield {"format": name, "bits": round(mean(map(_bits, made)), 2), "error": round(mean(errors), 4)}


def _with(models: Models, files: Sequence[DiTFile]) -> Models:
    return replace(models, dit=replace(models.dit, high=files[0], low=files[1]))


def _unrounded(file: DiTFile, target: Path, seed: int) -> DiTFile:
    generator, made = torch.Generator().manual_seed(seed), {}
    for key, name in file.names.items():
        packed = file.checkpoint.tensors[name].format
        made[key] = _spread(file.checkpoint.packed(name), generator) if packed else file.checkpoint.tensor(name).float()
    save_tensors(made, target, {"format": "pt"})
    return read_dit(target)


def _spread(matrix: Packed, generator: torch.Generator) -> Tensor:
    """fp8 numbers anywhere between the middles to their neighbours; the greatest stay, which the scale is made from."""
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].unique()
    middles = (grid[1:] + grid[:-1]) / 2
    stored = matrix.parts["data"].float()
    place = torch.searchsorted(grid, stored).clamp(1, len(grid) - 2)
    low, high = middles[place - 1], middles[place]
    moved = low + (high - low) * torch.rand(stored.shape, generator=generator)
    ratio = matrix.dequantise().norm() / stored.norm()
    return torch.where(stored.abs() == grid[-1], stored, moved) * ratio


def _converted(file: DiTFile, name: str, target: Path) -> DiTFile:
    target = target.with_suffix(".gguf" if name.startswith("gguf:") else ".safetensors")
    convert(file.path, target, name)
    return read_dit(target)


def _bits(file: DiTFile) -> float:
    """Of one number of a block's matrix, its scales included."""
    checkpoint, key = file.checkpoint, file.names["blocks.0.ffn.0.weight"]
    return 8 * (checkpoint.stored_bytes(key) + checkpoint.scale_bytes(key)) / prod(checkpoint.tensors[key].shape)


def publish(measured: Sequence[dict]) -> None:
    lines = ["| weights | bits a number | error |", "| --- | ---: | ---: |"]
    lines += [f"| {row['format']} | {row['bits']:.2f} | {row['error']:.4f} |" for row in measured]
    document.publish("\n".join(lines) + "\n", _BEGIN, _END)
