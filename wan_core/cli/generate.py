"""``generate``: prompt (and image) to mp4, with the flags and defaults of the official ``generate.py``."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from ..config import VARIANTS, PerExpert
from ..errors import WanError
from .loras import add_lora_argument, with_loras

log = logging.getLogger(__name__)

# The official script's own examples.
_EXAMPLE_PROMPT = {
    "t2v-A14B": "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted "
                "stage.",
    "i2v-A14B": "Summer beach vacation style, a white cat wearing sunglasses sits on a surfboard.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", choices=list(VARIANTS), default="t2v-A14B", help="the model to run")
    add("--ckpt_dir", required=True, help="folder of the checkpoint, as downloaded")
    add("--size", type=_size, default=(1280, 720), metavar="W*H",
        help="width*height; with an image its area, the image decides the aspect ratio")
    add("--frame_num", type=int, help="frames of the video, 4n+1")
    add("--prompt", help="what to show")
    add("--negative_prompt", default="", help="what to avoid; the official list if not given")
    add("--image", type=Path, help="start image (i2v-A14B, ti2v-5B)")
    add("--base_seed", type=int, default=-1, help="the same seed gives the same video; negative draws one")
    add("--sample_solver", default="unipc", help="unipc, dpm++, euler or heun")
    add("--sample_schedule", default="auto",
        help="auto (the solver's official grid), unipc, dpm++, simple or diffusers")
    add("--sample_steps", type=int, help="denoising steps")
    add("--sample_shift", type=float, help="how much of the schedule is spent at high noise")
    add("--sample_guide_scale", type=_guidance, metavar="X or LOW,HIGH", help="classifier-free guidance")
    add("--offload_model", type=_bool, default=None, metavar="True|False",
        help="keep one model at a time on the device (default: True on a GPU)")
    add_lora_argument(parser)
    add("--vram_limit", type=_limit, metavar="GB|auto",
        help="device memory that a model may take: blocks of the transformer stream from their file as needed")
    add("--swap_blocks", type=int, default=0, metavar="N", help="stream so many blocks, whatever the memory")
    add("--prefetch", type=int, metavar="N", help="streamed blocks on the device before their turn (default: 1)")
    add("--vae_tile", type=int, metavar="N",
        help="encode and decode in tiles of so many pixels a side (default: only where --vram_limit asks for it)")
    add("--plan", action="store_true", help="say what the run needs of the device, and end")
    add("--convert_model_dtype", action="store_true",
        help="accepted for the official script's users: weights are always kept in --dtype")
    add("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    add("--device", default="auto", help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")
    add("--dtype", default="auto", help="bfloat16, float16, float32, auto; fp8_e4m3fn or int8 quantise while loading")
    add("--attention", default="auto", help="auto, sdpa, sage, flash2 or flash3")
    add("--save_file", type=Path, help="the mp4 to write (default: a name from task, size, prompt and time)")
    add("--save_tensors", type=Path, metavar="FILE.safetensors",
        help="also write 'latent' [C,T,h,w] (normalised) and 'video' [3,F,H,W] (-1..1), float32")
    for flag in ("--ulysses_size", "--dit_fsdp", "--t5_fsdp", "--use_prompt_extend"):
        add(flag, nargs="?", const="True", default=None, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    _refuse_unsupported(args)
    from ..media.video import check_writable
    from ..memory.devices import resolve_device
    from ..memory.engine import Engine
    from ..pipeline import generate, needs, read_models

    file = args.save_file or default_name(args)
    for target in () if args.plan else (file, args.save_tensors):
        if target:
            check_writable(target)
    device = resolve_device(args.device)
    request = request_from(args).completed(VARIANTS[args.task])
    models = read_models(args.ckpt_dir, args.task, dtype=args.dtype, attention=args.attention)
    models = replace(models, dit=replace(with_loras(models.dit, args.lora), **_swap(args)))
    if args.plan:
        print(needs(models, request, device, _text_device(args, device)))
        return
    for note in models.dit.notes:
        log.info(note)
    log.info("%s, %s frames, %s, %s steps, seed %s, on %s", models.dit, request.frames, request.solver, request.steps,
             request.seed, device)  # fmt: skip
    engine = Engine(keep_one=args.offload_model is not False and device.type != "cpu" or args.offload_model is True)
    with _Bar(request.steps) as bar:
        result = generate(models, request, engine, device=device, text_device=_text_device(args, device), on_step=bar)
    _save(result, file, args.save_tensors, VARIANTS[args.task].fps)


def _swap(args: argparse.Namespace) -> dict:
    """The recipe's fields for block swap, as far as they were given."""
    given = {"swap_blocks": args.swap_blocks, "vram_limit": args.vram_limit, "prefetch": args.prefetch}
    return {name: value for name, value in given.items() if value is not None}


def request_from(args: argparse.Namespace):
    """The request that the arguments make."""
    from ..pipeline import Request

    prompt = args.prompt if args.prompt is not None else _EXAMPLE_PROMPT.get(args.task, _EXAMPLE_PROMPT["t2v-A14B"])
    return Request(
        prompt, args.negative_prompt, image=args.image, size=args.size, frames=args.frame_num, steps=args.sample_steps,
        shift=args.sample_shift, guidance=args.sample_guide_scale, solver=args.sample_solver,
        schedule=args.sample_schedule, seed=args.base_seed, vae_tile=args.vae_tile,
    )  # fmt: skip


def default_name(args: argparse.Namespace) -> Path:
    """As the official script names its files, without characters that some file systems refuse."""
    width, height = args.size
    words = "".join(c if c.isalnum() else "_" for c in (args.prompt or "example"))[:50]
    return Path(f"{args.task}_{width}x{height}_{words}_{datetime.now():%Y%m%d_%H%M%S}.mp4")


def _save(result, file: Path, tensors: Path | None, fps: int) -> None:
    from ..media.video import save_video, unfinished

    if tensors is None:
        save_video(result.video(), file, fps)
    else:
        import torch
        from safetensors.torch import save_file

        video = torch.cat(list(result.video()), dim=1)
        save_video([video], file, fps)
        with unfinished(tensors) as partial:
            save_file({"latent": result.latent.float().contiguous(), "video": video.contiguous()}, partial)
        print(f"Tensors: {tensors}")
    print(f"Video: {file} (seed {result.seed})")


def _text_device(args: argparse.Namespace, device):
    import torch

    return torch.device("cpu") if args.t5_cpu else device


def _refuse_unsupported(args: argparse.Namespace) -> None:
    for flag, harmless in (("ulysses_size", ("1",)), ("dit_fsdp", ()), ("t5_fsdp", ()), ("use_prompt_extend", ())):
        value = getattr(args, flag)
        if value is not None and value not in (*harmless, "False"):
            raise WanError(f"--{flag} is not supported by this version: run without it.")


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().replace("x", "*").split("*"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected width*height such as 1280*720, found {text!r}") from None
    return width, height


def _guidance(text: str) -> PerExpert:
    try:
        low, *high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected one number or LOW,HIGH, found {text!r}") from None
    if len(high) > 1:
        raise argparse.ArgumentTypeError(f"expected one number or LOW,HIGH, found {text!r}")
    return PerExpert(low=low, high=high[0] if high else low)


def _limit(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected gigabytes such as 8, or auto, found {text!r}") from None


def _bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "t", "y", "1"):
        return True
    if text.lower() in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


class _Bar:
    """A tqdm bar over steps that tells which expert works."""

    def __init__(self, steps: int):
        from tqdm import tqdm

        self.bar = tqdm(total=steps, desc="sampling", unit="step")

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def __call__(self, report) -> None:
        if report.expert != "only":
            self.bar.set_postfix_str(f"{report.expert}-noise expert")
        self.bar.update()
