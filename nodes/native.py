"""Wan as ComfyUI MODEL: both experts behind one native model, for ComfyUI's own samplers, guiders and patches.

ComfyUI's model classes are used without the network they would build: in its place stands ``WanAsNetwork``, which has
no weights and calls the engine. What is relied on: ``comfy.model_base.WAN21`` and ``WAN22`` (conditioning, schedules,
per-frame timesteps), ``unet_config["disable_unet_model_creation"]``, ``ModelPatcher`` and the DIFFUSION_MODEL wrappers.
Written for and tested with ComfyUI 0.3.75.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..wan_core.config import PerExpert
from ..wan_core.errors import WanError
from ..wan_core.memory.engine import Engine
from ..wan_core.memory.plan import check_fits
from ..wan_core.models.dit.features.clip_tokens import ClipTokens
from ..wan_core.recipe import ModelRecipe
from ..wan_core.sampling.experts import Expert, Experts
from ..wan_core.sampling.guidance import Condition
from ..wan_core.sampling.guidance_rules import PLAIN
from ..wan_core.sampling.schedules import Schedule, from_sigmas
from . import host, keys
from .base import WanNode, guarded_methods
from .conditioning import check_model_keys, clip_tokens, without_clip, without_effect
from .extras import OTHERWISE, refuse_conditions, refuse_patches, unheard
from .guidance import without_effect as guidance_without_effect
from .probe import need
from .types import WanModel

log = logging.getLogger(__name__)

_KEPT_TEXTS = 4  # prompts whose embeddings are recognised from one step to the next


class ToModel(WanNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreToModel",
            display_name="Wan as ComfyUI MODEL",
            category="Wan 2.2/sampling",
            description="Makes a Wan model, or both experts joined, one MODEL for ComfyUI's own samplers: KSampler, "
            "SamplerCustomAdvanced, every scheduler and guider. The experts change within one run, by noise level.",
            inputs=[
                WanModel.Input("model", tooltip="From Load Wan Model, or both experts joined by Wan Expert Switch."),
                io.Float.Input(
                    "shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Moves the steps towards noise, as ComfyUI's ModelSamplingSD3. Official: T2V-A14B 12, "
                    "I2V-A14B 5, TI2V-5B 5; Wan2.1: T2V 5 (1.3B 8), I2V 5 (480p 3), FLF2V 16.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(cls, model: ModelRecipe, shift: float) -> io.NodeOutput:
        made = to_model(model, shift, host.engine(), host.device())
        said = [_NO_CACHE if model.step_cache else "", guidance_without_effect(model.guidance)]
        return io.NodeOutput(made, ui=host.told("\n".join(filter(None, said))))


_NO_CACHE = (
    "Wan Step Cache has no effect here: ComfyUI's samplers ask the model at every step. Put ComfyUI's EasyCache behind "
    "this node instead."
)


def to_model(recipe: ModelRecipe, shift: float, engine: Engine, device: torch.device) -> object:
    """A ComfyUI ModelPatcher whose weights stay with the engine.

    Raises:
        WanError: this ComfyUI's model classes have changed.
    """
    _check_comfyui()
    patcher, bases = _classes()
    dense = recipe.variant.vae == "wan2.2"
    from comfy import supported_models

    config = (supported_models.WAN22_T2V if dense else supported_models.WAN21_T2V)(
        {"disable_unet_model_creation": True, "image_model": "wan2.1", "dim": recipe.high.config.dim}
    )
    config.sampling_settings = config.sampling_settings | {"shift": shift}
    model = bases[recipe.variant.vae](config, image_to_video=recipe.variant.image != "none", device=device)
    model.diffusion_model = WanAsNetwork(replace(recipe, guidance=PLAIN), engine, device)  # ComfyUI's samplers do it
    return patcher(model, load_device=device, offload_device=torch.device("cpu"))


def _check_comfyui() -> None:
    need(
        "Wan as ComfyUI MODEL",
        {
            "comfy.model_base": ("WAN21.extra_conds", "WAN21.memory_required", "WAN22"),
            "comfy.supported_models": ("WAN21_T2V.sampling_settings", "WAN22_T2V.sampling_settings"),
            "comfy.model_patcher": ("ModelPatcher.get_model_object", "ModelPatcher.add_object_patch"),
            "comfy.patcher_extension": (
                "WrapperExecutor.new_class_executor",
                "WrappersMP.DIFFUSION_MODEL",
                "get_all_wrappers",
            ),
        },
        {
            "comfy.model_base:WAN21": ("image_to_video", "device"),
            "comfy.model_base:WAN22": ("image_to_video", "device"),
            "comfy.model_patcher:ModelPatcher": ("load_device", "offload_device"),
        },
        "Wan Sampler",
    )


@cache
def _classes() -> tuple[type, dict[str, type]]:
    """The patcher, and the model for each kind of VAE: ComfyUI's own, with what depends on a network taken out."""
    from comfy import model_base
    from comfy.model_patcher import ModelPatcher

    class WanPatcher(ModelPatcher):
        """There is nothing to load, to move or to patch: the engine's own entry tells ComfyUI what its weights take."""

        add_patches = add_hook_patches = get_key_patches = _refuse_weights

        def get_model_object(self, name: str) -> object:
            _refuse_network(name)
            return super().get_model_object(name)

        def add_object_patch(self, name: str, obj: object) -> None:
            _refuse_network(name)
            super().add_object_patch(name, obj)

        def model_size(self) -> int:
            return 0

        def get_ram_usage(self) -> int:
            return 0

    mixin: Any = object

    class OverEngine(mixin):
        """Methods, not attributes: a model that holds its own bound method is a circle that only the collector ends."""

        state_dict_for_saving = _refuse_weights

        def memory_required(self, *shapes: object, **options: object) -> float:
            """What a call takes, and the weights that come with the first one: else ComfyUI sees an empty card then,
            and puts both halves of the guidance into one call that does not fit beside the weights."""
            return super().memory_required(*shapes, **options) + self.diffusion_model.missing_bytes()

        def extra_conds(self, **options: object) -> dict:
            """Asked once for each prompt of a run, with all that its conditioning carries."""
            self.diffusion_model.hear(options)
            return super().extra_conds(**options)

    bases = {
        "wan2.1": type("WAN21OverEngine", (OverEngine, model_base.WAN21), {}),
        "wan2.2": type("WAN22OverEngine", (OverEngine, model_base.WAN22), {}),
    }
    return WanPatcher, bases


def _refuse_network(name: str) -> None:
    if name.startswith("diffusion_model"):
        raise WanError(
            "A node wants to compile or change ComfyUI's own Wan network (torch.compile, a patch of "
            f"{name}), but Wan as ComfyUI MODEL runs another. {OTHERWISE}"
        )


@guarded_methods("forward", "hear")
class WanAsNetwork(nn.Module):
    """What ComfyUI calls instead of its own WanModel."""

    dtype = torch.float32  # of what comes in and goes out: the engine computes in the recipe's own

    def __init__(self, recipe: ModelRecipe, engine: Engine, device: torch.device) -> None:
        super().__init__()
        channels = torch.empty(recipe.high.config.dim, recipe.variant.in_channels, 1, 2, 2, device="meta")
        self.patch_embedding = SimpleNamespace(weight=channels)  # ComfyUI reads the number of channels from it
        self.recipe, self.engine, self.device = recipe, engine, device
        self._experts: tuple[tuple, Experts] | None = None
        self._texts: list[Condition] = []
        self._said: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # still one, for whoever asks whether it is there
            raise AttributeError(
                f"A node reaches for {name} of ComfyUI's own Wan network, but Wan as ComfyUI MODEL "
                f"runs another. {OTHERWISE}"
            ) from None

    def hear(self, conditioning: dict[str, object]) -> None:
        """What a prompt carries, before the first step.

        Raises:
            WanError: a key that only another model understands.
        """
        self._said.clear()  # a new run: what was said of the last one is said again
        name, variant = str(conditioning.get("prompt_type", "")), self.recipe.variant
        check_model_keys(conditioning, name, variant)
        image = ["concat_latent_image"] if variant.image != "channels" and "concat_latent_image" in conditioning else []
        seen = conditioning.get("clip_vision_output")
        if variant.clip and seen is None:
            self._warn(without_clip([name], variant))
        elif variant.clip:
            clip_tokens(seen, name, self.recipe)
        elif seen is not None:
            image += ["clip_vision_output"]
        for key in (*image, *keys.asking(conditioning)):
            if key not in keys.SAMPLERS_OWN:
                self._warn(without_effect(key, name, variant))

    def _warn(self, text: str) -> None:
        """Once a run, on the node that samples."""
        if text not in self._said:
            self._said.add(text)
            log.warning("Wan as ComfyUI MODEL: %s", host.safe_text(text))
            host.show_text(host.current_node(), "\n".join(sorted(self._said)))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Velocity [B, C, T, h, w] of x [B, C_in, T, h, w], normalised, condition channels included."""
        from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers

        options = transformer_options or {}
        run = WrapperExecutor.new_class_executor(
            self._velocity, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        )
        return run.execute(x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _velocity(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict | None = None,
        **kwargs: object,
    ) -> Tensor:
        refuse_conditions({"time_dim_concat": time_dim_concat, **kwargs})
        options = transformer_options or {}
        refuse_patches(options)
        for warning in unheard(options):
            self._warn(warning)
        parts = len(options.get("cond_or_uncond", ())) if self.recipe.vram_limit is not None else 1
        if parts > 1:  # the limit is kept for one at a time
            seen = (None,) * parts if clip_fea is None else clip_fea.chunk(parts)
            each = zip(x.chunk(parts), timestep.chunk(parts), context.chunk(parts), seen, strict=True)
            return torch.cat([self._computed(*part, options) for part in each])
        return self._computed(x, timestep, context, clip_fea, options)

    def _computed(self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Tensor | None, options: dict) -> Tensor:
        expert = self._expert(x, float(timestep.max()), options)
        condition = self._condition(context, clip_fea if self.recipe.variant.clip else None)
        return expert.model(x, timestep, condition, on_block=host.check_cancelled).to(x)

    def _expert(self, x: Tensor, timestep: float, options: dict) -> Expert:
        experts = self._fitted(x)
        by_step = experts.switch.mode == "step" and experts.high is not experts.low
        if not by_step and not any(use.ranged for use in self.recipe.loras):
            now = Schedule("now", torch.tensor([timestep / 1000, 0.0]).double(), torch.tensor([timestep]).double())
            return experts.at(0, now)
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            raise WanError(
                "This sampler does not tell its steps, so that neither experts nor LoRAs can be switched by "
                "step. Set Wan Expert Switch to auto, timestep or snr, and Wan LoRA to all steps."
            )
        schedule = from_sigmas(sigmas)
        step = int((schedule.timesteps.float() - timestep).abs().argmin())
        expert = experts.at(step, schedule)
        expert.begin(step, schedule.steps)
        return expert

    def missing_bytes(self) -> int:
        """Weights that are still to come; with a memory limit they are fitted into what is there."""
        return self.engine.missing_bytes(self.recipe, self.device) if self.recipe.vram_limit is None else 0

    def _fitted(self, x: Tensor) -> Experts:
        """The experts, laid out for this size; made once for each."""
        shape = (len(x), self.recipe.high.config.out_channels, *x.shape[2:])
        if self._experts is None or self._experts[0] != shape:
            check_fits(self.recipe, shape, self.device, total=host.total_bytes(self.device))
            fitted, _ = self.engine.fit(self.recipe, shape, self.device)
            self._experts = shape, self.engine.experts(fitted, PerExpert(1, 1), self.device)
        return self._experts[1]

    def _condition(self, context: Tensor, clip_fea: Tensor | None) -> Condition:
        """The same object for the same text and pictures, so that what an expert made of it is used again."""
        for known in self._texts:
            if _same(known.text, context) and _same(_features(known), clip_fea):
                return known
        inputs = () if clip_fea is None else (ClipTokens(clip_fea.clone()),)
        self._texts = [*self._texts[1 - _KEPT_TEXTS :], Condition(context.clone(), inputs)]
        return self._texts[-1]


def _features(condition: Condition) -> Tensor | None:
    return next((one.features for one in condition.inputs), None)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.equal(a, b)


def _refuse_weights(*_: object, **__: object) -> NoReturn:
    """In place of what LoRA, hook, merge and save nodes call: they would find no weights, and go on without a word."""
    raise WanError(
        "ComfyUI's LoRA, merge and save nodes cannot reach the weights behind Wan as ComfyUI MODEL: they "
        "stay in the Wan engine. For a LoRA put Wan LoRA before that node. To merge or save, load the model "
        "with ComfyUI's Load Diffusion Model."
    )
