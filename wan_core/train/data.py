"""Clips to train on: a folder with ``metadata.csv``, or any Python sequence of clips.

The table has a row a clip: ``video,prompt`` as in the folder layout of DiffSynth-Studio (``image`` or ``file_name`` may
stand for ``video``), and optionally ``start_image`` and ``end_image``. Images are clips of one frame.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TEMPORAL_STRIDE
from ..errors import WanError
from ..files.door import shown, some
from ..media.geometry import image_tensor, latent_frames, open_image

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_LARGEST_TABLE = 64 * 1024**2  # bytes
_FILE_COLUMNS = ("video", "image", "file_name")
_IMAGE_COLUMNS = {"start_image": 0, "end_image": -1}  # and the frame that each is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frame:
    """Width, height and frames of what is trained on."""

    width: int
    height: int
    frames: int


@dataclass(frozen=True, eq=False)
class Clip:
    """One example; its pixels are read when they are wanted.

    Attributes:
        name: for messages.
        key: changes when the content does: names the cached latent.
        pixels: -> [3, F, H, W] in -1..1, F being 4n + 1.
        given: condition images by frame number ([3, H, W]); without any, I2V is shown the clip's own first frame.
        check: a quick look, before hours are spent on other clips; raises ClipProblem.
    """

    name: str
    prompt: str
    key: str
    pixels: Callable[[], Tensor]
    given: Callable[[], dict[int, Tensor]] = field(default=dict)
    check: Callable[[], None] = lambda: None


class ClipProblem(Exception):
    """A clip that cannot be used, and why."""


def read_folder(
    folder: str | Path, frame: Frame, *, metadata: str | Path | None = None, root: Path | None = None
) -> list[Clip]:
    """The clips of a table.

    Args:
        root: what the files must lie in; None: the folder itself.

    Raises:
        WanError: see ``read_table`` and ``inside``.
    """
    folder = Path(folder)
    table = Path(metadata) if metadata else folder / "metadata.csv"
    column, rows = read_table(table)
    return [_clip(folder, row, column, frame, root or folder) for row in rows]


def read_table(table: Path) -> tuple[str, list[dict[str, str]]]:
    """The name of the column of files, and the rows; no clip is opened.

    Raises:
        WanError: no table, no column of files or prompts, or no row.
    """
    if not table.is_file():
        raise WanError(f"No {table}: the data folder needs a metadata.csv with the columns video,prompt.")
    if table.stat().st_size > _LARGEST_TABLE:
        raise WanError(f"{shown(table)} has {table.stat().st_size / 1e6:.0f} MB: expected a table with a line a clip.")
    try:
        with table.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, strict=True)
            columns, rows = list(reader.fieldnames or []), [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise WanError(f"{table} is not a table in UTF-8 ({error}): save it as CSV UTF-8.") from error
    except csv.Error as error:
        raise WanError(
            f"{table} cannot be read ({error}): look for a quotation mark that is not closed, and write one "
            'within a prompt twice ("").'
        ) from error
    column = next((name for name in _FILE_COLUMNS if name in columns), None)
    if column is None or "prompt" not in columns:
        raise WanError(f"{shown(table)} has the columns {some(columns, 10) or '(none)'}; expected video,prompt.")
    if not rows:
        raise WanError(f"{table} has no rows: add one for each clip.")
    for line, row in rows:
        _check_row(f"{shown(table)}, line {line}", row, column)
    return column, [row for _, row in rows]


def _check_row(place: str, row: dict[str | None, str], column: str) -> None:
    """A comma without quotes around the prompt would cut it short."""
    if row[column] is None or row["prompt"] is None:
        raise WanError(f'{place}: no prompt behind {shown(row[column])!r}. Write clip.mp4,"the prompt".')
    if beyond := "".join(row.get(None, ())).strip():
        raise WanError(
            f"{place}: {shown(beyond)!r} stands beyond the last column. Put a prompt with commas in "
            'quotation marks: clip.mp4,"a red, round ball".'
        )


def files_of(folder: Path, root: Path | None = None) -> list[Path]:
    """A data set's table, and all that its rows name; arguments as of ``read_folder``.

    Raises:
        WanError: see ``read_table`` and ``inside``.
    """
    table = folder / "metadata.csv"
    column, rows = read_table(table)
    named = {row[name] for row in rows for name in (column, *_IMAGE_COLUMNS) if row.get(name)}
    return [table, *(inside(folder, name, root or folder) for name in sorted(named))]


def inside(folder: Path, name: str, root: Path) -> Path:
    """A file that a folder's table names. Links are followed: clips may lie on another disk.

    Raises:
        WanError: a name that leads out of the root, or none that a file can have.
    """
    place = Path(os.path.normpath(folder.absolute() / name))
    if "\0" in name or not place.is_relative_to(os.path.normpath(root.absolute())):
        raise WanError(
            f"The table names {shown(name)!r}, which is not inside {shown(root)}: move the file there, or "
            "name the folder above both as the data folder. On the command line the option "
            "dataset_outside_files allows others."
        )
    return folder / name


def _clip(folder: Path, row: dict[str, str], column: str, frame: Frame, root: Path) -> Clip:
    file = inside(folder, row[column] or "", root)
    images = {place: inside(folder, row[name], root) for name, place in _IMAGE_COLUMNS.items() if row.get(name)}

    def given() -> dict[int, Tensor]:
        return {place: _picture(image, frame) for place, image in images.items()}

    def check() -> None:
        _check_file(file, frame)
        given()

    return Clip(
        name=row[column] or "(empty)",
        prompt=row["prompt"],
        key=_key(file, images, frame),
        check=check,
        given=given,
        pixels=lambda: read_pixels(file, frame),
    )


def _picture(file: Path, frame: Frame) -> Tensor:
    """A condition image, [3, H, W].

    Raises:
        ClipProblem: not there or not readable; says which file, which is not the clip's own.
    """
    try:
        return read_pixels(file, replace(frame, frames=1))[:, 0]
    except ClipProblem as problem:
        raise ClipProblem(f"has the picture {file.name}: {problem}") from problem


def _key(clip: Path, images: Mapping[int, Path], frame: Frame) -> str:
    """Of the content and what it is for, not of names or dates: a moved data set needs no new latents."""
    digest = hashlib.sha256(repr(frame).encode())
    files: list[tuple[int | None, Path]] = [(None, clip), *images.items()]
    for place, file in files:
        if place is not None:
            digest.update(f"{place}:".encode())
        if file.is_file():
            with file.open("rb") as content:
                digest.update(
                    hashlib.file_digest(content, "sha256").digest()
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(content.read()).digest()
                )
        digest.update(b"|")
    return digest.hexdigest()[:32]


def read_pixels(file: Path, frame: Frame) -> Tensor:
    """The first frames of a video, or the one of an image, scaled to cover the size and cut to it.

    Raises:
        ClipProblem: not there, not readable, or too short.
    """
    if not file.is_file():
        raise ClipProblem("no such file")
    if file.suffix.lower() in IMAGES:
        return cover(_read_image(file), frame)[:, None]
    pictures = [cover(image_tensor(picture), frame) for picture in _read_frames(file, frame.frames)]
    if len(pictures) < frame.frames:
        raise ClipProblem(f"has {len(pictures)} frames, expected at least {frame.frames}")
    return torch.stack(pictures, dim=1)


def _check_file(file: Path, frame: Frame) -> None:
    """A video by its first frame and the length that it tells.

    Raises:
        ClipProblem: not there, not readable, or too short.
    """
    if not file.is_file():
        raise ClipProblem("no such file")
    if file.suffix.lower() in IMAGES:
        _read_image(file)
        return
    next(_read_frames(file, 1), None)
    frames = _frames_told(file)
    if 0 < frames < frame.frames:
        raise ClipProblem(f"has {frames} frames, expected at least {frame.frames}")


def _frames_told(file: Path) -> int:
    """How many frames a video says it has; 0 where it does not say."""
    import av

    with av.open(str(file)) as container:
        return container.streams.video[0].frames


def _read_image(file: Path) -> Tensor:
    try:
        return image_tensor(open_image(file))
    except WanError as error:
        raise ClipProblem(f"is not a readable image ({error})") from error


def _read_frames(file: Path, count: int) -> Iterator[np.ndarray]:
    """[H, W, 3] bytes, upright: a telephone writes pictures as its sensor lies, and beside them how to turn them."""
    import av

    try:
        with av.open(str(file)) as container:
            for _, frame in zip(range(count), container.decode(video=0), strict=False):
                quarters = round(getattr(frame, "rotation", 0) / 90)  # to the left; older PyAV does not tell
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise ClipProblem(f"is not a readable video ({error})") from error


def cover(picture: Tensor, frame: Frame) -> Tensor:
    """[3, h, w] -> [3, H, W]: scaled to cover, the centre cut out."""
    height, width = picture.shape[1:]
    scale = max(frame.width / width, frame.height / height)
    size = (max(frame.height, round(height * scale)), max(frame.width, round(width * scale)))
    if size != (height, width):
        picture = F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (size[0] - frame.height) // 2, (size[1] - frame.width) // 2
    return picture[:, top : top + frame.height, left : left + frame.width]


def check_frame(frame: Frame, multiple: int) -> None:
    """
    Raises:
        WanError: sides or frames that the model cannot have.
    """
    latent_frames(frame.frames)
    if frame.width % multiple or frame.height % multiple or min(frame.width, frame.height) < multiple:
        raise WanError(f"{frame.width}x{frame.height} pixels: this model needs multiples of {multiple}.")


def usable(clips: Sequence[Clip], prepare: Callable[[Clip], object], *, skip_bad: bool) -> list[Clip]:
    """The clips for which ``prepare`` works; each of the others is named with what is wrong with it.

    Raises:
        WanError: a bad clip and not ``skip_bad``, or no good one.
    """
    good, bad = [], []
    for clip in clips:
        try:
            prepare(clip)
            good.append(clip)
        except ClipProblem as problem:
            bad.append(f"{clip.name} {problem}")
    if bad and not skip_bad:
        raise WanError(
            f"{len(bad)} of {len(clips)} clips cannot be used: {'; '.join(bad)}. Mend or remove them, or "
            "skip them: option skip_bad_clips."
        )
    for line in bad:
        log.warning("Skipped: %s.", line)
    if not good:
        raise WanError(f"None of {len(clips)} clips can be used: {'; '.join(bad[:5])}.")
    return good


def whole_chunks(video: Tensor, name: str) -> Tensor:
    """A Python data set may hand over any tensor: here its shape is checked.

    Raises:
        ClipProblem: not [3, 4n + 1, H, W].
    """
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[1] % TEMPORAL_STRIDE != 1:
        raise ClipProblem(f"has the shape {list(video.shape)}, expected [3, 4n + 1, height, width]")
    return video
