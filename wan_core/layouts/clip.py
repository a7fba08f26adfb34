"""CLIP vision checkpoints: dialects, recognition and dimensions.

Of the official file only the half that looks at pictures is of use, and of that not its last block, norm and head.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WanError
from ..files.checkpoint import Checkpoint
from ..models.clip.vit import ClipConfig
from .keys import Renames
from .prefixes import Marks, Place

_HEAD_DIM = 80  # of ViT-H/14: 16 heads at a width of 1280

_ROWS = {
    "official": [
        ("visual.cls_embedding", "cls_embedding"),
        ("visual.pos_embedding", "pos_embedding"),
        ("visual.patch_embedding", "patch_embedding"),
        ("visual.pre_norm", "pre_norm"),
        ("visual.transformer.{a}", "transformer.{a}"),
    ],
    "huggingface": [
        ("vision_model.embeddings.class_embedding", "cls_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "pos_embedding"),
        ("vision_model.embeddings.patch_embedding", "patch_embedding"),
        ("vision_model.pre_layrnorm", "pre_norm"),
        ("vision_model.encoder.layers.{a}.layer_norm1", "transformer.{a}.norm1"),
        ("vision_model.encoder.layers.{a}.self_attn.q_proj", "transformer.{a}.attn.q"),
        ("vision_model.encoder.layers.{a}.self_attn.k_proj", "transformer.{a}.attn.k"),
        ("vision_model.encoder.layers.{a}.self_attn.v_proj", "transformer.{a}.attn.v"),
        ("vision_model.encoder.layers.{a}.self_attn.out_proj", "transformer.{a}.attn.proj"),
        ("vision_model.encoder.layers.{a}.layer_norm2", "transformer.{a}.norm2"),
        ("vision_model.encoder.layers.{a}.mlp.fc1", "transformer.{a}.mlp.0"),
        ("vision_model.encoder.layers.{a}.mlp.fc2", "transformer.{a}.mlp.2"),
    ],
}
DIALECTS = {name: Renames(rows) for name, rows in _ROWS.items()}
MARKS: Marks = {
    "official": (("visual.transformer.0.attn.to_qkv.weight",), ("visual.patch_embedding.weight",)),
    "huggingface": (
        ("vision_model.encoder.layers.0.self_attn.q_proj.weight",),
        ("vision_model.embeddings.patch_embedding.weight",),
    ),
}


def names_in(place: Place, path: Path | None = None, outside: Collection[str] = ()) -> dict[str, str]:
    """Our key -> the file's, of the half that looks at pictures."""
    dialect = DIALECTS[place.dialect]
    return {own: theirs for key, theirs in place.keys.items() if (own := dialect.to_own(key)) is not None}


def used(names: Mapping[str, str]) -> dict[str, str]:
    """Of a file's tensors those that are computed with: the last block is not."""
    last = _layers(names) - 1
    return {own: key for own, key in names.items() if not own.startswith(f"transformer.{last}.")}


def read_config(checkpoint: Checkpoint, names: Mapping[str, str], dialect: str) -> ClipConfig:
    """Every dimension from the shapes; the heads from a config.json in the same folder where diffusers wrote one.

    Raises:
        WanError: a tensor is missing or misshapen, or another CLIP than Wan's (patches with a bias, no class token).
    """
    shapes = {own: checkpoint.tensors[theirs].shape for own, theirs in names.items()}
    try:
        dim, channels, patch, _ = shapes["patch_embedding.weight"]
        positions, width = shapes["pos_embedding"][-2:]
        mlp = shapes["transformer.0.mlp.0.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise WanError(
            f"{checkpoint.path} is no whole CLIP vision model: {error} is missing or misshapen. Is the "
            "download complete?"
        ) from error
    heads = _stated_heads(checkpoint) or dim // _HEAD_DIM or 1
    side = round((positions - 1) ** 0.5)
    if channels != 3 or width != dim or side * side + 1 != positions or dim % heads:
        raise WanError(
            f"{checkpoint.path} is another CLIP than Wan's: {positions} positions, {dim} wide, {heads} "
            "heads. Use ViT-H/14 (clip_vision_h.safetensors)."
        )
    layers = _layers(shapes)
    if layers < 2:
        raise WanError(f"{checkpoint.path} has {layers} block; the last one is not used, so at least 2 are needed.")
    return ClipConfig(dim, mlp, heads, layers, patch, positions, fused=dialect == "official")


def _layers(own: Collection[str | None]) -> int:
    """How many blocks there are, without gaps.

    A file with a gap has fewer than its highest number says, and then misses tensors by name.
    """
    numbers = {int(key.split(".")[1]) for key in own if key and key.startswith("transformer.")}
    return next(i for i in range(len(numbers) + 1) if i not in numbers)


def _stated_heads(checkpoint: Checkpoint) -> int | None:
    file = checkpoint.path / "config.json" if checkpoint.path.is_dir() else None
    if file is None or not file.is_file():
        return None
    try:
        config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        heads = config.get("vision_config", config).get("num_attention_heads")
    except (ValueError, AttributeError, OSError):
        return None
    return heads if isinstance(heads, int) and heads > 0 else None


def official_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' weights under the official names, queries, keys and values in one matrix."""
    to_own = DIALECTS["huggingface"].to_own
    own = {name: tensor for key, tensor in weights.items() if (name := to_own(key)) is not None}
    parts: dict[str, list[Tensor]] = {}
    made: dict[str, Tensor] = {}
    for key in sorted(own):  # k, q, v of a layer
        if match := re.fullmatch(r"(.*\.attn\.)[qkv](\..*)", key):
            parts.setdefault(f"{match[1]}to_qkv{match[2]}", []).append(own[key])
        else:
            made[key] = own[key]
    made |= {key: torch.cat([part[1], part[0], part[2]]) for key, part in parts.items()}
    made["cls_embedding"], made["pos_embedding"] = made["cls_embedding"].view(1, 1, -1), made["pos_embedding"][None]
    to_theirs = DIALECTS["official"].to_theirs
    return {name: tensor for key, tensor in made.items() if (name := to_theirs(key)) is not None}


def huggingface_config(config: ClipConfig) -> dict[str, Any]:
    """The ``config.json`` of transformers' CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "image_size": config.size,
        "patch_size": config.patch,
        "hidden_act": "gelu",
        "layer_norm_eps": config.eps,
        "projection_dim": 1024,
    }
