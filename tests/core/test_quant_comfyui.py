"""fp8-scaled and int8 files mean to us what they mean to ComfyUI: every weight to the bit.

The files are read by ComfyUI's own loader, in a process of its own, and for int8, which it reads since 0.27, by the
library that it reads them with, comfy-kitchen.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout
from safetensors.torch import save_file
from torch import Tensor

import wan_core
from tests.core.quant_files import fp8_scaled
from wan_core.models.dit.dit import WanDiT
from wan_core.quant.linear import QuantLinear
from wan_core.quant.registry import MADE_ON_LOAD
from wan_core.tools.tiny import TinySizes, make_tiny

SIZES = TinySizes(dim=256, ffn_dim=256, layers=2, text_dim=4096)  # ComfyUI takes the width of the text as given

_LOAD = """
import comfy.sd
model = comfy.sd.load_diffusion_model(inputs["path"], model_options={"dtype": torch.float32}).model.diffusion_model
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) or hasattr(module, "in_features"):
        weight = module.weight
        if hasattr(module, "convert_weight"):
            weight = module.convert_weight(weight)
        outputs[name + ".weight"] = weight.detach().clone().float()
with torch.no_grad():
    outputs["velocity"] = model(inputs["x"], inputs["t"], inputs["context"]).float()
"""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return make_tiny("t2v-A14B", sizes=SIZES).experts[0]


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    x, context = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 20, 4096)
    return {"x": x, "t": torch.tensor([437.0]), "context": context}


def matrices(model: WanDiT) -> dict[str, Tensor]:
    """Every linear layer's weight in float32, dequantised where it is packed."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantLinear, torch.nn.Linear)):
            found[f"{name}.weight"] = layer.packed.dequantise() if isinstance(layer, QuantLinear) else layer.weight
    return found


def assert_equals_comfyui(in_comfyui, path: Path, *, packed: int) -> None:
    """Weights to the bit; the velocity to 2e-5 of its largest value, as of unquantised models."""
    model = wan_core.load_dit(path, dtype=torch.float32)
    assert sum(isinstance(layer, QuantLinear) for layer in model.modules()) == packed
    ours, theirs = matrices(model), in_comfyui(_LOAD, path=str(path), **inputs())
    assert len(ours) == 2 * 10 + 6
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    velocity = model(*inputs().values())
    assert (velocity - theirs["velocity"]).abs().max() <= 2e-5 * velocity.abs().max()


@pytest.mark.parametrize("full_precision", [True, False])
def test_fp8_scaled_in_the_old_marking(in_comfyui, weights, tmp_path: Path, full_precision: bool):
    """Biases are numbers that fp8 can hold: ComfyUI up to 0.3.75 rounds those of such files to fp8, later not."""
    biases = {key: value.to(torch.float8_e4m3fn).float() for key, value in weights.items() if key.endswith("bias")}
    made = fp8_scaled(weights | biases)
    made["scaled_fp8"] = torch.zeros(2 if full_precision else 0, dtype=torch.float8_e4m3fn)
    save_file(made, tmp_path / "old.safetensors")
    assert_equals_comfyui(in_comfyui, tmp_path / "old.safetensors", packed=20)


def test_fp8_scaled_in_the_headers_marking(in_comfyui, weights, tmp_path: Path):
    made = {key.replace("scale_weight", "weight_scale"): value for key, value in fp8_scaled(weights).items()}
    del made["scaled_fp8"]
    layers = {key.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for key in made if "weight_scale" in key}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(made, tmp_path / "new.safetensors", metadata=metadata)
    assert_equals_comfyui(in_comfyui, tmp_path / "new.safetensors", packed=20)


def test_plain_fp8(in_comfyui, weights, tmp_path: Path):
    """Biases and norms too are fp8 in such a file; ComfyUI casts them as we do."""
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in weights.items()}, tmp_path / "cast.safetensors")
    assert_equals_comfyui(in_comfyui, tmp_path / "cast.safetensors", packed=20)


@pytest.mark.parametrize("rotation", [0, 64])
def test_int8(weights, tmp_path: Path, rotation: int):
    """Packed by ComfyUI's library, read by us. Its rotation back may sum in another order: 1e-6 of the largest."""
    made, expected = dict(weights), {}
    for key in [key for key in weights if key.startswith("blocks.0.") and weights[key].ndim == 2]:
        data, params = TensorWiseINT8Layout.quantize(
            weights[key], per_channel=True, convrot=bool(rotation), convrot_groupsize=rotation or 256
        )
        expected[key] = QuantizedTensor(data, "TensorWiseINT8Layout", params).dequantize()
        options = {"convrot": True, "convrot_groupsize": rotation} if rotation else {}
        mark = json.dumps({"format": "int8_tensorwise", **options}).encode()
        made |= {
            key: data,
            f"{key}_scale": params.scale,
            key.removesuffix("weight") + "comfy_quant": torch.tensor(list(mark), dtype=torch.uint8),
        }
    save_file(made, tmp_path / "int8.safetensors")
    ours = matrices(wan_core.load_dit(tmp_path / "int8.safetensors", dtype=torch.float32))
    assert len(expected) == 10
    for key, value in expected.items():
        assert (ours[key] - value).abs().max() <= (1e-6 if rotation else 0) * value.abs().max(), key


def test_our_int8_is_theirs(weights):
    """Rounded to the same integers with the same scales, but for ties of float32."""
    weight = weights["blocks.0.ffn.0.weight"]
    theirs, params = TensorWiseINT8Layout.quantize(weight, per_channel=True)
    ours = MADE_ON_LOAD["int8"].pack(weight).parts
    assert torch.equal(ours["scale"], params.scale)
    assert (ours["data"] != theirs).float().mean() < 1e-4
