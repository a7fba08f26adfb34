"""The CLIP vision encoder against transformers' CLIPVisionModel and the official file's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import wan_core
from wan_core.errors import WanError
from wan_core.loading.clip import read_clip
from wan_core.models.clip.vit import MEAN, STD, prepare

SIZES = {"hidden_size": 160, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 56, "patch_size": 14, "hidden_act": "gelu", "projection_dim": 32}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def weights(reference) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in reference.state_dict().items() if not key.endswith("position_ids")}


def official(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' weights under the official names, with the text half that is to be ignored."""
    inside = {
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "self_attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    head = "vision_model."
    made = {
        "visual.cls_embedding": weights[f"{head}embeddings.class_embedding"].view(1, 1, -1),
        "visual.pos_embedding": weights[f"{head}embeddings.position_embedding.weight"][None],
        "visual.patch_embedding.weight": weights[f"{head}embeddings.patch_embedding.weight"],
        "visual.head": torch.zeros(160, 32),
        "textual.token_embedding.weight": torch.zeros(8, 4),
        "log_scale": torch.zeros([]),
    }
    for end in ("weight", "bias"):
        made[f"visual.pre_norm.{end}"] = weights[f"{head}pre_layrnorm.{end}"]
        made[f"visual.post_norm.{end}"] = weights[f"{head}post_layernorm.{end}"]
        for layer in range(3):
            theirs, ours = f"{head}encoder.layers.{layer}.", f"visual.transformer.{layer}."
            made[f"{ours}attn.to_qkv.{end}"] = torch.cat(
                [weights[f"{theirs}self_attn.{part}_proj.{end}"] for part in "qkv"]
            )
            for a, b in inside.items():
                made[f"{ours}{b}.{end}"] = weights[f"{theirs}{a}.{end}"]
    return {key: tensor.contiguous() for key, tensor in made.items()}


def files(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, Path]:
    save_file(weights, folder / "clip_vision_h.safetensors")
    torch.save(official(weights), folder / "models_clip.pth")
    (folder / "image_encoder").mkdir()
    save_file(weights, folder / "image_encoder/model.safetensors")
    (folder / "image_encoder/config.json").write_text(json.dumps(SIZES))
    return {
        "comfyui": folder / "clip_vision_h.safetensors",
        "official": folder / "models_clip.pth",
        "diffusers": folder / "image_encoder",
    }


@pytest.mark.parametrize("layout", ["comfyui", "official", "diffusers"])
def test_agrees_with_transformers(reference, weights, tmp_path: Path, layout: str) -> None:
    """1e-5 of the stream before the last block, from each dialect."""
    encoder = wan_core.load_clip_vision(files(weights, tmp_path)[layout])
    images = torch.rand(2, 3, 40, 72, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        ours = encoder(images)
        theirs = reference.vision_model(prepare(images, 56), output_hidden_states=True).hidden_states[-2]
    assert ours.shape == (2, 17, 160)
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


def test_pixels_are_stretched_without_antialiasing() -> None:
    """Bit-equal to the plain bicubic filter; cropping or smoothing first, as others do, differs by tenths."""
    images = torch.rand(1, 3, 480, 832, generator=torch.Generator().manual_seed(2)) * 2 - 1
    plain = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(prepare(images, 224), (plain * 0.5 + 0.5 - mean) / std)
    smooth = F.interpolate(images, (224, 224), mode="bicubic", align_corners=False, antialias=True)
    assert (smooth - plain).abs().mean() > 0.1


def test_what_is_not_used_is_not_loaded(weights, tmp_path: Path) -> None:
    names = read_clip(files(weights, tmp_path)["official"]).names
    assert not any("transformer.2." in key or key.startswith(("textual", "visual.head")) for key in names.values())


def test_refusals_name_what_is_wrong(weights, tmp_path: Path) -> None:
    cut = {key: tensor for key, tensor in weights.items() if "layers.1.mlp.fc1" not in key}
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(WanError, match="layers.1.mlp.fc1|transformer.1.mlp.0"):
        wan_core.load_clip_vision(tmp_path / "cut.safetensors")
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WanError, match="is not a CLIP vision encoder"):
        read_clip(tmp_path / "other.safetensors")
