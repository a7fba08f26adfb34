"""Scales that only a header, or PEFT's settings beside a file, state: applied by module, told, and harmless when odd.

What PEFT does is written down once more here; agreement with PEFT's own layers under diffusers was measured to 2e-6.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.lora_files import as_diffusers, draw, flat, low_rank, paths, prefixed
from tests.core.test_lora import CONFIG, STRENGTH, close, velocity, weights_of
from wan_core.errors import WanError
from wan_core.layouts.dit import DIALECTS
from wan_core.loading.dit import read_dit
from wan_core.lora.files import LoraFile, read_lora
from wan_core.lora.patterns import Patterns
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.tiny import _random_weights

RANK = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "model.safetensors"
    save_file(_random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0)), path)
    return path


def write(
    model: Path,
    file: Path,
    metadata: Mapping[str, str],
    name: Callable[[str], str] = as_diffusers,
    down: str = ".lora_A.weight",
    up: str = ".lora_B.weight",
) -> Path:
    torch.manual_seed(1)
    save_file(low_rank(weights_of(model), name, down, up, alpha=False)[0], file, metadata=dict(metadata))
    return file


def read(model: Path, file: Path, expert: str | None = None) -> LoraFile:
    return read_lora(file, read_dit(model), expert)


def scales(lora: LoraFile) -> dict[str, float]:
    """By our module."""
    return {key.removesuffix(".weight"): part.scale for key, (part,) in lora.parts.items()}


def as_peft_finds(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    for pattern, number in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return number
    return otherwise


SETTINGS = {
    "alpha": {"r": RANK, "lora_alpha": 8},
    "stabilised": {"r": RANK, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": RANK, "lora_alpha": 6, "alpha_pattern": {
        "to_k": 7, r"blocks\.[01]\.ffn\.net\.2": 1, "blocks.0.attn1.to_out.0": 12, "^blocks.1.attn2.to_v": 20,
        r".*ffn.*proj": 3, r"blocks\.\d+\.attn1\.(to_q|to_v)": 5, "k": 99,
    }},
    "first_wins": {"r": RANK, "lora_alpha": 6, "alpha_pattern": {"attn1.to_q": 2, "blocks.0.attn1.to_q": 9}},
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
@pytest.mark.parametrize("place", ["prefixed", "bare", "beside", "renamed"])
def test_pefts_settings_scale_each_module(model: Path, tmp_path: Path, settings: dict, place: str):
    """As diffusers writes them into the header, as PEFT writes them beside, and below official names too."""
    file, metadata = tmp_path / "adapter_model.safetensors", {}
    prefix = "" if place == "bare" else "transformer."
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "LORA"}), encoding="utf-8")
    else:
        metadata["lora_adapter_metadata"] = json.dumps({prefix + name: value for name, value in settings.items()})
    lora = read(model, write(model, file, metadata, prefixed if place == "renamed" else as_diffusers))
    root = 2.0 if settings.get("use_rslora") else RANK
    to_theirs = DIALECTS["diffusers"].to_theirs
    expected = {
        path: as_peft_finds(settings.get("alpha_pattern", {}), to_theirs(path), settings["lora_alpha"]) / root
        for path in paths(weights_of(model))
    }
    assert scales(lora) == pytest.approx(expected)
    source = "adapter_config.json" if place == "beside" else "header's lora_adapter_metadata"
    assert f"scaled as its {source} says: " in lora.report()


def test_it_reaches_the_result(model: Path, tmp_path: Path):
    """To 1e-5 of the float32 merge; without the scale it would be another video."""
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 8})}
    file = write(model, tmp_path / "lora.safetensors", said)
    plain, made, merged = write(model, tmp_path / "plain.safetensors", {}), load_file(file), weights_of(model)
    for path in paths(merged):
        name = as_diffusers(path)
        product = made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"]
        merged[f"{path}.weight"] = merged[f"{path}.weight"] + STRENGTH * 2 * product
    save_file(merged, tmp_path / "merged.safetensors")
    expected = velocity(tmp_path / "merged.safetensors")
    for merge in (False, True):
        assert close(velocity(model, (file, STRENGTH), merge=merge), expected, 1e-5)
    assert not close(velocity(model, (plain, STRENGTH)), expected, 1e-2)


def test_each_expert_has_its_own_settings(model: Path, tmp_path: Path):
    said = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 8,
        "transformer_2.r": RANK,
        "transformer_2.lora_alpha": 2,
        "text_encoder.r": 8,
        "text_encoder.lora_alpha": 80,
    }
    file = write(model, tmp_path / "one.safetensors", {"lora_adapter_metadata": json.dumps(said)})
    made = load_file(file)
    second = {key.replace("transformer.", "transformer_2."): value.clone() for key, value in made.items()}
    save_file(made | second, file, metadata={"lora_adapter_metadata": json.dumps(said)})
    assert set(scales(read(model, file, "high")).values()) == {2.0}
    assert set(scales(read(model, file, "low")).values()) == {0.5}


KOHYA = (flat, ".lora_down.weight", ".lora_up.weight")


@pytest.mark.parametrize(
    "metadata, names, scale",
    [
        ({"lora_alpha": "8", "r": "4"}, (as_diffusers,), 2.0),
        ({"lora_alpha": "8.0"}, (prefixed,), 2.0),
        ({"alpha": "2", "rank": "4"}, (prefixed,), 0.5),
        ({"lora_alpha": "8", "r": "4", "use_rslora": "true"}, (as_diffusers,), 4.0),
        ({"ss_network_alpha": "8", "ss_network_dim": "4"}, KOHYA, 2.0),
        ({"ss_network_alpha": "2.0", "ss_network_dim": "4"}, (prefixed,), 0.5),
        ({"ss_network_alpha": "0", "ss_network_dim": "4"}, KOHYA, 1.0),  # there it means the rank
        ({"ss_network_alpha": "8", "ss_network_dim": "Dynamic"}, KOHYA, 2.0),
        ({"lora_config": '{"r": 4, "lora_alpha": 16}'}, (prefixed,), 4.0),
        ({"alpha": "0.3", "author": "somebody"}, (prefixed,), 1.0),  # may mean anything
        ({}, (prefixed,), 1.0),
    ],
)
def test_other_places_of_the_header(model: Path, tmp_path: Path, metadata: dict, names: tuple, scale: float):
    lora = read(model, write(model, tmp_path / "lora.safetensors", metadata, *names))
    assert set(scales(lora).values()) == {scale}
    assert ("scale 1" in lora.report()) == (scale == 1 and "ss_network_alpha" not in metadata)
    assert scale == 1 or f": {scale:g} on 18 weights" in lora.report()


def test_a_converted_kohya_file_is_not_scaled_twice(model: Path, tmp_path: Path):
    """musubi-tuner's converter multiplies the scale into the matrices, drops alpha and keeps the header."""
    said = {"ss_network_alpha": "8", "ss_network_dim": "4", "ss_network_module": "networks.lora_wan"}
    converted = read(model, write(model, tmp_path / "converted.safetensors", said, prefixed))
    assert set(scales(converted).values()) == {1.0} and "in the matrices" in converted.report()
    own = read(model, write(model, tmp_path / "own.safetensors", said, *KOHYA))
    assert set(scales(own).values()) == {2.0}


def test_the_tensors_alpha_wins(model: Path, tmp_path: Path):
    torch.manual_seed(1)
    weights = weights_of(model)
    made, merged = low_rank(weights, as_diffusers, ".lora_A.weight", ".lora_B.weight", alpha=True)
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 800})}
    save_file(made, tmp_path / "lora.safetensors", metadata=said)
    save_file(merged, tmp_path / "merged.safetensors")
    assert close(
        velocity(model, (tmp_path / "lora.safetensors", STRENGTH)), velocity(tmp_path / "merged.safetensors"), 1e-5
    )
    assert "scaled as" not in read(model, tmp_path / "lora.safetensors").report()


@pytest.mark.parametrize("alpha, said, scale", [(None, {}, 1.0), (6.0, {}, 1.5), (None, {"lora_alpha": "8"}, 2.0)])
def test_the_bias_of_the_second_matrix_has_its_scale(
    model: Path, tmp_path: Path, alpha: float | None, said: dict, scale: float
):
    """PEFT's ``lora_B.bias`` is a difference of the layer's bias, times the scale."""
    torch.manual_seed(1)
    weights = weights_of(model)
    path, made, merged = "blocks.0.ffn.0", {}, dict(weights)
    a, b, bias = draw(RANK, 128, size=0.05), draw(256, RANK, size=0.3), draw(256, size=0.5)
    made = {
        f"{as_diffusers(path)}.lora_{role}": part for role, part in (("A.weight", a), ("B.weight", b), ("B.bias", bias))
    }
    if alpha:
        made[f"{as_diffusers(path)}.alpha"] = torch.tensor(alpha)
    merged[f"{path}.weight"] = weights[f"{path}.weight"] + STRENGTH * scale * b @ a
    merged[f"{path}.bias"] = weights[f"{path}.bias"] + STRENGTH * scale * bias
    save_file(made, tmp_path / "lora.safetensors", metadata=said)
    save_file(merged, tmp_path / "merged.safetensors")
    expected = velocity(tmp_path / "merged.safetensors")
    lora = read(model, tmp_path / "lora.safetensors")
    assert (lora.matched, lora.unmatched) == (len(made), ())
    assert close(velocity(model, (tmp_path / "lora.safetensors", STRENGTH)), expected, 1e-5)


def test_a_rank_that_the_tensors_do_not_have_is_told(model: Path, tmp_path: Path):
    said = {"lora_adapter_metadata": json.dumps({"transformer.r": 16, "transformer.lora_alpha": 8})}
    lora = read(model, write(model, tmp_path / "lora.safetensors", said))
    assert set(scales(lora).values()) == {2.0}
    assert "states rank 16, but 18 weights are of rank 4" in lora.report()


def test_settings_beside_belong_to_pefts_own_file_only(model: Path, tmp_path: Path):
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({"r": RANK, "lora_alpha": 8}), encoding="utf-8")
    other = read(model, write(model, tmp_path / "style.safetensors", {}))
    own = read(model, write(model, tmp_path / "adapter_model.safetensors", {}))
    assert set(scales(other).values()) == {1.0} and set(scales(own).values()) == {2.0}
    (tmp_path / "style.safetensors").unlink()
    assert set(scales(read(model, tmp_path)).values()) == {2.0}  # the folder itself, as PEFT saved it
    settings.write_text(json.dumps({"r": 32, "lora_alpha": 8}), encoding="utf-8")
    foreign = read(model, tmp_path / "adapter_model.safetensors")
    assert set(scales(foreign).values()) == {1.0} and "another file's" in foreign.report()


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": "[1]"},
        {"lora_adapter_metadata": "[" * 100_000},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": NaN, "transformer.r": 4}'},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": 1e999, "transformer.r": 4}'},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": [8], "transformer.r": {}}'},
        {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "alpha_pattern": ["to_q"]}'},
        {"lora_adapter_metadata": '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q": "much", "(a+)+b": 2, "(": 3}}'},
        {"lora_alpha": "<b>much</b>", "r": "4"},
        {"lora_alpha": "1" + "0" * 5000},
    ],
)
def test_settings_that_are_none_are_told_and_left(model: Path, tmp_path: Path, metadata: dict):
    lora = read(model, write(model, tmp_path / "lora.safetensors", metadata))
    assert set(scales(lora).values()) == {1.0}
    assert "Warning" in lora.report() and "much" not in lora.report()


def test_no_pattern_takes_long():
    """Expressions from a file that would try for ever are not tried; a hundred thousand rows are soon searched."""
    evil = [
        "(a+)+$",
        "(a|a)" * 40 + "b",
        "(.*)*b",
        "a{1,99}{1,99}",
        ".*" * 30 + "b",
        "((a*)*)*",
        r"(\w+\s?)*$",
        "(?=a)",
    ]
    begun = time.monotonic()
    found = Patterns(
        dict.fromkeys(evil, 1.0)
        | {f"row{number}": 2.0 for number in range(100_000)}
        | {f".*x{number}.*y": 3.0 for number in range(10_000)}
        | {"to_q": 4.0}
    )
    assert not set(evil) & set(found)
    assert [found.find([f"blocks.{block}.attn1.to_q"], None) for block in range(400)] == [4.0] * 400
    assert time.monotonic() - begun < 10


def test_an_alpha_that_is_no_number_is_refused_by_name(model: Path, tmp_path: Path):
    torch.manual_seed(1)
    made, _ = low_rank(weights_of(model), prefixed, ".lora_A.weight", ".lora_B.weight", alpha=True)
    made["diffusion_model.blocks.1.ffn.0.alpha"] = torch.tensor(float("nan"))
    save_file(made, tmp_path / "lora.safetensors")
    with pytest.raises(WanError, match=r"blocks\.1\.ffn\.0\.alpha is nan"):
        velocity(model, (tmp_path / "lora.safetensors", 1.0))
