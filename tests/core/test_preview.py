"""The moving picture of a run, the tiny decoders it may use, and the time that is left."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.loading.taehv import load_tiny_decoder
from wan_core.media.geometry import noise, preview_rgb
from wan_core.media.preview import Pace, Painter, moving_picture, small_frames, thinned

WIDTHS = (256, 128, 64, 64)


def tiny_weights(channels: int, patch: int) -> dict[str, Tensor]:
    """A taew2_1 or taew2_2 with random weights: the layers of the published description, by their published names."""
    torch.manual_seed(channels)
    sizes: dict[str, tuple[int, ...]] = {"1": (WIDTHS[0], channels, 3, 3), "22": (3 * patch**2, WIDTHS[3], 3, 3)}
    for stage, (width, after, frames) in enumerate(zip(WIDTHS, WIDTHS[1:], (1, 2, 2), strict=False)):
        first = 3 + 6 * stage
        for block in range(first, first + 3):
            sizes |= {f"{block}.conv.{layer}": (width, 2 * width if layer == 0 else width, 3, 3) for layer in (0, 2, 4)}
        sizes |= {f"{first + 4}.conv": (width * frames, width, 1, 1), f"{first + 5}": (after, width, 3, 3)}
    weights = {}
    for name, size in sizes.items():
        small = 0.3 if name.endswith(".conv.4") else 0.1 if name == "22" else 1  # nothing grows from block to block
        weights[f"decoder.{name}.weight"] = small * torch.randn(size) * (2 / (size[1] * size[2] * size[3])) ** 0.5
        if ".conv." in name or name in ("1", "22"):
            weights[f"decoder.{name}.bias"] = torch.randn(size[0]) / 10
    weights["decoder.22.bias"] += 0.5  # the middle of the range that is kept
    return weights


@pytest.mark.parametrize(("channels", "patch"), [(16, 1), (48, 2)])
def test_tiny_decoder_is_comfyui_s(channels: int, patch: int, tmp_path: Path, in_comfyui) -> None:
    """Theirs with enlargement in time left out, once with all doublings in space and once with the last only."""
    weights, latent = tiny_weights(channels, patch), noise(1, (channels, 3, 4, 5))
    save_file(weights | {"encoder.0.weight": torch.zeros(1)}, tmp_path / "tiny.safetensors")
    theirs = in_comfyui(
        """
        import inspect
        from comfy.taesd.taehv import TAEHV
        stages = len(inspect.signature(TAEHV.__init__).parameters["decoder_time_upscale"].default)
        for name, space in (("all", (True, True, True)), ("last", (False, False, True))):
            options = {"decoder_time_upscale": (False,) * stages, "decoder_space_upscale": space}
            model = TAEHV(inputs["latent"].shape[0], **options, show_progress_bar=False)
            weights = {key: value[-model.state_dict()[key].shape[0]:] for key, value in inputs["weights"].items()}
            missing, unexpected = model.load_state_dict(weights, strict=False)
            assert not unexpected and all(key.startswith("encoder") for key in missing)
            with torch.no_grad():
                outputs[name] = model.decode(inputs["latent"][None])[0].movedim(1, 0)
        """,
        weights=weights,
        latent=latent,
    )
    decoder = load_tiny_decoder(tmp_path / "tiny.safetensors", channels)
    for name, doublings in (("all", 3), ("last", 1)):
        made = torch.stack(list(decoder.frames(latent, doublings)))
        assert made.shape == (3, 3, 4 * patch << doublings, 5 * patch << doublings)
        assert made.std() > 0.05 and ((made > 0) & (made < 1)).float().mean() > 0.3
        assert (made - theirs[name].clamp(0, 1)).abs().max() < 1e-5


def test_a_file_that_is_no_tiny_decoder_is_refused(tmp_path: Path) -> None:
    weights = tiny_weights(16, 1)
    save_file(weights, tmp_path / "whole.safetensors")
    with pytest.raises(WanError, match="16 channels, expected 48"):
        load_tiny_decoder(tmp_path / "whole.safetensors", 48)

    del weights["decoder.22.weight"]
    save_file(weights, tmp_path / "lacking.safetensors")
    with pytest.raises(WanError, match="no TAEHV decoder"):
        load_tiny_decoder(tmp_path / "lacking.safetensors", 16)

    weights = tiny_weights(16, 1)
    del weights["decoder.9.conv.2.bias"]
    save_file(weights, tmp_path / "lacking.safetensors")
    with pytest.raises(WanError, match=r"decoder\.9\.conv\.2\.bias|stages\.1\.blocks\.0"):
        load_tiny_decoder(tmp_path / "lacking.safetensors", 16)

    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(WanError):
        load_tiny_decoder(tmp_path / "broken.safetensors", 16)


@pytest.mark.parametrize(("channels", "fps"), [(16, 16), (48, 24)])
def test_picture_moves_at_the_clip_s_speed(channels: int, fps: int) -> None:
    """21 latent frames are 81 frames of video."""
    latent = torch.linspace(-1, 1, 21)[None, :, None, None] * noise(3, (channels, 1, 6, 10))
    picture = Image.open(io.BytesIO(moving_picture(latent, fps, 512)))
    assert (picture.format, picture.size, picture.n_frames, picture.info["loop"]) == ("WEBP", (10, 6), 21, 0)
    frames, durations = [], []
    for place in range(21):
        picture.seek(place)
        frames.append(picture.convert("RGB").tobytes())
        durations.append(picture.info["duration"])
    assert sum(durations) == pytest.approx(1000 * 81 / fps, abs=1)
    assert durations[0] == pytest.approx(1000 / fps, abs=1) and durations[5] == pytest.approx(4000 / fps, abs=1)
    first, last = frames[0], frames[-1]
    assert sum(abs(a - b) for a, b in zip(first, last, strict=True)) / len(first) > 10


def test_long_clips_are_thinned_and_last_as_long() -> None:
    latent = torch.arange(100)[None, :, None, None].expand(16, 100, 2, 2)
    chosen, frames = thinned(latent)
    assert chosen.shape == (16, 40, 2, 2) and chosen[0, 0, 0, 0] == 0 and chosen[0, -1, 0, 0] == 99
    assert sum(frames) == 99 * 4 + 1 and min(frames) > 0
    assert thinned(latent[:, :1])[1] == [1]


def test_pictures_are_no_larger_than_asked(tmp_path: Path) -> None:
    latent = noise(1, (16, 2, 30, 60))
    assert torch.equal(small_frames(latent, 60), preview_rgb(latent))
    assert small_frames(latent, 20).shape == (2, 10, 20, 3)
    save_file(tiny_weights(16, 1), tmp_path / "tiny.safetensors")
    decoder = load_tiny_decoder(tmp_path / "tiny.safetensors", 16)
    assert small_frames(latent, 130, decoder).shape == (2, 60, 120, 3)
    assert small_frames(latent, 59, decoder).shape == (2, 30, 59, 3)


class Painted:
    """A painter's pictures, each held back until released."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.gate = threading.Semaphore(0)
        self.painter = Painter(self.paint)

    def paint(self, latent: Tensor, about: object) -> None:
        self.gate.acquire()
        self.seen.append(about)

    def wait_for(self, count: int) -> None:
        until = time.monotonic() + 10
        while len(self.seen) < count and time.monotonic() < until:
            time.sleep(0.01)
        assert len(self.seen) == count


def test_a_slow_painter_never_holds_the_sampler_up() -> None:
    painted = Painted()
    began = time.monotonic()
    for step in range(50):
        painted.painter.offer(torch.zeros(1), step, last=step == 49)
    painted.painter.close()
    assert time.monotonic() - began < 2
    for _ in range(50):
        painted.gate.release()
    painted.painter._thread.join(10)
    assert not painted.painter._thread.is_alive()
    assert painted.seen[-1] == 49 and len(painted.seen) <= 2  # perhaps the first, surely the last


def test_pictures_take_their_share_of_the_time_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan_core.media.preview.PAUSE", 0.0)
    seen: list[float] = []
    painter = Painter(lambda latent, _: (time.sleep(0.01), seen.append(time.monotonic())))
    began = time.monotonic()
    while time.monotonic() - began < 2.5:
        painter.offer(torch.zeros(1))
        time.sleep(0.005)
    painter.close()
    assert 2 <= len(seen) <= 3 and min(b - a for a, b in zip(seen, seen[1:], strict=False)) >= 1


def test_a_cancelled_run_paints_no_more(caplog: pytest.LogCaptureFixture) -> None:
    painted = Painted()
    painted.painter.offer(torch.zeros(1), "first")
    painted.painter.offer(torch.zeros(1), "last", last=True)
    painted.painter.close(cancelled=True)
    painted.gate.release(5)
    painted.painter._thread.join(10)
    assert "last" not in painted.seen or painted.seen == ["last"]  # it may have been begun before the cancel

    failing = Painter(lambda latent, _: 1 / 0)
    failing.offer(torch.zeros(1))
    failing._thread.join(10)
    failing.offer(torch.zeros(1), last=True)
    failing.close()
    assert "Previews have stopped" in caplog.text


def test_time_left_by_expert() -> None:
    now = [0.0]
    pace = Pace(["high"] * 2 + ["low"] * 3, PerExpert(low=1, high=3.5), clock=lambda: now[0])
    assert pace.left(0, 5) is None

    def step(index: int, loading: float, seconds: float) -> None:
        now[0] += loading
        pace.block()
        now[0] += seconds
        pace.block()
        pace.step(index)

    step(0, loading=100, seconds=8)
    assert pace.left(1, 5) == 8 + 3 * 4  # guidance 1 is half the work
    step(1, loading=1, seconds=6)
    assert pace.left(2, 5) == 3 * 3.5
    step(2, loading=50, seconds=5)
    assert pace.left(3, 5) == 10 and pace.left(5, 5) == 0
    now[0] += 9
    pace.step(3)  # a model that tells of no blocks
    assert pace.left(4, 5) == 7


def test_time_left_by_calls() -> None:
    """Steps differ in how often they ask the model; one that does not ask tells nothing."""
    now = [0.0]
    pace = Pace(["only"] * 5, PerExpert(low=3, high=3), clock=lambda: now[0], calls=[0, 2, 2, 1, 1])
    pace.step(0)
    assert pace.left(1, 5) is None
    pace.block()
    now[0] += 6
    pace.step(1)
    assert pace.left(2, 5) == 6 + 3 + 3 and pace.left(3, 5) == 6
