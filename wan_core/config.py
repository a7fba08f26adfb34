"""What Wan models are: shapes read from files, and the table of variants.

Sources: the official repository's ``wan/configs`` and ``generate.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

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
class FeatureConfig:
    """Dimensions of one capability of a diffusion transformer beyond text, such as CLIP tokens.

    Each has a file in ``models/dit/features/``; its class is what a network is asked for (``Architecture.feature``).
    """

    name: ClassVar[str]


Kind = TypeVar("Kind", bound=FeatureConfig)


@dataclass(frozen=True)
class Architecture:
    """Dimensions and features of a diffusion transformer, all read from the checkpoint."""

    in_channels: int
    out_channels: int
    dim: int
    ffn_dim: int
    layers: int
    text_dim: int
    freq_dim: int
    heads: int
    eps: float = 1e-6
    features: tuple[FeatureConfig, ...] = ()

    def feature(self, kind: type[Kind]) -> Kind | None:
        """The dimensions of one capability beyond text, or None where the network lacks it."""
        return next((one for one in self.features if isinstance(one, kind)), None)


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


VAES: dict[VAEKind, VAESpec] = {
    "wan2.1": VAESpec("wan2.1", 16, 8, "Wan2.1_VAE.pth"),
    "wan2.2": VAESpec("wan2.2", 48, 16, "Wan2.2_VAE.pth"),
}


@dataclass(frozen=True)
class PerExpert:
    """One number for each expert."""

    low: float
    high: float

    @property
    def guided(self) -> bool:
        """Of guidance scales: whether either expert asks the negative prompt too."""
        return (self.low, self.high) != (1, 1)


@dataclass(frozen=True)
class Variant:
    """One official model: a row of the table below, never a branch in the code.

    Attributes:
        in_channels, clip: with the VAE, what its network looks like: channels with the noise and everything beside it;
            how many pictures it hears as CLIP tokens (two have positions of their own).
        dim: the official width, which tells rows apart whose networks look alike.
        boundary: fraction of the 1000 timesteps at and above which the high-noise expert works; a dense model has none.
        shift_480p: the shift at 480p where it differs.
        command_line: shift and guidance of the official script where they differ from what its authors recommend.
        image: how a start image enters: not at all, as channels beside the noise, or as a clean first latent frame.
        needs_end: whether it was trained with a start and an end image only.
        negative: the official negative prompt.
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
    clip: int = 0
    dim: int = 5120
    shift_480p: float | None = None
    command_line: tuple[float, float] | None = None
    needs_end: bool = False
    negative: str = NEGATIVE_PROMPT

    @property
    def experts(self) -> int:
        return 1 if self.boundary is None else 2

    @property
    def size_multiple(self) -> int:
        """Pixels a side must be a multiple of: VAE stride times patch."""
        return VAES[self.vae].spatial_stride * PATCH[1]

    @property
    def signature(self) -> tuple[int, int, int]:
        """What of its network can be seen: channels in and out, and pictures heard as CLIP tokens."""
        return self.in_channels, VAES[self.vae].channels, self.clip

    def shift_for(self, size: tuple[int, int]) -> float:
        """The official shift for a width and height."""
        if self.shift_480p is not None and size[0] * size[1] <= _AREA_480P:
            return self.shift_480p
        return self.shift


_AREA_480P = 832 * 480
_SIZES_480P = ((832, 480), (480, 832))
_BOTH_SIZES = ((1280, 720), (720, 1280), *_SIZES_480P)
_UNSTEADY = "镜头晃动，" + NEGATIVE_PROMPT  # of models that start from a picture, in Wan2.1

VARIANTS: dict[str, Variant] = {
    row.task: row
    for row in (
        Variant(
            task="t2v-A14B", display_name="Wan2.2 T2V-A14B", vae="wan2.1", in_channels=16, boundary=0.875,
            shift=12.0, steps=40, guidance=PerExpert(low=3.0, high=4.0), frames=81, fps=16, size=(1280, 720),
            sizes=_BOTH_SIZES, image="none",
        ),
        Variant(
            task="i2v-A14B", display_name="Wan2.2 I2V-A14B", vae="wan2.1", in_channels=36, boundary=0.900,
            shift=5.0, steps=40, guidance=PerExpert(low=3.5, high=3.5), frames=81, fps=16, size=(1280, 720),
            sizes=_BOTH_SIZES, image="channels",
        ),
        Variant(
            task="ti2v-5B", display_name="Wan2.2 TI2V-5B", vae="wan2.2", in_channels=48, boundary=None,
            shift=5.0, steps=50, guidance=PerExpert(low=5.0, high=5.0), frames=121, fps=24, size=(1280, 704),
            sizes=((1280, 704), (704, 1280)), image="frame", dim=3072,
        ),
        Variant(
            task="t2v-1.3B", display_name="Wan2.1 T2V-1.3B", vae="wan2.1", in_channels=16, boundary=None,
            shift=8.0, steps=50, guidance=PerExpert(low=6.0, high=6.0), frames=81, fps=16, size=(832, 480),
            sizes=_SIZES_480P, image="none", dim=1536, command_line=(5.0, 5.0),
        ),
        Variant(
            task="t2v-14B", display_name="Wan2.1 T2V-14B", vae="wan2.1", in_channels=16, boundary=None,
            shift=5.0, steps=50, guidance=PerExpert(low=5.0, high=5.0), frames=81, fps=16, size=(1280, 720),
            sizes=_BOTH_SIZES, image="none",
        ),
        Variant(
            task="t2i-14B", display_name="Wan2.1 T2I-14B", vae="wan2.1", in_channels=16, boundary=None,
            shift=5.0, steps=50, guidance=PerExpert(low=5.0, high=5.0), frames=1, fps=16, size=(1280, 720),
            sizes=(*_BOTH_SIZES, (1024, 1024)), image="none",
        ),
        Variant(
            task="i2v-14B", display_name="Wan2.1 I2V-14B", vae="wan2.1", in_channels=36, boundary=None,
            shift=5.0, shift_480p=3.0, steps=40, guidance=PerExpert(low=5.0, high=5.0), frames=81, fps=16,
            size=(1280, 720), sizes=_BOTH_SIZES, image="channels", clip=1, negative=_UNSTEADY,
        ),
        Variant(
            task="flf2v-14B", display_name="Wan2.1 FLF2V-14B", vae="wan2.1", in_channels=36, boundary=None,
            shift=16.0, steps=50, guidance=PerExpert(low=5.0, high=5.0), frames=81, fps=16, size=(1280, 720),
            sizes=_BOTH_SIZES, image="channels", clip=2, needs_end=True, negative="镜头切换，" + _UNSTEADY,
        ),
    )
}  # fmt: skip

CLIP_CHECKPOINT = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TEXT_ENCODER_CHECKPOINT = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
HIGH_NOISE_FOLDER = "high_noise_model"
LOW_NOISE_FOLDER = "low_noise_model"
