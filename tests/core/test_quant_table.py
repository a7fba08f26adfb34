"""What each format costs a whole run: the table of docs/quantised.md, measured again and held."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wan_core.loading.dit import load_dit, read_dit
from wan_core.memory.build import build_dit
from wan_core.models.dit.dit import WanDiT
from wan_core.sampling.denoise import Run, denoise
from wan_core.sampling.experts import Experts
from wan_core.sampling.guidance import Condition
from wan_core.sampling.schedules import schedule
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, write_tiny

TABLE = Path(__file__).resolve().parents[2] / "docs/quantised.md"
SIZES = TinySizes(dim=256, ffn_dim=512, layers=4, text_dim=64, text_layers=1)
ROW = re.compile(r"^\| `(?P<name>[^`]+)`[^|]*\|(?P<bits>[^|]+)\|(?P<weights>[^|]+)\|(?P<latent>[^|]+)\|$", re.MULTILINE)
ON_LOAD = ("fp8_e4m3fn", "int8")


def stated() -> dict[str, tuple[float, float]]:
    """Format -> the errors of weights and of the latent, in percent."""
    rows = ROW.findall(TABLE.read_text(encoding="utf-8"))
    return {name: (float(weights), float(latent)) for name, _, weights, latent in rows}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder, "ti2v-5B", layout="comfyui", sizes=SIZES)
    return next((folder / "diffusion_models").iterdir())


def latent_of(model: WanDiT) -> Tensor:
    """Eight steps from noise with guidance 3, as a sampler runs them."""
    torch.manual_seed(2)
    noise = torch.randn(1, 48, 3, 6, 8)
    sides = [Condition(torch.randn(1, 20, SIZES.text_dim)) for _ in range(2)]

    def velocity(x: Tensor, t: Tensor, condition: Condition, on_block=None) -> Tensor:
        return model(x, t, condition.text, on_block=on_block)

    steps = schedule("auto", 8, 5.0, solver="unipc")
    return denoise(noise, Experts.dense(velocity, 3.0), Run(steps, "unipc", *sides)).x


@pytest.fixture(scope="module")
def exact(source: Path) -> Tensor:
    return latent_of(load_dit(source, dtype=torch.float32))


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("name", stated())
def test_the_table_is_true(source: Path, exact: Tensor, tmp_path: Path, name: str):
    """To a quarter of each figure: sums differ in order from machine to machine, and errors grow along the steps."""
    weights, latent = measured(source, exact, tmp_path, name)
    assert (weights, latent) == (pytest.approx(stated()[name][0], rel=0.25), pytest.approx(stated()[name][1], rel=0.25))


def measured(source: Path, exact: Tensor, folder: Path, name: str) -> tuple[float, float]:
    if name in ON_LOAD:
        model = build_dit(read_dit(source), dtype=name)
        plain = load_dit(source, dtype=torch.float32)
        layers = ("blocks.0.ffn.0", "blocks.3.cross_attn.k")
        errors = [
            relative(model.get_submodule(one).packed.dequantise(), plain.get_submodule(one).weight) for one in layers
        ]
    else:
        made = folder / ("x.gguf" if name.startswith("gguf") else "x.safetensors")
        report = convert(source, made, name)
        errors = [error for key, error in report.errors.items() if "ffn" in key or "attn.k.w" in key]
        model = load_dit(made, dtype=torch.float32)
    return 100 * sum(errors) / len(errors), 100 * relative(latent_of(model), exact)
