"""nvfp4 and mxfp8, bit for bit, and int4: what comfy-kitchen, with which ComfyUI computes, makes of such numbers."""

from __future__ import annotations

import json
from pathlib import Path

import comfy_kitchen.backends.eager.quantization as kitchen
import pytest
import torch
from comfy_kitchen.backends.eager.convrot_w4a4 import dequantize_convrot_w4a4_weight, quantize_convrot_w4a4_weight
from comfy_kitchen.float_utils import from_blocked, to_blocked
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_core
from tests.core.test_quant_read import SIZES, in_blocks, plain_model, velocity
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.loading.dit import read_dit
from wan_core.lora.apply import adaptation_of
from wan_core.lora.files import read_lora
from wan_core.memory.build import build_dit
from wan_core.quant.base import Packed
from wan_core.quant.block_scaled import from_tiles, in_tiles, tiles_shape
from wan_core.quant.linear import QuantLinear
from wan_core.quant.mxfp8 import MXFP8
from wan_core.quant.nvfp4 import NVFP4
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, make_tiny, write_tiny

Weights = dict[str, Tensor]
FORMATS = ("nvfp4", "mxfp8")
E8M0 = torch.float8_e8m0fnu


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_tiny("t2v-A14B", sizes=SIZES).experts[0]


def hard_numbers(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Of all sizes, with blocks of zeros, ties of rounding, outliers and negative zeros."""
    torch.manual_seed(seed)
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp() * torch.randn(1, columns).exp()
    x[: rows // 4] = torch.randint(-24, 25, (rows // 4, columns)) / 4
    x[rows // 2, :64] = 0
    x[rows // 2, 64:70] = -0.0
    x[rows // 3, 5] = 1e4
    x[rows // 3 + 1] *= 1e-12
    return x


def quantised(name: str, weight: Tensor) -> dict[str, Tensor]:
    """By comfy-kitchen, under the ends of names that ComfyUI saves them with."""
    if name == "mxfp8":
        data, scale = kitchen.quantize_mxfp8(weight)
        return {"": data, "_scale": scale}
    whole = weight.abs().amax() / (448 * 6)
    data, scale = kitchen.quantize_nvfp4(weight, whole)
    return {"": data, "_scale": scale, "_scale_2": whole}


def meaning(name: str, made: dict[str, Tensor]) -> Tensor:
    if name == "mxfp8":
        return kitchen.dequantize_mxfp8(made[""], made["_scale"], torch.float32)
    return kitchen.dequantize_nvfp4(made[""], made["_scale_2"], made["_scale"], torch.float32)


def mark_bytes(mark: dict) -> Tensor:
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def write(weights: Weights, file: Path, name: str, *, as_bytes: bool = False, header: bool = False) -> Weights:
    """A file as ComfyUI saves it, and the float32 weights that it means."""
    made, expected, layers = {}, dict(weights), {}
    for key, value in weights.items():
        made[key] = value.contiguous()
        if not in_blocks(key, value):
            continue
        layer, parts = key.removesuffix(".weight"), quantised(name, value)
        expected[key] = meaning(name, parts)
        if as_bytes:
            parts["_scale"] = parts["_scale"].view(torch.uint8)
        made |= {key + end: part for end, part in parts.items()}
        if header:
            layers[layer] = {"format": name}
        else:
            made[f"{layer}.comfy_quant"] = mark_bytes({"format": name})
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if header else None
    save_file(made, file, metadata=metadata)
    return expected


# The formats ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (5, 3), (200, 17), (300, 8)], ids=str)
def test_tiles_are_the_libraries_tiles(shape: tuple[int, int]):
    scale = torch.randint(0, 256, shape, dtype=torch.uint8)
    tiles = in_tiles(scale)
    assert torch.equal(tiles, to_blocked(scale, flatten=False)) and tiles.shape == tiles_shape(*shape)
    assert torch.equal(from_tiles(tiles, torch.arange(shape[0]), shape[1]), scale)
    some = torch.tensor([0, shape[0] - 1, shape[0] // 2])
    assert torch.equal(from_tiles(tiles.flatten(), some, shape[1]), scale[some])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 256), (160, 96), (16, 16 * 6), (1024, 2080)], ids=str)
def test_dequantised_as_the_library_does(name: str, shape: tuple[int, int]):
    made = quantised(name, hard_numbers(*shape))
    kind = {"nvfp4": NVFP4(), "mxfp8": MXFP8()}[name]
    stored = {"data": made[""], "tiles": made["_scale"]} | ({"whole": made["_scale_2"]} if name == "nvfp4" else {})
    packed = Packed(kind, kind.prepared(stored))
    expected = meaning(name, made)
    assert packed.shape == shape
    assert torch.equal(packed.dequantise(), expected)
    for index in (slice(3, 7), torch.tensor([5, 0, 5])):
        assert torch.equal(Packed(kind, dict(kind.rows(packed.parts, index))).dequantise(), expected[index])
    rounded = packed.dequantise(torch.bfloat16)
    assert torch.equal(rounded, expected.bfloat16())


@pytest.mark.parametrize("name", FORMATS)
def test_every_byte_means_what_it_means_to_the_library(name: str):
    """All numbers under all scales, infinities and not-a-numbers as well."""
    torch.manual_seed(3)
    columns, rows = 256, 256
    data = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    blocks = columns // 32 if name == "mxfp8" else columns * 2 // 16
    scale = in_tiles(torch.arange(256, dtype=torch.uint8)[:, None].expand(rows, blocks).contiguous())
    if name == "mxfp8":
        stored = {"data": data.view(torch.float8_e4m3fn), "tiles": scale.view(E8M0)}
        ours, theirs = MXFP8(), kitchen.dequantize_mxfp8(stored["data"], stored["tiles"], torch.float32)
    else:
        whole = torch.tensor(0.37)
        stored = {"data": data, "tiles": scale.view(torch.float8_e4m3fn), "whole": whole}
        ours, theirs = NVFP4(), kitchen.dequantize_nvfp4(data, whole, stored["tiles"], torch.float32)
    made = Packed(ours, ours.prepared(stored)).dequantise()
    assert torch.equal(made.isnan(), theirs.isnan()) and torch.equal(made.nan_to_num(), theirs.nan_to_num())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_packed_as_the_library_packs(name: str, seed: int):
    x = hard_numbers(160, 256, seed)
    made = quantised(name, x)
    if name == "mxfp8":
        parts = MXFP8().pack(x)
    else:
        parts = NVFP4().pack(x, NVFP4().factor(x.abs().amax()))
        assert torch.equal(parts["whole"].view(()), made["_scale_2"])
    assert torch.equal(parts["data"].view(torch.uint8), made[""].view(torch.uint8))
    assert torch.equal(in_tiles(parts["scale"]), made["_scale"].view(torch.uint8))


# Files ---------------------------------------------------------------------------

VARIANTS = {"tiles": {}, "bytes": {"as_bytes": True}, "header": {"header": True}}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_mean_what_the_library_says(weights: Weights, tmp_path: Path, name: str, variant: str):
    expected = write(weights, tmp_path / "x.safetensors", name, **VARIANTS[variant])
    checkpoint = open_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.shapes == {key: tuple(value.shape) for key, value in weights.items()}
    assert all(torch.equal(checkpoint.tensor(key).float(), value) for key, value in expected.items())
    model = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32)
    assert isinstance(model.blocks[0].ffn[0], QuantLinear)
    plain = velocity(plain_model(expected, tmp_path))
    assert (velocity(model) - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_scales_row_by_row_where_their_shape_says_so(tmp_path: Path, name: str):
    """A matrix whose scales fill whole tiles has them in tiles, as ComfyUI reads them."""
    made = quantised(name, hard_numbers(160, 96))
    expected = meaning(name, made)
    rows = from_blocked(made["_scale"].view(torch.uint8), 160, 96 // (32 if name == "mxfp8" else 16))
    made["_scale"] = rows.contiguous().view(made["_scale"].dtype)
    save_file(
        {f"m.weight{end}": part for end, part in made.items()} | {"m.comfy_quant": mark_bytes({"format": name})},
        tmp_path / "x.safetensors",
    )
    assert torch.equal(open_checkpoint(tmp_path / "x.safetensors").tensor("m.weight"), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_resident_and_swapped(weights: Weights, tmp_path: Path, name: str, dtype: torch.dtype):
    write(weights, tmp_path / "x.safetensors", name)
    file = read_dit(tmp_path / "x.safetensors")
    resident = velocity(build_dit(file, dtype=dtype))
    for blocks in (1, 2):
        assert torch.equal(velocity(build_dit(file, dtype=dtype, swap_blocks=blocks)), resident)


@pytest.mark.parametrize("name", FORMATS)
def test_the_file_stays_mapped(weights: Weights, tmp_path: Path, name: str):
    """A matrix's numbers: none is copied while a model is loaded. Its scales, a sixteenth, come to memory."""
    write(weights, tmp_path / "x.safetensors", name)
    model = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32)
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    ranges = [tuple(int(end, 16) for end in entry.split("-")) for entry in maps]
    parts = [layer.data for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert len(parts) == 20
    assert all(any(start <= part.data_ptr() < end for start, end in ranges) for part in parts)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("swap", [0, 2])
def test_a_lora_works_in_the_dequantised_space(weights: Weights, tmp_path: Path, name: str, swap: int):
    """As on plain float32 weights of the same meaning; also one that can only be merged (LoHa)."""
    expected = write(weights, tmp_path / "x.safetensors", name)
    save_file({key: value.contiguous() for key, value in expected.items()}, tmp_path / "plain.safetensors")
    torch.manual_seed(4)
    lora = {}
    for layer, (out, into) in {"blocks.0.self_attn.q": (256, 256), "blocks.1.ffn.0": (512, 256)}.items():
        lora[f"diffusion_model.{layer}.lora_A.weight"] = torch.randn(4, into) / 16
        lora[f"diffusion_model.{layer}.lora_B.weight"] = torch.randn(out, 4) / 16
    loha = "diffusion_model.blocks.1.self_attn.k.hada_"
    lora |= {
        f"{loha}w1_a": torch.randn(256, 4) / 8,
        f"{loha}w1_b": torch.randn(4, 256) / 8,
        f"{loha}w2_a": torch.randn(256, 4) / 8,
        f"{loha}w2_b": torch.randn(4, 256) / 8,
    }
    save_file(lora, tmp_path / "lora.safetensors")
    answers = []
    for path, blocks in ((tmp_path / "x.safetensors", swap), (tmp_path / "plain.safetensors", 0)):
        file = read_dit(path)
        model = build_dit(file, dtype=torch.float32, swap_blocks=blocks)
        bare = velocity(model)
        adaptation_of(model, file).set([read_lora(tmp_path / "lora.safetensors", file)], [0.8])
        answers.append(velocity(model))
    assert (answers[0] - answers[1]).abs().max() <= 1e-5 * answers[1].abs().max()
    assert (answers[1] - bare).abs().max() > 1e-3 * bare.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_what_convert_writes_is_what_the_library_makes(weights: Weights, tmp_path: Path, name: str):
    """Tensor by tensor, and in ComfyUI's names, types and marking."""
    write(weights, tmp_path / "theirs.safetensors", name, header=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", tmp_path / "ours.safetensors", name)
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert {key: (value.dtype, value.shape) for key, value in ours.items()} == {
        key: (value.dtype, value.shape) for key, value in theirs.items()
    }
    for key, value in ours.items():
        assert (
            value.numpy(force=True).tobytes() == theirs[key].numpy(force=True).tobytes()
            if (value.dtype.itemsize > 1)
            else torch.equal(value.view(torch.uint8), theirs[key].view(torch.uint8))
        ), key
    marks = [
        json.loads(open_checkpoint(tmp_path / f"{one}.safetensors").metadata["_quantization_metadata"])["layers"]
        for one in ("ours", "theirs")
    ]
    assert marks[0] == marks[1]


@pytest.mark.parametrize("name", FORMATS)
def test_columns_with_scales_of_their_own(weights: Weights, tmp_path: Path, name: str):
    """AWQ's ``pre_quant_scale`` multiplies the input, column by column."""
    key, layer = "blocks.0.ffn.0.weight", "blocks.0.ffn.0"
    expected = write(weights, tmp_path / "x.safetensors", name)
    made, smooth = load_file(tmp_path / "x.safetensors"), torch.rand(256) + 0.5
    save_file(made | {f"{layer}.pre_quant_scale": smooth.bfloat16()}, tmp_path / "x.safetensors")
    model = wan_core.load_dit(tmp_path / "x.safetensors", dtype=torch.float32)
    assert torch.equal(model.get_submodule(layer).packed.dequantise(), expected[key] * smooth.bfloat16().float())
    plain = velocity(plain_model(expected | {key: expected[key] * smooth.bfloat16().float()}, tmp_path))
    assert (velocity(model) - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_a_text_encoder_with_its_table(tmp_path: Path, name: str):
    """Of a packed table only the rows of a prompt's tokens are decoded."""
    sizes = TinySizes(dim=128, ffn_dim=128, layers=1, text_dim=64, text_layers=1, text_attention=64, text_ffn=96)
    write_tiny(tmp_path, "t2v-A14B", layout="comfyui", sizes=sizes)
    convert(next((tmp_path / "text_encoders").iterdir()), tmp_path / "wide.safetensors", "fp32")
    plain = load_file(tmp_path / "wide.safetensors")
    made = dict(plain)
    for key in [key for key, value in plain.items() if value.ndim == 2 and "relative" not in key]:
        parts = quantised(name, plain[key])
        plain[key] = meaning(name, parts)
        made |= {key + end: part for end, part in parts.items()}
        made[f"{key.removesuffix('.weight')}.comfy_quant"] = mark_bytes({"format": name})
    save_file(made, tmp_path / "made.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    ours, exact = (
        wan_core.load_text_encoder(tmp_path / f"{one}.safetensors", dtype=torch.float32) for one in ("made", "plain")
    )
    assert type(ours.encoder.token_embedding).__name__ == "QuantEmbedding"
    for prompt in ("a white cat", "暖色调 a b c"):
        expected = exact([prompt])
        assert (ours([prompt]) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("group", [4, 64, 256])
def test_int4_in_a_rotated_basis(weights: Weights, tmp_path: Path, group: int):
    """ComfyUI's ``convrot_w4a4``, to 1e-6 of the largest value: the rotation is a sum in float32."""
    key, layer = "blocks.0.ffn.0.weight", "blocks.0.ffn.0"
    data, scale = quantize_convrot_w4a4_weight(weights[key], group)
    data[:16] = torch.arange(16 * 128).view(16, 128).to(torch.uint8).view(torch.int8)  # every byte
    expected = dequantize_convrot_w4a4_weight(data, scale, group)
    made = {name: value.contiguous() for name, value in weights.items()}
    made |= {
        key: data,
        f"{key}_scale": scale,
        f"{layer}.comfy_quant": mark_bytes({"format": "convrot_w4a4", "convrot_groupsize": group}),
    }
    save_file(made, tmp_path / "x.safetensors")
    file = read_dit(tmp_path / "x.safetensors")
    model = build_dit(file, dtype=torch.float32)
    assert model.get_submodule(layer).format.name == f"int4_rotated_{group}"
    assert (model.get_submodule(layer).packed.dequantise() - expected).abs().max() <= 1e-6 * expected.abs().max()
    plain = velocity(plain_model({**weights, key: expected}, tmp_path))
    assert (velocity(model) - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert torch.equal(velocity(build_dit(file, dtype=torch.float32, swap_blocks=2)), velocity(model))


# Mistakes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("nvfp4", {"_scale_2": None}, "lacks or mixes scales of blocks.0.ffn.0.weight, which is nvfp4"),
        ("nvfp4", {"_scale": None}, "lacks or mixes scales"),
        ("mxfp8", {"_scale": None}, "lacks or mixes scales of blocks.0.ffn.0.weight, which is mxfp8"),
        ("mxfp8", {"_scale_2": torch.ones(())}, "lacks or mixes scales"),
        ("nvfp4", {"_scale": torch.ones(512, 8).to(torch.float8_e4m3fn)}, r"\[512, 8\] of torch.float8_e4m3fn"),
        ("nvfp4", {"_scale": torch.ones(512, 16)}, "of torch.float32 for a nvfp4 matrix"),
        ("nvfp4", {"_scale_2": torch.ones(512)}, "one number was expected"),
        ("nvfp4", {"": torch.ones(512, 256)}, "of torch.float32, which is no nvfp4 matrix"),
        ("mxfp8", {"": torch.ones(512, 256, dtype=torch.bfloat16)}, "which is no mxfp8 matrix"),
        ("mxfp8", {".comfy_quant": None}, "looks like mxfp8, but no marking says how its scales are laid out"),
        ("nvfp4", {".comfy_quant": None}, "looks like nvfp4, but no marking says how its numbers and scales"),
        ("nvfp4", {"_scale": None, "_scale_2": None, ".comfy_quant": None}, "ffn.0.weight as U8, without a marking"),
    ],
)
def test_what_is_missing_or_misshapen_is_named(weights: Weights, tmp_path: Path, name: str, change: dict, message: str):
    write(weights, tmp_path / "x.safetensors", name)
    made = load_file(tmp_path / "x.safetensors")
    for end, tensor in change.items():
        key = "blocks.0.ffn.0" + (end if end.startswith(".") else f".weight{end}")
        made.pop(key, None)
        made |= {} if tensor is None else {key: tensor}
    save_file(made, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match=message) as raised:
        read_dit(tmp_path / "x.safetensors")
    assert "corrupt" not in str(raised.value) and "Download it again" not in str(raised.value)


def test_matrices_that_are_no_whole_blocks_stay_as_they_are(weights: Weights, tmp_path: Path):
    odd = {key: value.contiguous() for key, value in weights.items()}
    for block in range(2):
        odd[f"blocks.{block}.ffn.0.weight"] = odd[f"blocks.{block}.ffn.0.weight"][:500].contiguous()
        odd[f"blocks.{block}.ffn.0.bias"] = odd[f"blocks.{block}.ffn.0.bias"][:500].contiguous()
        odd[f"blocks.{block}.ffn.2.weight"] = odd[f"blocks.{block}.ffn.2.weight"][:, :500].contiguous()
    save_file(odd, tmp_path / "odd.safetensors")
    report = convert(tmp_path / "odd.safetensors", tmp_path / "x.safetensors", "nvfp4")
    assert len(report.notes) == 4
    assert "ffn.0.weight is [500, 256], which nvfp4 cannot cut into blocks of 16" in report.notes[0]
    velocity(wan_core.load_dit(tmp_path / "x.safetensors"))
