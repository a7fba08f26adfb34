"""What previews cost: the sampler's own time at each step, and beside it the time and bytes of a moving picture.

Measured at the latent sizes of 720p clips. A step is what it is set against: planned from the operations of the two
transformer passes at a speed that no single GPU reaches, since no step of these sizes was measured here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from wan_core.config import PATCH
from wan_core.loading.taehv import load_tiny_decoder
from wan_core.media.geometry import noise, preview_rgb
from wan_core.media.preview import PAUSE, SHARE, Painter, moving_picture, small_frames
from wan_core.models.vae.taehv import TinyConfig, TinyDecoder, published_key

from .memory import CONFIGS

PUBLISHED = Path(__file__).resolve().parent / "results" / "preview.json"
SIZES = {"A14B 1280x720x81": ("t2v-A14B", 16, 21, 90, 160), "5B 1280x704x121": ("ti2v-5B", 48, 31, 44, 80)}
QUICK = {"quick": ("t2v-A14B", 16, 3, 12, 20)}
SIDE = 512  # ComfyUI's --preview-size
FASTEST = 2.5e15  # operations a second, more than any single GPU of 2025 does in dense bf16 (a B200: 2.25e15)
METHOD = (
    "Seconds are CPU time of one thread, which other load does not disturb. In the sampler's thread: handing the "
    "latent over, and the still frame that ComfyUI's progress bar takes (median of 50). In the painter's thread: one "
    "moving picture of a latent that is half noise, as in the middle of a run, as bytes of WebP; base64 adds a third. "
    f"step_seconds_at_least: operations of both passes of a step at {FASTEST / 1e15:g} PFLOP/s, which no single GPU of "
    f"2025 reaches. The painter rests {1 / SHARE:.0f} times as long as a picture took, and {PAUSE} s at least, so that "
    f"its share stays below {SHARE:.0%} whatever one takes."
)
NOT_MEASURED = "On a GPU nothing has been measured: neither a step nor a decoder's picture."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--quick", action="store_true", help="one small case: shows that the benchmark works")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    rows = {
        name: measure(*size, repeats=5 if options.quick else 50)
        for name, size in (QUICK if options.quick else SIZES).items()
    }
    report = {
        "device": "cpu",
        "torch": torch.__version__,
        "method": METHOD,
        "measured": rows,
        "not_measured": NOT_MEASURED,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(
            f"{name}: {row['sampler_ms']} ms of the sampler's step, {row['sampler_share']:.3%} of at least "
            f"{row['step_seconds_at_least']} s; a picture of {row['picture_bytes'] / 1000:.0f} kB takes "
            f"{row['picture_ms']} ms beside it"
        )
    return 0


def measure(task: str, channels: int, frames: int, height: int, width: int, *, repeats: int) -> dict:
    shape = (channels, frames, height, width)
    latent = half_noise(shape)
    painter = Painter(lambda *_: None)
    hand_over, still = (
        median(timed(call) for _ in range(repeats))
        for call in (lambda: painter.offer(latent), lambda: still_frame(latent))
    )
    painter.close()
    picture, step = moving_picture(latent, 16, SIDE), step_operations(task, shape) / FASTEST
    return {
        "latent": list(shape),
        "sampler_ms": round(1e3 * (hand_over + still), 3),
        "hand_over_ms": round(1e3 * hand_over, 3),
        "still_ms": round(1e3 * still, 3),
        "step_seconds_at_least": round(step, 2),
        "sampler_share": round((hand_over + still) / step, 6),
        "picture_ms": round(1e3 * min(timed(lambda: moving_picture(latent, 16, SIDE)) for _ in range(3)), 1),
        "picture_bytes": len(picture),
        "noise_picture_bytes": len(moving_picture(noise(2, shape), 16, SIDE)),
        "decoder": decoded(latent),
    }


def half_noise(shape: tuple[int, ...]) -> Tensor:
    """Smooth shapes that move, with noise over them."""
    channels, frames, height, width = shape
    coarse = noise(0, (1, channels, max(frames // 4, 2), max(height // 8, 2), max(width // 8, 2)))
    return 2 * F.interpolate(coarse, size=shape[1:], mode="trilinear")[0] + 0.5 * noise(1, shape)


def still_frame(latent: Tensor) -> bytes:
    """As nodes/preview.py makes it; encoding it is the server's work."""
    middle = latent.shape[1] // 2
    return Image.fromarray(preview_rgb(latent[:, middle : middle + 1])[0].numpy()).tobytes()


def decoded(latent: Tensor) -> dict:
    """A frame of the picture through a tiny decoder with random weights, on one thread of this CPU."""
    patch = 1 if latent.shape[0] == 16 else 2
    config = TinyConfig(latent.shape[0], (256, 128, 64, 64), (1, 2, 2), patch)
    with TemporaryDirectory() as folder:
        file = Path(folder, "tiny.safetensors")
        save_file({published_key(k): v for k, v in TinyDecoder(config).state_dict().items()}, file)
        decoder = load_tiny_decoder(file, latent.shape[0])
        began = time.thread_time()
        small_frames(latent[:, :2], SIDE, decoder)
        return {"seconds_per_frame_on_this_cpu": round((time.thread_time() - began) / 2, 2)}


def step_operations(task: str, shape: tuple[int, ...]) -> float:
    """Of the two passes of a guided step: matrix products and attention, a multiplication and addition as two."""
    config, (_, frames, height, width) = CONFIGS[task], shape
    tokens = frames * (height // PATCH[1]) * (width // PATCH[2])
    matrices = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim  # q k v o, cross q o, and the two of the FFN
    attention = 2 * tokens * config.dim + 2 * 512 * config.dim
    return 2 * 2 * config.layers * tokens * (matrices + attention)


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    began = time.thread_time()
    call()
    return time.thread_time() - began
