"""What Wan models are: shapes read from files, and the table of variants.

Sources: the official repository's ``wan/configs`` and ``generate.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import WanError

HEAD_DIM = 128  # every Wan DiT: heads = dim / 128
TEXT_LENGTH = 512  # rows of the text embedding that cross-attention sees
TRAIN_STEPS = 1000  # timesteps run from 0 (clean) to 1000 (noise)
TEMPORAL_STRIDE = 4  # pixel frames a latent frame, after the first
PATCH = (1, 2, 2)  # latent frames, rows and columns in one token

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)

VAEKind = Literal["wan2.1", "wan2.2"]


@dataclass(frozen=True)
class DiTConfig:
    """Dimensions of a diffusion transformer, all read from the checkpoint."""

    in_channels: int
    out_channels: int
    dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    freq_dim: int
    heads: int
    eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions of a video autoencoder, all read from the checkpoint.

    ``encoder_dim`` and ``decoder_dim`` are the widths at full resolution; level i is ``dim * multipliers[i]`` wide.
    """

    kind: VAEKind
    channels: int
    encoder_dim: int
    decoder_dim: int
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2


@dataclass(frozen=True)
class TextConfig:
    """Dimensions of a umT5 encoder, all read from the checkpoint."""

    vocabulary: int
    dim: int
    attention_dim: int
    ffn_dim: int
    heads: int
    layers: int
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class VAESpec:
    """Geometry of a latent space."""

    kind: VAEKind
    channels: int
    spatial_stride: int
    checkpoint: str  # the official file name
    comfy_name: str  # the name in ComfyUI's own templates


VAES: dict[VAEKind, VAESpec] = {
    "wan2.1": VAESpec("wan2.1", 16, 8, "Wan2.1_VAE.pth", "wan_2.1_vae.safetensors"),
    "wan2.2": VAESpec("wan2.2", 48, 16, "Wan2.2_VAE.pth", "wan2.2_vae.safetensors"),
}


@dataclass(frozen=True)
class PerExpert:
    """One number for each expert."""

    low: float
    high: float


@dataclass(frozen=True)
class Variant:
    """One official model: a row of the table below, never a branch in the code.

    ``boundary`` is the fraction of the 1000 timesteps at and above which the high-noise expert works; a dense
    model has none. ``image`` says how a start image enters: not at all, as channels beside the noise, or as a clean
    first latent frame.
    """

    task: str
    display_name: str
    vae: VAEKind
    in_channels: int
    boundary: float | None
    shift: float
    steps: int
    guidance: PerExpert
    frames: int
    fps: int
    size: tuple[int, int]  # the default, width and height
    sizes: tuple[tuple[int, int], ...]
    image: Literal["none", "channels", "frame"]
    comfy_names: tuple[str, ...]  # high, low; or the dense model
    comfy_loras: tuple[str, ...] = ()  # of ComfyUI's 4-step template: high, low

    @property
    def experts(self) -> int:
        return 1 if self.boundary is None else 2

    @property
    def size_multiple(self) -> int:
        """Pixels a side must be a multiple of: VAE stride times patch."""
        return VAES[self.vae].spatial_stride * PATCH[1]


_A14B_SIZES = ((1280, 720), (720, 1280), (832, 480), (480, 832))

VARIANTS: dict[str, Variant] = {
    row.task: row
    for row in (
        Variant(
            task="t2v-A14B", display_name="Wan2.2 T2V-A14B", vae="wan2.1", in_channels=16, boundary=0.875,
            shift=12.0, steps=40, guidance=PerExpert(low=3.0, high=4.0), frames=81, fps=16, size=(1280, 720),
            sizes=_A14B_SIZES, image="none",
            comfy_names=("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
                         "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors"),
            comfy_loras=("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors",
                         "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors"),
        ),
        Variant(
            task="i2v-A14B", display_name="Wan2.2 I2V-A14B", vae="wan2.1", in_channels=36, boundary=0.900,
            shift=5.0, steps=40, guidance=PerExpert(low=3.5, high=3.5), frames=81, fps=16, size=(1280, 720),
            sizes=_A14B_SIZES, image="channels",
            comfy_names=("wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors",
                         "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"),
            comfy_loras=("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors",
                         "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors"),
        ),
        Variant(
            task="ti2v-5B", display_name="Wan2.2 TI2V-5B", vae="wan2.2", in_channels=48, boundary=None,
            shift=5.0, steps=50, guidance=PerExpert(low=5.0, high=5.0), frames=121, fps=24, size=(1280, 704),
            sizes=((1280, 704), (704, 1280)), image="frame",
            comfy_names=("wan2.2_ti2v_5B_fp16.safetensors",),
        ),
    )
}

TEXT_ENCODER_CHECKPOINT = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
HIGH_NOISE_FOLDER = "high_noise_model"
LOW_NOISE_FOLDER = "low_noise_model"


# Relatives that no row of the table describes, by their DiT's input channels.
_RELATIVES = {
    32: "Wan2.1 Fun Camera", 52: "Wan2.2 Fun-A14B-Control", 100: "Wan2.2 Fun-5B-InP or Fun-5B-Control-Camera",
    148: "Wan2.2 Fun-5B-Control",
}  # fmt: skip


def variant_of(channels: int) -> Variant:
    """The variant whose DiT takes this many input channels (they differ between all variants in the table).

    Raises:
        WanError: no variant has so many.
    """
    found = next((row for row in VARIANTS.values() if row.in_channels == channels), None)
    if found is None:
        relative = f", as {_RELATIVES[channels]} does" if channels in _RELATIVES else ""
        known = ", ".join(f"{row.display_name} ({row.in_channels})" for row in VARIANTS.values())
        raise WanError(f"This diffusion model takes {channels} channels{relative}, which this version does not run. "
                       f"Supported: {known}.")  # fmt: skip
    return found
