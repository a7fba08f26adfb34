"""No second copy: anonymous memory, measured in processes of their own on Linux. Pages of mapped files are not counted.

The whole A14B (40 layers, a file of 28 GB) is a row of ``python -m bench memory``; here its width with one layer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.measure import MEMORY_ENVIRONMENT
from bench.memory import Case

ROOT = Path(__file__).resolve().parents[2]
GB = 1e9

BOTH_EXPERTS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from bench.memory import Case, _warm_up, anonymous_peak, recipe, sparse_file
from wan_core.config import PerExpert
from wan_core.memory.engine import Engine
from wan_core.loading.dit import read_dit
from wan_core.sampling.guidance import Condition
torch.set_num_threads(1)
_warm_up()
folder = Path(sys.argv[1])
case = Case("t2v-A14B", (64, 64), 1, "bfloat16", 1, swap_blocks=1)
base = recipe(case, folder)
low = sparse_file(folder / "low.safetensors", case.config, torch.bfloat16)
pair = replace(base, low=read_dit(low))
experts = Engine().experts(pair, PerExpert(1.0, 1.0), "cpu")
x, t, condition = torch.zeros(case.shape), torch.tensor([500.0]), Condition(torch.zeros(1, 512, 4096))
peaks = []
for expert in (experts.high, experts.low):
    with torch.inference_mode(), anonymous_peak() as peak:
        expert.model(x, t, condition)
    peaks.append(peak[0])
print(json.dumps({"file": low.stat().st_size, "on_disk": low.stat().st_blocks * 512, "peaks": peaks}))
"""

FIFTY_RUNS = """
import gc, json, sys
from dataclasses import replace
import torch
from bench.memory import _anonymous
from wan_core.memory.stream import transfer as offload
from wan_core.config import PerExpert
from wan_core.memory.engine import Engine
from wan_core.pipeline import Request, generate, read_models
torch.set_num_threads(1)
offload.BACKENDS["cpu"] = offload.HostBackend  # the reader thread, the ring and the slots, as on CUDA
models = read_models(sys.argv[1], "t2v-A14B", dtype="bfloat16")
models = replace(models, dit=replace(models.dit, swap_blocks=4, prefetch=2))
request = Request("a cat", "", size=(32, 32), frames=1, steps=2, seed=1, guidance=PerExpert(2.0, 2.0))
engine, sizes = Engine(), []
for number in range(50):
    list(generate(models, request, engine, device=torch.device("cpu")).video())
    if number % 10 == 9:
        engine.release("dit")  # and every tenth time all is read again
        gc.collect()
        sizes.append(_anonymous())
print(json.dumps(sizes))
"""


def script(code: str, *arguments: object) -> dict | list:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, **MEMORY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_both_experts_in_turn_hold_no_second_copy(tmp_path: Path) -> None:
    """A call holds a fraction of the mapped weights, and the second expert adds nothing to the first."""
    found = script(BOTH_EXPERTS, tmp_path)
    assert found["file"] > 1.1 * GB and found["on_disk"] < 10**6
    assert max(found["peaks"]) < 0.4 * GB
    assert found["peaks"][1] <= 1.1 * found["peaks"][0]


@pytest.mark.parametrize("swapped", [0, 1])
def test_planned_is_what_is_measured(tmp_path: Path, swapped: int) -> None:
    """At the real width, converted from bfloat16, so that weights or slots and activations are all in memory."""
    case = Case("t2v-A14B", (128, 128), 5, "float32", 1, swap_blocks=swapped)
    code = "import sys; from bench.__main__ import main; sys.argv[0] = 'bench'; main()"
    row = script(code, "memory", "--device", "cpu", "--folder", tmp_path, "--case", json.dumps(vars(case)))
    assert row["planned_gb"] == pytest.approx(row["measured_gb"], rel=0.1), row


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    script(f"""
import sys
from bench import memory
import argparse
parser = argparse.ArgumentParser()
memory.add_arguments(parser)
memory.run(parser.parse_args(["--quick", "--device", "cpu", "--out", {str(out)!r}]))
print(0)
""")
    report = json.loads(out.read_text())
    (row,) = report["measured"].values()
    assert row["ratio"] == pytest.approx(1, abs=0.1) and row["seconds"] > 0
    assert len(report["planned"]) == 9 and "GPU" in report["not_measured"]
    assert report["planned"]["t2v-A14B 1280x720x81, limit 6 GB"]["total_gb"] <= 6


def test_fifty_runs_do_not_grow(tmp_path: Path) -> None:
    from wan_core.tools.tiny import TinySizes, write_tiny

    write_tiny(tmp_path, "t2v-A14B", layout="diffusers", sizes=TinySizes(dim=256, ffn_dim=256, layers=4, text_dim=64))
    sizes = script(FIFTY_RUNS, tmp_path)
    assert len(sizes) == 5
    assert sizes[-1] < 1.01 * sizes[0], sizes
