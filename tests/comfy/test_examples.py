"""The example program against a real server, as somebody runs it who has only Python."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import av
from comfy_server import Client, Server
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def queue(url: str, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", ROOT / "workflows/api/queue_workflow.py", *options, "--url", url]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)


def finished(client: Client, prompt_id: str) -> dict:
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if found := client.get(f"/history/{prompt_id}").get(prompt_id):
            return found
        time.sleep(0.5)
    raise AssertionError("the prompt did not finish")


def test_a_workflow_is_queued_with_values_of_ones_own(server: Server, client: Client, tmp_path: Path) -> None:
    """To the video: 81 frames of the small models, in the picture's shape."""
    Image.new("RGB", (80, 40), "red").save(tmp_path / "my red.png")
    before = (ROOT / "workflows/api/wan22_i2v_a14b.json").read_bytes()
    done = queue(
        server.url, ROOT / "workflows/api/wan22_i2v_a14b.json", "--prompt", "A cat “yawns”.", "--seed", 7,
        "--image", tmp_path / "my red.png", "--size", "64*64",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    history = finished(client, done.stdout.strip())
    assert history["status"]["status_str"] == "success", history["status"]
    nodes = {node["_meta"]["title"]: node["inputs"] for node in history["prompt"][2].values()}
    assert nodes["Wan Aesthetic Prompt"]["text"] == "A cat “yawns”." and nodes["Wan Sampler"]["seed"] == 7
    assert nodes["Wan Sampler"]["steps"] == 40 and nodes["Start image"]["image"].startswith("my red")
    (file,) = history["outputs"]["15"]["images"]
    with av.open(str(server.base / "output" / file["subfolder"] / file["filename"])) as video:
        stream = video.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (80, 32, 81)  # an area of 64*64, the picture's shape
    assert (ROOT / "workflows/api/wan22_i2v_a14b.json").read_bytes() == before


def test_a_wrapped_workflow_and_a_refusal(server: Server, client: Client, tmp_path: Path) -> None:
    graph = json.loads((ROOT / "workflows/api/wan22_t2v_a14b.json").read_text(encoding="utf-8"))
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"prompt": graph}))
    done = queue(server.url, wrapped, "--size", "65*64")
    assert done.returncode == 1 and "ComfyUI refuses it" in done.stderr and "multiple" in done.stderr
    done = queue(server.url, wrapped, "--size", "64*64")
    assert done.returncode == 0, done.stderr
    client.interrupt()
    finished(client, done.stdout.strip())


def test_nobody_there(tmp_path: Path) -> None:
    done = queue("http://127.0.0.1:9", ROOT / "workflows/api/wan22_t2v_a14b.json")
    assert done.returncode == 1 and "127.0.0.1:9" in done.stderr and "Traceback" not in done.stderr
