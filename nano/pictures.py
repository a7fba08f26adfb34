"""``python -m nano.pictures``: a contact sheet of the family, and the demo's videos as animated WebP."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from wan_core.cli.arguments import Parser, path, whole
from wan_core.cli.guard import guarded
from wan_core.media.video import to_bytes, unfinished
from wan_core.train.data import Frame
from wan_core.train.report import sample_grid
from wan_core.train.sample import Sampling

from .judge import FILES, T2V, Judge, held_out_prompts
from .world import Scene, film

SHOWN = {
    "nano_i2v.png": Scene("triangle", "yellow", "grey studio", motion="up", y=0.0),
    "nano_ti2v.png": Scene("square", "purple", "snow", motion="left"),
}  # what the demo animates


def main() -> None:
    parser = Parser(prog="python -m nano.pictures", description=__doc__)
    parser.add_argument("--family", type=path, default=Path("nano"))
    parser.add_argument("--demo", type=path, default=Path("output"), help="folder of the demo's mp4 files")
    parser.add_argument("--out", type=path, default=Path("docs/images"))
    parser.add_argument("--clips", type=whole(1), default=10)
    args = parser.parse_args()
    judge = Judge(lambda stage: args.family / FILES[stage], Frame(64, 64, 17), Sampling())
    contact_sheet(judge, args.out / "nano_contact.png", args.clips)
    for video in sorted(args.demo.glob("wan22_*.mp4")):
        animate(video, args.out / f"{video.stem.replace('wan22', 'demo')}.webp")


def contact_sheet(judge: Judge, file: Path, clips: int) -> None:
    """Five frames of each of the first held-out prompts, none left out."""
    prompts = held_out_prompts(clips, seed=900)
    videos = [enlarged(video) for video, _ in judge.clips("t2v_high", "t2v_low", T2V, prompts, 0)]
    sample_grid(videos, file, captions=[words for _, words in prompts])


def enlarged(video: Tensor, times: int = 2) -> Tensor:
    """[3, F, H, W], every pixel as a square."""
    return video.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)


def animate(video: Path, file: Path, side: int = 192) -> None:
    """A looping WebP of a video, enlarged."""
    import av
    from PIL import Image

    with av.open(str(video)) as container:
        fps = float(container.streams.video[0].average_rate)
        frames = [frame.to_image().resize((side, side), Image.BICUBIC) for frame in container.decode(video=0)]
    with unfinished(file) as partial:
        frames[0].save(
            partial,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / fps),
            loop=0,
            quality=80,
        )


def first_frames(folder: Path, side: int) -> None:
    """The images that the demo animates."""
    from PIL import Image

    for name, scene in SHOWN.items():
        picture = torch.from_numpy(film(scene, 17, side, side)[:1]).permute(3, 0, 1, 2).mul(2).sub(1)
        Image.fromarray(to_bytes(picture)[0].numpy()).save(folder / name)


if __name__ == "__main__":
    sys.exit(guarded(main))
