"""Where the parts of a whole model lie in a folder: the official layout, ComfyUI's and diffusers'."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import (
    CLIP_CHECKPOINT,
    HIGH_NOISE_FOLDER,
    LOW_NOISE_FOLDER,
    TEXT_ENCODER_CHECKPOINT,
    TOKENIZER_FOLDER,
    VAES,
    Variant,
)
from ..errors import Hint, WanError
from ..files.checkpoint import open_checkpoint
from . import comfyui
from .detect import find, parts_of
from .text import spiece_key

_ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


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
    if folder.is_file():
        return _all_in_one([folder], folder.parent, variant, wanted) or _refuse_file(folder, variant)
    if not folder.is_dir():
        raise WanError(f"No such folder: {folder}.", Hint.FOLDER)
    missing = []
    for layout in (_official(folder, variant), _comfyui(folder, variant), _diffusers(folder, variant)):
        paths = [getattr(layout, part) for part in wanted]
        absent = [path for path in paths if path and not path.exists()]
        if not absent:
            return layout
        missing.append(absent)
    if found := _all_in_one(_checkpoint_files(folder), folder, variant, wanted):
        return found
    closest = min(missing, key=len)
    raise WanError(
        f"{folder} lacks {', '.join(str(path.relative_to(folder)) for path in closest)} of "
        f"{variant.display_name}. Found {_listing(folder)}.",
        Hint.OTHER_TASK,
    )


def parts_from(folder: str | Path | None, variant: Variant, own: Mapping[str, Path]) -> Parts:
    """The parts of a variant's model: files of their own, by the names of ``Parts``, and the rest from a folder.

    Raises:
        WanError: a part is neither given nor in the folder, or there is no folder to look in.
    """
    experts = ("high", "low") if variant.experts == 2 else ("high",)
    needed = (*experts, "vae", "text_encoder", *(("clip",) if variant.clip else ()))
    wanted = [part for part in needed if part not in own]
    found: dict[str, Any] = {"low": None, "tokenizer": None, "clip": None}
    if wanted:
        if folder is None:
            raise WanError("Where are the weights?", Hint.CLIP_WEIGHTS if variant.clip else Hint.WEIGHTS)
        found = dict(vars(find_parts(folder, variant, wanted)))
        if "text_encoder" in own:
            found["tokenizer"] = None  # the folder's is its own text encoder's
    return Parts(**found | dict(own))


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
    models = [folder / "diffusion_models" / name for name in comfyui.NAMES[variant.task].models]
    encoders = [folder / "text_encoders" / name for name in comfyui.TEXT_ENCODERS]
    return Parts(
        high=models[0],
        low=models[1] if len(models) > 1 else None,
        vae=folder / "vae" / comfyui.VAES[variant.vae],
        text_encoder=next((path for path in encoders if path.exists()), encoders[0]),
        tokenizer=None,
        clip=folder / "clip_vision" / comfyui.CLIP_VISION if variant.clip else None,
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


def _checkpoint_files(folder: Path) -> list[Path]:
    """Files that may hold a whole model: ComfyUI's ``checkpoints``, or those in the folder itself."""
    places = [place for place in (folder / "checkpoints", folder) if place.is_dir()]
    return [
        file
        for place in places
        for file in sorted(place.iterdir())
        if file.is_file() and file.suffix.lower() in _ENDINGS
    ]


def _all_in_one(files: Iterable[Path], folder: Path, variant: Variant, wanted: Collection[str]) -> Parts | None:
    """A variant's model in files that hold its text encoder and VAE too; what they lack comes from the folder.

    Raises:
        WanError: several files do, and nothing says which is meant.
    """
    held = {file: parts for file in files if (parts := _parts_in(file, variant))}
    models = [file for file, parts in held.items() if "dit" in parts and len(parts) > 1]
    levels = ("high", "low") if variant.experts == 2 else ("",)
    found = [_one([file for file in models if level in file.name.lower()], variant, level) for level in levels]
    chosen = [file for file in found if file is not None]
    if len(chosen) < len(levels):
        return None
    vae, text = (next((file for file in chosen if part in held[file]), None) for part in ("vae", "text"))
    beside = [layout(folder, variant) for layout in (_official, _comfyui, _diffusers)]
    vae = vae or next((parts.vae for parts in beside if parts.vae.exists()), beside[1].vae)
    tokenizer = next((parts.tokenizer for parts in beside if parts.tokenizer and parts.tokenizer.exists()), None)
    if text is None:
        text = next((parts.text_encoder for parts in beside if parts.text_encoder.exists()), beside[1].text_encoder)
        tokenizer = None  # the one beside it is found by itself
    elif spiece_key(open_checkpoint(text)):
        tokenizer = None
    whole = Parts(chosen[0], chosen[1] if len(chosen) > 1 else None, vae, text, tokenizer)
    return whole if all((path := getattr(whole, part)) is None or path.exists() for part in wanted) else None


def _parts_in(file: Path, variant: Variant) -> tuple[str, ...]:
    """The parts that a file holds, where its model is this variant's; files that cannot be read hold none."""
    try:
        checkpoint = open_checkpoint(file)
        parts = parts_of(checkpoint)
        key = find("dit", checkpoint).names["patch_embedding.weight"] if "dit" in parts else None
    except (WanError, OSError, KeyError):
        return ()
    if key and checkpoint.tensors[key].shape[1] != variant.in_channels:
        return ()
    return parts


def _one(files: list[Path], variant: Variant, level: str) -> Path | None:
    if len(files) > 1:
        expert = f", {level}-noise expert," if level else ""
        raise WanError(
            f"{len(files)} files hold a whole {variant.display_name}{expert} with its VAE or text encoder: "
            f"{', '.join(map(str, files))}. Leave one of them in the folder."
        )
    return files[0] if files else None


def _refuse_file(file: Path, variant: Variant) -> Parts:
    raise WanError(
        f"{file} does not hold all of {variant.display_name}. Expected the folder of a downloaded checkpoint"
        ", or one file with the model, its text encoder and its VAE."
    )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "nothing"
