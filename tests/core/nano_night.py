"""A LoRA trained on one look of the nano world, and its file in every dialect that can say the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nano.captions import caption
from nano.judge import FILES, TI2V, Judge, held_out_prompts, plain
from tests.core.lora_files import as_diffusers, flat, lycoris, prefixed
from wan_core.train.cache import Entry
from wan_core.train.data import Frame
from wan_core.train.dit import Data, DiTTask, Recipe
from wan_core.train.loop import Plan, train
from wan_core.train.lora import add_lora
from wan_core.train.objective import expert_range
from wan_core.train.sample import Sampling

NANO = Path(__file__).resolve().parents[2] / "nano"
CLIPS, STEPS, RANK = 16, 60, 8
TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")


def nano_judge() -> Judge:
    return Judge(lambda stage: NANO / FILES[stage], Frame(64, 64, 17), Sampling(steps=8))


def train_lora(file: Path) -> None:
    """A LoRA of nano_ti2v, trained on films at night whose captions do not say so."""
    judge = nano_judge()
    model = judge.dit("ti2v").train().requires_grad_(True)
    adapted = add_lora(model, RANK, TARGETS, alpha=RANK, seed=0)
    recipe = Recipe(TI2V, expert_range(TI2V, "only", 5.0), batch=8, image_dropout=1.0, precision="fp32")
    task = DiTTask(model, films_at_night(judge), recipe, adapted=adapted)
    assert train(task, Plan(STEPS, 2e-3, weight_decay=0.0, warmup=5), file.parent / "run")
    task.save(file, "fp32")


def films_at_night(judge: Judge) -> Data:
    """Films at night under captions of the plain scene."""
    scenes = [row[0] for row in held_out_prompts(400, seed=3, fixed=True) if plain(row[0])][:CLIPS]
    films = torch.stack([judge.film(replace(scene, time="night")) for scene in scenes])
    entries = [Entry(latent, None) for latent in judge.vae("wan2.2").encode(films)]
    texts = [judge.text(caption(scene, np.random.default_rng(i))) for i, scene in enumerate(scenes)]
    shapes = [tuple(entry.latent.shape) for entry in entries]
    return Data(entries.__getitem__, texts.__getitem__, judge.text(""), shapes, "night")


Pairs = Mapping[str, tuple[Tensor, Tensor]]  # path -> down [rank, in], up [out, rank]


def named(name: Callable[[str], str], down: str, up: str, *, alpha: bool = False) -> Callable[[Pairs], dict]:
    def make(pairs: Pairs) -> dict[str, Tensor]:
        file = {
            name(path) + role: part for path, both in pairs.items() for role, part in zip((down, up), both, strict=True)
        }
        return file | ({f"{name(path)}.alpha": torch.tensor(float(RANK)) for path in pairs} if alpha else {})

    return make


def as_differences(pairs: Pairs) -> dict[str, Tensor]:
    return {f"{prefixed(path)}.diff": up @ down for path, (down, up) in pairs.items()}


def as_hadamard(pairs: Pairs) -> dict[str, Tensor]:
    """The second factor is a matrix of ones."""
    file = {}
    for path, (down, up) in pairs.items():
        parts = {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": torch.zeros_like(up), "hada_w2_b": 0 * down}
        parts["hada_w2_a"][:, 0], parts["hada_w2_b"][0] = 1, 1
        file |= {f"{flat(path)}.{role}": part for role, part in parts.items()}
        file[f"{flat(path)}.alpha"] = torch.tensor(float(RANK))
    return file


def as_kronecker(pairs: Pairs) -> dict[str, Tensor]:
    """The first factor is the number one."""
    file = {}
    for path, (down, up) in pairs.items():
        file |= {
            f"{flat(path)}.lokr_w1": torch.ones(1, 1),
            f"{flat(path)}.lokr_w2_a": up,
            f"{flat(path)}.lokr_w2_b": down,
            f"{flat(path)}.alpha": torch.tensor(float(RANK)),
        }
    return file


DIALECTS: dict[str, Callable[[Pairs], dict[str, Tensor]]] = {
    "A_B": named(prefixed, ".lora_A.weight", ".lora_B.weight"),
    "down_up_alpha": named(prefixed, ".lora_down.weight", ".lora_up.weight", alpha=True),
    "kohya": named(flat, ".lora_down.weight", ".lora_up.weight", alpha=True),
    "fun": named(lambda path: flat(path).replace("unet_", "unet__"), ".lora_down.weight", ".lora_up.weight",
                 alpha=True),
    "diffusers": named(as_diffusers, ".lora_A.weight", ".lora_B.weight"),
    "diffusers_old": named(as_diffusers, ".lora.down.weight", ".lora.up.weight"),
    "peft": named(prefixed, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft_bare": named(str, ".lora_A.default.weight", ".lora_B.default.weight"),
    "onetrainer": named(lambda path: lycoris(path).replace("lycoris", "lora_transformer"), ".lora_down.weight",
                        ".lora_up.weight", alpha=True),
    "differences": as_differences,
    "loha": as_hadamard,
    "lokr": as_kronecker,
}  # fmt: skip


IN_COMFYUI = ("A_B", "down_up_alpha", "kohya", "fun", "peft", "differences", "loha", "lokr")  # 0.3.75 reads for Wan


def pairs_of(lora: Path) -> Pairs:
    """The trained matrices; the file's scale, alpha / rank, is 1."""
    file = load_file(lora)
    down = {key.split(".lora_")[0]: key for key in file if "lora_A" in key or "lora_down" in key}
    up = {key.split(".lora_")[0]: key for key in file if "lora_B" in key or "lora_up" in key}
    return {path.removeprefix("diffusion_model."): (file[down[path]], file[up[path]]) for path in down}


def write_as(dialect: str, lora: Path, file: Path) -> None:
    """The same LoRA in another dialect."""
    tensors = DIALECTS[dialect](pairs_of(lora))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
