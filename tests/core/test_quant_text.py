"""The text encoder in quantised formats, and the tokenizer inside GGUF files."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from tests.core.quant_files import fp8_scaled, write_gguf
from wan_core.config import NEGATIVE_PROMPT, TextConfig
from wan_core.errors import WanError
from wan_core.layouts.gguf_tokenizer import spiece_model
from wan_core.layouts.text import DIALECTS
from wan_core.loading.text import TextEncoder, load_text_encoder
from wan_core.models.text.tokenizer import clean, load_tokenizer, train_tiny_tokenizer
from wan_core.models.text.umt5 import Umt5Encoder
from wan_core.quant.linear import QuantEmbedding, QuantLinear
from wan_core.tools.tiny import _random_weights

PROMPTS = ["a cat walks on the beach at sunset", "一只猫在海滩上散步", ""]
TEXTS = [*PROMPTS[:2], NEGATIVE_PROMPT, "two dogs run through the rain at night", "夜晚"]

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return train_tiny_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def weights(spiece: bytes) -> Weights:
    size = SentencePieceProcessor(model_proto=spiece).get_piece_size()
    config = TextConfig(size, dim=64, attention_dim=64, ffn_dim=96, heads=2, layers=3)
    return _random_weights(Umt5Encoder, config, torch.Generator().manual_seed(3))


def named(weights: Weights, dialect: str) -> Weights:
    return {DIALECTS[dialect].to_theirs(key): value.contiguous() for key, value in weights.items()}


def vocabulary(writer: GGUFWriter, spiece: bytes, padding: int = 4) -> None:
    """As llama.cpp converts a T5: every piece, then unused ones up to the table's size."""
    processor = SentencePieceProcessor(model_proto=spiece)
    ids = range(processor.get_piece_size())
    kinds = [kind(processor, i) for i in ids]
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    unused = [f"[PAD{i}]".encode() for i in range(padding)]
    writer.add_token_list([*(processor.id_to_piece(i).encode() for i in ids), *unused])
    writer.add_token_scores([processor.get_score(i) for i in ids] + [-10000.0] * padding)
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * padding])
    writer.add_add_space_prefix(True)
    writer.add_remove_extra_whitespaces(False)
    writer.add_eos_token_id(processor.eos_id())
    writer.add_pad_token_id(processor.pad_id())
    writer.add_unk_token_id(processor.unk_id())


def kind(processor: SentencePieceProcessor, i: int) -> gguf.TokenType:
    if processor.is_unknown(i):
        return gguf.TokenType.UNKNOWN
    if processor.is_control(i):
        return gguf.TokenType.CONTROL
    return gguf.TokenType.BYTE if processor.is_byte(i) else gguf.TokenType.NORMAL


def text_gguf(file: Path, weights: Weights, spiece: bytes, matrix: str = "Q8_0", table: str = "Q8_0") -> Path:
    def type_of(key: str, tensor: Tensor) -> str:
        if key.startswith("token_embd"):
            return table
        return "F32" if "norm" in key else "F16" if "rel_b" in key else matrix

    write_gguf(
        file,
        named(weights, "llama.cpp"),
        type_of,
        architecture="t5encoder",
        fields=lambda writer: vocabulary(writer, spiece),
    )
    return file


def plain(file: Path, weights: Weights, spiece: bytes) -> TextEncoder:
    save_file(named(weights, "huggingface"), file)
    return load_text_encoder(file, tokenizer=spiece, dtype=torch.float32)


def means(file: Path, weights: Weights) -> Weights:
    """What the numbers of a GGUF file say, by the package gguf."""
    tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
    found = {}
    for key, value in weights.items():
        stored = tensors[DIALECTS["llama.cpp"].to_theirs(key)]
        found[key] = torch.tensor(gguf.quants.dequantize(stored.data, stored.tensor_type)).view(value.shape).float()
    return found


@pytest.mark.parametrize(("matrix", "table"), [("Q8_0", "Q8_0"), ("Q5_1", "F16"), ("F16", "F16"), ("BF16", "Q4_0")])
def test_gguf_encodes_what_its_numbers_say(weights: Weights, spiece: bytes, tmp_path: Path, matrix: str, table: str):
    """In float32 on the CPU, with the tokenizer out of the file, to 1e-5 of the largest value."""
    file = text_gguf(tmp_path / "umt5.gguf", weights, spiece, matrix, table)
    encoder = load_text_encoder(file, dtype=torch.float32)
    assert isinstance(encoder.encoder.token_embedding, QuantEmbedding) == (table != "F16")
    assert isinstance(encoder.encoder.blocks[0].ffn.gate[0], QuantLinear) == (matrix in ("Q8_0", "Q5_1"))
    expected = plain(tmp_path / "plain.safetensors", means(file, weights), spiece)
    assert (encoder(PROMPTS) - expected(PROMPTS)).abs().max() <= 1e-5 * expected(PROMPTS).abs().max()


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "int8"])
def test_quantised_on_load(weights: Weights, spiece: bytes, tmp_path: Path, dtype: str):
    """Measured 6.0 % (fp8) and 1.4 % (int8) of the states' size; held to half as much again."""
    exact = plain(tmp_path / "plain.safetensors", weights, spiece)(PROMPTS)
    made = load_text_encoder(tmp_path / "plain.safetensors", tokenizer=spiece, dtype=dtype)
    assert isinstance(made.encoder.blocks[2].attn.o, QuantLinear)
    assert not isinstance(made.encoder.token_embedding, QuantEmbedding)
    error = (made(PROMPTS) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < {"fp8_e4m3fn": 0.09, "int8": 0.021}[dtype]


def test_fp8_scaled(weights: Weights, spiece: bytes, tmp_path: Path):
    """ComfyUI's file: Hugging Face's names, the tokenizer as a tensor, a mark for the file."""
    made = fp8_scaled(named(weights, "huggingface"))
    made["spiece_model"] = torch.frombuffer(bytearray(spiece), dtype=torch.uint8)
    save_file(made, tmp_path / "scaled.safetensors")
    encoder = load_text_encoder(tmp_path / "scaled.safetensors", dtype=torch.float32)
    own = {DIALECTS["huggingface"].to_own(key): value for key, value in made.items() if key.endswith("weight")}
    scales = {DIALECTS["huggingface"].to_own(key): value for key, value in made.items() if key.endswith("scale_weight")}
    meaning = {
        key: value.float() * scales.get(key.removesuffix("weight") + "scale_weight", 1)
        for key, value in own.items()
        if not key.endswith("scale_weight")
    }
    expected = plain(tmp_path / "plain.safetensors", meaning, spiece)
    assert (encoder(PROMPTS) - expected(PROMPTS)).abs().max() <= 1e-5 * expected(PROMPTS).abs().max()


def test_the_tokenizer_of_a_gguf_is_the_real_one(umt5_tokenizer: Path, tmp_path: Path):
    """The whole umT5 vocabulary written as llama.cpp does and put together again: the same ids for every text."""
    original = (umt5_tokenizer / "spiece.model").read_bytes()
    writer = GGUFWriter(str(tmp_path / "v.gguf"), "t5encoder")
    vocabulary(writer, original, padding=384)
    writer.add_tensor("x", torch.zeros(1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = load_tokenizer(spiece_model(tmp_path / "v.gguf")), load_tokenizer(original)
    assert (ours.size, ours.eos) == (theirs.size, theirs.eos)
    others = ["Привет мир, مرحبا, नमस्ते, 안녕하세요"]
    texts = [*TEXTS, *others, "salt &amp; pepper 🎉 👨‍👩‍👧‍👦", "  odd\tspace ", "ＡＢＣ１２３！？"]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), clean(text)


def test_a_gguf_without_vocabulary_looks_for_a_tokenizer(weights: Weights, tmp_path: Path):
    write_gguf(tmp_path / "umt5.gguf", named(weights, "llama.cpp"), lambda *_: "F32", architecture="t5encoder")
    with pytest.raises(WanError, match="No tokenizer found"):
        load_text_encoder(tmp_path / "umt5.gguf")


def test_a_llm_is_refused_by_name(tmp_path: Path):
    write_gguf(tmp_path / "x.gguf", {"blk.0.attn_q.weight": torch.zeros(4, 32)}, lambda *_: "F16", architecture="llama")
    with pytest.raises(WanError, match="architecture 'llama'; expected wan or t5encoder"):
        load_text_encoder(tmp_path / "x.gguf")
