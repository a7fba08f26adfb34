"""Text encoder checkpoints: dialects, recognition and dimensions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import TextConfig
from ..errors import WanError
from ..files.checkpoint import Checkpoint
from .keys import IDENTITY, Renames, count_blocks, refuse_empty
from .prefixes import Marks, Place, own_names

TABLE = "token_embedding.weight"
SPIECE_MODEL = "spiece_model"  # the SentencePiece model, as bytes, inside ComfyUI's files

DIALECTS: dict[str, Renames] = {
    "official": IDENTITY,
    "huggingface": Renames(
        [
            ("shared", "token_embedding"),
            ("encoder.embed_tokens", "token_embedding"),  # the same table under its second name
            ("encoder.final_layer_norm", "norm"),
            ("encoder.block.{a}.layer.0.layer_norm", "blocks.{a}.norm1"),
            ("encoder.block.{a}.layer.0.SelfAttention.q", "blocks.{a}.attn.q"),
            ("encoder.block.{a}.layer.0.SelfAttention.k", "blocks.{a}.attn.k"),
            ("encoder.block.{a}.layer.0.SelfAttention.v", "blocks.{a}.attn.v"),
            ("encoder.block.{a}.layer.0.SelfAttention.o", "blocks.{a}.attn.o"),
            ("encoder.block.{a}.layer.0.SelfAttention.relative_attention_bias", "blocks.{a}.pos_embedding.embedding"),
            ("encoder.block.{a}.layer.1.layer_norm", "blocks.{a}.norm2"),
            ("encoder.block.{a}.layer.1.DenseReluDense.wi_0", "blocks.{a}.ffn.gate.0"),
            ("encoder.block.{a}.layer.1.DenseReluDense.wi_1", "blocks.{a}.ffn.fc1"),
            ("encoder.block.{a}.layer.1.DenseReluDense.wo", "blocks.{a}.ffn.fc2"),
        ]
    ),
    "llama.cpp": Renames(
        [
            ("token_embd", "token_embedding"),
            ("enc.output_norm", "norm"),
            ("enc.blk.{a}.attn_norm", "blocks.{a}.norm1"),
            ("enc.blk.{a}.attn_q", "blocks.{a}.attn.q"),
            ("enc.blk.{a}.attn_k", "blocks.{a}.attn.k"),
            ("enc.blk.{a}.attn_v", "blocks.{a}.attn.v"),
            ("enc.blk.{a}.attn_o", "blocks.{a}.attn.o"),
            ("enc.blk.{a}.attn_rel_b", "blocks.{a}.pos_embedding.embedding"),
            ("enc.blk.{a}.ffn_norm", "blocks.{a}.norm2"),
            ("enc.blk.{a}.ffn_gate", "blocks.{a}.ffn.gate.0"),
            ("enc.blk.{a}.ffn_up", "blocks.{a}.ffn.fc1"),
            ("enc.blk.{a}.ffn_down", "blocks.{a}.ffn.fc2"),
        ]
    ),
}

MARKS: Marks = {
    "official": (("blocks.0.attn.q.weight",), (TABLE,)),
    "huggingface": (
        ("encoder.block.0.layer.0.SelfAttention.q.weight",),
        ("shared.weight", "encoder.embed_tokens.weight"),
    ),
    "llama.cpp": (("enc.blk.0.attn_q.weight",), ("token_embd.weight",)),
}
# Of a whole sequence-to-sequence checkpoint only the encoder is of use.
_SECOND_HALF = ("decoder.", "lm_head.", "dec.", "output.")


def names_in(place: Place, path: Path | None = None, outside: Collection[str] = ()) -> dict[str, str]:
    """Our key -> the file's, of one place in it; unknown keys stand for themselves."""
    unused = (SPIECE_MODEL, *(_SECOND_HALF if place.dialect != "official" else ()))
    keys = {key: theirs for key, theirs in place.keys.items() if not key.startswith(unused)}
    first = sorted(keys, key=lambda key: key.startswith("encoder.embed_tokens"))
    return own_names(Place(place.dialect, place.prefix, {key: keys[key] for key in first}), DIALECTS[place.dialect])


def spiece_key(checkpoint: Checkpoint) -> str | None:
    """Under which key a file carries the SentencePiece model, if it does."""
    return next(filter(is_spiece, checkpoint.tensors), None)


def is_spiece(key: str) -> bool:
    return key.rsplit(".", 1)[-1] == SPIECE_MODEL


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    """Every dimension from the shapes of our keys.

    Raises:
        WanError: a tensor is missing, or the shapes belong to T5 instead of umT5.
    """
    try:
        refuse_empty(shapes)
        layers = count_blocks(key for key in shapes if key.endswith(".attn.q.weight"))
    except ValueError as error:
        raise WanError(f"The text encoder is not whole: {error} is missing. Is it a partial download?") from error
    biases = sum(key.startswith("blocks.") and key.endswith(".pos_embedding.embedding.weight") for key in shapes)
    if biases == 1 and layers > 1:
        raise WanError(
            "This is a T5 text encoder (only its first layer has a position bias), but Wan needs umT5-XXL: "
            "use models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_fp16.safetensors."
        )
    try:
        return _config(shapes, layers)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise WanError(
            f"The text encoder's dimensions cannot be read: {error} is missing or has another shape than "
            "expected. Is it a partial download?"
        ) from error


def packs(key: str) -> bool:
    """Whether a weight, by our key, may be in a quantised format in memory: the blocks' matrices and the table."""
    return key == TABLE or is_matrix(key)


def is_matrix(key: str) -> bool:
    """A matrix of a block, but for the small one of position biases."""
    return key.startswith("blocks.") and "norm" not in key and "pos_embedding" not in key


def _config(shapes: Mapping[str, tuple[int, ...]], layers: int) -> TextConfig:
    vocabulary, dim = shapes[TABLE]
    attention_dim, _ = shapes["blocks.0.attn.q.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.fc1.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    if attention_dim % heads:
        raise ValueError(f"attention of width {attention_dim} for {heads} heads")
    return TextConfig(vocabulary, dim, attention_dim, ffn_dim, heads, layers, buckets)


def huggingface_config(config: TextConfig) -> dict[str, Any]:
    """The ``config.json`` of transformers' UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config.vocabulary,
        "d_model": config.dim,
        "d_kv": config.attention_dim // config.heads,
        "d_ff": config.ffn_dim,
        "num_heads": config.heads,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": config.eps,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dense_act_fn": "gelu_new",
    }
