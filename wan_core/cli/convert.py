"""``convert``: a checkpoint in another format or layout."""

from __future__ import annotations

import argparse

from ..tools.convert import TARGETS, convert
from .arguments import path

_WORST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=path, metavar="IN", help="a diffusion model, text encoder or VAE")
    parser.add_argument(
        "target", type=path, metavar="OUT", help="the file to write, or the folder for layouts that are one"
    )
    parser.add_argument(
        "--to", required=True, choices=list(TARGETS), metavar="FORMAT", help=f"one of {', '.join(TARGETS)}"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--quiet", action="store_true", help="only the summary, not a line for each tensor")


def run(args: argparse.Namespace) -> None:
    report = convert(
        args.source, args.target, args.to, overwrite=args.overwrite, on_tensor=None if args.quiet else _print_line
    )
    for note in report.notes:
        print(note)
    if report.errors:
        print(f"\nLargest relative errors (root mean square) of {len(report.errors)} changed tensors:")
        for name, error in report.worst[:_WORST]:
            _print_line(name, error)
    size = sum(path.stat().st_size for path in report.written) / 1e9
    print(f"Wrote {args.target}: {size:.2f} GB, {args.to}.")


def _print_line(name: str, error: float | None) -> None:
    print(f"{error:10.2e}  {name}" if error is not None else f"{'as it was':>10}  {name}", flush=True)
