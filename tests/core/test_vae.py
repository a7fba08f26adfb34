"""Both autoencoders against diffusers and ComfyUI, streaming, causality and input checks."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan

from wan_core.config import VAES, VAEConfig
from wan_core.errors import WanError
from wan_core.layouts.vae import DIALECTS, diffusers_config, diffusers_dialect
from wan_core.loading.vae import VAE_CLASSES
from wan_core.models.vae import layers
from wan_core.models.vae.layers import FrameCache
from wan_core.models.vae.vae import LATENT_MEAN, LATENT_STD, VideoVAE, fold_pixels, unfold_pixels
from wan_core.tools.tiny import _random_weights

TOLERANCE = 1e-4  # of the issue; float32 differs by about 1e-6
FRAMES = (1, 5, 17, 33)
STRIDE = {kind: spec.spatial_stride for kind, spec in VAES.items()}

SMALL = {
    "wan2.1": VAEConfig("wan2.1", channels=16, encoder_dim=8, decoder_dim=8),
    "wan2.2": VAEConfig("wan2.2", channels=48, encoder_dim=8, decoder_dim=12),
}
REAL = {
    "wan2.1": VAEConfig("wan2.1", channels=16, encoder_dim=96, decoder_dim=96),
    "wan2.2": VAEConfig("wan2.2", channels=48, encoder_dim=160, decoder_dim=256),
}
KINDS = tuple(SMALL)

COMFY_CODE = """
if inputs["kind"] == "wan2.1":
    from comfy.ldm.wan.vae import WanVAE
    extra = {}
else:
    from comfy.ldm.wan.vae2_2 import WanVAE
    extra = {"dec_dim": inputs["decoder_dim"]}
from comfy import latent_formats
space = latent_formats.Wan21() if inputs["kind"] == "wan2.1" else latent_formats.Wan22()
model = WanVAE(dim=inputs["encoder_dim"], z_dim=inputs["channels"], dim_mult=[1, 2, 4, 4], num_res_blocks=2,
               attn_scales=[], temperal_downsample=[False, True, True], dropout=0.0, **extra)
model.load_state_dict(inputs["weights"])
model.eval()
with torch.inference_mode():
    for name, video in inputs["videos"].items():
        outputs[f"encode {name}"] = space.process_in(model.encode(video)).clone()
    for name, latent in inputs["latents"].items():
        outputs[f"decode {name}"] = model.decode(space.process_out(latent)).clamp(-1, 1).clone()
"""


def make_vae(config: VAEConfig, seed: int = 0) -> VideoVAE:
    """Random weights that keep the signal's size; gains and biases differ from channel to channel, so each matters."""
    kind = VAE_CLASSES[config.kind]
    with torch.device("meta"):
        vae = kind(config)
    vae.load_state_dict(_random_weights(kind, config, torch.Generator().manual_seed(seed)), assign=True)
    return vae.eval().requires_grad_(False)


def make_video(frames: int, height: int, width: int, seed: int = 1) -> torch.Tensor:
    """[1, 3, F, H, W] in -1..1."""
    return torch.rand(1, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def make_latent(vae: VideoVAE, frames: int, height: int, width: int, seed: int = 2) -> torch.Tensor:
    """[1, C, T, h, w], normal."""
    return torch.randn(1, vae.spec.channels, frames, height, width, generator=torch.Generator().manual_seed(seed))


def diffusers_weights(vae: VideoVAE) -> dict[str, torch.Tensor]:
    renames = DIALECTS[diffusers_dialect(vae.config.kind)]
    return {renames.to_theirs(key): value for key, value in vae.state_dict().items()}


def diffusers_twin(vae: VideoVAE) -> AutoencoderKLWan:
    with torch.device("meta"):
        twin = AutoencoderKLWan.from_config(diffusers_config(vae.config))
    twin.load_state_dict(diffusers_weights(vae), assign=True)
    return twin.eval().requires_grad_(False)


def diffusers_encode(vae: VideoVAE, video: torch.Tensor) -> torch.Tensor:
    """The normalised latent, with the constants that diffusers' own config carries."""
    twin = diffusers_twin(vae)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in _constants(twin))
    with torch.no_grad():
        return (twin.encode(video).latent_dist.mode() - mean) / std


def diffusers_decode(vae: VideoVAE, latent: torch.Tensor) -> torch.Tensor:
    twin = diffusers_twin(vae)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in _constants(twin))
    with torch.no_grad():
        return twin.decode(latent * std + mean, return_dict=False)[0]


def _constants(twin: AutoencoderKLWan) -> tuple[list[float], list[float]]:
    return twin.config.latents_mean, twin.config.latents_std


@pytest.fixture(scope="module", params=KINDS)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    return make_vae(SMALL[request.param])


def video_for(vae: VideoVAE, frames: int) -> torch.Tensor:
    return make_video(frames, 2 * vae.spec.spatial_stride, 3 * vae.spec.spatial_stride)


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert expected.std() > 0.05  # a reference that is flat would prove nothing
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("frames", FRAMES)
def test_encode_as_diffusers(vae: VideoVAE, frames: int):
    video = video_for(vae, frames)
    assert_near(vae.encode(video), diffusers_encode(vae, video))


@pytest.mark.parametrize("frames", FRAMES)
def test_decode_as_diffusers(vae: VideoVAE, frames: int):
    latent = make_latent(vae, 1 + frames // 4, 2, 3)
    assert_near(vae.decode(latent), diffusers_decode(vae, latent))


def comfyui_outputs(in_comfyui: Callable[..., dict], vae: VideoVAE, videos: dict, latents: dict) -> dict:
    config = vae.config
    dims = {"encoder_dim": config.encoder_dim, "decoder_dim": config.decoder_dim, "channels": config.channels}
    return in_comfyui(COMFY_CODE, kind=config.kind, weights=vae.state_dict(), videos=videos, latents=latents, **dims)


def test_as_comfyui(vae: VideoVAE, in_comfyui: Callable[..., dict]):
    videos = {str(n): video_for(vae, n) for n in FRAMES}
    latents = {str(n): make_latent(vae, 1 + n // 4, 2, 3) for n in FRAMES}
    expected = comfyui_outputs(in_comfyui, vae, videos, latents)
    for name in videos:
        assert_near(vae.encode(videos[name]), expected[f"encode {name}"])
        assert_near(vae.decode(latents[name]), expected[f"decode {name}"])


def make_real_vae(kind: str) -> VideoVAE:
    """The published widths; 8 million random numbers stand in many places, because drawing 700 million takes long."""
    with torch.device("meta"):
        vae = VAE_CLASSES[kind](REAL[kind])
    pool = torch.randn(8_000_009, generator=torch.Generator().manual_seed(0))
    weights = {}
    for key, slot in vae.state_dict().items():
        values = pool.roll(len(weights) * 1009)[: slot.numel()].repeat(-(-slot.numel() // len(pool)))
        scale = 0.1 if slot.ndim == 1 or key.endswith("gamma") else slot[0].numel() ** -0.5
        weights[key] = values[: slot.numel()].view(slot.shape).mul_(scale).add_(key.endswith("gamma"))
    vae.load_state_dict(weights, assign=True)
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_real_widths(kind: str):
    """Against diffusers, which shares the weights; ComfyUI at full width is compared by ``python -m bench cpu``."""
    vae = make_real_vae(kind)
    video, latent = make_video(5, STRIDE[kind], 2 * STRIDE[kind]), make_latent(vae, 2, 1, 2)
    assert_near(vae.encode(video), diffusers_encode(vae, video))
    assert_near(vae.decode(latent), diffusers_decode(vae, latent))


def test_constants_are_those_of_comfyui(in_comfyui: Callable[..., dict]):
    found = in_comfyui("""
        from comfy import latent_formats
        for kind, space in (("wan2.1", latent_formats.Wan21()), ("wan2.2", latent_formats.Wan22())):
            outputs[kind] = (space.latents_mean.flatten().tolist(), space.latents_std.flatten().tolist())
    """)
    for kind in KINDS:
        assert torch.allclose(torch.tensor(found[kind][0]), torch.tensor(LATENT_MEAN[kind]), rtol=0, atol=1e-7)
        assert torch.allclose(torch.tensor(found[kind][1]), torch.tensor(LATENT_STD[kind]), rtol=0, atol=1e-7)
        assert len(LATENT_MEAN[kind]) == len(LATENT_STD[kind]) == VAES[kind].channels


def test_batches_are_independent(vae: VideoVAE):
    videos = torch.cat([video_for(vae, 9), make_video(9, 2 * vae.spec.spatial_stride, 3 * vae.spec.spatial_stride, 7)])
    latent = vae.encode(videos)
    assert_near(latent[1:], vae.encode(videos[1:]))
    assert_near(vae.decode(latent)[1:], vae.decode(latent[1:]))


# Streaming: the same layers also take a whole clip as one first chunk of 1 + 4n frames; then no layer ever finds a past
# in the cache, every convolution runs once over all frames with black before them, and the resamplers cut the first
# frame off themselves. This is the causal network without any cache.


def encode_at_once(vae: VideoVAE, video: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae._encode_chunk(video, FrameCache())


def decode_at_once(vae: VideoVAE, latent: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae._decode_chunk(latent, FrameCache())


@pytest.mark.parametrize("frames", FRAMES)
def test_streaming_equals_one_shot(vae: VideoVAE, frames: int):
    video = video_for(vae, frames)
    latent = vae.encode(video)
    assert_near(latent, encode_at_once(vae, video))
    assert_near(vae.decode(latent), decode_at_once(vae, latent))


@pytest.mark.parametrize("sizes", [(17,), (1,) * 17, (3, 6, 8), (16, 1)])
def test_any_chunks_of_input_give_the_same_bits(vae: VideoVAE, sizes: tuple[int, ...]):
    video = video_for(vae, 17)
    streamed = list(vae.encode_chunks(iter(video.split(sizes, dim=2))))
    assert [chunk.shape[2] for chunk in streamed] == [1] * 5
    assert torch.equal(torch.cat(streamed, 2), vae.encode(video))


def test_decoded_chunks_are_the_whole(vae: VideoVAE):
    latent = make_latent(vae, 5, 2, 3)
    chunks = list(vae.decode_chunks(latent))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(chunks, 2), vae.decode(latent))


def test_causality_of_encoding(vae: VideoVAE):
    """Latent k depends on the frames up to 4k only, bit for bit, and does depend on those."""
    video = video_for(vae, 17)
    whole = vae.encode(video)
    assert torch.equal(vae.encode(video[:, :, :9]), whole[:, :, :3])
    changed = video.clone()
    changed[:, :, 9:] = -changed[:, :, 9:]
    assert torch.equal(vae.encode(changed)[:, :, :3], whole[:, :, :3])
    changed = video.clone()
    changed[:, :, 8] = -changed[:, :, 8]
    difference = (vae.encode(changed) - whole).abs().amax((0, 1, 3, 4))
    assert torch.equal(difference[:2], torch.zeros(2))
    assert (difference[2:] > TOLERANCE).all()


def test_causality_of_decoding(vae: VideoVAE):
    latent = make_latent(vae, 5, 2, 3)
    whole = vae.decode(latent)
    assert torch.equal(vae.decode(latent[:, :, :3]), whole[:, :, :9])
    changed = latent.clone()
    changed[:, :, 3:] = -changed[:, :, 3:]
    assert torch.equal(vae.decode(changed)[:, :, :9], whole[:, :, :9])
    assert not torch.equal(vae.decode(changed)[:, :, 9:], whole[:, :, 9:])


def test_calls_leave_nothing_behind(vae: VideoVAE):
    """The cache lives as long as one call: interleaved streams do not see each other."""
    latents = [make_latent(vae, 4, 2, 3, seed) for seed in (3, 4)]
    streams = [vae.decode_chunks(latent) for latent in latents]
    pairs = list(zip(*streams, strict=True))
    for latent, chunks in zip(latents, zip(*pairs, strict=True), strict=True):
        assert torch.equal(torch.cat(chunks, 2), vae.decode(latent))


def test_fold_order():
    """Channel = 4 colour + 2 column + row, as in the official code; a wrong order survives any test with itself."""
    video = torch.arange(24.0).view(1, 3, 1, 2, 4)  # colour 8, row 4, column 1
    folded = fold_pixels(video, 2)
    assert folded[0, :, 0, 0, 0].tolist() == [0, 4, 1, 5, 8, 12, 9, 13, 16, 20, 17, 21]
    assert torch.equal(unfold_pixels(folded, 2), video)


def test_progress_and_cancel(vae: VideoVAE):
    seen: list[tuple[int, int]] = []

    def stop_at_two(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise InterruptedError

    vae.encode(video_for(vae, 5), on_chunk=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    seen.clear()
    with pytest.raises(InterruptedError):
        vae.encode(video_for(vae, 17), on_chunk=stop_at_two)
    with pytest.raises(InterruptedError):
        vae.decode(make_latent(vae, 5, 2, 3), on_chunk=stop_at_two)
    assert seen == [(1, 5), (2, 5)] * 2


@pytest.mark.parametrize(("frames", "advice"), [(0, "1"), (2, "1 or 5"), (4, "1 or 5"), (16, "13 or 17")])
def test_frames_must_be_4n_plus_1(vae: VideoVAE, frames: int, advice: str):
    with pytest.raises(WanError, match=rf"{frames} frames .*Use {advice}\."):
        vae.encode(video_for(vae, frames))
    with pytest.raises(WanError, match=rf"{frames} frames"):
        list(vae.encode_chunks(video_for(vae, frames).split(3, dim=2)))


def test_sizes_must_fit_the_stride(vae: VideoVAE):
    stride = vae.spec.spatial_stride
    width, height = 3 * stride + 3, 2 * stride - 2
    message = f"{width}x{height} do not fit.*multiples of {stride}.*{3 * stride}x{2 * stride}"
    with pytest.raises(WanError, match=message):
        vae.encode(make_video(1, height, width))


def test_wrong_shapes_are_named(vae: VideoVAE):
    with pytest.raises(WanError, match=re.escape("found [1, 4, 1, 32, 32]")):
        vae.encode(torch.zeros(1, 4, 1, 32, 32))
    with pytest.raises(WanError, match=re.escape("found [3, 1, 32, 32]")):
        vae.encode(torch.zeros(3, 1, 32, 32))
    with pytest.raises(WanError, match=re.escape("found [1, 5, 1, 2, 2]")):
        vae.decode(torch.zeros(1, 5, 1, 2, 2))


def test_a_latent_of_the_other_kind_names_its_file(vae: VideoVAE):
    other = next(spec for kind, spec in VAES.items() if kind != vae.config.kind)
    with pytest.raises(WanError, match=f"belongs to the {other.kind} VAE: load {other.checkpoint}"):
        vae.decode(torch.zeros(1, other.channels, 1, 2, 2))


def test_bfloat16_weights(vae: VideoVAE):
    """Computes in the weights' dtype and stays near float32 (bfloat16 has 8 bits: 3% of the spread)."""
    half = make_vae(vae.config).to(torch.bfloat16)
    video = video_for(vae, 5)
    latent = vae.encode(video)
    found = half.encode(video)
    assert found.dtype == torch.float32
    assert not torch.equal(found, latent)
    assert (found - latent).std() < 0.03 * latent.std()
    assert (half.decode(latent) - vae.decode(latent)).std() < 0.03


# --- half-precision convolutions on a CUDA device


@pytest.mark.parametrize(("stride", "padding"), [((1, 1, 1), (0, 1, 1)), ((2, 1, 1), (0, 0, 0))])
def test_asking_cudnn_is_the_same_convolution(monkeypatch: pytest.MonkeyPatch, stride: tuple, padding: tuple):
    """With cuDNN played by PyTorch, after the order of arguments that its schema names."""
    order = [argument.name for argument in torch.ops.aten.cudnn_convolution.default._schema.arguments]
    asked = []

    def played(*args, **kwargs):
        named = dict(zip(order, args, strict=False)) | kwargs
        assert set(named) == set(order)
        asked.append(named["groups"])
        return F.conv3d(named["self"], named["weight"], None, named["stride"], named["padding"], named["dilation"])

    monkeypatch.setattr(torch, "cudnn_convolution", played)
    x, weight, bias = torch.randn(1, 4, 5, 6, 7), torch.randn(8, 4, 3, 1, 1), torch.randn(8)
    made = layers._by_cudnn(x, weight, bias, padding, stride)
    assert asked == [1]
    torch.testing.assert_close(made, F.conv3d(x, weight, bias, stride, padding))


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "care"),
    [("2.9.0", 91002, True), ("2.10.1+cu130", 91400, True), ("2.8.0", 91002, False), ("2.11.0", 91002, False),
     ("2.9.0", 91500, False), ("2.9.0", 91001, False)],
)  # fmt: skip
def test_which_versions_are_worked_around(monkeypatch: pytest.MonkeyPatch, torch_version: str, cudnn: int, care: bool):
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    layers._passes_cudnn_by.cache_clear()
    try:
        assert layers._passes_cudnn_by() is care
    finally:
        layers._passes_cudnn_by.cache_clear()
