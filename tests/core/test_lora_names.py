"""Names in LoRA files: wrappers around and inside, whole names only, layers of relatives, and hostile ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.lora_files import low_rank, paths, prefixed
from wan_core.config import Architecture
from wan_core.loading.dit import read_dit
from wan_core.lora.dialects import expert_of, keys_of_expert, sort_keys
from wan_core.lora.files import read_lora
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.tiny import _random_weights

CONFIG = Architecture(16, 16, 128, 128, layers=2, text_dim=32, freq_dim=256, heads=1)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, weights: dict) -> Path:
    path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file(weights, path)
    return path


SPELLINGS = {
    "official": ("blocks.1.self_attn.q", "blocks.1.ffn.0", "blocks.1.cross_attn.k", "head.head", "text_embedding.0"),
    "diffusers": (
        "blocks.1.attn1.to_q",
        "blocks.1.ffn.net.0.proj",
        "blocks.1.attn2.to_k",
        "proj_out",
        "condition_embedder.text_embedder.linear_1",
    ),
}
AROUND = [
    "", "diffusion_model.", "model.diffusion_model.", "transformer.", "model.", "dit.", "pipe.dit.", "module.",
    "_orig_mod.", "base_model.model.", "base_model.model.module.", "module._orig_mod.", "_orig_mod.module.",
    "diffusion_model._orig_mod.", "model._fsdp_wrapped_module._orig_mod.", "module.diffusion_model.",
    "generator.model.",
    "base_model.model.diffusion_model.", "transformer._orig_mod.", "state_dict.module.", "ema_model.module.", "unet.",
]  # fmt: skip
INSIDE = [
    lambda path: path.replace("blocks.1.", "blocks.1._orig_mod."),
    lambda path: path.replace("blocks.1.", "blocks._orig_mod.1.module."),
    lambda path: f"{path}._orig_mod",
    lambda path: f"{path}.module",
    lambda path: path.replace("blocks.1.", "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module."),
]


def found(keys: list[str], weights: dict) -> dict[str, set[str]]:
    sorted_keys = sort_keys(keys, weights)
    assert not sorted_keys.unknown, sorted_keys.unknown
    return {own: set(roles) for own, roles in sorted_keys.targets.items()}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "suffixes",
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_down.weight", ".lora_up.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
    ],
)
def test_what_wraps_a_model_or_a_layer_says_nothing(weights: dict, spelling: str, suffixes: tuple[str, str]):
    wanted = {f"{path}.weight": {"down", "up"} for path in SPELLINGS["official"]}
    for around in AROUND:
        keys = [around + path + suffix for path in SPELLINGS[spelling] for suffix in suffixes]
        assert found(keys, weights) == wanted
    for inside in INSIDE:
        for around in ("", "diffusion_model.", "base_model.model."):
            keys = [around + inside(path) + suffix for path in SPELLINGS[spelling] for suffix in suffixes]
            assert found(keys, weights) == wanted


@pytest.mark.parametrize(
    "prefix",
    [
        "lora_unet_",
        "lora_unet__",
        "lora_transformer_",
        "lycoris_",
        "lora_unet__orig_mod_",
        "lora_unet_module_",
        "lora_unet_diffusion_model_",
        "lora_unet_model_diffusion_model_",
        "lora_unet_base_model_model_",
        "lora_dit_",
        "lycoris_transformer_",
        "lora_unet.",
    ],
)
def test_flat_names_too(weights: dict, prefix: str):
    for spelling in SPELLINGS.values():
        keys = [prefix + path.replace(".", "_") + ".lora_down.weight" for path in spelling]
        assert set(found(keys, weights)) == {f"{path}.weight" for path in SPELLINGS["official"]}
    inside = f"{prefix}blocks_1__orig_mod_self_attn_q.lora_down.weight"
    assert set(found([inside], weights)) == {"blocks.1.self_attn.q.weight"}


def test_names_are_whole(weights: dict):
    """A model with the image branch: ``cross_attn_k`` begins like ``cross_attn_k_img``, block 1 like block 10."""
    image = {
        "blocks.0.cross_attn.k_img.weight": 0,
        "blocks.0.cross_attn.v_img.weight": 0,
        "img_emb.proj.1.weight": 0,
        "blocks.10.cross_attn.k_img.weight": 0,
        "blocks.10.cross_attn.k.weight": 0,
    }
    named = {
        "blocks_0_cross_attn_k": "blocks.0.cross_attn.k",
        "blocks_0_cross_attn_k_img": "blocks.0.cross_attn.k_img",
        "blocks_10_cross_attn_k": "blocks.10.cross_attn.k",
        "img_emb_proj_1": "img_emb.proj.1",
        "blocks_10_cross_attn_k_img": "blocks.10.cross_attn.k_img",
    }
    for prefix in ("lora_unet_", "lora_unet__"):
        for flat, own in named.items():
            assert set(found([f"{prefix}{flat}.lora_down.weight"], weights | image)) == {f"{own}.weight"}
    assert sort_keys(["lora_unet_blocks_0_cross_attn_k_img.lora_down.weight"], weights).targets == {}


def test_other_models_blocks_are_not_ours(weights: dict):
    """A prefix that is no wrapper is a part of its own, whose blocks only sound like ours."""
    for prefix in (
        "controlnet.",
        "face_adapter.",
        "text_encoder.",
        "motion_encoder.model.",
        "pipe.vace.",
        "audio.",
        "pipe.image_encoder.",
        "lora_te_",
        "lora_te1_",
        "lora_unet_controlnet_",
    ):
        path = "blocks.1.self_attn.q" if prefix.endswith(".") else "blocks_1_self_attn_q"
        assert sort_keys([f"{prefix}{path}.lora_down.weight"], weights).targets == {}


def test_vace_parts_keep_their_own_blocks(weights: dict):
    vace = {f"vace_blocks.0.{name}.weight": 0 for name in ("self_attn.q", "before_proj")}
    for around in ("", "pipe.vace.", "vace.", "transformer.", "pipe.vace._orig_mod."):
        keys = [f"{around}vace_blocks.0.self_attn.q.lora_A.default.weight"]
        assert set(found(keys, weights | vace)) == {"vace_blocks.0.self_attn.q.weight"}
        assert sort_keys(keys, weights).targets == {}


def test_an_i2v_lora_on_t2v_says_what_it_leaves_out(model: Path, weights: dict, tmp_path: Path):
    torch.manual_seed(2)
    made = low_rank(weights, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=False)[0]
    image = {
        f"diffusion_model.{name}.lora_A.weight": torch.zeros(4, 128)
        for name in ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1")
    }
    others = {
        "diffusion_model.patch_embedding.diff": torch.zeros(128, 36, 1, 2, 2),
        "diffusion_model.blocks.0.mystery.lora_A.weight": torch.zeros(4, 128),
    }
    save_file(made | image | others, tmp_path / "i2v.safetensors")
    lora = read_lora(tmp_path / "i2v.safetensors", read_dit(model))
    report = lora.report()
    assert lora.matched == len(made) and set(lora.parts) == {f"{path}.weight" for path in paths(weights)}
    assert "left out, for the image branch of Wan2.1 I2V, which this model lacks (3): " in report
    assert "not matched (1): diffusion_model.blocks.0.mystery" in report
    assert "another shape (1): diffusion_model.patch_embedding.diff" in report


def test_both_experts_in_one_file_by_other_names():
    for first, second in (
        ("transformer.", "transformer_2."),
        ("pipe.dit.", "pipe.dit2."),
        ("high_noise_model.", "low_noise_model."),
        ("module.dit.", "module.dit2."),
    ):
        keys = [f"{first}a", f"{second}a", "b"]
        assert keys_of_expert(keys, "high") == [keys[0], "b"] and keys_of_expert(keys, "low") == [keys[1], "b"]
    assert keys_of_expert(["transformer.a", "b"], "low") == ["transformer.a", "b"]
    assert expert_of("blocks.0.dit2.a") is None


def test_hostile_names_cost_nothing_and_break_nothing(model: Path, weights: dict, tmp_path: Path):
    """Numbers that no model has, names without an end, control characters: unknown, within seconds."""
    keys = [
        "diffusion_model.blocks.99999999999999999999.self_attn.q.lora_A.weight",
        "." * 400,
        "",
        "\x00\u202e<b>",
        "blocks.-1.self_attn.q.lora_A.weight",
        "lora_unet_" * 50,
        "lora_unet_" + "module_" * 70 + "x.alpha",
        ".lora_A." * 200_000 + "x",
        "model." * 100_000 + "blocks.0.self_attn.q.lora_A.weight",
        "blocks.٣.self_attn.q.lora_A.weight",
    ]
    begun = time.monotonic()
    assert sorted(sort_keys(keys, weights).unknown) == sorted(keys)
    assert sort_keys([f"x{number}.lora_A.weight" for number in range(100_000)], weights).targets == {}
    assert time.monotonic() - begun < 20
    torch.manual_seed(2)
    made = low_rank(weights, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=False)[0]
    save_file(made | {keys[0]: torch.zeros(4, 128)}, tmp_path / "many.safetensors")
    assert read_lora(tmp_path / "many.safetensors", read_dit(model)).unmatched == (keys[0],)
    assert len(load_file(tmp_path / "many.safetensors")) == len(made) + 1
