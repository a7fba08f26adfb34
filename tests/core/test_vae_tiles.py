"""Tiles of the autoencoders: their weights, what they change and what not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from wan_core.config import VAEConfig
from wan_core.errors import WanError
from wan_core.loading.vae import VAE_CLASSES
from wan_core.models.vae import tiles as tiling
from wan_core.models.vae.tiles import Tiles, cut, decode_tiled, decode_tiled_chunks, encode_tiled, encode_tiled_chunks
from wan_core.models.vae.vae import VideoVAE
from wan_core.tools.tiny import _random_weights

CHANNELS = {"wan2.1": 16, "wan2.2": 48}
REACH = {"wan2.1": 20, "wan2.2": 20}  # latent places that a pixel of the decoder, or a place of the encoder, sees far


def tiny_vae(kind: str, *, attention: bool = True) -> VideoVAE:
    config = VAEConfig(kind, CHANNELS[kind], 4, 4)
    vae = VAE_CLASSES[kind](config)
    vae.load_state_dict(_random_weights(type(vae), config, torch.Generator().manual_seed(0)))
    if not attention:
        for name, weight in vae.named_parameters():
            if "middle.1.proj" in name:
                weight.data.zero_()
    return vae.eval().requires_grad_(False)


def textured(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("length", [8, 30, 33, 64, 65, 90, 161])
@pytest.mark.parametrize(("size", "overlap"), [(256, 64), (512, 64), (256, 128), (64, 0)])
def test_weights_add_up_to_one(length: int, size: int, overlap: int):
    for ramp in {None, 0, overlap}:
        total, latent_total = torch.zeros(length * 8, 80), torch.zeros(length, 10)
        for tile in cut(length, 10, Tiles(size, size, overlap, ramp), 8):
            total[tile.pixels(8)] += tile.pixel_weight
            latent_total[tile.rows, tile.columns] += tile.latent_weight
            assert tile.rows.stop - tile.rows.start <= max(1, size // 8)
        assert (total - 1).abs().max() < 1e-6 and (latent_total - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", CHANNELS)
def test_one_tile_is_the_whole(kind: str):
    vae, latent = tiny_vae(kind), textured(1, CHANNELS[kind], 2, 4, 6)
    assert torch.equal(decode_tiled(vae, latent, Tiles(256, 256)), vae.decode(latent))
    video = textured(1, 3, 5, 64, 96)
    assert torch.equal(encode_tiled(vae, video, Tiles(256, 256)), vae.encode(video))


@pytest.mark.parametrize("kind", CHANNELS)
def test_tiled_equals_untiled_where_the_receptive_field_allows(kind: str):
    """Without attention in the middle, and with as much of each overlap thrown away as the networks see far: 1e-3."""
    vae = tiny_vae(kind, attention=False)
    stride, reach = vae.spec.spatial_stride, REACH[kind]
    overlap = (2 * reach + 2) * stride
    tiles = Tiles(2 * overlap, 2 * overlap, overlap, ramp=2 * stride)
    latent = textured(1, CHANNELS[kind], 2, 4, 4 * reach + 30)
    assert len(cut(*latent.shape[3:], tiles, stride)) > 1
    whole = vae.decode(latent)
    assert whole.std() > 0.05
    assert (decode_tiled(vae, latent, tiles) - whole).abs().max() <= 1e-3
    video = textured(1, 3, 5, 2 * stride, (4 * reach + 30) * stride)
    assert (encode_tiled(vae, video, tiles) - vae.encode(video)).abs().max() <= 1e-3


def seam(made: Tensor, whole: Tensor, columns: range) -> float:
    """How much larger differences between neighbouring columns get by tiling, around a seam: 1 is no seam."""
    steps = [video.diff(dim=-1).abs().mean(dim=(0, 1, 2, 3))[columns].max() for video in (made, whole)]
    return (steps[0] / steps[1]).item()


@pytest.mark.parametrize("kind", CHANNELS)
def test_overlaps_show_no_seams(kind: str):
    """With attention, on a textured latent: steps between columns in the overlap grow by less than a tenth; without a
    ramp and an overlap they grow by more."""
    vae = tiny_vae(kind)
    stride = vae.spec.spatial_stride
    latent = textured(1, CHANNELS[kind], 2, 4, 32)
    whole = vae.decode(latent)
    overlap = 8 * stride
    blended = decode_tiled(vae, latent, Tiles(20 * stride, 20 * stride, overlap))
    around = range(10 * stride, 22 * stride)
    assert seam(blended, whole, around) < 1.1
    assert seam(decode_tiled(vae, latent, Tiles(16 * stride, 16 * stride, 0)), whole, around) > 1.1


@pytest.mark.parametrize("stretches", ["one", "many"])
@pytest.mark.parametrize("kind", CHANNELS)
def test_the_stream_is_the_same_video(kind: str, stretches: str, monkeypatch: pytest.MonkeyPatch):
    vae = tiny_vae(kind)
    if stretches == "many":
        monkeypatch.setattr(tiling, "HELD", 1)
    stride = vae.spec.spatial_stride
    tiles = Tiles(6 * stride, 6 * stride, 2 * stride)
    latent = textured(1, CHANNELS[kind], 3, 8, 10)
    chunks = list(decode_tiled_chunks(vae, latent, tiles))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4]
    assert (torch.cat(chunks, 2) - decode_tiled(vae, latent, tiles)).abs().max() < 1e-6
    video = textured(1, 3, 9, 8 * stride, 10 * stride)
    pieces = list(encode_tiled_chunks(vae, video.split(3, dim=2), tiles))
    assert (torch.cat(pieces, 2) - encode_tiled(vae, video, tiles)).abs().max() < 1e-6


def test_a_stretch_holds_so_many_bytes():
    parts = [torch.zeros(n) for n in (3, 1, 2, 9, 1)]
    found = [([len(part) for part in stretch], last) for stretch, last in tiling._stretches(parts)]
    assert found == [([3, 1, 2, 9, 1], True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "HELD", 4 * 4)
        found = [([len(part) for part in stretch], last) for stretch, last in tiling._stretches(parts)]
        assert found == [([3, 1], False), ([2], False), ([9], False), ([1], True)]
        assert [last for _, last in tiling._stretches(range(5), 8)] == [False, False, True]
        assert list(tiling._stretches([])) == []


def test_every_tile_reports_and_can_be_cancelled():
    vae, latent = tiny_vae("wan2.1"), textured(1, 16, 2, 8, 16)
    tiles, told = Tiles(64, 64, 32), []
    decode_tiled(vae, latent, tiles, lambda done, total: told.append((done, total)))
    count = 2 * len(cut(8, 16, tiles, 8))
    assert told == [(i + 1, count) for i in range(count)]

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_tiled(vae, textured(1, 3, 5, 64, 128), tiles, stop)


def test_bad_tiles_are_refused():
    with pytest.raises(WanError, match="half a tile"):
        Tiles(64, 64, 48)
    with pytest.raises(WanError, match="ramp"):
        Tiles(256, 256, 64, ramp=80)
    with pytest.raises(WanError, match="16"):
        decode_tiled(tiny_vae("wan2.1"), textured(1, 48, 2, 4, 4), Tiles(256, 256))
