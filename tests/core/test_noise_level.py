"""High and low noise, read out of names in one place."""

from __future__ import annotations

from pathlib import Path

import pytest

from wan_core.layouts.noise_level import noise_level_of

NAMES = {
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "high",
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": "low",
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf": "high",
    "Wan2.2-I2V-A14B-LowNoise-Q8_0.gguf": "low",
    "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors": "high",
    "Wan2_2-T2V-A14B-LOW_fp8.safetensors": "low",
    "i2vLOW_v2.safetensors": "low",
    "i2vHIGH_v2.safetensors": "high",
    "t2vlow.safetensors": "low",
    "smoothMix_highV2.safetensors": "high",
    "HIGHv2.safetensors": "high",
    "highnoise_e20.safetensors": "high",
    "low_vram_high_noise.safetensors": "high",
    "low-key-light_highnoise.safetensors": "high",
    "lowres_style.safetensors": None,
    "highres.safetensors": None,
    "slow_motion.safetensors": None,
    "yellow_flow.safetensors": None,
    "high_and_low.safetensors": None,
    "wan2.1_t2v_14B.safetensors": None,
    "high_noise_model": "high",
    "transformer_2": "low",
    "transformer": "high",
    "high_noise_model/diffusion_pytorch_model.safetensors": "high",
    "low_noise_model/diffusion_pytorch_model-00001-of-00002.safetensors": "low",
    "low_noise/high_noise.safetensors": "high",
}


@pytest.mark.parametrize(("name", "level"), NAMES.items())
def test_name(name: str, level: str | None) -> None:
    assert noise_level_of(Path("models") / name) == level
