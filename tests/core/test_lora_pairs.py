"""Which file of a pair goes on which expert, and what the user is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.core.lora_files import DIALECTS_OF_LORA
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.loading.dit import read_dit
from wan_core.lora.attach import place, with_lora
from wan_core.lora.twins import find_twin, level_of
from wan_core.recipe import ModelRecipe, pair
from wan_core.sampling.experts import Switch
from wan_core.tools.tiny import TinySizes, make_tiny


@pytest.mark.parametrize("high, low", [
    ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise"),
    ("Wan2.2-T2V-HighNoise-style", "Wan2.2-T2V-LowNoise-style"),
    ("style_T2V_HIGH_14B", "style_T2V_LOW_14B"),
    ("StyleHighNoise", "StyleLowNoise"),
    ("W22_HN_i2v", "W22_LN_i2v"),
    ("dance-h", "dance-l"),
    ("highnoise", "lownoise"),
    ("Wan22_High", "wan22_low"),
    ("high/lora", "low/lora"),
    ("Style/high_noise_model", "Style/low_noise_model"),
    ("wan_high/style_high", "wan_low/style_low"),
    ("low_poly_high_noise", "low_poly_low_noise"),
    ("styleI2vHIGH", "styleI2vLOW"),
    ("W22_HIGHv2", "W22_LOWv2"),
])  # fmt: skip
def test_twins_are_found_by_name(tmp_path: Path, high: str, low: str):
    files = [tmp_path / f"{name}.safetensors" for name in (high, low)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, file)
    (tmp_path / "highlight_flow.safetensors").touch()
    assert find_twin(files[0]) == files[1] and find_twin(files[1]) == files[0]
    assert [level_of(file) for file in files] == ["high", "low"]


@pytest.mark.parametrize("name", ["highlight_flow", "slow_motion_below", "glow", "style_l", "thigh"])
def test_other_words_are_no_noise_levels(tmp_path: Path, name: str):
    file = tmp_path / f"{name}.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    assert find_twin(file) is None and level_of(file) is None


def test_twins_are_found_by_what_the_trainer_wrote(tmp_path: Path):
    ranges = {"first": (0.9, 1.0), "second": (0.0, 0.9), "other": (0.0, 1.0)}
    for name, (low, high) in ranges.items():
        task = "t2v-A14B" if name == "other" else "i2v-A14B"
        said = {"wan_task": task, "noise_from": f"{low}", "noise_to": f"{high}"}
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors", metadata=said)
    first, second, other = (tmp_path / f"{name}.safetensors" for name in ranges)
    assert [level_of(file) for file in (first, second, other)] == ["high", "low", None]
    assert [find_twin(file) for file in (first, second, other)] == [second, first, None]
    save_file({"x": torch.zeros(2)}, second)
    assert find_twin(first) is None


def test_each_file_goes_on_its_expert(tmp_path: Path):
    high, low, alone, both = (tmp_path / f"{name}.safetensors" for name in ("a_high", "a_low", "b_low", "plain"))
    for file in (high, low, alone, both):
        save_file({"x": torch.zeros(1)}, file)
    for chosen in (high, low):
        placed = place(chosen, "auto")
        assert (placed.high, placed.low) == (high, low)
    placed = place(alone, "auto")
    assert (placed.high, placed.low) == (None, alone) and "no twin" in placed.note
    assert (place(both, "auto").high, place(both, "auto").low) == (both, both)
    assert (place(high, None).high, place(high, None).low) == (high, None)
    assert (place(both, alone).high, place(both, alone).low) == (both, alone)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pair of experts and a pair of LoRAs."""
    folder = tmp_path_factory.mktemp("pair")
    made = make_tiny("t2v-A14B", sizes=TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=32))
    for level, weights in zip(("high", "low"), made.experts, strict=True):
        save_file(weights, folder / f"model_{level}_noise.safetensors")
        torch.manual_seed(0)
        save_file(DIALECTS_OF_LORA["kohya"].make(weights)[0], folder / f"lora_{level}.safetensors")
    return folder


def recipes(folder: Path) -> tuple[ModelRecipe, ModelRecipe]:
    high, low = (ModelRecipe(read_dit(folder / f"model_{level}_noise.safetensors")) for level in ("high", "low"))
    return high, low


def test_a_pair_on_a_pair_in_a_chain(folder: Path):
    model = pair(*recipes(folder), Switch())
    model, report = with_lora(model, folder / "lora_low.safetensors", PerExpert(low=0.5, high=0.8))
    assert [(use.file.path.name, use.strength) for use in model.loras.high] == [("lora_high.safetensors", 0.8)]
    assert [(use.file.path.name, use.strength) for use in model.loras.low] == [("lora_low.safetensors", 0.5)]
    for said in ("High-noise expert: strength 0.8, lora_high.safetensors: 18 of 18 keys matched",
                 "Low-noise expert: strength 0.5, lora_low.safetensors", "twin"):  # fmt: skip
        assert said in report
    model, report = with_lora(model, folder / "lora_high.safetensors", PerExpert(low=0.0, high=1.0), first_step=2)
    assert [use.strength for use in model.loras.high] == [0.8, 1.0] and len(model.loras.low) == 1
    assert "steps 2 to the last" in report


@pytest.mark.parametrize("side, expected", [(0, ("lora_high.safetensors", 0.8)), (1, ("lora_low.safetensors", 0.5))])
def test_an_expert_on_its_own_takes_what_is_meant_for_it(folder: Path, side: int, expected: tuple[str, float]):
    model, _ = with_lora(recipes(folder)[side], folder / "lora_high.safetensors", PerExpert(low=0.5, high=0.8))
    assert [(use.file.path.name, use.strength) for use in model.loras_of(model.high)] == [expected]


def test_which_expert_one_on_its_own_is_taken_for_is_told(folder: Path):
    """By its name, however it is written; by the high-noise expert's rules where it says nothing."""
    for name, level, file in (("t2vLOW", "low", "lora_low"), ("W22LowNoise", "low", "lora_low"),
                              ("merged", "high", "lora_high")):  # fmt: skip
        model = folder / f"{name}.safetensors"
        model.write_bytes((folder / "model_low_noise.safetensors").read_bytes())
        made, report = with_lora(ModelRecipe(read_dit(model)), folder / "lora_high.safetensors", PerExpert(1, 1))
        assert [use.file.path.stem for use in made.loras.high] == [file]
        assert f"Model, taken for the {level}-noise expert: strength 1" in report


@pytest.mark.parametrize("low, warnings", [("auto", 0), ("lora_high.safetensors", 2), (None, 1)])
def test_files_chosen_against_their_names_are_a_warning(folder: Path, low: str | None, warnings: int):
    chosen = folder / low if low and low != "auto" else low
    both = PerExpert(low=1.0, high=1.0)
    _, report = with_lora(pair(*recipes(folder), Switch()), folder / "lora_low.safetensors", both, low=chosen)
    assert report.count("Warning: by its name") == warnings
    assert not warnings or "lora_low.safetensors is for the low-noise expert" in report


def test_impossible_steps_are_refused(folder: Path):
    with pytest.raises(WanError, match="steps are 3 to 1"):
        with_lora(recipes(folder)[0], folder / "lora_high.safetensors", PerExpert(1, 1), first_step=3, last_step=1)
