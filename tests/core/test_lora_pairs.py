"""Which file of a pair goes on which expert, and what the user is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.lora_files import DIALECTS_OF_LORA
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.loading.dit import read_dit
from wan_core.lora.attach import place, with_lora
from wan_core.lora.balance import is_few_step, unbalanced
from wan_core.lora.expert_pairs import find_twin, level_of
from wan_core.recipe import ModelRecipe, pair
from wan_core.sampling.experts import Switch
from wan_core.tools.tiny import TinySizes, make_tiny


@pytest.mark.parametrize(
    "high, low",
    [
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
    ],
)
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


@pytest.mark.parametrize(
    "high, low",
    [
        ("style_high-000010", "style_low-000012"),
        ("style-000010_high", "style-000012_low"),
        ("style_000002500_high_noise", "style_000003000_low_noise"),
        ("styleHIGH_e20", "styleLOW_e18"),
        ("style_high_epoch10", "style_low_epoch8"),
        ("style_high_noise-step00001000", "style_low_noise-step00000800"),
        ("style_high_10", "style_low_12"),
        ("style_high", "style_low-000012"),
        ("high/style-000010", "low/style-000012"),
    ],
)
def test_epochs_may_differ_and_it_is_told(tmp_path: Path, high: str, low: str):
    files = [tmp_path / f"{name}.safetensors" for name in (high, low)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, file)
    assert [find_twin(file) for file in files] == files[::-1]
    placed = place(files[1], "auto")
    assert (placed.high, placed.low) == tuple(files) and "of another epoch" in placed.note


def test_of_several_epochs_the_same_then_the_nearest_is_taken(tmp_path: Path):
    names = (
        "style_high-000010",
        "style_low-000002",
        "style_low-000012",
        "style_low-000040",
        "other_low-000010",
        "style_low_v2-000010",
        "style_high-000011",
    )
    for name in names:
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    chosen = tmp_path / "style_high-000010.safetensors"
    assert find_twin(chosen).stem == "style_low-000012"
    save_file({"x": torch.zeros(1)}, tmp_path / "style_low-000010.safetensors")
    assert find_twin(chosen).stem == "style_low-000010"
    assert "epoch" not in place(chosen, "auto").note


@pytest.mark.parametrize(
    "high, low",
    [
        ("style_14B_high", "style_5B_low"),
        ("style_high_v1", "style_low_v2"),
        ("a_4steps_high", "a_8steps_low"),
        ("style_high_rank64", "style_low_rank32"),
        ("wan2.1_high", "wan2.2_low"),
    ],
)
def test_other_numbers_are_no_epochs(tmp_path: Path, high: str, low: str):
    for name in (high, low):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert find_twin(tmp_path / f"{high}.safetensors") is None


def odd_files(folder: Path) -> None:
    """What lies in folders: damaged, misnamed, closed and endless things, one that says strange things of itself."""
    said = {"noise_from": "0.9", "noise_to": "1.0"}
    save_file({"x": torch.zeros(1)}, folder / "odd1.safetensors", metadata={"wan_task": "t2v-A15B", **said})
    save_file(
        {"x": torch.zeros(1)},
        folder / "odd2.safetensors",
        metadata={"wan_task": "t2v-A14B", "noise_from": "nan", "noise_to": "much"},
    )
    (folder / "odd3.safetensors").write_bytes(b"")
    (folder / "odd4.safetensors").write_bytes(b"\xff" * 64)
    nested = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    (folder / "odd5.safetensors").write_bytes(len(nested).to_bytes(8, "little") + nested)
    strange = b'{"__metadata__":{"wan_task":["a"],"noise_from":"0","noise_to":"1"}}'
    (folder / "odd6.safetensors").write_bytes(len(strange).to_bytes(8, "little") + strange)
    (folder / "odd7.safetensors").mkdir()
    (folder / "odd8.safetensors").symlink_to(folder / "nowhere")
    (folder / "odd9.safetensors").symlink_to(folder / "odd9.safetensors")
    os.mkfifo(folder / "odd10.safetensors")
    os.mkfifo(folder / "style_low-000011.safetensors")
    (folder / "style_low-000009.safetensors").write_bytes(b"not a checkpoint")
    (folder / ("low" * 80 + ".safetensors")).write_bytes(b"x")
    (folder / os.fsdecode(b"style_low_\xff\xfe.safetensors")).write_bytes(b"x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_odd_files_in_the_folder_harm_no_other(tmp_path: Path):
    odd_files(tmp_path)
    files = {
        name: tmp_path / f"{name}.safetensors" for name in ("first", "second", "style_high-000010", "style_low-000012")
    }
    for name, (start, end) in {"first": ("0.9", "1.0"), "second": ("0.0", "0.9")}.items():
        said = {"wan_task": "i2v-A14B", "noise_from": start, "noise_to": end}
        save_file({"x": torch.zeros(1)}, files[name], metadata=said)
    for name in ("style_high-000010", "style_low-000012"):
        save_file({"x": torch.zeros(1)}, files[name])
    assert find_twin(files["first"]) == files["second"]
    assert find_twin(files["style_high-000010"]) == files["style_low-000012"]
    for odd in tmp_path.iterdir():
        level_of(odd), find_twin(odd)


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
    for said in (
        "High-noise expert: strength 0.8, lora_high.safetensors: 18 of 18 keys matched",
        "Low-noise expert: strength 0.5, lora_low.safetensors",
        "twin",
    ):
        assert said in report
    model, report = with_lora(model, folder / "lora_high.safetensors", PerExpert(low=0.0, high=1.0), first_step=2)
    assert [use.strength for use in model.loras.high] == [0.8, 1.0] and len(model.loras.low) == 1
    assert "steps 2 to the last" in report


@pytest.mark.parametrize("side, expected", [(0, ("lora_high.safetensors", 0.8)), (1, ("lora_low.safetensors", 0.5))])
def test_an_expert_on_its_own_takes_what_is_meant_for_it(folder: Path, side: int, expected: tuple[str, float]):
    model, _ = with_lora(recipes(folder)[side], folder / "lora_high.safetensors", PerExpert(low=0.5, high=0.8))
    assert [(use.file.path.name, use.strength) for use in model.loras_of(model.high)] == [expected]


def test_which_expert_one_on_its_own_is_taken_for_is_told(folder: Path):
    """By its name, however it is written; one whose name says nothing is a dense model, and takes the file given."""
    for name, level, file in (
        ("t2vLOW", "low", "lora_low"),
        ("W22LowNoise", "low", "lora_low"),
        ("Wan2.2 merge", "high", "lora_high"),
        ("merged", None, "lora_high"),
    ):
        model = folder / f"{name}.safetensors"
        model.write_bytes((folder / "model_low_noise.safetensors").read_bytes())
        made, report = with_lora(ModelRecipe(read_dit(model)), folder / "lora_high.safetensors", PerExpert(1, 1))
        assert [use.file.path.stem for use in made.loras.high] == [file]
        taken = f", taken for the {level}-noise expert" if level else ""
        assert f"Model{taken}: strength 1" in report


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


def test_a_twin_that_is_damaged_is_named_with_the_way_on(folder: Path, tmp_path: Path):
    for name in ("lora_high", "model_high_noise", "model_low_noise"):
        (tmp_path / f"{name}.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
    (tmp_path / "lora_low.safetensors").write_bytes(b"\x00" * 40)
    both = pair(*recipes(tmp_path), Switch())
    with pytest.raises(WanError, match=r"lora_low.*found as the other expert's file.*or none"):
        with_lora(both, tmp_path / "lora_high.safetensors", PerExpert(1, 1))
    made, _ = with_lora(both, tmp_path / "lora_high.safetensors", PerExpert(1, 1), low=None)
    assert made.loras.high and not made.loras.low


def test_a_file_of_the_second_expert_alone_is_known_by_its_keys(folder: Path, tmp_path: Path):
    made = load_file(folder / "lora_high.safetensors")
    for prefix, level in (("transformer_2.", "low"), ("pipe.dit2.", "low"), ("transformer.", None)):
        file = tmp_path / f"{prefix.strip('.')}.safetensors"
        save_file({key.replace("lora_unet_", prefix): value for key, value in made.items()}, file)
        assert level_of(file) == level


def put(model: ModelRecipe, folder: Path, name: str, low: str | None, **options: object) -> ModelRecipe:
    for file in (name, low):
        if file and not (folder / file).exists():
            (folder / file).write_bytes((folder / "lora_high.safetensors").read_bytes())
    low = folder / low if low else None
    return with_lora(model, folder / name, PerExpert(**{"low": 1.0, "high": 1.0} | options), low=low)[0]


def test_a_lora_on_one_expert_alone_is_told(folder: Path):
    """Any on one side and none on the other; or a few-step one on one side and others on the other."""
    both = pair(*recipes(folder), Switch())
    assert unbalanced(both) is None and unbalanced(recipes(folder)[0]) is None
    style = put(both, folder, "style.safetensors", "style.safetensors")
    assert unbalanced(style) is None
    only_high = unbalanced(put(both, folder, "style.safetensors", None))
    assert "low-noise expert (model_low_noise.safetensors) has none" in only_high and "style.safetensors" in only_high
    off = unbalanced(put(both, folder, "style.safetensors", "style.safetensors", high=0.0))
    assert "high-noise expert (model_high_noise.safetensors) has none" in off
    for few in ("lightx2v_a", "x_4steps_a", "x-lightning-b", "CausVid", "x_DMD2"):
        half = unbalanced(put(style, folder, f"{few}.safetensors", None))
        assert half and f"the LoRA {few}.safetensors" in half and "only style.safetensors" in half
        assert (
            unbalanced(
                put(
                    half_of := put(style, folder, f"{few}.safetensors", f"{few}.safetensors"),
                    folder,
                    "style.safetensors",
                    None,
                )
            )
            is None
            and half_of
        )


def test_an_expert_that_needs_few_steps_itself_needs_no_lora(folder: Path):
    distilled = folder / "wan_4steps_low_noise.safetensors"
    distilled.write_bytes((folder / "model_low_noise.safetensors").read_bytes())
    both = pair(recipes(folder)[0], ModelRecipe(read_dit(distilled)), Switch())
    assert unbalanced(put(both, folder, "lightx2v_a.safetensors", None)) is None
    assert unbalanced(put(both, folder, "style.safetensors", "style.safetensors", high=0.0))


@pytest.mark.parametrize(
    "name, few",
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64", True),
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high", True),
        ("Wan2.2-Lightning_T2V", True),
        ("FastWan_T2V", True),
        ("self-forcing-x", True),
        ("AccVid_I2V", True),
        ("style_1000steps", False),
        ("style_step1000", False),
        ("style_10_step_500", False),
        ("highlight", False),
        ("relaxing", False),
        ("dmdx", False),
    ],
)
def test_which_names_speak_of_few_steps(name: str, few: bool):
    assert is_few_step(Path(f"{name}.safetensors")) is few
