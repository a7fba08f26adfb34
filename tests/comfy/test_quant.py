"""Quantised files on a real server: GGUF in the menus and in a run, fp8-scaled files, quantising on load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Client, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from wan_core.tools.convert import convert

MODEL, TEXT, SCALED = "wan-q8_0.gguf", "umt5-q8_0.gguf", "ti2v_fp8_scaled.safetensors"


@pytest.fixture(scope="module")
def quantised(start_server, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that finds quantised files where users of GGUF keep them: in "unet" and "clip"."""
    folder = tmp_path_factory.mktemp("quantised")
    dense = models / "diffusion_models" / wan.DENSE
    convert(dense, folder / "unet" / MODEL, "gguf:Q8_0")
    convert(dense, folder / "unet" / SCALED, "fp8_scaled")
    convert(models / "text_encoders" / wan.TEXT_ENCODER, folder / "clip" / TEXT, "gguf:Q8_0")
    config = folder / "paths.yaml"
    config.write_text(f"quantised:\n  base_path: {folder}\n  diffusion_models: unet\n  text_encoders: clip\n")
    yield start_server("quantised", "--extra-model-paths-config", str(config))


def test_menus_and_runs(quantised: Server):
    """Everything runs, and latents stay within a tenth of the unquantised ones."""
    client = Client(quantised.url, quantised.check)
    info = client.object_info("WanCoreLoadModel")["WanCoreLoadModel"]["input"]["required"]
    assert {MODEL, SCALED, wan.DENSE} <= set(_options(info["model_name"]))
    assert _options(info["dtype"]) == ["auto", "bfloat16", "float16", "float32", "fp8_e4m3fn", "int8"]
    texts = client.object_info("WanCoreLoadTextEncoder")["WanCoreLoadTextEncoder"]["input"]["required"]
    assert {TEXT, wan.TEXT_ENCODER} <= set(_options(texts["text_encoder_name"]))

    g = Graph()
    sides = {"whole": wan.prompts(g)}
    encoder = g.add("WanCoreLoadTextEncoder", text_encoder_name=TEXT, dtype="float32", device="cpu")
    sides["gguf"] = wan.prompts(g, encoder)
    runs = {
        "exact": (wan.load(g, wan.DENSE), "whole"),
        "gguf": (wan.load(g, MODEL, dtype="auto"), "gguf"),
        "scaled": (wan.load(g, SCALED), "whole"),
        "int8": (wan.load(g, wan.DENSE, dtype="int8"), "whole"),
    }
    for name, (model, text) in runs.items():
        sampled: Out = wan.sample(g, model, sides[text], wan.empty(g, model))
        wan.save_latent(g, sampled, name)
    run = client.run(g.nodes)
    assert run.ok, run.error
    exact = wan.read_latent(quantised, "exact")
    for name in ("gguf", "scaled", "int8"):
        error = (wan.read_latent(quantised, name) - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 1e-4 < error < 0.1, (name, error)
    assert torch.isfinite(exact).all()


def _options(entry: list) -> list[str]:
    return entry[1]["options"] if entry[0] == "COMBO" else entry[0]
