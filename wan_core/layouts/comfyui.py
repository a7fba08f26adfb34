"""What ComfyUI's templates call the files of each model, in its folders ``diffusion_models``, ``vae`` and so on."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import VAEKind


@dataclass(frozen=True)
class Names:
    """Of one variant's files.

    Attributes:
        models: high, low; or the dense model.
        loras: of the 4-step template: high, low.
    """

    models: tuple[str, ...]
    loras: tuple[str, ...] = ()


NAMES: dict[str, Names] = {  # by task
    "t2v-A14B": Names(
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
        (
            "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
            "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors",
        ),
    ),
    "i2v-A14B": Names(
        ("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors", "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
        (
            "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors",
            "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors",
        ),
    ),
    "ti2v-5B": Names(("wan2.2_ti2v_5B_fp16.safetensors",)),
    "t2v-1.3B": Names(("wan2.1_t2v_1.3B_fp16.safetensors",)),
    "t2v-14B": Names(("wan2.1_t2v_14B_fp8_scaled.safetensors",)),
    "t2i-14B": Names(("wan2.1_t2v_14B_fp8_scaled.safetensors",)),
    "i2v-14B": Names(("wan2.1_i2v_480p_14B_fp16.safetensors",)),
    "flf2v-14B": Names(("wan2.1_flf2v_720p_14B_fp16.safetensors",)),
}
VAES: dict[VAEKind, str] = {"wan2.1": "wan_2.1_vae.safetensors", "wan2.2": "wan2.2_vae.safetensors"}
TEXT_ENCODERS = ("umt5_xxl_fp16.safetensors", "umt5_xxl_bf16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors")
CLIP_VISION = "clip_vision_h.safetensors"
