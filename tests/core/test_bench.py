"""The benchmark runs, finds all contenders in agreement, and measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from bench import cpu, measure, parts, plot
from bench.peers import COMFYUI, DIFFUSERS, OURS, PREPARED

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024 * 1024


def test_quick_dit_benchmark(comfyui_path: Path, tmp_path: Path) -> None:
    """All contenders in one process; memory is left out here because every process imports its libraries anew."""
    out = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "bench", "cpu", "--quick", "--only", "dit", "--rounds", "2", "--memory-runs", "0"]
    environment = _environment(comfyui_path)
    done = subprocess.run([*command, "--out", out], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ((name, part),) = json.loads(out.read_text())["parts"].items()
    assert name == "dit forward"
    assert list(part["contenders"]) == [OURS, PREPARED, DIFFUSERS, COMFYUI]
    for contender, row in part["contenders"].items():
        assert row["error"] <= 2e-5, contender
        assert len(row["seconds_of_rounds"]) == 2 and min(row["seconds_of_rounds"]) > 0
    assert part["ratios"][OURS]["time"]["best"] == max(part["ratios"][OURS]["time"][peer] for peer in cpu.PEERS)
    assert all(contender in done.stdout for contender in part["contenders"])


def _environment(comfyui: Path) -> dict[str, str]:
    return {**os.environ, "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}


def test_a_wrong_answer_is_not_timed() -> None:
    part = parts.named(True, "dit forward")
    right = torch.ones(4)
    with pytest.raises(SystemExit, match="diffusers and ours differ by 1.0e-03"):
        cpu.agreement({OURS: right, DIFFUSERS: right * 1.001}, part)
    with pytest.raises(SystemExit, match="differ by nan"):
        cpu.agreement({OURS: right, DIFFUSERS: right * torch.nan}, part)


def test_peak_growth_sees_what_is_freed_again_and_not_what_was_there() -> None:
    if not measure.can_measure_memory():
        pytest.fail("this system tells no high-water mark; the benchmark's memory figures need Linux")
    there_before = torch.ones(30 * MIB // 4)

    def call() -> torch.Tensor:
        torch.ones(60 * MIB // 4)
        return torch.ones(20 * MIB // 4)

    growth = measure.peak_growth(call)
    assert 58 * MIB <= growth <= 75 * MIB, growth / MIB
    assert there_before[0] == 1


def test_interleaving_rotates_the_order() -> None:
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    samples = measure.interleave(calls, rounds=3)
    assert "".join(order) == "ABCBCACAB"
    assert all(len(found) == 3 for found in samples.values())


def test_ratio_is_the_median_of_the_rounds() -> None:
    assert measure.ratio([1.0, 9.0, 3.0], [2.0, 1.0, 2.0]) == 1.5


def test_quick_quality_benchmark(tmp_path: Path) -> None:
    """Real runs of the nano pair: a cache is faster, and nearer to the whole run than nothing."""
    out = tmp_path / "quality.json"
    command = [sys.executable, "-m", "bench", "quality", "--quick", "--prompts", "1", "--out", out]
    command += ["--picture", tmp_path / "quality.svg"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    fewer, cached = report["rows"]
    assert fewer["speed"] == 1.2 and 1 < cached["speed"] < 2
    assert 0 < fewer["error"] < 0.5 and 0 < cached["error"] < 0.5
    plain, interval, nag = report["guidance"]
    assert plain["speed"] == 1 and plain["distance"] == 0 and plain["words"] >= 3
    assert 1 < interval["speed"] < 2 == nag["speed"] and 0 < interval["distance"] < nag["distance"]
    (fp8,) = report["weights"]
    assert fp8["format"] == "fp8_scaled" and 8 <= fp8["bits"] < 8.1 and 0 < fp8["error"] < 0.5
    assert 10 < fewer["psnr"] < 99 and 10 < cached["psnr"] < 99
    picture = ElementTree.parse(tmp_path / "quality.svg").getroot()
    tips = [tip.text for tip in picture.iter("{http://www.w3.org/2000/svg}title")]
    assert [tip.partition(":")[0] for tip in tips[:2]] == ["10 steps", "every 2"] and len(tips) == 4


def test_a_plot_is_true_to_its_figures() -> None:
    """Both axes are logarithmic, faster is right, worse is up; the line joins its own group by speed; no error, no
    point."""
    points = [plot.Point(name, "a" if name != "x" else "b & c", speed, error) for name, speed, error in (
        ("1", 1, 0.01), ("2", 4, 0.04), ("3", 2, 0.02), ("x", 2, 0.01), ("none", 1, 0.0))]  # fmt: skip
    root = ElementTree.fromstring(plot.svg(points, "a"))
    circles = [one for one in root.iter("{http://www.w3.org/2000/svg}circle") if len(one)]  # not the legend's
    found = [(float(one.get("cx")), float(one.get("cy"))) for one in circles]
    assert len(found) == 4
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = found
    assert x1 < x3 < x2 and y1 > y3 > y2 and (x4, y4) == (x3, y1)
    assert x3 - x1 == pytest.approx(x2 - x3, abs=0.2) and y1 - y3 == pytest.approx(y3 - y2, abs=0.2)
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert line.get("points") == " ".join(f"{x},{y}" for x, y in (found[0], found[2], found[1]))


def test_quick_gpu_benchmark(comfyui_path: Path, tmp_path: Path) -> None:
    """On a CPU it measures nothing that matters; every section runs, and contenders agree."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench", "gpu", "--device", "cpu", "--quick", "--out", out]
    done = subprocess.run(command, cwd=ROOT, env=_environment(comfyui_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == {"ceilings", "attention", "dit", "linears", "pieces", "streaming", "vae"}
    assert not any("failed" in rows for rows in sections.values())
    assert all(row["same_bits"] for row in sections["streaming"].values())
    assert all(row["difference"] < 1e-4 for row in sections["dit"].values())
