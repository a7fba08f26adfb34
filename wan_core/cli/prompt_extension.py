"""The flags of prompt extension, and the question they ask before a run."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..prompt.extension import KEEP, METHODS, STOP
from .arguments import boolean, number

if TYPE_CHECKING:
    import torch

    from ..pipeline import Request
    from ..prompt.extension.question import Method

_ON_FAILURE = {"keep": KEEP, "stop": STOP}


def add_extension_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--use_prompt_extend",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        help="let a language model write the prompt out, or make one of --image where --prompt is empty",
    )
    add(
        "--prompt_extend_method",
        choices=METHODS,
        default=METHODS[0],
        help="local_qwen: on this machine, with transformers; dashscope: with the key in DASH_API_KEY (and an address "
        "in DASH_API_URL); openai: any server of that kind, by OPENAI_BASE_URL and OPENAI_API_KEY",
    )
    add(
        "--prompt_extend_model",
        default="",
        metavar="NAME",
        help="the language model: for local_qwen a folder, a name on Hugging Face or Qwen2.5_3B and the like (default: "
        "Qwen2.5_14B, with an image QwenVL2.5_7B; dashscope: qwen-plus, qwen-vl-max; openai has none)",
    )
    add("--prompt_extend_target_lang", choices=["zh", "en"], default="zh", help="language of the extended prompt")
    add(
        "--prompt_extend_on_failure",
        choices=list(_ON_FAILURE),
        default="keep",
        help="keep: go on with the given prompt and say so; stop: end",
    )
    add(
        "--prompt_extend_timeout",
        type=number(above=0),
        metavar="SECONDS",
        help="for the answer (default: 60; local_qwen: 600, loading not counted)",
    )


def extended(args: argparse.Namespace, request: Request, device: torch.device) -> str:
    """The prompt of a completed request, extended; it is printed, and so is what went wrong.

    Raises:
        WanError: nothing to extend, a method that cannot be asked, or a failure that is to end the run.
    """
    from ..media.geometry import open_image
    from ..prompt.extension.extend import PromptExtender

    pictures = [open_image(file) for file in request.pictures.values()]
    result = PromptExtender().extend(
        _method(args, bool(pictures), device),
        request.prompt,
        pictures=pictures,
        language=args.prompt_extend_target_lang,
        seed=request.seed,
        on_failure=_ON_FAILURE[args.prompt_extend_on_failure],
    )
    for note in () if result.failed else result.notes:  # a failure is in the log already
        logging.getLogger(__name__).warning(note)
    if not result.failed:
        print(f"Extended prompt: {result.prompt}", flush=True)
    return result.prompt


def _method(args: argparse.Namespace, pictures: bool, device: torch.device) -> Method:
    if args.prompt_extend_method == "local_qwen":
        from ..memory.devices import available_bytes
        from ..memory.language_model import place_for
        from ..prompt.extension.local_qwen import LocalQwen

        return LocalQwen(
            args.prompt_extend_model,
            _found,
            lambda weights: place_for(weights, device, available_bytes(device)),
            pictures,
            args.prompt_extend_timeout or 600,
        )
    from ..prompt.extension.servers import PROTOCOLS, ServerMethod

    protocol = PROTOCOLS[args.prompt_extend_method]
    endpoint = protocol.endpoint({}, os.environ)
    return ServerMethod(protocol, endpoint, args.prompt_extend_model, args.prompt_extend_timeout or 60)


def _found(name: str) -> Path | None:
    """A folder, or a model on Hugging Face, which is fetched where it was not before."""
    from ..prompt.extension.local_qwen import fetched

    return Path(name) if Path(name).is_dir() else fetched(name)
