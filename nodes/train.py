"""Wan Train LoRA: ``wan_core.train.run`` on a clip folder of ComfyUI, with its progress bar and cancel button."""

from __future__ import annotations

import gc
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import comfy.model_management as management
import folder_paths
import numpy as np
import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..wan_core.config import Variant
from ..wan_core.errors import Hint, WanError
from ..wan_core.external import only_own
from ..wan_core.layouts.noise_level import noise_level_of
from ..wan_core.layouts.variants import candidates, choose
from ..wan_core.loading.dit import DiTFile
from ..wan_core.media.geometry import latent_frames
from ..wan_core.recipe import ModelRecipe
from . import host, official
from .base import WanNode
from .clip_vision import WanClipVision
from .text import WanCLIP
from .types import WanModel
from .vae import WanVAE

if TYPE_CHECKING:
    from ..wan_core.train.loop import StepReport
    from ..wan_core.train.run import Hooks, Request

log = logging.getLogger(__name__)

TABLE = "metadata.csv"
WORK = "wan_training"  # below ComfyUI's output folder: states, logs and plots, a folder for each save name
_READ_WHEN_QUEUED = 1_000_000  # bytes of a table: it is read in the web server's loop then
_CHECKPOINTING = ["on", "offload", "off"]


class TrainLora(WanNode):
    files = ("dataset",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanCoreTrainLora",
            display_name="Wan Train LoRA",
            category="Wan 2.2/training",
            description="Trains a LoRA on a folder of clips and saves it in ComfyUI's loras folder. Cancel when you "
            "like: queued again with the same settings, it goes on where it stopped. The preview is the loss so far.",
            is_output_node=True,
            inputs=[
                WanModel.Input(
                    "model",
                    tooltip="From Load Wan Model; a quantised file is dequantised. "
                    "Wan2.2's T2V and I2V have two experts, each of which gets a LoRA of its own.",
                ),
                io.Vae.Input("vae", tooltip="From Load Wan VAE. Encodes each clip once."),
                io.Clip.Input("clip", tooltip="From Load Wan Text Encoder. Encodes each prompt once."),
                io.Combo.Input(
                    "dataset",
                    options=datasets(),
                    tooltip="A folder in ComfyUI's input folder with clips and a metadata.csv, whose columns are "
                    "video,prompt. Press R after you have put one there.",
                ),
                io.Combo.Input(
                    "expert",
                    options=["auto", "high", "low"],
                    default="auto",
                    tooltip="Which expert learns, on its own part of the noise: high decides layout and motion, low "
                    "the look. auto: as the file's name says; Wan2.1 and the 5B have only one.",
                ),
                io.Int.Input(
                    "width",
                    default=official.WIDTH,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Clips are scaled and cut to this width: a multiple of 16, or of 32 for the 5B.",
                ),
                io.Int.Input(
                    "height",
                    default=official.HEIGHT,
                    min=16,
                    max=4096,
                    step=16,
                    tooltip="Clips are scaled and cut to this height: a multiple of 16, or of 32 for the 5B.",
                ),
                io.Int.Input(
                    "frames",
                    default=49,
                    min=1,
                    max=1001,
                    step=4,
                    tooltip="Frames from the beginning of each clip: 1, 5, 9, ... (4n + 1). Shorter clips are refused; "
                    "images count as one frame.",
                ),
                io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Training steps."),
                io.Float.Input(
                    "learning_rate",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-5,
                    round=1e-7,
                    tooltip="Rises over the first 20 steps and falls along a cosine. Lower it if the loss jumps.",
                ),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="Size of the LoRA: 16 to 32 for a look or a person, more for many things at once.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=1.0,
                    tooltip="Strength of the update is alpha / rank. 0: the same as the rank.",
                ),
                io.String.Input(
                    "targets",
                    default="q,k,v,o,ffn.0,ffn.2",
                    tooltip="Layers of each block that the LoRA adapts, by the ends of their names. all: every one, "
                    "also those through which Wan2.1's I2V sees the picture (k_img, v_img, img_emb).",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Clips in one step: steadier, and slower in proportion.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Decides the order and the noise. The same seed and settings give the same LoRA.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=_CHECKPOINTING,
                    default="on",
                    tooltip="Saves memory for time. on: blocks are computed again for the gradients; offload: what "
                    "they need waits in main memory as well; off: fastest, for small clips or models.",
                ),
                io.Boolean.Input(
                    "skip_bad_clips",
                    default=False,
                    tooltip="Off: a clip that is missing, short or broken is refused by name. On: it is left out, and "
                    "named in the log.",
                ),
                io.String.Input(
                    "save_name",
                    default="wan_lora",
                    tooltip="Name of the file in ComfyUI's loras folder, and of the folder in output/wan_training "
                    "that keeps the state.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="On: goes on with what was trained under this name. Off: begins anew, and replaces it.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="From Load Wan CLIP Vision, for Wan2.1's I2V and FLF2V. Sees each clip's picture once.",
                ),
            ],
            outputs=[io.String.Output(display_name="lora_path"), io.Image.Output(display_name="loss_plot")],
        )

    @classmethod
    def check_inputs(cls, dataset: str | None, frames: int | None, targets: str | None, save_name: str | None) -> None:
        """What the widgets alone show; a None comes from a link and is not known yet."""
        if dataset is not None:
            find_table(dataset, largest=_READ_WHEN_QUEUED)
        if frames is not None:
            latent_frames(frames)
        if save_name is not None:
            lora_file(save_name)

    @classmethod
    def fingerprint_inputs(cls, dataset: str | None = None, **_: object) -> tuple:
        """Changes when a clip or the table does."""
        from ..wan_core.train.data import files_of

        try:
            files = files_of(dataset_folder(dataset or ""), _inputs())
            return tuple(host.stamp(file) if file.is_file() else None for file in files)
        except (OSError, WanError) as error:
            return (str(error),)

    @classmethod
    def execute(
        cls, model: ModelRecipe, vae: object, clip: object, clip_vision: object = None, **settings: Any
    ) -> io.NodeOutput:
        progress = Progress(host.current_node())
        file, plot = train(model, Encoders(vae, clip, clip_vision), Settings(**settings), progress)
        words = host.text_output(progress.text)
        shown = ui.PreviewImage(plot, cls=cls).as_dict() | (words.as_dict() if words else {})
        return io.NodeOutput(str(file), plot, ui=shown)


@dataclass(frozen=True, eq=False)
class Encoders:
    """What is connected beside the model."""

    vae: Any
    clip: Any
    clip_vision: Any = None

    def files(self, variant: Variant) -> dict[str, Any]:
        """The files behind them, by the names of ``TrainFiles``.

        Raises:
            WanError: one comes from another loader, or one that the variant needs is missing.
        """
        _ours(self.vae, WanVAE, "vae", "Load Wan VAE")
        _ours(self.clip, WanCLIP, "clip", "Load Wan Text Encoder")
        if self.clip_vision is not None:
            _ours(self.clip_vision, WanClipVision, "clip_vision", "Load Wan CLIP Vision")
        elif variant.clip:
            raise WanError(
                f"{variant.display_name} sees its picture through CLIP too, and would learn to do without "
                "it: connect Load Wan CLIP Vision to clip_vision."
            )
        seen = self.clip_vision and self.clip_vision.file.checkpoint.path
        return {"vae": self.vae.file.checkpoint.path, "text_encoder": self.clip.file.checkpoint.path, "clip": seen}


@dataclass(frozen=True)
class Settings:
    """The node's widgets."""

    dataset: str
    expert: str
    width: int
    height: int
    frames: int
    steps: int
    learning_rate: float
    rank: int
    alpha: float
    targets: str
    batch_size: int
    seed: int
    checkpointing: str
    skip_bad_clips: bool
    save_name: str
    resume: bool


def train(model: ModelRecipe, encoders: Encoders, settings: Settings, progress: Progress) -> tuple[Path, torch.Tensor]:
    """The LoRA file, and the plot of the loss as an IMAGE.

    Raises:
        WanError: what does not fit together, before anything is loaded.
    """
    from ..wan_core.train.run import TrainFiles, run

    model = replace(model, variant=variant_of(model, settings.expert))
    beside = encoders.files(model.variant)
    weights, expert = choose_expert(model, settings.expert)
    if expert == "only" and settings.expert != "auto":
        progress.remark(f"expert {settings.expert} has no effect: {model.variant.display_name} is one model.")
    find_table(settings.dataset)
    goal = lora_file(settings.save_name)
    request = _request(model, expert, settings)
    _check_not_foreign(goal, request)
    parts = TrainFiles(weights.checkpoint.path, **beside)
    try:
        # ComfyUI runs nodes in inference mode, whose tensors have no gradients.
        with torch.inference_mode(False), torch.enable_grad():
            made = run(
                request,
                parts,
                device=host.device(),
                text_device=encoders.clip.patcher.load_device,
                hooks=_hooks(request, progress),
            )
    finally:
        gc.collect()  # the wrapped layers of a model in training hold each other
        management.soft_empty_cache()
    goal.parent.mkdir(parents=True, exist_ok=True)
    _copy(made, goal)
    progress.remark(f"Wrote {goal}")
    return goal, _image(request.out / "loss.png")


def _request(model: ModelRecipe, expert: str, settings: Settings) -> Request:
    from ..wan_core.train.data import Frame
    from ..wan_core.train.run import Request

    return Request(
        task=model.variant.task,
        expert=expert,
        clips=dataset_folder(settings.dataset),
        root=_inputs(),
        out=_work(settings.save_name),
        cache=_work("_cache"),
        frame=Frame(settings.width, settings.height, settings.frames),
        steps=settings.steps,
        rank=settings.rank,
        alpha=settings.alpha or None,
        targets=[name.strip() for name in settings.targets.split(",") if name.strip()],
        batch=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        checkpointing=settings.checkpointing != "off",
        checkpoint_offload=settings.checkpointing == "offload",
        skip_bad_clips=settings.skip_bad_clips,
        dtype=_base_dtype(model),
        restart=not settings.resume,
        precision="fp32" if model.dtype == "float32" else "auto",
    )


def _base_dtype(model: ModelRecipe) -> str:
    if model.dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise WanError(
            f"The model is to be quantised to {model.dtype}: training needs its weights as they are. Set "
            "the dtype of Load Wan Model to auto or bfloat16."
        )
    return model.dtype


def _ours(connected: object, kind: type, socket: str, node: str) -> None:
    if not isinstance(connected, kind):
        raise WanError(f"{socket} comes from another loader, which does not tell which file it read: connect {node}.")


def variant_of(model: ModelRecipe, choice: str) -> Variant:
    """The model's variant; where that was only a guess, an expert that is asked for answers it.

    Raises:
        WanError: nothing tells (hours of training are not spent on a guess), or ComfyUI holds the weights.
    """
    only_own(model.files, "Wan Train LoRA", Hint.TRAIN_HELD)
    guess = choose(model.high.config, model.high.path).assumed
    pair = next((row for row in candidates(model.high.config) if row.experts == 2), None)
    if guess not in model.notes or pair is None:
        return model.variant
    if choice != "auto":
        return pair
    raise WanError(
        f"The name of {model.high.path.name} does not say which expert of {pair.display_name} it is, or "
        f"whether it is {model.variant.display_name}: for an expert set expert to high or low, else choose "
        "the variant on Load Wan Model."
    )


def choose_expert(model: ModelRecipe, choice: str) -> tuple[DiTFile, str]:
    """The weights to train, and "high", "low" or "only".

    Raises:
        WanError: it is not clear which, or the file's name says otherwise.
    """
    if model.variant.experts == 1:
        return cast(DiTFile, model.high), "only"
    if model.low is not None:
        if choice == "auto":
            raise WanError(
                "The model is a pair of experts, and each gets a LoRA of its own: set expert to high or "
                "low, and train the other in a second run."
            )
        return cast(DiTFile, model.high if choice == "high" else model.low), choice
    name = model.high.path
    told = noise_level_of(name)
    if choice == "auto" and told is None:
        raise WanError(
            f"The name of {name.name} does not say which expert of {model.variant.display_name} it is: set "
            "expert to high or low."
        )
    if told and choice not in ("auto", told):
        raise WanError(
            f"{name.name} is the {told}-noise expert by its name, but expert is {choice}: set it to "
            f"{told}, or load the other file."
        )
    return cast(DiTFile, model.high), told if told and choice == "auto" else choice


# --- folders


def datasets() -> list[str]:
    """Folders in ComfyUI's input folder, at most two deep, that hold a table."""
    root = Path(folder_paths.get_input_directory())
    tables = [*root.glob(f"*/{TABLE}"), *root.glob(f"*/*/{TABLE}")]
    return sorted(table.parent.relative_to(root).as_posix() for table in tables)


def dataset_folder(name: str) -> Path:
    return _within(_inputs(), name, "dataset")


def _inputs() -> Path:
    """ComfyUI's input folder, out of which no table leads."""
    return Path(folder_paths.get_input_directory()).absolute()


def find_table(name: str, largest: float = math.inf) -> None:
    """
    Args:
        largest: bytes of a table that is read now; of a larger one it is only seen that it is there.

    Raises:
        WanError: no such folder, no table in it, or one without the columns, without rows, or of files elsewhere.
    """
    from ..wan_core.train.data import files_of

    folder = dataset_folder(name)
    if not folder.is_dir():
        raise WanError(
            f"There is no folder {folder}. Put the clips and their {TABLE} there, or choose one of "
            f"{', '.join(datasets()) or '(none found)'}."
        )
    table = folder / TABLE
    if not table.is_file() or table.stat().st_size <= largest:
        files_of(folder, _inputs())


def lora_file(name: str) -> Path:
    """Where the LoRA is saved."""
    stem = name.strip().removesuffix(".safetensors")
    folder = Path(folder_paths.get_folder_paths("loras")[0]).absolute()
    if stem == "_cache":
        raise WanError(f"save_name is {name!r}, which this node uses itself: choose another.")
    return _within(folder, f"{stem}.safetensors" if stem else "", "save_name")


def _work(name: str) -> Path:
    stem = name.strip().removesuffix(".safetensors")
    return _within(Path(folder_paths.get_output_directory(), WORK).absolute(), stem, "save_name")


def _within(root: Path, name: str, what: str) -> Path:
    """A place below a folder, and not outside of it.

    Raises:
        WanError: an empty or absolute name, or one that leads out.
    """
    place = Path(os.path.normpath(root / name))  # links are followed: a data set may lie on another disk
    if not name or place == root or not place.is_relative_to(root):
        raise WanError(f"{what} is {name!r}: expected a name below {root}.")
    return place


def _check_not_foreign(goal: Path, request: Request) -> None:
    """Do not write over a LoRA that was not trained here under this name."""
    if goal.exists() and not (request.out / "state.pt").exists():
        raise WanError(
            f"{goal} exists, and {request.out} holds no run that made it: choose another save_name, or move "
            "the file away."
        )


def _copy(file: Path, goal: Path) -> None:
    from ..wan_core.media.video import unfinished

    with unfinished(goal) as partial:
        shutil.copyfile(file, partial)


# --- ComfyUI's side of a run


def _hooks(request: Request, progress: Progress) -> Hooks:
    from ..wan_core.train.run import Hooks

    return Hooks(
        on_step=Losses(request, progress),
        on_clip=Clips(progress),
        check=host.check_cancelled,
        before_load=free_models,
        tell=progress.remark,
    )


class Progress:
    """What the node says of its run: remarks, which stay, and below them how far it is."""

    EVERY = 1.0  # seconds between two texts of how far it is, at least

    def __init__(self, node_id: str | None) -> None:
        self.node_id = node_id
        self.remarks: list[str] = []
        self.line = ""
        self._shown = float("-inf")

    @property
    def text(self) -> str:
        return "\n".join(filter(None, (*self.remarks, self.line)))

    def remark(self, text: str) -> None:
        log.info("Wan Train LoRA: %s", text)
        self.remarks.append(text)
        host.show_text(self.node_id, self.text)

    def at(self, line: str, *, last: bool) -> None:
        self.line = line
        if last or time.monotonic() - self._shown >= self.EVERY:
            self._shown = time.monotonic()
            host.show_text(self.node_id, self.text)


def free_models() -> None:
    """All of ComfyUI's models and ours leave the device."""
    management.unload_all_models()
    host.engine().release()
    management.soft_empty_cache()


class Clips:
    """A progress bar over the clips that are encoded."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.bar: ProgressBar | None = None

    def __call__(self, done: int, total: int) -> None:
        self.bar = self.bar or ProgressBar(total)
        self.bar.update_absolute(done, total)
        self.progress.at(f"clip {done} of {total} encoded", last=done == total)


class Losses:
    """A progress bar over the steps with the plot of the loss as its picture, and a place to cancel."""

    def __init__(self, request: Request, progress: Progress) -> None:
        self.folder = request.out
        self.progress = progress
        self.bar: ProgressBar | None = None
        self.losses: list[float] = []
        self.drawn = float("-inf")

    def __call__(self, report: StepReport) -> None:
        from ..wan_core.train.report import read_log

        if self.bar is None:
            self.bar = ProgressBar(report.steps)
            self.losses = [float(row["loss"]) for row in read_log(self.folder / "log.csv")][: report.step - 1]
        self.losses.append(report.loss)
        last = report.step == report.steps
        self.bar.update_absolute(report.step, report.steps, self._picture(last))
        recent = self.losses[-20:]
        self.progress.at(
            f"step {report.step} of {report.steps}, loss {sum(recent) / len(recent):.4f} over the last "
            f"{len(recent)} steps",
            last=last,
        )
        host.check_cancelled()

    def _picture(self, last: bool, every: float = 2.0) -> tuple | None:
        """The plot as ComfyUI's progress bar takes it, every few seconds."""
        from ..wan_core.train.report import draw_loss

        if not last and time.monotonic() - self.drawn < every:
            return None
        self.drawn = time.monotonic()
        return "PNG", draw_loss(self.losses), None


def _image(file: Path) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    from PIL import Image

    with Image.open(file) as picture:
        return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
