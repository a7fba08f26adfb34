"""What the pack costs before it does anything: its import at ComfyUI's start, and the loader nodes' reading of headers.

The files read here have the real shapes and sizes, but are sparse: a header, then a hole as long as the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

from wan_core.config import Architecture, TextConfig, VAEConfig
from wan_core.layouts import comfyui
from wan_core.layouts import text as text_keys
from wan_core.loading.vae import VAE_CLASSES
from wan_core.models.dit.dit import WanDiT
from wan_core.models.text.umt5 import Umt5Encoder
from wan_core.tools.tiny import write_tiny

from .cpu import machine
from .sparse import shapes_of, write_sparse

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "bench" / "results" / "import.json"
IMPORT_LIMIT, LOADER_LIMIT = 0.3, 0.2  # seconds

# ComfyUI's own start, as far as it has come when main.py loads custom nodes; then the pack as nodes.py loads it.
_START = """
import asyncio, importlib.util, sys, time
from comfy.cli_args import args
args.cpu = True
import utils.extra_config, torch, comfy_api.latest, nodes, execution, server
print("== the pack", file=sys.stderr, flush=True)
begin = time.perf_counter()
spec = importlib.util.spec_from_file_location("wan_pack", sys.argv[1] + "/__init__.py")
pack = sys.modules["wan_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
found = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
imported = time.perf_counter()
for node in found:
    node.GET_SCHEMA()
print(imported - begin, time.perf_counter() - imported)
"""

_READ = """
import sys, time
import wan_core
from wan_core.models.{module} import {function}
for _ in range(6):
    begin = time.perf_counter()
    {function}(sys.argv[1])
    print(time.perf_counter() - begin)
"""

_READERS = {
    "dit": ("load_dit", "read_dit"),
    "vae": ("load_vae", "read_vae"),
    "text": ("text_encoder", "read_text_encoder"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each figure")


def run(options: argparse.Namespace) -> int:
    report = {"machine": machine(), "import": pack_import(options.rounds), "loaders": {}}
    print(
        f"importing the pack: {report['import']['seconds']:.3f} s (limit {IMPORT_LIMIT}), of which "
        f"{report['import']['modules']} modules by -X importtime {report['import']['importtime_seconds']:.3f} s; "
        f"schemas of its nodes: {report['import']['schemas_seconds']:.3f} s"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, part, path in checkpoints(Path(folder)):
            report["loaders"][name] = times = loader_time(part, path, options.rounds)
            print(
                f"{name}: first {times['first_seconds']:.3f} s, again {times['again_seconds']:.3f} s "
                f"(limit {LOADER_LIMIT})"
            )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def pack_import(rounds: int) -> dict:
    """Seconds that importing the pack and its nodes adds to a ComfyUI that has come so far in its own start."""
    runs = [_start_comfyui() for _ in range(rounds)]
    slowest = sorted(runs[0]["modules"].items(), key=lambda item: -item[1])[:8]
    return {
        "seconds": round(median(run["import"] for run in runs), 4),
        "importtime_seconds": round(median(sum(run["modules"].values()) for run in runs), 4),
        "schemas_seconds": round(median(run["schemas"] for run in runs), 4),
        "modules": len(runs[0]["modules"]),
        "slowest_modules": {name: round(seconds, 4) for name, seconds in slowest},
    }


def _start_comfyui() -> dict:
    command = [sys.executable, "-X", "importtime", "-c", _START, str(ROOT)]
    done = _run(command, Path(os.environ["COMFYUI_PATH"]))
    imported, schemas = map(float, done.stdout.splitlines()[-1].split())
    after = done.stderr.partition("== the pack")[2]
    rows = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)$", after, re.MULTILINE)
    return {"import": imported, "schemas": schemas, "modules": {name: int(own) / 1e6 for own, name in rows}}


def loader_time(part: str, path: Path, rounds: int) -> dict:
    """Seconds to read a header: in a fresh process, and again in the same one."""
    module, function = _READERS[part]
    command = [sys.executable, "-c", _READ.format(module=module, function=function), str(path)]
    runs = [[float(line) for line in _run(command, ROOT).stdout.split()] for _ in range(rounds)]
    return {
        "first_seconds": round(median(run[0] for run in runs), 4),
        "again_seconds": round(median(second for run in runs for second in run[1:]), 4),
    }


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    return done


def checkpoints(folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(what it is, which part, where it lies) of every checkpoint whose header is read."""
    tiny = folder / "tiny"
    write_tiny(tiny, "t2v-A14B", layout="comfyui")
    yield "tiny DiT", "dit", tiny / "diffusion_models" / comfyui.NAMES["t2v-A14B"].models[0]
    yield "tiny VAE", "vae", tiny / "vae" / comfyui.VAES["wan2.1"]
    yield "tiny text encoder", "text", next((tiny / "text_encoders").iterdir())
    dit = shapes_of(lambda: WanDiT(Architecture(16, 16, 5120, 13824, 40, 4096, 256, heads=40)))
    yield "A14B, one file (sparse, 28 GB)", "dit", write_sparse(folder / "a14b.safetensors", dit)
    yield "A14B, six shards (sparse)", "dit", _write_shards(folder / "a14b", dit)
    vae = shapes_of(lambda: VAE_CLASSES["wan2.2"](VAEConfig("wan2.2", 48, 160, 256)))
    yield "Wan2.2-VAE (sparse)", "vae", write_sparse(folder / "vae.safetensors", vae)
    yield "umT5-XXL (sparse, 11 GB)", "text", write_sparse(folder / "umt5.safetensors", _text_shapes())


def _text_shapes() -> dict[str, tuple[int, ...]]:
    """umT5-XXL under ComfyUI's keys, with a tokenizer as long as the real one's."""
    shapes = shapes_of(lambda: Umt5Encoder(TextConfig(256384, 4096, 4096, 10240, heads=64, layers=24)))
    theirs = {text_keys.DIALECTS["huggingface"].to_theirs(key): shape for key, shape in shapes.items()}
    return {**theirs, text_keys.SPIECE_MODEL: (4_548_313,)}


def _write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], shards: int = 6) -> Path:
    folder.mkdir()
    weight_map = {}
    for number in range(shards):
        name = f"diffusion_pytorch_model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(shapes.items())[number::shards])
        write_sparse(folder / name, part)
        weight_map |= dict.fromkeys(part, name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
