"""safetensors files as they should not be."""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path
from typing import Any

from tests.core.damaged_values import Random, Raw, Sound, damage_bytes, nasty, nasty_name, replace_somewhere, to_json
from wan_core.files.storage import STORAGES


def safetensors_header(spec: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> tuple[dict[str, Any], int]:
    header, end = {"__metadata__": metadata}, 0
    for key, (kind, shape) in spec.items():
        begin, end = end, end + math.prod(shape) * STORAGES[kind].bits // 8
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    return header, end


def write_safetensors(
    file: Path, header: dict[str, Any], size: int, contents: dict[str, bytes], length: int | None = None
) -> None:
    text = to_json(header).encode("utf-8", "surrogatepass")
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text) if length is None else length) + text)
        stream.truncate(8 + len(text) + size)
        for key, content in contents.items():
            entry = header.get(key) if isinstance(header, dict) else None
            places = entry.get("data_offsets") if isinstance(entry, dict) else None
            if isinstance(places, list) and places and type(places[0]) is int and 0 <= places[0] < size:
                stream.seek(8 + len(text) + places[0])
                stream.write(content[: size - places[0]])


@cache
def crowded_headers() -> list[Raw]:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = [f'"{i}":{empty}' for i in range(10_000)]
    blocks = [f'"blocks.{i}.self_attn.q.weight":{empty}' for i in range(10_000)]
    objects = [f'"{i}":{{}}' for i in range(100_000)]
    texts = [f"{{{','.join(one)}}}" for one in (entries, blocks, objects)]
    return [Raw(text) for text in (*texts, f'{{"a":[{"[]," * 200_000}[]]}}', f'{{"a":[{"[]," * 2_000_000}[]]}}')]


def damaged_safetensors(rng: Random, file: Path, sound: Sound) -> str:
    name = rng.choice(list(sound.specs))
    header, size = safetensors_header(sound.specs[name], sound.metadata[name])
    contents, length = dict(sound.contents), None
    damage = rng.choice(
        [
            "bytes",
            "bytes",
            "value",
            "value",
            "value",
            "values",
            "name",
            "dtype",
            "places",
            "shape",
            "length",
            "marking",
            "content",
            "metadata",
            "lost",
            rng.choice(["many", *["values"] * 5]),
        ]
    )
    keys = [key for key in header if key != "__metadata__"]
    key = rng.choice(keys)
    entry = header[key]
    if damage == "bytes":
        write_safetensors(file, header, size, contents)
        head = len(to_json(header)) + 8
        with file.open("rb") as stream:
            data = stream.read(head + 4096)
        damage, data = damage_bytes(data, rng, head)
        file.write_bytes(data)
        if rng.random() < 0.5:
            with file.open("r+b") as stream:
                stream.truncate(max(len(data), head + size))
        return damage
    if damage == "value":
        header = replace_somewhere(header, rng)
    elif damage == "values":
        for _ in range(20):
            header = replace_somewhere(header, rng) if isinstance(header, dict) else header
    elif damage == "name":
        header[nasty_name(rng)] = header.pop(key)
    elif damage == "dtype":
        entry["dtype"] = rng.choice(list(STORAGES))
        if rng.random() < 0.7:  # of the right size, at the end
            del header[key]
            taken = math.prod(entry["shape"]) * STORAGES[entry["dtype"]].bits // 8
            header[key] = {**entry, "data_offsets": [size, size + taken]}
            header = {one: value for one, value in header.items() if one == "__metadata__" or one == key}
            header[key]["data_offsets"], size = [0, taken], taken
    elif damage == "places":
        begin, end = entry["data_offsets"]
        move = rng.choice([1, -1, 4, end - begin, -(end - begin), 2**40])
        entry["data_offsets"] = rng.choice([[begin + move, end + move], [end, begin], [0, end - begin], [begin, begin]])
    elif damage == "shape":
        entry["shape"] = rng.choice(
            [[0, *entry["shape"]], [2**32, 2**32], [0, 2**62], [1] * 40, entry["shape"][::-1], [2**62]]
        )
        if 0 in entry["shape"]:
            entry["data_offsets"] = [0, 0] if rng.random() < 0.5 else entry["data_offsets"]
    elif damage == "length":
        length = rng.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 50_000_000, len(to_json(header)) - 1])
    elif damage == "marking":
        header["__metadata__"]["_quantization_metadata"] = to_json(
            replace_somewhere(
                {
                    "format_version": "1.0",
                    "layers": {key.removesuffix(".weight"): {"format": "float8_e4m3fn", "params": {}}},
                },
                rng,
            )
        )
    elif damage == "content":
        text = to_json(
            replace_somewhere({"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}, rng)
        )
        contents = {one: text.encode("utf-8", "replace") for one in contents}
    elif damage == "metadata":
        header["__metadata__"] = rng.choice([nasty(rng), {"a": nasty(rng)}, {nasty_name(rng): "x"}])
    elif damage == "many":
        header, size = rng.choice(crowded_headers()), 0
    else:
        for lost in rng.sample(keys, rng.randrange(1, len(keys))):
            del header[lost]
        header, size = safetensors_header(
            {k: (v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"}, {}
        )
    write_safetensors(file, header, size, contents, length)
    return f"header: {damage}"
