"""Fixtures of all tests: the parts that scripts/test.py fetched, and real ComfyUI servers.

A server runs in a process of its own; nothing of ComfyUI is imported here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from comfy_server import Client, Server, make_base

# On models this small several threads mostly wait for each other: four times the processor's time of one, and more
# when the machine is busy. Before torch is imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # no template browser over an empty graph
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text stays on the canvas however small, for the screenshots
}
TASKS = ("t2v-A14B", "i2v-A14B", "ti2v-5B", "i2v-14B", "flf2v-14B")


FETCHED = {"COMFYUI_PATH": "comfyui-*", "WAN_TEST_TOKENIZER": "umt5-tokenizer-*", "WAN_TEST_FRONTEND": "frontend-*"}


def pytest_configure() -> None:
    """scripts/test.py names what it fetched in the environment; a plain ``pytest`` afterwards finds it in .cache."""
    for variable, pattern in FETCHED.items():
        if found := sorted((ROOT / ".cache").glob(pattern)):
            os.environ.setdefault(variable, str(found[-1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks by what a test needs: ``-m "not slow"`` and ``-m "not parity"`` choose among them."""
    slow = set((ROOT / "tests/slow.txt").read_text(encoding="utf-8").split())
    for item in items:
        home = item.path.relative_to(ROOT / "tests").parts[0]
        if home in ("comfy", "browser"):
            item.add_marker("server" if home == "comfy" else "browser")
        elif {"in_comfyui", "comfyui_path"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("parity")
        if f"{item.path.stem}::{getattr(item, 'originalname', item.name)}" in slow:
            item.add_marker("slow")


def fetched(variable: str) -> Path:
    if variable not in os.environ:
        pytest.fail(f"{variable} is not set: run `python scripts/test.py` once.")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def comfyui_path() -> Path:
    return fetched("COMFYUI_PATH")


@pytest.fixture(scope="session")
def umt5_tokenizer() -> Path:
    """The folder of the real tokenizer: spiece.model, tokenizer.json."""
    return fetched("WAN_TEST_TOKENIZER")


@pytest.fixture(scope="session")
def newest_frontend() -> Path:
    """A newer frontend than the one ComfyUI pins, as its --front-end-root takes it."""
    return fetched("WAN_TEST_FRONTEND")


@pytest.fixture(scope="session")
def night_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA file of the family's TI2V model, trained once, on one look."""
    from tests.core.nano_night import train_lora

    file = tmp_path_factory.mktemp("night") / "lora.safetensors"
    train_lora(file)
    return file


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints of every task under ComfyUI's own file names, as a models folder."""
    from wan_core.tools.tiny import write_tiny

    folder = tmp_path_factory.mktemp("models")
    for task in TASKS:
        write_tiny(folder, task, layout="comfyui")
    return folder


@pytest.fixture(scope="session")
def small_comfyui(comfyui_path: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private copy of ComfyUI whose native text encoder and CLIP vision encoder are as small as the checkpoints.

    ComfyUI builds umT5 and ViT-H from fixed configuration files, so that its own loaders could open the real files
    only. The copy's are written from the dimensions of the small checkpoints, and so are the numbers by which they are
    recognised (of umT5-XXL in versions since 0.9); nothing else is changed. Every server of the tests runs from it.
    """
    copy = tmp_path_factory.mktemp("comfyui") / "comfyui"
    copy.mkdir()
    for part in comfyui_path.iterdir():
        if part.is_file():
            shutil.copy(part, copy)
        elif part.name not in _USER_FOLDERS:
            shutil.copytree(part, copy / part.name)
    (copy / "extra_model_paths.yaml").unlink(missing_ok=True)
    path = copy / "comfy/text_encoders/umt5_config_xxl.json"
    (checkpoint,) = (models / "text_encoders").glob("umt5*.safetensors")
    dimensions = umt5_dimensions(checkpoint)
    path.write_text(json.dumps(json.loads(path.read_text()) | dimensions))
    _recognise_small_umt5(copy / "comfy/sd.py", dimensions["d_ff"])
    path = copy / "comfy/clip_vision_config_h.json"
    (checkpoint,) = (models / "clip_vision").glob("*.safetensors")
    dimensions = clip_vision_dimensions(checkpoint)
    path.write_text(json.dumps(json.loads(path.read_text()) | dimensions))
    _recognise_small_vit(copy / "comfy/clip_vision.py", dimensions["num_hidden_layers"])
    return copy


def _recognise_small_vit(loader: Path, layers: int) -> None:
    """ComfyUI goes by its last layer but one; as deep as the real one, the small one would take a gigabyte."""
    code, real = loader.read_text(encoding="utf-8"), "vision_model.encoder.layers.30.layer_norm1.weight"
    assert code.count(real) == 1, "this ComfyUI recognises a ViT-H by something new"
    loader.write_text(code.replace(real, real.replace("30", str(layers - 2))), encoding="utf-8")


def _recognise_small_umt5(loader: Path, width: int) -> None:
    """Versions up to 0.8 go by the 4096 channels, which the small one has too; later ones by the feed-forward width,
    with which 24 layers would take 12 GB however thin everything else is."""
    code = loader.read_text(encoding="utf-8")
    xxl = re.compile(r"(\bweight\.shape\[0\] == )10240(:\s+return TEModel\.T5_XXL\b)")
    by_channels = re.search(r"weight\.shape\[-1\] == 4096:\s+return TEModel\.T5_XXL\b", code)
    code, changed = xxl.subn(rf"\g<1>{width}\g<2>", code)
    assert changed == (0 if by_channels else 1), "this ComfyUI recognises a umT5-XXL by something new"
    loader.write_text(code, encoding="utf-8")


_USER_FOLDERS = (".git", ".venv", "venv", "models", "custom_nodes", "input", "output", "temp", "user")


def _shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Of the tensors of a safetensors file, read from its header."""
    with checkpoint.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}


def clip_vision_dimensions(checkpoint: Path) -> dict[str, int]:
    """ComfyUI's names for the dimensions of a CLIP vision file."""
    shapes = _shapes(checkpoint)
    mlp, width = shapes["vision_model.encoder.layers.0.mlp.fc1.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": 1 + max(int(key.split(".")[3]) for key in shapes if ".encoder.layers." in key),
        "projection_dim": shapes["visual_projection.weight"][0],
    }


def umt5_dimensions(checkpoint: Path) -> dict[str, int]:
    """ComfyUI's names for the dimensions of a umT5 file."""
    shapes = _shapes(checkpoint)
    vocabulary, width = shapes["shared.weight"]
    heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"][1]
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "num_heads": heads,
        "d_kv": shapes["encoder.block.0.layer.0.SelfAttention.q.weight"][0] // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_layers": 1 + max(int(key.split(".")[2]) for key in shapes if key.startswith("encoder.block.")),
    }


StartServer = Callable[..., Server]


@pytest.fixture(scope="session")
def start_server(
    comfyui_path: Path, small_comfyui: Path, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StartServer]:
    """start_server(name, *options): a ComfyUI with this pack and the small checkpoints; stopped when the tests end."""
    servers: list[Server] = []

    def start(name: str, *options: str) -> Server:
        base = make_base(tmp_path_factory.mktemp(name), comfyui_path, ROOT)
        (base / "models").rmdir()
        (base / "models").symlink_to(models)
        (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
        options = ("--cpu", "--disable-api-nodes", "--preview-method", "latent2rgb", *options)
        env = {"PYTHONPROFILEIMPORTTIME": "1"}  # what the pack adds to ComfyUI's start is read from the log
        servers.append(Server.start(sys.executable, small_comfyui, base, *options, env=env))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: StartServer) -> Server:
    """The server that most tests share, with the frontend that ComfyUI pins."""
    return start_server("server")


@pytest.fixture(scope="session")
def nano_files(server: Server) -> None:
    """The trained nano family beside the random checkpoints."""
    shutil.copytree(ROOT / "nano", server.base / "models", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png"))


@pytest.fixture
def client(server: Server) -> Client:
    """A client of its own for each test, so that it hears only its own prompts."""
    return Client(server.url, server.check)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """A failed test shows the end of the log of each server it used."""
    report = yield
    if report.failed:
        for name, value in getattr(item, "funcargs", {}).items():
            if isinstance(value, Server):
                report.sections.append((f"end of ComfyUI's log ({name})", value.tail()))
    return report
