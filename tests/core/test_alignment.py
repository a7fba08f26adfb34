"""Where a file happens to have its weights changes no bit, on any processor.

What a library computes may depend on it: MKL's product of a matrix with one row does on some processors. So it is not
only the answers that are compared, which would show it on those alone, but the addresses of what is multiplied.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.core.misaligned import ODD, aligned_products, write_at
from tests.core.test_preview import tiny_weights
from wan_core.config import Architecture
from wan_core.files.write import save_tensors
from wan_core.loading.dit import read_dit
from wan_core.loading.taehv import load_tiny_decoder
from wan_core.loading.text import load_text_encoder
from wan_core.loading.vae import load_vae
from wan_core.lora.apply import adaptation_of
from wan_core.lora.files import read_lora
from wan_core.mapped import ALIGNMENT
from wan_core.memory.build import build_dit
from wan_core.memory.stream import transfer as offload
from wan_core.memory.stream.transfer import HostBackend
from wan_core.models.dit.dit import WanDiT
from wan_core.tools.convert import convert
from wan_core.tools.tiny import _random_lora, _random_weights, write_tiny

CONFIG = Architecture(16, 16, 128, 200, layers=3, text_dim=36, freq_dim=60, heads=1)  # odd sizes: many rows lie aside


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(1, 16, 3, 6, 8), torch.tensor([937.0]), draw(1, 20, 36)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    made = _random_weights(WanDiT, CONFIG, torch.Generator().manual_seed(0))
    return {key: value.bfloat16().float() for key, value in made.items()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models of every kind, as ComfyUI's files."""
    folder = tmp_path_factory.mktemp("tiny")
    for task in ("t2v-A14B", "ti2v-5B"):
        write_tiny(folder / task, task, layout="comfyui")
    return folder


def everywhere(file: Path, weights: dict[str, Tensor], answer: Callable[[Path], Tensor]) -> set[str]:
    """Holds the answers of files that differ in where their weights lie against each other, to the last bit; returns
    the operations that took part.
    """
    with torch.no_grad(), aligned_products() as seen:
        first, *others = [answer(write_at(file, weights, beside)) for beside in ODD]
    assert all(torch.equal(other, first) for other in others)
    return seen


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swap_blocks", range(CONFIG.layers + 1))
def test_a_transformer(tmp_path: Path, weights: dict[str, Tensor], stored: torch.dtype, swap_blocks: int):
    """Resident, read as it is used, and converted into slots: all the same bits."""
    resident = build_dit(read_dit(write_at(tmp_path / "plain", weights, 0)), dtype="float32")(*inputs())

    def answer(file: Path) -> Tensor:
        return build_dit(read_dit(file), dtype="float32", swap_blocks=swap_blocks)(*inputs())

    seen = everywhere(tmp_path / "dit", {key: value.to(stored) for key, value in weights.items()}, answer)
    assert seen >= {"aten::addmm", "aten::native_layer_norm"}
    assert torch.equal(answer(tmp_path / "dit"), resident)


def test_a_transformer_in_the_reader_thread(tmp_path: Path, weights: dict[str, Tensor], monkeypatch):
    monkeypatch.setitem(offload.BACKENDS, "cpu", HostBackend)
    stored = {key: value.bfloat16() for key, value in weights.items()}
    everywhere(
        tmp_path / "dit",
        stored,
        lambda file: build_dit(read_dit(file), dtype="float32", swap_blocks=2, prefetch=1)(*inputs()),
    )


@pytest.mark.parametrize("swap_blocks", [0, 3])
def test_a_transformer_in_half_precision(tmp_path: Path, weights: dict[str, Tensor], swap_blocks: int):
    stored = {key: value.bfloat16() for key, value in weights.items()}
    everywhere(
        tmp_path / "dit",
        stored,
        lambda file: build_dit(read_dit(file), dtype="bfloat16", swap_blocks=swap_blocks)(*inputs()),
    )


@pytest.mark.parametrize("swap_blocks", [0, 2])
@pytest.mark.parametrize("merge", [False, True])
def test_a_transformer_with_a_lora(tmp_path: Path, weights: dict[str, Tensor], merge: bool, swap_blocks: int):
    lora = _random_lora(weights)
    base = read_dit(write_at(tmp_path / "base", weights, 0))

    def answer(file: Path) -> Tensor:
        dit = build_dit(base, dtype="float32", swap_blocks=swap_blocks)
        adaptation_of(dit, base).set([read_lora(file, base)], [0.7], merge=merge)
        return dit(*inputs())

    everywhere(tmp_path / "lora", lora, answer)


@pytest.mark.parametrize("task", ["t2v-A14B", "ti2v-5B"])
def test_a_vae(tmp_path: Path, tiny: Path, task: str):
    (file,) = (tiny / task / "vae").glob("*.safetensors")
    video = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1

    def answer(file: Path) -> Tensor:
        vae = load_vae(file, dtype="float32")
        return vae.decode(vae.encode(video))

    seen = everywhere(tmp_path / "vae", load_file(file), answer)
    assert seen & {"aten::convolution", "aten::mkldnn_convolution"}


def test_a_tiny_decoder(tmp_path: Path):
    made, latent = tiny_weights(16, 1), torch.randn(16, 2, 4, 4)
    everywhere(tmp_path / "taew", made, lambda file: torch.stack(list(load_tiny_decoder(file, 16).frames(latent))))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_text_encoder(tmp_path: Path, tiny: Path, stored: torch.dtype):
    (file,) = (tiny / "t2v-A14B" / "text_encoders").glob("*.safetensors")
    content = load_file(file)
    spiece = content.pop("spiece_model").numpy().tobytes()
    made = {key: value.to(stored) for key, value in content.items()}
    everywhere(
        tmp_path / "text",
        made,
        lambda file: load_text_encoder(file, tokenizer=spiece, dtype="float32")(["a cat", "two dogs at the sea"]),
    )


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Of each tensor in a safetensors file: where it begins, and its size. The file has no gaps."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert [0] + [end for _, end in spans] == [start for start, _ in spans] + [file.stat().st_size - 8 - length]
    return {
        key: (8 + length + one["data_offsets"][0], one["data_offsets"][1] - one["data_offsets"][0])
        for key, one in header.items()
    }


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "a": "ü" * 7}])
def test_what_is_written_is_aligned(tmp_path: Path, metadata: dict | None):
    """Each tensor as far as the sizes allow: the format knows no gaps."""
    made = {
        "odd": torch.arange(3.0),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
        "half": torch.randn(3, 5).half(),
        "matrix": torch.randn(16, 24),
        "turned": torch.randn(8, 16).T,
        "double": torch.randn(7).double(),
    }
    save_tensors(made, tmp_path / "made.safetensors", metadata)
    found = places(tmp_path / "made.safetensors")
    assert list(load_file(tmp_path / "made.safetensors").keys()) and found.keys() == made.keys()
    assert all(torch.equal(value, made[key]) for key, value in load_file(tmp_path / "made.safetensors").items())
    assert all(found[key][0] % ALIGNMENT == 0 for key in ("matrix", "turned"))
    assert all(start % made[key].itemsize == 0 for key, (start, _) in found.items())


@pytest.mark.parametrize("to", ["bf16", "fp8_scaled", "int8", "comfyui", "diffusers"])
def test_what_is_converted_is_aligned(tmp_path: Path, tiny: Path, to: str):
    (file,) = [one for one in (tiny / "t2v-A14B" / "diffusion_models").iterdir() if "high" in one.name]
    convert(file, tmp_path / ("made" if to == "diffusers" else "made.safetensors"), to)
    for made in tmp_path.rglob("*.safetensors"):
        for key, (start, size) in places(made).items():
            assert start % ALIGNMENT == 0 or size % ALIGNMENT or size == 0, key


def test_own_files_are_aligned(tiny: Path):
    for made in tiny.rglob("*.safetensors"):
        assert all(start % ALIGNMENT == 0 for start, size in places(made).values() if size % ALIGNMENT == 0)
