"""What DiT checkpoints look like: dialects of key names, and dimensions from shapes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from ..config import HEAD_DIM, PATCH, VARIANTS, DiTConfig
from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some
from ..models.dit import features
from ..models.dit.features.clip_tokens import ClipTokensConfig
from .keys import IDENTITY, Renames

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")

_OUTSIDE_BLOCKS = [
    ("patch_embedding", "patch_embedding"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("scale_shift_table", "head.modulation"),
    ("proj_out", "head.head"),
]
_IN_BLOCK = [
    ("attn1.to_q", "self_attn.q"),
    ("attn1.to_k", "self_attn.k"),
    ("attn1.to_v", "self_attn.v"),
    ("attn1.to_out.0", "self_attn.o"),
    ("attn1.norm_q", "self_attn.norm_q"),
    ("attn1.norm_k", "self_attn.norm_k"),
    ("attn2.to_q", "cross_attn.q"),
    ("attn2.to_k", "cross_attn.k"),
    ("attn2.to_v", "cross_attn.v"),
    ("attn2.to_out.0", "cross_attn.o"),
    ("attn2.norm_q", "cross_attn.norm_q"),
    ("attn2.norm_k", "cross_attn.norm_k"),
    ("norm2", "norm3"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("scale_shift_table", "modulation"),
]

# "prefixed" is "official" below one of _PREFIXES, as trainers save it.
DIALECTS: dict[str, Renames] = {
    "official": IDENTITY,
    "diffusers": Renames(
        [*_OUTSIDE_BLOCKS, *((f"blocks.{{a}}.{a}", f"blocks.{{a}}.{b}") for a, b in _IN_BLOCK),
         *(row for feature in features.FEATURES for row in feature.DIFFUSERS)]
    ),
}

# Layers of relatives that this version does not run, and whose they are.
_RELATIVES = {
    "vace_blocks.": "VACE",
    "control_adapter.": "Wan Fun Camera",
    "ref_conv.": "Wan Fun Control with a reference image",
    "audio_proj.": "a speech or audio model",
    "casual_audio_encoder.": "Wan2.2 S2V (speech)",
    "face_adapter.": "Wan2.2 Animate",
    "motion_encoder.": "Wan2.2 Animate",
}


def recognise(keys: Collection[str]) -> str | None:
    """The dialect of these keys, or None when they are no Wan DiT."""
    if "blocks.0.attn1.to_q.weight" in keys and "proj_out.weight" in keys:
        return "diffusers"
    if "blocks.0.self_attn.q.weight" in keys and "head.modulation" in keys:
        return "official"
    if any(f"{prefix}blocks.0.self_attn.q.weight" in keys for prefix in _PREFIXES):
        return "prefixed"
    return None


def names(checkpoint: Checkpoint, dialect: str) -> dict[str, str]:
    """Our key -> the checkpoint's key, for every tensor of the file.

    Raises:
        WanError: a relative of Wan2.2 whose extra layers are not supported, or keys that nobody knows.
    """
    strip = next((p for p in _PREFIXES if dialect == "prefixed" and f"{p}head.modulation" in checkpoint), "")
    theirs = [key for key in checkpoint.tensors if key.startswith(strip)]
    renames = DIALECTS.get(dialect, IDENTITY)
    _refuse_relatives([key[len(strip) :] for key in theirs], checkpoint.path)
    found = {renames.to_own(key[len(strip) :]): key for key in theirs}
    if None in found:
        unknown = [key for key in theirs if renames.to_own(key[len(strip) :]) is None]
        raise WanError(f"{checkpoint.path} has keys that a {dialect} Wan DiT does not have: {_some(unknown)}.")
    return found


def _refuse_relatives(keys: list[str], path: Path) -> None:
    for prefix, name in _RELATIVES.items():
        if any(key.startswith(prefix) for key in keys):
            supported = ", ".join(row.display_name for row in VARIANTS.values())
            raise WanError(f"{path} is {name}, which this version does not run. Supported: {supported}.")


def read_config(shapes: Mapping[str, tuple[int, ...]], heads: int | None = None) -> DiTConfig:
    """Every dimension from the shapes (by our keys); ``heads`` from a config.json where there is one.

    Raises:
        WanError: layers are missing, or the channels belong to no variant.
    """
    try:
        dim, in_channels = shapes["patch_embedding.weight"][:2]
        config = DiTConfig(
            in_channels=in_channels,
            out_channels=shapes["head.head.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2]),
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
            text_dim=shapes["text_embedding.0.weight"][1],
            freq_dim=shapes["time_embedding.0.weight"][1],
            heads=heads or dim // HEAD_DIM,
            features=features.detect(shapes),
        )
    except (KeyError, IndexError, ValueError) as error:
        raise WanError(f"Not a whole Wan DiT: {error} is missing or misshapen. Is the download complete?") from error
    if not config.heads or dim % config.heads:
        raise WanError(f"A Wan DiT's width is a multiple of {HEAD_DIM} (the size of a head); this one is {dim} wide.")
    return config


def heads_beside(path: Path) -> int | None:
    """The number of heads that a config.json in a checkpoint folder states, if there is one."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None
    heads = config.get("num_heads", config.get("num_attention_heads")) if isinstance(config, dict) else None
    return heads if isinstance(heads, int) else None


def packs(key: str) -> bool:
    """Whether a weight, by our key, may be in a quantised format in memory.

    The matrices of the blocks are nearly all of a model. What is outside them and every norm and modulation are small,
    or work on the timestep, and stay in full precision.
    """
    return key.startswith("blocks.") and key.endswith(".weight") and "norm" not in key


def official_config(config: DiTConfig, task: str) -> dict:
    """The config.json that stands beside official shards."""
    kind = task.split("-")[0].replace("t2i", "t2v")
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "model_type": kind,
        "dim": config.dim, "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "eps": config.eps,
        "in_dim": config.in_channels, "out_dim": config.out_channels, "num_heads": config.heads,
        "num_layers": config.layers, "text_len": 512,
    }  # fmt: skip


def diffusers_config(config: DiTConfig) -> dict:
    """The config.json of diffusers' WanTransformer3DModel."""
    clip = config.feature(ClipTokensConfig)
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0", "patch_size": list(PATCH),
        "num_attention_heads": config.heads, "attention_head_dim": config.dim // config.heads,
        "in_channels": config.in_channels, "out_channels": config.out_channels, "text_dim": config.text_dim,
        "freq_dim": config.freq_dim, "ffn_dim": config.ffn_dim, "num_layers": config.layers, "eps": config.eps,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "image_dim": clip.width if clip else None,
        "added_kv_proj_dim": config.dim if clip else None,
        "rope_max_seq_len": 1024, "pos_embed_seq_len": (clip.positions or None) if clip else None,
    }  # fmt: skip
