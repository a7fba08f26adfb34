"""The tokenizer against transformers' AutoTokenizer and diffusers' prompt cleaning, on the real umT5 vocabulary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from wan_core.config import NEGATIVE_PROMPT
from wan_core.errors import WanError
from wan_core.models.text.tokenizer import (
    Tokenizer,
    clean,
    find_tokenizer,
    load_tokenizer,
    train_tiny_tokenizer,
    write_tokenizer_folder,
)

PROMPTS = {
    "english": "Two anthropomorphic cats in comfy boxing gear fight intensely on a spotlighted stage.",
    "chinese": "白天，晴天光，边缘光，暖色调，低饱和度，极端全景，平衡构图，两名穿着宇航服的人涉水前行。",
    "mixed": "一只猫 wearing sunglasses 坐在 surfboard 上，4K，cinematic",
    "negative": NEGATIVE_PROMPT,
    "emoji": "a party 🎉 with a rocket 🚀, a smile 😀 and a family 👨‍👩‍👧‍👦 ❤️",
    "empty": "",
    "only space": " \t\n ",
    "odd space": "  a\tcat \u00a0 walks\u3000\u3000home\r\n\n slowly\u2003. ",
    "entities": "salt &amp; pepper &amp;lt;b&amp;gt; &quot;quoted&quot; &#39;x&#39; caf&eacute;",
    "mojibake": "cafÃ© â€œquotedâ€\x9d naïve ﬁne e\u0301",
    "full width": "ＡＢＣ１２３！？「角」",
    "600 words": "walking through the rain " * 150,
    "long chinese": "城市夜景，霓虹灯，雨后街道。" * 120,
    "scripts": "Привет мир, مرحبا بالعالم, नमस्ते दुनिया, สวัสดีชาวโลก, 안녕하세요, こんにちは",
}
TEXTS = ["a cat walks on the beach at sunset", "two dogs run through the rain at night", "一只猫在海滩上散步", "夜晚"]


@pytest.fixture(scope="module")
def reference(umt5_tokenizer: Path):
    return AutoTokenizer.from_pretrained(umt5_tokenizer)


@pytest.fixture(scope="module")
def fast(umt5_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(umt5_tokenizer)


@pytest.fixture(scope="module")
def spiece(umt5_tokenizer: Path) -> Tokenizer:
    return load_tokenizer(umt5_tokenizer / "spiece.model")


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return train_tiny_tokenizer(TEXTS)


@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_transformers(name: str, reference, fast: Tokenizer, spiece: Tokenizer):
    text = PROMPTS[name]
    expected = reference(prompt_clean(text), truncation=True, max_length=512).input_ids
    assert fast.encode(text) == expected
    assert spiece.encode(text) == expected


@pytest.mark.parametrize("name", PROMPTS)
def test_cleaning_is_diffusers(name: str):
    assert clean(PROMPTS[name]) == prompt_clean(PROMPTS[name])


def test_long_prompts_keep_the_end_token(fast: Tokenizer):
    ids = fast.encode(PROMPTS["600 words"])
    assert len(ids) == 512
    assert ids[-1] == 1
    assert fast.encode("") == [1]


def test_special_tokens_of_the_real_vocabulary(fast: Tokenizer, spiece: Tokenizer):
    assert (fast.eos, spiece.eos) == (1, 1)
    assert fast.size == 256300
    assert spiece.size == 256000
    # Outside the vocabulary: <unk> (3) in the fast tokenizer, as in the file; UTF-8 bytes in SentencePiece.
    assert fast.encode("ᚠᛇᚻ") == [273, 3, 1]
    assert spiece.encode("ᚠᛇᚻ")[:4] == [273, 242, 171, 177]


def test_tiny_tokenizer_is_deterministic_and_numbered_as_umt5(tiny: bytes):
    assert train_tiny_tokenizer(TEXTS) == tiny
    processor = SentencePieceProcessor(model_proto=tiny)
    assert [processor.id_to_piece(i) for i in range(4)] == ["<pad>", "</s>", "<s>", "<unk>"]
    assert (processor.pad_id(), processor.eos_id(), processor.bos_id(), processor.unk_id()) == (0, 1, 2, 3)
    tokenizer = load_tokenizer(tiny)
    ids = tokenizer.encode("a cat 🎉")
    assert ids[-1] == 1
    assert max(ids) < tokenizer.size <= 400
    assert processor.decode(ids[:-1]) == "a cat 🎉"


def test_every_source_agrees_on_a_small_model(tiny: bytes, tmp_path: Path):
    write_tokenizer_folder(tmp_path / "google/umt5-xxl", tiny)
    folder = tmp_path / "google/umt5-xxl"
    sources = [tiny, folder, folder / "tokenizer.json", folder / "spiece.model", str(tmp_path)]
    for text in ("a cat walks at night", "一只猫 在海滩", "", "Other letters: ЖÆ 🎉 山"):
        encoded = [load_tokenizer(source).encode(text) for source in sources]
        assert encoded == [encoded[0]] * len(sources)
    text = "a cat walks at night"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == load_tokenizer(folder).encode(text)


@pytest.mark.parametrize(
    "place",
    ["google/umt5-xxl", "../google/umt5-xxl", "../../google/umt5-xxl", "tokenizer", "../tokenizer", "umt5-xxl", "."],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_found_beside_the_checkpoint(place: str, name: str, tiny: bytes, tmp_path: Path):
    checkpoint = tmp_path / "a/b/models_t5_umt5-xxl-enc-bf16.pth"
    checkpoint.parent.mkdir(parents=True)
    write_tokenizer_folder(tmp_path / "made", tiny)
    target = checkpoint.parent / place
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(tmp_path / "made" / name, target)
    assert find_tokenizer(checkpoint).samefile(target / name)
    assert find_tokenizer(checkpoint.parent).samefile(target / name)


def test_missing_tokenizer_names_every_place(tmp_path: Path):
    with pytest.raises(WanError) as caught:
        find_tokenizer(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    for place in ("google/umt5-xxl", "tokenizer", "../google/umt5-xxl"):
        assert str((tmp_path / place).resolve()) in str(caught.value)
    assert "Download" in str(caught.value)
    with pytest.raises(WanError, match="No tokenizer at"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("spiece.model", b"no model"), ("spiece.model", b""), ("tokenizer.json", b"{}"), ("tokenizer.json", b"<html>")],
)
def test_broken_files_are_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WanError, match=name):
        load_tokenizer(tmp_path)
