"""From a fresh clone to three videos, in one command: ``python scripts/demo.py``.

The nano family stands in for the real weights: models of the same architectures, a few megabytes each, trained on a
little world of coloured shapes (docs/nano.md). What a prompt of that world says is what its video shows.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _bootstrap as setup
from comfy_server import Graph, PromptRejected, Run, Server, ServerFailed, make_base

WORKFLOWS = {
    "t2v-A14B": setup.ROOT / "workflows/api/wan22_t2v_a14b.json",
    "i2v-A14B": setup.ROOT / "workflows/api/wan22_i2v_a14b.json",
    "ti2v-5B": setup.ROOT / "workflows/api/wan22_ti2v_5b.json",
}
NANO = setup.ROOT / "nano"
FILES = {
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": "nano_t2v_high_noise.safetensors",
    "wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors": "nano_t2v_low_noise.safetensors",
    "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors": "nano_i2v_high_noise.safetensors",
    "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors": "nano_i2v_low_noise.safetensors",
    "wan2.2_ti2v_5B_fp16.safetensors": "nano_ti2v.safetensors",
    "wan_2.1_vae.safetensors": "nano_vae16.safetensors",
    "wan2.2_vae.safetensors": "nano_vae48.safetensors",
    "umt5_xxl_fp8_e4m3fn_scaled.safetensors": "nano_umt5.safetensors",
}
SMALL = {
    "width": 64, "height": 64, "frames": 17, "steps": 20, "cfg_high": 3.0, "cfg_low": 3.0, "shift": 5.0, "fps": 8.0,
}  # fmt: skip
SHOWN = {
    "t2v-A14B": ("A red circle moves to the right over the ocean.", None),
    "i2v-A14B": ("A yellow triangle moves up in front of the grey studio.", "nano_i2v.png"),
    "ti2v-5B": ("A purple square moves to the left over the snow.", "nano_ti2v.png"),
}
BASE = setup.CACHE / "demo"
OUTPUT = setup.ROOT / "output"


def main() -> int:
    options = parse_arguments()
    setup.need_python()
    comfyui, python = find_parts(options)
    device = check_environment(python)
    base = make_base(BASE, comfyui, setup.ROOT)
    lay_out(base)

    setup.say(f"starting ComfyUI ({comfyui})")
    with Server.start(python, comfyui, base, *device, "--disable-api-nodes", "--preview-method", "auto") as server:
        made = [make_video(server, task, path) for task, path in WORKFLOWS.items()]
        report(made)
        if options.ui:
            keep(server)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", metavar="FOLDER", help="your ComfyUI; also COMFYUI_PATH. It is run, never changed")
    parser.add_argument("--python", metavar="FILE", type=Path, help="the Python that runs it, used as it is")
    parser.add_argument("--ui", "--keep", action="store_true", help="leave the server running and print its address")
    return parser.parse_args()


def find_parts(options: argparse.Namespace) -> tuple[Path, Path]:
    """A ComfyUI and a Python that can run it: the user's own where he has them, else ones made here."""
    theirs = setup.find_comfyui(options.comfyui)
    comfyui = theirs or setup.fetch_comfyui()
    python = options.python or (theirs and python_of(theirs))
    if not python:
        python = setup.make_environment()
        setup.install(python, setup.server_requirements(comfyui))
    return comfyui, python


def python_of(comfyui: Path) -> Path | None:
    """The Python a user runs his ComfyUI with: an environment in or beside its folder, else the one running this."""
    folders = (comfyui / ".venv", comfyui / "venv", comfyui.parent / ".venv", comfyui.parent / "venv")
    places = [*map(setup.environment_python, folders), comfyui.parent / "python_embeded/python.exe"]
    found = next((python for python in places if python.exists()), None)
    if found is None and setup.works(sys.executable, "-c", "import torch, aiohttp"):
        found = Path(sys.executable)
    return found


PROBE = """
import importlib.metadata, json, sys, torch
def installed(name):
    try: return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError: return False
gpu = torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
print(json.dumps({"missing": [name for name in sys.argv[1:] if not installed(name)], "gpu": gpu}))
"""


def check_environment(python: Path) -> list[str]:
    """ComfyUI's device option. Ends the script where a package of ours is missing in an environment of the user's."""
    names = [line.partition(">")[0] for line in setup.requirement_lines(setup.ROOT / "requirements.txt")]
    probe = subprocess.run([str(python), "-c", PROBE, *names], capture_output=True, text=True)
    if probe.returncode:
        setup.fail(f"{python} cannot run ComfyUI:\n{probe.stderr}")
    found = json.loads(probe.stdout.splitlines()[-1])
    if found["missing"]:
        setup.fail(
            f"{python} lacks {', '.join(found['missing'])}. Install what the pack needs with\n"
            f"  {python} -m pip install -r {setup.ROOT / 'requirements.txt'}"
        )
    return [] if found["gpu"] else ["--cpu"]


def lay_out(base: Path) -> None:
    """The family in ComfyUI's model folders, and its images among ComfyUI's inputs."""
    if not (NANO / "vae").is_dir():
        setup.fail(f"{NANO} lacks the nano family. It is part of the repository: git checkout -- nano")
    shutil.copytree(NANO, base / "models", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))
    (base / "input").mkdir(exist_ok=True)
    for image in NANO.glob("*.png"):
        shutil.copy(image, base / "input")


def make_video(server: Server, task: str, workflow: Path) -> tuple[Path, float]:
    """Queue a workflow at a small size, show its progress and fetch its video."""
    setup.say(f"{task}: queueing {workflow.relative_to(setup.ROOT)}")
    graph = make_small(json.loads(workflow.read_text(encoding="utf-8")), *SHOWN[task])
    print(f"           {SHOWN[task][0]}", flush=True)
    try:
        run = server.client.run(graph, timeout=1800, on_event=progress_printer(graph))
    except PromptRejected as rejected:
        setup.fail(f"ComfyUI refused {workflow}: {rejected}\n{json.dumps(rejected.errors, indent=2)}")
    return save(server, task, workflow.stem, run), run.seconds


def make_small(graph: Graph, prompt: str, image: str | None) -> Graph:
    """The graph with the nano family's files and sizes, a prompt of its world, and an image of it."""
    for node in graph.values():
        inputs, literals = node["inputs"], {k: v for k, v in node["inputs"].items() if not isinstance(v, list)}
        inputs.update({name: FILES[value] for name, value in literals.items() if value in FILES})
        inputs.update({name: SMALL[name] for name in literals.keys() & SMALL.keys()})
        if node["class_type"] == "WanCoreAestheticPrompt":
            inputs["text"] = prompt
        if node["class_type"] == "LoadImage":
            inputs["image"] = image
    return graph


def progress_printer(graph: Graph) -> Any:
    """Prints a line for each step of a node that reports progress."""

    def on_event(kind: str, data: dict[str, Any]) -> None:
        if kind == "progress" and data.get("node") in graph:
            name = graph[data["node"]]["class_type"]
            print(f"           {name}: {data['value']}/{data['max']}", flush=True)

    return on_event


def save(server: Server, task: str, name: str, run: Run) -> Path:
    if not run.ok:
        setup.fail(f"{task} failed: {run.error or 'interrupted'}\nThe end of ComfyUI's log:\n{server.tail()}")
    videos = [file for file in run.files if file["filename"].endswith(".mp4")]
    if not videos:
        setup.fail(f"{task} ended well, but saved no video: {run.history.get('outputs')}")
    OUTPUT.mkdir(exist_ok=True)
    target = OUTPUT / f"{name}.mp4"
    target.write_bytes(server.client.download(videos[0]))
    return target


def report(made: list[tuple[Path, float]]) -> None:
    setup.say("done:")
    for path, seconds in made:
        print(f"  {os.path.relpath(path)}  {path.stat().st_size / 1024:6.0f} KiB  {seconds:5.1f} s")


def keep(server: Server) -> None:
    setup.say(f"ComfyUI is running at {server.url} - Ctrl+C stops it")
    try:
        while True:
            server.check()
            time.sleep(1)
    except KeyboardInterrupt:
        setup.say("stopping")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ServerFailed as failed:
        setup.fail(str(failed))
