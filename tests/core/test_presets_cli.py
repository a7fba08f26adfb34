"""``--preset`` and the step caches' flags on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wan_core.__main__ import main, parser
from wan_core.cli.generate import request_from
from wan_core.cli.presets import preset_notes
from wan_core.config import PerExpert
from wan_core.sampling.presets import PRESETS
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t2v")
    write_tiny(folder, "t2v-A14B", sizes=SIZES)
    return folder


def parsed(*flags: str, task: str = "t2v-A14B"):
    return parser().parse_args(["generate", "--task", task, "--ckpt_dir", "x", *flags])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_the_request(name: str):
    request, preset = request_from(parsed("--preset", name)), PRESETS[name]
    assert (request.solver, request.schedule, request.steps) == (preset.solver, preset.schedule, preset.steps)
    assert (request.guidance, request.shift) == (preset.guidance, preset.shift)


def test_without_one_the_defaults_are_the_official_ones():
    request = request_from(parsed())
    assert (request.solver, request.schedule, request.steps, request.shift) == ("unipc", "auto", None, None)
    plain = request_from(parsed(task="t2v-1.3B"))  # its official script has values of its own
    assert (plain.shift, plain.guidance) == (5.0, PerExpert(5.0, 5.0))
    assert request_from(parsed("--preset", "FastWan-1.3B-3step", task="t2v-1.3B")).shift == 8.0


def test_what_is_given_wins_and_is_said():
    args = parsed("--preset", "LightX2V-4step", "--sample_steps", "8", "--sample_guide_scale", "1,2")
    request = request_from(args)
    assert (request.steps, request.guidance, request.solver) == (8, PerExpert(low=1, high=2), "euler")
    first, second = preset_notes(args, request)
    assert first.startswith("Preset LightX2V-4step: solver euler, schedule simple, 4 steps, shift 5, cfg 1")
    assert second == (
        "Not as in the preset, because given: --sample_steps (preset: 4), --sample_guide_scale (preset: 1,1)."
    )
    same = parsed("--preset", "LightX2V-4step", "--sample_steps", "4")
    assert len(preset_notes(same, request_from(same))) == 1
    assert "made for Wan2.2 TI2V-5B" in preset_notes(other := parsed("--preset", "FastWan-5B-3step"), request)[1]
    assert other.preset and preset_notes(parsed(), request) == []


def run(checkpoint: Path, tmp_path: Path, *flags: str) -> tuple[int, Path]:
    tensors = tmp_path / "t.safetensors"
    fixed = ["--task", "t2v-A14B", "--ckpt_dir", str(checkpoint), "--size", "64*32", "--frame_num", "5"]
    fixed += ["--prompt", "a cat", "--base_seed", "3", "--dtype", "float32", "--overwrite"]
    fixed += ["--save_file", str(tmp_path / "x.mp4"), "--save_tensors", str(tensors)]
    return main(["generate", *fixed, *flags]), tensors


def test_a_preset_runs_as_its_flags_do(checkpoint: Path, tmp_path: Path, caplog):
    caplog.set_level("INFO")
    code, file = run(checkpoint, tmp_path, "--preset", "LightX2V-4step")
    assert code == 0
    preset = load_file(file)["latent"]
    flags = ["--sample_solver", "euler", "--sample_schedule", "simple", "--sample_steps", "4", "--sample_shift", "5"]
    assert run(checkpoint, tmp_path, *flags, "--sample_guide_scale", "1")[0] == 0
    assert torch.equal(load_file(file)["latent"], preset)
    assert run(checkpoint, tmp_path, "--preset", "LightX2V-4step", "--sample_shift", "8")[0] == 0
    assert "the high-noise expert does 3 and the low-noise expert 1" in caplog.text


def test_a_seed_means_the_same_fresh_noise(checkpoint: Path, tmp_path: Path):
    latents = []
    for seed in ("3", "3", "4"):
        code, file = run(checkpoint, tmp_path, "--preset", "rCM-T2V-4step", "--base_seed", seed)
        assert code == 0
        latents.append(load_file(file)["latent"])
    assert torch.equal(latents[0], latents[1]) and not torch.allclose(latents[0], latents[2], atol=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "LightX2V"], "Unknown preset 'LightX2V'"),
        (["--preset", ""], "Unknown preset ''"),
        (["--preset", "LightX2V-4step", "--sample_solver", ""], "Unknown solver ''"),
        (["--preset", "FastWan-5B-3step", "--sample_guide_scale", "5"], "distilled models"),
        (["--preset", "LightX2V-4step", "--step_cache", "easy"], "only 4"),
        (["--preset", "rCM-T2V-4step", "--sample_steps", "9"], "1 to 4 steps, found 9"),
        (["--tea_cache_l1_thresh", "0.1"], "two experts: use the step cache magnitude"),
        (["--tea_cache_model_id", "Wan2.1-T2V-14B"], "give --tea_cache_l1_thresh too"),
        (["--tea_cache_l1_thresh", "0.1", "--tea_cache_model_id", "x"], "Unknown TeaCache model"),
        (["--tea_cache_l1_thresh", "0.1", "--step_cache", "easy"], "of the step cache teacache"),
        (["--step_cache", "teacache", "--step_cache_amount", "0.1", "--tea_cache_l1_thresh", "0.2"], "not both"),
        (["--step_cache_dense", "0.1"], "give --step_cache too"),
    ],
)
def test_mistakes_are_said(checkpoint: Path, tmp_path: Path, capsys, flags: list[str], message: str):
    assert run(checkpoint, tmp_path, *flags)[0] == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_steps_that_are_left_out_are_shown(checkpoint: Path, tmp_path: Path, capsys, caplog):
    """Before, in the progress, and after: 40 steps, of 26 and 14 the first fifth computed, then every second."""
    caplog.set_level("INFO")
    assert run(checkpoint, tmp_path, "--step_cache", "every", "--sample_guide_scale", "1")[0] == 0
    said = "Step cache every: 25 of 40 steps"
    assert f"{said} will be computed, 1.60 times as fast" in caplog.text and f"{said} were computed" in caplog.text
    assert "15 extrapolated" in capsys.readouterr().err
