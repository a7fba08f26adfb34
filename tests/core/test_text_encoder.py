"""The umT5 encoder against transformers' UMT5EncoderModel on the same random weights, and its file layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

import wan_core
from wan_core.config import TEXT_ENCODER_CHECKPOINT
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.layouts import text as layout
from wan_core.layouts.prefixes import find_places
from wan_core.loading.text import TextEncoder, load_text_encoder, read_text_encoder
from wan_core.models.text.tokenizer import train_tiny_tokenizer, write_tokenizer_folder
from wan_core.models.text.umt5 import clamp_float16, distance_buckets

TOLERANCE = 2e-5  # of the largest number, in float32
TEXTS = ["a cat walks on the beach at sunset", "two dogs run through the rain at night", "一只猫在海滩上散步", "夜晚"]
PROMPTS = ["a cat walks on the beach", "", "夜晚的城市 at night", "two dogs run through the rain " * 60]


def random_umt5(vocabulary: int, **dimensions: int) -> UMT5EncoderModel:
    """A small encoder whose norms and position biases differ everywhere, so that mixing two of them up would show."""
    torch.manual_seed(7)
    shape = {"d_model": 48, "d_kv": 8, "d_ff": 80, "num_layers": 3, "num_heads": 4} | dimensions
    model = UMT5EncoderModel(UMT5Config(vocab_size=vocabulary, **shape)).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1.0, 0.2)
        elif "relative_attention_bias" in name:
            torch.nn.init.normal_(weight, std=1.0)
    return model


def own_keys(model: UMT5EncoderModel) -> dict[str, Tensor]:
    """The official checkpoint of the same weights, by names written out here on their own."""
    state = model.state_dict()
    theirs = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    for i in range(model.config.num_layers):
        block = f"encoder.block.{i}.layer"
        theirs |= {f"blocks.{i}.attn.{x}.weight": f"{block}.0.SelfAttention.{x}.weight" for x in "qkvo"}
        theirs |= {
            f"blocks.{i}.pos_embedding.embedding.weight": f"{block}.0.SelfAttention.relative_attention_bias.weight",
            f"blocks.{i}.norm1.weight": f"{block}.0.layer_norm.weight",
            f"blocks.{i}.norm2.weight": f"{block}.1.layer_norm.weight",
            f"blocks.{i}.ffn.gate.0.weight": f"{block}.1.DenseReluDense.wi_0.weight",
            f"blocks.{i}.ffn.fc1.weight": f"{block}.1.DenseReluDense.wi_1.weight",
            f"blocks.{i}.ffn.fc2.weight": f"{block}.1.DenseReluDense.wo.weight",
        }
    return {ours: state[key].clone() for ours, key in theirs.items()}


def padded(ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    rows = torch.zeros(len(ids), 512, dtype=torch.int64)
    mask = torch.zeros(len(ids), 512, dtype=torch.int64)
    for row, one in enumerate(ids):
        rows[row, : len(one)] = torch.tensor(one)
        mask[row, : len(one)] = 1
    return rows, mask


@torch.no_grad()
def masked(model: UMT5EncoderModel, ids: list[list[int]]) -> Tensor:
    """transformers on all 512 rows with the padding masked, then the padding zeroed as the official pipeline does."""
    rows, mask = padded(ids)
    return model(rows, attention_mask=mask).last_hidden_state.float() * mask[..., None]


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def spiece() -> bytes:
    return train_tiny_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def reference() -> UMT5EncoderModel:
    return random_umt5(448)


@pytest.fixture(scope="module")
def layouts(reference: UMT5EncoderModel, spiece: bytes, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every layout, each with a tokenizer where that layout has it."""
    root = tmp_path_factory.mktemp("text")
    official = root / "official" / TEXT_ENCODER_CHECKPOINT
    write_tokenizer_folder(official.parent / "google/umt5-xxl", spiece)
    torch.save(own_keys(reference), official)
    write_tokenizer_folder(root / "diffusers/tokenizer", spiece)
    reference.save_pretrained(root / "diffusers/text_encoder")
    write_tokenizer_folder(root / "sharded/tokenizer", spiece)
    reference.save_pretrained(root / "sharded/text_encoder", max_shard_size="100KB")
    return {
        "official": official,
        "official folder": official.parent,
        "diffusers folder": root / "diffusers",
        "huggingface": root / "diffusers/text_encoder",
        "sharded": root / "sharded/text_encoder",
        "index": root / "sharded/text_encoder/model.safetensors.index.json",
        "llama.cpp": llama_cpp_file(root / "umt5.safetensors", reference),
        "comfyui": comfyui_file(root / "umt5_xxl_fp16.safetensors", reference, spiece, "shared.weight"),
        "comfyui, second name": comfyui_file(root / "b.safetensors", reference, spiece, "encoder.embed_tokens.weight"),
        "comfyui, both names": comfyui_file(
            root / "c.safetensors", reference, spiece, "shared.weight", "encoder.embed_tokens.weight"
        ),
    }


def llama_cpp_file(file: Path, model: UMT5EncoderModel) -> Path:
    """Only the names: how GGUF files hold their numbers is tested in test_quant_text.py."""
    parts = {
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_o",
        "wi_0": "ffn_gate",
        "wi_1": "ffn_up",
        "wo": "ffn_down",
        "relative_attention_bias": "attn_rel_b",
    }
    state = {"token_embd.weight": model.shared.weight, "enc.output_norm.weight": model.encoder.final_layer_norm.weight}
    for key, value in model.state_dict().items():
        if key.startswith("encoder.block"):
            _, _, block, _, layer, *_, name, _ = key.split(".")
            name = parts.get(name, "attn_norm" if layer == "0" else "ffn_norm")
            state[f"enc.blk.{block}.{name}.weight"] = value
    save_file({key: value.detach().clone() for key, value in state.items()}, file)
    return file


def comfyui_file(file: Path, model: UMT5EncoderModel, spiece: bytes, *tables: str) -> Path:
    state = {key: value for key, value in model.state_dict().items() if key.startswith("encoder.block")}
    state["encoder.final_layer_norm.weight"] = model.encoder.final_layer_norm.weight
    state |= {table: model.shared.weight.clone() for table in tables}
    state["spiece_model"] = torch.tensor(list(spiece), dtype=torch.uint8)
    save_file({key: value.detach().contiguous() for key, value in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def encoder(layouts: dict[str, Path]) -> TextEncoder:
    return load_text_encoder(layouts["official"], dtype="float32")


def test_against_transformers_with_the_real_tokenizer(umt5_tokenizer: Path, tmp_path: Path):
    reference = random_umt5(256384, d_model=32, num_layers=2)
    torch.save(own_keys(reference), tmp_path / "encoder.pth")
    prompts = [
        "一只猫 wearing sunglasses 坐在 surfboard 上 🏄🎉, caf&eacute;\u3000at   sunset",
        "",
        "walking through the rain " * 150,
        "Two anthropomorphic cats fight on a spotlighted stage.",
    ]
    tokenizer = AutoTokenizer.from_pretrained(umt5_tokenizer)
    ids = tokenizer([prompt_clean(prompt) for prompt in prompts], truncation=True, max_length=512).input_ids
    found = load_text_encoder(tmp_path / "encoder.pth", tokenizer=umt5_tokenizer, dtype="float32")(prompts)
    assert found.shape == (4, 512, 32)
    assert found.dtype is torch.float32
    assert difference(found, masked(reference, ids)) <= TOLERANCE
    assert [len(one) for one in ids[1:3]] == [1, 512]


def test_short_computation_equals_the_masked_one(encoder: TextEncoder, reference: UMT5EncoderModel):
    ids = [encoder.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert sorted(map(len, ids))[-1] == 512
    found = encoder(PROMPTS)
    assert difference(found, masked(reference, ids)) <= TOLERANCE
    for row, one in zip(found, ids, strict=True):
        assert row[len(one) :].abs().sum() == 0
        assert (row[: len(one)].abs().sum(dim=1) > 0).all()


def test_a_batch_equals_its_prompts_one_by_one(encoder: TextEncoder):
    together = encoder(PROMPTS)
    alone = torch.cat([encoder([prompt]) for prompt in PROMPTS])
    assert difference(together, alone) <= 1e-6
    assert torch.equal(encoder(PROMPTS[0]), alone[:1])


@pytest.mark.parametrize("length", [1, 2, 17, 129, 512])
def test_buckets_are_transformers(length: int, reference: UMT5EncoderModel):
    attention = reference.encoder.block[0].layer[0].SelfAttention
    positions = torch.arange(length)
    expected = attention._relative_position_bucket(positions[None, :] - positions[:, None])
    assert torch.equal(distance_buckets(length, 32, 128), expected)


def norm_by_the_rules(x: Tensor, weight: Tensor) -> Tensor:
    normed = x * (x.float() ** 2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    return weight * normed.to(weight.dtype)


def block_by_the_rules(x: Tensor, w: dict[str, Tensor], heads: int) -> Tensor:
    """One layer on one prompt [L, D], every operation in the dtype of the weights but the norm and the softmax."""
    y = norm_by_the_rules(x, w["norm1"])
    q, k, v = ((y @ w[f"attn.{name}"].T).unflatten(-1, (heads, -1)).transpose(0, 1) for name in "qkv")
    bias = w["pos_embedding.embedding"][distance_buckets(len(x), 32, 128)].permute(2, 0, 1)
    weights = (q @ k.mT + bias).float().softmax(-1).to(x.dtype)
    x = x + (weights @ v).transpose(0, 1).flatten(1) @ w["attn.o"].T
    y = norm_by_the_rules(x, w["norm2"])
    g = y @ w["ffn.gate.0"].T
    gelu = 0.5 * g * (1.0 + ((2.0 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)).tanh())
    return x + ((y @ w["ffn.fc1"].T) * gelu) @ w["ffn.fc2"].T


def encode_by_the_rules(weights: dict[str, Tensor], ids: list[int], heads: int) -> Tensor:
    x = weights["token_embedding.weight"][ids]
    for i in range(3):
        prefix = f"blocks.{i}."
        block = {k.removeprefix(prefix).removesuffix(".weight"): v for k, v in weights.items() if k.startswith(prefix)}
        x = block_by_the_rules(x, block, heads)
    return norm_by_the_rules(x, weights["norm.weight"]).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_the_official_rules(
    dtype: torch.dtype, reference: UMT5EncoderModel, encoder: TextEncoder, layouts: dict[str, Path]
):
    """The same roundings at the same places: much nearer than half precision is to float32."""
    ids = encoder.tokenizer.encode(PROMPTS[-1])
    weights = {key: value.to(dtype) for key, value in own_keys(reference).items()}
    expected = encode_by_the_rules(weights, ids, heads=4)
    found = load_text_encoder(layouts["official"], dtype=dtype)(PROMPTS)[-1]
    exact = encoder(PROMPTS)[-1]
    assert difference(exact, expected) > 1e-3
    assert difference(found, expected) <= 0.25 * difference(exact, expected)


def test_float16_overflow_is_clamped():
    x = torch.tensor([1.0, float("inf"), -float("inf"), 65504.0], dtype=torch.float16)
    assert clamp_float16(x).tolist() == [1.0, 64512.0, -64512.0, 64512.0]
    assert clamp_float16(x[[0, 3]]).tolist() == [1.0, 65504.0]
    assert clamp_float16(x.float()).isinf().any()
    assert clamp_float16(x.bfloat16()).isinf().any()


def test_float16_survives_overflow(reference: UMT5EncoderModel, spiece: bytes, tmp_path: Path):
    weights = own_keys(reference)
    weights["blocks.1.ffn.fc2.weight"] *= 1e5
    torch.save({key: value.half() for key, value in weights.items()}, tmp_path / "large.pth")
    load = lambda dtype: load_text_encoder(tmp_path / "large.pth", tokenizer=spiece, dtype=dtype)  # noqa: E731
    assert load("float32").encoder.config.layers == 3
    assert load("float16")(["a cat"]).isfinite().all()


@pytest.mark.parametrize(
    "name",
    [
        "official folder",
        "diffusers folder",
        "huggingface",
        "sharded",
        "index",
        "comfyui",
        "comfyui, second name",
        "comfyui, both names",
    ],
)
def test_every_layout_loads_to_identical_weights(name: str, layouts: dict[str, Path], encoder: TextEncoder):
    other = load_text_encoder(layouts[name], dtype="float32")
    assert other.config == encoder.config
    expected = encoder.encoder.state_dict()
    found = other.encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # Not bit for bit: tensors lie at other addresses in other files, and products may round by alignment.
    assert difference(other(PROMPTS[:3]), encoder(PROMPTS[:3])) <= 1e-6


def test_config_comes_from_the_shapes(encoder: TextEncoder):
    config = encoder.config
    assert (config.vocabulary, config.dim, config.attention_dim, config.ffn_dim) == (448, 48, 32, 80)
    assert (config.heads, config.layers, config.buckets) == (4, 3, 32)


@pytest.mark.parametrize("dialect", layout.DIALECTS)
def test_names_go_both_ways(dialect: str, layouts: dict[str, Path]):
    path = layouts[{"official": "official", "huggingface": "comfyui", "llama.cpp": "llama.cpp"}[dialect]]
    checkpoint = open_checkpoint(path)
    (place,) = find_places(checkpoint.tensors, layout.MARKS)
    assert place.dialect == dialect
    names = layout.names_in(place)
    assert {ours: layout.DIALECTS[dialect].to_theirs(ours) for ours in names} == names
    assert set(names.values()) == set(checkpoint.tensors) - {"spiece_model"}


def mapped_files_at(tensor: Tensor) -> str:
    """The line of the process's memory map in which a tensor lies."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line
    raise AssertionError("not in the memory map")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_big_tensors_stay_in_the_file(suffix: str, reference: UMT5EncoderModel, spiece: bytes, tmp_path: Path):
    """Computing in float32 from a bfloat16 file makes no float32 copy of the model."""
    file = tmp_path / f"encoder.{suffix}"
    weights = {key: value.bfloat16() for key, value in own_keys(reference).items()}
    torch.save(weights, file) if suffix == "pth" else save_file(weights, file)
    encoder = load_text_encoder(file, tokenizer=spiece, dtype="float32")
    encoder(["a cat"])
    for key, tensor in encoder.encoder.state_dict().items():
        small = "norm" in key or "pos_embedding" in key
        assert tensor.dtype is (torch.float32 if small else torch.bfloat16)
        assert small or file.name in mapped_files_at(tensor), key
    as_float32 = UMT5EncoderModel(reference.config).eval()
    as_float32.load_state_dict({k: v.bfloat16().float() for k, v in reference.state_dict().items()})
    ids = [encoder.tokenizer.encode(prompt) for prompt in PROMPTS]
    assert difference(encoder(PROMPTS), masked(as_float32, ids)) <= TOLERANCE


def test_on_block_sees_every_block_and_can_cancel(encoder: TextEncoder):
    seen = []
    encoder(["a cat"], on_block=seen.append)
    assert seen == [0, 1, 2]

    def cancel(index: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder(["a cat"], on_block=cancel)


def test_public_function(layouts: dict[str, Path]):
    assert wan_core.load_text_encoder(layouts["official"])(["a cat"]).shape == (1, 512, 48)


def test_ids_are_checked(encoder: TextEncoder):
    assert torch.equal(encoder.encode_ids([encoder.tokenizer.encode("a cat")]), encoder(["a cat"]))
    cases = {"no prompt": [], "0 tokens": [[]], "513 tokens": [[5] * 513], "from 1 to 448": [[448, 1]], "-1": [[-1, 1]]}
    for message, wrong in cases.items():
        with pytest.raises(WanError, match=message):
            encoder.encode_ids(wrong)


def test_tokenizer_of_another_model_is_refused(layouts: dict[str, Path], umt5_tokenizer: Path):
    encoder = load_text_encoder(layouts["official"], tokenizer=umt5_tokenizer)
    with pytest.raises(WanError, match="256300 tokens.*only 448"):
        encoder(["a cat"])


def test_missing_tokenizer_is_found_before_loading(reference: UMT5EncoderModel, tmp_path: Path):
    torch.save(own_keys(reference), tmp_path / "encoder.pth")
    with pytest.raises(WanError, match="No tokenizer found") as caught:
        read_text_encoder(tmp_path / "encoder.pth")
    assert str(tmp_path / "google/umt5-xxl") in str(caught.value)
    with pytest.raises(WanError, match="No tokenizer at"):
        read_text_encoder(tmp_path / "encoder.pth", tmp_path / "elsewhere")


def test_wrong_files_are_refused(reference: UMT5EncoderModel, spiece: bytes, tmp_path: Path):
    weights = own_keys(reference)
    t5 = {k: v for k, v in weights.items() if not ("pos_embedding" in k and not k.startswith("blocks.0."))}
    cases = {
        "not a umT5 text encoder": {"blocks.0.self_attn.q.weight": torch.zeros(4, 4)},
        "T5 text encoder": t5,
        "Missing: blocks.1.ffn.fc1.weight": {k: v for k, v in weights.items() if k != "blocks.1.ffn.fc1.weight"},
        "Unexpected: blocks.0.attn.q.extra": weights | {"blocks.0.attn.q.extra": torch.zeros(1)},
        "other shapes": weights | {"blocks.2.norm1.weight": torch.zeros(3)},
        "dimensions cannot be read": {k: v for k, v in weights.items() if "blocks.0.pos" not in k},
        "with blocks.0.attn.q.scale_weight; no marking": weights | {"blocks.0.attn.q.scale_weight": torch.zeros(3)},
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "wrong.safetensors")
        with pytest.raises(WanError, match=message):
            load_text_encoder(tmp_path / "wrong.safetensors", tokenizer=spiece)
    with pytest.raises(WanError, match="No such file"):
        load_text_encoder(tmp_path / "nothing.pth")
