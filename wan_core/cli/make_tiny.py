"""``make-tiny``: random checkpoints of small dimensions."""

from __future__ import annotations

import argparse

from ..config import VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    parser.add_argument("--task", choices=list(VARIANTS), default="t2v-A14B")
    parser.add_argument("--layout", choices=["official", "comfyui", "diffusers"], default="official")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    from ..tools.tiny import write_tiny

    files = write_tiny(args.out, args.task, layout=args.layout, seed=args.seed)
    total = sum(file.stat().st_size for file in files)
    print(f"Wrote {len(files)} files, {total / 2**20:.1f} MB, to {args.out}: "
          f"random weights, {args.task}, {args.layout} layout.")
