"""Measuring a model's own curve: against diffusers' network, and how the curve is kept beside the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wan_core.__main__ import main
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.loading.step_caches import curve_file, step_cache
from wan_core.media.geometry import noise
from wan_core.pipeline import Request, read_models
from wan_core.tools.calibrate import calibrate, save
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=256, ffn_dim=256, layers=2, text_dim=64)
CPU = torch.device("cpu")
REQUEST = Request(
    "a cat", "blurred", size=(96, 64), frames=9, steps=8, seed=7, guidance=PerExpert(low=3.0, high=4.0),
    schedule="diffusers",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path, "t2v-A14B", layout="diffusers", sizes=SIZES)
    return tmp_path


def test_ratios_are_those_of_diffusers_network(folder: Path):
    """A whole run of diffusers' pipeline from the same noise, with hooks on its blocks: 1e-3, as the runs agree."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    measured = calibrate(read_models(folder, "t2v-A14B", dtype="float32"), REQUEST, device=CPU)
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0, num_train_timesteps=1000
    )
    pipeline.set_progress_bar_config(disable=True)
    residuals: dict[str, list[torch.Tensor]] = {"high": [], "low": []}
    for expert, network in (("high", pipeline.transformer), ("low", pipeline.transformer_2)):
        entered: list[torch.Tensor] = []
        network.blocks[0].register_forward_pre_hook(lambda _, args, entered=entered: entered.append(args[0].clone()))
        network.blocks[-1].register_forward_hook(
            lambda _, args, out, entered=entered, expert=expert: residuals[expert].append(out - entered.pop())
        )
    pipeline(
        prompt="a cat", negative_prompt="blurred", output_type="latent", guidance_scale=4.0, guidance_scale_2=3.0,
        height=64, width=96, num_frames=9, num_inference_steps=8, latents=noise(7, (16, 3, 8, 12))[None],
    )  # fmt: skip
    assert [one.model.path.name for one in measured] == ["transformer", "transformer_2"]
    for one, found in zip(measured, (residuals["high"][::2], residuals["low"][::2]), strict=True):  # with the prompt
        sizes = [residual.norm(dim=-1) for residual in found]
        expected = [(b / a).mean().item() for a, b in zip(sizes, sizes[1:], strict=False)]
        assert list(one.ratios) == pytest.approx(expected, rel=1e-3) and len(one.sigmas) == len(sizes)


def test_a_curve_lies_beside_its_model_and_is_found_there(folder: Path):
    models = read_models(folder, "t2v-A14B", dtype="float32")
    recipe = models.dit
    assert step_cache("magnitude", recipe.variant, recipe.high, recipe.low).source == "the published curves"
    measured = calibrate(models, replace(REQUEST, guidance=PerExpert(1.0, 1.0)), device=CPU)
    files = save(measured, {"steps": 8}, overwrite=False)
    assert files == [folder / "transformer/magnitudes.json", folder / "transformer_2/magnitudes.json"]
    cache = step_cache("magnitude", recipe.variant, recipe.high, recipe.low)
    assert cache.source == "the model's own curves"
    for name, one in zip(("high", "low"), measured, strict=True):
        grown = [cache.curves[name].growth(a, b) for a, b in zip(one.sigmas, one.sigmas[1:], strict=False)]
        assert grown == pytest.approx(one.ratios, rel=1e-6)
    with pytest.raises(WanError, match="a curve already"):
        save(measured, {}, overwrite=False)
    save(measured, {}, overwrite=True)
    files[1].unlink()
    assert "high-noise expert's own" in step_cache("magnitude", recipe.variant, recipe.high, recipe.low).source


def test_beside_a_single_file():
    assert curve_file(Path("models/wan.fp8.safetensors")) == Path("models/wan.fp8.magnitudes.json")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps(content | {"ratios": content["ratios"][:-1]}),
        lambda content: json.dumps(content | {"sigmas": content["sigmas"][::-1]}),
        lambda content: json.dumps(content | {"ratios": [0.0] * len(content["ratios"])}),
        lambda content: json.dumps(content | {"ratios": ["x"] * len(content["ratios"])}),
        lambda content: json.dumps(content | {"format": "something else"}),
        lambda content: " " * 1_000_001,
    ],
)
def test_damaged_curves_are_named(folder: Path, damage):
    recipe = read_models(folder, "t2v-A14B").dit
    good = {"format": "wan_core magnitudes 1", "model_bytes": 1, "sigmas": [0.9, 0.5, 0.2], "ratios": [0.9, 0.8]}
    curve_file(recipe.high.path).write_text(damage(good))
    with pytest.raises(WanError, match=r"magnitudes\.json holds no curve.*Measure it again"):
        step_cache("magnitude", recipe.variant, recipe.high, recipe.low)


def test_a_curve_of_another_file_is_not_taken(folder: Path):
    recipe = read_models(folder, "t2v-A14B").dit
    stale = {"format": "wan_core magnitudes 1", "model_bytes": 1, "sigmas": [0.9, 0.5], "ratios": [0.9]}
    curve_file(recipe.high.path).write_text(json.dumps(stale))
    with pytest.raises(WanError, match="measured on another file than transformer"):
        step_cache("magnitude", recipe.variant, recipe.high, recipe.low)


def test_the_command_measures_and_a_run_uses_it(tmp_path: Path, capsys, caplog):
    """One dense model in one run; its curve is used by the next generate, and not replaced unless asked."""
    write_tiny(tmp_path / "m", "t2v-1.3B", sizes=SIZES)
    common = ["--task", "t2v-1.3B", "--ckpt_dir", str(tmp_path / "m"), "--size", "64*32", "--frame_num", "5"]
    common += ["--sample_steps", "12", "--prompt", "a cat", "--base_seed", "3", "--dtype", "float32"]
    assert main(["calibrate", *common, "--step_cache", "easy"]) == 2
    assert "without --step_cache" in capsys.readouterr().err
    caplog.set_level("INFO")
    assert main(["calibrate", *common]) == 0
    assert "12 steps, ratios" in caplog.text
    assert main(["calibrate", *common]) == 2
    assert "There is a curve already" in capsys.readouterr().err
    video = tmp_path / "x.mp4"
    assert main(["generate", *common, "--step_cache", "magnitude", "--save_file", str(video)]) == 0
    assert "Step cache magnitude, the model's own curve: " in caplog.text and video.is_file()
