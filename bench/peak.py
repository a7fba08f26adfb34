"""Peak memory of one contender at one part, in this process, as a JSON number of bytes on stdout."""

from __future__ import annotations

import argparse
import json

import torch

from . import parts
from .measure import peak_growth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--part", required=True, help="a part's name, such as 'vae21 encode'")
    parser.add_argument("--contender", required=True)
    parser.add_argument("--quick", action="store_true", help="tiny dimensions")


@torch.inference_mode()
def run(options: argparse.Namespace) -> int:
    part = parts.named(options.quick, options.part)
    call = part.build(options.contender, part.weights())
    call(*part.smallest_inputs())
    inputs = part.inputs()
    print(json.dumps(peak_growth(lambda: call(*inputs))))
    return 0
