"""``make-tiny``: random checkpoints of small dimensions."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from ..config import VARIANTS
from ..errors import WanError
from .arguments import path, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write to")
    parser.add_argument("--task", choices=list(VARIANTS), default="t2v-A14B")
    parser.add_argument("--layout", choices=["official", "comfyui", "diffusers"], default="official")
    parser.add_argument("--seed", type=whole(), default=0)


def run(args: argparse.Namespace) -> None:
    """Made in a folder beside, then moved: of what is in OUT already only small checkpoints' files are replaced."""
    from ..tools.tiny import write_tiny

    out: Path = args.out
    _make_folder(out)
    with tempfile.TemporaryDirectory(prefix=".wan_core-", dir=out) as fresh:
        made = write_tiny(fresh, args.task, layout=args.layout, seed=args.seed)
        places = {file: out / file.relative_to(fresh) for file in made}
        taken = [
            place
            for file, place in places.items()
            if os.path.lexists(place) and not (_same(file, place) or _tiny(place))
        ]
        if taken:
            raise WanError(
                f"{', '.join(str(place) for place in taken[:3])}{' ...' * (len(taken) > 3)} exists already: "
                "choose an empty folder, or move that away."
            )
        for file, place in places.items():
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    files = list(places.values())
    total = sum(file.stat().st_size for file in files)
    print(
        f"Wrote {len(files)} files, {total / 2**20:.1f} MB, to {args.out}: "
        f"random weights, {args.task}, {args.layout} layout."
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WanError(f"Cannot make the folder {folder} ({error.strerror}): choose another.") from error


def _same(one: Path, other: Path) -> bool:
    """Whether two files are equal, as those of the same task and seed are."""
    try:
        return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
    except OSError:
        return False


def _tiny(file: Path) -> bool:
    """Whether a safetensors file says that it was made here, as tasks of one folder share some."""
    from safetensors import SafetensorError, safe_open

    from ..tools.tiny import MARK

    try:
        with safe_open(file, framework="pt") as content:
            return MARK in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False
