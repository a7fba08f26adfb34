"""Wan Prompt Extend in a real server, against a real language server on loopback and tiny local models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import Client, PromptRejected, Run, Server

from tests.comfy.graphs import Graph, Out
from tests.core.language_server import CHINESE, ENGLISH, KEY, LanguageServer, language_server, refuses, silent
from tests.core.tiny_qwen import SENTENCE, write_seeing, write_words

SETTINGS = "wan_core.PromptExtension."


@pytest.fixture(scope="module")
def running() -> Iterator[LanguageServer]:
    with language_server() as server:
        yield server


@pytest.fixture
def language(running: LanguageServer, client: Client) -> Iterator[LanguageServer]:
    """Named in ComfyUI's settings, with its key; both are gone afterwards."""
    running.again()
    for kind, address in (("OpenAI", running.openai), ("DashScope", running.dashscope)):
        client.set_setting(f"{SETTINGS}{kind}Address", address)
        client.set_setting(f"{SETTINGS}{kind}Key", KEY)
    yield running
    for kind in ("OpenAI", "DashScope"):
        for end in ("Address", "Key"):
            client.set_setting(f"{SETTINGS}{kind}{end}", "")


@pytest.fixture(scope="module")
def local_models(models: Path) -> None:
    write_words(models / "LLM/Qwen2.5-3B-Instruct")
    write_seeing(models / "LLM/mine/seeing")


def extension(g: Graph, text: str, method: str = "openai", **options: object) -> Out:
    values = {"model": "any", "language": "auto", "variation": 0, "on_failure": "keep prompt", "timeout": 20} | options
    node = g.add("WanCorePromptExtend", text=text, method=method, **values)
    g.add("PreviewAny", source=node)
    return node


def run(client: Client, g: Graph, **options: object) -> tuple[Run, str]:
    """And what came out of the node."""
    done = client.run(g.nodes, **options)
    shown = done.history.get("outputs", {}).get("2", {}).get("text", [""])
    return done, shown[0]


@pytest.mark.parametrize("method", ["openai", "dashscope"])
def test_a_prompt_is_extended_and_shown(client: Client, language, method: str) -> None:
    g = Graph()
    extension(g, f"a cat for {method}", method)
    done, prompt = run(client, g)
    assert done.ok, done.error
    assert prompt == ENGLISH
    texts = [told["text"] for told in done.of("wan_core.text") if told["node"] == "1"]
    assert texts == [f"Asking {method} any …", ENGLISH]
    assert done.history["outputs"]["1"]["text"] == [ENGLISH]  # for a page loaded anew
    assert len(language.asked) == 1
    run(client, g)
    g.set(Out("1"), text=f"a dog for {method}")
    run(client, g)
    g.set(Out("1"), text=f"a cat for {method}")  # forgotten by ComfyUI, which keeps the last run only
    assert run(client, g)[1] == ENGLISH and len(language.asked) == 2


@pytest.mark.parametrize("method", ["openai", "dashscope"])
def test_a_picture_alone(client: Client, language, method: str) -> None:
    g = Graph()
    node = extension(g, "", method, language="zh", model="" if method == "dashscope" else "sees")
    g.set(node, image=g.add("LoadImage", image="example.png"), end_image=g.add("EmptyImage", width=64, height=2000,
                                                                               batch_size=3, color=255))  # fmt: skip
    done, prompt = run(client, g)
    assert done.ok, done.error
    assert prompt == CHINESE
    (asked,) = language.asked
    assert asked.body["model"] == ("qwen-vl-max" if method == "dashscope" else "sees")
    first, last = asked.pictures
    assert 200_000 < first.width * first.height <= 263_000 and last.getpixel((5, 5))[2] > 200


def test_the_prompt_reaches_the_text_encoder(client: Client, language) -> None:
    """As in the shipped workflows: through Wan Aesthetic Prompt to CLIP Text Encode."""
    from tests.comfy import graphs as wan

    g = Graph()
    node = extension(g, "a cat")
    info = client.object_info("WanCoreAestheticPrompt")["WanCoreAestheticPrompt"]["input"]["required"]
    menus = {name: about[1]["default"] for name, about in info.items() if name != "text"}
    worded = g.add("WanCoreAestheticPrompt", text=node, **menus)
    g.add("PreviewAny", source=g.add("CLIPTextEncode", clip=wan.clip(g), text=worded))
    done, prompt = run(client, g)
    assert done.ok, done.error
    assert prompt == ENGLISH


def test_a_failure_is_said_and_asked_again(client: Client, server: Server, language) -> None:
    began = len(server.said())
    g = Graph()
    extension(g, "a bird")
    language.faults = [refuses(401, f"Incorrect API key provided: {KEY}.")] * 2
    for _ in range(2):  # ComfyUI does not take the failure for the node's result
        done, prompt = run(client, g)
        assert done.ok and prompt == "a bird"
        (text,) = done.history["outputs"]["1"]["text"]
        assert "refuses the key (HTTP 401): Incorrect API key provided: …." in text and text.endswith("\n\na bird")
    assert run(client, g)[1] == ENGLISH and len(language.asked) == 3
    run(client, g)
    assert len(language.asked) == 3
    assert "could not be extended" in server.said(began)


def test_it_stops_where_that_is_asked_for(client: Client, language) -> None:
    g = Graph()
    extension(g, "a fish", on_failure="stop")
    language.faults = [refuses(400, "No.")]
    done, _ = run(client, g)
    assert not done.ok and "could not be extended" in done.error and "HTTP 400" in done.error
    assert run(client, g)[1] == ENGLISH


def test_cancelling_while_it_waits(client: Client, language) -> None:
    g = Graph()
    extension(g, "a horse", timeout=300)
    language.faults, start = [silent], time.monotonic()

    def on_event(kind: str, data: dict) -> None:
        if kind == "wan_core.text" and "Asking" in data["text"]:
            while not language.asked:
                time.sleep(0.02)
            client.interrupt()

    done, _ = run(client, g, on_event=on_event)
    assert done.interrupted and time.monotonic() - start < 15
    assert language.broken_off.wait(5)
    assert run(client, g)[1] == ENGLISH


def test_a_key_is_nowhere_but_in_the_settings(client: Client, server: Server, language) -> None:
    language.faults = [refuses(500, KEY), refuses(403, f"{KEY[:10]} is no key")]
    g = Graph()
    extension(g, "a whale")
    done, _ = run(client, g)
    assert done.ok
    for text in (json.dumps(done.history), json.dumps(done.events), server.said(), json.dumps(client.object_info())):
        assert KEY[:8] not in text
    files = [
        file for folder in ("output", "temp", "user") for file in (server.base / folder).rglob("*") if file.is_file()
    ]
    holding = [file.name for file in files if KEY[:8].encode() in file.read_bytes()]
    assert holding == ["comfy.settings.json"]


def refusal(client: Client, g: Graph) -> str:
    with pytest.raises(PromptRejected) as rejected:
        client.submit(g.nodes)
    return str(rejected.value)


def test_what_is_missing_is_said_when_it_is_queued(client: Client) -> None:
    for method, variable in (("openai", "OPENAI_API_KEY"), ("dashscope", "DASH_API_KEY")):
        g = Graph()
        extension(g, "a cat", method)
        said = refusal(client, g)
        assert "needs a key. Set it in ComfyUI's settings (Wan, Prompt extension)" in said and variable in said
    client.set_setting(f"{SETTINGS}OpenAIAddress", "http://127.0.0.1:1/v1")
    g = Graph()
    extension(g, "a cat", model=" ")
    assert "needs the name of a model" in refusal(client, g)
    client.set_setting(f"{SETTINGS}OpenAIAddress", "file:///etc/passwd")
    assert "begins with https:// or http://" in refusal(client, g)
    client.set_setting(f"{SETTINGS}OpenAIAddress", {"no": "text"})
    assert "needs a key" in refusal(client, g)
    client.set_setting(f"{SETTINGS}OpenAIAddress", "")
    g = Graph()
    extension(g, "  ")
    assert "nothing to extend" in refusal(client, g)


# --- on this machine


@pytest.mark.parametrize("model", ["", "Qwen2.5_3B", "Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"])
def test_a_local_model(client: Client, local_models, model: str) -> None:
    g = Graph()
    extension(g, "dog jumps", "local_qwen", model=model, timeout=100, variation=5)
    done, prompt = run(client, g)
    assert done.ok, done.error
    assert prompt == SENTENCE.format("white")


def test_a_local_model_that_sees(client: Client, local_models) -> None:
    for name, colour in (("red", 0xFF0000), ("blue", 0x0000FF)):
        g = Graph()
        node = extension(g, "dog jumps", "local_qwen", model="mine/seeing", timeout=100)
        g.set(node, image=g.add("EmptyImage", width=84, height=56, batch_size=1, color=colour))
        done, prompt = run(client, g)
        assert done.ok, done.error
        assert prompt == SENTENCE.format(name)


@pytest.mark.parametrize("model", ["../LLM/Qwen2.5-3B-Instruct", "/etc", "Qwen/Qwen3-absent", "..", "a\\b"])
def test_local_models_that_are_not_there(client: Client, local_models, model: str) -> None:
    g = Graph()
    extension(g, "a cat", "local_qwen", model=model)
    said = refusal(client, g)
    assert "There is no language model" in said and "models/LLM" in said
