"""Checkpoints made over into other formats and layouts, some rows of a tensor at a time."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Hint, WanError
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.place import MARK, check_target, complete_or_nothing, mark
from ..files.write import Planned, as_json, check_room, write_gguf, write_pickle, write_safetensors
from ..layouts import dit, text, vae
from ..layouts.detect import NAMES, Part, part_of, parts_of
from ..layouts.gguf_tokenizer import gguf_vocabulary, spiece_beside
from ..layouts.keys import IDENTITY, Renames
from ..layouts.variants import choose
from ..loading.dit import understand_dit
from ..loading.text import understand_text
from ..loading.vae import understand_vae
from ..mapped import fetch
from ..quant.base import Format
from ..quant.block_scaled import BlockScaled, in_tiles, tiles_shape
from ..quant.fp8 import FP8
from ..quant.gguf import DECODERS, GGUF, block_type, package
from ..quant.int8 import Int8
from ..quant.mxfp8 import MXFP8
from ..quant.nvfp4 import NVFP4
from ..quant.scaled import Scaled

_AT_ONCE = 1 << 20  # numbers of a tensor in memory at a time
_SHARD = 10 * 10**9  # bytes of a file of a sharded folder
_LIBC = ctypes.CDLL(None) if os.name == "posix" else None


@dataclass(frozen=True)
class Target:
    """What ``--to`` names: a dtype, a quantised format, or a layout with the numbers as they are."""

    layout: str = "comfyui"
    dtype: torch.dtype | None = None
    scaled: Scaled | BlockScaled | None = None
    blocks: str | None = None  # a GGUF type, plain ones ("F16") too


# In GGUF: those that the package gguf can make.
TARGETS: dict[str, Target] = {
    "bf16": Target(dtype=torch.bfloat16),
    "fp16": Target(dtype=torch.float16),
    "fp32": Target(dtype=torch.float32),
    "fp8_scaled": Target(scaled=FP8(torch.float8_e4m3fn)),
    "int8": Target(scaled=Int8()),
    "mxfp8": Target(scaled=MXFP8()),
    "nvfp4": Target(scaled=NVFP4()),
    **{f"gguf:{name}": Target("gguf", blocks=name) for name in
       ("F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")},
    "official": Target("official"),
    "comfyui": Target("comfyui"),
    "diffusers": Target("diffusers"),
}  # fmt: skip


@dataclass
class Error:
    """What a layer lost: the root mean square of the difference, relative to the weights'."""

    squares: float = 0.0
    total: float = 0.0

    def add(self, exact: Tensor, made: Tensor) -> None:
        exact = exact.float()
        self.squares += _sum_of_squares(made.float() - exact)
        self.total += _sum_of_squares(exact)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squares / self.total) if self.total else 0.0


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps it between small blocks, and would come to hold a whole model."""
    if trim := getattr(_LIBC, "malloc_trim", None):
        trim(0)


def _sum_of_squares(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


@dataclass
class Report:
    """What came of a conversion; ``errors`` has a line for each tensor whose numbers changed."""

    written: list[Path] = field(default_factory=list)
    bytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def worst(self) -> list[tuple[str, float]]:
        return sorted(self.errors.items(), key=lambda item: -item[1])


OnTensor = Callable[[str, "float | None"], None]


def convert(
    source: str | Path, target: str | Path, to: str, *, overwrite: bool = False, on_tensor: OnTensor | None = None
) -> Report:
    """Make a checkpoint over.

    Args:
        source: whatever the loaders read: DiT, text encoder or VAE.
        target: the file to write, or the folder for layouts that are folders. Until it is complete it has ``.part`` at
            the end of its name.
        to: a key of ``TARGETS``.
        on_tensor: called after each tensor with its name and relative error, None where its numbers are as they were.

    Raises:
        WanError: an unknown target, a target that is there already, a part that the target is not for, or a full disk,
            after which nothing of the target is left.
    """
    if to not in TARGETS:
        raise WanError(f"Unknown format {to!r}: expected one of {', '.join(TARGETS)}.")
    source, target = Path(source), Path(target)
    checkpoint = open_checkpoint(source)
    check_target(checkpoint, source, target, overwrite=overwrite)
    job = _Job(checkpoint, to, on_tensor or (lambda name, error: None))
    with complete_or_nothing(target, job.files, overwrite=overwrite) as unfinished:
        check_room(unfinished.parent, job.bytes)
        job.write(unfinished)
    job.report.written = sorted(p for p in target.rglob("*") if p.is_file()) if target.is_dir() else [target]
    job.report.bytes = sum(path.stat().st_size for path in job.report.written)
    return job.report


class _Job:
    """One conversion: what will be written under which names, and then the writing."""

    def __init__(self, checkpoint: Checkpoint, to: str, on_tensor: OnTensor) -> None:
        self.checkpoint = checkpoint
        self.fingerprint = checkpoint.fingerprint
        self.to, self.target = to, TARGETS[to]
        self.on_tensor = on_tensor
        self.report = Report()
        self.part: Part = part_of(checkpoint)
        self.module = {"dit": dit, "text": text, "vae": vae}[self.part]
        understand = {"dit": understand_dit, "text": understand_text, "vae": understand_vae}[self.part]
        _, self.names, notes = understand(checkpoint)
        self.report.notes += notes
        if len(held := parts_of(checkpoint)) > 1:
            self.report.notes.append(f"The file holds {len(held)} models; only {NAMES[self.part]} in it is converted.")
        self.shapes = {own: checkpoint.tensors[theirs].shape for own, theirs in self.names.items()}
        self._check()
        self.renames = self._renames()
        self.errors: dict[str, Error] = {}
        self.marks: dict[str, dict[str, str]] = {}  # layer -> ComfyUI's marking
        self.tensors = [one for own in self.names for one in self._plan(own)]
        self.spiece = spiece_beside(checkpoint, self.shapes[text.TABLE][0]) if self.part == "text" else None
        self.shards, self.texts = self._folder()

    @property
    def files(self) -> list[str]:
        """Of the folder that is written; none where it is a file."""
        return [*self.texts, *self.shards]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.tensors)

    def write(self, path: Path) -> None:
        writers = {
            "gguf": self._write_gguf,
            "comfyui": self._write_comfyui,
            "official": self._write_official,
            "diffusers": self._write_folder,
        }
        try:
            with self.checkpoint.reading():
                writers[self.target.layout](path)
        except WanError:  # a read may have noticed first
            self._check_unchanged()
            raise
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.checkpoint.fingerprint != self.fingerprint:
            raise WanError(f"{self.checkpoint.path} was changed while it was converted. Run the conversion again.")

    def _check(self) -> None:
        if self.part == "vae" and (self.target.scaled or self.target.blocks):
            raise WanError(f"{self.checkpoint.path} is a VAE: it is small and stays in full precision.", Hint.TARGET)

    def _renames(self) -> Renames:
        dialects, layout = self.module.DIALECTS, self.target.layout
        if self.part == "text":
            return dialects[{"official": "official", "gguf": "llama.cpp"}.get(layout, "huggingface")]
        if layout != "diffusers":
            return IDENTITY
        return dialects[vae.diffusers_dialect(vae.read_config(self.shapes).kind) if self.part == "vae" else "diffusers"]

    def _plan(self, own: str) -> list[Planned]:
        name, source = self.renames.renamed(own), _Source(self.checkpoint, self.names[own])
        error = self.errors[name] = Error()
        if self._is_quantised(own):
            scaled, blocks = self.target.scaled, self.target.blocks
            if scaled and self._fits(name, source, scaled):
                self.marks[name.removesuffix(".weight")] = _mark(scaled)
                return _SCALED[type(scaled)](source, name, error)
            if blocks and blocks in DECODERS:
                if source.shape[-1] % block_type(blocks).weights == 0:
                    return [_blocks(source, name, blocks, error)]
                self.report.notes.append(
                    f"{name} has rows of {source.shape[-1]}, which {blocks} cannot cut into blocks; it is F16."
                )
                return [_cast(source, name, torch.float16, error)]
        return [_cast(source, name, self._dtype(own, source), error)]

    def _fits(self, name: str, source: _Source, scaled: Scaled | BlockScaled) -> bool:
        """Whether the sides of a matrix are whole blocks: other programs expect those of its rows too."""
        block = getattr(scaled, "block", 1)
        if all(side % block == 0 for side in source.shape):
            return True
        self.report.notes.append(
            f"{name} is {list(source.shape)}, which {scaled.name} cannot cut into blocks of {block}; it stays as it is."
        )
        return False

    def _is_quantised(self, own: str) -> bool:
        if len(self.shapes[own]) != 2:
            return False
        return {"dit": dit.packs, "text": text.is_matrix, "vae": lambda key: False}[self.part](own)

    def _dtype(self, own: str, source: _Source) -> torch.dtype:
        if self.target.blocks:
            return self._gguf_dtype(own, source, self.target.blocks)
        return self.target.dtype or source.plain_dtype

    def _gguf_dtype(self, own: str, source: _Source, blocks: str) -> torch.dtype:
        """GGUF readers want small and sensitive tensors in F32 and know F16 better than BF16."""
        if len(source.shape) != 2 or "norm" in own or own.startswith(("head.", "time_embedding.", "patch_")):
            return torch.float32
        if own == text.TABLE:
            return torch.float16
        if self._is_quantised(own):
            return {"F16": torch.float16, "BF16": torch.bfloat16}[blocks]
        return torch.float32 if "pos_embedding" in own else source.plain_dtype

    def _done(self, one: Planned) -> None:
        error = self.errors.get(one.name)
        changed = error.relative if error and error.squares > 0 else None
        if changed is not None:
            self.report.errors[one.name] = changed
        self.on_tensor(one.name, changed)
        _give_back()

    def _write_gguf(self, path: Path) -> None:
        fields: dict[str, Any] = {
            "general.architecture": {"dit": "wan", "text": "t5encoder"}[self.part],
            "general.quantization_version": 2,
            MARK: mark(self.to),
        }
        if self.part == "text":
            fields |= gguf_vocabulary(self.spiece, self.shapes[text.TABLE][0]) if self.spiece else {}
            self._note_tokenizer()
        write_gguf(path, self.tensors, fields, self._done)

    def _write_comfyui(self, path: Path) -> None:
        tensors = list(self.tensors)
        if self.part == "text":
            self._note_tokenizer()
            if self.spiece:
                data = torch.frombuffer(bytearray(self.spiece), dtype=torch.uint8)
                tensors.append(Planned(text.SPIECE_MODEL, tuple(data.shape), data.dtype, lambda: [data]))
        write_safetensors(path, tensors, self._metadata(), self._done)

    def _note_tokenizer(self) -> None:
        if not self.spiece:
            self.report.notes.append(
                "No spiece.model was found inside or beside the text encoder, so the new file "
                "carries no tokenizer, which ComfyUI needs."
            )

    def _metadata(self) -> dict[str, str]:
        marks = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": self.marks})}
        return {"format": "pt", MARK: mark(self.to), **(marks if self.marks else {})}

    def _write_official(self, path: Path) -> None:
        if self.files:
            self._write_folder(path)
        else:
            write_pickle(path, self.tensors, mark(self.to), self._done)

    def _folder(self) -> tuple[dict[str, list[Planned]], dict[str, str]]:
        """The safetensors files of a layout that is a folder, and the texts beside them, by name."""
        if self.target.layout == "diffusers":
            stem = "model" if self.part == "text" else "diffusion_pytorch_model"
            return {f"{stem}.safetensors": self.tensors}, {"config.json": as_json(self._diffusers_config())}
        if self.target.layout != "official" or self.part != "dit":
            return {}, {}
        parts = _shards(self.tensors)
        shards = {
            f"diffusion_pytorch_model-{number:05d}-of-{len(parts):05d}.safetensors": part
            for number, part in enumerate(parts, 1)
        }
        weight_map = {one.name: name for name, part in shards.items() for one in part}
        index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
        config, _ = dit.config_of(self.checkpoint, self.shapes)
        return shards, {
            "config.json": as_json(dit.official_config(config, choose(config, self.checkpoint.path).variant.task)),
            "diffusion_pytorch_model.safetensors.index.json": as_json(index),
        }

    def _write_folder(self, path: Path) -> None:
        for name, content in self.texts.items():
            (path / name).write_bytes(content.encode("utf-8"))
        metadata = {"format": "pt", MARK: mark(self.to, self.files, self.texts)}
        for name, part in self.shards.items():
            write_safetensors(path / name, part, metadata, self._done)

    def _diffusers_config(self) -> dict:
        if self.part == "dit":
            return dit.diffusers_config(dit.config_of(self.checkpoint, self.shapes)[0])
        if self.part == "vae":
            return vae.diffusers_config(vae.read_config(self.shapes))
        return text.huggingface_config(text.read_config(self.shapes))


@dataclass(frozen=True)
class _Source:
    """A tensor of the checkpoint, as pieces of a matrix whose rows are its output channels."""

    checkpoint: Checkpoint
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.key].shape

    @property
    def plain_dtype(self) -> torch.dtype:
        """Of the numbers when they are not quantised: bfloat16 for those that are now."""
        info = self.checkpoint.tensors[self.key]
        quantised = info.format is not None or info.dtype.itemsize == 1 and info.dtype.is_floating_point
        return torch.bfloat16 if quantised else info.dtype

    def pieces(self) -> Iterator[Tensor]:
        """Some rows at a time, in float32 where the file has them packed."""
        columns = math.prod(self.shape[1:]) if len(self.shape) > 1 else math.prod(self.shape)
        step = max(1, _AT_ONCE // max(columns, 1))
        info = self.checkpoint.tensors[self.key]
        if info.format and self.checkpoint.packed(self.key).shape == self.shape:
            yield from self._unpacked(step)
        else:
            yield from map(fetch, self.checkpoint.tensor(self.key).reshape(-1, columns).split(step))

    def _unpacked(self, step: int) -> Iterator[Tensor]:
        packed = self.checkpoint.packed(self.key).to("cpu")
        for start in range(0, self.shape[0], step):
            yield _decoded(packed.format, packed.format.rows(packed.parts, slice(start, start + step)))


def _decoded(kind: Format, parts: Mapping[str, Tensor]) -> Tensor:
    data = parts["data"]
    return kind.dequantise(parts, torch.empty(len(data), kind.columns(data)))


def _cast(source: _Source, name: str, dtype: torch.dtype, error: Error) -> Planned:
    def pieces() -> Iterator[Tensor]:
        for rows in source.pieces():
            made = rows.to(dtype)
            if dtype.is_floating_point and not _holds(dtype, rows.dtype):
                error.add(rows, made)
            yield made

    return Planned(name, source.shape, dtype, pieces)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a dtype can hold every number of another."""
    return torch.promote_types(dtype, other) == dtype if other.itemsize > 1 else True


def _fp8_scaled(source: _Source, name: str, error: Error) -> list[Planned]:
    """One scale for the matrix: ComfyUI's products know no others."""
    kind = FP8(torch.float8_e4m3fn)
    scale: list[Tensor] = []

    def data() -> Iterator[Tensor]:
        largest = max(rows.float().abs().amax() for rows in source.pieces())
        scale.append((largest / kind.largest).clamp(min=1e-30))
        for rows in source.pieces():
            made = (rows.float() / scale[0]).clamp_(-kind.largest, kind.largest).to(kind.dtype)
            error.add(rows, made.float() * scale[0])
            yield made

    weight = Planned(name, source.shape, kind.dtype, data)
    return [weight, Planned(f"{name}_scale", (), torch.float32, lambda: scale)]


def _int8(source: _Source, name: str, error: Error) -> list[Planned]:
    scales: list[Tensor] = []

    def data() -> Iterator[Tensor]:
        for rows in source.pieces():
            parts = Int8().pack(rows).parts
            error.add(rows, _decoded(Int8(), parts))
            scales.append(parts["scale"])
            yield parts["data"]

    weight = Planned(name, source.shape, torch.int8, data)
    return [weight, Planned(f"{name}_scale", (source.shape[0], 1), torch.float32, lambda: scales)]


def _mxfp8(source: _Source, name: str, error: Error) -> list[Planned]:
    return _in_blocks(source, name, error, MXFP8(), torch.float8_e4m3fn, source.shape)


def _nvfp4(source: _Source, name: str, error: Error) -> list[Planned]:
    rows, columns = source.shape
    return _in_blocks(source, name, error, NVFP4(), torch.uint8, (rows, columns // 2))


def _in_blocks(
    source: _Source, name: str, error: Error, kind: MXFP8 | NVFP4, dtype: torch.dtype, shape: tuple[int, ...]
) -> list[Planned]:
    """The scales in tiles, as ComfyUI's products take them; what is kept of a matrix meanwhile are its scales."""
    scales: list[Tensor] = []
    whole: list[Tensor] = []

    def data() -> Iterator[Tensor]:
        if isinstance(kind, NVFP4):
            whole.append(kind.factor(max(rows.float().abs().amax() for rows in source.pieces())))
        for rows in source.pieces():
            parts = kind.pack(rows, *whole)
            error.add(rows, _decoded(kind, parts))
            scales.append(parts["scale"])
            yield parts["data"]

    weight = Planned(name, shape, dtype, data)
    tiles = tiles_shape(source.shape[0], source.shape[1] // kind.block)
    scale = Planned(
        f"{name}_scale", tiles, kind.scale_dtype, lambda: [in_tiles(torch.cat(scales)).view(kind.scale_dtype)]
    )
    return [weight, scale, *([Planned(f"{name}_scale_2", (), torch.float32, lambda: whole)] if kind.whole else [])]


_SCALED = {FP8: _fp8_scaled, Int8: _int8, MXFP8: _mxfp8, NVFP4: _nvfp4}


def _mark(kind: Scaled | BlockScaled) -> dict[str, str]:
    return {"format": {FP8: "float8_e4m3fn", Int8: "int8_tensorwise", MXFP8: "mxfp8", NVFP4: "nvfp4"}[type(kind)]}


def _blocks(source: _Source, name: str, kind: str, error: Error) -> Planned:
    def pieces() -> Iterator[Tensor]:
        gguf = package()
        for rows in source.pieces():
            made = torch.from_numpy(gguf.quants.quantize(rows.float().numpy(), gguf.GGMLQuantizationType[kind]))
            error.add(rows, _decoded(GGUF(kind), {"data": made}))
            yield made

    return Planned(name, source.shape, torch.uint8, pieces, blocks=kind)


def _shards(tensors: list[Planned]) -> list[list[Planned]]:
    """Consecutive groups of at most _SHARD bytes each, but for a tensor that is larger by itself."""
    shards: list[list[Planned]] = [[]]
    for one in tensors:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + one.bytes > _SHARD:
            shards.append([])
        shards[-1].append(one)
    return shards
