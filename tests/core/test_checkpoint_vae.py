"""Every layout of VAE files: identical weights, dimensions read, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import save_file

from wan_core.config import VAEConfig
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.layouts.comfyui import VAES as COMFY_VAES
from wan_core.layouts.prefixes import find_places
from wan_core.layouts.vae import DIALECTS, MARKS, diffusers_config, diffusers_dialect, names_in, read_config
from wan_core.loading.vae import VAE_CLASSES, load_vae, read_vae
from wan_core.models.vae.vae import VideoVAE, normalise
from wan_core.tools.tiny import _random_weights

SMALL = {
    "wan2.1": VAEConfig("wan2.1", channels=16, encoder_dim=8, decoder_dim=8),
    "wan2.2": VAEConfig("wan2.2", channels=48, encoder_dim=8, decoder_dim=12),
}
KINDS = tuple(SMALL)


def make_vae(config: VAEConfig, seed: int = 0) -> VideoVAE:
    kind = VAE_CLASSES[config.kind]
    with torch.device("meta"):
        vae = kind(config)
    vae.load_state_dict(_random_weights(kind, config, torch.Generator().manual_seed(seed)), assign=True)
    return vae.eval().requires_grad_(False)


def diffusers_weights(vae: VideoVAE) -> dict[str, torch.Tensor]:
    renames = DIALECTS[diffusers_dialect(vae.config.kind)]
    return {renames.to_theirs(key): value for key, value in vae.state_dict().items()}


@pytest.fixture(scope="module", params=KINDS)
def vae(request: pytest.FixtureRequest) -> VideoVAE:
    return make_vae(SMALL[request.param])


def write_official(vae: VideoVAE, folder: Path) -> Path:
    torch.save(vae.state_dict(), folder / vae.spec.checkpoint)
    return folder / vae.spec.checkpoint


def write_comfyui(vae: VideoVAE, folder: Path) -> Path:
    save_file(vae.state_dict(), folder / COMFY_VAES[vae.spec.kind])
    return folder / COMFY_VAES[vae.spec.kind]


def write_prefixed(vae: VideoVAE, folder: Path) -> Path:
    save_file({f"model.{key}": value for key, value in vae.state_dict().items()}, folder / "vae.safetensors")
    return folder / "vae.safetensors"


def write_diffusers(vae: VideoVAE, folder: Path) -> Path:
    save_file(diffusers_weights(vae), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(diffusers_config(vae.config)))
    return folder


WRITERS = {
    "official": write_official,
    "comfyui": write_comfyui,
    "prefixed": write_prefixed,
    "diffusers": write_diffusers,
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_every_layout_loads_to_identical_weights(vae: VideoVAE, writer: Callable, tmp_path: Path):
    loaded = load_vae(writer(vae, tmp_path))
    assert type(loaded) is type(vae)
    assert loaded.config == vae.config
    expected, found = vae.state_dict(), loaded.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_diffusers_opens_our_folder(vae: VideoVAE, tmp_path: Path):
    theirs = AutoencoderKLWan.from_pretrained(write_diffusers(vae, tmp_path))
    video = torch.rand(1, 3, 5, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        raw = theirs.encode(video).latent_dist.mode()
    assert (normalise(raw, vae.config.kind) - vae.encode(video)).abs().max() < 1e-4


def test_names_of_the_21_vae_are_those_of_diffusers_converter():
    """Their converter knows only the Wan2.1-VAE's layout."""
    vae = make_vae(SMALL["wan2.1"])
    converted = convert_wan_vae_to_diffusers(vae.state_dict())
    ours = diffusers_weights(vae)
    assert set(converted) == set(ours)
    assert all(torch.equal(converted[key], ours[key]) for key in ours)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_renaming_is_reversible(dialect: str):
    kind = "wan2.2" if dialect == "diffusers-2.2" else "wan2.1"
    keys = make_vae(SMALL[kind]).state_dict()
    renames = DIALECTS[dialect]
    theirs = [renames.to_theirs(key) for key in keys]
    assert len(set(theirs)) == len(keys)
    assert [renames.to_own(key) for key in theirs] == list(keys)
    (place,) = find_places(theirs, MARKS)
    assert place.dialect == dialect


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder_dim": 4},
        {"decoder_dim": 24},
        {"multipliers": (1, 2, 2, 4)},
        {"multipliers": (2, 4, 4, 4)},
        {"blocks": 1},
        {"blocks": 3},
    ],
)
def test_dimensions_come_from_the_shapes(kind: str, change: dict):
    config = replace(SMALL[kind], **change)
    shapes = {key: tuple(value.shape) for key, value in make_vae(config).state_dict().items()}
    assert read_config(shapes) == config


def test_real_dimensions():
    """The published files: 96 wide; 160 wide in the encoder, 256 in the decoder."""
    for config in (VAEConfig("wan2.1", 16, 96, 96), VAEConfig("wan2.2", 48, 160, 256)):
        with torch.device("meta"):
            vae = VAE_CLASSES[config.kind](config)
        assert read_config({key: tuple(value.shape) for key, value in vae.state_dict().items()}) == config


def test_other_models_are_not_recognised():
    assert not find_places((), MARKS)
    assert not find_places(("blocks.0.self_attn.q.weight", "patch_embedding.weight"), MARKS)
    assert not find_places(("decoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight"), MARKS)


def test_a_file_without_a_vae_says_so(tmp_path: Path):
    save_file({"blocks.0.ffn.0.weight": torch.zeros(2, 2)}, tmp_path / "dit.safetensors")
    with pytest.raises(WanError, match="is not a Wan VAE"):
        load_vae(tmp_path / "dit.safetensors")


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_missing_and_unexpected_tensors_are_refused(vae: VideoVAE, writer: Callable, tmp_path: Path):
    whole = vae.state_dict()
    for name, edit in {"missing": {}, "unexpected": {"decoder.head.2.extra": torch.zeros(1)}}.items():
        weights = dict(whole, **edit)
        if name == "missing":
            del weights["decoder.middle.2.residual.6.bias"]
        folder = tmp_path / name
        folder.mkdir()
        path = writer(_Weights(vae, weights), folder)
        with pytest.raises(WanError, match=rf"(?i){name}: (model\.)?decoder\.(middle\.2|head\.2|mid_block|conv_out)"):
            load_vae(path)


class _Weights:
    """A VAE that writes other weights than its own."""

    def __init__(self, vae: VideoVAE, weights: dict[str, torch.Tensor]):
        self.config, self.spec, self._weights = vae.config, vae.spec, weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self._weights


def test_keys_outside_the_layout_are_listed_and_ignored(vae: VideoVAE, tmp_path: Path):
    weights = dict(diffusers_weights(vae), **{"loss.logvar": torch.zeros(1)})
    save_file(weights, tmp_path / "vae.safetensors")
    assert read_vae(tmp_path / "vae.safetensors").notes == (
        "vae.safetensors: 1 tensor that a Wan VAE does not have is ignored: loss.logvar.",
    )
    found, expected = load_vae(tmp_path / "vae.safetensors").state_dict(), vae.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_wrong_channel_count_is_refused():
    shapes = {key: tuple(v.shape) for key, v in make_vae(replace(SMALL["wan2.1"], channels=8)).state_dict().items()}
    with pytest.raises(WanError, match="latents of 8 channels.*known for 16"):
        read_config(shapes)


def test_a_file_without_its_encoder_is_refused(tmp_path: Path):
    vae = make_vae(SMALL["wan2.1"])
    weights = {key: v for key, v in vae.state_dict().items() if not key.startswith("encoder.downsamples")}
    save_file(weights, tmp_path / "vae.safetensors")
    with pytest.raises(WanError, match="dimensions cannot be read"):
        load_vae(tmp_path / "vae.safetensors")


def test_dtype_of_the_computation(tmp_path: Path):
    vae = make_vae(SMALL["wan2.1"])
    path = write_comfyui(vae, tmp_path)
    assert load_vae(path).conv1.weight.dtype == torch.float32  # a float32 file on a CPU
    assert load_vae(path, dtype="bfloat16").conv1.weight.dtype == torch.bfloat16
    (place,) = find_places(open_checkpoint(path).tensors, MARKS)
    assert names_in(place) == {key: key for key in vae.state_dict()}
