"""Cases of test_nodes_alone.py, run as ``node_cases.py FOLDER --cpu`` (see cases.py), with small models in FOLDER.

FOLDER is a models folder of ComfyUI's: a T2V pair, TI2V, both VAEs, a text encoder.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

folder = Path(sys.argv.pop(1))

import comfy.options  # noqa: E402, TID251

comfy.options.enable_args_parsing()

import comfy.model_management as management  # noqa: E402, TID251
import comfy.sample  # noqa: E402, TID251
import execution  # noqa: E402
import folder_paths  # noqa: E402, TID251
import torch  # noqa: E402
from comfy_api.latest import io  # noqa: E402, TID251

import nodes as comfy_nodes  # noqa: E402

for kind in ("diffusion_models", "text_encoders", "vae", "loras", "clip_vision"):
    folder_paths.folder_names_and_paths[kind] = ([str(folder / kind)], folder_paths.supported_pt_extensions)
folder_paths.set_input_directory(str(folder / "input"))

sys.modules["server"] = SimpleNamespace(PromptServer=SimpleNamespace(instance=None))  # nobody to send to

from cases import import_pack, report  # noqa: E402

import_pack()
from wan_pack import nodes as pack  # noqa: E402
from wan_pack.nodes import base, conditioning, host, native, native_reverse, pictures, sample  # noqa: E402
from wan_pack.wan_core.config import PerExpert  # noqa: E402
from wan_pack.wan_core.errors import WanError  # noqa: E402
from wan_pack.wan_core.loading.dit import read_dit  # noqa: E402
from wan_pack.wan_core.memory import devices  # noqa: E402
from wan_pack.wan_core.recipe import Loras, LoraUse, ModelRecipe  # noqa: E402

CPU = torch.device("cpu")
for node in pack.NODES:
    schema = node.GET_SCHEMA()
    comfy_nodes.NODE_CLASS_MAPPINGS[schema.node_id] = node


def pair(**options: object) -> ModelRecipe:
    high, low = (
        read_dit(next((folder / "diffusion_models").glob(f"wan2.2_t2v_{level}_noise*"))) for level in ("high", "low")
    )
    return ModelRecipe(high, low, dtype="float32", **options)


def dense() -> ModelRecipe:
    return ModelRecipe(read_dit(next((folder / "diffusion_models").glob("wan2.2_ti2v*"))), dtype="float32")


def refusal(action: Callable[[], object], *parts: str) -> str:
    """The text of the `WanError` that must come, which can be written as UTF-8 and holds these parts."""
    try:
        action()
    except WanError as error:
        str(error).encode("utf-8")
        assert error.__suppress_context__ or error.__context__ is None or isinstance(error.__context__, WanError)
        missing = [part for part in parts if part not in str(error)]
        assert not missing, f"{missing} not in: {error}"
        return str(error)
    raise AssertionError("nothing was refused")


# --- every value of every input

NEVER = object()
HOSTILE = (
    math.nan, math.inf, -math.inf, 2**31, 2**63, -(2**63), 2**64, 10**400, -1, 0, 1e308, 1e-320, True, False, None,
    "", "5", "nan", "\ud83d", "a\x00b", "../../etc/passwd", "<img src=x onerror=alert(1)>", "x" * 2_000_000,
    [], [1], [1, 2, 3], [[]], {}, {"__value__": [1, 2]}, {"samples": 1}, [["text", {}]],
)  # fmt: skip
PYTHON = {
    io.Int.Input: int,
    io.Float.Input: (int, float),
    io.String.Input: str,
    io.Boolean.Input: bool,
    io.Combo.Input: str,
}


def valid_inputs(node: type[io.ComfyNode]) -> dict[str, object]:
    """As a prompt carries them: widgets at their defaults, sockets left out (they would be links)."""
    inputs = {}
    for known in node.define_schema().inputs:
        if isinstance(known, io.Combo.Input):
            inputs[known.id] = known.default or known.options[0]
        elif isinstance(known, io.WidgetInput):
            inputs[known.id] = known.default
    return inputs


def converted(known: io.Input, value: object) -> object:
    """What ComfyUI makes of a value before a node sees it; NEVER where it refuses it itself."""
    if isinstance(value, list):
        return NEVER  # a link, or a broken one
    value = value["__value__"] if isinstance(value, dict) and "__value__" in value else value
    kinds = {io.Int.Input: int, io.Float.Input: float, io.String.Input: str, io.Boolean.Input: bool}
    try:
        return next((make for kind, make in kinds.items() if isinstance(known, kind)), lambda v: v)(value)
    except (TypeError, ValueError, OverflowError):
        return NEVER


def may_be(known: io.Input, value: object) -> bool:
    """Whether a schema allows a value; written apart from ``checks``."""
    if value is NEVER:
        return False
    if value is None:
        return True  # as a link is, until the node runs
    if isinstance(known, io.Combo.Input):
        return type(value) is str and value in known.options
    if isinstance(known, (io.Int.Input, io.Float.Input)):
        return not math.isnan(value) and known.min <= value <= known.max
    if isinstance(known, io.String.Input):
        return len(value) <= 1000 and value.isprintable()
    return isinstance(known, io.Boolean.Input)


def every_hostile_value() -> Iterator[tuple[type[io.ComfyNode], io.Input, object]]:
    for node in pack.NODES:
        for known in node.define_schema().inputs:
            for value in HOSTILE:
                yield node, known, value


def validated(node: type[io.ComfyNode], inputs: dict) -> tuple[bool, list[dict]]:
    """By ComfyUI's own check of a queued prompt."""
    prompt = {"1": {"class_type": node.define_schema().node_id, "inputs": inputs}}
    validate, last = execution.validate_inputs, None
    try:
        last = asyncio.run(validate("p", prompt, "1", {}))
    except Exception as error:  # as validate_prompt does
        return False, [{"message": type(error).__name__, "details": str(error), "type": type(error).__name__}]
    return last[0], last[1]


def no_hostile_value_is_queued() -> None:
    """Thousands of prompts; each is refused at once, or asks for something that the schema allows."""
    wrong, slowest, tried = [], 0.0, 0
    for node, known, value in every_hostile_value():
        inputs = valid_inputs(node) | {known.id: value}
        missing = {k.id for k in node.define_schema().inputs if not isinstance(k, io.WidgetInput)} - {known.id}
        began = time.perf_counter()
        _, errors = validated(node, inputs)
        slowest, tried = max(slowest, time.perf_counter() - began), tried + 1
        errors = [e for e in errors if not (e["type"] == "required_input_missing" and e["details"] in missing)]
        for error in errors:
            if "Unexpected" in error["details"] or len(error["details"]) > 8000 and len(str(value)) < 1e6:
                wrong.append((node.__name__, known.id, repr(value)[:40], error["details"][:200]))
        if not errors and not may_be(known, converted(known, value)):
            wrong.append((node.__name__, known.id, repr(value)[:40], "was let through"))
    assert not wrong, f"{len(wrong)} of {tried}: {wrong[:20]}"
    assert tried > 3000 and slowest < 2, (tried, slowest)


def nor_comes_it_through_a_link() -> None:
    """The same values as a node before would hand them over, when the node is about to run."""
    stand_in = {
        "WAN_MODEL": dense(),
        "LATENT": {"samples": torch.zeros(1, 48, 1, 2, 2)},
        "SIGMAS": torch.ones(2),
        "CONDITIONING": [[torch.zeros(1, 2, 8), {}]],
        "IMAGE": torch.zeros(1, 32, 32, 3),
    }
    wrong = []
    for node, known, value in every_hostile_value():
        inputs = valid_inputs(node)
        for other in node.define_schema().inputs:
            if not isinstance(other, io.WidgetInput) and not other.optional:
                inputs[other.id] = stand_in.get(other.get_io_type(), object())
        try:
            base.check(node, inputs | {known.id: value}, complete=True)
        except WanError:
            continue
        except Exception as error:
            wrong.append((node.__name__, known.id, repr(value)[:40], repr(error)[:200]))
            continue
        kind = next((kind for input_, kind in PYTHON.items() if isinstance(known, input_)), type(None))
        if not (value is None and known.optional or isinstance(value, kind) and may_be(known, value)):
            wrong.append((node.__name__, known.id, repr(value)[:40], "was let through"))
    assert not wrong, wrong[:20]


def every_number_has_a_range() -> None:
    numbers = [
        (node.__name__, known)
        for node in pack.NODES
        for known in node.define_schema().inputs
        if isinstance(known, (io.Int.Input, io.Float.Input))
    ]
    assert numbers
    assert not [(name, known.id) for name, known in numbers if known.min is None or known.max is None]


# --- errors


class Panic(BaseException):
    """As the tokenizer's library raises it."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def failing(error: BaseException) -> type[base.WanNode]:
    class Failing(base.WanNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Failing", inputs=[], outputs=[])

        @classmethod
        def execute(cls) -> io.NodeOutput:
            raise error

        @classmethod
        def fingerprint_inputs(cls) -> tuple:
            raise error

        @classmethod
        def check_inputs(cls) -> None:
            raise error

    return Failing


def nothing_but_readable_errors_leaves_a_node() -> None:
    errors = [
        Panic("called `Option::unwrap()`"),
        SystemExit(3),
        MemoryError(),
        RecursionError("deep"),
        KeyError("x"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("\ud83d"),
        WanError("a\ud83db"),
        Unspeakable(),
        OSError(28, "No space left on device"),
        StopIteration(),
        AssertionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ]
    for error in errors:
        node = failing(error)
        clone = node.PREPARE_CLASS_CLONE({})
        for call in (node.EXECUTE_NORMALIZED, clone.EXECUTE_NORMALIZED, node.validate_inputs, node.fingerprint_inputs):
            refusal(call)
    assert "memory" in refusal(failing(MemoryError()).EXECUTE_NORMALIZED).lower()
    assert "No space left" in refusal(failing(OSError(28, "No space left on device")).EXECUTE_NORMALIZED)


def cancel_and_ctrl_c_pass() -> None:
    for kind in (management.InterruptProcessingException, KeyboardInterrupt):
        try:
            failing(kind()).EXECUTE_NORMALIZED()
        except kind:
            continue
        raise AssertionError(f"{kind} did not pass")


def every_node_is_guarded() -> None:
    for node in pack.NODES:
        assert issubclass(node, base.WanNode) and hasattr(node.execute, "guarded"), node
        assert "validate_inputs" not in node.__dict__, f"{node} would skip the shared check"
    assert hasattr(native.WanAsNetwork.forward, "guarded")


def clip() -> object:
    from wan_pack.nodes import text

    name = next((folder / "text_encoders").glob("*.safetensors")).name
    return text.LoadTextEncoder.execute(text_encoder_name=name, dtype="float32", device="cpu").args[0]


def a_panic_in_the_tokenizer_is_an_error() -> None:
    encoder = clip()

    class Tokenizer:
        def encode(self, text: str) -> list[int]:
            raise Panic("byte index 1 is not a char boundary")

    encoder.__dict__["tokenizer"] = Tokenizer()
    refusal(lambda: encoder.tokenize("cat"), "Panic", "char boundary")
    refusal(lambda: clip().tokenize("a \ud83d b"), "U+D83D", "place 3")


# --- what a conditioning carries


SHAPE = torch.Size((1, 16, 2, 8, 8))


def told(recipe: ModelRecipe, options: dict) -> list[str]:
    warnings: list[str] = []
    text = torch.zeros(1, 4, recipe.high.config.text_dim)
    conditioning.side([[text, options]], "positive", recipe, SHAPE, CPU, 5.0, warnings.append)
    return warnings


def no_key_passes_silently() -> None:
    recipe = pair()
    assert told(recipe, {"pooled_output": None, "attention_mask": torch.ones(1, 4)}) == []
    assert told(recipe, {"start_percent": 0.0, "end_percent": 1.0, "clip_start_percent": 0.0, "hooks": None}) == []
    (warning,) = told(recipe, {"somebody_elses_idea": torch.ones(1)})
    assert "somebody_elses_idea" in warning and "no effect" in warning
    (warning,) = told(recipe, {"clip_vision_output": object()})
    assert "clip_vision_output" in warning
    for key, model in (
        ("context_latents", "Bernini"),
        ("vace_frames", "VACE"),
        ("time_dim_concat", "Phantom"),
        ("reference_latents", "reference image"),
        ("driving_mask_28ch", "SCAIL"),
        ("pose_strength", "Animate-2"),
    ):
        refusal(partial(told, recipe, {key: [torch.zeros(SHAPE)]}), key, model)
    assert told(recipe, {"start_percent": 0.2, "end_percent": 0.9, "strength": 0.5, "mask_strength": 1.0}) == []
    refusal(partial(told, recipe, {"area": (4, 4, 0, 0)}), "areas")
    refusal(partial(told, recipe, {"mask": torch.ones(1, 8, 8), "set_area_to_bounds": True}), "areas")
    refusal(partial(told, recipe, {"mask": torch.ones(5, 8, 8)}), "5 frames", "expected 1, or 2")
    refusal(partial(told, recipe, {"control": object()}), "ControlNet")


def run_native(options: dict, model_options: dict | None = None) -> list[str]:
    """Two steps of ComfyUI's own sampler on Wan as ComfyUI MODEL; what was said on the node."""
    said: list[str] = []
    recipe = pair()
    patcher = native.to_model(recipe, 5.0, host.engine(), CPU)
    patcher.model_options["transformer_options"].update(model_options or {})
    text = torch.zeros(1, 4, recipe.high.config.text_dim)
    before, host.show_text = host.show_text, lambda node, text: said.append(text)
    try:
        with torch.inference_mode():
            latent = torch.zeros(SHAPE)
            made = comfy.sample.sample(
                patcher,
                torch.randn(SHAPE),
                2,
                1.0,
                "euler",
                "simple",
                [[text, options]],
                [[text, {}]],
                latent,
                disable_pbar=True,
            )
        assert torch.isfinite(made).all()
    finally:
        host.show_text = before
    return said


def comfyuis_samplers_are_told_too() -> None:
    assert run_native({"pooled_output": None, "start_percent": 0.0, "strength": 1.0}) == []
    (said,) = run_native({"somebody_elses_idea": 1})
    assert "somebody_elses_idea" in said
    (said,) = run_native({"concat_latent_image": torch.zeros(SHAPE)})
    assert "concat_latent_image" in said
    refusal(lambda: run_native({"context_latents": [torch.zeros(SHAPE)]}), "Bernini")
    refusal(lambda: run_native({"vace_frames": [torch.zeros(SHAPE)]}), "VACE")


def what_patches_ask_for_is_refused_or_said() -> None:
    def attention_override_sage(func: Callable, *args: object, **options: object) -> object:
        return func(*args, **options)

    def nag_attention(func: Callable, *args: object, **options: object) -> object:
        return func(*args, **options)

    def wrapped(kernel: Callable) -> Callable:
        def optimized_attention_override(_: object, *args: object, **options: object) -> object:
            return kernel(*args, **options)

        return optimized_attention_override

    def attention_flash(*args: object) -> None: ...

    assert run_native({}, {"patches": {"attn1_patch": []}, "patches_replace": {}}) == []
    for kernel in (attention_override_sage, wrapped(attention_flash)):
        (said,) = run_native({}, {"optimized_attention_override": kernel})
        assert "Load Wan Model" in said
    for other in (nag_attention, wrapped(nag_attention), partial(nag_attention), lambda func, *args: func(*args)):
        refusal(partial(run_native, {}, {"optimized_attention_override": other}), "how attention is computed")
    refusal(lambda: run_native({}, {"patches": {"attn1_patch": [nag_attention]}}), "attention layers")
    refusal(lambda: run_native({}, {"patches_replace": {"dit": {("double_block", 1): nag_attention}}}), "blocks")
    (said,) = run_native({}, {"audio_embeds_of_a_patch": torch.ones(1)})
    assert "audio_embeds_of_a_patch" in said
    network = native.to_model(pair(), 5.0, host.engine(), CPU).model.diffusion_model
    x, t, text = torch.zeros(SHAPE), torch.ones(1), torch.zeros(1, 4, pair().high.config.text_dim)
    refusal(lambda: network(x, t, text, new_condition=torch.ones(1)), "new_condition")
    refusal(
        lambda: native.to_model(pair(), 5.0, host.engine(), CPU).add_object_patch(
            "diffusion_model.blocks.0.cross_attn.forward", nag_attention
        ),
        "another",
    )


# --- Wan as ComfyUI MODEL and ComfyUI's memory


def the_model_is_no_circle() -> None:
    """ComfyUI speaks of a memory leak where a model outlives its patcher."""
    gc.collect()
    gc.disable()
    try:
        patcher = native.to_model(pair(), 5.0, host.engine(), CPU)
        clone = patcher.clone()
        model, network = weakref.ref(patcher.model), weakref.ref(patcher.model.diffusion_model)
        with torch.inference_mode():
            text = torch.zeros(1, 4, pair().high.config.text_dim)
            patcher.model.diffusion_model(torch.zeros(SHAPE), torch.ones(1), text, transformer_options={})
        del patcher, clone
        assert model() is None and network() is None
    finally:
        gc.enable()


def faults_of_our_own_are_no_unknown_version() -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("our own typing error")

    whole, native.WanAsNetwork = native.WanAsNetwork, broken
    try:
        native.to_model(pair(), 5.0, host.engine(), CPU)
    except AttributeError as error:
        assert "typing error" in str(error)
    else:
        raise AssertionError("nothing was raised")
    finally:
        native.WanAsNetwork = whole


def an_unknown_comfyui_is_named() -> None:
    from comfy import patcher_extension  # noqa: TID251

    wanted = patcher_extension.get_all_wrappers
    del patcher_extension.get_all_wrappers
    try:
        refusal(lambda: native.to_model(pair(), 5.0, host.engine(), CPU), "get_all_wrappers", "Wan Sampler")
    finally:
        patcher_extension.get_all_wrappers = wanted
    refusal(lambda: native_reverse.from_model(object(), "x"), "does not know this version", "Load Wan Model")


def evictable_memory_counts_as_free() -> None:
    class Dynamic:
        def loaded_size(self) -> int:
            return 1000

        def is_dynamic(self) -> bool:
            return True

    class Entry:
        device, model = CPU, Dynamic()

    free = management.get_free_memory
    management.get_free_memory = lambda device: 500
    management.current_loaded_models.append(Entry())
    try:
        assert host.free_bytes(CPU) == 1500 and host.engine().free(CPU) == 1500
    finally:
        management.get_free_memory = free
        management.current_loaded_models.pop()


# --- sizes


@contextmanager
def machine(total: int) -> Iterator[None]:
    before, devices.psutil = devices.psutil, FakeMemory(total)
    try:
        yield
    finally:
        devices.psutil = before


class FakeMemory:
    def __init__(self, total: int):
        self.total = self.available = total

    def virtual_memory(self) -> FakeMemory:
        return self

    def swap_memory(self) -> FakeMemory:
        return FakeMemory(0)


def vae(name: str) -> object:
    from wan_pack.nodes import vae as vaes

    return vaes.LoadVAE.execute(vae_name=name, dtype="float32").args[0]


def huge(*shape: int) -> torch.Tensor:
    """Of this shape, and in no memory."""
    return torch.zeros(1).expand(*shape)


def sizes_that_no_machine_holds_are_refused() -> None:
    from wan_pack.nodes import latents
    from wan_pack.nodes import vae as vaes

    large = {"width": 16384, "height": 16384, "frames": 1025, "batch_size": 1}
    text = [[torch.zeros(1, 4, pair().high.config.text_dim), {}]]
    small = vae("wan_2.1_vae.safetensors")
    settings = sample.Settings(0, 2, PerExpert(1, 1), 5.0, "euler", "auto", 1.0, 0, 100, True)
    cases = {
        "empty": lambda: latents.EmptyLatent.execute(model=dense(), **large),
        "image to video": lambda: latents.ImageToVideo.execute(
            model=dense(),
            vae=vae("wan2.2_vae.safetensors"),
            positive=text,
            negative=text,
            fit="exact",
            start_image=torch.zeros(1, 32, 32, 3),
            **large,
        ),
        "encode": lambda: small.check_encode(16384, 16384),
        "decode": lambda: small.decode(huge(1, 16, 257, 2048, 2048)),
        "decode in tiles": lambda: small.decode_tiled(huge(1, 16, 257, 2048, 2048), tile_x=64, tile_y=64, overlap=8),
        "decode node": lambda: vaes.VAEDecode.execute(
            vae=small, samples={"samples": huge(1, 16, 257, 2048, 2048)}, tile_size=256
        ),
        "sample": lambda: sample.sample(
            pair(), text, text, {"samples": huge(1, 16, 2000, 64, 64)}, settings, sample.Notes(pair())
        ),
    }
    for name, case in cases.items():
        with machine(2 * 10**9):
            began = time.perf_counter()
            refusal(case, "of memory, but", "GB")
            assert time.perf_counter() - began < 5, name
    with machine(64 * 10**9):
        made = latents.EmptyLatent.execute(model=dense(), width=832, height=480, frames=81, batch_size=1)
    assert made.args[0]["samples"].shape == (1, 48, 21, 30, 52)


def encoding_can_be_cancelled_within_a_chunk() -> None:
    """The first frame alone takes minutes where it is large: the user need not wait for it."""
    from wan_pack.nodes import latents

    calls = []

    def cancel(*_: object) -> None:
        calls.append(1)
        if len(calls) == 10:
            raise management.InterruptProcessingException

    text = [[torch.zeros(1, 4, dense().high.config.text_dim), {}]]
    before, host.check_cancelled = host.check_cancelled, cancel
    coder = vae("wan2.2_vae.safetensors")
    try:
        for action in (
            lambda: latents.ImageToVideo.execute(
                model=dense(),
                vae=coder,
                positive=text,
                negative=text,
                width=64,
                height=64,
                frames=5,
                batch_size=1,
                fit="exact",
                start_image=torch.zeros(1, 64, 64, 3),
            ),
            lambda: coder.decode(torch.zeros(1, 48, 1, 4, 4)),
            lambda: coder.encode_tiled(torch.zeros(1, 64, 64, 3)),
        ):
            calls.clear()
            try:
                action()
            except management.InterruptProcessingException:
                assert len(calls) == 10
            else:
                raise AssertionError(f"{len(calls)} places to cancel, and none was taken")
    finally:
        host.check_cancelled = before
    weights = host.engine().vae(coder.file, CPU, "float32")
    assert not any(layer._forward_pre_hooks for layer in weights.modules())


# --- pictures


def pictures_of_every_kind() -> None:
    ramp = torch.linspace(0, 1, 2 * 4 * 4 * 3).view(2, 4, 4, 3)
    for dtype, full in ((torch.uint8, 255), (torch.int16, 32767), (torch.int32, 65535), (torch.int64, 255)):
        whole = (ramp * full).round().to(dtype)
        assert (pictures.pictures(whole, "image") - ramp).abs().max() <= 1 / full, dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        made = pictures.pictures(ramp.to(dtype), "image")
        assert made.dtype == torch.float32 and (made - ramp).abs().max() < 1e-2
    assert torch.equal(pictures.pictures(ramp[..., :1], "image")[..., 2], ramp[..., 0])
    transparent = torch.cat([ramp, torch.zeros(2, 4, 4, 1)], dim=-1)
    assert torch.equal(pictures.pictures(transparent, "image"), ramp)
    assert pictures.pictures(ramp[0], "image").shape == (1, 4, 4, 3)
    assert pictures.pictures(ramp > 0.5, "image").max() == 1
    for broken, said in (
        (ramp * math.nan, "nan"),
        (ramp * 255, "255"),
        (ramp[..., :2], "[2, 4, 4, 2]"),
        (ramp[:0], "[0, 4, 4, 3]"),
        (-(ramp * 100).int(), "-100"),
        ("x", "str"),
    ):
        refusal(partial(pictures.pictures, broken, "image"), said)


def whole_numbers_encode_like_fractions() -> None:
    coder = vae("wan_2.1_vae.safetensors")
    ramp = (torch.linspace(0, 1, 16 * 16 * 3).view(1, 16, 16, 3) * 255).round()
    wanted = coder.encode(ramp / 255)
    assert torch.allclose(coder.encode(ramp.to(torch.uint8)), wanted, atol=1e-5)
    assert torch.allclose(coder.encode((ramp * 257).to(torch.int32)), wanted, atol=1e-5)


# --- devices


def devices_can_be_chosen() -> None:
    """What ComfyUI's nodes for choosing a device do with a VAE and a CLIP."""
    elsewhere = torch.device("cpu", 0)  # not the same as "cpu"
    for made in (vae("wan_2.1_vae.safetensors"), clip()):
        other = made.clone() if hasattr(type(made), "clone") else copy.copy(made)
        other.patcher = other.patcher.clone()
        other.patcher.model._select_base_load_device = other.patcher.load_device
        moved = other.patcher.deepclone_multigpu(new_load_device=elsewhere)
        moved.offload_device = CPU
        other.patcher = moved
        assert other.patcher.load_device == elsewhere and not other.patcher.is_dynamic()
        assert made.patcher.load_device != elsewhere, "the first one must stay where it was"
        assert moved.model._select_base_load_device == made.patcher.load_device
        assert asked_device(other) == elsewhere


def attention_follows_comfyuis_options() -> None:
    """auto does what ComfyUI was started with where that runs, and says so; a choice on the node stays."""
    from comfy.cli_args import args  # noqa: TID251

    assert host.attention_asked("auto", torch.float32) == ("auto", None)
    args.use_sage_attention = True
    try:
        assert host.attention_asked("sdpa", torch.float32) == ("sdpa", None)
        attention, said = host.attention_asked("auto", torch.float32)  # which this CPU cannot
        assert attention == "auto" and "started with --use-sage-attention, but sdpa is used" in said, said
        find, host.find_backend = host.find_backend, lambda *_: None
        attention, said = host.attention_asked("auto", torch.float32)
        host.find_backend = find
        assert attention == "sage" and "--use-sage-attention" in said, said
    finally:
        args.use_sage_attention = False


def asked_device(made: object) -> torch.device:
    """Where the engine is asked to load what is about to encode."""
    asked: list[torch.device] = []

    def stop(file: object, device: torch.device, dtype: object, **options: object) -> None:
        asked.append(device)
        raise WanError("far enough")

    engine = host.engine()
    engine.vae = engine.text_encoder = stop
    try:
        refusal(lambda: made.encode(torch.zeros(1, 16, 16, 3) if hasattr(made, "latent_channels") else "cat"))
    finally:
        del engine.vae, engine.text_encoder
    (device,) = asked
    return device


# --- the sampler's own checks


def run_sampler(latent: torch.Tensor, recipe: ModelRecipe, **values: object) -> str:
    settings = {
        "seed": 0,
        "steps": 2,
        "guidance": PerExpert(1, 1),
        "shift": 5.0,
        "solver": "euler",
        "schedule": "simple",
        "denoise": 1.0,
        "start": 0,
        "end": 100,
        "add_noise": True,
    }
    text = [[torch.zeros(1, 4, recipe.high.config.text_dim), {}]]
    notes = sample.Notes(recipe)
    with torch.inference_mode():
        sample.sample(recipe, text, text, {"samples": latent}, sample.Settings(**settings | values), notes)
    return notes.text


def an_empty_latent_in_the_middle_is_said() -> None:
    recipe, empty = pair(), torch.zeros(SHAPE)
    assert "empty" in run_sampler(empty, recipe, denoise=0.5, steps=2)
    assert "empty" in run_sampler(empty, recipe, start=1, steps=3)
    assert "empty" not in run_sampler(empty, recipe)
    assert "empty" not in run_sampler(torch.randn(SHAPE), recipe, denoise=0.5)


def one_sided_loras_are_refused_at_cfg_1() -> None:
    plain = pair()
    file = FakeLora(plain.high.path)
    high_only = ModelRecipe(plain.high, plain.low, dtype="float32", loras=Loras(high=(LoraUse(file, 1.0),)))
    plan = sample.Settings(0, 4, PerExpert(1, 1), 5.0, "euler", "simple", 1.0, 0, 100, True)
    notes = sample.Notes(high_only)

    def check(recipe: ModelRecipe, **values: object) -> None:
        settings = sample.Settings(**vars(plan) | values)
        sample._check_loras(recipe, settings, settings.timetable(), notes)

    refusal(lambda: check(high_only), "the low-noise expert", "has none", "cfg_low", "force")
    check(high_only, force=True)
    assert "has none" in notes.text
    check(plain), check(high_only, steps=30), check(high_only, guidance=PerExpert(low=3.5, high=1))
    check(high_only, end=1)  # the low-noise expert does nothing
    both = ModelRecipe(plain.high, plain.low, loras=Loras(high=(LoraUse(file, 1.0),), low=(LoraUse(file, 1.0),)))
    check(both)


class FakeLora:
    def __init__(self, path: Path):
        self.path = path


CASES = (
    no_hostile_value_is_queued, nor_comes_it_through_a_link, every_number_has_a_range,
    nothing_but_readable_errors_leaves_a_node, cancel_and_ctrl_c_pass, every_node_is_guarded,
    a_panic_in_the_tokenizer_is_an_error, no_key_passes_silently, comfyuis_samplers_are_told_too,
    what_patches_ask_for_is_refused_or_said, the_model_is_no_circle, faults_of_our_own_are_no_unknown_version,
    an_unknown_comfyui_is_named, evictable_memory_counts_as_free, sizes_that_no_machine_holds_are_refused,
    encoding_can_be_cancelled_within_a_chunk, pictures_of_every_kind, whole_numbers_encode_like_fractions,
    devices_can_be_chosen, attention_follows_comfyuis_options, an_empty_latent_in_the_middle_is_said,
    one_sided_loras_are_refused_at_cfg_1,
)  # fmt: skip


if __name__ == "__main__":
    report(CASES)
