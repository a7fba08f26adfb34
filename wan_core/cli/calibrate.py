"""``calibrate``: one run, every step computed, that measures a model's own curve for the step cache magnitude.

The curve is written beside the model's file, one for each expert, and is found there.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace

from ..config import VARIANTS
from ..errors import WanError
from . import generate
from .loras import with_loras
from .weights import models_from

log = logging.getLogger(__name__)

_NOT_HERE = ("save_file", "save_tensors", "step_cache", "tea_cache_l1_thresh", "guidance", "cfg_merge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    generate.add_arguments(parser)  # the run that is measured is one of those


def run(args: argparse.Namespace) -> None:
    given = [flag for flag in _NOT_HERE if getattr(args, flag)]
    if given:
        raise WanError(
            "Measuring saves no video, leaves out no step and takes plain guidance: run without "
            f"--{', --'.join(given)}."
        )
    generate.refuse_unsupported(args)
    from ..dtypes import resolve_dtype
    from ..loading.step_caches import curve_file
    from ..memory.devices import resolve_device
    from ..memory.engine import Engine
    from ..pipeline import check_run
    from ..tools.calibrate import calibrate, check_free, save

    device, variant = resolve_device(args.device), VARIANTS[args.task]
    resolve_dtype(args.dtype, device)
    request = generate.request_from(args).completed(variant)
    models = models_from(args)
    models = replace(models, dit=replace(with_loras(models.dit, args.lora), **generate.swap(args)))
    check_free([curve_file(file.path) for file in models.dit.files], overwrite=args.overwrite)
    check_run(models, request, Engine(), device)
    with generate.Bar(request.steps) as bar:
        measured = calibrate(
            models, request, device=device, text_device=generate.text_device(args, device), on_step=bar
        )
    how = {"steps": request.steps, "shift": request.shift, "solver": request.solver, "schedule": request.schedule}
    how["loras"] = [use.file.path.name for use in models.dit.loras]
    for file, one in zip(save(measured, how, overwrite=args.overwrite), measured, strict=True):
        log.info("%s: %s steps, ratios %.4f to %.4f", file, len(one.sigmas), one.ratios[0], one.ratios[-1])
