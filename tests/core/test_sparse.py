"""Attention that leaves things out: the order of tokens, what stays dense, and comfy-kitchen's own plain twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.core.test_dit import CLIP, T2V, TI2V, inputs, make
from wan_core.config import PerExpert
from wan_core.memory.engine import Engine
from wan_core.models.dit import attention
from wan_core.models.dit.attention import BACKENDS, sdpa
from wan_core.models.dit.order import morton
from wan_core.models.dit.rope import RopeTables, rope_table
from wan_core.pipeline import Request, generate, read_models
from wan_core.tools.tiny import TinySizes, write_tiny

GRIDS = [(1, 1, 1), (3, 5, 7), (4, 4, 4), (21, 30, 52), (1, 2, 9)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_curve_visits_each_token_once(grid: tuple[int, int, int]):
    numbers = morton(grid)
    assert torch.equal(numbers.sort().values, torch.arange(grid[0] * grid[1] * grid[2]))


def test_the_curve_keeps_neighbours_together():
    """64 tokens in a row are a cube of 4 x 4 x 4 where the sides allow it; in raster order they are one long row."""
    grid = (8, 8, 8)
    for block in morton(grid).view(-1, 64):
        places = torch.stack([block // 64, block // 8 % 8, block % 8])
        assert (places.amax(1) - places.amin(1)).tolist() == [3, 3, 3]


def test_rotation_tables_in_another_order():
    tables, grid, here = RopeTables(64), (3, 5, 7), torch.device("cpu")
    table, numbers, places = tables.in_order(grid, here, morton)
    plain = rope_table(grid, 64, here)
    assert torch.equal(table, plain[numbers]) and torch.equal(table[places], plain)
    assert tables.in_order(grid, here, morton)[0] is table and torch.equal(tables.of(grid, here), plain)


def ordered(order, dense_blocks: int = 0):
    def attend(q: Tensor, k: Tensor, v: Tensor, *, kind: str = "self") -> Tensor:
        return sdpa(q, k, v)

    attend.order, attend.dense_blocks, attend.whole = order, dense_blocks, True
    return attend


@pytest.mark.parametrize("config", [T2V, CLIP], ids=["t2v", "clip"])
def test_the_order_of_tokens_changes_nothing_that_is_dense(config):
    """Any order: the model's answer stands where it stood."""
    model, (x, t, text) = make(config), inputs(config, 2, 3, 6, 10)
    with torch.no_grad():
        expected = model(x, t, text)
        shuffled = lambda grid: torch.randperm(grid[0] * grid[1] * grid[2])  # noqa: E731
        for order in (morton, shuffled):
            model.attend = ordered(order)
            assert (model(x, t, text) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_frames_with_timesteps_of_their_own_stand_as_they_are():
    """Segments of tokens share a timestep; an order that mixes them is not used."""
    model, (x, _, text) = make(TI2V), inputs(TI2V, 1, 3, 6, 10)
    t = torch.tensor([[0.0, 900.0, 900.0]])
    with torch.no_grad():
        expected = model(x, t, text)
        model.attend = ordered(morton)
        assert torch.equal(model(x, t, text), expected)


kitchen = pytest.mark.skipif(not BACKENDS["sol"].installed, reason="needs comfy-kitchen with sol_attn")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Videos of any length are attended to sparsely."""
    monkeypatch.setattr(attention, "SOL_TOKENS", 0)


@kitchen
@pytest.mark.usefixtures("short")
def test_sol_is_dense_at_the_lowest_threshold(monkeypatch: pytest.MonkeyPatch):
    """comfy-kitchen's plain twin computes it here; with a threshold that every block of keys passes it is exact, in the
    midst of a model, in the order of tokens that it is given; with a high one it is not."""
    model, (x, t, text) = make(T2V), inputs(T2V, 1, 4, 16, 20)
    with torch.no_grad():
        expected = model(x, t, text)
        model.attend = BACKENDS["sol"].run
        errors = []
        for tau in (-1e30, 1.0):
            monkeypatch.setattr(attention, "SOL_TAU", tau)
            errors.append(((model(x, t, text) - expected).norm() / expected.norm()).item())
    assert errors[0] < 1e-5 < 1e-4 < errors[1] < 0.2


@kitchen
@pytest.mark.usefixtures("short")
def test_the_first_block_and_the_text_are_dense(monkeypatch: pytest.MonkeyPatch):
    import comfy_kitchen

    calls: list[tuple] = []
    monkeypatch.setattr(comfy_kitchen, "sol_attn", lambda q, k, v, tau: calls.append(q.shape) or sdpa(q, k, v))
    model, (x, t, text) = make(replace(T2V, layers=3)), inputs(T2V, 1, 2, 4, 4)
    model.attend = BACKENDS["sol"].run
    with torch.no_grad():
        model(x, t, text)
    assert calls == [(1, 8, 2, 128)] * 2


@kitchen
def test_short_videos_are_dense(monkeypatch: pytest.MonkeyPatch):
    q, k, v = torch.randn(3, 1, 64, 2, 128)
    assert torch.equal(BACKENDS["sol"].run(q, k, v), sdpa(q, k, v))


def test_the_first_steps_of_a_run_are_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fifth of all, whichever expert does them; both prompts of each."""
    calls: list[int] = []

    def noted(q: Tensor, k: Tensor, v: Tensor, *, kind: str = "self") -> Tensor:
        calls.extend([len(reports)] if kind == "self" else [])
        return sdpa(q, k, v)

    noted.dense_blocks, noted.order, noted.whole = 1, morton, True
    sparse = attention.Backend("flash2", noted, dense_blocks=1, dense_steps=0.2, order=morton, whole=True)
    monkeypatch.setitem(BACKENDS, "flash2", sparse)
    write_tiny(tmp_path / "model", "t2v-A14B", layout="official", sizes=TinySizes(256, 256, layers=3, text_dim=64))
    request = Request("a cat", "", size=(64, 32), frames=5, steps=11, seed=3, guidance=PerExpert(2.0, 2.0))
    reports: list[int] = []

    def made(name: str) -> Tensor:
        models = read_models(tmp_path / "model", "t2v-A14B", dtype="float32", attention=name)
        reports.clear()
        return generate(
            models, request, Engine(), device=torch.device("cpu"), on_step=lambda report: reports.append(report.index)
        ).latent

    expected = made("sdpa")
    ours = made("flash2")
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    assert calls == [step for step in range(3, 11) for _ in range(2 * 2)]  # two blocks of three, two prompts
