"""Wan from ComfyUI MODEL: a model that ComfyUI loaded, run by our samplers.

The other way round than ``native.py``. ComfyUI keeps the weights: it loads, offloads and patches them as for its own
samplers, through ``sampler_helpers.prepare_sampling``; then the network is called directly for its velocity. What is
relied on: ``comfy.model_base.WAN21`` and ``WAN22`` with ``comfy.ldm.wan.model.WanModel`` inside, ``ModelPatcher`` and
its ``model_options`` and ``wrappers``. Written for and tested with ComfyUI 0.3.75.
"""

from __future__ import annotations

import logging
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..wan_core.config import VARIANTS, Architecture
from ..wan_core.errors import WanError
from ..wan_core.external import ExternalModel
from ..wan_core.layouts.variants import candidates
from ..wan_core.memory.engine import pad_text
from ..wan_core.models.dit.features.clip_tokens import PICTURE_TOKENS, ClipTokens, ClipTokensConfig
from ..wan_core.models.dit.inputs import with_channels
from ..wan_core.recipe import ModelRecipe
from ..wan_core.sampling.guidance import Condition
from . import host
from .base import WanNode
from .graph import model_file
from .probe import need, need_attributes
from .types import WanModel

log = logging.getLogger(__name__)

_KSAMPLER = "Use ComfyUI's own samplers with it, or put that node behind Wan as ComfyUI MODEL."


class FromModel(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreFromModel",
            display_name="Wan from ComfyUI MODEL",
            category="Wan 2.2/model",
            description="Makes a Wan model that ComfyUI or another pack loaded (Load Diffusion Model, a GGUF "
            "loader) usable for Wan Expert Switch and Wan Sampler. ComfyUI keeps and offloads its weights; LoRAs of "
            "its own nodes stay in effect.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A T2V, I2V, FLF2V or TI2V model of Wan2.1 or Wan2.2, with ComfyUI's LoRA nodes before "
                    "this one. The shift of ModelSamplingSD3 is not used: Wan Sampler has its own.",
                )
            ],
            outputs=[WanModel.Output(display_name="model")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any) -> io.NodeOutput:
        node = cls.hidden.unique_id
        recipe = from_model(model, model_file(cls.hidden.prompt, node) or f"the MODEL at node {node}")
        for note in recipe.notes:
            log.info("Wan from ComfyUI MODEL: %s", note)
        return io.NodeOutput(recipe, ui=host.told("\n".join((str(recipe), *recipe.notes))))


def from_model(patcher: Any, name: str) -> ModelRecipe:
    """A recipe whose weights stay with a ComfyUI ModelPatcher.

    Args:
        name: of its file; the words "high" and "low" in it are understood.

    Raises:
        WanError: it is another model, or carries patches of what ComfyUI's samplers do and ours do not.
    """
    _check_comfyui(patcher)
    _check_kind(patcher, name)
    _check_patches(patcher, name)
    network = patcher.model.diffusion_model
    need_attributes(_NAME, network, _DIMENSIONS, _INSTEAD)
    dimensions: list[Any] = [getattr(network, dimension) for dimension in _DIMENSIONS]
    config = Architecture(*dimensions, features=_features(network))  # type: ignore[misc]
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    same = (id(patcher.model), patcher.patches_uuid)
    _check_channels(config, name)
    held = ExternalModel(name, config, dtype, same, lambda device: NativeExpert(patcher), host="ComfyUI")
    shifted = "model_sampling" in patcher.object_patches
    note = f"{name}: the shift that a node gave to this MODEL is not used; set it on Wan Sampler."
    return ModelRecipe(held, notes=(note,) if shifted else ())


# --- what is refused

_NAME, _INSTEAD = "Wan from ComfyUI MODEL", "Load Wan Model"
CLIP_WIDTH = 1280  # of ComfyUI's image embedding, which knows no other
_DIMENSIONS = ("in_dim", "out_dim", "dim", "ffn_dim", "num_layers", "text_dim", "freq_dim", "num_heads", "eps")


def _check_comfyui(patcher: Any) -> None:
    need(
        _NAME,
        {
            "comfy.model_base": ("WAN21", "WAN22"),
            "comfy.ldm.wan.model": ("WanModel",),
            "comfy.patcher_extension": ("WrappersMP.DIFFUSION_MODEL", "WrappersMP.PREPARE_SAMPLING"),
            "comfy.sampler_helpers": ("prepare_model_patcher", "prepare_sampling"),
            "comfy.samplers": ("cast_to_load_options",),
            "comfy.model_patcher": ("create_model_options_clone",),
            "comfy.model_management": ("loaded_models",),
        },
        {},
        _INSTEAD,
    )
    held = ("model", "model_options", "wrappers", "object_patches", "patches_uuid", "load_device", "pre_run", "cleanup")
    need_attributes(_NAME, patcher, held, _INSTEAD)
    need_attributes(_NAME, patcher.model, ("diffusion_model", "manual_cast_dtype", "get_dtype"), _INSTEAD)


def _check_kind(patcher: Any, name: str) -> None:
    from comfy import model_base
    from comfy.ldm.wan.model import WanModel as Network

    from .native import WanAsNetwork

    network = patcher.model.diffusion_model
    if isinstance(network, WanAsNetwork):
        raise WanError(f"{name} comes from Wan as ComfyUI MODEL: connect the WAN_MODEL before that node instead.")
    if type(patcher.model) not in (model_base.WAN21, model_base.WAN22) or type(network) is not Network:
        raise _wrong_kind(name, f"{type(patcher.model).__name__} ({type(network).__name__})")
    if network.ref_conv is not None:
        raise _wrong_kind(name, "Wan Fun Control with a reference image")


def _features(network: Any) -> tuple[ClipTokensConfig, ...]:
    if network.img_emb is None:
        return ()
    positions = getattr(network.img_emb, "emb_pos", None)
    return (ClipTokensConfig(CLIP_WIDTH, 0 if positions is None else positions.shape[1]),)


def _check_channels(config: Architecture, name: str) -> None:
    if not candidates(config):
        raise _wrong_kind(name, f"a Wan model of {config.in_channels} input and {config.out_channels} output channels")


def _wrong_kind(name: str, found: str) -> WanError:
    supported = ", ".join(row.display_name for row in VARIANTS.values())
    return WanError(
        f"{name} is {found}, which Wan Sampler does not run. Expected {supported}. Use ComfyUI's own "
        "samplers with this MODEL."
    )


def _check_patches(patcher: Any, name: str) -> None:
    """What acts on ComfyUI's guidance, or on more than the network, would be left out without a word."""
    from comfy.patcher_extension import WrappersMP

    options = dict(patcher.model_options)
    wrappers = [patcher.wrappers, options.pop("transformer_options", {}).get("wrappers", {})]
    around = {kind for part in wrappers for kind, keyed in part.items() if any(keyed.values())}
    left_out = around - {WrappersMP.DIFFUSION_MODEL, WrappersMP.PREPARE_SAMPLING}
    found = sorted([key for key, value in options.items() if value] + [f"{kind} wrapper" for kind in left_out])
    if found:
        raise WanError(
            f"A node before Wan from ComfyUI MODEL changes how ComfyUI samples {name} ({', '.join(found)}: "
            "guidance, caching, context windows or torch.compile), and Wan Sampler samples by itself. "
            f"Remove that node. {_KSAMPLER}"
        )


# --- what is run


class NativeExpert:
    """A network of ComfyUI's as ``denoise`` calls it; one for each run."""

    def __init__(self, patcher: Any) -> None:
        self.patcher = patcher
        self._options: Any = None  # dict, once something is loaded
        self._cleanup: weakref.finalize | None = None
        self._prompts: dict[int, uuid.UUID] = {}

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, on_block: Callable[[int], None] | None = None
    ) -> Tensor:
        """Velocity, float32; the network cannot be cancelled at its blocks, only before it begins."""
        if on_block:
            on_block(0)
        self._load(x.shape)
        base, device = self.patcher.model, self.patcher.load_device
        dtype = base.manual_cast_dtype or base.get_dtype()
        text = pad_text(condition.text).expand(len(x), -1, -1)
        x = with_channels(x, condition.inputs)
        seen = next((one.features for one in condition.inputs if isinstance(one, ClipTokens)), None)
        if base.diffusion_model.img_emb is not None and seen is None:
            seen = torch.zeros(1, PICTURE_TOKENS, CLIP_WIDTH)  # without it the network hears its text as a picture
        velocity = base.diffusion_model(
            x.to(device, dtype),
            t.to(device).float(),
            context=text.to(device, dtype),
            clip_fea=None if seen is None else seen.to(device, dtype).expand(len(x), -1, -1),
            transformer_options=self._told(condition, t),
        )
        return velocity.to(x.device, torch.float32)

    def _load(self, shape: torch.Size) -> None:
        """Have ComfyUI load and patch the weights, unless they are as it left them."""
        import comfy.model_management as management
        from comfy import sampler_helpers, samplers
        from comfy.model_patcher import create_model_options_clone

        if self._options is not None and any(known is self.patcher for known in management.loaded_models()):
            return
        options = create_model_options_clone(self.patcher.model_options)
        sampler_helpers.prepare_model_patcher(self.patcher, {}, options)
        sampler_helpers.prepare_sampling(self.patcher, list(shape), {}, options)
        samplers.cast_to_load_options(options, self.patcher.load_device, self.patcher.model_dtype())
        if self._options is None:
            self.patcher.pre_run()
            self._cleanup = weakref.finalize(self, self.patcher.cleanup)
            self._cleanup.atexit = False
        self._options = options

    def end(self) -> None:
        """As ComfyUI does after a run. Not later: another sampler may be at work with the same network by then."""
        if self._cleanup:
            self._cleanup()
        self._options = self._cleanup = None

    def _told(self, condition: Condition, t: Tensor) -> dict[str, Any]:
        """ComfyUI's notes for patches of the network: which half of the guidance this is, and the noise level."""
        known = self._prompts.setdefault(condition.key, uuid.uuid4())
        half = list(self._prompts).index(condition.key)  # the positive prompt is always asked first
        sigma = t.flatten().max().reshape(1).to(self.patcher.load_device) / 1000
        return self._options["transformer_options"] | {
            "cond_or_uncond": [min(half, 1)],
            "uuids": [known],
            "sigmas": sigma,
        }
