"""Files as they should not be: every way to damage a checkpoint that we know of, drawn at random from a seed.

Each container has its sound files, and damages of three depths: of its bytes, of its structure (a header that was
written again with one value or more replaced by what does not belong there), and whole files that somebody made on
purpose.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from wan_core.checkpoint.storage import STORAGES
from wan_core.checkpoint.write import _string, _value
from wan_core.tiny import TinySizes, make_tiny

SIZES = TinySizes(dim=128, ffn_dim=16, layers=2, text_dim=16, text_layers=2)
Random = random.Random


@dataclass(frozen=True)
class Case:
    """A damaged file or folder, and in which way it is damaged."""

    container: str
    damage: str
    path: Path


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
        specs["lora"] |= {f"{path}.lora_down.weight": ("F16", [4, columns]), f"{path}.alpha": ("F32", []),
                          f"{path}.lora_up.weight": ("F16", [rows, 4])}  # fmt: skip
    mark = json.dumps({"format": "int8_tensorwise"}).encode()
    specs["quantised"] = dict(specs["dit"])
    for key in matrices:
        layer = key.removesuffix(".weight")
        specs["quantised"] |= {key: ("I8", specs["dit"][key][1]), f"{layer}.weight_scale": ("F32", []),
                               f"{layer}.comfy_quant": ("U8", [len(mark)])}  # fmt: skip
    contents = {f"{key.removesuffix('.weight')}.comfy_quant": mark for key in matrices}
    metadata = {name: {"format": "pt", "author": "nobody"} for name in specs}
    return Sound(specs, metadata, contents | {"spiece_model": made.spiece})


# Values that belong nowhere -------------------------------------------------


class Raw(str):
    """JSON text that no Python value gives."""


def nasty(rng: Random) -> Any:
    return rng.choice([
        None, True, False, -1, 0, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, 0.5, -0.0, "", "x", "../../x", "\n",
        "\x1b[31m", "\ud800", "\u202e", "٣", [], [[]], {}, {"a": 1}, [1, 2, 3], [-1, 5], ["a", "b"], [0, 2**62], [2**62, 2**62],
        [1] * 100, [0, 0], "F32", "F99", "a" * 5000, Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000),
        Raw("[" * 3000 + "]" * 3000), Raw("[" * 200_000), Raw('{"a":' * 50_000), Raw('{"a":1,"a":2}'), Raw('"\\ud83d"'),
        Raw("01"), Raw("'x'"), Raw("\x00"),
    ])  # fmt: skip


def nasty_name(rng: Random) -> str:
    return rng.choice([
        "blocks.99999999.self_attn.q.weight", "blocks.٣.self_attn.q.weight", "blocks.-1.norm3.weight", "blocks..x",
        "blocks.00.self_attn.q.weight", "blocks.1e3.x", f"blocks.{'9' * 5000}.x", "blocks.2.norm3.weight", "blocks.x.y",
        "encoder.block.99999999.layer.0.SelfAttention.q.weight", "encoder.downsamples.99.resample.1.weight",
        "decoder.upsamples.77777777.residual.2.weight", "lora_unet_blocks_99999999_self_attn_q.lora_down.weight",
        "diffusion_model.blocks.99999999.self_attn.q.lora_down.weight", "a\nb", "\x1b[2J", "", " ", ".", "a" * 100_000,
        "\u202egpj", "model." * 1000 + "x", "__metadata__", "x.comfy_quant", "scaled_fp8", "<img src=x onerror=alert(1)>",
    ])  # fmt: skip


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


# Bytes ------------------------------------------------------------------------


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
            return "bytes overwritten", data[:place] + rng.choice([b"\0", b"\xff", b"{", b"9"]) * count + data[place + count :]
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


# safetensors ------------------------------------------------------------------


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
    entries = [f'"{i}":{empty}' for i in range(20_000)]
    blocks = [f'"blocks.{i}.self_attn.q.weight":{empty}' for i in range(20_000)]
    objects = [f'"{i}":{{}}' for i in range(100_000)]
    texts = [f"{{{','.join(one)}}}" for one in (entries, blocks, objects)]
    return [Raw(text) for text in (*texts, f'{{"a":[{"[]," * 200_000}[]]}}', f'{{"a":[{"[]," * 2_000_000}[]]}}')]


def damaged_safetensors(rng: Random, file: Path, sound: Sound) -> str:
    name = rng.choice(list(sound.specs))
    header, size = safetensors_header(sound.specs[name], sound.metadata[name])
    contents, length = dict(sound.contents), None
    damage = rng.choice(["bytes", "bytes", "value", "value", "value", "values", "name", "dtype", "places", "shape", "length",
                         "marking", "content", "metadata", "lost", rng.choice(["many", *["values"] * 5])])  # fmt: skip
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
        entry["shape"] = rng.choice([[0, *entry["shape"]], [2**32, 2**32], [0, 2**62], [1] * 40, entry["shape"][::-1], [2**62]])
        if 0 in entry["shape"]:
            entry["data_offsets"] = [0, 0] if rng.random() < 0.5 else entry["data_offsets"]
    elif damage == "length":
        length = rng.choice([0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, 50_000_000, len(to_json(header)) - 1])
    elif damage == "marking":
        header["__metadata__"]["_quantization_metadata"] = to_json(replace_somewhere(
            {"format_version": "1.0", "layers": {key.removesuffix(".weight"): {"format": "float8_e4m3fn", "params": {}}}}, rng))
    elif damage == "content":
        text = to_json(replace_somewhere({"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 64}}, rng))
        contents = {one: text.encode("utf-8", "replace") for one in contents}
    elif damage == "metadata":
        header["__metadata__"] = rng.choice([nasty(rng), {"a": nasty(rng)}, {nasty_name(rng): "x"}])
    elif damage == "many":
        header, size = rng.choice(crowded_headers()), 0
    else:
        for lost in rng.sample(keys, rng.randrange(1, len(keys))):
            del header[lost]
        header, size = safetensors_header({k: (v["dtype"], v["shape"]) for k, v in header.items() if k != "__metadata__"}, {})
    write_safetensors(file, header, size, contents, length)
    return f"header: {damage}"


# GGUF ---------------------------------------------------------------------------


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


BIG = (0, 1, 2**16, 2**31, 2**32 - 1)
BIGGER = (*BIG, 2**40, 2**62, 2**63, 2**64 - 1)


def damaged_gguf(rng: Random, file: Path, sound: Sound) -> str:
    made = sound_gguf(sound, rng.choice(["dit", "text"]))
    place = rng.randrange(len(made.entries))
    damage = rng.choice(["bytes", "bytes", "bytes", "version", "counts", "counts", "alignment", "name", "dimensions", "shape", "type",
                         "place", "field", "array", "twice", "text", "shape field", "vocabulary"])  # fmt: skip
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
        value = rng.choice([*(struct.pack("<II", 4, one) for one in (*BIG, 3, 7)), _value("x"), _value(True), gguf_value(-32),
                            _value(0.0), struct.pack("<IQ", 10, 2**63), struct.pack("<IIQ", 9, 4, 0)])
        made.pairs.append(_string("general.alignment") + value)
    elif damage == "name":
        name = rng.choice([b"\xff\xfe", b"a\0b", b"\n", nasty_name(rng).encode("utf-8", "surrogatepass")])
        made.entries[place] = gguf_entry(name, [8], 0, 0)
    elif damage == "dimensions":
        made.entries[place] = gguf_entry("x", [8], 0, 0, rng.choice(BIG))
    elif damage == "shape":
        made.entries[place] = gguf_entry("x", [rng.choice(BIGGER) for _ in range(rng.randrange(6))], rng.choice([0, 1, 8, 12]), 0)
    elif damage == "type":
        made.entries[place] = gguf_entry("x", [32], rng.choice([4, 5, 17, 31, 39, 40, 200, *BIG]), 0)
    elif damage == "place":
        made.entries[place] = gguf_entry("x", [32], 0, rng.choice([1, 31, *BIGGER, made.size]))
    elif damage == "field":
        made.pairs.append(_string("x") + struct.pack("<I", rng.choice([*range(16), *BIG])) + rng.randbytes(rng.randrange(20)))
    elif damage == "array":
        made.pairs.append(_string("x") + struct.pack("<IIQ", 9, rng.choice([*range(14), *BIG]), rng.choice(BIGGER)))
    elif damage == "twice":
        rng.choice([made.entries, made.pairs]).append(rng.choice([made.entries[place], made.pairs[0]]))
    elif damage == "text":
        made.pairs.append(struct.pack("<Q", rng.choice(BIGGER)) + b"x" + struct.pack("<IQ", 8, rng.choice(BIGGER)))
    elif damage == "shape field":
        key = rng.choice(list(sound.specs["dit"]))
        value = rng.choice([_value([-1, -1]), _value([1.5]), _value(["a"]), _value([2**31 - 1] * 3), struct.pack("<IIQ", 9, 5, 2**60)])
        made.pairs.append(_string(f"comfy.gguf.orig_shape.{key}") + value)
    else:
        made = sound_gguf(sound, "text")
        made.pairs += vocabulary(rng)
    made.write(file)
    return f"header: {damage}"


def vocabulary(rng: Random) -> list[bytes]:
    count = rng.choice([1, 3, 300])
    values = {"model": "t5", "tokens": [f"p{i}" for i in range(count)], "scores": [0.5] * count, "token_type": [1] * count,
              "eos_token_id": 1, "precompiled_charsmap": [1, 2]}  # fmt: skip
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(list(values))
        values[name] = rng.choice(["x", 0, 2**31 - 1, -5, 1.5, True, ["a"], [1, 2], [0.5], [-1], [2**31 - 1] * count, ["\ufffd"] * count])
    return [_string(f"tokenizer.ggml.{name}") + gguf_value(value) for name, value in values.items()]


# Pickles --------------------------------------------------------------------------


def torch_zip(file: Path, pickled: bytes, records: dict[str, bytes] | None = None, *, packed: bool = False,
              twice: str | None = None) -> None:  # fmt: skip
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)
        if twice:
            archive.writestr(twice, b"x")


def p_int(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def p_text(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def p_global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def p_tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def p_tensor(*, storage: str = "torch.FloatStorage", key: bytes = p_text("0"), count: int = 4, place: int = 0, size: tuple = (2, 2),
             stride: tuple = (2, 1), function: str = "torch._utils._rebuild_tensor_v2") -> bytes:  # fmt: skip
    persistent = p_tuple(p_text("storage"), p_global(storage), key, p_text("cpu"), p_int(count)) + b"Q"
    numbers = [p_tuple(*map(p_int, one)) for one in (size, stride)]
    hooks = p_global("collections.OrderedDict") + b")R"
    return p_global(function) + p_tuple(persistent, p_int(place), *numbers, b"\x89", hooks) + b"R"


def p_dict(**items: bytes) -> bytes:
    return b"}(" + b"".join(p_text(key) + value for key, value in items.items()) + b"u"


def call(name: str, *given: bytes) -> bytes:
    return p_global(name) + p_tuple(*given) + b"R"


@cache
def hostile_pickles() -> dict[str, bytes]:
    """What to put where a state dict was expected: name -> instructions, without begin and end."""
    weight = p_dict(weight=p_tensor())
    big = p_int(2**40)
    copied = b"]q\x00(" + b"K\x01" * 50_000 + b"e0" + b"".join(call("builtins.set", b"h\x00") + b"0" for _ in range(3_000))
    made = {f"code: {name}": p_dict(weight=p_tensor(), x=call(name, p_text("touch ran-code"))) for name in (
        "os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.check_output", "torch.hub.load",
        "torch.load", "pickle.loads", "builtins.getattr", "numpy.load", "runpy._run_code", "webbrowser.open")}  # fmt: skip
    made |= {f"allocates: {name}": p_dict(weight=p_tensor(), x=call(name, big)) for name in (
        "builtins.bytearray", "__builtin__.bytearray", "torch.FloatTensor", "torch.Tensor", "torch.UntypedStorage",
        "torch.storage.UntypedStorage", "torch.FloatStorage", "torch.storage.TypedStorage", "builtins.complex")}  # fmt: skip
    made |= {
        "storage too large": p_dict(weight=p_tensor(count=2**40)), "storage negative": p_dict(weight=p_tensor(count=-4)),
        "storage of another size": p_dict(weight=p_tensor(count=3)), "size too large": p_dict(weight=p_tensor(size=(2**30, 2**30))),
        "stride 0": p_dict(weight=p_tensor(size=(2**30, 2**30), stride=(0, 0))),
        "place outside": p_dict(weight=p_tensor(place=2**40)), "size negative": p_dict(weight=p_tensor(size=(-2, 2))),
        "size without numbers": p_dict(weight=p_tensor(size=(0, 2**60))), "stride negative": p_dict(weight=p_tensor(stride=(-2, 1))),
        "size of one, stride of two": p_dict(weight=p_tensor(size=(4,))), "many sizes": p_dict(weight=p_tensor(size=(1,) * 500, stride=(1,) * 500)),
        "no storage": p_dict(weight=p_tensor(key=p_text("7"))), "key outside": p_dict(weight=p_tensor(key=p_text("../../x"))),
        "key a number": p_dict(weight=p_tensor(key=p_int(0))), "odd storage": p_dict(weight=p_tensor(storage="os.system")),
        "quantised": p_dict(weight=p_tensor(function="torch._utils._rebuild_qtensor")),
        "sparse": p_dict(weight=p_tensor(function="torch._utils._rebuild_sparse_tensor")),
        "subclass": p_dict(weight=p_tensor(function="torch._utils._rebuild_wrapper_subclass")),
        "copied again and again": copied + weight, "deep tuples as a key": b"}" + b")" + b"\x85" * 300_000 + b"K\x01s",
        "deep lists": b"]" * 100_000 + b"a" * 99_999, "holds itself": b"}q\x00" + p_text("a") + b"h\x00s",
        "memo far away": b"}r\xff\xff\xff\xff", "text too long": b"X\xff\xff\xff\xffabc", "bytes too long": b"\x8e" + b"\xff" * 8,
        "frame too long": b"\x95" + b"\xff" * 8, "long number": b"\x8b\xff\xff\xff\x7f", "no mark": b"t", "empty": b"", "nothing to pop": b"0",
        "a list": b"]", "a number": b"K\x01", "none": b"N", "names are numbers": b"}K\x01" + p_tensor() + b"s",
        "names are tuples": b"}" + p_tuple(p_text("a")) + p_tensor() + b"s", "name with control characters": p_dict(**{"a\n\x1b": p_tensor()}),
        "name with half a character": p_dict(**{"\ud800": p_tensor()}), "name too long": p_dict(**{"a" * 100_000: p_tensor()}),
        "block far away": p_dict(**{"blocks.99999999.self_attn.q.weight": p_tensor(), "head.modulation": p_tensor(),
                                    "blocks.0.self_attn.q.weight": p_tensor()}),
        "wrapped deeply": p_dict(a=p_dict(b=p_dict(c=p_dict(d=p_dict(e=weight))))), "persistent number": b"}" + p_int(3) + b"Q",
        "persistent module": p_tuple(p_text("module"), p_global("os.system"), b"N", b"N") + b"Q", "instance": p_global("os.system") + b")\x81",
        "built": b"}" + p_dict(a=b"K\x01") + b"b", "many instructions": b"}" + b"N0" * 600_000, "stack global": p_text("os") + p_text("system") + b"\x93)R",
        "extension": b"\x82\x01", "reduce of none": b"N)R", "old instance": b"(ios\nsystem\n",
    }  # fmt: skip
    return made


def damaged_pickle(rng: Random, file: Path, sound: Sound) -> str:
    damage = rng.choice(["bytes", "bytes", "hostile", "hostile", "hostile", "instructions", "archive", "older", "older hostile", "bare", "wrapper"])
    weights = {key: torch.zeros(2, 3) for key in rng.sample(list(sound.specs["dit"]), 8)}
    if damage in ("bytes", "older"):
        torch.save(weights, file, _use_new_zipfile_serialization=damage == "bytes")
        data = file.read_bytes()
        damage, data = damage_bytes(data, rng, rng.choice([200, 2000, len(data)]))
        file.write_bytes(data)
        return damage
    name, body = rng.choice(list(hostile_pickles().items()))
    pickled = b"\x80\x02" + body + b"."
    if damage == "hostile":
        torch_zip(file, pickled, {"data/0": bytes(16)})
        return f"pickle: {name}"
    if damage == "older hostile":
        start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
        keys = b"\x80\x02](" + p_text("0") + b"e."
        file.write_bytes(start + b"\x80\x02}." + pickled + keys + struct.pack("<q", rng.choice([4, 2**40, -1])) + bytes(16))
        return f"older pickle: {name}"
    if damage == "bare":
        file.write_bytes(rng.choice([pickled, pickle.dumps({"a": [1]}, 4), pickle.dumps(weights)]))
        return "pickle without an archive"
    if damage == "instructions":
        stream = io.BytesIO()
        torch.save(weights, stream)
        with zipfile.ZipFile(stream) as archive:
            parts = {one.split("/", 1)[1]: archive.read(one) for one in archive.namelist()}
        data = bytearray(parts.pop("data.pkl"))
        for _ in range(rng.choice([1, 2, 5])):
            data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"()tRQbsue]}N.0cX\x8aJ\x85\x86\x87"])
        torch_zip(file, bytes(data), {key: one for key, one in parts.items() if key not in ("byteorder", "version")})
        return "pickle: instructions replaced"
    if damage == "wrapper":
        odd = rng.choice([{"model": weights, "x": {}}, {"a": weights, "b": weights}, {"model": []}, {"a": {"b": {"c": {"d": weights}}}},
                          {"model": {"x": torch.zeros(0, 2**40)}}, [weights], OrderedDict(ema=weights), {"state_dict": {1: torch.zeros(1)}},
                          {"module": weights, "step": torch.tensor(1)}, weights | {"x": [torch.zeros(2)] * 3}])  # fmt: skip
        torch.save(odd, file)
        return "pickle: odd wrapper"
    return damaged_archive(rng, file)


def damaged_archive(rng: Random, file: Path) -> str:
    pickled = b"\x80\x02" + p_dict(weight=p_tensor()) + b"."
    match rng.choice(["bomb", "twice", "records", "count", "program", "empty", "zip64", "order"]):
        case "bomb":
            torch_zip(file, b"\x80\x02" + b"N0" * 20_000_000 + b"}.", {"data/0": bytes(16)}, packed=True)
            return "archive: packed"
        case "twice":
            torch_zip(file, pickled, {"data/0": bytes(16)}, twice=rng.choice(["archive/DATA.PKL", "other/data.pkl"]))
        case "records":
            torch_zip(file, pickled, {"data/0": bytes(rng.choice([0, 15, 17, 5000]))})
        case "count":
            torch_zip(file, pickled, {"data/0": bytes(16)})
            data = bytearray(file.read_bytes())
            data[-14 + rng.randrange(12)] = rng.randrange(256)
            file.write_bytes(data)
        case "program":
            torch_zip(file, pickled, {"data/0": bytes(16), "constants.pkl": b"\x80\x02)."})
        case "empty":
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr(rng.choice(["archive/x", "data.pkl", "../../x", "/"]), b"")
        case "zip64":
            torch_zip(file, pickled, {"data/0": bytes(16)})
            data = file.read_bytes()
            end = data.rfind(b"PK\x05\x06")
            locator = b"PK\x06\x07" + struct.pack("<IQI", 0, rng.choice([0, len(data), 2**63]), 1)
            file.write_bytes(data[:end] + locator + data[end : end + 8] + b"\xff" * 12 + data[end + 20 :])
        case _:
            torch_zip(file, pickled, {"data/0": bytes(16), "byteorder": rng.choice([b"big", b"", b"\xff" * 100])})
    return "archive: records"


# Folders and everything else ---------------------------------------------------------


def damaged_index(rng: Random, folder: Path, sound: Sound) -> str:
    folder.mkdir()
    header, size = safetensors_header(sound.specs["dit"], {})
    write_safetensors(folder / "a.safetensors", header, size, {})
    index = {"metadata": {"total_size": 1}, "weight_map": {key: "a.safetensors" for key in sound.specs["dit"]}}
    key = rng.choice(list(index["weight_map"]))
    damage = rng.choice(["bytes", "value", "value", "outside", "outside", "names", "several", "lost"])
    if damage == "value":
        index = replace_somewhere(index, rng)
    elif damage == "outside":
        index["weight_map"][key] = rng.choice([
            "/etc/passwd", "../a.safetensors", "..\\a.safetensors", "x/../../a", "C:\\a", "//host/a", "a.safetensors/../../x",
            "\0", "a\0.safetensors", "", ".", "a" * 5000, "/dev/zero", "a.safetensors\n", "~/x"])  # fmt: skip
    elif damage == "names":
        index["weight_map"][nasty_name(rng)] = "a.safetensors"
    elif damage == "lost":
        del index["weight_map"][key]
        index["weight_map"]["not.there"] = "a.safetensors"
    text = to_json(index).encode("utf-8", "surrogatepass")
    if damage == "bytes":
        _, text = damage_bytes(text, rng, len(text))
    (folder / "model.safetensors.index.json").write_bytes(text)
    if damage == "several":
        (folder / "other.safetensors.index.json").write_bytes(to_json(replace_somewhere(index, rng)).encode("utf-8", "replace"))
    return f"index: {damage}"


def something_else(rng: Random, file: Path, sound: Sound) -> str:
    name, data = rng.choice([
        ("a web page", b"<!DOCTYPE html><html><body>secret"), ("a pointer", b"version https://git-lfs.github.com/spec/v1\noid"),
        ("JSON", b'{"secret": 1}'), ("a password file", b"root:x:0:0:secret:/root:/bin/sh\n" * 20), ("zeros", bytes(10_000)),
        ("nothing", b""), ("one byte", b"\x80"), ("magic alone", rng.choice([b"GGUF", b"PK\x03\x04", b"\x80\x02", b"PK"])),
        ("an empty archive", b"PK\x05\x06" + bytes(18)), ("noise", rng.randbytes(3000)), ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(50)),
    ])  # fmt: skip
    file.write_bytes(data)
    return f"instead: {name}"


CONTAINERS: dict[str, tuple[float, Callable[[Random, Path, Sound], str]]] = {
    "safetensors": (0.42, damaged_safetensors), "gguf": (0.23, damaged_gguf), "pickle": (0.22, damaged_pickle),
    "index": (0.1, damaged_index), "other": (0.03, something_else),
}  # fmt: skip
_ENDINGS = {"safetensors": ".safetensors", "gguf": ".gguf", "pickle": ".pth", "index": "", "other": ""}


def make_case(number: int, seed: int, folder: Path, sound: Sound) -> Case:
    """The same number and seed give the same file, whatever came before it."""
    rng = Random(f"{seed}/{number}")
    weights = [share for share, _ in CONTAINERS.values()]
    (container,) = rng.choices(list(CONTAINERS), weights)
    endings = list(_ENDINGS.values())
    ending = _ENDINGS[container] if rng.random() < 0.9 else rng.choice([*endings, ".SAFETENSORS", ".PT", ".json"])
    path = folder / f"{number}{ending}"
    return Case(container, CONTAINERS[container][1](rng, path, sound), path)
