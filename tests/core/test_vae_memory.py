"""Memory does not grow with the number of frames: measured in processes of their own.

Linux keeps the peak of a process in VmHWM; ``ru_maxrss`` would begin at the peak of the process that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEAK_CODE = """
import sys
import torch
torch.set_num_threads(1)
from wan_core.config import VAEConfig
from wan_core.loading.vae import VAE_CLASSES
from wan_core.tools.tiny import _random_weights
kind, job, frames = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = VAEConfig(kind, {"wan2.1": 16, "wan2.2": 48}[kind], 8, 8)
vae = VAE_CLASSES[kind](config)
vae.load_state_dict(_random_weights(type(vae), config, torch.Generator().manual_seed(0)))
side = 64
def run(count):
    if job == "encode":
        piece = torch.rand(1, 3, 1, side, side)
        return sum(chunk.shape[2] for chunk in vae.encode_chunks(piece for _ in range(count)))
    small = side // vae.spec.spatial_stride
    latent = torch.randn(1, config.channels, 1 + count // 4, small, small)
    return sum(chunk.shape[2] for chunk in vae.decode_chunks(latent))
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM:"))
before = peak()
short = (run(17), peak())
long = (run(frames), peak())
print(short[0], long[0], short[1] - before, long[1] - short[1])
"""


@pytest.mark.parametrize(("job", "frames"), [("encode", 65), ("decode", 257)])
@pytest.mark.parametrize("kind", ["wan2.1", "wan2.2"])
def test_a_long_video_in_the_memory_of_17_frames(kind: str, job: str, frames: int):
    """The peak rises with the first 17 frames and then no more: by less than 1 MiB."""
    command = [sys.executable, "-c", PEAK_CODE, kind, job, str(frames)]
    exact = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")  # tensors go back to the system: no fragmentation
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=exact)
    assert not done.returncode, done.stderr
    short_frames, long_frames, rise, growth = map(int, done.stdout.split())
    assert (short_frames, long_frames) == ((5, 17) if job == "encode" else (17, 257))
    assert rise > 10  # MiB: the measurement sees the work
    assert growth <= 1
