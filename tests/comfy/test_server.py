"""The pack loads into a real ComfyUI, and the harness hears what the server says."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from comfy_server import PACK, Client, PromptRejected, Server
from PIL import Image

NODE_IDS = (
    "WanCoreLoadModel", "WanCoreExpertSwitch", "WanCoreBlockSwap", "WanCoreLoadTextEncoder", "WanCoreLoadVAE",
    "WanCoreAestheticPrompt", "WanCoreEmptyLatent", "WanCoreImageToVideo", "WanCoreVAEEncode", "WanCoreVAEDecode",
    "WanCoreSampler", "WanCoreTrainLora", "WanCoreToModel", "WanCoreLora", "WanCoreFromModel",
    "WanCorePromptExtend", "WanCoreStepCache", "WanCoreGuidance",
)  # fmt: skip


def blurred_example(radius: int) -> dict:
    return {
        "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "2": {"class_type": "ImageBlur", "inputs": {"image": ["1", 0], "blur_radius": radius, "sigma": 1.0}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "harness"}},
    }


def test_pack_imports_without_error(server: Server) -> None:
    log = server.said().partition("To see the GUI")[0]  # its start; prompts come after it
    line = next(line for line in log.splitlines() if line.rstrip().endswith(f"/custom_nodes/{PACK}"))
    assert re.fullmatch(r"\s*\d+\.\d seconds: .*", line), f"{line}\n{server.tail(80)}"
    before_prompts = log.partition("got prompt")[0]  # the mistakes that other tests make on purpose leave tracebacks
    assert "Traceback" not in before_prompts and "Unable to parse pyproject.toml" not in before_prompts


def test_pack_adds_little_to_the_start(server: Server) -> None:
    """0.3 s at most where torch takes 2.2: beside it, because a busy machine slows both; `python -m bench import` tells
    the seconds."""
    line = re.compile(r"^import time: +\d+ \| +(\d+) \| +(\S+)$", re.MULTILINE)
    took = {name.rpartition("/")[2]: int(microseconds) for microseconds, name in line.findall(server.said())}
    assert took[f"{PACK}.nodes"] < took["torch"] / 7


@pytest.mark.parametrize("node", NODE_IDS)
def test_node_is_offered(client: Client, node: str) -> None:
    about = client.object_info(node)[node]
    assert about["python_module"] == f"custom_nodes.{PACK}"
    assert about["display_name"].startswith(("Wan ", "Load Wan "))
    inputs = about["input"].get("required", {}) | about["input"].get("optional", {})
    undocumented = [name for name, (_, *more) in inputs.items() if not (more and more[0].get("tooltip"))]
    assert not undocumented, f"inputs without a tooltip: {undocumented}"


def test_search_words_and_folded_inputs_where_comfyui_knows_them(client: Client, comfyui_path: Path) -> None:
    """0.3.75's schemas know neither."""
    schemas = (comfyui_path / "comfy_api/latest/_io.py").read_text(encoding="utf-8")
    for node in NODE_IDS:
        assert bool(client.object_info(node)[node].get("search_aliases")) is ("search_aliases" in schemas), node
    merge = client.object_info("WanCoreLora")["WanCoreLora"]["input"]["optional"]["merge"][1]
    assert merge.get("advanced", False) is ("advanced: bool" in schemas)


def test_harness_runs_a_prompt(client: Client) -> None:
    run = client.run(blurred_example(3))
    assert run.ok and run.executed[-2:] == ["2", "3"]  # another test may have loaded the image before
    (file,) = run.files
    assert Image.open(io.BytesIO(client.download(file))).format == "PNG"


def test_harness_sees_what_was_cached(client: Client) -> None:
    client.run(blurred_example(5))
    assert client.run(blurred_example(6)).executed == ["2", "3"]


def test_harness_reports_a_rejected_prompt(client: Client) -> None:
    with pytest.raises(PromptRejected) as rejected:
        client.submit(blurred_example(10_000))
    assert list(rejected.value.errors) == ["2"]


def test_harness_uploads_an_image(client: Client) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(png, "png")
    name = client.upload_image("red.png", png.getvalue())
    assert name in client.object_info("LoadImage")["LoadImage"]["input"]["required"]["image"][0]
