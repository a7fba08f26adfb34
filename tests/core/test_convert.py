"""Conversion: what is written means the same, others read it, and nothing half-done is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

import wan_core
from tests.core.test_checkpoints import write_sparse
from wan_core.__main__ import main
from wan_core.config import Architecture
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.layouts.gguf_tokenizer import spiece_beside
from wan_core.models.dit.dit import WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokens
from wan_core.quant.base import Packed
from wan_core.quant.linear import QuantLinear
from wan_core.tools import convert as conversion
from wan_core.tools.convert import TARGETS, convert
from wan_core.tools.tiny import TinySizes, write_tiny

ROOT = Path(__file__).resolve().parents[2]
SIZES = TinySizes(dim=256, ffn_dim=512, layers=2, text_dim=64, text_layers=2, text_attention=64, text_ffn=96)
PACKED = ("fp8_scaled", "int8", "mxfp8", "nvfp4")
PARTS = (".data", ".scale", ".tiles", ".whole")  # of a packed matrix
FOLDERS = ("official", "diffusers")

# Relative root mean square error of the worst matrix of random normal weights, measured, plus a tenth.
WORST = {"fp8_scaled": 0.030, "int8": 0.0083, "mxfp8": 0.030, "nvfp4": 0.11, "gguf:Q8_0": 0.0060, "gguf:Q5_1": 0.043,
         "gguf:Q5_0": 0.048, "gguf:Q4_1": 0.087, "gguf:Q4_0": 0.096, "gguf:F16": 0.0003, "gguf:BF16": 0.0019,
         "bf16": 0.0026, "fp16": 0.0004}  # fmt: skip
EXACT = ("fp32", "official", "comfyui", "diffusers")


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    write_tiny(folder, "t2v-A14B", layout="comfyui", sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def dit(comfyui: Path) -> Path:
    return comfyui / "diffusion_models/wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors"


@pytest.fixture(scope="module")
def text(comfyui: Path) -> Path:
    return next((comfyui / "text_encoders").iterdir())


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """By our keys, packed ones dequantised."""
    found = {key: value for key, value in model.state_dict().items() if not key.endswith(PARTS)}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            found[f"{name}.weight"] = layer.packed.dequantise()
    return found


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).square().sum() / exact.double().square().sum()).sqrt().item()


def out(folder: Path, to: str) -> Path:
    return folder / ("made" + (".gguf" if to.startswith("gguf") else "" if to in FOLDERS else ".safetensors"))


@pytest.mark.parametrize("to", TARGETS)
def test_a_diffusion_model_in_every_format(dit: Path, tmp_path: Path, to: str):
    exact = wan_core.load_dit(dit, dtype=torch.float32)
    report = convert(dit, out(tmp_path, to), to)
    made = weights_of(wan_core.load_dit(out(tmp_path, to), dtype=torch.float32))
    errors = {key: relative(made[key], value) for key, value in exact.state_dict().items()}
    assert {key: error for key, error in errors.items() if error} == pytest.approx(report.errors, rel=1e-3)
    assert max(errors.values()) <= (0 if to in EXACT else WORST[to])
    if to in PACKED or to.startswith("gguf:Q"):  # outside the blocks, and norms: as they were
        assert {key for key, error in errors.items() if error} == {
            key for key in errors if key.startswith("blocks.") and key.endswith("weight") and "norm" not in key
        }
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("to", [*PACKED, "gguf:Q8_0", "bf16", "official", "comfyui", "diffusers"])
def test_a_text_encoder_in_every_layout(text: Path, tmp_path: Path, to: str):
    """ComfyUI's file and GGUF carry the tokenizer along."""
    target = tmp_path / {"official": "umt5.pth", "diffusers": "text_encoder"}.get(to, out(tmp_path, to).name)
    convert(text, target, to)
    tokenizer = spiece_beside(open_checkpoint(text)) if to in FOLDERS else None
    made = wan_core.load_text_encoder(target, dtype=torch.float32, tokenizer=tokenizer)
    exact = wan_core.load_text_encoder(text, dtype=torch.float32)
    prompts = ["a white cat on a surfboard", "暖色调"]
    assert [made.tokenizer.encode(one) for one in prompts] == [exact.tokenizer.encode(one) for one in prompts]
    limit = {"fp8_scaled": 0.2, "mxfp8": 0.2, "nvfp4": 0.5, "int8": 0.05, "gguf:Q8_0": 0.05, "bf16": 0.02}.get(to, 1e-6)
    assert relative(made(prompts), exact(prompts)) <= limit


@pytest.mark.parametrize("to", ["bf16", "official", "diffusers"])
def test_a_vae(comfyui: Path, tmp_path: Path, to: str):
    source = next((comfyui / "vae").iterdir())
    target = tmp_path / {"official": "vae.pth", "diffusers": "vae"}.get(to, "vae.safetensors")
    convert(source, target, to)
    made, exact = wan_core.load_vae(target).state_dict(), wan_core.load_vae(source).state_dict()
    assert all(relative(made[key], value) <= (0.0025 if to == "bf16" else 0) for key, value in exact.items())
    with pytest.raises(WanError, match="is a VAE: it is small and stays in full precision"):
        convert(source, tmp_path / "x.gguf", "gguf:Q8_0")


@pytest.mark.parametrize("between", [*PACKED, "gguf:Q8_0"])
def test_quantised_files_convert_too(dit: Path, tmp_path: Path, between: str):
    """Back in float32 they are what they meant; bfloat16 is the layouts' dtype for them."""
    convert(dit, out(tmp_path, between), between)
    packed = weights_of(wan_core.load_dit(out(tmp_path, between), dtype=torch.float32))
    convert(out(tmp_path, between), tmp_path / "wide.safetensors", "fp32")
    wide = wan_core.load_dit(tmp_path / "wide.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(wide[key], value) for key, value in packed.items())
    convert(out(tmp_path, between), tmp_path / "folder", "official")
    official = open_checkpoint(tmp_path / "folder")
    assert official.tensors["blocks.0.ffn.0.weight"].dtype == torch.bfloat16
    assert official.tensors["blocks.0.norm3.weight"].dtype == torch.float32


def test_official_folders_are_sharded_and_described(dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(conversion, "_SHARD", 4_000_000)
    convert(dit, tmp_path / "high_noise_model", "official")
    names = sorted(path.name for path in (tmp_path / "high_noise_model").iterdir())
    assert names[:2] == ["config.json", "diffusion_pytorch_model-00001-of-00003.safetensors"]
    config = json.loads((tmp_path / "high_noise_model/config.json").read_text())
    assert (config["model_type"], config["dim"], config["num_layers"]) == ("t2v", 256, 2)


def test_diffusers_reads_its_layout(dit: Path, tmp_path: Path):
    convert(dit, tmp_path / "transformer", "diffusers")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    x, t, context = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 20, SIZES.text_dim)
    ours = wan_core.load_dit(dit, dtype=torch.float32)(x, t, context)
    assert (theirs(x, t, context).sample - ours).abs().max() <= 2e-5 * ours.abs().max()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that hear a picture, and two, as ComfyUI's files are."""
    folder = tmp_path_factory.mktemp("pictured")
    for task in ("i2v-14B", "flf2v-14B"):
        write_tiny(folder / task, task, layout="comfyui", sizes=replace(SIZES, text_layers=1, clip_layers=2))
    return {task: next((folder / task / "diffusion_models").iterdir()) for task in ("i2v-14B", "flf2v-14B")}


@pytest.mark.parametrize("to", [*PACKED, "gguf:Q8_0", "gguf:Q4_0", "gguf:BF16", "fp16"])
@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_the_layers_of_the_picture_in_every_format(pictured: dict[str, Path], tmp_path: Path, task: str, to: str):
    """Matrices of the blocks are packed, those of the picture's keys and values too; all outside stays as it was."""
    exact = wan_core.load_dit(pictured[task], dtype=torch.float32)
    convert(pictured[task], out(tmp_path, to), to)
    loaded = wan_core.load_dit(out(tmp_path, to), dtype=torch.float32)
    assert loaded.config == exact.config and len(loaded.config.features) == 1
    made, keys = weights_of(loaded), exact.state_dict()
    errors = {key: relative(made[key], value) for key, value in keys.items()}
    assert max(errors.values()) <= WORST[to]
    image = [f"blocks.{i}.cross_attn.{part}.weight" for i in range(2) for part in ("k_img", "v_img")]
    assert all(errors[key] > 0 for key in image)
    if to in PACKED or to.startswith("gguf:Q"):
        assert all(isinstance(loaded.get_submodule(key.removesuffix(".weight")), QuantLinear) for key in image)
        assert not [key for key in keys if (key.startswith("img_emb") or "norm_k_img" in key) and errors[key]]


@pytest.mark.parametrize("task", ["i2v-14B", "flf2v-14B"])
def test_the_layers_of_the_picture_in_every_layout(pictured: dict[str, Path], tmp_path: Path, task: str):
    """ComfyUI's to diffusers', to the official, and back: the same numbers under each one's names."""
    exact = load_file(pictured[task])
    convert(pictured[task], tmp_path / "transformer", "diffusers")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "transformer", torch_dtype=torch.float32)
    assert torch.equal(theirs.blocks[1].attn2.add_k_proj.weight, exact["blocks.1.cross_attn.k_img.weight"])
    embedder = theirs.condition_embedder.image_embedder
    assert torch.equal(embedder.ff.net[0].proj.weight, exact["img_emb.proj.1.weight"])
    assert (embedder.pos_embed is None) == (task == "i2v-14B")
    pictures, generator = (1, 2)[task == "flf2v-14B"], torch.Generator().manual_seed(0)
    x, text, seen = (
        torch.randn(shape, generator=generator)
        for shape in ((1, 36, 2, 4, 6), (1, 512, SIZES.text_dim), (1, 257 * pictures, 1280))
    )
    ours = wan_core.load_dit(pictured[task])(x, torch.tensor([500.0]), text, inputs=(ClipTokens(seen),))
    answer = theirs(x, torch.tensor([500.0]), text, encoder_hidden_states_image=seen.view(pictures, 257, 1280)).sample
    assert (answer - ours).abs().max() <= 2e-5 * ours.abs().max()

    convert(tmp_path / "transformer", tmp_path / "official", "official")
    config = json.loads((tmp_path / "official/config.json").read_text())
    assert config["model_type"] == task.split("-")[0]
    convert(tmp_path / "official", tmp_path / "back.safetensors", "comfyui")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(exact) and all(torch.equal(back[key], value) for key, value in exact.items())


def test_gguf_as_the_package_and_the_gguf_pack_read_it(dit: Path, text: Path, tmp_path: Path):
    convert(dit, tmp_path / "wan.gguf", "gguf:Q4_1")
    reader = gguf.GGUFReader(tmp_path / "wan.gguf")
    assert reader.get_field("general.architecture").contents() == "wan"
    stored = {one.name: one for one in reader.tensors}
    exact = load_file(dit)
    assert stored.keys() == exact.keys()
    for key, value in exact.items():
        one = stored[key]
        assert tuple(reversed([int(n) for n in one.shape])) == tuple(value.shape)
        made = torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)).view(value.shape)
        assert relative(made.float(), value) < 0.1
        if value.ndim != 2 or "modulation" in key:
            assert one.tensor_type == gguf.GGMLQuantizationType.F32
    convert(text, tmp_path / "umt5.gguf", "gguf:Q8_0")
    reader = gguf.GGUFReader(tmp_path / "umt5.gguf")
    assert reader.get_field("general.architecture").contents() == "t5encoder"
    rows = next(one.shape[1] for one in reader.tensors if one.name == "token_embd.weight")
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == rows
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 1


_COMFYUI = """
import comfy.sd
model = comfy.sd.load_diffusion_model(inputs["path"], model_options={"dtype": torch.float32}).model.diffusion_model
for name, module in model.named_modules():
    if hasattr(module, "in_features"):
        outputs[name + ".weight"] = module.convert_weight(module.weight).detach().clone().float() \\
            if hasattr(module, "convert_weight") else module.weight.detach().clone().float()
with torch.no_grad():
    outputs["velocity"] = model(inputs["x"], inputs["t"], inputs["context"]).float()
"""


def test_comfyui_loads_our_fp8_scaled(in_comfyui: Callable, tmp_path: Path):
    sizes = TinySizes(dim=128, ffn_dim=128, layers=2, text_dim=4096, text_layers=1)
    write_tiny(tmp_path, "t2v-A14B", layout="comfyui", sizes=sizes)
    made = tmp_path / "fp8.safetensors"
    convert(tmp_path / "diffusion_models/wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors", made, "fp8_scaled")
    x, t, context = torch.randn(1, 16, 2, 4, 6), torch.tensor([500.0]), torch.randn(1, 20, 4096)
    theirs = in_comfyui(_COMFYUI, path=str(made), x=x, t=t, context=context)
    model = wan_core.load_dit(made, dtype=torch.float32)
    for key, value in weights_of(model).items():
        if key in theirs:
            assert torch.equal(value, theirs[key]), key
    ours = model(x, t, context)
    assert (ours - theirs["velocity"]).abs().max() <= 2e-5 * ours.abs().max()


def test_int8_is_marked_as_comfyui_marks_it(dit: Path, tmp_path: Path):
    convert(dit, tmp_path / "int8.safetensors", "int8")
    checkpoint = open_checkpoint(tmp_path / "int8.safetensors")
    layers = json.loads(checkpoint.metadata["_quantization_metadata"])["layers"]
    assert layers["blocks.1.cross_attn.k"] == {"format": "int8_tensorwise"} and len(layers) == 20
    made = load_file(tmp_path / "int8.safetensors")
    assert made["blocks.0.ffn.0.weight"].dtype == torch.int8
    assert made["blocks.0.ffn.0.weight_scale"].shape == (512, 1)
    assert isinstance(checkpoint.packed("blocks.0.ffn.0.weight"), Packed)


# Room, mistakes and interruptions ------------------------------------------------


def test_memory_stays_small(tmp_path: Path):
    """A sparse file of 0.36 GB converts within 120 MB of anonymous memory."""
    config = Architecture(16, 16, 1024, 4096, 5, 64, 256, 8)
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in WanDiT(config).state_dict().items()}
    write_sparse(tmp_path / "sparse.safetensors", shapes)
    code = f"""
import threading, time
from wan_core.tools.convert import convert
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) // 1024
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
convert({str(tmp_path / "sparse.safetensors")!r}, {str(tmp_path / "fp8.safetensors")!r}, "fp8_scaled")
done = True
thread.join()
print(peak - before)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "sparse.safetensors").stat().st_size > 0.35e9
    assert int(ran.stdout) < 120, ran.stdout


def test_a_full_disk_leaves_nothing(dit: Path, tmp_path: Path):
    """The system itself refuses to write on: files of this process may not grow past 1 MB."""
    code = f"""
import resource, sys
from wan_core.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for to in ("bf16", "gguf:Q8_0", "official"):
    assert main(["convert", {str(dit)!r}, {str(tmp_path / "out")!r}, "--to", to, "--quiet"]) == 2
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr.count("The disk is full") == 3, ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_found_before_writing(dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(WanError, match="has 0.00 GB free, but 0.00 GB are to be written"):
        convert(dit, tmp_path / "x.safetensors", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_nothing_and_the_next_works(dit: Path, tmp_path: Path):
    def stop(name: str, error: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(dit, tmp_path / "x.safetensors", "bf16", on_tensor=stop)
    assert list(tmp_path.iterdir()) == []
    convert(dit, tmp_path / "x.safetensors", "bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_nothing_is_overwritten_unasked(dit: Path, tmp_path: Path):
    target = tmp_path / "x.safetensors"
    target.write_text("precious")
    with pytest.raises(WanError, match="is there already"):
        convert(dit, target, "bf16")
    with pytest.raises(WanError, match="is not replaced: it is not a file that this program converted"):
        convert(dit, target, "bf16", overwrite=True)
    assert target.read_text() == "precious"
    target.unlink()
    convert(dit, target, "fp16")
    convert(dit, target, "bf16", overwrite=True)
    assert open_checkpoint(target).tensors["head.modulation"].dtype is torch.bfloat16
    with pytest.raises(WanError, match="is there already"):  # a file cannot take its own place while it is read
        convert(target, target, "fp32", overwrite=True)


def test_a_source_that_changes_is_noticed(dit: Path, tmp_path: Path):
    source = tmp_path / "source.safetensors"
    source.write_bytes(dit.read_bytes())

    def touch(name: str, error: float | None) -> None:
        os.utime(source, (1, 1))

    with pytest.raises(WanError, match="was changed while it was converted"):
        convert(source, tmp_path / "x.safetensors", "bf16", on_tensor=touch)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


def test_the_command_line_reports_every_layer(dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["convert", str(dit), str(tmp_path / "x.gguf"), "--to", "gguf:Q8_0"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert any(line.endswith("  blocks.1.self_attn.q.weight") and "e-03" in line for line in lines)
    assert any("as it was" in line and line.endswith("head.modulation") for line in lines)
    assert "Largest relative errors (root mean square) of 20 changed tensors:" in printed
    assert lines[-1] == f"Wrote {tmp_path / 'x.gguf'}: 0.00 GB, gguf:Q8_0."
    assert main(["convert", str(tmp_path / "no.safetensors"), str(tmp_path / "y"), "--to", "bf16"]) == 2
    assert "No such file" in capsys.readouterr().err
