"""Prompt extension on the command line: the official flags, against a server on loopback and a tiny local model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.core.language_server import CHINESE, ENGLISH, KEY, LanguageServer, language_server, refuses
from tests.core.tiny_qwen import SENTENCE, write_words
from wan_core.__main__ import main
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ti2v")
    write_tiny(folder, "ti2v-5B", sizes=SIZES)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LanguageServer]:
    """Named in the environment, as the official script wants it."""
    with language_server() as running:
        monkeypatch.setenv("DASH_API_KEY", KEY)
        monkeypatch.setenv("DASH_API_URL", running.dashscope)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("OPENAI_BASE_URL", running.openai)
        yield running


@pytest.fixture
def generate(checkpoint: Path, tmp_path: Path):
    """generate(*flags) -> exit code, latent, the prompt in the file's header."""

    def run(*flags: object) -> tuple[int, torch.Tensor | None, str | None]:
        tensors = tmp_path / "out.safetensors"
        tensors.unlink(missing_ok=True)
        fixed = ["--task", "ti2v-5B", "--ckpt_dir", checkpoint, "--size", "64*32", "--frame_num", 5, "--base_seed", 3,
                 "--sample_steps", 2, "--save_file", tmp_path / "out.mp4", "--save_tensors", tensors]  # fmt: skip
        code = main(["generate", *map(str, fixed), *map(str, flags)])
        if not tensors.exists():
            return code, None, None
        with safe_open(tensors, "pt") as file:
            return code, file.get_tensor("latent"), file.metadata().get("prompt")

    return run


@pytest.mark.parametrize(("method", "model"), [("dashscope", "qwen-plus"), ("openai", "any")])
def test_the_video_is_of_the_extended_prompt(generate, server, capfd, method: str, model: str) -> None:
    _, expected, _ = generate("--prompt", CHINESE)
    _, plain, _ = generate("--prompt", "a cat")
    flags = ["--use_prompt_extend", "--prompt_extend_method", method, "--prompt_extend_model", model]
    code, latent, prompt = generate("--prompt", "a cat", *flags)  # Chinese, as in the official script
    assert code == 0 and prompt == CHINESE
    assert torch.equal(latent, expected) and not torch.equal(latent, plain)
    (asked,) = server.asked
    assert asked.user == "a cat" and asked.body["model"] == model
    assert (asked.body["parameters"] if method == "dashscope" else asked.body)["seed"] == 3
    said = capfd.readouterr()
    assert f"Extended prompt: {CHINESE}" in said.out and KEY[:8] not in said.out + said.err


def test_a_picture_alone(generate, server, tmp_path: Path) -> None:
    Image.new("RGB", (1280, 640), "red").save(tmp_path / "red.png")
    picture = ["--image", tmp_path / "red.png"]
    how = ["--use_prompt_extend", "True", "--prompt_extend_method", "dashscope", "--prompt_extend_target_lang", "en"]
    code, latent, prompt = generate("--prompt", "", *picture, *how)
    assert code == 0 and prompt == ENGLISH
    (asked,) = server.asked
    assert asked.body["model"] == "qwen-vl-max" and [seen.size for seen in asked.pictures] == [(724, 362)]
    _, expected, _ = generate("--prompt", ENGLISH, *picture)
    assert torch.equal(latent, expected)  # size and picture of the video are what they are without


def test_failures_keep_the_prompt_or_end_the_run(generate, server, capfd, caplog) -> None:
    server.forever = refuses(401, f"Incorrect API key provided: {KEY}.")
    _, expected, _ = generate("--prompt", "a cat")
    flags = ["--prompt", "a cat", "--use_prompt_extend", "--prompt_extend_method", "dashscope"]
    code, latent, prompt = generate(*flags)
    assert code == 0 and torch.equal(latent, expected) and prompt == "a cat"
    assert "refuses the key (HTTP 401)" in caplog.text and "used as it was given" in caplog.text
    code, latent, _ = generate(*flags, "--prompt_extend_on_failure", "stop")
    assert code == 2 and latent is None
    said = capfd.readouterr()
    assert "Error: The prompt could not be extended" in said.err
    assert KEY[:8] not in said.out + said.err + caplog.text


def test_what_is_missing_ends_the_run(generate, capfd, monkeypatch) -> None:
    for name in ("DASH_API_KEY", "DASH_API_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    flags = ["--prompt", "a cat", "--use_prompt_extend", "--prompt_extend_method"]
    assert generate(*flags, "dashscope")[0] == 2
    assert "DashScope needs a key. Set the environment variable DASH_API_KEY." in capfd.readouterr().err
    assert generate(*flags, "openai")[0] == 2
    assert "OPENAI_API_KEY" in capfd.readouterr().err
    assert generate("--prompt", "", "--use_prompt_extend")[0] == 2
    assert "nothing to extend" in capfd.readouterr().err


def test_off_means_off(generate, server) -> None:
    code, _, prompt = generate("--prompt", "a cat", "--use_prompt_extend", "False")
    assert code == 0 and prompt is None and server.asked == []


def test_a_plan_asks_nobody(generate, server) -> None:
    flags = ["--prompt", "a cat", "--use_prompt_extend", "--prompt_extend_method", "dashscope", "--plan"]
    assert generate(*flags)[0] == 0 and server.asked == []


def test_a_local_model(generate, tmp_path: Path) -> None:
    folder = write_words(tmp_path / "qwen")
    flags = ["--use_prompt_extend", "--prompt_extend_model", folder, "--prompt_extend_target_lang", "en"]
    code, latent, prompt = generate("--prompt", "dog jumps", *flags)
    assert code == 0 and prompt == SENTENCE.format("white")
    _, expected, _ = generate("--prompt", prompt)
    assert torch.equal(latent, expected)
