"""Small LoRA files in every dialect, and what each does to a weight, written down once more and plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wan_core.layouts.dit import DIALECTS

RANK, ALPHA, STRENGTH = 4, 6.0, 0.7
LAYERS = ("self_attn.q", "self_attn.o", "cross_attn.k", "cross_attn.v", "ffn.0", "ffn.2",
          "cross_attn.k_img", "cross_attn.v_img", "img_emb.proj.1", "img_emb.proj.3")  # fmt: skip
Weights = Mapping[str, Tensor]
Made = tuple[dict[str, Tensor], dict[str, Tensor]]  # the file's tensors; the weights it should give


def paths(weights: Weights) -> list[str]:
    return [key.removesuffix(".weight") for key in weights if key.endswith(tuple(f"{one}.weight" for one in LAYERS))]


def draw(*shape: int, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).float() * size


def low_rank(
    weights: Weights, name: Callable[[str], str], down: str, up: str, *, alpha: bool, extra: tuple[str, ...] = ()
) -> Made:
    file, merged = {}, dict(weights)
    for path in (*paths(weights), *extra):
        weight = weights[f"{path}.weight"]
        a, b = draw(RANK, *weight.shape[1:], size=0.05), draw(len(weight), RANK, size=0.3)
        file |= {name(path) + down: a, name(path) + up: b}
        if alpha:
            file[f"{name(path)}.alpha"] = torch.tensor(ALPHA)
        update = (b @ a.flatten(1)).view(weight.shape)
        merged[f"{path}.weight"] = weight + STRENGTH * (ALPHA / RANK if alpha else 1) * update
    return file, merged


def prefixed(path: str) -> str:
    return f"diffusion_model.{path}"


def flat(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def as_diffusers(path: str) -> str:
    return "transformer." + DIALECTS["diffusers"].to_theirs(path)


def lycoris(path: str) -> str:
    return "lycoris_" + DIALECTS["diffusers"].to_theirs(path).replace(".", "_")


def differences(weights: Weights) -> Made:
    """Whole differences of matrices, vectors, biases and modulations, as the extracted 4-step LoRAs have them."""
    file, merged = {}, dict(weights)
    for key, weight in weights.items():
        if key.startswith(("blocks.1", "head", "img_emb")) or "embedding" in key:
            path, _, kind = key.rpartition(".")
            role = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m", "emb_pos": "emb_pos.diff"}[kind]
            file[f"diffusion_model.{path}.{role}"] = draw(*weight.shape, size=0.05)
            merged[key] = weight + STRENGTH * file[f"diffusion_model.{path}.{role}"]
    return file, merged


def dora(weights: Weights, *, rows: bool, role: str = "dora_scale") -> Made:
    """As ComfyUI decomposes: rows by the old weight's length; columns, and PEFT's rows, by the sum's."""
    file, merged = low_rank(weights, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=role == "dora_scale")
    for path in paths(weights):
        key, weight = f"{path}.weight", weights[f"{path}.weight"]
        total = weight + (merged[key] - weight) / STRENGTH
        measured = weight if rows and role == "dora_scale" else total
        length = measured.norm(dim=1 if rows else 0, keepdim=True)
        wanted = length * (1 + draw(*length.shape, size=0.2))
        file[f"{prefixed(path)}.{role}"] = wanted if role == "dora_scale" else wanted.flatten()
        merged[key] = weight + STRENGTH * (total * wanted / length - weight)
    return file, merged


def loha(weights: Weights) -> Made:
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight = weights[f"{path}.weight"]
        (w1a, w2a), (w1b, w2b) = draw(2, len(weight), RANK, size=0.4), draw(2, RANK, weight.shape[1], size=0.4)
        parts = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": torch.tensor(ALPHA)}
        file |= {f"{flat(path)}.{role}": part.clone() for role, part in parts.items()}
        merged[f"{path}.weight"] = weight + STRENGTH * ALPHA / RANK * (w1a @ w1b) * (w2a @ w2b)
    return file, merged


def lokr(weights: Weights, *, one: bool, two: bool, name: Callable[[str], str] = flat) -> Made:
    """Kronecker products; ``one`` and ``two`` say which factor is a low-rank product itself."""
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight = weights[f"{path}.weight"]
        shapes = (4, 8), (len(weight) // 4, weight.shape[1] // 8)
        factors = []
        for number, (shape, split) in enumerate(zip(shapes, (one, two), strict=True), 1):
            stem = f"{name(path)}.lokr_w{number}"
            if split:
                file |= {f"{stem}_a": draw(shape[0], 2, size=0.3), f"{stem}_b": draw(2, shape[1], size=0.3)}
                factors.append(file[f"{stem}_a"] @ file[f"{stem}_b"])
            else:
                file[stem] = draw(*shape, size=0.3)
                factors.append(file[stem])
        file[f"{name(path)}.alpha"] = torch.tensor(ALPHA)
        scale = ALPHA / 2 if one or two else 1
        merged[f"{path}.weight"] = weight + STRENGTH * scale * torch.kron(*factors)
    return file, merged


def tucker(weights: Weights, kind: str) -> Made:
    """Products around a core in the middle, as convolutions have them; here of a kernel of one."""
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight, name = weights[f"{path}.weight"], flat(path)
        if kind == "lora":
            up, core, down = draw(len(weight), RANK, size=0.3), draw(RANK, RANK, 1, 1), draw(RANK, weight.shape[1])
            parts = {"lora_up.weight": up, "lora_mid.weight": core, "lora_down.weight": down * 0.05}
            update = up @ core[..., 0, 0] @ parts["lora_down.weight"]
        else:
            less = (1, 1) if kind == "loha" else (4, 8)
            rows, columns = len(weight) // less[0], weight.shape[1] // less[1]
            made = [(draw(RANK, RANK, 1, 1), draw(RANK, rows, size=0.5), draw(RANK, columns, size=0.5)) for _ in "12"]
            products = [a.T @ core[..., 0, 0] @ b for core, a, b in made]
            if kind == "loha":
                parts = {}
                for number, (core, a, b) in enumerate(made, 1):
                    parts |= {f"hada_t{number}": core, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
                update = products[0] * products[1] * 0.2
                parts["hada_w1_a"] = parts["hada_w1_a"] * 0.2
            else:
                core, a, b = made[0]
                parts = {"lokr_w1": draw(4, 8, size=0.1), "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
                update = torch.kron(parts["lokr_w1"], products[0])
        parts["alpha"] = torch.tensor(ALPHA)
        file |= {f"{name}.{role}": part.clone() for role, part in parts.items()}
        merged[f"{path}.weight"] = weight + STRENGTH * ALPHA / RANK * update
    return file, merged


def glora(weights: Weights, *, old: bool) -> Made:
    """The weight times a product, plus a product; LyCORIS has changed the order of the factors once."""
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight = weights[f"{path}.weight"]
        (rows, columns), scale = weight.shape, ALPHA / RANK
        one, two = draw(columns, RANK, size=0.2), draw(RANK, columns, size=0.1)
        up, down = draw(rows, RANK, size=0.3), draw(RANK, columns, size=0.05)
        a1, a2, b1, b2 = (two, one, down, up) if old else (one, two, up, down)
        parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(ALPHA)}
        file |= {f"{flat(path)}.{role}": part for role, part in parts.items()}
        merged[f"{path}.weight"] = weight + STRENGTH * scale * (weight @ one @ two + up @ down)
    return file, merged


def rotation(block: Tensor, limit: float) -> Tensor:
    skew = block - block.transpose(-1, -2)
    if limit and skew.norm() > limit:
        skew = skew * limit / (skew.norm() + 1e-8)
    one = torch.eye(block.shape[-1])
    return torch.linalg.solve(one - skew.transpose(-1, -2), (one + skew).transpose(-1, -2)).transpose(-1, -2)


def oft(weights: Weights, limit: float, side: int = 16) -> Made:
    """Groups of rows turned; ComfyUI gives the strength twice."""
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight = weights[f"{path}.weight"]
        blocks = draw(len(weight) // side, side, side, size=0.2)
        turn = torch.block_diag(*rotation(blocks, limit))
        file |= {f"{flat(path)}.oft_blocks": blocks, f"{flat(path)}.alpha": torch.tensor(limit)}
        merged[f"{path}.weight"] = weight + STRENGTH**2 * (turn.T @ weight - weight)
    return file, merged


def boft(weights: Weights, limit: float, side: int = 16, stages: int = 3) -> Made:
    """Stages of turned rows that lie further apart each time, and a length of each row."""
    file, merged = {}, dict(weights)
    for path in paths(weights):
        weight = weights[f"{path}.weight"]
        blocks, rescale = draw(stages, len(weight) // side, side, side, size=0.2), 1 + draw(len(weight), 1, size=0.1)
        turns, turned = rotation(blocks, limit), weight
        for stage in range(stages):
            apart = side // 2 * 2**stage
            order = torch.arange(len(weight)).view(-1, 2, apart).transpose(1, 2).flatten()
            turn = torch.block_diag(*(STRENGTH * turns[stage] + (1 - STRENGTH) * torch.eye(side)))
            turned = torch.empty_like(turned).index_copy_(0, order, turn @ turned[order])
        file |= {f"{flat(path)}.oft_blocks": blocks, f"{flat(path)}.rescale": rescale}
        file[f"{flat(path)}.alpha"] = torch.tensor(limit)
        merged[f"{path}.weight"] = weight + STRENGTH * (turned * rescale - weight)
    return file, merged


def replaced(weights: Weights) -> Made:
    file = {f"{prefixed(path)}.set_weight": draw(*weights[f"{path}.weight"].shape, size=0.1) for path in paths(weights)}
    return file, dict(weights) | {f"{path}.weight": file[f"{prefixed(path)}.set_weight"] for path in paths(weights)}


@dataclass(frozen=True)
class Dialect:
    make: Callable[[Weights], Made]
    in_comfyui: bool = True  # whether ComfyUI 0.3.75 reads it for Wan


OUTSIDE = ("text_embedding.0", "time_embedding.2", "time_projection.1", "patch_embedding", "head.head")
DIALECTS_OF_LORA = {
    "A_B": Dialect(lambda w: low_rank(w, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=False)),
    "A_B_alpha_everywhere": Dialect(
        lambda w: low_rank(w, prefixed, ".lora_A.weight", ".lora_B.weight", alpha=True, extra=OUTSIDE)
    ),
    "down_up_alpha": Dialect(lambda w: low_rank(w, prefixed, ".lora_down.weight", ".lora_up.weight", alpha=True)),
    "kohya": Dialect(lambda w: low_rank(w, flat, ".lora_down.weight", ".lora_up.weight", alpha=True)),
    "fun": Dialect(lambda w: low_rank(
        w, lambda path: flat(path).replace("unet_", "unet__"), ".lora_down.weight", ".lora_up.weight", alpha=True)),
    "diffusers": Dialect(
        lambda w: low_rank(w, as_diffusers, ".lora_A.weight", ".lora_B.weight", alpha=False, extra=OUTSIDE), False),
    "diffusers_old": Dialect(
        lambda w: low_rank(w, as_diffusers, ".lora.down.weight", ".lora.up.weight", alpha=False), False),
    "peft": Dialect(
        lambda w: low_rank(w, prefixed, ".lora_A.default.weight", ".lora_B.default.weight", alpha=False)),
    "peft_bare": Dialect(
        lambda w: low_rank(w, str, ".lora_A.default.weight", ".lora_B.default.weight", alpha=False), False),
    "peft_named": Dialect(
        lambda w: low_rank(w, str, ".lora_A.my-style.weight", ".lora_B.my-style.weight", alpha=False), False),
    "peft_wrapped": Dialect(lambda w: low_rank(
        w, lambda path: f"base_model.model.{path}", ".lora_A.weight", ".lora_B.weight", alpha=False), False),
    "onetrainer": Dialect(lambda w: low_rank(
        w, lambda path: lycoris(path).replace("lycoris", "lora_transformer"), ".lora_down.weight", ".lora_up.weight",
        alpha=True), False),
    "lycoris_names": Dialect(lambda w: lokr(w, one=False, two=True, name=lycoris), False),
    "differences": Dialect(differences, False),  # it has no .diff_m
    "dora_rows": Dialect(lambda w: dora(w, rows=True)),
    "dora_columns": Dialect(lambda w: dora(w, rows=False)),
    "dora_peft": Dialect(lambda w: dora(w, rows=True, role="lora_magnitude_vector"), False),
    "loha": Dialect(loha),
    "lokr": Dialect(lambda w: lokr(w, one=False, two=False)),
    "lokr_one": Dialect(lambda w: lokr(w, one=True, two=False)),
    "lokr_two": Dialect(lambda w: lokr(w, one=False, two=True)),
    "lokr_both": Dialect(lambda w: lokr(w, one=True, two=True)),
    "lora_core": Dialect(lambda w: tucker(w, "lora")),
    "loha_core": Dialect(lambda w: tucker(w, "loha")),
    "lokr_core": Dialect(lambda w: tucker(w, "lokr"), False),  # it fails to multiply them, and leaves them out
    "glora": Dialect(lambda w: glora(w, old=False)),
    "glora_old": Dialect(lambda w: glora(w, old=True)),
    "oft": Dialect(lambda w: oft(w, 0.0)),
    "oft_limited": Dialect(lambda w: oft(w, 3.0)),
    "boft": Dialect(lambda w: boft(w, 0.0)),
    "boft_limited": Dialect(lambda w: boft(w, 5.0)),
    "set_weight": Dialect(replaced),
}  # fmt: skip


def merged_lora(weights: Weights, file: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """A state dict with a trained LoRA's file merged into it, by the formula."""
    lora, merged = load_file(file), dict(weights)
    for key in [key for key in lora if key.endswith(".lora_A.weight")]:
        name = key.removesuffix(".lora_A.weight")
        weight = name.removeprefix("diffusion_model.") + ".weight"
        down, up = lora[key].float(), lora[name + ".lora_B.weight"].float()
        scale = strength * lora[name + ".alpha"].item() / len(down)
        merged[weight] = (merged[weight].float() + scale * (up @ down)).to(merged[weight].dtype)
    return merged
