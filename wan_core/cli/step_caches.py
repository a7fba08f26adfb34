"""The flags of step caches, with DiffSynth-Studio's for TeaCache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import WanError
from .arguments import number, whole, words

if TYPE_CHECKING:
    from ..recipe import ModelRecipe
    from ..sampling.step_cache import StepCache


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--step_cache",
        choices=["easy", "magnitude", "teacache", "every"],
        help="extrapolate some steps instead of computing them (from 10 steps on): easy decides as the run goes, "
        "magnitude by curves of the model (its own, see calibrate, or published ones), teacache by a published "
        "polynomial (Wan2.1 T2V and I2V, TI2V-5B), every leaves out all but one of N",
    )
    add(
        "--step_cache_amount",
        type=number(above=0),
        metavar="X",
        help="easy: how much change may add up (default: 0.1); magnitude: the same of its curves (default: 0.06); "
        "teacache: its threshold; every: N (default: 2)",
    )
    add(
        "--step_cache_dense",
        type=number(0, 1),
        metavar="PART",
        help="the part of each expert's steps, from its first, that is always computed (default: 0.2)",
    )
    add("--step_cache_most", type=whole(1), metavar="N", help="steps in a row that may be left out (default: 2)")
    add(
        "--tea_cache_l1_thresh",
        type=number(above=0),
        metavar="X",
        help="the step cache teacache with this threshold (0.05 to 0.3)",
    )
    add(
        "--tea_cache_model_id",
        type=words,
        metavar="NAME",
        help="whose polynomial teacache takes: Wan2.1-T2V-1.3B, Wan2.1-T2V-14B, Wan2.1-I2V-14B-480P, "
        "Wan2.1-I2V-14B-720P or Wan2.2-TI2V-5B (default: by the model)",
    )


def step_cache_from(args: argparse.Namespace, model: ModelRecipe) -> StepCache | None:
    """
    Raises:
        WanError: flags that do not belong together, or see ``step_cache``.
    """
    policy = _policy(args)
    if policy is None:
        return None
    from ..loading.step_caches import step_cache

    amount = args.tea_cache_l1_thresh or args.step_cache_amount
    options = {"dense": args.step_cache_dense, "most": args.step_cache_most, "amount": amount}
    given = {name: value for name, value in options.items() if value is not None}
    return step_cache(policy, model.variant, model.high, model.low, tea_model=args.tea_cache_model_id, **given)


def _policy(args: argparse.Namespace) -> str | None:
    tea = args.tea_cache_l1_thresh is not None
    policy = args.step_cache or ("teacache" if tea else None)
    if tea and policy != "teacache":
        raise WanError(f"--tea_cache_l1_thresh is of the step cache teacache, but --step_cache is {policy}.")
    if tea and args.step_cache_amount is not None:
        raise WanError("Give --tea_cache_l1_thresh or --step_cache_amount, not both: they are the same number.")
    if args.tea_cache_model_id is not None and policy != "teacache":
        raise WanError("--tea_cache_model_id is of the step cache teacache: give --tea_cache_l1_thresh too.")
    for flag in ("step_cache_amount", "step_cache_dense", "step_cache_most"):
        if policy is None and getattr(args, flag) is not None:
            raise WanError(f"--{flag} is of a step cache: give --step_cache too.")
    return policy
