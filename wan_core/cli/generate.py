"""``generate``: prompt (and image) to mp4, with the flags and defaults of the official ``generate.py``."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import VARIANTS, PerExpert
from ..errors import WanError
from .arguments import SEEDS, boolean, number, path, size, whole, words
from .guidance import add_guidance_arguments, guidance_of
from .loras import add_lora_argument, with_loras
from .output import Output
from .presets import chosen_sampling, preset_notes
from .prompt_extension import add_extension_arguments, extended
from .step_caches import add_cache_arguments, step_cache_from
from .weights import add_weight_arguments, given_files, models_from, where_the_vae_is

if TYPE_CHECKING:
    import torch

    from ..pipeline import Request
    from ..recipe import ModelRecipe
    from ..sampling.denoise import StepReport

log = logging.getLogger(__name__)

# The official script's own examples.
_EXAMPLE_PROMPT = {
    "t2v-A14B": "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted "
    "stage.",
    "t2i-14B": "一个朴素端庄的美人",
    "i2v-A14B": "Summer beach vacation style, a white cat wearing sunglasses sits on a surfboard.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", choices=list(VARIANTS), default="t2v-A14B", help="the model to run")
    add_weight_arguments(parser)
    add(
        "--size",
        type=size,
        metavar="W*H",
        help="width*height; with an image its area, the image decides the aspect ratio (default: the model's)",
    )
    add("--frame_num", type=whole(1), help="frames of the video, 4n+1")
    add("--prompt", type=words, help="what to show")
    add("--negative_prompt", type=words, default="", help="what to avoid; the official list if not given")
    add("--image", "--first_frame", type=path, help="start image (I2V models, flf2v-14B, ti2v-5B)")
    add("--end_image", "--last_frame", type=path, help="end image (I2V models, flf2v-14B)")
    add(
        "--base_seed",
        type=whole(-SEEDS, SEEDS - 1),
        default=-1,
        help="the same seed gives the same video; negative draws one",
    )
    add(
        "--preset",
        type=words,
        metavar="NAME",
        help="solver, schedule, steps, shift and guidance of a distilled model or LoRA: LightX2V-4step, "
        "Self-Forcing-4step, FastWan-1.3B-3step, FastWan-5B-3step, CausVid-9step, rCM-T2V-4step, rCM-I2V-4step (each "
        "also with -ODE); what is given beside it wins",
    )
    add("--sample_solver", type=words, help="unipc (default), dpm++, euler, heun, or lcm, which distilled models take")
    add(
        "--sample_schedule",
        type=words,
        help="auto (default: the solver's official grid), unipc, dpm++, simple, diffusers; of distilled models: "
        "self-forcing, fastwan, causvid, rcm-80, rcm-200, rcm-1600",
    )
    add("--sample_steps", type=whole(1, 10_000), help="denoising steps")
    add("--sample_shift", type=number(above=0), help="how much of the schedule is spent at high noise")
    add("--sample_guide_scale", type=_guidance, metavar="X or LOW,HIGH", help="classifier-free guidance")
    add(
        "--offload_model",
        type=boolean,
        default=None,
        metavar="True|False",
        help="keep one model at a time on the device (default: True on a GPU)",
    )
    add_cache_arguments(parser)
    add_guidance_arguments(parser)
    add_lora_argument(parser)
    add(
        "--vram_limit",
        type=_limit,
        metavar="GB|auto",
        help="device memory that a model may take: blocks of the transformer stream from their file as needed",
    )
    add("--swap_blocks", type=whole(), default=0, metavar="N", help="stream so many blocks, whatever the memory")
    add("--prefetch", type=whole(), metavar="N", help="streamed blocks on the device before their turn (default: 1)")
    add(
        "--vae_tile",
        type=whole(64),
        metavar="N",
        help="encode and decode in tiles of so many pixels a side (default: only where --vram_limit asks for it)",
    )
    add(
        "--plan",
        action="store_true",
        help="say what the run needs of the device, and end; without --ckpt_dir for the models as published",
    )
    add(
        "--convert_model_dtype",
        action="store_true",
        help="accepted for the official script's users: weights are always kept in --dtype",
    )
    add("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    add("--device", default="auto", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    add("--dtype", default="auto", help="bfloat16, float16, float32, auto; fp8_e4m3fn or int8 quantise while loading")
    add(
        "--attention",
        default="auto",
        help="auto, sdpa, or what is installed of sage, sage3, kitchen, flash2, flash3, flash4, sol",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the transformer's blocks (torch.compile): the first step takes longer, the others may be faster; "
        "takes more memory",
    )
    add(
        "--save_file",
        type=path,
        metavar="FILE",
        help="what to write: .mp4 .mkv .mov .webm, .gif .webp, or .png .jpg, a file a frame (default: an mp4 named by "
        "task, size, prompt and time)",
    )
    add(
        "--save_tensors",
        type=path,
        metavar="FILE.safetensors",
        help="also write 'latent' [C,T,h,w] (normalised) and 'video' [3,F,H,W] (-1..1), float32",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace whatever has the name; without it only what this program saved is replaced",
    )
    add_extension_arguments(parser)
    for flag in ("--ulysses_size", "--dit_fsdp", "--t5_fsdp"):
        add(flag, nargs="?", const="True", default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    refuse_unsupported(args)
    from ..dtypes import resolve_dtype
    from ..media import geometry as latents
    from ..memory.devices import resolve_device
    from ..memory.engine import Engine
    from ..pipeline import check_run, generate, needs, video_size
    from ..recipe import told_of_guidance

    output = Output(args.save_file or default_name(args), args.save_tensors, args.overwrite, _inputs(args))
    if not args.plan:
        output.check()
    device, variant = resolve_device(args.device), VARIANTS[args.task]
    resolve_dtype(args.dtype, device)
    request = request_from(args).completed(variant, planned=args.plan)
    models = models_from(args, plan=args.plan)
    options = {"step_cache": step_cache_from(args, models.dit), "guidance": guidance_of(args), "compile": args.compile}
    models = replace(models, dit=replace(with_loras(models.dit, args.lora), **options, **swap(args)))
    if args.plan:
        print(needs(models, request, device, text_device(args, device)))
        return
    engine = Engine(keep_one=args.offload_model is not False and device.type != "cpu" or args.offload_model is True)
    check_run(models, request, engine, device)
    width, height = video_size(request, variant)
    output.check_size(width, height, request.frames, latents.latent_shape(variant, width, height, request.frames))
    for note in (*models.dit.notes, *preset_notes(args, request), *_step_notes(models.dit, request)):
        log.info(note)
    if models.dit.guidance:
        log.info("Guidance: %s", told_of_guidance(models.dit, request.timetable(), request.guidance))
    notes = {"task": args.task, "vae": variant.vae, "seed": str(request.seed)}
    if args.use_prompt_extend:
        request = replace(request, prompt=extended(args, request, device))
        notes["prompt"] = request.prompt
    log.info(
        "%s, %s frames, %s, %s steps, seed %s, on %s",
        models.dit,
        request.frames,
        request.solver,
        request.steps,
        request.seed,
        device,
    )
    with Bar(request.steps) as bar:
        result = generate(models, request, engine, device=device, text_device=text_device(args, device), on_step=bar)
    output.save(result.latent, result.video(), variant.fps, notes, where_the_vae_is(args))


def _inputs(args: argparse.Namespace) -> list[Path]:
    loras = [file for option in args.lora for file in (option.file, option.low) if file]
    return [file for file in (args.image, args.end_image, *loras, *given_files(args)) if file]


def swap(args: argparse.Namespace) -> dict:
    """The recipe's fields for block swap, as far as they were given."""
    given = {"swap_blocks": args.swap_blocks, "vram_limit": args.vram_limit, "prefetch": args.prefetch}
    return {name: value for name, value in given.items() if value is not None}


def request_from(args: argparse.Namespace) -> Any:
    """The ``Request`` that the arguments make; ``completed`` fills in what they leave open."""
    from ..pipeline import Request

    prompt = args.prompt if args.prompt is not None else _EXAMPLE_PROMPT.get(args.task, _EXAMPLE_PROMPT["t2v-A14B"])
    chosen = chosen_sampling(args)
    shift, guidance = chosen["shift"], chosen["guidance"]
    if (official := VARIANTS[args.task].command_line) and not args.preset:
        shift = official[0] if shift is None else shift
        guidance = PerExpert(official[1], official[1]) if guidance is None else guidance
    return Request(
        prompt,
        args.negative_prompt,
        image=args.image,
        end_image=args.end_image,
        size=args.size,
        frames=args.frame_num,
        steps=chosen["steps"],
        shift=shift,
        guidance=guidance,
        solver="unipc" if chosen["solver"] is None else chosen["solver"],
        schedule="auto" if chosen["schedule"] is None else chosen["schedule"],
        seed=args.base_seed,
        vae_tile=args.vae_tile,
    )


def default_name(args: argparse.Namespace) -> Path:
    """As the official script names its files, without characters that some file systems refuse, and not too long."""
    variant = VARIANTS[args.task]
    width, height = args.size or variant.size
    ending = "png" if (args.frame_num or variant.frames) == 1 else "mp4"
    prompt = "".join(c if c.isalnum() else "_" for c in (args.prompt or "example"))[:50]
    prompt = prompt.encode()[:150].decode(errors="ignore")
    return Path(f"{args.task}_{width}x{height}_{prompt}_{datetime.now():%Y%m%d_%H%M%S}.{ending}")


def text_device(args: argparse.Namespace, device: torch.device) -> torch.device:
    import torch

    return torch.device("cpu") if args.t5_cpu else device


def refuse_unsupported(args: argparse.Namespace) -> None:
    if args.vram_limit is not None and args.swap_blocks:
        raise WanError("Give --vram_limit or --swap_blocks, not both: a limit decides how many blocks stream.")
    for flag, harmless in (("ulysses_size", ("1",)), ("dit_fsdp", ()), ("t5_fsdp", ())):
        value = getattr(args, flag)
        if value is not None and value not in (*harmless, "False"):
            raise WanError(f"--{flag} is not supported by this version: run without it.")


def _step_notes(model: ModelRecipe, request: Request) -> list[str]:
    """What is known of the steps before the run."""
    from ..recipe import working
    from ..sampling.presets import uneven

    timetable = request.timetable()
    experts = working(model, timetable)
    notes = [uneven(experts, timetable)]
    if model.step_cache:
        notes.append(model.step_cache.forecast(timetable, experts, 0, timetable.steps, model.guidance.turns(timetable)))
    return [note for note in notes if note]


def _guidance(text: str) -> PerExpert:
    parts = text.split(",")
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"expected one number or LOW,HIGH, found {text!r}")
    low, *high = map(number(-1000, 1000), parts)
    return PerExpert(low=low, high=high[0] if high else low)


def _limit(text: str) -> float | str:
    return text if text == "auto" else number(above=0)(text)


class Bar:
    """A tqdm bar over steps that tells which expert works, and how many steps a cache left out."""

    def __init__(self, steps: int) -> None:
        from tqdm import tqdm

        self.bar = tqdm(total=steps, desc="sampling", unit="step")
        self.left_out = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, report: StepReport) -> None:
        self.left_out += not report.computed
        parts = [f"{report.expert}-noise expert"] if report.expert != "only" else []
        if self.left_out:
            parts.append(f"{self.left_out} extrapolated")
        self.bar.set_postfix_str(", ".join(parts))
        self.bar.update()
