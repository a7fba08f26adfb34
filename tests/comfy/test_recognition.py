"""Files as users have them on a real server: a whole model in one file, no ending, neighbours that come and go."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Run, Server
from safetensors import safe_open

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from wan_core.models.text.tokenizer import train_tiny_tokenizer, write_tokenizer_folder
from wan_core.tools.tiny import _VOCABULARY_TEXTS, TinySizes, write_tiny


def options(client: Client, node: str, name: str) -> list[str]:
    (kind, *rest) = client.object_info(node)[node]["input"]["required"][name]
    return kind if isinstance(kind, list) else rest[0]["options"]


def sampled(client: Client, server: Server, model: str, encoder: str, vae: str) -> torch.Tensor:
    g = Graph()
    clip = g.add("WanCoreLoadTextEncoder", text_encoder_name=encoder, dtype="float32", device="default")
    m, v = wan.load(g, model), g.add("WanCoreLoadVAE", vae_name=vae, dtype="float32")
    latent = wan.sample(g, m, wan.prompts(g, clip), wan.empty(g, m), steps=1)
    g.add("SaveImage", images=wan.decode(g, v, latent), filename_prefix="recognised")
    wan.save_latent(g, latent, "recognised")
    run = client.run(g.nodes)
    assert run.ok, run.error
    return wan.read_latent(server, "recognised")


@pytest.fixture
def whole(client: Client, server: Server) -> str:
    """A whole model in one file, saved by ComfyUI itself: the name in the checkpoints folder."""
    g = Graph()
    clip = g.add("CLIPLoader", clip_name=wan.TEXT_ENCODER, type="wan", device="default")
    unet = g.add("UNETLoader", unet_name=wan.DENSE, weight_dtype="default")
    vae = wan.vae(g, "ti2v")  # ComfyUI's own loader knows this VAE in its real size only
    g.add("CheckpointSave", model=unet, clip=clip, vae=vae, filename_prefix="whole")
    run = client.run(g.nodes)
    assert run.ok, run.error
    (saved,) = (server.base / "output").glob("whole*.safetensors")
    home = server.base / "models/checkpoints"
    home.mkdir(exist_ok=True)
    shutil.move(saved, home / "zz_whole.safetensors")
    yield "zz_whole.safetensors"
    (home / "zz_whole.safetensors").unlink()


def test_a_checkpoint_that_comfyui_saved_has_a_part_for_each_loader(client: Client, server: Server, whole: str) -> None:
    with safe_open(server.base / "models/checkpoints" / whole, "pt") as file:
        roots = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert {"model", "vae", "text_encoders"} <= roots
    for node, name in (
        ("WanCoreLoadModel", "model_name"),
        ("WanCoreLoadTextEncoder", "text_encoder_name"),
        ("WanCoreLoadVAE", "vae_name"),
    ):
        assert options(client, node, name)[-1] == whole
    found = sampled(client, server, whole, whole, whole)
    expected = sampled(client, server, wan.DENSE, wan.TEXT_ENCODER, wan.VAES["ti2v"])
    assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()  # the file's text encoder is in float16


def test_files_without_an_ending_are_listed_and_read(client: Client, server: Server) -> None:
    home = server.base / "models/vae"
    names = ["wan2.1_vae_without", "UPPER.SAFETENSORS", "again.safetensors.1"]
    for name in names:
        shutil.copy(home / wan.VAES["t2v"], home / name)
    for other, content in {"notes": b"some words", "part.safetensors.part": (home / names[0]).read_bytes()}.items():
        (home / other).write_bytes(content)
    try:
        listed = options(client, "WanCoreLoadVAE", "vae_name")
        assert set(names) <= set(listed)
        assert not {"notes", "part.safetensors.part"} & set(listed)
        g = Graph()
        vaes = [g.add("WanCoreLoadVAE", vae_name=name, dtype="float32") for name in names]
        for vae in vaes:
            g.add("PreviewAny", source=vae)
        run = client.run(g.nodes)
        assert run.ok, run.error
    finally:
        for name in (*names, "notes", "part.safetensors.part"):
            (home / name).unlink()


@pytest.fixture
def lonely(server: Server, tmp_path: Path) -> Path:
    write_tiny(tmp_path, "t2v-A14B", layout="official", sizes=TinySizes(dim=128, text_dim=64))
    home = server.base / "models/text_encoders/lonely"
    home.mkdir()
    shutil.copy(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", home)
    yield home
    shutil.rmtree(home)


def encoded(client: Client, name: str) -> Run:
    g = Graph()
    clip: Out = g.add("WanCoreLoadTextEncoder", text_encoder_name=name, dtype="float32", device="default")
    g.add("PreviewAny", source=g.add("CLIPTextEncode", clip=clip, text="a cat"))
    return client.run(g.nodes)


def test_a_tokenizer_that_appears_changes_or_goes_is_noticed(client: Client, lonely: Path) -> None:
    """The text encoder's file stays as it is; only what lies beside it changes."""
    name = "lonely/models_t5_umt5-xxl-enc-bf16.pth"
    with pytest.raises(PromptRejected, match="No tokenizer found"):
        encoded(client, name)
    write_tokenizer_folder(lonely / "google/umt5-xxl", train_tiny_tokenizer(_VOCABULARY_TEXTS))
    run = encoded(client, name)
    assert run.ok, run.error
    again = encoded(client, name)
    assert again.ok
    assert not again.executed
    (lonely / "google/umt5-xxl/tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}}}')
    changed = encoded(client, name)  # the spiece.model beside it is right
    assert changed.ok
    assert changed.executed
    (lonely / "google/umt5-xxl/spiece.model").unlink()
    with pytest.raises(PromptRejected, match="tokenizer.json is not umT5's"):
        encoded(client, name)
