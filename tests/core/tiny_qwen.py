"""Tiny chat models of Qwen's architectures, trained here in seconds to give one answer, and saved as folders.

Random weights answer with noise; these answer a sentence, stop after it, and the one that sees names the colour of the
picture, so that a test can tell whether the chat, the picture and the seed went in as they should.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from wan_core.prompt.extension.instructions import instructions

SENTENCE = "A {} cat turns its head to the camera."
COLOURS = ("red", "blue")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>"]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": False}  # fmt: skip
SEEING = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
          "window_size": 112, "fullatt_block_indexes": [0]}  # fmt: skip


def tokenizer() -> Qwen2Tokenizer:
    """Qwen's own kind, of few pieces."""
    pieces = ByteLevelBPETokenizer()
    corpus = [*(SENTENCE.format(colour) for colour in (*COLOURS, "white")), instructions(0, "en", empty=False)]
    pieces.train_from_iterator(corpus, vocab_size=500, min_frequency=2, show_progress=False)
    saved = json.loads(pieces.to_str())["model"]
    vocabulary = saved["vocab"] | {token: len(saved["vocab"]) + number for number, token in enumerate(SPECIAL)}
    made = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(merge) for merge in saved["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in SPECIAL if token != "<|endoftext|>"],
    )
    made.chat_template = TEMPLATE
    return made


def write_words(folder: Path) -> Path:
    """A Qwen2 that answers every question with a white cat."""
    words = tokenizer()
    torch.manual_seed(0)
    ids = {"eos_token_id": words.eos_token_id, "bos_token_id": None, "pad_token_id": words.pad_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(words), **TEXT, **ids))
    _train(model, [_example(words, words(_chat(words, "dog jumps"))["input_ids"], "white")], 60)
    words.save_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def write_seeing(folder: Path) -> Path:
    """A Qwen2.5-VL that names the colour of the picture."""
    words = tokenizer()
    torch.manual_seed(0)
    numbers = {name: words.convert_tokens_to_ids(token) for name, token in {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }.items()}  # fmt: skip
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}
    ids = {"eos_token_id": words.eos_token_id, "bos_token_id": None, "pad_token_id": words.pad_token_id}
    text = {**TEXT, **ids, "vocab_size": len(words), "rope_scaling": rope}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=SEEING, **numbers, tie_word_embeddings=False)
    )
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)
    examples = []
    for colour in COLOURS:
        picture = Image.new("RGB", (84, 56), colour)
        seen = processor(text=[_chat(words, "dog jumps", picture=True)], images=[picture], return_tensors="pt")
        more = {name: seen[name] for name in ("pixel_values", "image_grid_thw")}
        examples.append(_example(words, seen["input_ids"][0].tolist(), colour) | more)
    _train(model, examples, 80)
    processor.save_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _chat(words: Qwen2Tokenizer, text: str, picture: bool = False) -> str:
    told = instructions(int(picture), "en", empty=False)
    user = [{"type": "image"}, {"type": "text", "text": text}] if picture else text
    messages = [{"role": "system", "content": told}, {"role": "user", "content": user}]
    return words.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _example(words: Qwen2Tokenizer, asked: list[int], colour: str) -> dict[str, torch.Tensor]:
    """The question and the answer; only the answer is learned."""
    answer = words(SENTENCE.format(colour) + "<|im_end|>")["input_ids"]
    ids = torch.tensor([[*asked, *answer]])
    return {"input_ids": ids, "labels": torch.tensor([[-100] * len(asked) + answer]),
            "attention_mask": torch.ones_like(ids)}  # fmt: skip


def _train(model: torch.nn.Module, examples: list[dict[str, torch.Tensor]], steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(steps):
        loss = model(**examples[step % len(examples)]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.3, f"the tiny model did not learn its sentence: {loss.item()}"
    model.eval()
