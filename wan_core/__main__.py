"""``python -m wan_core``: the command line."""

from __future__ import annotations

import argparse
import logging
import sys

from .cli import convert, generate, make_tiny, train
from .errors import WanError

COMMANDS = {
    "generate": (generate, "a video from a prompt, with the official script's flags"),
    "convert": (convert, "a checkpoint in another format: fp8, int8, GGUF, bf16, or another layout"),
    "make-tiny": (make_tiny, "random checkpoints of small dimensions, for tests"),
    "train": (train, "a LoRA or a whole expert, trained on a folder of clips"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m wan_core", description="Wan2.2 video generation in plain PyTorch.")
    commands = top.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.run(args)
    except WanError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Cancelled.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
