"""Videos on disk, in the format that the file's ending names, written as the VAE decodes."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import WanError
from ..files.atomic import WriteFailed, check_writable, unfinished, write_problem

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ENDINGS", "check_ending", "check_writable", "in_the_way", "made_here", "marked", "save_video", "to_bytes",
           "unfinished"]  # fmt: skip

log = logging.getLogger(__name__)

_MARK = "wan_core"  # in the notes of every file that is saved here: only such files are ever replaced unasked
_SOFTWARE = 0x131  # Exif's number for the program that made a picture


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """[3, F, H, W] in -1..1 -> [F, H, W, 3] uint8, truncated as the official ``save_video`` does."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def save_video(chunks: Iterable[torch.Tensor], file: str | Path, fps: float) -> list[Path]:
    """Write chunks [3, f, H, W] in -1..1 as they come, and return the files.

    The ending says in which format. Videos and animations are one file, which appears under its name only when it is
    whole. Pictures are one file a frame: ``cat.png`` for a single frame, else ``cat_0001.png``, ``cat_0002.png``, ….

    Raises:
        WanError: an ending that is not known.
        WriteFailed: the disk is full, say; nothing half-written is left.
    """
    file = Path(file)
    kind = _kind(file)
    if isinstance(kind, _Pictures):
        return kind.save(chunks, file)
    with unfinished(file) as partial, kind.open(partial, Fraction(fps).limit_denominator(1001)) as writer:
        for chunk in chunks:
            writer.write(to_bytes(chunk))
    return [file]


def check_ending(file: str | Path, width: int = 1, height: int = 1) -> None:
    """
    Raises:
        WanError: no ending that names a format, a format that this PyAV or Pillow cannot write, or frames that are
            larger than it can hold.
    """
    kind = _kind(Path(file))
    kind.check(Path(file).suffix.lower())
    if max(width, height) > kind.largest:
        raise WanError(
            f"Cannot save {file}: {width}x{height} pixels, but {Path(file).suffix} holds {kind.largest} a "
            "side at most. Choose .mp4 or .png, or a smaller size."
        )


def in_the_way(file: Path) -> list[Path]:
    """What is there already under the names that saving this file takes, and was not saved by us."""
    return [name for name in _taken(file) if not made_here(name)]


def _taken(file: Path) -> list[Path]:
    """The file, and pictures that are named as its frames would be."""
    frames: list[str] = []
    if isinstance(_kind(file), _Pictures):
        frames = glob.glob(f"{glob.escape(str(file.with_suffix('')))}_[0-9][0-9][0-9][0-9]*{glob.escape(file.suffix)}")
    return [name for name in (file, *map(Path, sorted(frames))) if os.path.lexists(name)]


def made_here(file: Path) -> bool:
    """Whether a video or picture carries our mark."""
    return any(_MARK in str(value) for value in (*_notes_of_picture(file), *_notes_of_video(file)))


def _notes_of_picture(file: Path) -> list[object]:
    from PIL import Image

    with suppress(Exception), Image.open(file) as picture:
        return [picture.info.get("Software"), picture.info.get("comment"), picture.getexif().get(_SOFTWARE)]
    return []


def _notes_of_video(file: Path) -> list[object]:
    import av

    with suppress(Exception), av.open(str(file)) as container:
        return list(container.metadata.values())
    return []


def _kind(file: Path) -> _Video | _Animation | _Pictures:
    if file.suffix.lower() not in ENDINGS:
        found = f"ends in {file.suffix!r}" if file.suffix else "has no ending"
        raise WanError(
            f"Cannot save {file}: the name {found}, which says no format. Expected one of {' '.join(ENDINGS)}."
        )
    return ENDINGS[file.suffix.lower()]


# --- videos


@dataclass(frozen=True)
class _Video:
    """A container and its codec, written by FFmpeg."""

    container: str
    codec: str
    options: tuple[tuple[str, str], ...]
    even: bool  # whether the codec needs even sides where colour has half the resolution
    largest: int = 16384

    def check(self, ending: str) -> None:
        from av.codec import Codec
        from av.codec.codec import UnknownCodecError

        try:
            Codec(self.codec, "w")
        except (UnknownCodecError, ValueError) as error:
            raise WanError(
                f"This PyAV writes no {ending}: its FFmpeg was built without {self.codec}. Install "
                "PyAV from its own wheel (pip install av), or save as .png."
            ) from error

    def open(self, file: Path, fps: Fraction) -> AbstractContextManager:
        return _FrameWriter(self, file, fps)


class _FrameWriter:
    """A video file that is open for frames; the picture's size is known with the first of them."""

    def __init__(self, kind: _Video, file: Path, fps: Fraction) -> None:
        import av

        self.container = av.open(str(file), mode="w", format=kind.container)
        self.container.metadata["comment"] = _MARK
        stream = self.container.add_stream(kind.codec, rate=fps, options=dict(kind.options))
        assert isinstance(stream, av.VideoStream), kind.codec
        self.stream = stream
        self.stream.pix_fmt = "yuv420p"
        self.even = kind.even
        self.size: tuple[int, int] | None = None

    def __enter__(self) -> _FrameWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            try:
                self.container.mux(self.stream.encode())
            finally:
                self.container.close()
            return
        with suppress(Exception):  # the first failure is the one to tell
            self.container.close()

    def write(self, frames: torch.Tensor) -> None:
        """[F, H, W, 3] uint8."""
        import av

        height, width = frames.shape[1], frames.shape[2]
        if self.even and (height % 2 or width % 2):
            frames = _with_even_sides(frames)
            if self.size is None:
                log.warning(
                    "H.264 needs even sides: %dx%d pixels are saved as %dx%d, the last row or column twice.",
                    width,
                    height,
                    frames.shape[2],
                    frames.shape[1],
                )
        if self.size is None:  # once: a codec that is open keeps its size
            self.size = frames.shape[1], frames.shape[2]
            self.stream.height, self.stream.width = self.size
        for frame in frames.numpy():
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))


def _with_even_sides(frames: torch.Tensor) -> torch.Tensor:
    """Odd sides get their last row or column twice: H.264 stores colour for two by two pixels."""
    height, width = frames.shape[1:3]
    padded = F.pad(frames.permute(0, 3, 1, 2).float(), (0, width % 2, 0, height % 2), mode="replicate")
    return padded.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


# --- animations and pictures


@dataclass(frozen=True)
class _Animation:
    """One file of many pictures, written by Pillow. ``unit`` is the shortest time that the format tells, in seconds."""

    format: str
    unit: Fraction
    options: tuple[tuple[str, object], ...]
    largest: int

    def check(self, ending: str) -> None:
        _check_pillow(self.format, ending)

    def open(self, file: Path, fps: Fraction) -> AbstractContextManager:
        return _AnimationWriter(self, file, fps)

    def durations(self, frames: int, fps: Fraction) -> list[int]:
        """Milliseconds of each frame: rounded so that no frame is off its time by more than the unit."""
        ends = [round(i / (fps * self.unit)) for i in range(frames + 1)]
        return [int((after - before) * self.unit * 1000) for before, after in zip(ends, ends[1:], strict=False)]


class _AnimationWriter:
    """Frames are kept until the end: Pillow writes them together."""

    def __init__(self, kind: _Animation, file: Path, fps: Fraction) -> None:
        self.kind, self.file, self.fps = kind, file, fps
        self.frames: list[Image] = []

    def __enter__(self) -> _AnimationWriter:
        return self

    def write(self, frames: torch.Tensor) -> None:
        from PIL import Image

        prepare = _with_palette if self.kind.format == "GIF" else (lambda picture: picture)
        self.frames += [prepare(Image.fromarray(frame)) for frame in frames.numpy()]

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            first, *rest = self.frames
            first.save(
                self.file,
                format=self.kind.format,
                save_all=True,
                append_images=rest,
                loop=0,
                duration=self.kind.durations(len(self.frames), self.fps),
                **dict(self.kind.options),
                **marked(self.kind.format),
            )


def _with_palette(picture: Image) -> Image:
    """256 colours of its own for each frame, the rest dithered."""
    palette = picture.quantize(256)
    return picture.quantize(256, palette=palette)


@dataclass(frozen=True)
class _Pictures:
    """A file a frame."""

    format: str
    options: tuple[tuple[str, object], ...]
    largest: int = 65535

    def check(self, ending: str) -> None:
        _check_pillow(self.format, ending)

    def save(self, chunks: Iterable[torch.Tensor], file: Path) -> list[Path]:
        """All frames first lie in a folder of their own; they get their names when the last of them is there."""
        try:
            with tempfile.TemporaryDirectory(prefix=".wan_core-", suffix=".partial", dir=file.parent) as folder:
                return self._in_place(self._written(chunks, Path(folder)), file)
        except Exception as error:
            if problem := write_problem(error):
                raise WriteFailed(f"Cannot write {file}: {problem}. Nothing of it is left.") from error
            raise

    def _written(self, chunks: Iterable[torch.Tensor], folder: Path) -> list[Path]:
        from PIL import Image

        frames: list[Path] = []
        for chunk in chunks:
            for frame in to_bytes(chunk).numpy():
                frames.append(folder / str(len(frames)))
                Image.fromarray(frame).save(frames[-1], format=self.format, **dict(self.options), **marked(self.format))
        return frames

    @staticmethod
    def _in_place(frames: list[Path], file: Path) -> list[Path]:
        names = (
            [file]
            if len(frames) == 1
            else [file.with_name(f"{file.stem}_{i:04d}{file.suffix}") for i in range(1, len(frames) + 1)]
        )
        for frame, name in zip(frames, names, strict=True):
            os.replace(frame, name)
        for name in _taken(file):  # of an earlier, longer video
            if len(names) > 1 and name not in (file, *names) and made_here(name):
                name.unlink()
        return names


def marked(form: str) -> dict[str, Any]:
    """Pillow's option that puts our mark into a file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if form == "PNG":
        notes = PngInfo()
        notes.add_text("Software", _MARK)
        return {"pnginfo": notes}
    if form == "WEBP":
        exif = Image.Exif()
        exif[_SOFTWARE] = _MARK
        return {"exif": exif}
    return {"comment": _MARK}


def _check_pillow(form: str, ending: str) -> None:
    from PIL import Image

    Image.init()
    if form not in Image.SAVE:
        raise WanError(f"This Pillow writes no {ending}: save as .png or .mp4 instead.")


_H264 = ("libx264", (("crf", "17"),))  # visually lossless
_VP9 = ("libvpx-vp9", (("crf", "20"), ("b", "0"), ("row-mt", "1"), ("cpu-used", "3")))
ENDINGS: dict[str, _Video | _Animation | _Pictures] = {
    ".mp4": _Video("mp4", *_H264, even=True),
    ".mkv": _Video("matroska", *_H264, even=True),
    ".mov": _Video("mov", *_H264, even=True),
    ".webm": _Video("webm", *_VP9, even=False),
    ".gif": _Animation("GIF", Fraction(1, 100), (), 65535),
    ".webp": _Animation("WEBP", Fraction(1, 1000), (("quality", 90), ("method", 4)), 16383),
    ".png": _Pictures("PNG", ()),
    ".jpg": _Pictures("JPEG", (("quality", 95), ("subsampling", 0)), 65500),
    ".jpeg": _Pictures("JPEG", (("quality", 95), ("subsampling", 0)), 65500),
}
