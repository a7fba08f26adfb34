"""Two processes that train together, against one that sees both their batches: through gloo, on the CPU."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from torch import nn

from wan_core.train.parallel import Processes


class Task:
    """Two layers; the second is used by even batches only, a third by none."""

    def __init__(self):
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.asked: list[int] = []

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        self.asked.append(batch)
        x = self.layers[0](torch.randn(5, 6, generator=generator))
        if batch % 2 == 0:
            x = self.layers[1](x.tanh())
        return x.square().mean(), {"batch": float(batch)}


def chance(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


def gradients(task: Task) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in task.layers.parameters()]


def one_of_two(rank: int, port: str, folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    here, task = Processes.current("cpu"), Task()
    losses, saved = here.together(task.loss, task.layers.parameters()), {}
    for step in range(2):
        task.layers.zero_grad(set_to_none=True)
        for part in range(2):
            batch = (2 * step + part) * 2 + rank
            losses.backward(batch, chance(batch), of=2, last=part == 1)
            if part == 0 and step == 0:
                saved["before"] = gradients(task)
        saved[step] = gradients(task)
    assert here.mean(float(rank)) == 0.5 and here.any(rank == 1)
    torch.save({"asked": task.asked, "gradients": saved}, Path(folder, str(rank)))
    here.leave()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two processes had."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes.spawn(one_of_two, (port, str(folder)), nprocs=2)
    return [torch.load(folder / str(rank)) for rank in range(2)]


def alone(batches: list[int]) -> list[torch.Tensor | None]:
    task = Task()
    losses = Processes(0, 1, None).together(task.loss, task.layers.parameters())
    for batch in batches:
        losses.backward(batch, chance(batch), of=len(batches), last=batch == batches[-1])
    return gradients(task)


def test_each_process_has_batches_of_its_own(two: list[dict]):
    assert [sorted(one["asked"]) for one in two] == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize("step", [0, 1])
def test_gradients_are_the_mean_of_all_batches(two: list[dict], step: int):
    """The same to the last bit in both; against one process within rounding. What no batch touches has none, or 0."""
    first, second = (one["gradients"][step] for one in two)
    expected = alone([4 * step + i for i in range(4)])
    for ours, others, wanted in zip(first, second, expected, strict=True):
        if wanted is None:
            assert not any(one is not None and one.any() for one in (ours, others))
        else:
            assert torch.equal(ours, others) and wanted.any()
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_nothing_is_sent_before_the_last_batch_of_a_step(two: list[dict]):
    first, second = (one["gradients"]["before"] for one in two)
    assert not torch.equal(first[0], second[0])
