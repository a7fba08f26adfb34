"""--lora on the command line: a pair by one of its files, both by name, strengths, and refusals in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.lora_files import DIALECTS_OF_LORA
from wan_core.__main__ import main
from wan_core.cli.loras import LoraOption, parse_lora
from wan_core.tools.tiny import TinySizes, make_tiny, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)


def test_how_the_option_is_read(tmp_path: Path):
    odd = tmp_path / "a,b:2.safetensors"
    odd.touch()
    assert parse_lora("x.safetensors") == LoraOption(Path("x.safetensors"), None, 1.0)
    assert parse_lora("x.safetensors:-0.5") == LoraOption(Path("x.safetensors"), None, -0.5)
    assert parse_lora("high.st,low.st:0.8") == LoraOption(Path("high.st"), Path("low.st"), 0.8)
    assert parse_lora(r"C:\x.safetensors").file == Path(r"C:\x.safetensors")
    assert parse_lora(str(odd)) == LoraOption(odd, None, 1.0)
    assert parse_lora(f"{odd}:0.5") == LoraOption(odd, None, 0.5)
    for wrong in ("x.safetensors:strong", "a,b,c", ",b"):
        with pytest.raises(Exception, match="expected FILE"):
            parse_lora(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    write_tiny(folder / "model", "t2v-A14B", sizes=SIZES)
    for seed, (level, weights) in enumerate(
        zip(("high", "low"), make_tiny("t2v-A14B", sizes=SIZES).experts, strict=True)
    ):
        torch.manual_seed(seed)
        save_file(DIALECTS_OF_LORA["kohya"].make(weights)[0], folder / f"style_{level}.safetensors")
    return folder


def latent(folder: Path, *arguments: object) -> torch.Tensor:
    out = folder / "out.safetensors"
    fixed = [
        "--task",
        "t2v-A14B",
        "--ckpt_dir",
        folder / "model",
        "--size",
        "32*32",
        "--frame_num",
        1,
        "--sample_steps",
        2,
        "--prompt",
        "a cat",
        "--base_seed",
        1,
        "--sample_guide_scale",
        1,
        "--dtype",
        "float32",
        "--save_file",
        folder / "out.mp4",
        "--save_tensors",
        out,
    ]
    assert main(["generate", *map(str, [*fixed, *arguments])]) == 0
    return load_file(out)["latent"]


def test_a_pair_by_one_file_equals_both_by_name(folder: Path):
    high, low = folder / "style_high.safetensors", folder / "style_low.safetensors"
    plain, both = latent(folder), latent(folder, "--lora", f"{high},{low}:0.5")
    assert torch.equal(latent(folder, "--lora", f"{low}:0.5"), both)
    assert torch.equal(latent(folder, "--lora", f"{low}:0"), plain)
    assert (both - plain).abs().max() > 1e-2 * plain.abs().max()
    once = latent(folder, "--lora", f"{high}:0.25", "--lora", f"{high}:0.25")
    assert (once - both).abs().max() <= 1e-5 * both.abs().max()


def test_a_missing_file_is_one_line(folder: Path, capsys: pytest.CaptureFixture):
    assert (
        main(
            [
                "generate",
                "--task",
                "t2v-A14B",
                "--ckpt_dir",
                str(folder / "model"),
                "--lora",
                "nowhere.safetensors",
                "--save_file",
                str(folder / "x.mp4"),
            ]
        )
        == 2
    )
    assert "No such file or folder: nowhere.safetensors" in capsys.readouterr().err
