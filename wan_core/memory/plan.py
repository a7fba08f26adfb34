"""What a run will need of a device, said from headers alone, before a weight is read; and how to fit a budget.

What a plan says is the peak of tensors: a kernel's own workspace and the driver are not in it. The tests hold it
against the real modules on the meta device (``tracing``) and against measured memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from .. import kernels
from ..config import PATCH, TEXT_LENGTH, Architecture, VAEConfig
from ..dtypes import precision_of, resolve_dtype
from ..errors import WanError
from ..files.checkpoint import Checkpoint
from ..layouts.dit import packs
from ..layouts.keys import block_of
from ..lora.use import bytes_beside, merges
from ..models.dit.attention import takes_whole
from ..models.dit.dit import keeps_float32, may_stay_in_file
from ..models.dit.features import feature_of
from ..models.dit.layers import rows_at_once
from ..recipe import LoraUse
from ..staging import PIECE
from .activations import dit_activations, vae_budget
from .budget import GB, WORKSPACE, Budget
from .devices import total_bytes
from .stream.ring import STAGES, check_count, spread
from .stream.transfer import BACKENDS

if TYPE_CHECKING:
    from ..loading.dit import DiTFile
    from ..recipe import ModelRecipe

AUTO = "auto"
_LATENTS = 12  # copies of the latent that solver, guidance, previews and the step before hold at once, float32
_CACHED_LATENTS = 5  # of a step cache: two differences, two samples, an answer


class DiTHeader(Protocol):
    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def names(self) -> dict[str, str]: ...

    @property
    def config(self) -> Architecture: ...


@dataclass(frozen=True)
class Weights:
    """Bytes of one expert's weights on a device; on a CPU without those that stay in the file and are read as they are
    used: packed matrices and, with blocks that stream, matrices that a CPU can use as they lie there.
    """

    outside: int  # of the blocks
    blocks: tuple[int, ...]  # of each block, resident
    scratch: int  # the buffer that a matrix is dequantised or read into
    slots: tuple[int, ...]  # of each block, what its slot holds while it streams
    small: tuple[int, ...]  # of each block, what is in memory also while it streams
    staged: tuple[int, ...]  # of each block, what is copied while it streams: as it is stored

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)

    def kept(self, swapped: Sequence[int]) -> int:
        """With these blocks streaming, all but what the slots hold."""
        gone = set(swapped)
        inside = (self.small[i] if i in gone else size for i, size in enumerate(self.blocks))
        return self.outside + self.scratch + sum(inside)


@dataclass(frozen=True)
class Plan:
    """How a run is laid out, and what it needs: bytes on the device at the worst moment, by what they are for.

    Attributes:
        swapped, prefetch: blocks that stream, and how many of them are on the device before their turn.
        needs: bytes, by what they are for.
        moved: bytes copied to the device at each step.
        limit: the budget that was asked for, or None.
    """

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of the latent [B, C, T, h, w]
    layers: int
    swapped: int
    prefetch: int
    needs: Budget
    moved: int
    limit: float | None = None

    @property
    def total(self) -> int:
        """Bytes on the device at the worst moment."""
        return self.needs.total

    def __str__(self) -> str:
        b, _, t, h, w = self.shape
        budget = "" if self.limit is None else f" of {self.limit / GB:.1f} GB allowed"
        lines = [
            f"{self.total / GB:.2f} GB on {self.device}{budget} ({str(self.dtype).removeprefix('torch.')}, "
            f"latent {w}x{h}x{t}{f', batch {b}' if b > 1 else ''})",
            f"weights {self.needs.weights / GB:.2f} GB, streaming {self.needs.stream / GB:.2f} GB, "
            f"activations {self.needs.working / GB:.2f} GB",
            f"{self.layers - self.swapped} of {self.layers} blocks stay on the device, {self.swapped} stream "
            f"(prefetch {self.prefetch})",
        ]
        if self.moved:
            lines.append(
                f"{self.moved / GB:.1f} GB copied to the device each step, {self.needs.pinned / GB:.1f} GB of RAM"
            )
        return "\n".join(lines)


def weights_of(
    file: DiTHeader,
    dtype: str | torch.dtype | None,
    device: torch.device | str,
    *,
    loras: Sequence[LoraUse] = (),
    streaming: bool = False,
) -> Weights:
    """An expert's weights from its header, with its LoRAs.

    Args:
        streaming: whether any blocks stream.
    """
    device = torch.device(device)
    precision = precision_of(dtype)
    compute, make = precision.on(device, file.checkpoint.dtype), precision.weights is not None
    on_cpu = device.type == "cpu"
    outside, scratch = 0, 0
    blocks, slots, small, staged = ([0] * file.config.layers for _ in range(4))
    for own, theirs in file.names.items():
        info = file.checkpoint.tensors[theirs]
        count = math.prod(info.shape)
        packed = packs(own) and (info.format is not None or make)
        target = torch.float32 if keeps_float32(own) else compute
        beside = bytes_beside(loras, own, compute) if packs(own) else 0
        in_file = on_cpu and packed and info.format is not None
        if in_file:
            size = file.checkpoint.scale_bytes(theirs)
        else:
            size = _packed_bytes(file.checkpoint, theirs) if packed else count * target.itemsize
        if packed or merges(loras, own):
            scratch = max(scratch, count * compute.itemsize)
        fits = on_cpu and not packed and info.format is None and info.dtype == target
        read = fits and streaming and may_stay_in_file(own)
        if read:
            rows, columns = info.shape
            scratch = max(scratch, rows_at_once(rows, columns, target) * columns * target.itemsize)
        if (block := block_of(own)) is not None and block < len(blocks):
            blocks[block] += size + beside
            comes = not (fits or in_file)
            slots[block] += beside + comes * size
            staged[block] += beside + comes * (size if packed or info.format else count * info.dtype.itemsize)
            small[block] += size if in_file or (fits and not read) else 0
        else:
            outside += beside + (0 if read else size)
    return Weights(outside, tuple(blocks), scratch, tuple(slots), tuple(small), tuple(staged))


def _packed_bytes(checkpoint: Checkpoint, key: str) -> int:
    """Of a packed matrix as it is stored, or as it will be after packing on load: a byte each, a scale each row."""
    info = checkpoint.tensors[key]
    return checkpoint.stored_bytes(key) if info.format else math.prod(info.shape) + 4 * info.shape[0]


def tokens_of(shape: Sequence[int]) -> int:
    """Tokens of each video of a latent [B, C, T, h, w]."""
    _, _, t, h, w = shape
    return t * math.ceil(h / PATCH[1]) * math.ceil(w / PATCH[2])


def context_tokens(config: Architecture) -> int:
    """What cross-attention hears: the text, and what the model's features add to it."""
    return TEXT_LENGTH + sum(feature_of(feature).context_tokens(feature) for feature in config.features)


def held_bytes(
    config: Architecture,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    prompts: int,
    keep_text: bool,
    step_cache: bool = False,
) -> int:
    """What a run holds between calls: latents, and so many prompts as the model sees them."""
    b, _, t, h, w = shape
    places = b * t * h * w * 4
    copies = _LATENTS + _CACHED_LATENTS * step_cache
    latents = places * (copies * config.out_channels + 2 * config.in_channels)
    heard = context_tokens(config)
    embedded = TEXT_LENGTH * config.text_dim * 4 + heard * config.dim * dtype.itemsize
    states = config.layers * 2 * heard * config.dim * dtype.itemsize if keep_text else 0
    return latents + prompts * (embedded + b * states)


def plan(
    recipe: ModelRecipe,
    shape: tuple[int, ...],
    device: torch.device | str,
    *,
    prompts: int = 2,
    free: int | None = None,
) -> Plan:
    """The layout of a recipe's run.

    Args:
        shape: of the latent [B, C, T, h, w].
        prompts: how many are computed with at a step, those of both sides of the guidance together.
        free: bytes that the device has for us, for a recipe whose limit is "auto".

    Raises:
        WanError: a number of blocks that the model does not have, or a budget that is too small, with the smallest
            that is not.
    """
    device = torch.device(device)
    lay = _layout(recipe, tuple(shape), device, prompts)
    if recipe.vram_limit is None:
        check_count(recipe.swap_blocks, recipe.high.config.layers)
        return lay(recipe.swap_blocks, recipe.prefetch)
    limit = _limit(recipe.vram_limit, free)
    return replace(_largest_that_fits(lay, limit, recipe), limit=limit)


def check_fits(
    recipe: ModelRecipe,
    shape: tuple[int, ...],
    device: torch.device | str,
    *,
    prompts: int = 2,
    total: int | None = None,
) -> None:
    """Refuse a video that sampling cannot hold however little of the model is on the device; nothing is allocated.

    Args:
        shape: of the latent [B, C, T, h, w].
        total: bytes of the device, or what it is known to have for us; None asks the machine.

    Raises:
        WanError: with what it would take, and what there is.
    """
    device = torch.device(device)
    total = total_bytes(device) if total is None else total
    lay, layers = _layout(recipe, tuple(shape), device, prompts), recipe.high.config.layers
    least = min((lay(0, 0), lay(layers, 0)), key=lambda made: made.total)
    if least.total > total:
        what = f"a latent of {shape[4]}x{shape[3]}x{shape[2]}{_batch(shape[0])}"
        raise does_not_fit(what, least.total, total, device)


def check_frames_fit(
    config: VAEConfig, height: int, width: int, device: torch.device | str, *, total: int | None = None
) -> None:
    """Refuse frames (or tiles) that the VAE cannot decode at once in float32.

    Raises:
        WanError: with what it would take, and what there is.
    """
    device = torch.device(device)
    total = total_bytes(device) if total is None else total
    taken = 4 * 3 * 4 * height * width  # the picture alone: tracing takes long on absurd sizes
    if taken <= total:
        taken = vae_budget(config, height, width).total
    if taken > total:
        raise does_not_fit(
            f"decoding frames of {width}x{height} pixels",
            taken,
            total,
            device,
            "Decode in tiles (512 pixels a side, say), or choose a smaller size.",
        )


def does_not_fit(
    what: str, taken: float, total: float, device: torch.device, do: str = "Choose a smaller size or fewer frames."
) -> WanError:
    return WanError(
        f"{what[0].upper()}{what[1:]} takes at least {_gb(taken)} of memory, but {device} has {_gb(total)}. {do}"
    )


def _gb(count: float) -> str:
    return f"{count / GB:.1f} GB" if count < 1e15 else f"{count / GB:.1e} GB"


def _batch(count: int) -> str:
    return f", batch {count}" if count > 1 else ""


def smaller(used: Plan) -> tuple[int, int] | None:
    """Swapped blocks and prefetch for another try after this plan was too much; None when nothing is left to give."""
    if used.swapped < used.layers:
        resident = (used.layers - used.swapped) // 2
        return used.layers - resident, used.prefetch
    return (used.swapped, 0) if used.prefetch else None


def _limit(asked: float | str, free: int | None) -> float:
    if asked == AUTO:
        return max(0.0, (free or 0) - WORKSPACE)
    if not isinstance(asked, (int, float)) or not asked > 0:
        raise WanError(f"The memory limit is {asked!r}: expected gigabytes, more than 0, or auto.")
    return asked * GB


def _layout(
    recipe: ModelRecipe, shape: tuple[int, ...], device: torch.device, prompts: int
) -> Callable[[int, int], Plan]:
    """Swapped blocks, prefetch -> plan. Both experts have the same shapes; of the engine's own the larger counts."""
    config = recipe.high.config
    dtype = resolve_dtype(recipe.dtype, device, recipe.stored)
    held_whole, held_in_part = (_larger_expert(recipe, device, streaming=streaming) for streaming in (False, True))
    rules = recipe.guidance
    merged = prompts > 1 and rules.merges
    batch = shape[0] * (1 + merged)
    held = held_bytes(
        config,
        shape,
        dtype,
        prompts=rules.texts(prompts),
        keep_text=recipe.keeps_text,
        step_cache=recipe.step_cache is not None,
    )
    held += merged * math.prod(shape[2:]) * batch * 4 * (config.in_channels + config.out_channels)  # in, and out
    activations = dit_activations(
        config,
        batch,
        tokens_of(shape),
        dtype,
        fused=_is_fused(device),
        whole_attention=takes_whole(recipe.attention),
        against=rules.nag is not None,
        compiled=recipe.compile,
    )

    def lay(swapped: int, prefetch: int) -> Plan:
        weights = held_in_part if swapped else held_whole
        prefetch = _ahead(swapped, prefetch, device)
        needs = _placed(weights, swapped, prefetch, device)
        moved = sum(weights.staged[i] for i in spread(swapped, config.layers))
        return Plan(
            device=str(device),
            dtype=dtype,
            shape=shape,
            layers=config.layers,
            swapped=swapped,
            prefetch=prefetch,
            needs=replace(needs, activations=activations, held=held),
            moved=moved * (prompts - merged),
        )

    return lay


def dit_budget(file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> Budget:
    """One expert with as many blocks streaming as the recipe says, without what it computes with."""
    device, swapped = torch.device(device), recipe.swap_blocks
    weights = weights_of(file, recipe.dtype, device, loras=recipe.loras_of(file), streaming=swapped > 0)
    return _placed(weights, swapped, _ahead(swapped, recipe.prefetch, device), device)


def _placed(weights: Weights, swapped: int, prefetch: int, device: torch.device) -> Budget:
    if not swapped:
        return Budget(weights.kept(()))
    largest = max(weights.slots)
    return Budget(
        weights.kept(spread(swapped, len(weights.blocks))),
        stream=(prefetch + 1) * largest,
        pinned=STAGES * pinned_bytes(min(PIECE, max(weights.staged))) if device.type in BACKENDS else 0,
    )


def _ahead(swapped: int, prefetch: int, device: torch.device) -> int:
    """How many blocks are on the device before their turn: fewer than stream, and none where copies cannot overlap."""
    return min(prefetch, max(0, swapped - 1)) if device.type in BACKENDS else 0


def _is_fused(device: torch.device) -> bool:
    """Whether the pack's kernels will run; a plan for a device that is not here is made without them."""
    return device.type == "cuda" and torch.cuda.is_available() and kernels.available(device)


def _larger_expert(recipe: ModelRecipe, device: torch.device, *, streaming: bool) -> Weights:
    each = [
        weights_of(file, recipe.dtype, device, loras=recipe.loras_of(file), streaming=streaming) for file in recipe.own
    ]
    nothing = (0,) * recipe.high.config.layers
    return max(each, key=lambda w: w.total, default=Weights(0, nothing, 0, *[nothing] * 3))


def pinned_bytes(size: int) -> int:
    """What PyTorch takes for a pinned buffer: the next power of two."""
    return 1 << math.ceil(math.log2(size)) if size else 0


def _largest_that_fits(lay: Callable[[int, int], Plan], limit: float, recipe: ModelRecipe) -> Plan:
    layers = recipe.high.config.layers
    for prefetch in range(recipe.prefetch, -1, -1):
        for swapped in range(layers + 1):
            found = lay(swapped, prefetch)
            if found.total <= limit:
                return found
    least = min((lay(swapped, 0) for swapped in range(layers + 1)), key=lambda p: p.total)
    need = math.ceil(least.total / GB * 10) / 10
    b, _, t, h, w = least.shape
    raise WanError(
        f"{recipe} at a latent of {w}x{h}x{t}{f', batch {b}' if b > 1 else ''} does not fit into {limit / GB:.1f} GB "
        f"on {least.device}: with every block streamed it needs {need:.1f} GB, of which activations are "
        f"{least.needs.working / GB:.1f} GB. Allow {need:.1f} GB, or choose a smaller size or fewer frames."
    )
