"""What nodes say of hostile files: in the history, to the page that queued the prompt, and in the log."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Server, WebSocket
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph

KEY = "<b>\u202e\ufeff.lora_up.weight"  # letters from right to left, and one that nobody sees
SHOWN_KEY = "<b>\\u202e\\ufeff.lora_up.weight"
REFUSED_KEY = "<b>\ud800\x1b[31m\x07.lora_up.weight"  # half a pair, a terminal's red, a bell
NAME = b'bytes \xff \x1b[32m <i> ".safetensors'  # not UTF-8
SHOWN_NAME = 'bytes \\xff \\x1b[32m <i> ".safetensors'


@pytest.fixture(scope="module")
def lora(server: Server) -> Iterator[str]:
    """A LoRA with one weight that fits, a key that hides letters, and a name that cannot be written as UTF-8."""
    folder = server.base / "models/loras"
    folder.mkdir(exist_ok=True)
    with safe_open(server.base / "models/diffusion_models" / wan.expert("t2v", "high"), "pt") as file:
        rows, columns = file.get_slice("blocks.0.self_attn.q.weight").get_shape()
    file = named(folder)
    path = "diffusion_model.blocks.0.self_attn.q"
    file.write_bytes(
        safetensors({f"{path}.lora_down.weight": (2, columns), f"{path}.lora_up.weight": (rows, 2), KEY: (1,)})
    )
    yield file.name
    file.unlink()


def named(folder: Path) -> Path:
    return Path(os.fsdecode(os.path.join(os.fsencode(folder), NAME)))


def safetensors(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """A file of zeros; the library writes no such keys, but JSON's escapes hold any."""
    header, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    written = json.dumps(header).encode("ascii")
    return struct.pack("<Q", len(written)) + written + bytes(end)


def test_a_name_and_a_key_outside_utf8(client: Client, server: Server, lora: str) -> None:
    g = Graph()
    both = wan.model(g, "t2v")
    node = g.add(
        "WanCoreLora",
        model=both,
        lora_name=lora,
        strength_high=1.0,
        strength_low=1.0,
        low_name="auto",
        first_step=0,
        last_step=10000,
    )
    wan.save_latent(g, wan.sample(g, node, wan.prompts(g), wan.empty(g, both), steps=1), "texts")
    run = client.run(g.nodes)
    assert run.ok, run.error
    (text,) = run.history["outputs"][node.node]["text"]
    assert SHOWN_KEY in text and SHOWN_NAME in text
    text.encode()
    assert {"node": node.node, "text": text} in run.of("wan_core.text")
    log = server.log.read_bytes().decode()  # all of it is UTF-8
    assert SHOWN_KEY in log and SHOWN_NAME in log
    assert "\x1b[32m <i>" not in log and "<b>\u202e" not in log
    assert "Logging error" not in log


def test_a_key_that_no_model_has_is_refused_in_words(client: Client, server: Server, lora: str) -> None:
    file = server.base / "models/loras/texts_refused.safetensors"
    file.write_bytes(safetensors({REFUSED_KEY: (1,)}))
    try:
        g = Graph()
        both = wan.model(g, "t2v")
        node = g.add(
            "WanCoreLora",
            model=both,
            lora_name=file.name,
            strength_high=1.0,
            strength_low=1.0,
            low_name="auto",
            first_step=0,
            last_step=10000,
        )
        wan.save_latent(g, wan.sample(g, node, wan.prompts(g), wan.empty(g, both), steps=1), "texts")
        with pytest.raises(PromptRejected) as refused:
            client.run(g.nodes)
        said = str(refused.value)
        assert "\\ud800" in said and "\\x1b[31m" in said
        assert not any(unfit in said for unfit in ("\ud800", "\x1b", "\x07"))
        assert "Logging error" not in server.log.read_text(encoding="utf-8")
    finally:
        file.unlink()


def test_whoever_queued_nothing_hears_nothing(client: Client, server: Server) -> None:
    """Node ids are the same in everybody's graphs: texts go to the page that queued the prompt."""
    g = Graph()
    both = wan.model(g, "t2v", mode="step", boundary=2)
    swapped = g.add("WanCoreBlockSwap", model=both, blocks=1)
    wan.save_latent(g, wan.sample(g, swapped, wan.prompts(g), wan.empty(g, both), steps=2), "texts")
    other = Client(server.url, server.check)
    with contextlib.closing(WebSocket(f"{server.url}/ws?clientId={other.id}", server.check)) as listening:
        run = client.run(g.nodes)
        assert run.ok and {said["node"] for said in run.of("wan_core.text")} >= {swapped.node}
        kinds = []
        with contextlib.suppress(TimeoutError):
            for message in listening.messages(time.monotonic() + 2):
                kinds.append(message["type"] if isinstance(message, dict) else "binary")
    assert "status" in kinds and "wan_core.text" not in kinds


def test_a_loader_says_what_it_left_out(client: Client, server: Server) -> None:
    """Here a VAE with a tensor too many, whose name is shown as it is written."""
    folder = server.base / "models/vae"
    extra = folder / "texts_extra_vae.safetensors"
    save_file(load_file(folder / wan.VAES["t2v"]) | {"<i>left over</i>": torch.zeros(3)}, extra)
    try:
        g = Graph()
        loader = g.add("WanCoreLoadVAE", vae_name=extra.name, dtype="float32")
        image = g.add("EmptyImage", width=32, height=32, batch_size=1, color=0)
        wan.save_latent(g, g.add("WanCoreVAEEncode", vae=loader, image=image), "texts_extra")
        run = client.run(g.nodes)
        assert run.ok, run.error
        (text,) = run.history["outputs"][loader.node]["text"]
        assert "<i>left over</i>" in text
        assert run.of("wan_core.text") == [{"node": loader.node, "text": text}]
    finally:
        extra.unlink()
