"""The real code on a device without data: kernels, bytes, waits and memory at real sizes, without a card.

What it cannot say: how long anything takes, what a kernel reads twice, and what a kernel's own workspace takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .report import PUBLISHED, grown, load, publish, rehearsed, save


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="scenes whose name holds this; then nothing is written")
    parser.add_argument("--out", type=Path, default=PUBLISHED, help="the JSON file (default: the published one)")
    parser.add_argument("--check", action="store_true", help="fail if a figure is more than in that file")


def run(options: argparse.Namespace) -> int:
    report = {"runs": {}, "autoencoders": {}, "text": {}}
    for table, name, row in rehearsed(options.only):
        report[table][name] = row
        print(f"{name}\n    " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.check:
        more = grown(load(options.out), report)
        print("\n".join(more) or "Nothing has grown.")
        return bool(more)
    if not options.only:
        save(report, options.out)
        if options.out == PUBLISHED:
            publish(report)
    return 0
