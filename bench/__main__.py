"""``python -m bench COMMAND``: a command is a module with ``add_arguments(parser)`` and ``run(options)``."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "cpu": "DiT and VAEs beside diffusers and ComfyUI: time and peak memory, on the CPU",
    "gpu": "one card: ours beside diffusers and ComfyUI, attention, linears, streaming, VAEs",
    "handoff": "one sampler over both experts beside two that hand over: distance from a 200-step reference",
    "import": "what the pack adds to ComfyUI's start, and how long reading a checkpoint's header takes",
    "memory": "what the planner says of device memory beside what was measured, for the three variants",
    "nano": "what the nano family's clips show: words, pairs, motion, first frames, and what each expert adds",
    "rehearse": "the real code on a device without data: kernels, bytes, waits and memory against the plan",
    "peak": "peak memory of one contender (what cpu runs in a process of its own)",
    "preview": "what a moving preview costs the sampler, and its size",
    "quality": "faster ways beside fewer steps, on the nano family: speed and distance from the whole run",
    "soak": "a ComfyUI server after many prompts and interrupts: memory, threads, open files",
}
_MODULES = {"import": "imports"}  # a keyword is no module name


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition(":")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked:
            _module(name).add_arguments(command)
    options = parser.parse_args()
    return _module(options.command).run(options)


def _module(name: str):
    return importlib.import_module(f"bench.{_MODULES.get(name, name)}")


if __name__ == "__main__":
    raise SystemExit(main())
