"""LoRAs that reach the layers of the picture, on Wan2.1 I2V and FLF2V: every dialect, however the weights lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.core.lora_files import DIALECTS_OF_LORA, STRENGTH, as_diffusers
from tests.core.quant_files import is_matrix, write_gguf
from tests.core.test_lora import CONFIG as T2V
from tests.core.test_lora import close, weights_of
from tests.core.test_lora_runs import dequantised
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import PatchedLinear, adaptation_of
from wan_core.lora.dialects import sort_keys
from wan_core.lora.files import read_lora
from wan_core.lora.use import LoraUse
from wan_core.memory.build import build_dit
from wan_core.memory.plan import weights_of as planned_weights
from wan_core.models.dit.dit import WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokens, ClipTokensConfig
from wan_core.quant.fp8 import FP8
from wan_core.quant.int8 import Int8
from wan_core.quant.linear import QuantLinear
from wan_core.tools.tiny import _random_weights

WIDTH = 64  # of a CLIP feature
CONFIGS = {
    "i2v": replace(T2V, in_channels=36, features=(ClipTokensConfig(WIDTH),)),
    "flf2v": replace(T2V, in_channels=36, features=(ClipTokensConfig(WIDTH, 514),)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models in float32, I2V in GGUF too."""
    folder = tmp_path_factory.mktemp("dit")
    for name, config in CONFIGS.items():
        weights = _random_weights(WanDiT, config, torch.Generator().manual_seed(0))
        save_file(weights, folder / f"{name}.safetensors")
        if name == "i2v":
            write_gguf(
                folder / "i2v.gguf",
                weights,
                lambda key, value: "Q8_0" if is_matrix(key, value) and key.startswith("blocks") else "F32",
            )
    return {file.name.removesuffix(".safetensors"): file for file in folder.iterdir()}


def answer(dit: WanDiT, prompt_seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(prompt_seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, t, text = draw(1, 36, 2, 4, 6), torch.tensor([437.0]), draw(1, 20, 32)
    return dit(x, t, text, inputs=(ClipTokens(draw(1, dit.config.features[0].positions or 257, WIDTH)),))


def velocity(path: Path, *loras: tuple[Path, float], merge: bool = False, **options: object) -> Tensor:
    file = read_dit(path)
    dit = build_dit(file, **({"dtype": "float32"} | options))
    adaptation_of(dit, file).set([read_lora(lora, file) for lora, _ in loras], [s for _, s in loras], merge=merge)
    return answer(dit)


WAYS = {"beside": {}, "merged": {"merge": True}, "streamed": {"swap_blocks": 3}}


CASES = [
    *(("i2v", kind) for kind in DIALECTS_OF_LORA),
    ("flf2v", "kohya"),
    ("flf2v", "diffusers"),
    ("flf2v", "differences"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_dialect_equals_the_float32_merge(bases, tmp_path: Path, name: str, kind: str):
    """To 1e-5 of the largest value; the layers of the picture alone make another video by more than 0.1 %."""
    dialect = DIALECTS_OF_LORA[kind]
    torch.manual_seed(2)
    weights = weights_of(bases[name])
    tensors, merged = dialect.make(weights)
    save_file(tensors, tmp_path / "lora.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    text = {key: weights[key] if "img" in key else value for key, value in merged.items()}
    save_file(text, tmp_path / "text.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors", read_dit(bases[name]))
    assert (lora.matched, lora.unmatched, lora.misfits) == (len(tensors), (), ())
    assert any("_img" in key for key in lora.parts) and any("img_emb" in key for key in lora.parts)
    expected = velocity(tmp_path / "merged.safetensors")
    for way, options in WAYS.items():
        found = velocity(bases[name], (tmp_path / "lora.safetensors", STRENGTH), **options)
        assert close(found, expected, 1e-5), way
    assert not close(velocity(tmp_path / "text.safetensors"), expected, 1e-3)


NAMES = {
    "blocks.1.cross_attn.k_img": (
        "diffusion_model.blocks.1.cross_attn.k_img",
        "lora_unet_blocks_1_cross_attn_k_img",
        "lora_unet__blocks_1_cross_attn_k_img",
        "transformer.blocks.1.attn2.add_k_proj",
        "blocks.1.attn2.add_k_proj",
        "lora_transformer_blocks_1_attn2_add_k_proj",
        "pipe.dit.blocks.1.cross_attn.k_img",
        "base_model.model.blocks.1.cross_attn.k_img",
        "lycoris_blocks_1_attn2_add_k_proj",
    ),
    "blocks.1.cross_attn.v_img": ("lora_unet_blocks_1_cross_attn_v_img", "transformer.blocks.1.attn2.add_v_proj"),
    "img_emb.proj.1": (
        "diffusion_model.img_emb.proj.1",
        "lora_unet_img_emb_proj_1",
        "lora_unet__img_emb_proj_1",
        "transformer.condition_embedder.image_embedder.ff.net.0.proj",
        "lora_transformer_condition_embedder_image_embedder_ff_net_0_proj",
    ),
    "img_emb.proj.3": (
        "diffusion_model.img_emb.proj.3",
        "lora_unet__img_emb_proj_3",
        "condition_embedder.image_embedder.ff.net.2",
    ),
}
DIFFERENCES = {
    "diffusion_model.blocks.1.cross_attn.norm_k_img.diff": "blocks.1.cross_attn.norm_k_img.weight",
    "lora_unet_blocks_1_cross_attn_norm_k_img.w_norm": "blocks.1.cross_attn.norm_k_img.weight",
    "transformer.blocks.1.attn2.norm_added_k.diff": "blocks.1.cross_attn.norm_k_img.weight",
    "diffusion_model.blocks.1.cross_attn.k_img.diff_b": "blocks.1.cross_attn.k_img.bias",
    "transformer.blocks.1.attn2.add_v_proj.diff_b": "blocks.1.cross_attn.v_img.bias",
    "diffusion_model.img_emb.proj.0.diff": "img_emb.proj.0.weight",
    "transformer.condition_embedder.image_embedder.norm1.diff": "img_emb.proj.0.weight",
    "diffusion_model.img_emb.proj.4.diff_b": "img_emb.proj.4.bias",
    "lora_unet_img_emb_proj_4.b_norm": "img_emb.proj.4.bias",
    "transformer.condition_embedder.image_embedder.norm2.diff_b": "img_emb.proj.4.bias",
    "diffusion_model.img_emb.emb_pos.diff": "img_emb.emb_pos",
    "transformer.condition_embedder.image_embedder.pos_embed.diff": "img_emb.emb_pos",
}


def test_every_name_of_a_layer_of_the_picture(bases):
    weights = weights_of(bases["flf2v"])
    for own, spellings in NAMES.items():
        for path in spellings:
            for suffix in (".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight", ".alpha", ".dora_scale"):
                assert set(sort_keys([path + suffix], weights).targets) == {f"{own}.weight"}, path + suffix
    for key, own in DIFFERENCES.items():
        assert set(sort_keys([key], weights).targets) == {own}, key
    alone = weights_of(bases["i2v"])
    key = "diffusion_model.img_emb.emb_pos.diff"
    assert sort_keys([key], alone).unknown == [key]


@pytest.mark.parametrize("swap_blocks", [0, 3])
@pytest.mark.parametrize("kind", ["A_B", "lokr_two", "dora_columns", "differences"])
@pytest.mark.parametrize(("name", "dtype"), [("i2v", "fp8_e4m3fn"), ("i2v", "int8"), ("i2v.gguf", "float32")])
def test_on_quantised_weights(
    bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str, kind: str, swap_blocks: int
):
    """To 1e-5 of the float32 merge with the dequantised matrices, those of the picture among them."""
    for kind_of_format in (FP8, Int8):  # their products round what goes into a layer; the weights are the question
        monkeypatch.setattr(kind_of_format, "multiply", lambda *_: None)
    torch.manual_seed(5)
    save_file(DIALECTS_OF_LORA[kind].make(weights_of(bases["i2v"]))[0], tmp_path / "lora.safetensors")
    file = read_dit(bases[name])
    packed = build_dit(file, dtype=dtype)
    assert all(
        isinstance(getattr(block.cross_attn, part), QuantLinear)
        for block in packed.blocks
        for part in ("k_img", "v_img")
    )
    with torch.device("meta"):
        wanted = WanDiT(CONFIGS["i2v"]).state_dict()
    plain = {key: value.contiguous() for key, value in dequantised(packed).items() if key in wanted}
    save_file(plain, tmp_path / "plain.safetensors")
    expected = velocity(tmp_path / "plain.safetensors", (tmp_path / "lora.safetensors", STRENGTH), merge=True)
    lora = (tmp_path / "lora.safetensors", STRENGTH)
    assert close(velocity(bases[name], lora, dtype=dtype, swap_blocks=swap_blocks), expected, 1e-5)
    assert not close(answer(packed), expected, 1e-2)


def test_strengths_change_and_go_without_a_trace(bases, tmp_path: Path):
    torch.manual_seed(3)
    save_file(DIALECTS_OF_LORA["diffusers"].make(weights_of(bases["i2v"]))[0], tmp_path / "lora.safetensors")
    file = read_dit(bases["i2v"])
    dit = build_dit(file, dtype="float32")
    before, lora = answer(dit), read_lora(tmp_path / "lora.safetensors", file)
    adaptation_of(dit, file).set([lora], [1.0])
    assert isinstance(dit.blocks[0].cross_attn.k_img, PatchedLinear)
    assert not close(answer(dit), before, 1e-2)
    adaptation_of(dit, file).set([lora], [0.0])
    assert torch.equal(answer(dit), before)
    adaptation_of(dit, file).set([], [])
    assert torch.equal(answer(dit), before) and not isinstance(dit.blocks[0].cross_attn.k_img, PatchedLinear)


def test_the_memory_plan_counts_them(bases, tmp_path: Path):
    """Of a LoRA of the picture's layers alone: rank times both sides, in the dtype that is computed in."""
    weights = weights_of(bases["i2v"])
    made = {}
    for path in [key.removesuffix(".weight") for key in weights if key.endswith((".k_img.weight", ".v_img.weight"))]:
        made[f"{as_diffusers(path)}.lora_A.weight"] = torch.randn(4, 128)
        made[f"{as_diffusers(path)}.lora_B.weight"] = torch.randn(128, 4)
    save_file(made, tmp_path / "lora.safetensors")
    file = read_dit(bases["i2v"])
    uses = [LoraUse(read_lora(tmp_path / "lora.safetensors", file), 1.0)]
    plain, with_lora = (planned_weights(file, "bfloat16", "cuda", loras=loras) for loras in ([], uses))
    assert with_lora.total - plain.total == 3 * 2 * 2 * 4 * 128 * 2
    assert plain.outside >= sum(value.nbytes // 2 for key, value in weights.items() if key.startswith("img_emb"))
    t2v = sum(value.nbytes // 2 for key, value in weights.items() if key.startswith("blocks.0") and "img" not in key)
    image = sum(value.nbytes // 2 for key, value in weights.items() if key.startswith("blocks.0") and "img" in key)
    assert plain.blocks[0] >= t2v + image
