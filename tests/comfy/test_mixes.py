"""ComfyUI's own nodes on either side of ours; where ComfyUI can do the same, the results must be the same.

Both run in float32 on one CPU, so they differ by the order of additions only: at most 1e-3 of the largest value over a
whole run, where every step adds to the difference; 1e-4 through a VAE.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from comfy_server import Client, Server
from PIL import Image

from tests.comfy import graphs as wan
from tests.comfy.graphs import Graph, Out

SIZE = {"width": 64, "height": 32, "length": 5, "batch_size": 1}
RUN = {"schedule": "simple", "solver": "euler", "steps": 4, "cfg_high": 2.0, "cfg_low": 2.0}


def native_model(g: Graph, name: str) -> Out:
    loaded = g.add("UNETLoader", unet_name=name, weight_dtype="default")
    return g.add("ModelSamplingSD3", model=loaded, shift=5.0)


def native_sample(g: Graph, name: str, sides: dict, latent: Out, *, denoise: float = 1.0) -> Out:
    return g.add(
        "KSampler",
        model=native_model(g, name),
        **sides,
        latent_image=latent,
        seed=7,
        steps=4,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=denoise,
    )


def native_advanced(g: Graph, name: str, sides: dict, latent: Out, start: int, end: int, *, add_noise: bool) -> Out:
    return g.add(
        "KSamplerAdvanced",
        model=native_model(g, name),
        **sides,
        latent_image=latent,
        noise_seed=7,
        steps=4,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        start_at_step=start,
        end_at_step=end,
        add_noise="enable" if add_noise else "disable",
        return_with_leftover_noise="enable",
    )


def run_saving(client: Client, server: Server, g: Graph, **outputs: Out) -> dict[str, torch.Tensor]:
    for name, out in outputs.items():
        wan.save_latent(g, out, name)
    run = client.run(g.nodes)
    assert run.ok, run.error
    return {name: wan.read_latent(server, name) for name in outputs}


def assert_same(saved: dict[str, torch.Tensor], tolerance: float = 1e-3) -> None:
    (reference_name, reference), *others = saved.items()
    assert reference.std() > 0.01
    for name, other in others:
        error = (other - reference).abs().max() / reference.abs().max()
        assert error <= tolerance, f"{name} differs from {reference_name} by {error:.2e}"


def conditioned(g: Graph, sides: dict, node: str, **inputs: object) -> tuple[dict, Out]:
    made = g.add(node, **sides, **inputs)
    return {"positive": made, "negative": made.at(1)}, made.at(2)


def test_text_to_video_equals_ksampler(client: Client, server: Server) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    sides, latent = wan.prompts(g), g.add("EmptyHunyuanLatentVideo", **SIZE)
    theirs = native_sample(g, name, sides, latent)
    ours = wan.sample(g, wan.load(g, name), sides, latent, **RUN)
    assert_same(run_saving(client, server, g, t2v_theirs=theirs, t2v_ours=ours))


@pytest.mark.parametrize("node", ["WanImageToVideo", "WanFirstLastFrameToVideo"])
def test_image_to_video_equals_ksampler(client: Client, server: Server, node: str) -> None:
    g, name = Graph(), wan.expert("i2v", "low")
    images = {"start_image": wan.photograph(g)}
    if "Last" in node:
        images["end_image"] = g.add("ImageInvert", image=images["start_image"])
    sides, latent = conditioned(g, wan.prompts(g), node, vae=wan.vae(g, "i2v"), **SIZE, **images)
    theirs = native_sample(g, name, sides, latent)
    ours = wan.sample(g, wan.load(g, name), sides, latent, **RUN)
    assert_same(run_saving(client, server, g, **{f"{node}_theirs": theirs, f"{node}_ours": ours}))


def test_our_image_to_video_feeds_ksampler(client: Client, server: Server) -> None:
    g, name = Graph(), wan.expert("i2v", "low")
    m = wan.load(g, name)
    size = {"width": 64, "height": 32, "frames": 5, "fit": "area", "batch_size": 1}
    sides, latent = conditioned(
        g, wan.prompts(g), "WanCoreImageToVideo", model=m, vae=wan.vae(g, "i2v"), start_image=wan.photograph(g), **size
    )
    theirs = native_sample(g, name, sides, latent)
    ours = wan.sample(g, m, sides, latent, **RUN)
    assert_same(run_saving(client, server, g, fed_theirs=theirs, fed_ours=ours))


def test_clean_first_frame_equals_ksampler(client: Client, server: Server) -> None:
    g = Graph()
    latent = g.add("Wan22ImageToVideoLatent", vae=wan.vae(g, "ti2v"), start_image=wan.photograph(g), **SIZE)
    sides = wan.prompts(g)
    theirs = native_sample(g, wan.DENSE, sides, latent)
    ours = wan.sample(g, wan.load(g, wan.DENSE), sides, latent, **RUN)
    saved = run_saving(client, server, g, ti2v_given=latent, ti2v_theirs=theirs, ti2v_ours=ours)
    given = saved.pop("ti2v_given")
    assert_same(saved)
    torch.testing.assert_close(saved["ti2v_ours"][:, :, 0], given[:, :, 0], rtol=1e-5, atol=1e-5)


def test_video_to_video_with_a_mask_equals_ksampler(client: Client, server: Server) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    pixels = g.add("RepeatImageBatch", image=scaled(g, wan.photograph(g)), amount=5)
    encoded = g.add("VAEEncode", pixels=pixels, vae=wan.vae(g, "t2v"))
    half = g.add("SolidMask", value=0.0, width=64, height=32)
    part = g.add("SolidMask", value=1.0, width=32, height=32)
    mask = g.add("MaskComposite", destination=half, source=part, x=32, y=0, operation="add")
    masked = g.add("SetLatentNoiseMask", samples=encoded, mask=mask)
    sides, m = wan.prompts(g), wan.load(g, name)
    theirs = native_sample(g, name, sides, masked, denoise=0.5)
    ours = wan.sample(g, m, sides, masked, **RUN, denoise=0.5)
    whole = wan.sample(g, m, sides, encoded, **RUN, denoise=0.5)
    saved = run_saving(client, server, g, v2v_theirs=theirs, v2v_ours=ours, v2v_whole=whole, v2v_given=encoded)
    given, free = saved.pop("v2v_given"), saved.pop("v2v_whole")
    assert_same(saved)
    torch.testing.assert_close(saved["v2v_ours"][..., :3], given[..., :3], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(free[..., :3], given[..., :3], atol=1e-2)


def scaled(g: Graph, image: Out) -> Out:
    return g.add("ImageScale", image=image, upscale_method="bilinear", width=64, height=32, crop="center")


def test_a_run_may_be_split_at_any_step(client: Client, server: Server) -> None:
    """Ours then ours, ours then ComfyUI's, ComfyUI's then ours: all equal the run in one go."""
    g, name = Graph(), wan.expert("t2v", "low")
    sides, latent, m = wan.prompts(g), g.add("EmptyHunyuanLatentVideo", **SIZE), wan.load(g, name)
    whole = wan.sample(g, m, sides, latent, **RUN)
    ours = wan.sample(g, m, sides, latent, **RUN, end_step=2)
    theirs = native_advanced(g, name, sides, latent, 0, 2, add_noise=True)
    rest = {"start_step": 2, "add_noise": False}
    saved = run_saving(
        client,
        server,
        g,
        split_whole=whole,
        split_ours=wan.sample(g, m, sides, ours, **RUN, **rest),
        split_to_theirs=native_advanced(g, name, sides, ours, 2, 4, add_noise=False),
        split_from_theirs=wan.sample(g, m, sides, theirs, **RUN, **rest),
    )
    assert_same(saved)


def test_sigmas_replace_the_schedule(client: Client, server: Server) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    sides, latent, m = wan.prompts(g), g.add("EmptyHunyuanLatentVideo", **SIZE), wan.load(g, name)
    sigmas = g.add("BasicScheduler", model=native_model(g, name), scheduler="simple", steps=4, denoise=1.0)
    whole = wan.sample(g, m, sides, latent, **RUN)
    given = wan.sample(g, m, sides, latent, **RUN | {"steps": 17, "shift": 1.0, "schedule": "auto"}, sigmas=sigmas)
    assert_same(run_saving(client, server, g, sigmas_own=whole, sigmas_given=given), 1e-5)


def test_text_encoders_agree(client: Client, server: Server) -> None:
    """ComfyUI's CLIPLoader (type wan) and ours, through ComfyUI's prompt node, make our sampler do the same."""
    g, name = Graph(), wan.expert("t2v", "low")
    native = g.add("CLIPLoader", clip_name=wan.TEXT_ENCODER, type="wan", device="default")
    latent, m = g.add("EmptyHunyuanLatentVideo", **SIZE), wan.load(g, name)
    runs = {
        "text_theirs": wan.sample(g, m, wan.prompts(g, native), latent, **RUN),
        "text_ours": wan.sample(g, m, wan.prompts(g), latent, **RUN),
    }
    assert_same(run_saving(client, server, g, **runs))


def test_vaes_agree_in_encoding(client: Client, server: Server) -> None:
    g = Graph()
    photo = scaled(g, wan.photograph(g))
    pixels = g.add(
        "ImageBatch",
        image1=g.add("RepeatImageBatch", image=photo, amount=2),
        image2=g.add("RepeatImageBatch", image=g.add("ImageInvert", image=photo), amount=3),
    )
    ours, theirs = wan.vae(g, "t2v"), g.add("VAELoader", vae_name=wan.VAES["t2v"])
    tiles = {"tile_size": 64, "overlap": 0, "temporal_size": 64, "temporal_overlap": 8}
    outputs = {
        "encode_theirs": g.add("VAEEncode", pixels=pixels, vae=theirs),
        "encode_theirs_by_our_node": g.add("WanCoreVAEEncode", image=pixels, vae=theirs),
        "encode_ours": g.add("WanCoreVAEEncode", image=pixels, vae=ours),
        "encode_ours_by_their_node": g.add("VAEEncode", pixels=pixels, vae=ours),
        "encode_ours_tiled": g.add("VAEEncodeTiled", pixels=pixels, vae=ours, **tiles),
    }
    saved = run_saving(client, server, g, **outputs)
    assert saved["encode_ours"].shape == (1, 16, 2, 4, 8)
    assert_same(saved, 1e-4)


def test_vaes_agree_in_decoding(client: Client) -> None:
    g, name = Graph(), wan.expert("t2v", "low")
    latent = g.add("EmptyHunyuanLatentVideo", **SIZE | {"batch_size": 2})
    sampled = wan.sample(g, wan.load(g, name), wan.prompts(g), latent, **RUN)
    ours, theirs = wan.vae(g, "t2v"), g.add("VAELoader", vae_name=wan.VAES["t2v"])
    tiles = {"tile_size": 128, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    outputs = {
        "theirs": g.add("VAEDecode", samples=sampled, vae=theirs),
        "theirs_by_our_node": g.add("WanCoreVAEDecode", samples=sampled, vae=theirs),
        "ours": g.add("WanCoreVAEDecode", samples=sampled, vae=ours),
        "ours_by_their_node": g.add("VAEDecode", samples=sampled, vae=ours),
        "ours_tiled": g.add("VAEDecodeTiled", samples=sampled, vae=ours, **tiles),
    }
    savers = {g.add("SaveImage", images=out, filename_prefix=key).node: key for key, out in outputs.items()}
    run = client.run(g.nodes)
    assert run.ok, run.error
    outputs = run.history["outputs"]  # of other nodes, their texts
    pictures = {name: frames(client, outputs[node]["images"]) for node, name in savers.items()}
    assert pictures["theirs"].shape == (10, 32, 64, 3)
    assert pictures["theirs"].std() > 1
    for key, picture in pictures.items():
        assert np.abs(picture - pictures["theirs"]).max() <= 1, key  # of 255: rounding to 8 bits


def frames(client: Client, files: list[dict]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(client.download(f))).convert("RGB"), np.int16) for f in files])


def test_native_vae_feeds_our_image_to_video(client: Client, server: Server) -> None:
    g = Graph()
    m = wan.load(g, wan.expert("i2v", "low"))
    sides, photo = wan.prompts(g), wan.photograph(g)
    runs = {}
    for name, v in (("native", g.add("VAELoader", vae_name=wan.VAES["i2v"])), ("own", wan.vae(g, "i2v"))):
        fed, latent = conditioned(
            g,
            sides,
            "WanCoreImageToVideo",
            model=m,
            vae=v,
            width=64,
            height=32,
            frames=5,
            fit="exact",
            batch_size=1,
            start_image=photo,
        )
        runs[f"i2v_{name}_vae"] = wan.sample(g, m, fed, latent, **RUN)
    assert_same(run_saving(client, server, g, **runs))


def test_latents_survive_a_file(client: Client, server: Server) -> None:
    """SaveLatent, LoadLatent, and on with the second half of the run."""
    g, name = Graph(), wan.expert("t2v", "low")
    sides, latent, m = wan.prompts(g), g.add("EmptyHunyuanLatentVideo", **SIZE), wan.load(g, name)
    saved = run_saving(
        client,
        server,
        g,
        file_whole=wan.sample(g, m, sides, latent, **RUN),
        file_half=wan.sample(g, m, sides, latent, **RUN, end_step=2),
    )
    half = sorted((server.base / "output/latents").glob("file_half_*.latent"))[-1]
    (server.base / "input" / "half.latent").write_bytes(half.read_bytes())
    g = Graph()
    loaded = g.add("LoadLatent", latent="half.latent")
    rest = wan.sample(g, wan.load(g, name), wan.prompts(g), loaded, **RUN, start_step=2, add_noise=False)
    assert_same({"whole": saved["file_whole"]} | run_saving(client, server, g, file_rest=rest))
