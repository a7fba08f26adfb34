"""Quantised files load, compute what the dequantised weights compute, and are refused by name when they cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_core
from tests.core.quant_files import fp8_scaled, is_matrix, random_blocks, write_gguf
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.loading.dit import quantised_note, read_dit
from wan_core.memory.build import build_dit
from wan_core.models.dit.dit import WanDiT
from wan_core.quant.gguf import DECODERS
from wan_core.quant.linear import QuantLinear
from wan_core.tools.tiny import TinySizes, make_tiny

SIZES = TinySizes(dim=256, ffn_dim=512, layers=2, text_dim=64)
QUANTISABLE = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")  # by the package gguf

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return make_tiny("t2v-A14B", sizes=SIZES).experts[0]


def velocity(model: WanDiT) -> Tensor:
    torch.manual_seed(1)
    x, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 20, SIZES.text_dim)
    return model(x, torch.tensor([437.0]), context)


def plain_model(weights: Weights, tmp_path: Path) -> WanDiT:
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "plain.safetensors")
    return wan_core.load_dit(tmp_path / "plain.safetensors", dtype=torch.float32)


def in_blocks(key: str, tensor: Tensor) -> bool:
    return is_matrix(key, tensor) and key.startswith("blocks.")


# What is written, and the float32 weights that it means --------------------------


def plain_fp8(dtype: torch.dtype) -> Callable[[Weights, Path], tuple[Path, Weights]]:
    def write(weights: Weights, folder: Path) -> tuple[Path, Weights]:
        cast = {key: value.to(dtype) for key, value in weights.items()}
        save_file(cast, folder / "cast.safetensors")
        return folder / "cast.safetensors", {key: value.float() for key, value in cast.items()}

    return write


def scaled_old(weights: Weights, folder: Path) -> tuple[Path, Weights]:
    made = fp8_scaled(weights)
    save_file(made, folder / "old.safetensors")
    return folder / "old.safetensors", dequantised(made, "scale_weight")


def scaled_header(weights: Weights, folder: Path) -> tuple[Path, Weights]:
    """The header's metadata, names without the prefix that the tensors have, fp8 in a container of bytes."""
    old = fp8_scaled(weights, torch.float8_e5m2)
    scaled = [key.removesuffix(".scale_weight") for key in old if key.endswith("scale_weight")]
    layers = {layer: {"format": "float8_e5m2"} for layer in scaled}
    made = {key.replace("scale_weight", "weight_scale"): value for key, value in old.items() if key != "scaled_fp8"}
    expected = dequantised(made, "weight_scale")
    made = {k: v.view(torch.uint8) if v.dtype is torch.float8_e5m2 else v for k, v in made.items()}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file({f"model.diffusion_model.{k}": v for k, v in made.items()}, folder / "new.safetensors", metadata=metadata)
    return folder / "new.safetensors", expected


def int8_marked(rotation: int) -> Callable[[Weights, Path], tuple[Path, Weights]]:
    def write(weights: Weights, folder: Path) -> tuple[Path, Weights]:
        made, expected = {}, dict(weights)
        mark = {"format": "int8_tensorwise", **({"convrot": True, "convrot_groupsize": rotation} if rotation else {})}
        for key, value in weights.items():
            made[key] = value.contiguous()
            if in_blocks(key, value):
                layer = key.removesuffix(".weight")
                turn = hadamard(rotation) if rotation else torch.ones(1, 1)
                turned = (value.unflatten(1, (-1, len(turn))) @ turn.T).flatten(1)
                scale = turned.abs().amax(dim=1, keepdim=True) / 127
                made[key] = (turned / scale).round().to(torch.int8)
                made[f"{layer}.weight_scale"] = scale
                made[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
                expected[key] = ((made[key] * scale).unflatten(1, (-1, len(turn))) @ turn).flatten(1)
        save_file(made, folder / "int8.safetensors")
        return folder / "int8.safetensors", expected

    return write


def hadamard(size: int) -> Tensor:
    """By its definition: the product of the seed's entries over the digits, base 4, of row and column."""
    seed = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

    def entry(row: int, column: int) -> float:
        value, left = 1.0, size
        while left > 1:
            value, row, column, left = value * seed[row % 4][column % 4], row // 4, column // 4, left // 4
        return value

    return torch.tensor([[entry(i, j) for j in range(size)] for i in range(size)]) / size**0.5


def ggufs(kind: str) -> Callable[[Weights, Path], tuple[Path, Weights]]:
    def write(weights: Weights, folder: Path) -> tuple[Path, Weights]:
        def kind_of(key: str, tensor: Tensor) -> str:
            return kind if is_matrix(key, tensor) else ("F16" if key.endswith("bias") else "F32")

        write_gguf(folder / "model.gguf", weights, kind_of)
        tensors = {t.name: t for t in gguf.GGUFReader(folder / "model.gguf").tensors}
        means = {key: gguf.quants.dequantize(tensors[key].data, tensors[key].tensor_type) for key in weights}
        return folder / "model.gguf", {
            key: torch.tensor(value).view(weights[key].shape).float() for key, value in means.items()
        }

    return write


def dequantised(made: Weights, scale_name: str) -> Weights:
    scales = {key.removesuffix(scale_name) + "weight": value for key, value in made.items() if key.endswith(scale_name)}
    kept = {key: value for key, value in made.items() if not key.endswith(scale_name) and key != "scaled_fp8"}
    return {key: value.float() * scales.get(key, 1) for key, value in kept.items()}


FILES = {
    "fp8_e4m3fn cast": plain_fp8(torch.float8_e4m3fn),
    "fp8_e5m2 cast": plain_fp8(torch.float8_e5m2),
    "fp8 scaled, old marking": scaled_old,
    "fp8 scaled, header": scaled_header,
    "int8": int8_marked(0),
    "int8 rotated": int8_marked(64),
    **{f"GGUF {kind}": ggufs(kind) for kind in ("F16", "BF16", *QUANTISABLE)},
}


@pytest.mark.parametrize("name", FILES)
def test_computes_what_the_dequantised_weights_compute(weights: Weights, tmp_path: Path, name: str):
    """Float32 on the CPU, to 1e-5 of the largest value: products round by where in memory a matrix lies."""
    path, meaning = FILES[name](weights, tmp_path)
    model = wan_core.load_dit(path, dtype=torch.float32)
    expected = velocity(plain_model(meaning, tmp_path))
    assert isinstance(model.blocks[1].ffn[2], QuantLinear) == (name not in ("GGUF F16", "GGUF BF16"))
    assert isinstance(model.text_embedding[0], torch.nn.Linear) and model.head.head.weight.dtype == torch.float32
    assert (velocity(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    exact = velocity(plain_model(weights, tmp_path))
    assert 0 < (expected - exact).abs().max() < 0.5 * exact.abs().max()  # quantised, and still the same model


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_resident_and_swapped(weights: Weights, tmp_path: Path, name: str, dtype: torch.dtype):
    file = read_dit(FILES[name](weights, tmp_path)[0])
    resident = velocity(build_dit(file, dtype=dtype))
    for blocks in (1, 2):
        assert torch.equal(velocity(build_dit(file, dtype=dtype, swap_blocks=blocks)), resident)


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [
        ("fp8 scaled, old marking", "auto", "cpu has no fp8_e4m3fn arithmetic"),
        ("int8", None, "cpu has no int8 arith"),
        ("GGUF Q8_0", "int8", "cpu has no int8 arithmetic"),
        ("GGUF Q8_0", "auto", None),
    ],
)
def test_a_device_without_the_arithmetic_dequantises_and_says_so(
    weights: Weights, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, dtype: str | None, says: str | None
):
    file = read_dit(FILES[name](weights, tmp_path)[0])
    note = quantised_note(file, dtype, "cpu")
    assert says in note if says else note is None
    with caplog.at_level("INFO", logger="wan_core"):
        velocity(build_dit(file, dtype=dtype))
    assert (note in caplog.text) if note else ("arithmetic" not in caplog.text)


@pytest.mark.parametrize("name", ["fp8_e4m3fn", "int8"])
def test_quantised_on_load(weights: Weights, tmp_path: Path, name: str):
    """Measured: 1.6 % (fp8) and 0.6 % (int8) of the velocity's size; held to half as much again."""
    exact = plain_model(weights, tmp_path)
    file = read_dit(tmp_path / "plain.safetensors")
    made = build_dit(file, dtype=name)
    assert made.blocks[0].self_attn.q.data.dtype.itemsize == 1
    expected = velocity(exact)
    error = (velocity(made) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < {"fp8_e4m3fn": 0.025, "int8": 0.009}[name]
    assert torch.equal(velocity(build_dit(file, dtype=name, swap_blocks=1)), velocity(made))


def test_gguf_stays_in_the_mapped_file(weights: Weights, tmp_path: Path):
    path, _ = FILES["GGUF Q4_0"](weights, tmp_path)
    model = wan_core.load_dit(path, dtype=torch.float32)
    maps = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    ranges = [tuple(int(end, 16) for end in entry.split("-")) for entry in maps]
    packed = [layer.data for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert len(packed) == 2 * 10
    assert all(any(start <= data.data_ptr() < end for start, end in ranges) for data in packed)


def test_layers_share_one_scratch_buffer(weights: Weights, tmp_path: Path):
    model = wan_core.load_dit(FILES["GGUF Q8_0"](weights, tmp_path)[0], dtype=torch.float32)
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    velocity(model)
    assert len({id(layer.scratch) for layer in layers}) == 1
    assert layers[0].scratch.buffer.numel() == 256 * 512  # the largest matrix


@pytest.mark.parametrize("kind", DECODERS)
def test_every_block_type_reads_from_a_file(tmp_path: Path, kind: str):
    data = random_blocks(kind, 6, 512)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    writer.add_tensor("odd", torch.arange(5, dtype=torch.float32).numpy())  # what follows is aligned anew
    writer.add_tensor("matrix.weight", data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.tensors["matrix.weight"].shape == (6, 512)
    expected = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    assert torch.equal(checkpoint.tensor("matrix.weight"), torch.tensor(expected))
    assert checkpoint.stored_bytes("matrix.weight") == data.nbytes and checkpoint.stored_bytes("odd") == 20
    assert torch.equal(checkpoint.tensor("odd"), torch.arange(5.0))


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind not in QUANTISABLE])
def test_block_types_that_only_llama_cpp_makes(weights: Weights, tmp_path: Path, kind: str):
    """Random blocks as a model's matrices: the velocity of what the package says they mean."""
    writer = gguf.GGUFWriter(str(tmp_path / "k.gguf"), "wan")
    meaning = dict(weights)
    for seed, (key, value) in enumerate(weights.items()):
        if in_blocks(key, value):
            data = random_blocks(kind, *value.shape, seed=seed)
            writer.add_tensor(key, data, raw_dtype=GGMLQuantizationType[kind])
            meaning[key] = torch.tensor(gguf.quants.dequantize(data, GGMLQuantizationType[kind]))
        else:
            writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = wan_core.load_dit(tmp_path / "k.gguf", dtype=torch.float32)
    expected = velocity(plain_model(meaning, tmp_path))
    assert isinstance(model.blocks[0].ffn[0], QuantLinear) and expected.isfinite().all()
    assert (velocity(model) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_gradients_flow_through_a_packed_layer(weights: Weights, tmp_path: Path):
    """The scratch buffer holds another matrix when backward runs."""
    model = wan_core.load_dit(FILES["GGUF Q8_0"](weights, tmp_path)[0], dtype=torch.float32)
    first, second = model.blocks[0].ffn[0], model.blocks[0].ffn[2]
    x = torch.randn(3, 256, requires_grad=True)
    second(first(x)).sum().backward()
    expected = second.packed.dequantise().sum(dim=0) @ first.packed.dequantise()
    assert torch.allclose(x.grad, expected.expand(3, -1), rtol=1e-4, atol=1e-5)


# Mistakes ------------------------------------------------------------------------


def test_gguf_of_another_architecture(weights: Weights, tmp_path: Path):
    write_gguf(
        tmp_path / "x.gguf",
        {"double_blocks.0.img_attn.proj.weight": torch.zeros(4, 32)},
        lambda *_: "F16",
        architecture="flux",
    )
    with pytest.raises(WanError, match="a GGUF file of the architecture 'flux'; expected wan or t5encoder"):
        read_dit(tmp_path / "x.gguf")
    write_gguf(tmp_path / "y.gguf", weights, lambda *_: "F32", architecture="flux")
    with pytest.raises(WanError, match="architecture 'flux'"):
        read_dit(tmp_path / "y.gguf")


def test_an_unknown_gguf_type_is_named(tmp_path: Path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "wan")
    writer.add_tensor_info("a.weight", (1, 256), "uint8", 66, GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(WanError, match=r"a.weight in the quantisation type IQ2_XXS.*Expected one of F32, F16"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize("keep", [6, 60, 0.5, 0.99], ids=str)
def test_truncated_gguf(weights: Weights, tmp_path: Path, keep: float):
    path, _ = FILES["GGUF Q8_0"](weights, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else len(content) * keep)])
    with pytest.raises(WanError, match="truncated or corrupt"):
        read_dit(path)


@pytest.mark.parametrize(
    ("mark", "message"),
    [
        ({"format": "asym_w4a8_int8"}, "'asym_w4a8_int8', which this version does not read"),
        ({"fmt": 1}, "does not name a format"),
    ],
)
def test_an_unknown_format_is_named(weights: Weights, tmp_path: Path, mark: dict, message: str):
    made = dict(fp8_scaled(weights))
    made["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    save_file(made, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match=message):
        read_dit(tmp_path / "x.safetensors")


def test_block_wise_and_missing_scales_are_refused(weights: Weights, tmp_path: Path):
    key = "blocks.0.ffn.0.scale_weight"
    save_file(fp8_scaled(weights) | {key: torch.ones(4, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match=r"shape \[4, 2\] for a matrix of \[512, 256\]; expected one scale"):
        read_dit(tmp_path / "x.safetensors")
    path, _ = FILES["int8"](weights, tmp_path)
    made = load_file(path)
    del made["blocks.0.ffn.0.weight_scale"]
    save_file(made, path)
    with pytest.raises(WanError, match="lacks blocks.0.ffn.0.weight_scale"):
        read_dit(path)
    del made["blocks.0.ffn.0.comfy_quant"]
    save_file(made, path)
    with pytest.raises(WanError, match="blocks.0.ffn.0.weight as int8 without saying how"):
        read_dit(path)
