"""Random checkpoints of small dimensions in every real layout, for tests and for trying a graph without the weights.

The files carry the real names, keys and configs; only the dimensions are small. What they generate is noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import (
    CLIP_CHECKPOINT,
    HIGH_NOISE_FOLDER,
    LOW_NOISE_FOLDER,
    NEGATIVE_PROMPT,
    TEXT_ENCODER_CHECKPOINT,
    TOKENIZER_FOLDER,
    TRAIN_STEPS,
    VAES,
    VARIANTS,
    Architecture,
    TextConfig,
    VAEConfig,
    Variant,
)
from ..errors import WanError
from ..files.write import save_tensors
from ..layouts import clip as clip_keys
from ..layouts import comfyui
from ..layouts import dit as dit_keys
from ..layouts import text as text_keys
from ..layouts import vae as vae_keys
from ..layouts.keys import IDENTITY, Renames
from ..loading.vae import VAE_CLASSES
from ..models.clip.vit import MEAN, STD, ClipConfig, ClipVision
from ..models.dit.dit import WanDiT
from ..models.dit.features.clip_tokens import PICTURE_TOKENS, ClipTokensConfig
from ..models.text.tokenizer import train_tiny_tokenizer, write_tokenizer_folder
from ..models.text.umt5 import Umt5Encoder

MARK = "wan_core_tiny"  # in the header of every safetensors file made here
_VOCABULARY_TEXTS = (
    NEGATIVE_PROMPT,
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
    "A white cat wearing sunglasses sits on a surfboard, summer beach vacation style, close-up shot, warm colors.",
    "白天，晴天光，边缘光，暖色调，低饱和度，极端全景，平衡构图，两名穿着宇航服的人站在一片广阔的水域中。",
)


@dataclass(frozen=True)
class TinySizes:
    """Dimensions of the small models.

    Heads are 128 wide and text 4096, as in the real ones. The text encoder is as deep as the real one, but very thin:
    ComfyUI knows a umT5-XXL by its last layer and by its width.
    """

    dim: int = 256
    ffn_dim: int = 512
    layers: int = 2
    text_dim: int = 4096
    text_layers: int = 24
    text_attention: int = 8
    text_heads: int = 1
    text_ffn: int = 8
    vae_dim: int = 16
    clip_mlp: int = 80
    clip_layers: int = 3


@dataclass(frozen=True, eq=False)
class TinyModels:
    """State dicts by our keys, and what they were made from."""

    variant: Variant
    dit: Architecture
    vae: VAEConfig
    text: TextConfig
    experts: tuple[dict[str, torch.Tensor], ...]  # high, low; or the dense model
    vae_weights: dict[str, torch.Tensor]
    text_weights: dict[str, torch.Tensor]
    spiece: bytes
    clip: dict[str, torch.Tensor] | None = None  # by transformers' keys
    clip_config: ClipConfig | None = None


def make_tiny(task: str, *, seed: int = 0, sizes: TinySizes | None = None) -> TinyModels:
    """Random weights for a variant; the same seed gives the same weights."""
    variant, sizes = VARIANTS[task], sizes or TinySizes()
    spec = VAES[variant.vae]
    spiece = train_tiny_tokenizer(_VOCABULARY_TEXTS)
    clip = (
        ClipConfig(
            _CLIP_WIDTH,
            sizes.clip_mlp,
            _CLIP_WIDTH // 80,
            sizes.clip_layers,
            patch=14,
            positions=PICTURE_TOKENS,
            fused=False,
        )
        if variant.clip
        else None
    )
    pictures = () if clip is None else (ClipTokensConfig(positions=2 * PICTURE_TOKENS if variant.clip == 2 else 0),)
    dit = Architecture(
        variant.in_channels,
        spec.channels,
        sizes.dim,
        sizes.ffn_dim,
        sizes.layers,
        sizes.text_dim,
        freq_dim=256,
        heads=sizes.dim // 128,
        features=pictures,
    )
    vae = VAEConfig(spec.kind, spec.channels, encoder_dim=sizes.vae_dim, decoder_dim=sizes.vae_dim)
    text = TextConfig(
        _pieces(spiece), sizes.text_dim, sizes.text_attention, sizes.text_ffn, sizes.text_heads, sizes.text_layers
    )
    generator = torch.Generator().manual_seed(seed)
    return TinyModels(
        variant,
        dit,
        vae,
        text,
        experts=tuple(_random_weights(WanDiT, dit, generator) for _ in range(variant.experts)),
        vae_weights=_random_weights(VAE_CLASSES[spec.kind], vae, generator),
        text_weights=_random_weights(Umt5Encoder, text, generator),
        spiece=spiece,
        clip=_random_clip(clip, generator) if clip else None,
        clip_config=clip,
    )


def write_tiny(
    folder: str | Path, task: str, *, layout: str = "official", seed: int = 0, sizes: TinySizes | None = None
) -> list[Path]:
    """Write a small checkpoint and return its files.

    Args:
        layout: "official" (sharded, .pth, tokenizer folder), "comfyui" (one safetensors file a part, below
            diffusion_models/, vae/ and text_encoders/), or "diffusers".

    Raises:
        WanError: an unknown task or layout.
    """
    if task not in VARIANTS:
        raise WanError(f"Unknown task {task!r}: expected one of {', '.join(VARIANTS)}.")
    if layout not in LAYOUTS:
        raise WanError(f"Unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}.")
    folder = Path(folder)
    LAYOUTS[layout](make_tiny(task, seed=seed, sizes=sizes), folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _official(models: TinyModels, folder: Path) -> None:
    homes = [folder] if models.variant.experts == 1 else [folder / HIGH_NOISE_FOLDER, folder / LOW_NOISE_FOLDER]
    for home, weights in zip(homes, models.experts, strict=True):
        _save_shards(weights, home)
        _save_json(home / "config.json", dit_keys.official_config(models.dit, models.variant.task))
    torch.save(models.vae_weights, folder / VAES[models.variant.vae].checkpoint)
    torch.save(models.text_weights, folder / TEXT_ENCODER_CHECKPOINT)
    write_tokenizer_folder(folder / TOKENIZER_FOLDER, models.spiece)
    if models.clip:
        torch.save(clip_keys.official_weights(models.clip), folder / CLIP_CHECKPOINT)


def _comfyui(models: TinyModels, folder: Path) -> None:
    names = comfyui.NAMES[models.variant.task]
    for name, weights in zip(names.models, models.experts, strict=True):
        _save(weights, folder / "diffusion_models" / name)
    for name, weights in zip(names.loras, models.experts, strict=bool(names.loras)):
        _save(_random_lora(weights), folder / "loras" / name)
    _save(models.vae_weights, folder / "vae" / comfyui.VAES[models.variant.vae])
    text = _renamed(models.text_weights, text_keys.DIALECTS["huggingface"])
    if models.clip:
        _save(models.clip, folder / "clip_vision" / comfyui.CLIP_VISION)
    text["spiece_model"] = torch.frombuffer(bytearray(models.spiece), dtype=torch.uint8)
    _save(text, folder / "text_encoders" / comfyui.TEXT_ENCODERS[-1])


def _diffusers(models: TinyModels, folder: Path) -> None:
    for home, weights in zip(("transformer", "transformer_2"), models.experts, strict=False):
        _save(_renamed(weights, dit_keys.DIALECTS["diffusers"]), folder / home / "diffusion_pytorch_model.safetensors")
        _save_json(folder / home / "config.json", dit_keys.diffusers_config(models.dit))
    vae_dialect = vae_keys.DIALECTS[vae_keys.diffusers_dialect(models.vae.kind)]
    _save(_renamed(models.vae_weights, vae_dialect), folder / "vae" / "diffusion_pytorch_model.safetensors")
    _save_json(folder / "vae" / "config.json", vae_keys.diffusers_config(models.vae))
    text = _renamed(models.text_weights, text_keys.DIALECTS["huggingface"])
    _save(text, folder / "text_encoder" / "model.safetensors")
    _save_json(folder / "text_encoder" / "config.json", text_keys.huggingface_config(models.text))
    write_tokenizer_folder(folder / "tokenizer", models.spiece)
    if models.clip and models.clip_config:
        _save(models.clip, folder / "image_encoder" / "model.safetensors")
        _save_json(folder / "image_encoder" / "config.json", clip_keys.huggingface_config(models.clip_config))
        _save_json(folder / "image_processor" / "preprocessor_config.json", _image_processor(models.clip_config))
    _save_json(folder / "scheduler" / "scheduler_config.json", _scheduler_config(models.variant))
    _save_json(folder / "model_index.json", _model_index(models.variant))


_CLIP_WIDTH = ClipTokensConfig.width  # the official image embedding knows no other
LAYOUTS = {"official": _official, "comfyui": _comfyui, "diffusers": _diffusers}


def _random_weights(
    kind: Callable[[Any], nn.Module], config: object, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {key: slot.shape for key, slot in kind(config).state_dict().items()}
    return {key: _random_weight(key, shape, generator) for key, shape in shapes.items()}


def _random_weight(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near 1, with every part (gates, norms, biases) doing something."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in key or key.endswith("gamma"):
        return noise * 0.1 + (0 if key.endswith("bias") else 1)
    if key.endswith(("bias", "modulation")):
        return noise * 0.1
    if "embedding" in key and "token" in key:
        return noise
    if "decoder.head" in key or key.endswith("attn.q.weight") and not key.endswith("self_attn.q.weight"):
        noise *= 0.25  # pixels stay within -1..1; umT5 does not scale its attention scores
    return noise / math.sqrt(max(math.prod(shape[1:]), 1))


def _random_clip(config: ClipConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A CLIP vision model with all that a real file has: also the parts that are not used."""
    own = _random_weights(ClipVision, replace(config, layers=config.layers + 1), generator)
    weights = {clip_keys.DIALECTS["huggingface"].renamed(key): tensor for key, tensor in own.items()}
    for end in ("weight", "bias"):
        weights[f"vision_model.post_layernorm.{end}"] = torch.full((config.dim,), float(end == "weight"))
    return weights | {"visual_projection.weight": torch.zeros(8, config.dim)}


def _random_lora(weights: Mapping[str, torch.Tensor], rank: int = 4) -> dict[str, torch.Tensor]:
    """Small updates of the blocks' matrices, named as the 4-step LoRAs are."""
    generator, made = torch.Generator().manual_seed(0), {}
    for key in filter(dit_keys.packs, weights):
        rows, columns = weights[key].shape
        path = "diffusion_model." + key.removesuffix(".weight")
        made[f"{path}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        made[f"{path}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * 0.02
        made[f"{path}.alpha"] = torch.tensor(float(rank))
    return made


def _save(weights: Mapping[str, torch.Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, file, {"format": "pt", MARK: "1"})


def _save_shards(weights: Mapping[str, torch.Tensor], folder: Path, shards: int = 2) -> None:
    keys = list(weights)
    size = math.ceil(len(keys) / shards)
    weight_map = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number * size : (number + 1) * size]
        _save({key: weights[key] for key in part}, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _save_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def _save_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _renamed(weights: Mapping[str, torch.Tensor], dialect: Renames = IDENTITY) -> dict[str, torch.Tensor]:
    return {dialect.renamed(key): tensor for key, tensor in weights.items()}


def _pieces(spiece: bytes) -> int:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=spiece).get_piece_size()


def _image_processor(config: ClipConfig) -> dict:
    side = {"height": config.size, "width": config.size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": {"shortest_edge": config.size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }


def _scheduler_config(variant: Variant) -> dict:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.35.0",
        "solver_order": 2,
        "num_train_timesteps": TRAIN_STEPS,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": variant.shift,
    }


def _model_index(variant: Variant) -> dict:
    from_image = variant.image == "channels"
    encoder: dict[str, list[str | None]] = {}
    if from_image:
        encoder = {"image_encoder": [None, None], "image_processor": [None, None]}
    if variant.clip:
        encoder = {
            "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
            "image_processor": ["transformers", "CLIPImageProcessor"],
        }
    kind = "WanImageToVideoPipeline" if from_image else "WanPipeline"
    return encoder | {
        "_class_name": kind,
        "_diffusers_version": "0.35.0",
        "boundary_ratio": variant.boundary,
        "expand_timesteps": variant.image == "frame",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if variant.experts == 2 else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    }
