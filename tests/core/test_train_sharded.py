"""Full training of one model over two processes (FSDP2, gloo), against one process that sees both their batches."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tests.core.test_train_cli import ROOT, SIZES, a_request, flags, free_port
from tests.core.test_train_cli import clips as clips  # a fixture
from wan_core.__main__ import main
from wan_core.loading.dit import read_dit
from wan_core.tools.tiny import write_tiny
from wan_core.train.model import load_trained
from wan_core.train.report import read_log
from wan_core.train.run import Hooks, Request, files_in, run

TASK = "t2v-A14B"

_PROCESSES = """
import os, sys
from pathlib import Path
import torch._dynamo, wan_core.train.run  # once for all: the imports take longer than the training

port, *rest = sys.argv[1:]
children = []
for rank in range(2):
    if not (child := os.fork()):
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
        from tests.core.test_train_sharded import both
        both(rank, *map(Path, rest))
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children) != 0)
"""


class Stopped(Exception):
    pass


def request_of(clips: Path, out: Path, **more: object) -> Request:
    same = {"steps": 4, "rank": 0, "ema": 0.9, "save_every": 2, "sample_every": 4, "sample_steps": 2}
    return replace(a_request(clips, out), **same, learning_rate=1e-2, **more)


def both(rank: int, models: Path, clips: Path, out: Path) -> None:
    """What each of two processes does: a whole run, one that is stopped after two steps, and the rest of that."""
    from wan_core.train.parallel import Processes
    from wan_core.train.sharded import gathered, load_sharded

    files = files_in(models, TASK, "low")
    run(request_of(clips, out / "whole", fsdp=True), files)

    def stop(report) -> None:
        if report.step == 2:
            raise Stopped

    try:
        run(request_of(clips, out / "parts", fsdp=True), files, hooks=Hooks(on_step=stop))
    except Stopped:
        if rank == 0:
            shutil.copytree(out / "parts", out / "handed")
    run(request_of(clips, out / "parts", fsdp=True), files)

    model = load_sharded(read_dit(files.dit), Processes.current(), torch.device("cpu"))
    whole = gathered(model.state_dict(), keep=rank == 1)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    torch.save({"held": held, "whole": whole}, out / f"loaded{rank}")
    Processes.leave()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder, TASK, sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def two(models: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes wrote."""
    out = tmp_path_factory.mktemp("two")
    words = [sys.executable, "-c", _PROCESSES, free_port(), str(models), str(clips), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def one(models: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run(request_of(clips, out, accumulate=2), files_in(models, TASK, "low"))
    return out


def test_each_process_reads_and_holds_its_part(two: Path, models: Path):
    first, second = (torch.load(two / f"loaded{rank}") for rank in range(2))
    expected = load_trained(read_dit(files_in(models, TASK, "low").dit)).state_dict()
    assert all(value is None for value in first["whole"].values())
    assert {key: torch.equal(second["whole"][key], value) for key, value in expected.items()} == dict.fromkeys(
        expected, True
    )
    total = sum(value.numel() for value in expected.values())
    assert first["held"] + second["held"] == total
    assert max(first["held"], second["held"]) < 0.51 * total  # a modulation [1, 6, dim] lies in the first one


def test_two_processes_learn_what_one_does(two: Path, one: Path, models: Path):
    """The averaged weights of four steps, within 1e-5, where the weights went a hundred times as far."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two / "whole", one))
    began = load_trained(read_dit(files_in(models, TASK, "low").dit)).state_dict()
    assert ours.keys() == theirs.keys() and {v.dtype for v in ours.values()} == {torch.float32}
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) <= 1e-5
    assert max((theirs[key] - began[key]).abs().max().item() for key in theirs) > 1e-3
    losses = [[float(row["loss"]) for row in read_log(folder / "log.csv")] for folder in (two / "whole", one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_file_and_the_state_are_those_of_one_process(two: Path, one: Path):
    headers = []
    for folder in (two / "whole", one):
        with safe_open(folder / "model.safetensors", "pt") as file:
            headers.append((file.metadata(), {key: file.get_slice(key).get_shape() for key in file.keys()}))  # noqa: SIM118
    assert headers[0] == headers[1]
    ours, theirs = (torch.load(folder / "state.pt") for folder in (two / "whole", one))
    assert ours["describes"] == theirs["describes"] and ours["step"] == 4
    for name, moments in theirs["optimiser"]["state"].items():
        for key, value in moments.items():
            torch.testing.assert_close(ours["optimiser"]["state"][name][key], value, rtol=1e-4, atol=1e-7)


def test_a_stopped_run_goes_on_to_the_same_weights(two: Path):
    """To the last bit."""
    whole, parts = (load_file(two / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_one_process_goes_on_with_the_state_of_two(two: Path, one: Path, models: Path, clips: Path):
    run(request_of(clips, two / "handed", accumulate=2), files_in(models, TASK, "low"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (two / "handed", one))
    assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) <= 1e-5


def test_samples_are_drawn_by_all_and_written_once(two: Path, one: Path):
    ours, theirs = (np.asarray(Image.open(folder / "sample_000004.png"), int) for folder in (two / "whole", one))
    assert ours.std() > 1 and abs(ours - theirs).max() <= 1


@pytest.mark.parametrize(
    ("rank", "told"),
    [(0, "Start several, torchrun --nproc_per_node N"), (2, "Sharding is for full training. A LoRA's few weights")],
)
def test_where_sharding_has_no_place(models: Path, clips: Path, tmp_path: Path, capsys, rank: int, told: str):
    words = flags(models.parent, clips, tmp_path / "out", lora_rank=rank)
    words[words.index("--ckpt_dir") + 1] = str(models)
    assert main([*words, "--fsdp"]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
