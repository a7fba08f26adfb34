"""What a file is: prefixes and wrappers around keys, several models in one file, leftovers, and what lies beside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wan_core
from wan_core.config import VARIANTS
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.files.unchanged import check_unchanged
from wan_core.layouts.comfyui import NAMES
from wan_core.layouts.detect import find, part_of, parts_of
from wan_core.layouts.folder import find_parts
from wan_core.loading.dit import read_dit
from wan_core.loading.text import load_text_encoder, read_text_encoder
from wan_core.loading.vae import read_vae
from wan_core.models.text.tokenizer import write_tokenizer_folder
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinyModels, TinySizes, make_tiny, write_tiny

SIZES = TinySizes(dim=256, ffn_dim=128, layers=2, text_dim=64, text_layers=2)
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def tiny() -> TinyModels:
    return make_tiny("t2v-A14B", sizes=SIZES)


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("official", "comfyui", "diffusers")}
    for name, folder in folders.items():
        write_tiny(folder, "t2v-A14B", layout=name, sizes=SIZES)
    return folders


@pytest.fixture(scope="module")
def parts(layouts: dict[str, Path]) -> dict[str, Weights]:
    """The three parts of one model by ComfyUI's names."""
    home = layouts["comfyui"]
    return {
        "dit": load_file(home / "diffusion_models" / NAMES["t2v-A14B"].models[0]),
        "vae": load_file(home / "vae/wan_2.1_vae.safetensors"),
        "text": load_file(next((home / "text_encoders").iterdir())),
    }


def written(file: Path, *weights: Weights) -> Path:
    merged = {key: value.contiguous() for one in weights for key, value in one.items()}
    if file.suffix == ".safetensors":
        save_file(merged, file)
    else:
        torch.save(merged, file)
    return file


def below(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def assert_same(module: torch.nn.Module, expected: Weights) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# Prefixes and wrappers ---------------------------------------------------------------------------------------------

PREFIXES = [
    "_orig_mod.", "module.", "model.", "transformer.", "_fsdp_wrapped_module.", "net.", "dit.", "pipe.dit.",
    "ema_model.",
    "module._orig_mod.", "_orig_mod.module.", "model.diffusion_model._orig_mod.", "pipe.dit._fsdp_wrapped_module.",
    "_forward_module.model.", "generator.model.", "state.ema.shadow.", "base_model.model.", "unet.",
]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_around_any_part(prefix: str, tiny: TinyModels, parts: dict[str, Weights], tmp_path: Path):
    dit = wan_core.load_dit(written(tmp_path / "d.safetensors", below(prefix, parts["dit"])), dtype=torch.float32)
    assert_same(dit, tiny.experts[0])
    vae = wan_core.load_vae(written(tmp_path / "v.pth", below(prefix, parts["vae"])), dtype=torch.float32)
    assert_same(vae, tiny.vae_weights)
    text = load_text_encoder(written(tmp_path / "t.safetensors", below(prefix, parts["text"])), dtype=torch.float32)
    assert_same(text.encoder, tiny.text_weights)


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "compiled blocks": lambda key: key.replace("blocks.0.", "blocks.0._orig_mod."),
    "sharded": lambda key: "_fsdp_wrapped_module." + key.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._orig_mod."),
    "one layer": lambda key: key.replace("self_attn.q.", "self_attn.q.base_layer."),
    "both": lambda key: "module." + key.replace(".self_attn.", "._orig_mod.self_attn.module."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_in_the_middle_of_keys(wrapping: str, tiny: TinyModels, parts: dict[str, Weights], tmp_path: Path):
    wrap = WRAPPINGS[wrapping]
    wrapped = {wrap(key): value for key, value in parts["dit"].items()}
    assert wrapped.keys() != parts["dit"].keys()
    assert_same(wan_core.load_dit(written(tmp_path / "x.safetensors", wrapped), dtype=torch.float32), tiny.experts[0])


def test_prefixed_diffusers_keys(layouts: dict[str, Path], tiny: TinyModels, tmp_path: Path):
    theirs = load_file(layouts["diffusers"] / "transformer/diffusion_pytorch_model.safetensors")
    wrapped = {f"module.transformer._orig_mod.{key}": value for key, value in theirs.items()}
    assert_same(wan_core.load_dit(written(tmp_path / "x.safetensors", wrapped), dtype=torch.float32), tiny.experts[0])


def test_averaged_weights_are_taken_and_said(tiny: TinyModels, parts: dict[str, Weights], tmp_path: Path):
    trained = {key: value + 1 for key, value in parts["dit"].items()}
    path = written(tmp_path / "x.safetensors", below("model.", trained), below("ema.", parts["dit"]))
    file = read_dit(path)
    assert "averaged weights (ema.*) are used, not those beside them (model.)" in " ".join(file.notes)
    assert_same(wan_core.load_dit(path, dtype=torch.float32), tiny.experts[0])


@pytest.mark.parametrize("prefixes", [("transformer.", "transformer_2."), ("", "teacher."), ("", "module.")])
def test_two_models_in_one_file_are_refused(prefixes: tuple[str, str], parts: dict[str, Weights], tmp_path: Path):
    path = written(tmp_path / "x.pth", *(below(prefix, parts["dit"]) for prefix in prefixes))
    with pytest.raises(WanError, match="holds 2 of Wan diffusion models.*which of them is meant"):
        read_dit(path)


# All in one --------------------------------------------------------------------------------------------------------

ALL_IN_ONE = {
    "saved by ComfyUI": ("model.diffusion_model.", "vae.", "text_encoders.umt5xxl.transformer."),
    "older names": ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.umt5xxl.transformer."),
    "a pipeline": ("transformer.", "vae.", "text_encoder."),
    "dit at the root": ("", "vae.", "text_encoders.umt5xxl.transformer."),
}


def all_in_one(file: Path, parts: dict[str, Weights], prefixes: tuple[str, str, str]) -> Path:
    dit, vae, text = prefixes
    words = {key: value for key, value in parts["text"].items() if key != "spiece_model"}
    root = text.split(".")[0]
    extra = {f"{root}.spiece_model": parts["text"]["spiece_model"], f"{root}.umt5xxl.logit_scale": torch.tensor(4.6055)}
    half = {key: value.half() for key, value in parts["vae"].items()}
    return written(file, below(dit, parts["dit"]), below(vae, half), below(text, words), extra)


@pytest.mark.parametrize("prefixes", ALL_IN_ONE.values(), ids=ALL_IN_ONE.keys())
def test_each_loader_finds_its_part(prefixes, tiny: TinyModels, parts: dict[str, Weights], tmp_path: Path):
    path = all_in_one(tmp_path / "aio.safetensors", parts, prefixes)
    assert parts_of(open_checkpoint(path)) == ("dit", "vae", "text")
    files = read_dit(path), read_vae(path), read_text_encoder(path)
    assert [file.checkpoint.dtype for file in files] == [torch.float32, torch.float16, torch.float32]
    assert [file.notes for file in files[:2]] == [(), ()]
    (note,) = files[2].notes
    assert note.startswith("aio.safetensors: 1 tensor ") and note.endswith("umt5xxl.logit_scale.")
    assert_same(wan_core.load_dit(path, dtype=torch.float32), tiny.experts[0])
    halved = {key: value.half().float() for key, value in tiny.vae_weights.items()}
    assert_same(wan_core.load_vae(path, dtype=torch.float32), halved)
    encoder = load_text_encoder(path, dtype=torch.float32)
    assert_same(encoder.encoder, tiny.text_weights)
    assert encoder.tokenizer.encode("a cat")[-1] == 1


def test_the_command_line_finds_the_parts_of_one_file(parts: dict[str, Weights], tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    names = [f"my_{level}_noise.safetensors" for level in ("low", "high")]
    for name in names:
        all_in_one(tmp_path / "checkpoints" / name, parts, ALL_IN_ONE["saved by ComfyUI"])
    written(tmp_path / "checkpoints/sd15.safetensors", {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(4)})
    found = find_parts(tmp_path, VARIANTS["t2v-A14B"])
    assert (found.high.name, found.low.name) == (names[1], names[0])
    assert found.vae == found.text_encoder == found.high
    assert found.tokenizer is None
    with pytest.raises(WanError, match="lacks"):
        find_parts(tmp_path, VARIANTS["i2v-A14B"])  # the model in the file is another


def test_convert_says_what_it_leaves_out(parts: dict[str, Weights], tiny: TinyModels, tmp_path: Path):
    path = all_in_one(
        tmp_path / "aio.safetensors",
        {**parts, "dit": {**parts["dit"], "v_pred": torch.ones(1)}},
        ALL_IN_ONE["saved by ComfyUI"],
    )
    report = convert(path, tmp_path / "dit.safetensors", "comfyui")
    assert "only a Wan diffusion model in it is converted" in report.notes[1]
    assert "ignored: model.diffusion_model.v_pred" in report.notes[0]
    found = load_file(tmp_path / "dit.safetensors")
    assert found.keys() == tiny.experts[0].keys()
    assert all(torch.equal(found[key], tiny.experts[0][key]) for key in found)


# What is left over -------------------------------------------------------------------------------------------------

HARMLESS = {
    "dit": ["blocks.0.to_gate_compress.weight", "blocks.1.to_gate_compress.bias", "logit_scale", "freqs",
            "rope.freqs_cos", "v_pred", "ema_decay", "optimizer.state.0.exp_avg", "scaler.scale", "loss.logvar"],
    "vae": ["logit_scale", "loss.discriminator.main.0.weight", "loss.perceptual_loss.lin0.model.1.weight",
            "scale_factor", "model_ema.decay", "mean"],
    "text": ["logit_scale", "text_projection.weight", "num_batches_tracked", "umt5xxl.logit_scale"],
}  # fmt: skip
READERS = {"dit": read_dit, "vae": read_vae, "text": read_text_encoder}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in HARMLESS.items() for key in keys])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_what_is_left_over_is_said_and_ignored(part: str, key: str, prefix: str, parts, tmp_path: Path):
    path = written(tmp_path / "x.safetensors", below(prefix, parts[part]), {prefix + key: torch.ones(3, 3)})
    file = READERS[part](path)
    assert len(file.notes) == 1
    assert f"ignored: {prefix}{key}" in file.notes[0]
    assert prefix + key not in file.names.values()


CHANGING = {
    "dit": ["blocks.0.self_attn.q.lora_A.weight", "blocks.0.ffn.0.weight_zero_point", "blocks.0.self_attn.q_scale",
            "blocks.1.self_attn.o.diff", "patch_embedding.weight.absmax", "blocks.0.norm3.extra",
            "blocks.7.norm3.weight", "blocks.0.ffn.4.weight", "head.head.g_idx"],
    "vae": ["decoder.head.2.extra", "decoder.upsamples.15.residual.0.gamma", "conv1.lora_down.weight"],
    "text": ["blocks.0.attn.q.bias", "blocks.2.norm1.weight", "blocks.0.ffn.fc1.qzeros"],
}  # fmt: skip


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in CHANGING.items() for key in keys])
def test_what_would_change_the_result_is_refused(part: str, key: str, tiny: TinyModels, parts, tmp_path: Path):
    weights = tiny.text_weights if part == "text" else parts[part]
    path = written(tmp_path / "x.safetensors", weights, {key: torch.ones(3)})
    with pytest.raises(WanError, match=f"Missing: nothing. Unexpected: {key}.*result would be another"):
        READERS[part](path) if part != "text" else read_text_encoder(path, tiny.spiece)


@pytest.mark.parametrize("key", ["cross_attn.k_img.weight", "audio_cross_attn.q.weight", "cam_encoder.weight"])
@pytest.mark.parametrize("home", ["blocks.0.", "model.blocks.1."])
def test_relatives_by_layers_in_their_blocks(key: str, home: str, parts, tmp_path: Path):
    prefix = home[: -len("blocks.0.")]
    path = written(tmp_path / "x.safetensors", below(prefix, parts["dit"]), {home + key: torch.ones(3)})
    with pytest.raises(WanError, match="which this version does not run"):
        read_dit(path)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Animate"),
        ("fps_embedding.weight", "SkyReels"),
        ("patch_embedding_pose.weight", "SCAIL"),
        ("delta_camera_proj.weight", "inputs of its own"),
        ("guidance_embedder.0.weight", "inputs of its own"),
        ("condition_embedder.image_embedder.norm1.weight", "inputs of its own"),
    ],
)
def test_relatives_are_refused_wherever_their_layers_lie(key: str, name: str, parts, tmp_path: Path):
    for prefix in ("", "model.diffusion_model."):
        path = written(tmp_path / "x.safetensors", below(prefix, parts["dit"]), {prefix + key: torch.ones(3)})
        with pytest.raises(WanError, match=f"{name}.*which this version does"):
            read_dit(path)


@pytest.mark.parametrize("part", ["dit", "vae"])
def test_what_is_missing_is_found_in_the_header(part: str, parts, tmp_path: Path):
    key = {"dit": "blocks.1.ffn.2.bias", "vae": "encoder.middle.0.residual.6.bias"}[part]
    weights = {name: value for name, value in parts[part].items() if name != key}
    with pytest.raises(WanError, match=f"Missing: {key}. Unexpected: nothing"):
        READERS[part](written(tmp_path / "x.safetensors", weights))


@pytest.mark.parametrize("number", ["7", "99999999", "9" * 5000])
def test_a_gap_in_the_blocks_is_no_deep_model(number: str, parts, tmp_path: Path):
    weights = dict(parts["dit"])
    weights[f"blocks.{number}.self_attn.q.weight"] = weights.pop("blocks.1.self_attn.q.weight")
    with pytest.raises(WanError, match="blocks.1"):
        read_dit(written(tmp_path / "x.safetensors", weights))


def test_other_channels_are_named(parts, tmp_path: Path):
    weights = dict(parts["dit"])
    for channels, told in (
        (52, "is Wan2.2 Fun-A14B-Control, which this version does not run"),
        (33, "33 channels in, 16 out; nearest: I2V"),
    ):
        weights["patch_embedding.weight"] = torch.zeros(len(weights["patch_embedding.weight"]), channels, 1, 2, 2)
        with pytest.raises(WanError, match=told):
            read_dit(written(tmp_path / "x.safetensors", weights))


# config.json -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "umT5's": {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 4096, "num_heads": 64},
    "another Wan's": {"_class_name": "WanModel", "model_type": "t2v", "dim": 5120, "num_heads": 40, "num_layers": 40},
    "heads of another width": {"_class_name": "WanModel", "num_attention_heads": 4, "attention_head_dim": 128},
    "too many heads": {"_class_name": "WanModel", "num_heads": 7},
    "no number": {"_class_name": "WanModel", "num_heads": "4"},
    "a truth": {"_class_name": "WanModel", "num_heads": True},
    "a VAE's": {"_class_name": "AutoencoderKLWan2", "num_heads": 4, "dim": 96},
    "text": "num_heads",
}  # fmt: skip


@pytest.mark.parametrize("stated", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_config_does_not_count(stated: object, parts, tmp_path: Path):
    path = written(tmp_path / "model.safetensors", parts["dit"])
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert read_dit(path).config.heads == 2
    assert read_dit(path).notes == ()  # it is nobody's business what lies beside a file
    file = read_dit(tmp_path)
    assert file.config.heads == 2
    assert "it is ignored, and the model has 2 heads" in file.notes[0]


def test_a_config_of_its_own_counts_in_a_folder_only(parts, tmp_path: Path):
    path = written(tmp_path / "model.safetensors", parts["dit"])
    stated = {"_class_name": "WanModel", "model_type": "t2v", "dim": 256, "num_heads": 4, "num_layers": 2, "in_dim": 16}
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(stated).encode())
    assert read_dit(tmp_path).config.heads == 4
    assert read_dit(tmp_path).notes == ()
    assert read_dit(path).config.heads == 2


def test_a_neighbour_changes_the_fingerprint_but_stops_no_run(parts, tmp_path: Path):
    written(tmp_path / "model.safetensors", parts["dit"])
    file = read_dit(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "num_heads": 4}))
    assert file.checkpoint.fingerprint != file.fingerprint
    check_unchanged(file)  # the weights are what they were
    later = read_dit(tmp_path)
    assert later.fingerprint != file.fingerprint
    os.utime(tmp_path / "config.json", ns=(1, 1))
    assert later.checkpoint.fingerprint != later.fingerprint
    (tmp_path / "config.json").unlink()
    assert file.checkpoint.fingerprint == file.fingerprint
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    with pytest.raises(WanError, match="was changed"):
        check_unchanged(file)


# Tokenizers --------------------------------------------------------------------------------------------------------


def other_tokenizer(vocabulary: int = 300, **options: object) -> bytes:
    """A SentencePiece model of another kind: T5's numbering unless said otherwise."""
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    texts = ["a cat walks on the beach", "dogs run through the rain at night", "words of other models"] * 3
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocabulary,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_piece="<pad>",
        **ids,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def wrong(umt5_tokenizer: Path) -> dict[str, bytes]:
    return {
        "T5's numbering": other_tokenizer(),
        "LLaMA's numbering": other_tokenizer(byte_fallback=True, pad_id=-1, unk_id=0, bos_id=1, eos_id=2),
        "no bytes": other_tokenizer(unk_id=3, bos_id=2),
        "the real one": (umt5_tokenizer / "spiece.model").read_bytes(),
        "nonsense": b"nonsense",
    }


WRONG = ["T5's numbering", "LLaMA's numbering", "no bytes", "the real one", "nonsense"]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tokenizer_beside_is_refused(name: str, wrong, layouts, tmp_path: Path):
    encoder = layouts["official"] / "models_t5_umt5-xxl-enc-bf16.pth"
    shutil.copy(encoder, tmp_path)
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    (tmp_path / "google/umt5-xxl/spiece.model").write_bytes(wrong[name])
    with pytest.raises(WanError, match=r"No tokenizer found .*spiece.model (is not|is no|knows).*Looked for") as caught:
        read_text_encoder(tmp_path / encoder.name)
    assert str(tmp_path / "google/umt5-xxl") in str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_tokenizer_inside_is_refused_or_replaced(name: str, wrong, parts, tiny: TinyModels, tmp_path: Path):
    inside = torch.frombuffer(bytearray(wrong[name]), dtype=torch.uint8)
    path = written(tmp_path / "x.safetensors", {**parts["text"], "spiece_model": inside})
    with pytest.raises(WanError, match="The tokenizer inside .*x.safetensors .*No tokenizer found"):
        read_text_encoder(path)
    write_tokenizer_folder(tmp_path / "google/umt5-xxl", tiny.spiece)
    file = read_text_encoder(path)
    assert file.tokenizer == tmp_path / "google/umt5-xxl/tokenizer.json"
    assert "The tokenizer inside it" in file.notes[0]


def test_a_wrong_tokenizer_json_is_passed_over(wrong, layouts, tiny: TinyModels, tmp_path: Path):
    encoder = Path(shutil.copy(layouts["official"] / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path))
    for kind in (
        {"type": "BPE", "vocab": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}, "merges": []},
        {"type": "Unigram", "unk_id": 2, "vocab": [["<pad>", 0], ["</s>", 0], ["<unk>", 0]]},
    ):
        (tmp_path / "google/umt5-xxl").mkdir(parents=True, exist_ok=True)
        (tmp_path / "google/umt5-xxl/tokenizer.json").write_text(json.dumps({"model": kind, "added_tokens": []}))
        with pytest.raises(WanError, match="tokenizer.json is not umT5's: its token"):
            read_text_encoder(encoder)
    write_tokenizer_folder(tmp_path / "umt5-xxl", tiny.spiece)
    file = read_text_encoder(encoder)
    assert file.tokenizer == tmp_path / "umt5-xxl/tokenizer.json"
    assert "google/umt5-xxl/tokenizer.json is not umT5's" in file.notes[0]


def test_a_named_tokenizer_is_checked_too(wrong, layouts, tmp_path: Path):
    encoder = layouts["official"] / "models_t5_umt5-xxl-enc-bf16.pth"
    with pytest.raises(WanError, match="The tokenizer given is not umT5's.*google/umt5-xxl"):
        read_text_encoder(encoder, wrong["T5's numbering"])


@pytest.fixture(scope="module")
def real_table(tiny: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with as many rows as umT5-XXL, each a few numbers wide."""
    table = torch.zeros(256384, 64, dtype=torch.float16)
    weights = {**tiny.text_weights, "token_embedding.weight": table}
    return written(tmp_path_factory.mktemp("real") / "x.safetensors", weights)


def test_the_real_vocabulary_is_asked_for_by_its_pieces(real_table: Path, umt5_tokenizer: Path, tiny: TinyModels):
    assert read_text_encoder(real_table, umt5_tokenizer).notes == ()
    assert read_text_encoder(real_table, (umt5_tokenizer / "spiece.model").read_bytes()).notes == ()
    with pytest.raises(WanError, match="it knows [0-9]+ tokens, expected 256000 to 256384"):
        read_text_encoder(real_table, tiny.spiece)


def test_another_vocabulary_of_the_same_size_is_refused(real_table: Path, umt5_tokenizer: Path, tmp_path: Path):
    """As many tokens and the same special ones: only the pieces tell them apart."""
    description = json.loads((umt5_tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    words = description["model"]["vocab"]
    words[400:250000] = reversed(words[400:250000])
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(WanError, match="is not umT5's: its token .* expected"):
        read_text_encoder(real_table, tmp_path)


def test_a_tokenizer_that_appears_is_noticed(layouts, tiny: TinyModels, tmp_path: Path):
    encoder = Path(shutil.copy(layouts["official"] / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path))
    write_tokenizer_folder(tmp_path / "tokenizer", tiny.spiece)
    file = read_text_encoder(encoder)
    assert file.tokenizer == tmp_path / "tokenizer/tokenizer.json"
    write_tokenizer_folder(tmp_path / "google/umt5-xxl", tiny.spiece)  # looked for before
    assert file.checkpoint.fingerprint != file.fingerprint
    assert read_text_encoder(encoder).tokenizer == tmp_path / "google/umt5-xxl/tokenizer.json"
    shutil.rmtree(tmp_path / "google")
    assert file.checkpoint.fingerprint == file.fingerprint
    shutil.rmtree(tmp_path / "tokenizer")
    assert file.checkpoint.fingerprint != file.fingerprint


def test_parts_are_told_apart(layouts, parts, tmp_path: Path):
    for part, weights in parts.items():
        checkpoint = open_checkpoint(written(tmp_path / f"{part}.safetensors", weights))
        assert part_of(checkpoint) == part
        assert find(part, checkpoint).place.dialect in ("official", "huggingface")
