"""Every layout loads to the same weights, and damaged files are refused by name before their weights are read."""

from __future__ import annotations

import gc
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import wan_core
from wan_core import mapped
from wan_core.config import VARIANTS, Architecture
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.layouts.comfyui import NAMES
from wan_core.loading.dit import read_dit
from wan_core.mapped import ALIGNMENT, is_mapped
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.convert import convert
from wan_core.tools.tiny import LAYOUTS, TinySizes, make_tiny, write_tiny

SIZES = TinySizes(dim=128, ffn_dim=128, layers=2, text_dim=64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(task, layout) -> a small checkpoint."""
    made = {}
    for task in VARIANTS:
        for layout in LAYOUTS:
            made[task, layout] = tmp_path_factory.mktemp(f"{task}-{layout}")
            write_tiny(made[task, layout], task, layout=layout, sizes=SIZES)
    return made


def experts(folder: Path, task: str, layout: str) -> list[Path]:
    dense = VARIANTS[task].experts == 1
    if layout == "official":
        return [folder] if dense else [folder / "high_noise_model", folder / "low_noise_model"]
    if layout == "comfyui":
        return [folder / "diffusion_models" / name for name in NAMES[task].models]
    return [folder / name for name in ("transformer", "transformer_2")[: VARIANTS[task].experts]]


@pytest.mark.parametrize("task", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_dit_layout_loads_the_same_weights(folders, task: str, layout: str):
    made = make_tiny(task, sizes=SIZES)
    for path, weights in zip(experts(folders[task, layout], task, layout), made.experts, strict=True):
        loaded = wan_core.load_dit(path, dtype=torch.float32)
        assert loaded.config == made.dit
        state = loaded.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(state[key], weights[key]) for key in weights)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefixed_keys_load(folders, tmp_path: Path, prefix: str):
    source = experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0]
    weights = load_file(source)
    save_file({prefix + key: value for key, value in weights.items()}, tmp_path / "prefixed.safetensors")
    state = wan_core.load_dit(tmp_path / "prefixed.safetensors", dtype=torch.float32).state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_an_index_json_and_a_pickle_load_like_their_folder(folders, tmp_path: Path):
    folder = folders["t2v-A14B", "official"] / "high_noise_model"
    expected = wan_core.load_dit(folder, dtype=torch.float32).state_dict()
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = wan_core.load_dit(index_file, dtype=torch.float32).state_dict()
    torch.save(expected, tmp_path / "dit.pth")
    pickled = wan_core.load_dit(tmp_path / "dit.pth", dtype=torch.float32).state_dict()
    for key, value in expected.items():
        assert torch.equal(index[key], value) and torch.equal(pickled[key], value)


def test_weights_of_the_wanted_dtype_are_the_models_own(folders):
    """Once in RAM, aligned, and nothing stays mapped: a file may change under a loaded model."""
    (path, _) = experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")
    dit = wan_core.load_dit(path, dtype=torch.float32)
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert all(p.data_ptr() % ALIGNMENT == 0 for p in dit.parameters())


def test_dtype_none_never_rounds_a_float32_file_on_the_cpu(folders):
    path = experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0]
    assert wan_core.load_dit(path).dtype == torch.float32


def test_half_precision_keeps_norms_modulation_and_head_in_float32(folders):
    path = experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0]
    dit = wan_core.load_dit(path, dtype=torch.bfloat16)
    wide = {key for key, value in dit.state_dict().items() if value.dtype == torch.float32}
    assert {"head.head.weight", "head.modulation", "blocks.0.modulation", "blocks.0.norm3.weight"} <= wide
    assert dit.blocks[0].self_attn.q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "gguf"])
def test_a_checkpoint_keeps_no_file_mapped(folders, tmp_path: Path, kind: str):
    """Whoever reads its tensors, and however that ends: only a tensor that lives holds its file."""
    path = as_kind(experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0], tmp_path, kind)
    checkpoint = open_checkpoint(path)
    whole = checkpoint.only(checkpoint.tensors)
    tensor = checkpoint.tensor("head.modulation")
    assert is_mapped(tensor) and mapped_files(path)
    del tensor
    assert not mapped_files(path)
    with pytest.raises(KeyError), checkpoint.reading():
        for key in (*list(whole.tensors)[:3], "missing"):
            with whole.reading():
                whole.tensor(key)
            assert mapped_files(path) == 1  # opened once for all that read at the time
    assert not mapped_files(path)


def as_kind(source: Path, folder: Path, kind: str) -> Path:
    if kind == "safetensors":
        return source
    path = folder / f"dit.{kind}"
    if kind == "gguf":
        convert(source, path, "gguf:Q8_0")
    else:
        torch.save(load_file(source), path)
    return path


def mapped_files(path: Path) -> int:
    gc.collect()
    return sum(one.file == path for one in mapped._maps)


# Damage and mistakes ---------------------------------------------------------


def damaged(tmp_path: Path, content: bytes, name: str = "model.safetensors") -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.fixture
def good(folders) -> bytes:
    return experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0].read_bytes()


def test_missing_file(tmp_path: Path):
    with pytest.raises(WanError, match="No such file or folder: .*nothing.safetensors"):
        read_dit(tmp_path / "nothing.safetensors")


def test_empty_file(tmp_path: Path):
    with pytest.raises(WanError, match="is empty"):
        read_dit(damaged(tmp_path, b""))


@pytest.mark.parametrize("keep", [5, 100, 0.5, 0.999], ids=str)
def test_truncated_file(tmp_path: Path, good: bytes, keep: float):
    end = keep if keep > 1 else int(len(good) * keep)
    with pytest.raises(WanError, match="truncated or corrupt"):
        read_dit(damaged(tmp_path, good[: int(end)]))


def test_corrupt_header(tmp_path: Path, good: bytes):
    with pytest.raises(WanError, match="truncated or corrupt"):
        read_dit(damaged(tmp_path, good[:8] + b"!" * 200 + good[208:]))


def test_a_web_page_instead_of_a_checkpoint(tmp_path: Path):
    with pytest.raises(WanError, match="neither safetensors nor a PyTorch checkpoint.*DOCTYPE"):
        read_dit(damaged(tmp_path, b"<!DOCTYPE html><html>404</html>", "model.pth"))


@pytest.mark.parametrize("keep", [0.3, 0.98], ids=str)
def test_truncated_pickle(folders, tmp_path: Path, keep: float):
    good = (folders["t2v-A14B", "official"] / "Wan2.1_VAE.pth").read_bytes()
    with pytest.raises(WanError, match="truncated or corrupt"):
        open_checkpoint(damaged(tmp_path, good[: int(len(good) * keep)], "vae.pth"))


class _Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1), "evil": _Evil()}, "evil.pth")
    with pytest.raises(WanError, match="refused: it is a pickle that wants to run code"):
        open_checkpoint("evil.pth")
    assert not Path("evil-was-here").exists()


def test_a_pickle_without_tensors(tmp_path: Path):
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(WanError, match="holds a list and no tensors"):
        open_checkpoint(tmp_path / "list.pth")


def test_missing_shards_are_named(folders, tmp_path: Path):
    source = folders["t2v-A14B", "official"] / "high_noise_model" / "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / source.name).write_text(source.read_text())
    with pytest.raises(WanError, match="lacks 2 of 2 shards: diffusion_pytorch_model-00001-of-00002.safetensors"):
        read_dit(tmp_path)


def test_a_folder_without_a_checkpoint(tmp_path: Path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(WanError, match="not a checkpoint folder.*found readme.txt"):
        read_dit(tmp_path)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vae/wan_2.1_vae.safetensors", "it is a Wan VAE. Load it as such"),
        ("text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors", "it is a umT5 text encoder"),
    ],
)
def test_another_part_of_the_model_is_named(folders, part: str, message: str):
    with pytest.raises(WanError, match=message):
        read_dit(folders["t2v-A14B", "comfyui"] / part)


def test_a_lora_is_named(tmp_path: Path):
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(WanError, match="it is a LoRA"):
        read_dit(tmp_path / "x.safetensors")


def test_a_strange_file_shows_its_keys(tmp_path: Path):
    save_file({"down_blocks.0.weight": torch.zeros(4)}, tmp_path / "unet.safetensors")
    with pytest.raises(WanError, match="none of the known layouts has its keys .down_blocks.0.weight"):
        read_dit(tmp_path / "unet.safetensors")


def edited(folders, tmp_path: Path, edit) -> Path:
    weights = load_file(experts(folders["t2v-A14B", "comfyui"], "t2v-A14B", "comfyui")[0])
    edit(weights)
    save_file(weights, tmp_path / "edited.safetensors")
    return tmp_path / "edited.safetensors"


def test_missing_and_unexpected_keys_are_listed(folders, tmp_path: Path):
    def edit(weights: dict) -> None:
        weights["blocks.1.surprise.weight"] = weights.pop("blocks.1.norm3.bias")

    with pytest.raises(WanError, match=r"Missing: blocks.1.norm3.bias. Unexpected: blocks.1.surprise.weight"):
        wan_core.load_dit(edited(folders, tmp_path, edit))


def test_wrong_shapes_are_listed(folders, tmp_path: Path):
    def edit(weights: dict) -> None:
        weights["blocks.1.ffn.0.weight"] = weights["blocks.1.ffn.0.weight"][:5].clone()

    with pytest.raises(WanError, match=r"blocks.1.ffn.0.weight is \[5, 128\], expected \[128, 128\]"):
        wan_core.load_dit(edited(folders, tmp_path, edit))


@pytest.mark.parametrize(
    ("key", "name"), [("control_adapter.conv.weight", "Wan2.2 Fun Control-Camera"), ("vace_blocks.0.x.weight", "VACE")]
)
def test_relatives_are_named(folders, tmp_path: Path, key: str, name: str):
    with pytest.raises(WanError, match=f"{name}.*which this version does not run"):
        read_dit(edited(folders, tmp_path, lambda weights: weights.update({key: torch.zeros(1)})))


def test_reading_a_header_reads_no_weights(tmp_path: Path):
    """A sparse file of a whole 14B expert, 57 GB in float32, is understood at once."""
    config = Architecture(36, 16, 5120, 13824, 40, 4096, 256, 40)
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in WanDiT(config).state_dict().items()}
    write_sparse(tmp_path / "sparse.safetensors", shapes)
    assert read_dit(tmp_path / "sparse.safetensors").config == config


def write_sparse(file: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of float32 zeros that takes no room on disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
