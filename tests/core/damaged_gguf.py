"""GGUF files as they should not be."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.core.damaged_values import Random, Sound, damage_bytes, nasty_name
from wan_core.files.write import _string, _value

BIG = (0, 1, 2**16, 2**31, 2**32 - 1)
BIGGER = (*BIG, 2**40, 2**62, 2**63, 2**64 - 1)


@dataclass
class GGUF:
    """A file as parts, each of which can be another than it should be."""

    version: int = 3
    tensors: int | None = None
    fields: int | None = None
    pairs: list[bytes] = field(default_factory=list)
    entries: list[bytes] = field(default_factory=list)
    size: int = 0

    def write(self, file: Path) -> None:
        head = b"GGUF" + struct.pack("<I", self.version)
        for stated, real in ((self.tensors, self.entries), (self.fields, self.pairs)):
            head += struct.pack("<Q", len(real) if stated is None else stated)
        head += b"".join(self.pairs) + b"".join(self.entries)
        with file.open("wb") as stream:
            stream.write(head + bytes(-len(head) % 32))
            stream.truncate(len(head) + -len(head) % 32 + self.size)


def gguf_entry(name: str | bytes, shape: list[int], kind: int, place: int, dimensions: int | None = None) -> bytes:
    stated = len(shape) if dimensions is None else dimensions
    return _string(name) + struct.pack("<I", stated) + struct.pack(f"<{len(shape)}QIQ", *shape, kind, place)


def sound_gguf(sound: Sound, name: str) -> GGUF:
    made = GGUF(pairs=[_string("general.architecture") + _value("wan" if name == "dit" else "t5encoder")])
    for key, (_, shape) in sound.specs[name].items():
        if key != "spiece_model":
            made.entries.append(gguf_entry(key, shape[::-1], 0, made.size))
            made.size += 4 * math.prod(shape) + -4 * math.prod(shape) % 32
    return made


def gguf_value(value: Any) -> bytes:
    return struct.pack("<Ii", 5, value) if type(value) is int and value < 0 else _value(value)


def damaged_gguf(rng: Random, file: Path, sound: Sound) -> str:
    made = sound_gguf(sound, rng.choice(["dit", "text"]))
    place = rng.randrange(len(made.entries))
    damage = rng.choice(
        [
            "bytes",
            "bytes",
            "bytes",
            "version",
            "counts",
            "counts",
            "alignment",
            "name",
            "dimensions",
            "shape",
            "type",
            "place",
            "field",
            "array",
            "twice",
            "text",
            "shape field",
            "vocabulary",
        ]
    )
    if damage == "bytes":
        made.write(file)
        data = file.read_bytes()
        damage, data = damage_bytes(data, rng, len(data) - made.size)
        file.write_bytes(data)
        return damage
    if damage == "version":
        made.version = rng.choice(BIG)
    elif damage == "counts":
        made.tensors, made.fields = rng.choice([None, *BIGGER]), rng.choice([None, *BIGGER])
    elif damage == "alignment":
        value = rng.choice(
            [
                *(struct.pack("<II", 4, one) for one in (*BIG, 3, 7)),
                _value("x"),
                _value(True),
                gguf_value(-32),
                _value(0.0),
                struct.pack("<IQ", 10, 2**63),
                struct.pack("<IIQ", 9, 4, 0),
            ]
        )
        made.pairs.append(_string("general.alignment") + value)
    elif damage == "name":
        name = rng.choice([b"\xff\xfe", b"a\0b", b"\n", nasty_name(rng).encode("utf-8", "surrogatepass")])
        made.entries[place] = gguf_entry(name, [8], 0, 0)
    elif damage == "dimensions":
        made.entries[place] = gguf_entry("x", [8], 0, 0, rng.choice(BIG))
    elif damage == "shape":
        made.entries[place] = gguf_entry(
            "x", [rng.choice(BIGGER) for _ in range(rng.randrange(6))], rng.choice([0, 1, 8, 12]), 0
        )
    elif damage == "type":
        made.entries[place] = gguf_entry("x", [32], rng.choice([4, 5, 17, 31, 39, 40, 200, *BIG]), 0)
    elif damage == "place":
        made.entries[place] = gguf_entry("x", [32], 0, rng.choice([1, 31, *BIGGER, made.size]))
    elif damage == "field":
        made.pairs.append(
            _string("x") + struct.pack("<I", rng.choice([*range(16), *BIG])) + rng.randbytes(rng.randrange(20))
        )
    elif damage == "array":
        made.pairs.append(_string("x") + struct.pack("<IIQ", 9, rng.choice([*range(14), *BIG]), rng.choice(BIGGER)))
    elif damage == "twice":
        rng.choice([made.entries, made.pairs]).append(rng.choice([made.entries[place], made.pairs[0]]))
    elif damage == "text":
        made.pairs.append(struct.pack("<Q", rng.choice(BIGGER)) + b"x" + struct.pack("<IQ", 8, rng.choice(BIGGER)))
    elif damage == "shape field":
        key = rng.choice(list(sound.specs["dit"]))
        value = rng.choice(
            [_value([-1, -1]), _value([1.5]), _value(["a"]), _value([2**31 - 1] * 3), struct.pack("<IIQ", 9, 5, 2**60)]
        )
        made.pairs.append(_string(f"comfy.gguf.orig_shape.{key}") + value)
    else:
        made = sound_gguf(sound, "text")
        made.pairs += vocabulary(rng)
    made.write(file)
    return f"header: {damage}"


def vocabulary(rng: Random) -> list[bytes]:
    count = rng.choice([1, 3, 300])
    values = {
        "model": "t5",
        "tokens": [f"p{i}" for i in range(count)],
        "scores": [0.5] * count,
        "token_type": [1] * count,
        "eos_token_id": 1,
        "precompiled_charsmap": [1, 2],
    }
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(list(values))
        values[name] = rng.choice(
            ["x", 0, 2**31 - 1, -5, 1.5, True, ["a"], [1, 2], [0.5], [-1], [2**31 - 1] * count, ["\ufffd"] * count]
        )
    return [_string(f"tokenizer.ggml.{name}") + gguf_value(value) for name, value in values.items()]
