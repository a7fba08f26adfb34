"""The diffusion transformer against diffusers and ComfyUI, float32, random weights."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_core.config import Architecture
from wan_core.errors import WanError
from wan_core.layouts.dit import DIALECTS, diffusers_config
from wan_core.models.dit import attention
from wan_core.models.dit import dit as dit_module
from wan_core.models.dit.attention import BACKENDS, Backend, find_backend
from wan_core.models.dit.dit import WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokens, ClipTokensConfig
from wan_core.tools.tiny import _random_weights

TOLERANCE = 2e-5  # of the largest reference value

T2V = Architecture(16, 16, 256, 512, layers=2, text_dim=96, freq_dim=256, heads=2)
I2V = Architecture(36, 16, 256, 512, layers=2, text_dim=96, freq_dim=256, heads=2)
TI2V = Architecture(48, 48, 256, 512, layers=2, text_dim=96, freq_dim=256, heads=2)
CLIP = replace(I2V, features=(ClipTokensConfig(64),))  # Wan2.1 I2V
TWO = replace(I2V, features=(ClipTokensConfig(64, 514),))  # Wan2.1 FLF2V

_COMFYUI = """
from comfy.ldm.wan.model import WanModel
import comfy.ops
model = WanModel(model_type=inputs["kind"], in_dim=inputs["in_dim"], out_dim=inputs["out_dim"], dim=256, ffn_dim=512,
                 freq_dim=256, text_dim=96, num_heads=2, num_layers=2, operations=comfy.ops.manual_cast)
model.load_state_dict(inputs["weights"])
with torch.no_grad():
    outputs["velocity"] = model(inputs["x"], inputs["t"], inputs["context"])
"""


def make(config: Architecture, seed: int = 0) -> WanDiT:
    model = WanDiT(config)
    model.load_state_dict(_random_weights(WanDiT, config, torch.Generator().manual_seed(seed)))
    return model.eval().requires_grad_(False)


def as_diffusers(model: WanDiT) -> WanTransformer3DModel:
    settings = {k: v for k, v in diffusers_config(model.config).items() if not k.startswith("_")}
    with torch.device("meta"):
        reference = WanTransformer3DModel(**settings)
    weights = {DIALECTS["diffusers"].to_theirs(key): value for key, value in model.state_dict().items()}
    reference.load_state_dict(weights, strict=True, assign=True)
    # A buffer that no checkpoint holds is made again, off the meta device.
    reference.rope = type(reference.rope)(model.config.dim // model.config.heads, (1, 2, 2), 1024)
    return reference.eval()


def inputs(
    config: Architecture, batch: int, frames: int, height: int, width: int, text: int = 20
) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(batch, config.in_channels, frames, height, width)
    return x, torch.tensor([937.0, 3.0])[:batch], torch.randn(batch, text, config.text_dim)


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert ours.shape == reference.shape and ours.dtype == torch.float32
    assert (ours - reference).abs().max() <= TOLERANCE * reference.abs().max()


@pytest.mark.parametrize("config", [T2V, I2V, TI2V], ids=["t2v", "i2v", "ti2v"])
@pytest.mark.parametrize("shape", [(1, 3, 6, 10), (2, 5, 4, 14), (1, 1, 2, 2)], ids=str)
def test_agrees_with_diffusers(config: Architecture, shape: tuple[int, ...]):
    model = make(config)
    x, t, context = inputs(config, *shape)
    assert_close(model(x, t, context), as_diffusers(model)(x, t, context).sample.detach())


@pytest.mark.parametrize(("config", "pictures"), [(CLIP, 1), (TWO, 2)], ids=["i2v", "flf2v"])
def test_clip_tokens_agree_with_diffusers(config: Architecture, pictures: int):
    """Wan2.1's image branch: keys and values of its own, the answers added. diffusers folds two pictures itself."""
    model = make(config)
    x, t, context = inputs(config, 2, 3, 4, 6, text=512)
    features = torch.randn(2, 257 * pictures, 64)
    theirs = features.reshape(2 * pictures, 257, 64)
    reference = as_diffusers(model)(x, t, context, encoder_hidden_states_image=theirs).sample.detach()
    assert_close(model(x, t, context, inputs=(ClipTokens(features),)), reference)
    without = model(x, t, context)
    assert_close(without, model(x, t, context, inputs=(ClipTokens(torch.zeros(1, 257, 64)),)))  # as VideoX-Fun
    assert (without - reference).abs().max() > 1e-3 * reference.abs().max()


def test_clip_tokens_are_computed_once_and_checked():
    model = make(TWO)
    x, t, context = inputs(TWO, 1, 3, 4, 6)
    states = model.text_states(context, inputs=(ClipTokens(torch.randn(1, 514, 64)),))
    assert torch.equal(model(x, t, states), model(x, t, states))
    with pytest.raises(WanError, match=r"\[1, 257, 32\]; this model takes \[B, N, 64\]"):
        model(x, t, context, inputs=(ClipTokens(torch.randn(1, 257, 32)),))
    with pytest.raises(WanError, match="hold 771 tokens, but this model has positions for 514"):
        model(x, t, context, inputs=(ClipTokens(torch.randn(1, 771, 64)),))


def test_a_timestep_for_each_frame_agrees_with_diffusers():
    model = make(TI2V)
    x, t, context = inputs(TI2V, 2, 4, 6, 4)
    per_frame = t[:, None].repeat(1, 4)
    per_frame[:, 0] = 0
    reference = as_diffusers(model)(x, per_frame.repeat_interleave(6, dim=1), context).sample.detach()
    assert_close(model(x, per_frame, context), reference)
    assert (model(x, t, context) - reference).abs().max() > 0.01 * reference.abs().max()  # the frame's own time matters


def test_any_timesteps_run_frame_by_frame():
    """More than two distinct timesteps, out of order, give what each frame would get by itself in the modulation."""
    model = make(TI2V)
    x, _, context = inputs(TI2V, 1, 4, 4, 4)
    t = torch.tensor([[0.0, 500.0, 500.0, 10.0]])
    assert_close(model(x, t, context), as_diffusers(model)(x, t.repeat_interleave(4, 1), context).sample.detach())


@pytest.mark.parametrize(
    ("config", "kind", "shape"),
    [(T2V, "t2v", (1, 3, 6, 10)), (I2V, "t2v", (2, 2, 4, 6)), (TI2V, "t2v", (1, 3, 5, 7))],
    ids=["t2v", "i2v", "ti2v-odd-size"],
)
def test_agrees_with_comfyui(in_comfyui, config: Architecture, kind: str, shape: tuple[int, ...]):
    """Latent sizes that are no multiple of the patch are padded and cropped as ComfyUI does."""
    model = make(config)
    x, t, context = inputs(config, *shape)
    reference = in_comfyui(
        _COMFYUI,
        kind=kind,
        in_dim=config.in_channels,
        out_dim=config.out_channels,
        weights=model.state_dict(),
        x=x,
        t=t,
        context=context,
    )["velocity"]
    assert_close(model(x, t, context), reference.float())


def test_frame_timesteps_agree_with_comfyui(in_comfyui):
    model = make(TI2V)
    x, t, context = inputs(TI2V, 1, 3, 4, 4)
    t = t[:, None].repeat(1, 3)
    t[:, 0] = 0
    reference = in_comfyui(
        _COMFYUI, kind="t2v", in_dim=48, out_dim=48, weights=model.state_dict(), x=x, t=t, context=context
    )["velocity"]
    assert_close(model(x, t, context), reference.float())


@pytest.mark.parametrize(
    "config",
    [Architecture(16, 16, 5120, 13824, 1, 4096, 256, 40), Architecture(48, 48, 3072, 14336, 1, 4096, 256, 24)],
    ids=["A14B-block", "5B-block"],
)
def test_a_block_of_full_width_agrees_with_diffusers(config: Architecture):
    model = make(config)
    x, t, context = inputs(config, 1, 2, 4, 6, text=32)
    assert_close(model(x, t, context), as_diffusers(model)(x, t, context).sample.detach())


def test_prompts_of_different_length_in_one_batch_equal_one_by_one():
    """The rows after a prompt are zeros, and every one of them is attended to."""
    model = make(T2V)
    x, t, context = inputs(T2V, 2, 2, 4, 4, text=512)
    context[0, 7:] = 0
    context[1, 200:] = 0
    together = model(x, t, context)
    for i in range(2):
        assert_close(model(x[i : i + 1], t[i : i + 1], context[i : i + 1]), together[i : i + 1])
    assert (model(x[:1], t[:1], context[:1, :7]) - together[:1]).abs().max() > 1e-3


def test_text_states_are_computed_once_and_change_nothing():
    model = make(T2V)
    x, t, context = inputs(T2V, 1, 2, 4, 4)
    calls = []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    states = model.text_states(context)
    first, second = model(x, t, states), model(x, t, states)
    assert len(calls) == T2V.layers
    assert torch.equal(first, second) and torch.equal(first, model(x, t, context))


def test_gradients_take_the_same_path():
    """Training runs the same formulas out of place: same values, and autograd sees every weight."""
    model = make(TI2V)
    x, t, context = inputs(TI2V, 1, 2, 4, 4)
    with torch.no_grad():
        expected = model(x, t, context)
    model.requires_grad_(True)
    out = model(x, t, context)
    assert_close(out.detach(), expected)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_it_can_be_cancelled_before_any_block():
    class Cancelled(Exception): ...

    def cancel(index: int) -> None:
        if index == 1:
            raise Cancelled

    x, t, context = inputs(T2V, 1, 1, 4, 4)
    with pytest.raises(Cancelled):
        make(T2V)(x, t, context, on_block=cancel)


def test_bfloat16_stays_near_float32():
    model = make(T2V)
    x, t, context = inputs(T2V, 1, 2, 4, 4)
    exact = model(x, t, context)
    half = model.to(torch.bfloat16)(x, t, context)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize(
    ("x", "t", "context", "message"),
    [
        ((1, 36, 1, 4, 4), (1,), (1, 3, 96), r"\[1, 36, 1, 4, 4\]; expected \[B, 16"),
        ((1, 16, 2, 4, 4), (3,), (1, 3, 96), r"\[3\]; expected \[1\] or \[1, 2\]"),
        ((1, 16, 1, 4, 4), (1,), (1, 3, 64), "64 wide, but this model takes 96"),
    ],
)
def test_wrong_inputs_are_named(x, t, context, message: str):
    with pytest.raises(WanError, match=message):
        make(T2V)(torch.zeros(x), torch.zeros(t), torch.zeros(context))


def test_attention_backends_that_are_missing_say_what_to_install():
    cpu = torch.device("cpu")
    assert find_backend("auto", cpu, torch.float32).name == "sdpa"
    with pytest.raises(WanError, match="pip install sageattention|does not run with"):
        find_backend("sage", cpu, torch.float32)
    with pytest.raises(WanError, match="expected one of auto, sdpa, sage, sage3, kitchen, flash2, flash3, flash4"):
        find_backend("flash", cpu, torch.float32)


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch):
    """``a_card(8, 9)``: CUDA devices have this compute capability, and every backend is installed."""
    monkeypatch.setattr(Backend, "installed", True)

    def set_to(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return set_to


CARDS = {(7, 5): {"kitchen"}, (8, 6): {"kitchen", "flash2", "sage", "sol"},
         (8, 9): {"kitchen", "flash2", "sage", "sol"},
         (9, 0): {"kitchen", "flash2", "flash3", "flash4", "sage", "sol"},
         (10, 0): {"kitchen", "flash2", "flash4", "sage3", "sol"},
         (12, 0): {"kitchen", "flash2", "flash4", "sage", "sage3", "sol"}}  # fmt: skip


@pytest.mark.parametrize("capability", CARDS)
def test_attention_is_refused_on_cards_that_its_kernels_are_not_for(
    a_card, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """Before a weight is read. SageAttention 2 is built for some cards only."""
    monkeypatch.setattr(attention, "_sage_version", lambda: 2)
    a_card(*capability)
    for name in set(BACKENDS) - {"sdpa"}:
        if name in CARDS[capability]:
            assert find_backend(name, "cuda:0", torch.bfloat16).name == name
        else:
            with pytest.raises(
                WanError, match=rf"'{name}' does not run.*{capability[0]}\.{capability[1]}.*Choose sdpa"
            ):
                find_backend(name, "cuda:0", torch.bfloat16)


def test_sage_of_version_1_runs_where_triton_does(a_card, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_sage_version", lambda: 1)
    a_card(10, 0)
    assert find_backend("sage", "cuda:0", torch.float16).name == "sage"
    with pytest.raises(WanError, match="does not run with torch.float32"):
        find_backend("sage", "cuda:0", torch.float32)


@pytest.mark.parametrize("tokens", ["few", "many"])
def test_a_backend_that_prepares_all_keys_is_asked_once_for_self_attention(monkeypatch, tokens: str):
    """And text never: the answers are those of PyTorch's own."""
    monkeypatch.setattr(dit_module, "TOKENS_AT_ONCE", 8 if tokens == "many" else 10_000)
    seen: list[tuple[int, int]] = []

    def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[1], k.shape[1]))
        return attention.sdpa(q, k, v)

    monkeypatch.setattr(attention, "BACKENDS", dict(BACKENDS))
    attend = attention.backend("counted", whole=True)(counted)
    model = make(T2V)
    x, t, text = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 9, 96)
    with torch.no_grad():
        expected = model(x, t, text)
        model.attend = attend
        ours = model(x, t, text)
    assert torch.allclose(ours, expected, atol=1e-6)
    assert seen == [(32, 32)] * model.config.layers


def test_rotation_tables_are_the_models_own_and_go_with_it():
    """The last two shapes' are kept, each made once."""
    model, text = make(T2V), torch.randn(1, 9, 96)
    first = None
    for height in (4, 6, 4, 8):
        model(torch.randn(1, 16, 1, height, 4), torch.tensor([5.0]), text)
        first = first or weakref.ref(model.rope.of((1, 2, 2), model.device))
    assert model.rope.of((1, 2, 2), model.device) is first() and len(model.rope._made) == 2
    del model
    gc.collect()
    assert first() is None


def test_nothing_that_holds_tensors_outlives_its_owner():
    """No function of the pack keeps tensors for later calls: those that keep something are listed here."""
    keep = {"_importable", "available", "_read", "_problem_of_file", "_passes_cudnn_by", "_wordings", "block_type",
            "type_numbers", "curves_of", "_stream", "_wide_font", "_terms", "_traced", "text_activations",
            "clip_activations", "vae_budget", "_opaque", "_contradicting", "_names"}  # fmt: skip
    package = importlib.import_module("wan_core")
    for found in pkgutil.walk_packages(package.__path__, "wan_core."):
        if found.name in ("wan_core.__main__", "wan_core.kernels.rows"):
            continue
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if hasattr(value, "cache_clear") and value.__module__ == found.name:
                assert name in keep, f"{found.name}.{name}"
            held = value if isinstance(value, (list, tuple, set)) else value.values() if isinstance(value, dict) else ()
            assert not any(isinstance(one, Tensor) for one in (value, *held)), f"{found.name}.{name}"
