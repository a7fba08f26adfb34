"""What a run tells about itself: a CSV log, a plot of the loss, and grids of samples. Needs only Pillow."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import WanError
from ..media.video import marked, to_bytes, unfinished

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont


class Log:
    """A CSV file with one row a step; rows after the step that a run goes on from are dropped."""

    def __init__(self, file: Path, resumed_at: int) -> None:
        self.file = file
        kept = [row for row in read_log(file) if int(row["step"]) <= resumed_at]
        self.fields = list(kept[0]) if kept else []
        if not kept:
            file.unlink(missing_ok=True)
            return
        with unfinished(file) as partial, partial.open("w", newline="", encoding="utf-8") as out:
            writer = csv.DictWriter(out, self.fields)
            writer.writeheader()
            writer.writerows(kept)

    def write(self, row: Mapping[str, object]) -> None:
        fresh = not self.file.exists()
        self.fields = self.fields or list(row)
        try:
            with self.file.open("a", newline="", encoding="utf-8") as out:
                writer = csv.DictWriter(out, self.fields, extrasaction="ignore")
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
        except OSError as error:
            raise WanError(
                f"Cannot write {self.file}: {error.strerror}. Make room and start the same training again: it goes on."
            ) from error


def read_log(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as rows:
        return [row for row in csv.DictReader(rows) if None not in row.values()]  # a kill can cut the last row


def plot_loss(losses: Sequence[float], file: Path) -> None:
    with unfinished(file) as partial:
        draw_loss(losses).save(partial, **marked("PNG"))


def draw_loss(losses: Sequence[float], *, title: str = "loss", size: tuple[int, int] = (800, 400)) -> Image.Image:
    """A line plot on a logarithmic scale: each step faint, their running mean strong."""
    from PIL import Image, ImageDraw

    values = [value for value in losses if value > 0 and math.isfinite(value)]
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    left, top, right, bottom = 70, 30, size[0] - 20, size[1] - 40
    draw.rectangle((left, top, right, bottom), outline="#999999")
    draw.text((left, 10), f"{title}, {len(losses)} steps", fill="black")
    if values:
        low, high = math.log10(min(values)), math.log10(max(values))
        high = max(high, low + 1e-3)
        for i in range(5):
            level = low + (high - low) * i / 4
            y = bottom - (bottom - top) * i / 4
            draw.line((left, y, right, y), fill="#eeeeee")
            draw.text((8, y - 6), f"{10**level:.3g}", fill="black")
        draw.text((right - 40, bottom + 10), str(len(losses)), fill="black")

        def points(row: Sequence[float]) -> list[tuple[float, float]]:
            across = (right - left) / max(1, len(row) - 1)
            return [
                (left + i * across, bottom - (bottom - top) * (math.log10(v) - low) / (high - low))
                for i, v in enumerate(row)
            ]

        if len(values) > 1:
            draw.line(points(values), fill="#c5d8f0")
            draw.line(points(running_mean(values)), fill="#1f5fbf", width=2)
    return picture


def running_mean(values: Sequence[float], decay: float = 0.95) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        means.append(total / weight)
    return means


def sample_grid(videos: Sequence[Tensor], file: Path, *, captions: Sequence[str] = (), frames: int = 5) -> None:
    """A PNG with one row a video ([3, F, H, W] in -1..1): frames evenly picked, the caption above."""
    from PIL import Image, ImageDraw

    rows = [_strip(video, frames) for video in videos]
    head = 14 if captions else 0
    width = max(row.shape[1] for row in rows)
    picture = Image.new("RGB", (width, sum(row.shape[0] + head for row in rows)), "white")
    draw, y = ImageDraw.Draw(picture), 0
    for i, row in enumerate(rows):
        if captions:
            _write(draw, (2, y), captions[i][: width // 6])
        picture.paste(Image.fromarray(row.numpy()), (0, y + head))
        y += row.shape[0] + head
    with unfinished(file) as partial:
        picture.save(partial, **marked("PNG"))


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Chinese in a font of the system, where it has one; Pillow's own knows Latin letters alone."""
    font = None if text.isascii() else _wide_font()
    draw.text(place, text if font else text.encode("latin-1", "replace").decode("latin-1"), fill="black", font=font)


_WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSerifCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc",
               "PingFang.ttc", "Arial Unicode.ttf")  # fmt: skip


@cache
def _wide_font() -> ImageFont.FreeTypeFont | None:
    from PIL import ImageFont

    for name in _WIDE_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, 11)
    return None


def _strip(video: Tensor, frames: int) -> Tensor:
    """[3, F, H, W] -> [H, n W, 3] uint8."""
    picked = torch.linspace(0, video.shape[1] - 1, min(frames, video.shape[1])).round().long()
    return torch.cat(list(to_bytes(video[:, picked])), dim=1)
