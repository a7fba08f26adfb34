"""``python -m wan_core``: the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from importlib import import_module

from .cli.arguments import Parser
from .cli.guard import guarded

COMMANDS = {
    "generate": "a video from a prompt, with the official script's flags",
    "decode": "a video from a latent that was saved, without sampling again",
    "convert": "a checkpoint in another format: fp8, int8, GGUF, bf16, or another layout",
    "calibrate": "a model's own curve for the step cache magnitude, measured on one run",
    "make-tiny": "random checkpoints of small dimensions, for tests",
    "train": "a LoRA or a whole expert, trained on a folder of clips",
}


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m wan_core", description="Wan2.2 video generation in plain PyTorch.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = import_module(f".cli.{name.replace('-', '_')}", __package__)
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show Python's traceback of an error")
        command.set_defaults(run=module.run)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""

    def work() -> None:
        args = parser().parse_args(argv)
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        args.run(args)

    return guarded(work, debug="--debug" in (sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
