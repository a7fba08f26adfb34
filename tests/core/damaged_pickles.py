"""Files of torch.save as they should not be, and pickles that somebody wrote on purpose."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from functools import cache
from pathlib import Path

import torch

from tests.core.damaged_values import Random, Sound, damage_bytes


def torch_zip(
    file: Path,
    pickled: bytes,
    records: dict[str, bytes] | None = None,
    *,
    packed: bool = False,
    twice: str | None = None,
) -> None:
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


def p_tensor(
    *,
    storage: str = "torch.FloatStorage",
    key: bytes = p_text("0"),
    count: int = 4,
    place: int = 0,
    size: tuple = (2, 2),
    stride: tuple = (2, 1),
    function: str = "torch._utils._rebuild_tensor_v2",
) -> bytes:
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
    copied = (
        b"]q\x00(" + b"K\x01" * 50_000 + b"e0" + b"".join(call("builtins.set", b"h\x00") + b"0" for _ in range(3_000))
    )
    made = {
        f"code: {name}": p_dict(weight=p_tensor(), x=call(name, p_text("touch ran-code")))
        for name in (
            "os.system",
            "posix.system",
            "builtins.eval",
            "builtins.exec",
            "subprocess.check_output",
            "torch.hub.load",
            "torch.load",
            "pickle.loads",
            "builtins.getattr",
            "numpy.load",
            "runpy._run_code",
            "webbrowser.open",
        )
    }
    made |= {
        f"allocates: {name}": p_dict(weight=p_tensor(), x=call(name, big))
        for name in (
            "builtins.bytearray",
            "__builtin__.bytearray",
            "torch.FloatTensor",
            "torch.Tensor",
            "torch.UntypedStorage",
            "torch.storage.UntypedStorage",
            "torch.FloatStorage",
            "torch.storage.TypedStorage",
            "builtins.complex",
        )
    }
    made |= {
        "storage too large": p_dict(weight=p_tensor(count=2**40)),
        "storage negative": p_dict(weight=p_tensor(count=-4)),
        "storage of another size": p_dict(weight=p_tensor(count=3)),
        "size too large": p_dict(weight=p_tensor(size=(2**30, 2**30))),
        "stride 0": p_dict(weight=p_tensor(size=(2**30, 2**30), stride=(0, 0))),
        "place outside": p_dict(weight=p_tensor(place=2**40)),
        "size negative": p_dict(weight=p_tensor(size=(-2, 2))),
        "size without numbers": p_dict(weight=p_tensor(size=(0, 2**60))),
        "stride negative": p_dict(weight=p_tensor(stride=(-2, 1))),
        "size of one, stride of two": p_dict(weight=p_tensor(size=(4,))),
        "many sizes": p_dict(weight=p_tensor(size=(1,) * 500, stride=(1,) * 500)),
        "no storage": p_dict(weight=p_tensor(key=p_text("7"))),
        "key outside": p_dict(weight=p_tensor(key=p_text("../../x"))),
        "key a number": p_dict(weight=p_tensor(key=p_int(0))),
        "odd storage": p_dict(weight=p_tensor(storage="os.system")),
        "quantised": p_dict(weight=p_tensor(function="torch._utils._rebuild_qtensor")),
        "sparse": p_dict(weight=p_tensor(function="torch._utils._rebuild_sparse_tensor")),
        "subclass": p_dict(weight=p_tensor(function="torch._utils._rebuild_wrapper_subclass")),
        "copied again and again": copied + weight,
        "deep tuples as a key": b"}" + b")" + b"\x85" * 300_000 + b"K\x01s",
        "deep lists": b"]" * 100_000 + b"a" * 99_999,
        "holds itself": b"}q\x00" + p_text("a") + b"h\x00s",
        "memo far away": b"}r\xff\xff\xff\xff",
        "text too long": b"X\xff\xff\xff\xffabc",
        "bytes too long": b"\x8e" + b"\xff" * 8,
        "frame too long": b"\x95" + b"\xff" * 8,
        "long number": b"\x8b\xff\xff\xff\x7f",
        "no mark": b"t",
        "empty": b"",
        "nothing to pop": b"0",
        "a list": b"]",
        "a number": b"K\x01",
        "none": b"N",
        "names are numbers": b"}K\x01" + p_tensor() + b"s",
        "names are tuples": b"}" + p_tuple(p_text("a")) + p_tensor() + b"s",
        "name with control characters": p_dict(**{"a\n\x1b": p_tensor()}),
        "name with half a character": p_dict(**{"\ud800": p_tensor()}),
        "name too long": p_dict(**{"a" * 100_000: p_tensor()}),
        "block far away": p_dict(
            **{
                "blocks.99999999.self_attn.q.weight": p_tensor(),
                "head.modulation": p_tensor(),
                "blocks.0.self_attn.q.weight": p_tensor(),
            }
        ),
        "wrapped deeply": p_dict(a=p_dict(b=p_dict(c=p_dict(d=p_dict(e=weight))))),
        "persistent number": b"}" + p_int(3) + b"Q",
        "persistent module": p_tuple(p_text("module"), p_global("os.system"), b"N", b"N") + b"Q",
        "instance": p_global("os.system") + b")\x81",
        "built": b"}" + p_dict(a=b"K\x01") + b"b",
        "many instructions": b"}" + b"N0" * 600_000,
        "stack global": p_text("os") + p_text("system") + b"\x93)R",
        "extension": b"\x82\x01",
        "reduce of none": b"N)R",
        "old instance": b"(ios\nsystem\n",
    }
    return made


def damaged_pickle(rng: Random, file: Path, sound: Sound) -> str:
    damage = rng.choice(
        [
            "bytes",
            "bytes",
            "hostile",
            "hostile",
            "hostile",
            "instructions",
            "archive",
            "older",
            "older hostile",
            "bare",
            "wrapper",
        ]
    )
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
        file.write_bytes(
            start + b"\x80\x02}." + pickled + keys + struct.pack("<q", rng.choice([4, 2**40, -1])) + bytes(16)
        )
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
        odd = rng.choice(
            [
                {"model": weights, "x": {}},
                {"a": weights, "b": weights},
                {"model": []},
                {"a": {"b": {"c": {"d": weights}}}},
                {"model": {"x": torch.zeros(0, 2**40)}},
                [weights],
                OrderedDict(ema=weights),
                {"state_dict": {1: torch.zeros(1)}},
                {"module": weights, "step": torch.tensor(1)},
                weights | {"x": [torch.zeros(2)] * 3},
            ]
        )
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
