"""Where the parts of a whole model lie in a folder: the official layout, ComfyUI's and diffusers'."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..config import (
    CLIP_CHECKPOINT,
    CLIP_COMFY_NAME,
    HIGH_NOISE_FOLDER,
    LOW_NOISE_FOLDER,
    TEXT_ENCODER_CHECKPOINT,
    TOKENIZER_FOLDER,
    VAES,
    Variant,
)
from ..errors import WanError

COMFY_TEXT_ENCODERS = (
    "umt5_xxl_fp16.safetensors",
    "umt5_xxl_bf16.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors",
)


@dataclass(frozen=True)
class Parts:
    """Paths of one model's parts.

    ``low`` is None for a dense model, ``tokenizer`` where the text encoder's file holds it, ``clip`` of a model that
    hears no CLIP tokens.
    """

    high: Path
    low: Path | None
    vae: Path
    text_encoder: Path
    tokenizer: Path | None
    clip: Path | None = None


WHOLE = ("high", "low", "vae", "text_encoder", "clip")


def find_parts(folder: str | Path, variant: Variant, wanted: Collection[str] = WHOLE) -> Parts:
    """The parts of a variant's model, of which those that are wanted must be there.

    Raises:
        WanError: there is no such folder, or a part is missing; says which names were looked for.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WanError(f"No such folder: {folder}. --ckpt_dir is the folder of a downloaded checkpoint.")
    missing = []
    for layout in (_official(folder, variant), _comfyui(folder, variant), _diffusers(folder, variant)):
        paths = [getattr(layout, part) for part in wanted]
        absent = [path for path in paths if path and not path.exists()]
        if not absent:
            return layout
        missing.append(absent)
    closest = min(missing, key=len)
    raise WanError(f"{folder} lacks {', '.join(str(path.relative_to(folder)) for path in closest)} of "
                   f"{variant.display_name}. Found {_listing(folder)}. Download the rest, or choose another --task.")


def _official(folder: Path, variant: Variant) -> Parts:
    dense = variant.experts == 1
    index, single = (folder / f"diffusion_pytorch_model.safetensors{end}" for end in (".index.json", ""))
    return Parts(
        high=(single if single.exists() else index) if dense else folder / HIGH_NOISE_FOLDER,
        low=None if dense else folder / LOW_NOISE_FOLDER,
        vae=folder / VAES[variant.vae].checkpoint,
        text_encoder=folder / TEXT_ENCODER_CHECKPOINT,
        tokenizer=folder / TOKENIZER_FOLDER,
        clip=folder / CLIP_CHECKPOINT if variant.clip else None,
    )


def _comfyui(folder: Path, variant: Variant) -> Parts:
    models = [folder / "diffusion_models" / name for name in variant.comfy_names]
    encoders = [folder / "text_encoders" / name for name in COMFY_TEXT_ENCODERS]
    return Parts(
        high=models[0],
        low=models[1] if len(models) > 1 else None,
        vae=folder / "vae" / VAES[variant.vae].comfy_name,
        text_encoder=next((path for path in encoders if path.exists()), encoders[0]),
        tokenizer=None,
        clip=folder / "clip_vision" / CLIP_COMFY_NAME if variant.clip else None,
    )


def _diffusers(folder: Path, variant: Variant) -> Parts:
    return Parts(
        high=folder / "transformer",
        low=folder / "transformer_2" if variant.experts == 2 else None,
        vae=folder / "vae",
        text_encoder=folder / "text_encoder",
        tokenizer=folder / "tokenizer",
        clip=folder / "image_encoder" if variant.clip else None,
    )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
