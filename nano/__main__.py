"""``python -m nano``: train the nano family; killed and started again, it goes on where it was."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from wan_core.cli.arguments import Parser, number, path, whole
from wan_core.cli.guard import guarded
from wan_core.errors import WanError
from wan_core.media.geometry import latent_frames
from wan_core.tools.convert import convert
from wan_core.train.data import Frame

from .judge import FILES
from .pictures import first_frames
from .recipe import LAST, STAGES, Family, Settings

FORMATS = {"vae16": "fp16", "vae48": "fp16"}  # of the files; all others are fp8_scaled, for their size


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m nano", description=__doc__)
    parser.add_argument("--work", type=path, default=Path(".cache/nano"), help="folder of states and caches")
    parser.add_argument("--out", type=path, default=None, help="folder for the finished files, laid out as ComfyUI's")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"comma-separated, of {','.join(STAGES)}")
    parser.add_argument(
        "--seconds", type=number(0, 1e9), default=None, help="stop a stage after so long; the next call goes on"
    )
    parser.add_argument("--scale", type=number(above=0), default=1.0, help="of all steps; small values try the way")
    parser.add_argument("--size", type=_side, default=64, help="side of the pictures, a multiple of 32")
    parser.add_argument("--frames", type=whole(1), default=17)
    parser.add_argument("--clips", type=whole(1), default=Settings.clips, help="clips the transformers are trained on")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--threads", type=whole(0, 4096), default=0, help="of the CPU; 0 is PyTorch's choice")
    parser.add_argument("--debug", action="store_true", help="show Python's traceback of an error")
    return parser.parse_args(argv)


def _side(text: str) -> int:
    side = whole(32)(text)
    if side % 32:
        raise argparse.ArgumentTypeError(f"expected a multiple of 32, found {side}")
    return side


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        args = parse(argv)
        latent_frames(args.frames)
        if args.threads:
            torch.set_num_threads(args.threads)
        settings = Settings(
            frame=Frame(args.size, args.size, args.frames), clips=args.clips, scale=args.scale, precision=args.precision
        )
        family = Family(settings, args.work, tell=_tell, seconds=args.seconds)
        run(family, args.stages.split(","))
        if args.out:
            export(family, args.out)

    return guarded(work, debug="--debug" in (argv or sys.argv), cancelled="Stopped; the same command goes on.")


def run(family: Family, stages: list[str]) -> None:
    """The stages in order; finished ones are passed over.

    Raises:
        WanError: an unknown stage, or one that needs another first.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise WanError(f"Unknown stages {', '.join(unknown)}: expected some of {', '.join(STAGES)}.")
    for name in stages:
        if family.done(name):
            family.tell(f"{name}: done before")
            continue
        began = time.monotonic()
        finished = STAGES[name](family)
        family.tell(f"{name}: {'finished' if finished else 'stopped'} after {time.monotonic() - began:.0f} s")
        if not finished:
            return


def export(family: Family, out: Path) -> None:
    """The finished stages as the files of the family, in their storage dtype."""
    total = 0
    for published, name in FILES.items():
        stage = LAST.get(published, published)
        if not family.done(stage):
            continue
        file = out / name
        store(family.need(stage), file, FORMATS.get(published, "fp8_scaled"))
        total += file.stat().st_size
        family.tell(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    first_frames(out, family.settings.frame.width)
    family.tell(f"{total / 1e6:.1f} MB in all")


def store(source: Path, file: Path, form: str) -> None:
    """A finished stage in half precision, its large matrices in ``form``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder) / file.name
        convert(source, half, "fp16")
        if form == "fp16":
            shutil.copyfile(half, file)
        else:
            convert(half, file, form, overwrite=True)


def _tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
