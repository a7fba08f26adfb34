"""Values, names and bytes that belong nowhere, and the sound files they are put into."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from typing import Any

from wan_core.tools.tiny import TinySizes, make_tiny

SIZES = TinySizes(dim=128, ffn_dim=16, layers=2, text_dim=16, text_layers=2)
Random = random.Random


@dataclass
class Sound:
    """The tensors of sound files: name -> dtype, shape; and small contents that are read with the header."""

    specs: dict[str, dict[str, tuple[str, list[int]]]]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)


def sound_files() -> Sound:
    """A DiT, a VAE, a text encoder, a LoRA and a quantised DiT, small."""
    made = make_tiny("t2v-A14B", sizes=SIZES)
    specs = {
        name: {key: ("F32", list(tensor.shape)) for key, tensor in weights.items()}
        for name, weights in (("dit", made.experts[0]), ("vae", made.vae_weights), ("text", made.text_weights))
    }
    specs["text"]["spiece_model"] = ("U8", [len(made.spiece)])
    matrices = [key for key in specs["dit"] if key.startswith("blocks.") and len(specs["dit"][key][1]) == 2]
    specs["lora"] = {}
    for key in matrices:
        path, (rows, columns) = f"diffusion_model.{key.removesuffix('.weight')}", specs["dit"][key][1]
        specs["lora"] |= {
            f"{path}.lora_down.weight": ("F16", [4, columns]),
            f"{path}.alpha": ("F32", []),
            f"{path}.lora_up.weight": ("F16", [rows, 4]),
        }
    mark = json.dumps({"format": "int8_tensorwise"}).encode()
    specs["quantised"] = dict(specs["dit"])
    for key in matrices:
        layer = key.removesuffix(".weight")
        specs["quantised"] |= {
            key: ("I8", specs["dit"][key][1]),
            f"{layer}.weight_scale": ("F32", []),
            f"{layer}.comfy_quant": ("U8", [len(mark)]),
        }
    contents = {f"{key.removesuffix('.weight')}.comfy_quant": mark for key in matrices}
    metadata = {name: {"format": "pt", "author": "nobody"} for name in specs}
    return Sound(specs, metadata, contents | {"spiece_model": made.spiece})


class Raw(str):
    """JSON text that no Python value gives."""


def nasty(rng: Random) -> Any:
    return rng.choice(
        [
            None,
            True,
            False,
            -1,
            0,
            1,
            2**31,
            2**53,
            2**63 - 1,
            2**63,
            2**64,
            10**40,
            0.5,
            -0.0,
            "",
            "x",
            "../../x",
            "\n",
            "\x1b[31m",
            "\ud800",
            "\u202e",
            "٣",
            [],
            [[]],
            {},
            {"a": 1},
            [1, 2, 3],
            [-1, 5],
            ["a", "b"],
            [0, 2**62],
            [2**62, 2**62],
            [1] * 100,
            [0, 0],
            "F32",
            "F99",
            "a" * 5000,
            Raw("NaN"),
            Raw("-Infinity"),
            Raw("1e999"),
            Raw("9" * 5000),
            Raw("[" * 3000 + "]" * 3000),
            Raw("[" * 200_000),
            Raw('{"a":' * 50_000),
            Raw('{"a":1,"a":2}'),
            Raw('"\\ud83d"'),
            Raw("01"),
            Raw("'x'"),
            Raw("\x00"),
        ]
    )


def nasty_name(rng: Random) -> str:
    return rng.choice(
        [
            "blocks.99999999.self_attn.q.weight",
            "blocks.٣.self_attn.q.weight",
            "blocks.-1.norm3.weight",
            "blocks..x",
            "blocks.00.self_attn.q.weight",
            "blocks.1e3.x",
            f"blocks.{'9' * 5000}.x",
            "blocks.2.norm3.weight",
            "blocks.x.y",
            "encoder.block.99999999.layer.0.SelfAttention.q.weight",
            "encoder.downsamples.99.resample.1.weight",
            "decoder.upsamples.77777777.residual.2.weight",
            "lora_unet_blocks_99999999_self_attn_q.lora_down.weight",
            "diffusion_model.blocks.99999999.self_attn.q.lora_down.weight",
            "a\nb",
            "\x1b[2J",
            "",
            " ",
            ".",
            "a" * 100_000,
            "\u202egpj",
            "model." * 1000 + "x",
            "__metadata__",
            "x.comfy_quant",
            "scaled_fp8",
            "<img src=x onerror=alert(1)>",
        ]
    )


def to_json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{to_json(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


def replace_somewhere(value: Any, rng: Random) -> Any:
    """The same JSON with one value in it replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        return {**value, key: replace_somewhere(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], replace_somewhere(value[place], rng), *value[place + 1 :]]
    return nasty(rng)


def damage_bytes(data: bytes, rng: Random, head: int) -> tuple[str, bytes]:
    """``head``: where the header ends, in which most of the damage is done."""
    zone = max(1, min(len(data), head if rng.random() < 0.8 else len(data)))
    place = rng.randrange(zone)
    match rng.choice(["cut", "flip", "flip", "insert", "delete", "fill", "append", "double", "swap", "noise"]):
        case "cut":
            return "cut short", data[: rng.randrange(len(data))]
        case "flip":
            changed = bytearray(data)
            for _ in range(rng.choice([1, 1, 2, 8, 32])):
                changed[rng.randrange(zone)] ^= 1 << rng.randrange(8)
            return "bits flipped", bytes(changed)
        case "insert":
            return "bytes inserted", data[:place] + rng.randbytes(rng.choice([1, 2, 8, 100])) + data[place:]
        case "delete":
            return "bytes lost", data[:place] + data[place + rng.choice([1, 2, 8, 100]) :]
        case "fill":
            count = rng.choice([1, 4, 8, 8, 64, 4096])
            return "bytes overwritten", data[:place] + rng.choice([b"\0", b"\xff", b"{", b"9"]) * count + data[
                place + count :
            ]
        case "append":
            return "bytes appended", data + rng.randbytes(rng.choice([1, 8, 5000]))
        case "double":
            return "file twice", data + data
        case "swap":
            other = rng.randrange(zone)
            first, second = sorted((place, other))
            return "parts swapped", data[second:] + data[first:second] + data[:first]
        case _:
            return "noise", data[: rng.choice([0, 4, 8, 9])] + rng.randbytes(rng.choice([1, 10, 100, 10_000]))
