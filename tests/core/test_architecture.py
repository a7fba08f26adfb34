"""Every family of Wan's is recognised from keys and shapes, in both naming schemes, and what is ambiguous is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_core.config import VARIANTS, Architecture
from wan_core.errors import WanError
from wan_core.layouts.architecture import family_of, nearest
from wan_core.layouts.variants import candidates, choose
from wan_core.models.dit.features.clip_tokens import ClipTokensConfig

CLIP = {"img_emb.proj.0.weight": (1280,), "blocks.0.cross_attn.k_img.weight": (5120, 5120)}
REFERENCE = {"ref_conv.weight": (5120, 16, 2, 2)}


def shapes(into: int, out: int, dim: int = 5120, **extra: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        "patch_embedding.weight": (dim, into, 1, 2, 2),
        "head.head.weight": (out * 4, dim),
        "head.modulation": (1, 2, dim),
        "blocks.0.self_attn.q.weight": (dim, dim),
        **extra,
    }


ROWS = {
    "VACE": shapes(16, 16) | {"vace_patch_embedding.weight": (5120, 96, 1, 2, 2)},
    "a VACE module": {"vace_patch_embedding.weight": (5120, 96, 1, 2, 2), "vace_blocks.0.self_attn.q.weight": (1, 1)},
    "Wan2.1 Fun Control-Camera": shapes(32, 16) | CLIP | {"control_adapter.conv.weight": (5120, 1536, 2, 2)},
    "Wan2.2 Fun Control-Camera": shapes(36, 16) | {"control_adapter.conv.weight": (5120, 1536, 2, 2)},
    "Wan2.2 S2V (speech)": shapes(16, 16) | {"casual_audio_encoder.encoder.final_linear.weight": (1, 1)},
    "HuMo": shapes(36, 16) | {"audio_proj.audio_proj_glob_1.layer.bias": (1,)},
    "Wan2.2 Animate": shapes(36, 16) | CLIP | {"face_adapter.fuser_blocks.0.k_norm.weight": (1,)},
    "SCAIL-2": shapes(20, 16) | CLIP | {"patch_embedding_mask.weight": (1, 28, 1, 2, 2)},
    "SCAIL": shapes(20, 16) | CLIP | {"patch_embedding_pose.weight": (1, 20, 1, 2, 2)},
    "Wan-Dancer": shapes(36, 16) | CLIP | {"patch_embedding_global.weight": (1, 1, 1, 2, 2)},
    "ReCamMaster": shapes(16, 16) | {"blocks.0.cam_encoder.weight": (1536, 12), "blocks.0.projector.weight": (1,)},
    "SteadyDancer": shapes(36, 16) | CLIP | {"patch_embedding_fuse.weight": (1, 1, 1, 2, 2)},
    "Wan2.1 FLF2V": shapes(36, 16) | CLIP | {"img_emb.emb_pos": (1, 514, 1280)},
    "Wan2.1 I2V": shapes(36, 16) | CLIP,
    "Wan2.1 Fun Control V1.1": shapes(48, 16) | CLIP | REFERENCE,
    "Wan2.1 Fun Control": shapes(48, 16, 1536) | CLIP,
    "Wan2.2 TI2V-5B": shapes(48, 48, 3072),
    "Wan2.2 Fun-5B-InP": shapes(100, 48, 3072),
    "Wan2.2 Fun-5B-Control": shapes(148, 48, 3072) | {"ref_conv.weight": (3072, 48, 2, 2)},
    "Wan2.2 Fun-A14B-Control": shapes(52, 16) | REFERENCE,
    "T2V": shapes(16, 16, 1536),
    "Wan2.2 I2V": shapes(36, 16),
    "a speed control for T2V-1.3B": {f"linear.{i}.{end}": (1,) for i in (0, 2, 4) for end in ("weight", "bias")},
    "a MultiTalk or InfiniteTalk patch": {"audio_proj.proj1.weight": (1,), "blocks.0.audio_cross_attn.q.weight": (1,)},
    "a Uni3C control network": {"controlnet_patch_embedding.weight": (1,)},
}


@pytest.mark.parametrize("name", ROWS)
def test_family(name: str) -> None:
    assert family_of(ROWS[name]).name == name


def test_animate_2_is_told_by_its_header_alone() -> None:
    header = {"config": '{"transformer": {"model_type": "animate2"}}'}
    assert family_of(ROWS["Wan2.1 I2V"], header).name == "Wan-Animate-2"
    assert family_of(ROWS["Wan2.1 I2V"], {"config": "[" * 10000}).name == "Wan2.1 I2V"


def test_an_unknown_model_is_described_with_its_neighbours() -> None:
    assert family_of(shapes(64, 16)) is None
    assert "64 channels in, 16 out; nearest: Fun-A14B-Control" in nearest(shapes(64, 16))


def config(into: int = 16, out: int = 16, dim: int = 5120, clip: int | None = None) -> Architecture:
    features = () if clip is None else (ClipTokensConfig(1280, clip),)
    return Architecture(into, out, dim, dim * 2, 40, 4096, 256, dim // 128, features=features)


CHOICES = [
    # what the network is, its path, the task, whether it was a guess
    (config(dim=1536), "wan2.1_t2v_1.3B_fp16.safetensors", "t2v-1.3B", False),
    (config(dim=1536), "anything.safetensors", "t2v-1.3B", False),
    (config(), "wan2.1_t2v_14B_fp8_scaled.safetensors", "t2v-14B", False),
    (config(), "Wan2_1-T2V-14B_fp8_e4m3fn.safetensors", "t2v-14B", False),
    (config(), "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "t2v-A14B", False),
    (config(), "Wan2.2-T2V-A14B/low_noise_model", "t2v-A14B", False),
    (config(), "transformer_2", "t2v-A14B", False),
    (config(), "my_finetune.safetensors", "t2v-14B", True),
    (config(dim=256), "x.safetensors", "t2v-1.3B", True),
    (config(dim=256), "wan2.1_t2v_14B.safetensors", "t2v-14B", False),
    (config(36), "wan2.2_i2v_low_noise_14B.safetensors", "i2v-A14B", False),
    (config(36), "mine.safetensors", "i2v-A14B", False),
    (config(36, clip=0), "wan2.1_i2v_480p_14B_fp16.safetensors", "i2v-14B", False),
    (config(36, clip=514), "wan2.1_flf2v_720p_14B_fp16.safetensors", "flf2v-14B", False),
    (config(48, 48, 3072), "wan2.2_ti2v_5B_fp16.safetensors", "ti2v-5B", False),
]


@pytest.mark.parametrize(("network", "path", "task", "guessed"), CHOICES)
def test_choice(network: Architecture, path: str, task: str, guessed: bool) -> None:
    chosen = choose(network, Path("models") / path)
    assert (chosen.variant.task, chosen.assumed is not None) == (task, guessed)


def test_a_pair_is_two_experts_and_the_user_has_the_last_word() -> None:
    path = Path("my_finetune.safetensors")
    assert choose(config(), path, pair=True).variant.task == "t2v-A14B"
    assert choose(config(), path, wanted="t2i-14B").variant.task == "t2i-14B"
    with pytest.raises(WanError, match="is not Wan2.2 TI2V-5B: by its layers it is .*T2V-A14B"):
        choose(config(), path, wanted="ti2v-5B")


def test_no_two_rows_are_told_apart_by_channels_alone() -> None:
    """48 in is TI2V-5B only with 48 out; with 16 out it is a Fun Control model, and none that runs."""
    assert not candidates(config(48, 16, clip=0)) and not candidates(config(48, 16))
    assert {row.task for row in candidates(config())} == {"t2v-A14B", "t2v-14B", "t2v-1.3B", "t2i-14B"}
    assert len({(row.signature, row.experts, row.dim, row.frames) for row in VARIANTS.values()}) == len(VARIANTS)
