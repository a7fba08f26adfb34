"""Plan beside measurement: peak memory of a transformer call, at the models' real widths and with random weights.

On a CPU the anonymous memory of the process is measured, on CUDA what the allocator counted and the seconds of a call.
The weights lie in a sparse file that takes no room on disk: zeros cost as much to map, copy and multiply as any.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from wan_core.config import PATCH, VARIANTS, Architecture
from wan_core.loading.dit import read_dit
from wan_core.media.geometry import latent_shape
from wan_core.memory.build import build_dit
from wan_core.memory.plan import GB, Plan, held_bytes, plan
from wan_core.models.dit.dit import WanDiT
from wan_core.recipe import ModelRecipe

from .measure import MEMORY_ENVIRONMENT
from .sparse import shapes_of, write_sparse

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "memory.json"
CONFIGS = {
    "t2v-A14B": Architecture(16, 16, 5120, 13824, layers=40, text_dim=4096, freq_dim=256, heads=40),
    "i2v-A14B": Architecture(36, 16, 5120, 13824, layers=40, text_dim=4096, freq_dim=256, heads=40),
    "ti2v-5B": Architecture(48, 48, 3072, 14336, layers=30, text_dim=4096, freq_dim=256, heads=24),
}
LIMITS = {"t2v-A14B": 6.0, "i2v-A14B": 6.0, "ti2v-5B": 5.0}  # GB: the goals
METHOD_CPU = (
    "A process for each row. RssAnon of the process, read every 2 ms by a thread, from just before the model is built "
    "to the worst moment of building and of one call; pages of the mapped file are not anonymous. glibc's mmap "
    "threshold is held at 128 KiB, so that freed buffers leave the process."
)
METHOD_CUDA = "torch.cuda.max_memory_allocated over building the model and three calls; seconds: mean of two."


@dataclass(frozen=True)
class Case:
    """One row: a model, a size, and how its blocks are kept."""

    task: str
    size: tuple[int, int]
    frames: int
    dtype: str
    layers: int  # of the model that is measured; the real number unless said otherwise
    stored: str = "bfloat16"
    swap_blocks: int = 0
    vram_limit: float | None = None

    @property
    def config(self) -> Architecture:
        return replace(CONFIGS[self.task], layers=self.layers)

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *latent_shape(VARIANTS[self.task], *self.size, self.frames))

    @property
    def tokens(self) -> int:
        _, _, t, h, w = self.shape
        return t * (h // PATCH[1]) * (w // PATCH[2])

    def __str__(self) -> str:
        kept = f"limit {self.vram_limit:g} GB" if self.vram_limit else f"{self.swap_blocks} of {self.layers} swapped"
        return f"{self.task} {self.size[0]}x{self.size[1]}x{self.frames} {self.dtype}, {kept}"


# What two CPU cores finish in minutes: full width, few blocks or few tokens.
ON_CPU = (
    Case("t2v-A14B", (64, 64), 1, "bfloat16", 40, swap_blocks=40),
    Case("t2v-A14B", (416, 240), 17, "float32", 2, swap_blocks=2),
    Case("t2v-A14B", (416, 240), 17, "float32", 2),
    Case("i2v-A14B", (416, 240), 17, "float32", 2, swap_blocks=2),
    Case("ti2v-5B", (640, 352), 33, "float32", 2, swap_blocks=2),
    Case("ti2v-5B", (640, 352), 33, "float32", 2),
)
QUICK = (Case("ti2v-5B", (256, 256), 9, "float32", 1, swap_blocks=1),)


def on_cuda() -> tuple[Case, ...]:
    rows = []
    for task, limit in LIMITS.items():
        variant, layers = VARIANTS[task], CONFIGS[task].layers
        basic = Case(task, variant.size, variant.frames, "bfloat16", layers)
        rows += [basic, replace(basic, vram_limit=limit), replace(basic, swap_blocks=layers)]
    return tuple(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small case: shows that the benchmark works")
    parser.add_argument("--folder", type=Path, help="where the sparse files are made (default: a temporary one)")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a row as JSON: what a process of its own measures


def run(options: argparse.Namespace) -> int:
    if options.case:
        print(json.dumps(measure(_case(options.case), options.device, options.folder)))
        return 0
    device = torch.device(options.device)
    cases = QUICK if options.quick else ON_CPU if device.type == "cpu" else on_cuda()
    report = {
        "device": _name(device),
        "torch": torch.__version__,
        "planned": planned_rows(),
        "measured": {},
        "method": METHOD_CPU if device.type == "cpu" else METHOD_CUDA,
        "not_measured": _missing(device),
    }
    print(_planned_table(report["planned"]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        report["measured"][str(case)] = row = in_own_process(case, options.device, options.folder)
        print(_line(str(case), row), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")  # a row takes minutes
    print(f"Not measured: {report['not_measured']}")
    return 0


def planned_rows() -> dict[str, dict]:
    """What the three variants will need on a GPU at their own sizes: the goals, said from shapes alone."""
    rows = {}
    with TemporaryDirectory() as folder:
        for task, limit in LIMITS.items():
            variant, config = VARIANTS[task], CONFIGS[task]
            case = Case(task, variant.size, variant.frames, "bfloat16", config.layers)
            base = recipe(case, Path(folder))
            for kept in (base, replace(base, vram_limit=limit), replace(base, vram_limit=24.0)):
                found = plan(kept, case.shape, "cuda:0")
                rows[
                    f"{task} {variant.size[0]}x{variant.size[1]}x{variant.frames}, "
                    f"{f'limit {kept.vram_limit:g} GB' if kept.vram_limit else 'resident'}"
                ] = _as_row(found)
    return rows


def _as_row(found: Plan) -> dict:
    return {
        "total_gb": _gb(found.total),
        "weights_gb": _gb(found.weights),
        "stream_gb": _gb(found.stream),
        "activations_gb": _gb(found.activations),
        "ram_gb": _gb(found.ram),
        "moved_gb_per_step": _gb(found.moved),
        "swapped": found.swapped,
        "layers": found.layers,
        "prefetch": found.prefetch,
    }


def in_own_process(case: Case, device: str, folder: Path | None) -> dict:
    command = [sys.executable, "-m", "bench", "memory", "--device", device, "--case", json.dumps(vars(case))]
    command += ["--folder", str(folder)] if folder else []
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **MEMORY_ENVIRONMENT}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def measure(case: Case, device: str, folder: Path | None) -> dict:
    """Plan and peak of one call, in this process."""
    with TemporaryDirectory(dir=folder) as made:
        kept = recipe(case, Path(made))
        found = plan(kept, case.shape, device, guided=False)
        counted = _on_cuda if torch.device(device).type == "cuda" else _on_cpu
        row = counted(replace(kept, swap_blocks=found.swapped, prefetch=found.prefetch), case, device)
    row["planned_gb"] = _gb(of_one_call(found, kept))
    return row | {
        "ratio": round(row["planned_gb"] / row["measured_gb"], 3),
        "swapped": found.swapped,
        "tokens": case.tokens,
    }


def of_one_call(found: Plan, kept: ModelRecipe) -> int:
    """What an unguided plan says of a single call: a sampler's latents of many steps are not there."""
    held = held_bytes(kept.high.config, found.shape, found.dtype, prompts=1, keep_text=kept.keeps_text)
    return found.total - held


def call_of(case: Case, kept: ModelRecipe, device: str) -> Callable[[], torch.Tensor]:
    """Builds the model and returns a call of it, as a sampler makes it."""
    dit = build_dit(kept.high, device=device, dtype=kept.dtype, swap_blocks=kept.swap_blocks, prefetch=kept.prefetch)
    shape = (case.shape[0], case.config.in_channels, *case.shape[2:])
    x, t = torch.zeros(shape, device=device), torch.tensor([500.0], device=device)
    text = torch.zeros(1, 512, case.config.text_dim, device=device)
    return lambda: dit(x, t, text)


def _on_cpu(kept: ModelRecipe, case: Case, device: str) -> dict:
    _warm_up()
    with anonymous_peak() as peak:
        call = call_of(case, kept, device)
        began = time.perf_counter()
        call()
        seconds = time.perf_counter() - began
    return {"measured_gb": _gb(peak[0]), "seconds": round(seconds, 2)}


def _on_cuda(kept: ModelRecipe, case: Case, device: str) -> dict:
    torch.cuda.reset_peak_memory_stats(device)
    call = call_of(case, kept, device)
    call()
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(2):
        call()
    torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - began) / 2
    return {
        "measured_gb": _gb(torch.cuda.max_memory_allocated(device)),
        "seconds": round(seconds, 2),
        "ram_gb": _gb(_anonymous()),
    }


def _warm_up() -> None:
    """Libraries allocate for good at their first use; that is not the model's."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 64, 128, dtype=dtype)
        torch.nn.functional.linear(x, torch.zeros(128, 128, dtype=dtype))
        torch.nn.functional.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


@contextmanager
def anonymous_peak(every: float = 0.002) -> Iterator[list[int]]:
    """Bytes of anonymous memory, at the worst moment inside, above what there was before; in the list afterwards."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, over = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(every):
            peak[0] = max(peak[0], _anonymous() - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        over.set()
        watcher.join()


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def recipe(case: Case, folder: Path) -> ModelRecipe:
    path = folder / f"{case.task}-{case.layers}-{case.stored}.safetensors"
    if not path.exists():
        sparse_file(path, case.config, getattr(torch, case.stored))
    return ModelRecipe(read_dit(path), dtype=case.dtype, swap_blocks=case.swap_blocks, vram_limit=case.vram_limit)


def sparse_file(path: Path, config: Architecture, dtype: torch.dtype) -> Path:
    """A checkpoint of zeros that takes no room on disk."""
    return write_sparse(path, shapes_of(lambda: WanDiT(config)), dtype)


def _case(text: str) -> Case:
    fields = json.loads(text)
    return Case(**fields | {"size": tuple(fields["size"])})


def _missing(device: torch.device) -> str:
    if device.type == "cuda":
        return "whole runs with text encoder and VAE; other cards"
    return (
        "everything on a GPU: peaks, seconds per step, overlap. The table for GPUs is what the planner says; the "
        "rows below it are the full width of each model at sizes and depths that a CPU finishes"
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _gb(size: float) -> float:
    return round(size / GB, 3)


def _planned_table(rows: dict[str, dict]) -> str:
    names = f"{'total':>8}{'weights':>9}{'stream':>8}{'active':>8}{'RAM':>6}{'moved/step':>12}{'swapped':>9}"
    lines = [f"{'planned, GB':44}{names}"]
    for name, row in rows.items():
        lines.append(
            f"{name:44}{row['total_gb']:>8.2f}{row['weights_gb']:>9.2f}{row['stream_gb']:>8.2f}"
            f"{row['activations_gb']:>8.2f}{row['ram_gb']:>6.1f}{row['moved_gb_per_step']:>12.1f}{row['swapped']:>9}"
        )
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict) -> str:
    return (
        f"{name:52} planned {row['planned_gb']:.3f} measured {row['measured_gb']:.3f} GB "
        f"({row['ratio']:.3f}), {row['seconds']:.2f} s a call"
    )
