"""Mistakes of a user: each is named with what was found, what was expected and what to do, before weights are read.

What the widgets alone show is refused when the graph is queued; what needs two nodes, when the node runs.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_server import Client, PromptRejected, Server

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out
from wan_core.tools.tiny import TinySizes, write_tiny

SMALL = {"width": 64, "height": 64, "frames": 5}
NATIVE = {"width": 64, "height": 64, "length": 5, "batch_size": 1}


def says(text: str, *parts: str) -> None:
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in: {text}"


def refused(client: Client, g: Graph, last: Out, *parts: str) -> None:
    """The graph is not even queued, and the message is given once, at the node that is wrong."""
    with pytest.raises(PromptRejected) as rejected:
        client.submit(ending(g, last).nodes)
    (errors,) = rejected.value.errors.values()
    (error,) = errors
    says(error["details"], *parts)


def fails(client: Client, server: Server, g: Graph, last: Out, *parts: str) -> None:
    """The graph runs into an error, and no diffusion model was read until then."""
    before = transformers_read(server)
    run = client.run(ending(g, last).nodes)
    assert run.error, "the run should have failed"
    says(run.error, *parts)
    assert [data["exception_type"].rpartition(".")[2] for data in run.of("execution_error")] == ["WanError"]
    assert transformers_read(server) == before


def ending(g: Graph, last: Out) -> Graph:
    g.add("PreviewAny", source=last)
    return g


def transformers_read(server: Server) -> int:
    return server.said().count("wan_core: loaded dit")


@pytest.fixture(scope="module")
def folders(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The server's models folder with broken and unsuitable files added."""
    models = server.base / "models"
    real = models / "diffusion_models" / wan.expert("t2v", "low")
    made = {
        "diffusion_models/bad_empty.safetensors": b"",
        "diffusion_models/bad_truncated.safetensors": real.read_bytes()[:1_000_000],
        "diffusion_models/bad_corrupt.safetensors": b"\xff" * 4096,
        "diffusion_models/bad_page.pth": b"<!DOCTYPE html><html><body>Not Found</body></html>",
        "diffusion_models/bad_code.pth": pickle.dumps(Malicious()),
        "diffusion_models/bad_other_model.safetensors": other_model(),
        "diffusion_models/bad_shards/model-00001-of-00002.safetensors": real.read_bytes(),
        "diffusion_models/bad_shards/model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        ).encode(),
        "diffusion_models/bad_wider_low_noise.safetensors": b"",
        "text_encoders/bad_width.safetensors": b"",
        "text_encoders/bad_lonely.pth": b"",
    }
    for name, content in made.items():
        (models / name).parent.mkdir(exist_ok=True)
        (models / name).write_bytes(content)
    other = tmp_path_factory.mktemp("other")
    write_tiny(other / "comfyui", "t2v-A14B", layout="comfyui", sizes=TinySizes(dim=128, text_dim=64))
    write_tiny(other / "official", "t2v-A14B", layout="official", sizes=TinySizes(dim=128, text_dim=64))
    parts = other / "comfyui"
    shutil.copy(parts / "diffusion_models" / wan.expert("t2v", "low"), models / [*made][-3])
    shutil.copy(parts / "text_encoders" / wan.TEXT_ENCODER, models / [*made][-2])
    shutil.copy(other / "official/models_t5_umt5-xxl-enc-bf16.pth", models / [*made][-1])
    yield models
    for name in made:
        (models / name).unlink()
    (models / "diffusion_models/bad_shards").rmdir()


class Malicious:
    def __reduce__(self):
        return print, ("this would be code of the file's author",)


def other_model() -> bytes:
    from safetensors.torch import save

    return save({"unet.conv_in.weight": torch.zeros(4, 4)})


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("not_there.safetensors", ["not_there.safetensors", "diffusion_models", "press R"]),
        ("bad_empty.safetensors", ["bad_empty", "empty", "fetch it again"]),
        ("bad_truncated.safetensors", ["bad_truncated", "truncated or corrupt", "found 1000000", "Download it again"]),
        ("bad_corrupt.safetensors", ["bad_corrupt", "truncated or corrupt"]),
        ("bad_page.pth", ["bad_page", "neither safetensors nor", "web page"]),
        ("bad_code.pth", ["bad_code", "refused", "run code", "Use a safetensors"]),
        ("bad_other_model.safetensors", ["bad_other_model", "not a Wan diffusion model", "unet.conv_in.weight"]),
        ("bad_shards", ["bad_shards", "lacks 1 of 2", "model-00002-of-00002", "fetch the missing"]),
    ],
)
def test_files(client: Client, folders: Path, name: str, parts: list[str]) -> None:
    g = Graph()
    refused(client, g, wan.load(g, name), *parts)


def test_file_of_another_part(client: Client, folders: Path) -> None:
    shutil.copy(folders / "vae" / wan.VAES["t2v"], folders / "diffusion_models/bad_vae.safetensors")
    g = Graph()
    refused(client, g, wan.load(g, "bad_vae.safetensors"), "is not a Wan diffusion model", "a Wan VAE", "Load Wan VAE")
    (folders / "diffusion_models/bad_vae.safetensors").unlink()


def test_tokenizer_not_found(client: Client, folders: Path) -> None:
    g = Graph()
    encoder = g.add("WanCoreLoadTextEncoder", text_encoder_name="bad_lonely.pth", dtype="auto", device="default")
    refused(client, g, encoder, "No tokenizer found", "bad_lonely.pth", "google/umt5-xxl")


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"frames": 6}, ["6 frames", "4n + 1", "5 and 9"]),
        ({"width": 100}, ["width is 100", "multiple of 16", "nearest is 96"]),
        ({"height": 0}, ["height is 0", "multiple of 16", "nearest is 16"]),
    ],
)
def test_sizes(client: Client, values: dict, parts: list[str]) -> None:
    g = Graph()
    refused(client, g, wan.empty(g, wan.load(g, wan.DENSE), **SMALL | values), *parts)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"solver": "unipcc"}, ["Unknown solver 'unipcc'", "unipc, dpm++, euler, heun", "Did you mean 'unipc'"]),
        ({"schedule": "karras"}, ["Unknown schedule 'karras'", "simple"]),
        ({"start_step": 3}, ["start step is 3", "3 steps", "expected 0 to 2"]),
        ({"start_step": 2, "end_step": 1}, ["start step is 2", "end step 1", "nothing would be done"]),
        ({"shift": 0.0}, ["shift is 0", "above 0"]),
        ({"denoise": 1.5}, ["denoise is 1.5", "at most 1"]),
        ({"steps": 0}, ["0 steps", "at least 1"]),
    ],
)
def test_sampler_settings(client: Client, values: dict, parts: list[str]) -> None:
    g = Graph()
    m = wan.load(g, wan.DENSE)
    refused(client, g, wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SMALL), **values), *parts)


@pytest.mark.parametrize(
    ("mode", "boundary", "parts"),
    [("timestep", 2.0, ["timestep", "2.0", "0 to 1"]), ("step", 0.5, ["step", "0.5"]), ("soon", 1.0, ["soon", "auto"])],
)
def test_switch_settings(client: Client, mode: str, boundary: float, parts: list[str]) -> None:
    g = Graph()
    refused(client, g, wan.model(g, "t2v", mode=mode, boundary=boundary), *parts)


def test_unknown_dtype_and_attention(client: Client, server: Server) -> None:
    g = Graph()
    refused(client, g, wan.load(g, wan.DENSE, dtype="int7"), "int7", "bfloat16")
    g = Graph()
    fails(client, server, g, wan.load(g, wan.DENSE, attention="sage"), "sage", "pip install sageattention")


def pair(g: Graph, high: str, low: str) -> Out:
    first, second = wan.load(g, high), wan.load(g, low)
    return g.add("WanCoreExpertSwitch", high=first, low=second, mode="auto", boundary=0.875)


def test_swapped_experts(client: Client, server: Server) -> None:
    g = Graph()
    low, high = wan.expert("t2v", "low"), wan.expert("t2v", "high")
    fails(client, server, g, pair(g, low, high), "swapped", low, high, "Exchange the two inputs")


def test_experts_of_different_models(client: Client, server: Server) -> None:
    g = Graph()
    last = pair(g, wan.expert("i2v", "high"), wan.expert("t2v", "low"))
    fails(client, server, g, last, "not experts of one model", "I2V-A14B", "T2V-A14B", "in_channels 36 and 16")


def test_experts_of_different_widths(client: Client, server: Server, folders: Path) -> None:
    g = Graph()
    last = pair(g, wan.expert("t2v", "high"), "bad_wider_low_noise.safetensors")
    fails(client, server, g, last, "not experts of one model", "dim 256 and 128")


def test_the_same_file_twice_is_a_warning(client: Client) -> None:
    g = Graph()
    name = wan.expert("t2v", "high")
    joined = pair(g, name, name)
    run = client.run(ending(g, joined).nodes)
    assert run.ok
    (shown,) = run.history["outputs"][joined.node]["text"]
    says(shown, "Warning", "same file", name)


def test_latent_of_the_other_vae(client: Client, server: Server) -> None:
    g = Graph()
    sides, small = wan.prompts(g), g.add("EmptyHunyuanLatentVideo", **NATIVE)
    last = wan.sample(g, wan.load(g, wan.DENSE), sides, small)
    fails(client, server, g, last, "[1, 16, 2, 8, 8]", "TI2V-5B", "[batch, 48", "wan2.1 VAE", "Wan Empty Latent")
    g = Graph()
    sides, large = wan.prompts(g), wan.empty(g, wan.load(g, wan.DENSE), **SMALL)
    last = wan.sample(g, wan.load(g, wan.expert("t2v", "low")), sides, large)
    fails(client, server, g, last, "[1, 48, 2, 4, 4]", "T2V-A14B", "[batch, 16", "wan2.2 VAE", "wan_2.1_vae")


def test_latent_of_an_image(client: Client, server: Server) -> None:
    g = Graph()
    latent = g.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    last = wan.sample(g, wan.load(g, wan.DENSE), wan.prompts(g), latent)
    fails(client, server, g, last, "[1, 4, 8, 8]", "latent of an image", "Wan Empty Latent")


@pytest.mark.parametrize("decoder", ["WanCoreVAEDecode", "VAEDecode", "VAEDecodeTiled"])
@pytest.mark.parametrize(
    ("loader", "options", "model", "wrong", "right"),
    [
        ("WanCoreLoadVAE", {"dtype": "auto"}, wan.expert("t2v", "low"), "wan2.2_vae", "wan_2.1_vae"),
        ("VAELoader", {}, wan.DENSE, "wan_2.1_vae", "wan2.2_vae"),
    ],
)
def test_vae_of_the_other_kind_is_found_before_sampling(
    client: Client, server: Server, decoder: str, loader: str, options: dict, model: str, wrong: str, right: str
) -> None:
    """Also when the latent goes through other nodes on its way to the decoder."""
    g = Graph()
    m, vae = wan.load(g, model), g.add(loader, vae_name=f"{wrong}.safetensors", **options)
    sampled = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SMALL))
    repeated = g.add("RepeatLatentBatch", samples=sampled, amount=2)
    tiles = {"tile_size": 512, "overlap": 64, "temporal_size": 64, "temporal_overlap": 8}
    last = g.add(decoder, samples=repeated, vae=vae, **tiles if decoder == "VAEDecodeTiled" else {})
    fails(client, server, g, last, f"{wrong}.safetensors, which node {vae.node} loads", f"Load {right}.safetensors")


def test_vae_of_the_other_kind_for_the_image(client: Client, server: Server) -> None:
    for name, kind, wanted in ((wan.DENSE, "i2v", "wan2.2_vae"), (wan.expert("i2v", "low"), "ti2v", "wan_2.1_vae")):
        g = Graph()
        last = to_video(g, wan.load(g, name), vae=wan.vae(g, kind), start_image=wan.photograph(g))
        fails(client, server, g, last, "This VAE makes latents of", f"Load {wanted}.safetensors")


def to_video(g: Graph, m: Out, **inputs: object) -> Out:
    values = SMALL | {"fit": "area", "batch_size": 1} | wan.prompts(g) | inputs
    return g.add("WanCoreImageToVideo", model=m, **values).at(2)


def test_decoding_with_the_other_vae(client: Client, server: Server) -> None:
    g = Graph()
    last = wan.decode(g, wan.vae(g, "ti2v"), g.add("EmptyHunyuanLatentVideo", **NATIVE))
    fails(client, server, g, last, "[1, 16, 2, 8, 8]", "[batch, 48", "wan2.1 VAE", "load wan_2.1_vae.safetensors")


def test_images_for_models_that_take_none(client: Client, server: Server) -> None:
    g = Graph()
    last = to_video(g, wan.load(g, wan.expert("t2v", "low")), vae=wan.vae(g, "t2v"), start_image=wan.photograph(g))
    fails(client, server, g, last, "T2V-A14B takes no image", "Load an I2V or TI2V-5B model")
    g = Graph()
    last = to_video(g, wan.load(g, wan.DENSE), vae=wan.vae(g, "ti2v"), end_image=wan.photograph(g))
    fails(client, server, g, last, "TI2V-5B takes a start image only", "Remove the end image")


def test_image_model_without_image(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    fails(client, server, g, to_video(g, m, vae=wan.vae(g, "i2v")), "I2V-A14B animates an image", "start_image")
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    last = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SMALL))
    fails(client, server, g, last, "positive conditioning carries none", "Wan Image to Video")


@pytest.mark.parametrize(("name", "advice"), [(wan.expert("t2v", "low"), "wan2.2_i2v"), (wan.DENSE, "Wan22Image")])
def test_image_conditioning_for_another_model(client: Client, server: Server, name: str, advice: str) -> None:
    g = Graph()
    m = wan.load(g, name)
    shot = g.add("WanImageToVideo", **wan.prompts(g), vae=wan.vae(g, "i2v"), start_image=wan.photograph(g), **NATIVE)
    last = wan.sample(g, m, {"positive": shot, "negative": shot.at(1)}, wan.empty(g, m, **SMALL))
    fails(client, server, g, last, "carries an image for an I2V model", advice)


def test_image_conditioning_of_another_length(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    shot = g.add("WanImageToVideo", **wan.prompts(g), vae=wan.vae(g, "i2v"), start_image=wan.photograph(g), **NATIVE)
    longer = wan.empty(g, m, **SMALL | {"frames": 9})
    last = wan.sample(g, m, {"positive": shot, "negative": shot.at(1)}, longer)
    fails(client, server, g, last, "[1, 16, 2, 8, 8]", "expects [1, 16, 3, 8, 8]", "same number of frames")


def test_conditioning_of_another_family(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "low"))
    shot = g.add("WanVaceToVideo", **wan.prompts(g), vae=wan.vae(g, "t2v"), strength=1.0, **NATIVE)
    last = wan.sample(g, m, {"positive": shot, "negative": shot.at(1)}, shot.at(2))
    fails(client, server, g, last, "vace_frames", "a VACE model", "T2V-A14B")


def test_text_encoder_of_another_width(client: Client, server: Server, folders: Path) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "low"))
    encoder = g.add("WanCoreLoadTextEncoder", text_encoder_name="bad_width.safetensors", dtype="auto", device="cpu")
    last = wan.sample(g, m, wan.prompts(g, encoder), wan.empty(g, m, **SMALL))
    fails(client, server, g, last, "encoded 64 wide", "takes 4096", "umT5-XXL")


def test_size_of_the_dense_model(client: Client, server: Server) -> None:
    g = Graph()
    last = wan.empty(g, wan.load(g, wan.DENSE), **SMALL | {"width": 112})
    fails(client, server, g, last, "112x64", "multiples of 32", "nearest is 128x64")


def test_frames_and_size_of_an_encoded_video(client: Client, server: Server) -> None:
    for amount, width, parts in ((6, 64, ["6 frames", "5 and 9"]), (5, 60, ["60x64", "multiples of 8", "64x64"])):
        g = Graph()
        image = g.add("EmptyImage", width=width, height=64, batch_size=amount, color=0)
        fails(client, server, g, g.add("WanCoreVAEEncode", vae=wan.vae(g, "t2v"), image=image), *parts)


def test_sigmas_of_another_model(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("t2v", "low"))
    sigmas = g.add("KarrasScheduler", steps=5, sigma_max=14.6, sigma_min=0.03, rho=7.0)
    last = wan.sample(g, m, wan.prompts(g), wan.empty(g, m, **SMALL), sigmas=sigmas)
    fails(client, server, g, last, "14.6", "flow model", "within 0..1")
