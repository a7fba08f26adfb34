"""Clips of a folder: tables as people write them, condition images, and pictures that have to be turned."""

from __future__ import annotations

import csv
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from wan_core.errors import WanError
from wan_core.media.video import save_video
from wan_core.train.data import Frame, read_folder, read_pixels, usable


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a.mp4,a red, round ball", r"line 3: 'round ball' stands beyond the last column"),
        ("a.mp4", "line 3: no prompt behind 'a.mp4'"),
        ('a.mp4,"never closed', "a quotation mark that is not closed"),
    ],
)
def test_rows_that_would_lose_words(rows: str, expected: str, tmp_path: Path):
    (tmp_path / "metadata.csv").write_text(f"video,prompt\nb.mp4,b\n{rows}\nc.mp4,c\n")
    with pytest.raises(WanError, match=expected):
        read_folder(tmp_path, Frame(32, 32, 5))


def test_tables_as_programs_write_them(tmp_path: Path):
    """A byte order mark, Windows' line ends, quoted commas, blank lines, a comma too many, other columns."""
    text = '\ufeffvideo,prompt,fps\r\na.mp4,"a ""red"", 红 ball",16\r\n\r\nb.mp4,,,\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode())
    clips = read_folder(tmp_path, Frame(32, 32, 5))
    assert [(clip.name, clip.prompt) for clip in clips] == [("a.mp4", 'a "red", 红 ball'), ("b.mp4", "")]


def test_condition_images_are_told_apart_and_named(tmp_path: Path):
    """The same picture at the start and at the end are two conditions, whose latents are cached apart."""
    save_video([torch.zeros(3, 5, 32, 32)], tmp_path / "a.mp4", 16)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "c.png")
    rows = [
        ["video", "prompt", "start_image", "end_image"],
        ["a.mp4", "", "c.png", ""],
        ["a.mp4", "", "", "c.png"],
        ["a.mp4", "", "gone.png", ""],
    ]
    with (tmp_path / "metadata.csv").open("w", newline="") as out:
        csv.writer(out).writerows(rows)
    start, end, gone = read_folder(tmp_path, Frame(32, 32, 5))
    assert [list(clip.given()) for clip in (start, end)] == [[0], [-1]] and start.key != end.key
    with pytest.raises(WanError, match=r"a\.mp4 has the picture gone\.png: no such file"):
        usable([start, end, gone], lambda clip: clip.check(), skip_bad=False)


def test_clips_of_a_telephone_stand_upright(tmp_path: Path):
    """Written as the sensor lies, with a note of how to turn them: red above, green below."""
    lying = np.zeros((32, 64, 3), np.uint8)
    lying[:, :32, 1], lying[:, 32:, 0] = 200, 200  # green at the left, red at the right: a quarter turn to the left
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(lying).save(tmp_path / "a.png", exif=exif)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16, width=64, height=32, pix_fmt="yuv420p")
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write the note")
        stream.set_display_rotation(90)
        for packet in (*stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")), *stream.encode()):
            container.mux(packet)
    for name in ("a.png", "a.mp4"):
        pixels = read_pixels(tmp_path / name, Frame(32, 64, 1))[:, 0]
        assert pixels[0, :24].mean() > 0.4 > -0.9 > pixels[1, :24].mean() and pixels[1, 40:].mean() > 0.4, name
