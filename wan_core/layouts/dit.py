"""What DiT checkpoints look like: dialects of key names, and dimensions from shapes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import HEAD_DIM, PATCH, VARIANTS, Architecture
from ..errors import WanError
from ..files.checkpoint import Checkpoint, _some
from ..models.dit import features
from ..models.dit.features.clip_tokens import ClipTokensConfig
from .keys import IDENTITY, Renames, count_blocks, refuse_empty
from .prefixes import Marks, Place, own_names

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

DIALECTS: dict[str, Renames] = {
    "official": IDENTITY,
    "diffusers": Renames(
        [
            *_OUTSIDE_BLOCKS,
            *((f"blocks.{{a}}.{a}", f"blocks.{{a}}.{b}") for a, b in _IN_BLOCK),
            *(row for feature in features.FEATURES for row in feature.DIFFUSERS),
        ]
    ),
}

MARKS: Marks = {
    "official": (("blocks.0.self_attn.q.weight",), ("head.modulation", "patch_embedding.weight")),
    "diffusers": (("blocks.0.attn1.to_q.weight",), ("proj_out.weight", "patch_embedding.weight")),
}

# Modules of relatives that `architecture` does not know by their own layers.
_RELATIVES = {
    "vace_blocks": "VACE",
    "control_adapter": "Wan Fun Control-Camera",
    "casual_audio_encoder": "Wan2.2 S2V (speech)",
    "audio_injector": "Wan2.2 S2V (speech)",
    "audio_proj": "a speech or audio model",
    "audio_cross_attn": "MultiTalk or InfiniteTalk (speech)",
    "face_adapter": "Wan2.2 Animate",
    "face_encoder": "Wan2.2 Animate",
    "motion_encoder": "Wan2.2 Animate",
    "pose_patch_embedding": "Wan2.2 Animate",
    "patch_embedding_mask": "SCAIL-2",
    "patch_embedding_pose": "SCAIL",
    "patch_embedding_global": "Wan-Dancer",
    "patch_embedding_fuse": "SteadyDancer",
    "condition_embedding_spatial": "SteadyDancer",
    "cam_encoder": "ReCamMaster",
    "controlnet_patch_embedding": "Uni3C",
    "ref_conv": "Wan Fun Control with a reference image",
    "fps_embedding": "SkyReels V2",
}
# Words in the names of modules through which something enters a model that ours does not take.
_INPUT_WORDS = """
    audio speech voice face pose motion camera cam control controlnet vace img image ref reference subject identity
    adapter inject injector cond condition conditioning guidance fps trajectory track embed embedding embedder add
    added adaln
"""
_INPUTS = frozenset(_INPUT_WORDS.split())
_NO_INPUTS = frozenset(("rope", "rotary", "freqs", "norm_added_q"))  # tables of positions, and a norm that nobody uses


def names_in(place: Place, path: Path, outside: Collection[str] = ()) -> dict[str, str]:
    """Our key -> the file's, of one place in it; unknown keys stand for themselves."""
    return own_names(place, DIALECTS[place.dialect])


def refuse_relatives(keys: Collection[str], path: Path) -> None:
    """Refuse a model with layers of a relative, wherever they lie.

    Raises:
        WanError: there are such layers.
    """
    modules = {word for key in keys for word in key.split(".")[:-1]}
    for module, name in _RELATIVES.items():
        if module in modules:
            supported = ", ".join(row.display_name for row in VARIANTS.values())
            raise WanError(f"{path} is {name}, which this version does not run. Supported: {supported}.")


def refuse_inputs(wanted: Collection[str], names: Mapping[str, str], path: Path) -> None:
    """Refuse layers beside a whole model through which it takes what we would not give it.

    Raises:
        WanError: there are such layers.
    """
    known = {word for key in wanted for word in key.split(".")}
    found = sorted(theirs for own, theirs in names.items() if own not in wanted and _takes_input(own, known))
    if found:
        supported = ", ".join(row.display_name for row in VARIANTS.values())
        raise WanError(
            f"{path} is a relative of Wan2.2 with inputs of its own ({_some(found)}), which this version "
            f"does not run. Supported: {supported}."
        )


def _takes_input(key: str, known: Collection[str]) -> bool:
    modules = [set(module.split("_")) | {module} for module in key.split(".")[:-1] if module not in known]
    words = set().union(*modules)
    return not words.isdisjoint(_INPUTS) and words.isdisjoint(_NO_INPUTS)


def read_config(shapes: Mapping[str, tuple[int, ...]], heads: int | None = None) -> Architecture:
    """Every dimension from the shapes (by our keys); ``heads`` from a config.json where there is one.

    Raises:
        WanError: layers are missing, or the width is no multiple of a head's.
    """
    try:
        refuse_empty(shapes)
        dim, in_channels = shapes["patch_embedding.weight"][:2]
        config = Architecture(
            in_channels=in_channels,
            out_channels=shapes["head.head.weight"][0] // (PATCH[0] * PATCH[1] * PATCH[2]),
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            layers=count_blocks(key for key in shapes if key.endswith(".self_attn.q.weight")),
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


def config_of(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Architecture, tuple[str, ...]]:
    """Every dimension of a DiT, and what to say of a config.json that was not believed.

    Shapes do not tell the number of heads. A config.json in the checkpoint's folder does, if it is Wan's and of this
    model; a single file has no config of its own, whatever lies beside it.

    Raises:
        WanError: see ``read_config``.
    """
    file = checkpoint.path / "config.json"
    if not checkpoint.path.is_dir() or not file.is_file():
        return read_config(shapes), ()
    stated = _json_object(file)
    problem = _not_ours(stated, shapes)
    if problem is None:
        return read_config(shapes, stated.get("num_heads", stated.get("num_attention_heads"))), ()
    config = read_config(shapes)
    return config, (
        f"{file} {problem}: it is ignored, and the model has {config.heads} heads, one for each {HEAD_DIM} "
        "of its width.",
    )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, OSError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# Of a config.json: its names for a dimension -> what the shapes say.
_STATED = {
    "dim": "dim", "ffn_dim": "ffn_dim", "num_layers": "layers", "in_dim": "in_channels", "in_channels": "in_channels",
    "out_dim": "out_channels", "out_channels": "out_channels", "freq_dim": "freq_dim", "text_dim": "text_dim",
}  # fmt: skip
_MODEL_TYPES = ("t2v", "i2v", "ti2v")


def _not_ours(stated: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a config.json says nothing of this model, or None."""
    if not stated:
        return "is no JSON object"
    kind = stated.get("_class_name", "")
    if not (isinstance(kind, str) and "Wan" in kind or not kind and stated.get("model_type") in _MODEL_TYPES):
        return "is not a Wan model's"
    heads = stated.get("num_heads", stated.get("num_attention_heads"))
    if type(heads) is not int or heads <= 0:
        return "states no number of heads"
    actual = vars(read_config(shapes, 1))
    if actual["dim"] % heads:
        return f"states {heads} heads, which do not divide a width of {actual['dim']}"
    size = stated.get("attention_head_dim")
    if size is not None and size != actual["dim"] // heads:
        return f"states {heads} heads of {size}, but the model is {actual['dim']} wide"
    for one, name in _STATED.items():
        if stated.get(one) is not None and stated[one] != actual[name]:
            return f"states {one} {str(stated[one])[:20]}, but the model's is {actual[name]}"
    return None


def packs(key: str) -> bool:
    """Whether a weight, by our key, may be in a quantised format in memory.

    The matrices of the blocks are nearly all of a model. What is outside them and every norm and modulation are small,
    or work on the timestep, and stay in full precision.
    """
    return key.startswith("blocks.") and key.endswith(".weight") and "norm" not in key


def official_config(config: Architecture, task: str) -> dict[str, Any]:
    """The config.json that stands beside official shards."""
    kind = task.split("-")[0].replace("t2i", "t2v")
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "model_type": kind,
        "dim": config.dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "eps": config.eps,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "text_len": 512,
    }


def diffusers_config(config: Architecture) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel."""
    clip = config.feature(ClipTokensConfig)
    return {
        "_class_name": "WanTransformer3DModel",
        "_diffusers_version": "0.35.0",
        "patch_size": list(PATCH),
        "num_attention_heads": config.heads,
        "attention_head_dim": config.dim // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.layers,
        "eps": config.eps,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": clip.width if clip else None,
        "added_kv_proj_dim": config.dim if clip else None,
        "rope_max_seq_len": 1024,
        "pos_embed_seq_len": (clip.positions or None) if clip else None,
    }
