"""Where a VAE runs, and what comes between pictures and its chunks."""

from __future__ import annotations

import pytest
import torch

from wan_core.config import VAEConfig
from wan_core.errors import WanError
from wan_core.media.pixels import blend, cropped, fill, pieces
from wan_core.memory.activations import vae_budget
from wan_core.memory.vae_placement import at_once, place, square_tiles

WAN21 = VAEConfig("wan2.1", 16, 96, 96)
SIZE, CUDA, CPU = (720, 1280), torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_are_the_largest_that_fit(dtype: torch.dtype):
    whole = vae_budget(WAN21, *SIZE, dtype).total
    assert place(WAN21, SIZE, CUDA, dtype, room=whole).tiles is None
    where = place(WAN21, SIZE, CUDA, dtype, room=whole - 1)
    assert where.device == CUDA and vae_budget(WAN21, *at_once(SIZE, where.tiles), dtype).total < whole
    smaller = place(WAN21, SIZE, CUDA, dtype, room=0.4 * whole)
    assert smaller.tiles.width < where.tiles.width
    assert vae_budget(WAN21, *at_once(SIZE, smaller.tiles), dtype).total <= 0.4 * whole


def test_too_little_for_any_tile_is_the_cpus(caplog: pytest.LogCaptureFixture):
    where = place(WAN21, SIZE, CUDA, torch.float32, room=1e6)
    assert where.device == CPU and where.tiles is None
    assert "1280x720" in caplog.text and "CPU" in caplog.text


def test_without_a_limit_and_on_a_cpu_frames_are_whole():
    assert place(WAN21, SIZE, CUDA, torch.float32).tiles is None
    assert place(WAN21, SIZE, CPU, torch.float32, room=1e6).tiles is None


def test_tiles_that_would_be_all_edge_are_refused():
    assert at_once((48, 2000), square_tiles(512)) == (48, 512)
    with pytest.raises(WanError, match="32 pixels a side: expected 64 or more"):
        square_tiles(32)


def test_pictures_to_chunks_and_back():
    video = torch.rand(9, 16, 24, 3)
    chunks = list(pieces(video))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4] and chunks[0].shape == (1, 3, 1, 16, 24)
    assert min(chunk.min() for chunk in chunks) < -0.9 and max(chunk.max() for chunk in chunks) > 0.9
    back = torch.zeros_like(video)
    fill(back, iter(chunks))
    torch.testing.assert_close(back, video, rtol=0, atol=1e-6)
    blended = torch.zeros_like(video)
    everywhere = (slice(None), slice(None), slice(None))
    blend(blended, [(everywhere, torch.cat(chunks, dim=2), torch.full((1, 16, 24), 0.5))] * 2)
    torch.testing.assert_close(blended, video, rtol=0, atol=1e-6)


def test_what_a_vae_cannot_encode_is_cut_off(caplog: pytest.LogCaptureFixture):
    videos = torch.rand(2, 7, 20, 35, 3)
    kept = cropped(videos, 8)
    assert torch.equal(kept, videos[:, :5, 2:18, 1:33]) and "cropped to 5 of 32x16" in caplog.text
    assert cropped(kept, 8).shape == kept.shape
