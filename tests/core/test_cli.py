"""The command line: files come out right, mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from wan_core.__main__ import main
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ti2v")
    write_tiny(folder, "ti2v-5B", sizes=SIZES)
    return folder


def generate(*arguments: object) -> int:
    fixed = ["--task", "ti2v-5B", "--size", "64*32", "--frame_num", "5", "--sample_steps", "2", "--prompt", "a cat"]
    return main(["generate", *fixed, *map(str, arguments)])


def test_video_and_tensors(checkpoint: Path, tmp_path: Path):
    out, tensors = tmp_path / "out.mp4", tmp_path / "out.safetensors"
    assert generate("--ckpt_dir", checkpoint, "--base_seed", 3, "--save_file", out, "--save_tensors", tensors) == 0
    saved = load_file(tensors)
    assert saved["latent"].shape == (48, 2, 2, 4) and saved["latent"].dtype == torch.float32
    assert saved["video"].shape == (3, 5, 32, 64) and saved["video"].abs().max() <= 1
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.average_rate) == (64, 32, 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert len(frames) == 5
    shown = torch.tensor(frames[2]).float() / 127.5 - 1
    assert (shown - saved["video"][:, 2].permute(1, 2, 0)).abs().mean() < 0.25  # lossy, and chroma at half size


def test_a_seed_means_the_same_video(checkpoint: Path, tmp_path: Path):
    latents = []
    for seed in (3, 3, 4):
        file = tmp_path / f"{len(latents)}.safetensors"
        common = ("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4", "--save_tensors", file)
        assert generate(*common, "--base_seed", seed) == 0
        latents.append(load_file(file)["latent"])
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])


def test_offloading_and_the_official_flags_change_nothing(checkpoint: Path, tmp_path: Path):
    plain, flagged = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    common = ("--ckpt_dir", checkpoint, "--base_seed", 3, "--save_file", tmp_path / "x.mp4")
    assert generate(*common, "--save_tensors", plain) == 0
    assert generate(*common, "--save_tensors", flagged, "--offload_model", "True", "--convert_model_dtype", "--t5_cpu",
                    "--ulysses_size", 1) == 0  # fmt: skip
    assert torch.equal(load_file(plain)["video"], load_file(flagged)["video"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frame_num", "6"], "5 and 9"),
        (["--size", "70*32"], "multiple"),
        (["--sample_solver", "ddim"], "Unknown solver"),
        (["--device", "quantum"], "not available"),
        (["--dtype", "float12"], "Unknown dtype"),
        (["--attention", "magic"], "Unknown attention"),
        (["--image", "missing.png"], "No such image"),
        (["--save_file", "no/such/folder/x.mp4"], "there is no folder"),
        (["--ulysses_size", "8"], "not supported"),
        (["--use_prompt_extend"], "not supported"),
    ],
)
def test_mistakes_are_one_line(checkpoint: Path, capsys, monkeypatch, tmp_path: Path, arguments, message: str):
    monkeypatch.chdir(tmp_path)
    assert generate("--ckpt_dir", checkpoint, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("Error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_first(checkpoint: Path, capsys, monkeypatch, tmp_path: Path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1024))
    assert generate("--ckpt_dir", checkpoint, "--save_file", tmp_path / "x.mp4") == 2
    assert "0 MB free" in capsys.readouterr().err


def test_a_missing_tokenizer_is_found_first(checkpoint: Path, capsys, tmp_path: Path):
    without = tmp_path / "without"
    shutil.copytree(checkpoint, without)
    shutil.rmtree(without / "google")
    assert generate("--ckpt_dir", without, "--save_file", tmp_path / "x.mp4") == 2
    assert "tokenizer" in capsys.readouterr().err


def test_a_text_encoder_of_another_width_is_found_first(checkpoint: Path, capsys, tmp_path: Path):
    write_tiny(tmp_path / "other", "ti2v-5B", sizes=replace(SIZES, text_dim=128))
    mixed = tmp_path / "mixed"
    shutil.copytree(checkpoint, mixed)
    shutil.copy(tmp_path / "other" / "models_t5_umt5-xxl-enc-bf16.pth", mixed)
    assert generate("--ckpt_dir", mixed, "--save_file", tmp_path / "x.mp4") == 2
    assert "embeddings 128 wide" in capsys.readouterr().err


def test_make_tiny_says_what_it_wrote(capsys, tmp_path: Path):
    assert main(["make-tiny", str(tmp_path), "--task", "i2v-A14B", "--layout", "official", "--seed", "5"]) == 0
    assert "i2v-A14B" in capsys.readouterr().out
    config = json.loads((tmp_path / "high_noise_model" / "config.json").read_text())
    assert config["in_dim"] == 36 and (tmp_path / "google/umt5-xxl/spiece.model").is_file()
