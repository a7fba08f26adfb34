"""The one place where weights live: recipes in, models out, and everything given back on request.

Nodes and the pipeline ask for a part when they are about to use it. What was loaded stays for the next run while
there is room; the least recently used goes first. ``release`` drops all, and with the last tensor the mapped files.
"""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..config import TEXT_LENGTH, PerExpert
from ..dtypes import resolve_dtype
from ..external import ExternalModel
from ..files.unchanged import check_unchanged
from ..layouts import text as text_layout
from ..loading.clip import ClipFile, build_clip, clip_dtype
from ..loading.dit import DiTFile
from ..loading.text import TextEncoder, TextFile, build_text_encoder
from ..loading.vae import VAEFile, build_vae
from ..lora.apply import adaptation_of
from ..memory.build import build_dit
from ..models.clip.vit import ClipVision
from ..models.dit.attention import BACKENDS, Attend
from ..models.dit.dit import TextStates, WanDiT
from ..models.dit.inputs import with_channels
from ..models.dit.probe import NotFinite, watched
from ..models.dit.runner import BlockRunner, CompiledRunner
from ..models.vae.vae import VideoVAE
from ..recipe import ModelRecipe, Network
from ..sampling.denoise import SILENT, Callbacks
from ..sampling.experts import Expert, Experts, Model
from ..sampling.guidance import Condition
from .activations import clip_activations, text_activations
from .budget import GB, UNKNOWN, Budget
from .devices import available_bytes, empty_cache
from .plan import AUTO, Plan, dit_budget, plan, smaller
from .readahead import ReadAhead

log = logging.getLogger(__name__)


@dataclass
class _Loaded:
    part: Any
    bytes: int
    device: torch.device
    alone: bool  # on its device: a memory limit leaves no room for others


def _no_room_made(needs: Budget, device: torch.device) -> None: ...


@dataclass
class Engine:
    """Loads, keeps and releases models.

    Args:
        make_room: called with what is about to be loaded or to work, and the device, so that a host (ComfyUI) can move
            its own models away.
        keep_one: hold one model at a time on a device other than the CPU, whatever the room (``--offload_model``).
        free_bytes: what a device has for us; a host that lends memory knows better than the driver what it can take
            back. None asks the driver.
    """

    make_room: Callable[[Budget, torch.device], None] = _no_room_made
    keep_one: bool = False
    free_bytes: Callable[[torch.device], int] | None = None
    loads: int = 0  # how many models were read so far; a run that reloads nothing leaves it as it was
    _loaded: OrderedDict[Hashable, _Loaded] = field(default_factory=OrderedDict)
    _plans: dict[Hashable, Plan] = field(default_factory=dict)
    _ahead: ReadAhead = field(default_factory=ReadAhead)
    _crowded: set[Hashable] = field(default_factory=set)  # runs that ran out of memory beside other parts
    _run: Budget = Budget(activations=UNKNOWN)  # of the run that the transformers work in
    _alone: bool = False
    _at_work: Hashable = None  # the transformer that has been given room

    def get(
        self,
        key: Hashable,
        needs: Budget,
        device: torch.device | str,
        load: Callable[[], Any],
        *,
        alone: bool = False,
        settled: bool = False,
    ) -> Any:
        """The part under this key, loaded now if it is not there yet, with room for what it will do.

        Args:
            load: makes the part.
            alone: every other part on the device makes way, as this one will for the next.
            settled: it has had its room, if it is there.
        """
        device = torch.device(device)
        if key in self._loaded:
            self._loaded.move_to_end(key)
            if not settled and needs.working > UNKNOWN:  # for less, nothing that is here is read again
                self._make_room(replace(needs, weights=0, stream=0), device, False, spare=key)
            return self._loaded[key].part
        self._make_room(needs, device, alone)
        self.loads += 1
        part = load()
        log.info("wan_core: loaded %s on %s (%.2f GB)", key[0], device, needs.loaded / GB)
        self._loaded[key] = _Loaded(part, needs.loaded, device, alone)
        return part

    def fit(
        self, recipe: ModelRecipe, shape: tuple[int, ...], device: torch.device | str, *, prompts: int = 2
    ) -> tuple[ModelRecipe, Plan]:
        """A recipe with its memory limit turned into blocks that stream, for a latent [B, C, T, h, w]; and the plan.

        What "auto" came to is kept for the next run of the same kind, so that it finds its weights where they are.

        Raises:
            WanError: see ``plan``.
        """
        device = torch.device(device)
        key = _run_key(recipe, shape, device, prompts)
        if key not in self._plans:
            if recipe.vram_limit == AUTO:
                whole = replace(recipe, swap_blocks=0, vram_limit=None)
                self.make_room(plan(whole, shape, device, prompts=prompts).needs, device)
            free = self.free(device) + self.bytes_on(device)
            self._plans[key] = plan(recipe, shape, device, prompts=prompts, free=free)
        found = self._plans[key]
        self._prepare_for(found, alone=key in self._crowded)
        return replace(recipe, swap_blocks=found.swapped, prefetch=found.prefetch), found

    def fit_alone(
        self, used: Plan, recipe: ModelRecipe, shape: tuple[int, ...], device: torch.device | str, *, prompts: int = 2
    ) -> bool:
        """After what ``fit`` said was too much beside other parts on the device, the other expert above all: all is
        released, and the run goes on as it was planned, with one part at a time there.

        False if there was nothing beside it, or if that has been tried.
        """
        device, key = torch.device(device), _run_key(recipe, shape, device, prompts)
        beside = [entry for entry in self._loaded.values() if entry.device == device][1:]
        if device.type == "cpu" or not beside or key in self._crowded:
            return False
        self.release()
        self._plans[key] = used
        self._crowded.add(key)
        self._prepare_for(used, alone=True)
        return True

    def _prepare_for(self, found: Plan, *, alone: bool) -> None:
        """What the transformers of the coming run need beside their weights."""
        self._run, self._alone, self._at_work = found.needs, alone, None

    def fit_less(
        self, used: Plan, recipe: ModelRecipe, shape: tuple[int, ...], device: torch.device | str, *, prompts: int = 2
    ) -> tuple[ModelRecipe, Plan] | None:
        """After what ``fit`` said was too much: all is released, and less is planned from now on.

        None if there is no less, or if the weights are not the engine's.
        """
        device = torch.device(device)
        key = _run_key(recipe, shape, device, prompts)
        crowded = key in self._crowded
        less = smaller(used) if recipe.own else None
        self.release()
        if less is None:
            return None
        swapped, prefetch = less
        tight = replace(recipe, swap_blocks=swapped, prefetch=prefetch, vram_limit=None)
        self._plans[key] = plan(tight, shape, device, prompts=prompts)
        self._crowded |= {key} if crowded else set()
        self._prepare_for(self._plans[key], alone=crowded)
        return replace(tight, vram_limit=recipe.vram_limit or AUTO), self._plans[key]

    def dit(self, file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> WanDiT:
        """One expert's weights, as the recipe wants them.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_dit``.
        """
        check_unchanged(file)
        key, needs = _dit_key(file, recipe, device), dit_budget(file, recipe, device).at_work(self._run)
        self._resize(key, needs.loaded)
        # Others may have come since, or this run is a larger one: but that is asked once, not at each call.
        settled, self._at_work = key == self._at_work, key
        return self.get(
            key,
            needs,
            device,
            lambda: build_dit(
                file,
                device=device,
                dtype=recipe.dtype,
                attention=recipe.attention,
                swap_blocks=recipe.swap_blocks,
                prefetch=recipe.prefetch,
            ),
            alone=recipe.vram_limit is not None or self._alone,
            settled=settled,
        )

    def missing_bytes(self, recipe: ModelRecipe, device: torch.device | str) -> int:
        """What the first call of a recipe will load; 0 as soon as one of its experts is there: they take turns."""
        kept = {key[:3] for key in self._loaded}  # with however many blocks
        if any(_dit_key(file, recipe, device)[:3] in kept for file in recipe.own):
            return 0
        return max((dit_budget(file, recipe, device).loaded for file in recipe.own), default=0)

    def _resize(self, key: Hashable, size: int) -> None:
        """A loaded part is about to take more or less than it did, with other LoRAs."""
        entry = self._loaded.get(key)
        if entry and size > entry.bytes:
            self.make_room(Budget(size - entry.bytes), entry.device)
        if entry:
            entry.bytes = size

    def read_ahead(self, file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> None:
        """Have a file read that will be needed soon, unless it is loaded: by the system, into no memory of ours."""
        if _dit_key(file, recipe, device) not in self._loaded:
            self._ahead.begin(file.checkpoint.files)

    def experts(
        self, recipe: ModelRecipe, guidance: PerExpert, device: torch.device | str, callbacks: Callbacks = SILENT
    ) -> Experts:
        """A recipe's experts as ``denoise`` calls them; nothing is loaded before the first call."""
        high = self._network(recipe.high, recipe, torch.device(device), callbacks)
        if recipe.low is None:
            return Experts.dense(high, guidance.low)
        low = self._network(recipe.low, recipe, torch.device(device), callbacks)
        return Experts(
            high=Expert(high, guidance.high, "high"),
            low=Expert(low, guidance.low, "low"),
            boundary=recipe.variant.boundary,
            switch=recipe.switch,
        )

    def _network(self, file: Network, recipe: ModelRecipe, device: torch.device, callbacks: Callbacks) -> Model:
        if isinstance(file, ExternalModel):
            return file.connect(device)
        return LazyDiT(self, file, recipe, device, callbacks)

    def text_encoder(
        self, file: TextFile, device: torch.device | str, dtype: str | torch.dtype | None, *, resident: bool = True
    ) -> TextEncoder:
        """A text encoder with its weights; without ``resident`` they come to the device matrix by matrix.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_text_encoder``.
        """
        check_unchanged(file)
        key = ("text", file.fingerprint, str(device), str(dtype), resident)
        weights = text_bytes(file, device, dtype) if resident else largest_matrix(file, device, dtype)
        compute = resolve_dtype(dtype, device, file.checkpoint.dtype)
        needs = Budget(weights, activations=text_activations(file.config, compute))
        return self.get(
            key, needs, device, lambda: build_text_encoder(file, device=device, dtype=dtype, resident=resident)
        )

    def vae(
        self, file: VAEFile, device: torch.device | str, dtype: str | torch.dtype | None, *, working: int = UNKNOWN
    ) -> VideoVAE:
        """A VAE with its weights.

        Args:
            working: bytes of activations that it is loaded for (``vae_budget``); other parts make way for them.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_vae``.
        """
        check_unchanged(file)
        key = ("vae", file.fingerprint, str(device), str(dtype))
        needs = Budget(_bytes(file, device, dtype), activations=working)
        return self.get(key, needs, device, lambda: build_vae(file, device=device, dtype=dtype))

    def clip(self, file: ClipFile, device: torch.device | str, dtype: str | torch.dtype | None = None) -> ClipVision:
        """A CLIP vision encoder with its weights.

        Raises:
            WanError: the file was changed since its header was read, or see ``build_clip``.
        """
        check_unchanged(file)
        dtype = clip_dtype(file, device, dtype)
        key = ("clip", file.fingerprint, str(device), str(dtype))
        needs = Budget(_bytes(file, device, dtype), activations=clip_activations(file.config, dtype))
        return self.get(key, needs, device, lambda: build_clip(file, device=device, dtype=dtype))

    def release(self, *kinds: str) -> None:
        """Drop what is loaded; with kinds ("dit", "vae", "text", "clip"), only those."""
        for key in [k for k in self._loaded if not kinds or k[0] in kinds]:
            del self._loaded[key]
        self._plans.clear()
        self._crowded.clear()
        self._ahead.stop()
        gc.collect()
        empty_cache()

    def shrink(self, wanted: int, device: torch.device | str) -> int:
        """Drop the least recently used parts on a device until ``wanted`` bytes are free; returns how many are."""
        before = self.bytes_on(device)
        for key in [k for k, entry in self._loaded.items() if entry.device == torch.device(device)]:
            if before - self.bytes_on(device) >= wanted:
                break
            del self._loaded[key]
        self._plans.clear()
        gc.collect()
        empty_cache()
        return before - self.bytes_on(device)

    def free(self, device: torch.device) -> int:
        """Bytes of a device that can still be had, beside what is loaded here."""
        return self.free_bytes(device) if self.free_bytes else available_bytes(device)

    def bytes_on(self, device: torch.device | str) -> int:
        """Bytes of weights held for a device."""
        return sum(entry.bytes for entry in self._loaded.values() if entry.device == torch.device(device))

    def _make_room(self, needs: Budget, device: torch.device, alone: bool, spare: Hashable | None = None) -> None:
        """First the host's models go, then the least recently used parts until this fits; never ``spare``."""
        self.make_room(needs, device)
        on_device = [key for key, entry in self._loaded.items() if entry.device == device and key != spare]
        for key in on_device:
            must_go = device.type != "cpu" and (self.keep_one or alone or self._loaded[key].alone)
            if not must_go and self.free(device) >= needs.loaded + needs.beside:
                return
            log.info("wan_core: releasing %s to make room", key[0])
            del self._loaded[key]
            gc.collect()
            empty_cache()


class LazyDiT:
    """An expert that fetches its weights from the engine when it is called, and remembers each prompt's text states.

    The weights are loaded without LoRAs, which are put to them here: other LoRAs or strengths load nothing again.
    """

    def __init__(
        self, engine: Engine, file: DiTFile, recipe: ModelRecipe, device: torch.device, callbacks: Callbacks = SILENT
    ):
        self.engine, self.callbacks = engine, callbacks
        self.file = file
        self.recipe = recipe
        self.device = device
        self._loras = recipe.loras_of(file)
        self._step, self._steps = 0, 0  # of how many: 0 until that is told
        self._revision = 0  # of the weights that the text states belong to
        self._attention: str | None = None  # instead of the recipe's
        self._watched = False  # whether a call ends where numbers stop being finite
        self._owner: weakref.ref[WanDiT] | None = None  # weak, so that the engine can release it during the run
        self._texts: dict[int, TextStates] = {}  # by the condition's key

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, condition: Condition, on_block: Callable[[int], None] | None = None
    ) -> torch.Tensor:
        dit = self.engine.dit(self.file, self.recipe, self.device)
        self._adapt(dit)
        if attention := self._attention or self._dense():
            return self._attending(dit, BACKENDS[attention].run, x, t, condition, on_block)
        return self._call(dit, x, t, condition, on_block)

    def _dense(self) -> str | None:
        """In the first steps, which decide what the video shows, attention that may leave things out is dense."""
        backend = BACKENDS.get(self.recipe.attention)
        return "sdpa" if backend and self._step < math.ceil(backend.dense_steps * self._steps) else None

    def _attending(self, dit: WanDiT, attend: Attend, *args) -> torch.Tensor:
        """A call with another attention; the model is the engine's, and keeps its own."""
        own, dit.attend = dit.attend, attend
        try:
            return self._call(dit, *args)
        finally:
            dit.attend = own

    def _call(
        self,
        dit: WanDiT,
        x: torch.Tensor,
        t: torch.Tensor,
        condition: Condition,
        on_block: Callable[[int], None] | None,
    ) -> torch.Tensor:
        x = with_channels(x.to(self.device), condition.inputs)
        text = self._text(dit, condition, len(x))
        if (against := condition.against) is not None:
            text = text.against(self._text(dit, against.condition, len(x)), against.nag)
        self._choose_runner(dit)
        with watched(dit) if self._watched else nullcontext():
            return dit(x, t, text, on_block=on_block, skip=condition.skip).to(torch.float32)

    def _choose_runner(self, dit: WanDiT) -> None:
        """The model is the engine's, and keeps what was compiled from run to run."""
        compiled = isinstance(dit.runner, CompiledRunner)
        if compiled is not self.recipe.compile:
            dit.runner = CompiledRunner() if self.recipe.compile else BlockRunner()
        if isinstance(dit.runner, CompiledRunner):
            dit.runner.tell, dit.runner.progress = self.callbacks.on_note, self.callbacks.on_progress
            dit.runner.paused = self._watched

    def first_not_finite(self, ask: Callable[[], object]) -> str | None:
        """The first part whose answer is not finite while ``ask`` calls this model; None if there is none."""
        self._watched = True
        try:
            ask()
        except NotFinite as found:
            return found.where
        finally:
            self._watched = False
        return None

    def be_exact(self) -> str | None:
        """From now on attention is PyTorch's own, which rounds nothing more; the name of what it was, None if it was.

        For a run whose numbers are no numbers any more.
        """
        if self._attention or self.recipe.attention in ("auto", "sdpa"):
            return None
        self._attention = "sdpa"
        return self.recipe.attention

    def begin(self, step: int, steps: int | None = None) -> None:
        """The calls that follow are of this step of the schedule, which has so many."""
        self._step, self._steps = step, steps or 0

    def _adapt(self, dit: WanDiT) -> None:
        if not self._loras and dit.adaptation is None:
            return
        adaptation = adaptation_of(dit, self.file)
        adaptation.set(
            [use.file for use in self._loras],
            [use.at(self._step) for use in self._loras],
            merge=self.recipe.merge_loras,
        )
        if adaptation.revision != self._revision:
            self._revision = adaptation.revision
            self._texts.clear()

    def prepare(self) -> None:
        """Called while the step before the first of this expert is computed."""
        self.engine.read_ahead(self.file, self.recipe, self.device)

    def _text(self, dit: WanDiT, condition: Condition, batch: int) -> TextStates:
        if self._owner is None or dit is not self._owner():  # loaded again: the old states belong to old weights
            self._owner, self._texts = weakref.ref(dit, lambda _: self._texts.clear()), {}
        if condition.key not in self._texts:
            text = pad_text(condition.text)
            text = text.expand(batch, *text.shape[1:])
            self._texts[condition.key] = dit.text_states(text, keep=self.recipe.keeps_text, inputs=condition.inputs)
        return self._texts[condition.key]


def pad_text(text: torch.Tensor) -> torch.Tensor:
    """[B, L, D] -> at least 512 rows: cross-attention was trained to see the zeros after a prompt."""
    missing = TEXT_LENGTH - text.shape[1]
    return nn.functional.pad(text, (0, 0, 0, missing)) if missing > 0 else text


def text_bytes(file: TextFile, device: torch.device | str, dtype: str | torch.dtype | None) -> int:
    """Bytes on the device of a text encoder, whose table always stays in the file."""
    return _bytes(file, device, dtype, skip=(text_layout.TABLE,))


def largest_matrix(file: TextFile, device: torch.device | str, dtype: str | torch.dtype | None) -> int:
    """Bytes on the device of a text encoder whose matrices pass through one buffer."""
    width = resolve_dtype(dtype, device, file.checkpoint.dtype).itemsize
    shapes = (file.checkpoint.tensors[theirs].shape for own, theirs in file.names.items() if own != text_layout.TABLE)
    return max(math.prod(shape) for shape in shapes) * width


def _dit_key(file: DiTFile, recipe: ModelRecipe, device: torch.device | str) -> Hashable:
    return ("dit", file.fingerprint, str(device), recipe.dtype, recipe.attention, recipe.swap_blocks, recipe.prefetch)


def _run_key(recipe: ModelRecipe, shape: tuple[int, ...], device: torch.device | str, prompts: int) -> Hashable:
    return _identity(recipe), tuple(shape), str(device), prompts


def _identity(recipe: ModelRecipe) -> Hashable:
    """What decides a recipe's plan."""
    files = tuple(file.fingerprint for file in recipe.files)
    loras = tuple(use.file.fingerprint for use in recipe.loras if use.strength)
    return (
        files,
        loras,
        recipe.dtype,
        recipe.attention,
        recipe.vram_limit,
        recipe.swap_blocks,
        recipe.prefetch,
        recipe.guidance,
        recipe.compile,
    )


def _bytes(
    file: DiTFile | TextFile | VAEFile | ClipFile,
    device: torch.device | str,
    dtype: str | torch.dtype | None,
    skip: tuple[str, ...] = (),
) -> int:
    """Bytes of a file's weights in the dtype of the computation, without those whose names begin with ``skip``."""
    width = resolve_dtype(dtype, device, file.checkpoint.dtype).itemsize
    kept = [theirs for own, theirs in file.names.items() if not own.startswith(skip)]
    infos = ((key, file.checkpoint.tensors[key]) for key in kept)
    return sum(
        file.checkpoint.stored_bytes(key) if info.format else math.prod(info.shape) * width for key, info in infos
    )
