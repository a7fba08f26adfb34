"""Videos on disk: H.264 in mp4, written frame by frame as the VAE decodes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import WanError

_QUALITY = "17"  # x264's CRF: visually lossless
_ROOM = 200 * 1024**2  # free bytes below which no run is started


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """[3, F, H, W] in -1..1 -> [F, H, W, 3] uint8, truncated as the official ``save_video`` does."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def save_video(chunks: Iterable[torch.Tensor], file: str | Path, fps: int) -> None:
    """Write chunks [3, f, H, W] in -1..1 as they come; the file appears under its name only when it is whole."""
    with unfinished(Path(file)) as partial, _Writer(partial, fps) as writer:
        for chunk in chunks:
            writer.write(to_bytes(chunk))


@contextmanager
def unfinished(file: Path) -> Iterator[Path]:
    """A temporary name beside a file, renamed to it on success and removed on failure."""
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        yield partial
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(file: str | Path) -> None:
    """Find out before the work whether its result can be saved.

    Raises:
        WanError: the folder is missing or not writable, or its disk is nearly full.
    """
    folder = Path(file).absolute().parent
    if not folder.is_dir():
        raise WanError(f"Cannot save {file}: there is no folder {folder}. Create it first.")
    if not os.access(folder, os.W_OK):
        raise WanError(f"Cannot save {file}: {folder} is not writable.")
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise WanError(f"Cannot save {file}: {folder} has {free // 2**20} MB free, expected at least {_ROOM // 2**20}. "
                       "Free some space, or save elsewhere.")


class _Writer:
    """An mp4 file that is open for frames; the picture's size is known with the first of them."""

    def __init__(self, file: Path, fps: int):
        import av

        self.container = av.open(str(file), mode="w", format="mp4")
        self.stream = self.container.add_stream("libx264", rate=fps, options={"crf": _QUALITY})
        self.stream.pix_fmt = "yuv420p"

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        if kind is None:
            self.container.mux(self.stream.encode())
        self.container.close()

    def write(self, frames: torch.Tensor) -> None:
        """[F, H, W, 3] uint8."""
        import av

        self.stream.height, self.stream.width = frames.shape[1:3]
        for frame in frames.numpy():
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
