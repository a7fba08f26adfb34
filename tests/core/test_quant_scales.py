"""No scale is lost: it is applied, wherever its tensor is, or the file is refused by name."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_core
from tests.core.test_convert import weights_of
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=256, layers=2, text_dim=64, text_layers=1, text_attention=64, text_ffn=96)
Weights = dict[str, Tensor]
FP8 = torch.float8_e4m3fn


PARTS: dict[str, Callable] = {
    "diffusion_models": wan_core.load_dit,
    "text_encoders": wan_core.load_text_encoder,
    "vae": wan_core.load_vae,
}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    write_tiny(folder, "t2v-A14B", layout="comfyui", sizes=SIZES)
    for part in PARTS:
        convert(next((folder / part).iterdir()), folder / f"{part}.safetensors", "fp32")
    return folder


def everything_scaled(weights: Weights, dtype: torch.dtype, scale_name: Callable[[str], str], *, per_row: bool):
    """Every floating-point tensor with a scale of its own, and what that means."""
    made, expected = {}, {}
    for key, value in weights.items():
        if not value.is_floating_point():
            made[key] = value
            continue
        rows = value.float().reshape(value.shape[0], -1)
        size = rows.abs().amax(dim=1, keepdim=True) if per_row else rows.abs().amax().view(1, 1)
        largest = torch.finfo(dtype).max if dtype.is_floating_point else 127
        scale = (size / largest).clamp(min=1e-12)
        packed = (rows / scale).round() if dtype is torch.int8 else rows / scale
        packed = packed.clamp(-largest, largest).to(dtype)
        made[key], made[scale_name(key)] = packed.view(value.shape), scale.squeeze(1) if per_row else scale.view(())
        expected[key] = (packed.float() * scale).view(value.shape)
    return made, expected


def layer_of(key: str) -> str:
    return key.removesuffix(".weight")


NAMES: dict[str, Callable[[str], str]] = {
    "old": lambda key: f"{layer_of(key)}.scale_weight" if key.endswith(".weight") else f"{key}_scale",
    "new": lambda key: f"{layer_of(key)}.weight_scale" if key.endswith(".weight") else f"{key}_scale",
    "below": lambda key: f"{key}.scale" if key.endswith(".weight") else f"{key}_scale",
    "beside": lambda key: f"{layer_of(key)}.weight_scale" if key.endswith(".weight") else f"{key}.weight_scale",
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize("per_row", [False, True], ids=["one", "rows"])
def test_every_tensor_of_a_model_may_have_a_scale(
    comfyui: Path, tmp_path: Path, part: str, name: str, dtype: torch.dtype, per_row: bool
):
    """Convolutions, embeddings, biases, norms and modulation too, in and outside of blocks; no marking at all."""
    weights = load_file(comfyui / f"{part}.safetensors")
    made, expected = everything_scaled(weights, dtype, NAMES[name], per_row=per_row)
    save_file(made, tmp_path / "x.safetensors")
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    for key, value in expected.items():
        assert torch.equal(checkpoint.tensor(key).float(), value), key
    save_file(
        {key: expected.get(key, value) for key, value in made.items() if key in weights}, tmp_path / "plain.safetensors"
    )
    ours = PARTS[part](tmp_path / "x.safetensors", dtype=torch.float32)
    plain = PARTS[part](tmp_path / "plain.safetensors", dtype=torch.float32)
    modules = [one.encoder if part == "text_encoders" else one for one in (ours, plain)]
    found, theirs = map(weights_of, modules)
    packed = theirs.keys() - found.keys()
    assert packed <= {"token_embedding.weight"}  # its rows are dequantised one by one
    assert all(torch.equal(found[key], value) for key, value in theirs.items() if key not in packed)
    if part == "text_encoders":
        assert torch.equal(ours(["a cat"]), plain(["a cat"]))


def test_the_field_s_case(comfyui: Path, tmp_path: Path):
    """An fp8 file whose 5-D patch embedding has a scale as well: it once was dropped."""
    weights = load_file(comfyui / "diffusion_models.safetensors")
    made = {key: value.contiguous() for key, value in weights.items()} | {"scaled_fp8": torch.zeros(0, dtype=FP8)}
    key, scale = "patch_embedding.weight", weights["patch_embedding.weight"].abs().max() / 448
    made |= {key: (weights[key] / scale).to(FP8), "patch_embedding.scale_weight": scale}
    save_file(made, tmp_path / "x.safetensors")
    model = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32)
    assert torch.equal(model.patch_embedding.weight, made[key].float() * scale)


def wide_with_a_scale(weights: Weights, value: float, **more: Tensor) -> Weights:
    return weights | {"blocks.0.ffn.0.weight_scale": torch.tensor(value), **more}


def test_wide_numbers_with_a_scale(comfyui: Path, tmp_path: Path):
    """A mark says that the scale is still to be applied; without one it may have been, unless it changes nothing."""
    weights, key = load_file(comfyui / "diffusion_models.safetensors"), "blocks.0.ffn.0.weight"
    save_file(wide_with_a_scale(weights, 0.5), tmp_path / "x.safetensors")
    with pytest.raises(WanError, match="no marking says whether it is still to be applied"):
        open_checkpoint(tmp_path / "x.safetensors")
    save_file(wide_with_a_scale(weights, 1.0), tmp_path / "x.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "x.safetensors").tensor(key), weights[key])
    mark = {"blocks.0.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)}
    save_file(wide_with_a_scale(weights, 0.5, **mark), tmp_path / "x.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "x.safetensors").tensor(key), weights[key] * 0.5)


@pytest.mark.parametrize("shape", [(256,), (256, 1), (), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("end", [".weight_scale", ".scale_weight"])
def test_int8_rows_without_a_mark(comfyui: Path, tmp_path: Path, shape: tuple[int, ...], end: str):
    weights, key = load_file(comfyui / "diffusion_models.safetensors"), "blocks.0.ffn.0.weight"
    scale = torch.rand(shape) / 100 + 0.001
    data = torch.randint(-127, 128, weights[key].shape, dtype=torch.int8)
    save_file(weights | {key: data, f"blocks.0.ffn.0{end}": scale}, tmp_path / "x.safetensors")
    model = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32)
    layer = model.blocks[0].ffn[0]
    assert layer.format.name == "int8"
    assert torch.equal(layer.packed.dequantise(), data.float() * scale.reshape(-1, 1))


INT8 = torch.zeros(256, 128, dtype=torch.int8)
REFUSED = {
    "a scale for each column": ({"weight": INT8, "weight_scale": torch.ones(1, 128)}, "expected one scale"),
    "a scale across": ({"weight": INT8[:128].clone(), "weight_scale": torch.ones(1, 128)}, "expected one scale"),
    "blocks": ({"weight": INT8, "weight_scale": torch.ones(2, 1)}, "expected one scale"),
    "whole numbers": ({"weight": INT8, "weight_scale": torch.ones(1, dtype=torch.int32)}, "expected one scale"),
    "bitsandbytes": ({"weight": INT8, "SCB": torch.ones(256)}, "bitsandbytes' int8"),
    "nf4": ({"weight": INT8.view(torch.uint8), "weight.absmax": torch.ones(9)}, "bitsandbytes' 4 bits"),
    "GPTQ": ({"qweight": INT8.to(torch.int32), "qzeros": INT8}, "GPTQ"),
    "Nunchaku": ({"qweight": INT8, "wscales": torch.ones(2, 256)}, "Nunchaku"),
    "compressed-tensors": ({"weight_packed": INT8.view(torch.uint8), "weight_scale": torch.ones(1)},
                           "compressed-tensors|not the weight that it belongs to"),
    "quanto": ({"weight._data": INT8, "weight._scale": torch.ones(256)}, "quanto"),
    "DeepSeek's blocks": ({"weight": INT8.to(FP8), "weight_scale_inv": torch.ones(2, 1)}, "block-wise"),
    "an unknown name": ({"weight": INT8.to(FP8), "rescale": torch.ones(1)}, "rescale, which seems to say how"),
    "a zero point": ({"weight": INT8, "weight_scale": torch.ones(1), "zero_point": torch.ones(1)}, "zero_point"),
    "scales below": ({"weight": INT8.to(FP8), "weight.scales": torch.ones(1)}, "weight.scales, which seems to say"),
    "a scale of nothing": ({"weight": INT8.to(FP8), "other.weight_scale": torch.ones(1)}, "not the weight that it"),
    "two scales": ({"weight": INT8.to(FP8), "weight_scale": torch.ones(1), "scale_weight": torch.ones(1)},
                   "two scales of"),
    "bytes": ({"weight": INT8.view(torch.uint8)}, "as U8, without a marking"),
    "U16": ({"weight": torch.zeros(256, 128, dtype=torch.uint16)}, "as U16, without a marking"),
    "I64": ({"weight": INT8.long()}, "as I64, without a marking"),
    "scales as weights": ({"weight": INT8.view(torch.uint8).view(torch.float8_e8m0fnu)}, "as F8_E8M0, without"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_is_refused_by_name(comfyui: Path, tmp_path: Path, case: str):
    tensors, message = REFUSED[case]
    weights = load_file(comfyui / "diffusion_models.safetensors")
    del weights["blocks.0.ffn.0.weight"]
    made = weights | {f"blocks.0.ffn.0.{name}": tensor for name, tensor in tensors.items()}
    save_file(made, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match=message) as raised:
        wan_core.load_dit(tmp_path / "x.safetensors")
    said = str(raised.value)
    assert "blocks.0.ffn.0" in said and "file of the same model" in said or "partial download" in said
    assert "corrupt" not in said


def test_a_thousand_random_files_are_read_or_refused(tmp_path: Path):
    """Of random shapes, types and markings: nothing but a ``WanError``, and what is read has the shape it says."""
    rng, outcomes = random.Random(5), Counter()
    for _ in range(1000):
        save_file(random_layer(rng), tmp_path / "x.safetensors")
        try:
            checkpoint = open_checkpoint(tmp_path / "x.safetensors")
            for key, info in checkpoint.tensors.items():
                assert tuple(checkpoint.tensor(key).shape) == info.shape
            outcomes["read"] += 1
        except WanError as error:
            assert "cannot be understood" not in str(error)
            outcomes["refused"] += 1
    assert outcomes["read"] > 20 and outcomes["refused"] > 500


def random_layer(rng: random.Random) -> Weights:
    roles = [
        "weight_scale",
        "scale_weight",
        "weight_scale_2",
        "pre_quant_scale",
        "input_scale",
        "bias",
        "bias_scale",
        "weight.scale",
        "comfy_quant",
        "odd_scale",
    ]
    made = {f"l.{role}": random_tensor(rng) for role in ("weight", *rng.sample(roles, rng.randint(0, 5)))}
    if "l.comfy_quant" in made:
        mark = {
            "format": rng.choice(["nvfp4", "mxfp8", "int8_tensorwise", "convrot_w4a4", "float8_e4m3fn"]),
            "convrot": rng.random() < 0.5,
            "convrot_groupsize": rng.choice([4, 16, "16", 0]),
        }
        made["l.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    return made | ({"scaled_fp8": torch.zeros(2)} if rng.random() < 0.3 else {})


def random_tensor(rng: random.Random) -> Tensor:
    dtype = rng.choice(
        [
            torch.float32,
            torch.bfloat16,
            FP8,
            torch.float8_e5m2,
            torch.int8,
            torch.uint8,
            torch.float8_e8m0fnu,
            torch.int64,
            torch.bool,
            torch.uint16,
        ]
    )
    shape = rng.choice(
        [
            (),
            (0,),
            (1,),
            (16,),
            (128, 4),
            (16, 16),
            (32, 32),
            (0, 16),
            (16, 0),
            (128, 64),
            (4, 2, 1, 2, 2),
            (1, 1),
            (128,),
            (512,),
        ]
    )
    return torch.zeros(shape, dtype=torch.uint8).view(dtype) if dtype.itemsize == 1 else torch.zeros(shape, dtype=dtype)


def test_scales_of_activations_change_nothing(comfyui: Path, tmp_path: Path):
    weights = load_file(comfyui / "diffusion_models.safetensors")
    made = weights | {"blocks.0.ffn.0.input_scale": torch.tensor(3.0), "blocks.0.ffn.2.scale_input": torch.tensor(3.0)}
    save_file(made, tmp_path / "x.safetensors")
    found = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


SIZES_OF_GROUPS = [0, -4, 3, 8, 512, 256, "x", None, [4], 1.5, True, 1 << 40, "9" * 5000]


@pytest.mark.parametrize("size", SIZES_OF_GROUPS, ids=lambda size: str(size)[:9])
def test_impossible_rotations_are_refused(comfyui: Path, tmp_path: Path, size: object):
    mark = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": size})
    weights = load_file(comfyui / "diffusion_models.safetensors")
    weights |= {
        "blocks.0.ffn.0.weight": INT8,
        "blocks.0.ffn.0.weight_scale": torch.ones(1),
        "blocks.0.ffn.0.comfy_quant": torch.tensor(list(mark.encode()), dtype=torch.uint8),
    }
    save_file(weights, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match="rotated groups|cannot be turned in groups"):
        open_checkpoint(tmp_path / "x.safetensors")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "net.", "a.b.c."])
def test_a_header_s_names_find_their_tensors_below_any_prefix(comfyui: Path, tmp_path: Path, prefix: str):
    """Of fp8 kept as bytes nothing but the header says what they are."""
    weights, key = load_file(comfyui / "diffusion_models.safetensors"), "blocks.1.ffn.0.weight"
    scale = weights[key].abs().max() / 448
    made = weights | {key: (weights[key] / scale).to(FP8).view(torch.uint8), f"{key}_scale": scale}
    layers = json.dumps({"layers": {"blocks.1.ffn.0": {"format": "float8_e4m3fn"}}})
    save_file(
        {prefix + name: value for name, value in made.items()},
        tmp_path / "x.safetensors",
        metadata={"_quantization_metadata": layers},
    )
    found = open_checkpoint(tmp_path / "x.safetensors").tensor(prefix + key)
    assert torch.equal(found, made[key].view(FP8).float() * scale)
