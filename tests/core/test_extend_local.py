"""Prompt extension with real, tiny models of Qwen's architectures on this machine."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from tests.core.tiny_qwen import SENTENCE, tokenizer, write_seeing, write_words
from wan_core.errors import WanError
from wan_core.memory.language_model import place_for
from wan_core.prompt.extension import local_qwen
from wan_core.prompt.extension.extend import Extended, PromptExtender
from wan_core.prompt.extension.local_qwen import FOR_PICTURES, FOR_TEXT, HUB, LocalQwen, Place
from wan_core.prompt.extension.question import AnswerFailed

CPU = Place(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("LLM")
    return {"words": write_words(home / "words"), "seeing": write_seeing(home / "seeing")}


def model(folders: dict[str, Path], name: str, **options: object) -> LocalQwen:
    return LocalQwen(name, folders.get, lambda weights: CPU, **options)


def test_words(folders) -> None:
    result = PromptExtender().extend(model(folders, "words"), "dog jumps")
    assert result == Extended(SENTENCE.format("white"))


@pytest.mark.parametrize("colour", ["red", "blue"])
def test_it_sees_the_picture(folders, colour: str) -> None:
    picture = Image.new("RGB", (1200, 800), colour)
    result = PromptExtender().extend(model(folders, "seeing", pictures=True), "dog jumps", pictures=[picture])
    assert result == Extended(SENTENCE.format(colour))


def test_two_pictures_and_no_words_can_be_asked(folders) -> None:
    """It learned one picture: what counts is that both go in, and that the instructions are those for two."""
    pictures = [Image.new("RGB", (60, 60), "red")] * 2
    result = PromptExtender().extend(
        model(folders, "seeing", pictures=True), "", pictures=pictures, language="en", on_failure="stop"
    )
    assert result.prompt


def test_a_seed_is_one_answer_and_other_random_numbers_stay(folders, tmp_path: Path, monkeypatch) -> None:
    """With a model that wavers among what it learned."""
    wavering, ids = tmp_path / "wavering", tokenizer().convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    shutil.copytree(folders["words"], wavering)
    GenerationConfig(
        do_sample=True, temperature=9.0, top_k=6, eos_token_id=ids[0], pad_token_id=ids[1]
    ).save_pretrained(wavering)
    monkeypatch.setattr(local_qwen, "_MOST_TOKENS", 30)
    found = LocalQwen("m", lambda name: wavering, lambda weights: CPU)
    texts, torch_state = {}, torch.get_rng_state()
    for seed in (1, 2, 1, 2**63 + 1):
        result = PromptExtender().extend(found, "dog jumps", seed=seed, on_failure="stop")
        texts.setdefault(seed, set()).add(result.prompt)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert len(texts[1]) == 1 and texts[1] != texts[2]
    assert texts[2**63 + 1] == texts[1]  # PyTorch takes no larger seed


def test_time_is_bounded_and_cancelling_works(folders, monkeypatch) -> None:
    result = PromptExtender().extend(model(folders, "words", seconds=-1), "dog jumps")
    assert result.failed and "did not finish" in result.notes[0]

    class Cancelled(Exception):
        pass

    calls = []

    def check() -> None:
        calls.append(time.monotonic())
        if len(calls) > 3:  # before, after loading, and one token
            raise Cancelled

    with pytest.raises(Cancelled):
        PromptExtender().extend(model(folders, "words"), "dog jumps", check=check)
    assert len(calls) == 4


def test_nothing_is_kept_in_memory(folders) -> None:
    PromptExtender().extend(model(folders, "words"), "dog jumps")
    import gc

    from transformers import Qwen2ForCausalLM

    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is Qwen2ForCausalLM]


# --- models that are not there, or cannot be used


def test_the_first_official_model_that_is_there_answers(folders) -> None:
    asked = []

    def find(name: str) -> Path | None:
        asked.append(name)
        return folders["words"] if name == "Qwen/Qwen2.5-3B-Instruct" else None

    found = LocalQwen("", find, lambda weights: CPU)
    assert PromptExtender().extend(found, "dog jumps") == Extended(SENTENCE.format("white"))
    assert asked == [HUB[name] for name in FOR_TEXT]
    with pytest.raises(WanError, match="Qwen2.5-VL-7B-Instruct or Qwen/Qwen2.5-VL-3B-Instruct here"):
        LocalQwen("", find, lambda weights: CPU, pictures=True).folder()
    assert asked[3:] == [HUB[name] for name in FOR_PICTURES]
    assert LocalQwen("Qwen2.5_3B", find, lambda weights: CPU).folder() == folders["words"]


def test_a_model_without_sight_is_answered_in_words(folders) -> None:
    result = PromptExtender().extend(
        model(folders, "words", pictures=True), "dog jumps", pictures=[Image.new("RGB", (64, 64))]
    )
    assert result.failed and result.prompt == "dog jumps" and "words could not be run" in result.notes[0]


@pytest.mark.parametrize("damage", ["no weights", "pickles only", "no config", "half a file", "its own code"])
def test_damaged_folders_are_answered_in_words(folders, tmp_path: Path, damage: str) -> None:
    for file in folders["words"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if damage in ("no weights", "pickles only"):
        weights.unlink()
    if damage == "pickles only":
        torch.save({}, tmp_path / "pytorch_model.bin")
    if damage == "no config":
        config.unlink()
    if damage == "half a file":
        weights.write_bytes(weights.read_bytes()[:2000])
    if damage == "its own code":
        config.write_text(
            '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.E"}}'
        )
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    found = LocalQwen("m", lambda name: tmp_path, lambda weights: CPU)
    result = PromptExtender().extend(found, "dog jumps")
    assert result.failed and result.prompt == "dog jumps"
    assert not (tmp_path / "ran").exists()


def test_transformers_is_optional(folders, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WanError, match="needs the package transformers: pip install transformers"):
        PromptExtender().extend(model(folders, "words"), "dog jumps")


def test_aiohttp_is_optional(monkeypatch) -> None:
    from wan_core.prompt.extension.endpoint import Endpoint
    from wan_core.prompt.extension.servers import PROTOCOLS, ServerMethod

    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(WanError, match="needs the package aiohttp: pip install aiohttp"):
        PromptExtender().extend(ServerMethod(PROTOCOLS["openai"], Endpoint("http://127.0.0.1:1"), "m"), "a cat")


# --- where it runs and where it lies


def test_it_runs_where_there_is_room(monkeypatch) -> None:
    from wan_core.memory import language_model

    gpu, gb = torch.device("meta"), 10**9
    monkeypatch.setattr(language_model, "available_bytes", lambda device: 40 * gb)
    monkeypatch.setattr(language_model, "resolve_dtype", lambda name, device: torch.float32)
    assert place_for(10 * gb, gpu, 24 * gb).device == gpu
    assert place_for(28 * gb, gpu, 24 * gb) == Place(torch.device("cpu"), torch.bfloat16)  # float32 would take 64 GB
    assert place_for(15 * gb, gpu, 8 * gb) == CPU
    with pytest.raises(AnswerFailed, match="needs 46 GB of memory, and 40 GB are free"):
        place_for(40 * gb, gpu, 0)


def test_fetched_models_are_found_without_the_network(tmp_path: Path, monkeypatch) -> None:
    """In Hugging Face's own folder, as its library leaves them."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--Qwen--Qwen2.5-3B-Instruct/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert local_qwen.in_cache("Qwen/Qwen2.5-3B-Instruct") == snapshot
    for name in ("Qwen/Qwen2.5-7B-Instruct", "no name at all", "../../etc", "a/b/c", ""):
        assert local_qwen.in_cache(name) is None


def test_what_cannot_be_fetched_is_said(monkeypatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = LocalQwen("Qwen2.5_3B", local_qwen.fetched, lambda weights: CPU)
    result = PromptExtender().extend(found, "a cat")
    assert result.failed and "Qwen/Qwen2.5-3B-Instruct could not be fetched" in result.notes[0]
