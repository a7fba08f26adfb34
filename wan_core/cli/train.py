"""``train``: LoRA or full training of one expert on a folder of clips; started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import VARIANTS
from ..errors import WanError
from .arguments import SEEDS, number, path, whole, words

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..train.loop import StepReport

_TARGETS = "q,k,v,o,ffn.0,ffn.2"
_FRAMES = 49


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(VARIANTS), required=True)
    parser.add_argument("--ckpt_dir", type=path, default=None, help="folder of the checkpoint, as downloaded")
    parser.add_argument(
        "--dit",
        type=path,
        default=None,
        help="file of the model or expert (for LoRAs also a "
        "quantised one) instead of the folder's; with --vae and --text_encoder, and --clip for "
        "Wan2.1's I2V and FLF2V, no --ckpt_dir is needed",
    )
    parser.add_argument("--vae", type=path, default=None)
    parser.add_argument("--text_encoder", type=path, default=None)
    parser.add_argument("--tokenizer", type=path, default=None, help="where the text encoder's file has none inside")
    parser.add_argument("--clip", type=path, default=None, help="CLIP's picture encoder, for Wan2.1's I2V and FLF2V")
    parser.add_argument("--expert", choices=["high", "low", "only"], default=None, help="which of the two to train")
    parser.add_argument(
        "--dataset_base_path",
        type=path,
        required=True,
        help="folder with metadata.csv: "
        "video,prompt, and for I2V perhaps start_image,end_image; images count as one frame",
    )
    parser.add_argument("--dataset_metadata_path", type=path, default=None, help="the table, if it lies elsewhere")
    parser.add_argument(
        "--dataset_outside_files",
        action="store_true",
        help="follow absolute paths in the table, and those that lead out of the dataset's folder",
    )
    parser.add_argument("--dataset_repeat", type=whole(), default=1, help="times that a clip counts in an epoch")
    parser.add_argument("--skip_bad_clips", action="store_true", help="name short and unreadable clips and go on")
    parser.add_argument("--width", type=whole(), default=832, help="clips are scaled to cover this and cut")
    parser.add_argument("--height", type=whole(), default=480)
    parser.add_argument(
        "--num_frames",
        type=whole(),
        default=None,
        help=f"from the beginning of each clip: 4n + 1; default: {_FRAMES}, or 1 for a model of pictures",
    )
    parser.add_argument("--output_path", type=path, required=True, help="folder of the result, its log and its state")
    parser.add_argument("--lora_rank", type=whole(), default=32, help="0 trains all weights")
    parser.add_argument("--lora_alpha", type=number(), default=None, help="default: the rank")
    parser.add_argument(
        "--lora_target_modules",
        default=_TARGETS,
        help="layers that the LoRA adapts, by the ends of "
        "their names; all: every one, also Wan2.1's for the picture (k_img, v_img, img_emb)",
    )
    parser.add_argument(
        "--min_timestep_boundary", type=number(), default=None, help="fraction; default: the expert's own"
    )
    parser.add_argument(
        "--max_timestep_boundary", type=number(), default=None, help="fraction; default: the expert's own"
    )
    parser.add_argument("--shift", type=number(), default=None, help="default: the variant's own for the size")
    parser.add_argument("--learning_rate", type=number(), default=1e-4, help="rises for 20 steps, then a cosine")
    parser.add_argument("--weight_decay", type=number(), default=0.01)
    parser.add_argument("--num_epochs", type=whole(), default=5)
    parser.add_argument("--max_steps", type=whole(), default=0, help="instead of epochs")
    parser.add_argument("--batch_size", type=whole(), default=1)
    parser.add_argument("--gradient_accumulation_steps", type=whole(), default=1)
    parser.add_argument("--caption_dropout", type=number(), default=0.1, help="share of steps without the caption")
    parser.add_argument("--ema", type=number(), default=0.0, help="decay of averaged weights; 0 keeps none")
    parser.add_argument("--seed", type=whole(-SEEDS // 2, SEEDS - 1), default=0)
    parser.add_argument(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="of matrix products; auto: bf16 where the device is fast in it",
    )
    parser.add_argument("--no_gradient_checkpointing", action="store_true", help="faster, with more memory")
    parser.add_argument("--use_gradient_checkpointing_offload", action="store_true", help="slower, with less memory")
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="with several processes and --lora_rank 0: each holds a part of the model, its gradients and the "
        "optimiser's state, instead of all",
    )
    parser.add_argument("--save_steps", type=whole(), default=0, help="default: save every two minutes")
    parser.add_argument("--t5_cpu", action="store_true", help="encode the prompts on the CPU")
    parser.add_argument(
        "--sample_every", type=whole(), default=0, help="steps between grids of samples, as PNG; 0: none"
    )
    parser.add_argument(
        "--sample_prompt",
        type=words,
        action="append",
        default=[],
        metavar="TEXT",
        help="a row of the grids, may be given several times; default: prompts of the first clips",
    )
    parser.add_argument("--sample_steps", type=whole(), default=20)
    parser.add_argument("--cache_path", type=path, default=None, help="latents and embeddings; default: in the output")
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu ... (default: a GPU if there is one)")


def run(args: argparse.Namespace) -> None:
    from ..memory.devices import resolve_device
    from ..train.data import Frame
    from ..train.parallel import Processes
    from ..train.run import Hooks, Request, experts_of, files_in
    from ..train.run import run as train

    expert = args.expert or _only_expert(experts_of(VARIANTS[args.task]))
    request = Request(
        task=args.task,
        expert=expert,
        clips=args.dataset_base_path,
        metadata=args.dataset_metadata_path,
        root=Path(args.dataset_base_path.absolute().anchor) if args.dataset_outside_files else None,
        out=args.output_path,
        frame=Frame(args.width, args.height, _frames(args)),
        repeat=args.dataset_repeat,
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        targets=_names(args.lora_target_modules),
        boundaries=_boundaries(args),
        shift=args.shift,
        steps=args.max_steps,
        epochs=args.num_epochs,
        batch=args.batch_size,
        accumulate=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        ema=args.ema,
        caption_dropout=args.caption_dropout,
        seed=args.seed,
        precision=args.precision,
        checkpointing=not args.no_gradient_checkpointing,
        checkpoint_offload=args.use_gradient_checkpointing_offload,
        skip_bad_clips=args.skip_bad_clips,
        save_every=args.save_steps,
        sample_every=args.sample_every,
        sample_prompts=args.sample_prompt,
        sample_steps=args.sample_steps,
        cache=args.cache_path,
        fsdp=args.fsdp,
    )
    device = resolve_device(args.device)
    files = files_in(
        args.ckpt_dir,
        args.task,
        expert,
        dit=args.dit,
        vae=args.vae,
        text_encoder=args.text_encoder,
        tokenizer=args.tokenizer,
        clip=args.clip,
    )
    first = Processes.current(device).first
    with _Bar() as bar:
        hooks = Hooks(on_step=bar.on_step, on_clip=bar.on_clip) if first else Hooks(tell=lambda text: None)
        file = train(request, files, device=device, text_device="cpu" if args.t5_cpu else device, hooks=hooks)
    Processes.leave()
    if first:
        print(f"Wrote {file}; log.csv and loss.png lie beside it.")


def _only_expert(experts: tuple[str, ...]) -> str:
    if len(experts) > 1:
        raise WanError("This model has two experts: say which to train, --expert high or --expert low.")
    return experts[0]


def _frames(args: argparse.Namespace) -> int:
    return min(_FRAMES, VARIANTS[args.task].frames) if args.num_frames is None else args.num_frames


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _boundaries(args: argparse.Namespace) -> tuple[float, float] | None:
    low, high = args.min_timestep_boundary, args.max_timestep_boundary
    if (low is None) != (high is None):
        raise WanError("Give both --min_timestep_boundary and --max_timestep_boundary, or neither.")
    return None if low is None else (low, high)


class _Bar:
    """tqdm bars over the clips that are made ready and over steps, with the loss."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def on_clip(self, done: int, total: int) -> None:
        self.bar = self.bar or _tqdm(total=total, desc="encoding", unit="clip")
        self.bar.update(done - self.bar.n)
        if done == total:
            self._end()

    def on_step(self, report: StepReport) -> None:
        if self.bar is None or self.bar.desc != _STEPS:
            self._end()
            self.bar = _tqdm(total=report.steps, initial=report.step - 1, desc=_STEPS, unit="step")
        self.bar.set_postfix_str(f"loss {report.loss:.4f}")
        self.bar.update()

    def _end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = None


_STEPS = "training"


def _tqdm(**options: object) -> tqdm:
    from tqdm import tqdm

    return tqdm(**options)
