"""What the server says of a run: moving pictures and text for the editor, stills for everybody else."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_server import Client, Run, Server
from PIL import Image
from safetensors.torch import save_file

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph
from tests.core.test_preview import tiny_weights

STEPS = 20


def run(client: Client, task: str, frames: int = 9, *, shown: bool = True, **settings: object) -> tuple[Run, str]:
    """A run and the sampler's id. Where pictures are shown, the first may come when the run has ended."""
    g = Graph()
    m = wan.model(g, task)
    settings = {"steps": STEPS, "cfg_high": 1.0, "cfg_low": 1.0} | settings
    sampled = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, frames=frames), **settings)
    wan.save_latent(g, sampled, "preview")
    done = client.run(g.nodes, until=lambda run: not shown or bool(pictures(run) or run.of("execution_error")))
    assert done.ok, done.error
    return done, sampled.node


def news(run: Run) -> list[dict]:
    """Of the run itself: the last picture of the one before may come within it, and the editor drops it."""
    heard = run.of("wan_core.preview")
    return [entry for entry in heard if entry["run"] == max(entry["run"] for entry in heard)]


def pictures(run: Run) -> list[Image.Image]:
    urls = [entry["picture"] for entry in news(run) if "picture" in entry]
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/webp;base64,")))) for url in urls]


@pytest.mark.parametrize("task", ["t2v", "ti2v"])
def test_a_run_is_told_to_the_editor(client: Client, task: str) -> None:
    done, sampler = run(client, task, seed=int(time.time()))
    lines = [entry["line"] for entry in news(done) if "line" in entry]
    assert {entry["node"] for entry in news(done)} == {sampler}
    assert (lines[0]["step"], lines[0]["steps"], lines[0]["left"]) == (0, STEPS, None)
    assert lines[0]["expert"] == ("only" if task == "ti2v" else "high")
    assert (lines[-1]["step"], lines[-1]["sigma"], lines[-1]["left"]) == (STEPS, 0, 0)
    assert lines[-1]["expert"] == ("only" if task == "ti2v" else "low")
    moving = pictures(done)
    assert moving and all((image.format, image.n_frames) == ("WEBP", 3) for image in moving)
    stills = [preview for preview in done.previews if preview.node == sampler]
    assert [preview.format for preview in stills] == ["image/jpeg"] * STEPS


@pytest.fixture(scope="module")
def silent(start_server) -> Server:
    """A ComfyUI whose previews are off, as they are unless asked for."""
    return start_server("silent", "--preview-method", "none")


def test_no_pictures_where_previews_are_off(silent: Server) -> None:
    client = Client(silent.url, silent.check)
    done, sampler = run(client, "ti2v", shown=False)
    assert not pictures(done) and not done.previews
    assert news(done)[-1]["line"]["step"] == STEPS
    assert done.progress(sampler)[-1] == (STEPS, STEPS)


@pytest.fixture
def decoders(models: Path) -> Iterator[Path]:
    folder = models / "vae_approx"
    folder.mkdir(exist_ok=True)
    yield folder
    for file in folder.glob("taew2_*"):
        file.unlink()


@pytest.fixture(scope="module")
def automatic(start_server) -> Server:
    return start_server("automatic", "--preview-method", "auto")


def test_a_tiny_decoder_is_used_and_a_broken_one_passed_over(automatic: Server, decoders: Path) -> None:
    client = Client(automatic.url, automatic.check)
    save_file(tiny_weights(16, 1), decoders / "taew2_1.safetensors")
    (decoders / "taew2_2.safetensors").write_bytes(b"not a checkpoint")
    done, _ = run(client, "t2v")
    assert pictures(done)[0].size == (64, 64)  # pixels, where the latent is 8 x 8

    for seed in (1, 2):
        done, _ = run(client, "ti2v", seed=seed)
        assert pictures(done)[0].size == (4, 4)
    warned = automatic.said().count("without the tiny decoder taew2_2.safetensors")
    assert warned == 1
