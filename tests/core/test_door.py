"""What is said at the door of foreign files: each kind of damage by name, and habits that are no damage."""

from __future__ import annotations

import json
import logging
import os
import resource
import struct
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.core.damaged_gguf import GGUF, gguf_entry
from tests.core.damaged_pickles import hostile_pickles, p_dict, p_tensor, torch_zip
from wan_core.errors import WanError
from wan_core.files.checkpoint import open_checkpoint
from wan_core.files.door import shown
from wan_core.files.storage import STORAGES
from wan_core.files.write import _string, _value
from wan_core.layouts.keys import block_of, count_blocks
from wan_core.loading.dit import load_dit, read_dit
from wan_core.loading.text import read_text_encoder
from wan_core.loading.vae import read_vae
from wan_core.lora.files import read_lora
from wan_core.tools.tiny import TinyModels, TinySizes, make_tiny
from wan_core.train.data import Frame, files_of, read_folder

SIZES = TinySizes(dim=128, ffn_dim=16, layers=3, text_dim=16, text_layers=2)


@pytest.fixture(scope="module")
def tiny() -> TinyModels:
    return make_tiny("t2v-A14B", sizes=SIZES)


def header_file(file: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file of any header: JSON text, or what becomes it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: str = "F32", shape: object = (2,), places: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": places}


def refused(path: Path, match: str, reader=open_checkpoint) -> str:
    """The message; it must be for a person, on one line, and come at once."""
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WanError, match=match) as caught:
        reader(path)
    assert time.process_time() - started < 2  # half of it on a machine that does nothing else
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
    message = str(caught.value)
    assert message.isprintable() and "cannot be understood" not in message
    return message


# Headers of safetensors ---------------------------------------------------------

DAMAGED = {
    "a list": [],
    "a text": "x",
    "an entry that is a list": {"a": [1]},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype a number": {"a": entry(dtype=32)},
    "dtype a list": {"a": entry(dtype=["F32"])},
    "shape a text": {"a": entry(shape="2")},
    "shape of texts": {"a": entry(shape=["2"])},
    "shape with a fraction": {"a": entry(shape=[2.0])},
    "shape with yes": {"a": entry(shape=[True, 2])},
    "shape negative": {"a": entry(shape=[-2])},
    "shape of 64 bits": {"a": entry(shape=[2**64])},
    "shape hidden by a zero": {"a": entry(shape=[0, 2**62], places=[0, 0])},
    "shape of 100": {"a": entry(shape=[1] * 100 + [2])},
    "places a number": {"a": entry(places=8)},
    "three places": {"a": entry(places=[0, 4, 8])},
    "places negative": {"a": entry(places=[-8, 0])},
    "places turned": {"a": entry(places=[8, 0])},
    "places of another size": {"a": entry(shape=[3])},
    "places over each other": {"a": entry(), "b": entry(places=[4, 12]), "c": entry(shape=[1], places=[12, 16])},
    "a hole": {"a": entry(), "b": entry(places=[12, 20])},
    "half a byte": {"a": entry("F4", [3], [0, 2])},
    "metadata a list": {"__metadata__": [], "a": entry()},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry()},
    "metadata nested": {"__metadata__": {"a": {"b": "c"}}, "a": entry()},
    "metadata with half a character": b'{"__metadata__":{"a":"\\ud800"},"a":' + json.dumps(entry()).encode() + b"}",
    "a name twice": b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}",
    "a name with control characters": {"a\n\x1b[31m": entry()},
    "a name with half a character": b'{"\\ud800":' + json.dumps(entry()).encode() + b"}",
    "a name too long": {"a" * 10_000: entry()},
    "not a number": b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
    "infinite": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
    "too large a fraction": b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
    "a number of 10,000 digits": b'{"a":{"dtype":"F32","shape":[' + b"9" * 10_000 + b'],"data_offsets":[0,8]}}',
    "deep lists": b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "deep objects": b'{"a":' * 300_000,
    "not UTF-8": b'{"\xff":1}',
    "cut": b'{"a":{"dtype":"F32"',
    "millions of lists": b'{"a":[' + b"[]," * 5_000_000 + b"[]]}",
    "no header": b"",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_headers_are_refused_at_once(damage: str, tmp_path: Path):
    header = DAMAGED[damage]
    places = (
        [one["data_offsets"] for one in header.values() if isinstance(one, dict) and "data_offsets" in one]
        if isinstance(header, dict)
        else []
    )
    ends = [place[1] for place in places if isinstance(place, (list, tuple)) and len(place) == 2]
    file = header_file(tmp_path / "x.safetensors", header, bytes(max([8, *ends])))
    refused(file, "truncated or corrupt")


@pytest.mark.parametrize("length", [2**31, 2**40, 2**63, 2**64 - 1])
def test_announced_gigabytes_are_not_read(length: int, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(1000))
    refused(file, f"its header claims {length} bytes of 1010")
    with file.open("r+b") as stream:  # as large as it says, without taking room
        stream.truncate(2**33)
    refused(file, "its header claims")


def test_sound_headers_of_every_kind_are_read(tmp_path: Path):
    """No metadata, metadata null, tensors in another order than their data, tensors without numbers, unknown parts."""
    header = {
        "__metadata__": None,
        "b": entry(places=[8, 16]),
        "a": {**entry(), "note": "x"},
        "none": entry(shape=[0, 5], places=[16, 16]),
        "one": entry(shape=[], places=[16, 20]),
    }
    data = struct.pack("<5f", 1, 2, 3, 4, 5)
    checkpoint = open_checkpoint(header_file(tmp_path / "x.safetensors", header, data))
    assert {key: checkpoint.tensor(key).tolist() for key in header if key != "__metadata__"} == {
        "b": [3, 4],
        "a": [1, 2],
        "none": [],
        "one": 5,
    }


def test_every_type_of_the_format_is_known(tmp_path: Path):
    """Read where PyTorch has it, as the library reads it; else named, and never called corrupt."""
    for name, storage in STORAGES.items():
        file = header_file(
            tmp_path / f"{name}.safetensors", {"x": entry(name, [8], [0, storage.bits])}, bytes([0] * storage.bits)
        )
        checkpoint = open_checkpoint(file)
        assert checkpoint.shapes == {"x": (8,)} and checkpoint.stored_bytes("x") == storage.bits
        if storage.dtype is None:
            with pytest.raises(WanError, match=f"holds x as {name} .*which this version does not read"):
                checkpoint.tensor("x")
        else:
            assert checkpoint.tensor("x").dtype is storage.dtype


@pytest.mark.parametrize("name", ["U16", "U32", "U64", "I64", "F4", "F6_E2M3", "C64", "BOOL"])
def test_weights_in_numbers_that_are_no_weights_are_named(name: str, tmp_path: Path):
    header = {"blocks.0.self_attn.q.weight": entry(name, [4, 4], [0, 2 * STORAGES[name].bits])}
    file = header_file(tmp_path / "x.safetensors", header, bytes(2 * STORAGES[name].bits))
    message = refused(file, f"holds blocks.0.self_attn.q.weight as {name}")
    assert "corrupt" not in message


def test_a_type_of_tomorrow_is_named(tmp_path: Path):
    file = header_file(tmp_path / "x.safetensors", {"a": entry("F3_E1M1")}, bytes(8))
    assert "corrupt" not in refused(file, "holds a as F3_E1M1, which the safetensors format did not have")
    refused(header_file(tmp_path / "y.safetensors", {"a": entry("<b>\n")}, bytes(8)), "a type without a proper name")


# Whatever the name ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["DIT.SAFETENSORS", "dit", "dit.bin", "dit.pth", "dit.ckpt.part", "dit.sft", "dit.gguf"]
)
def test_the_first_bytes_tell_what_a_file_is(name: str, tiny: TinyModels, tmp_path: Path):
    save_file(tiny.experts[0], tmp_path / name)
    assert read_dit(tmp_path / name).config == tiny.dit
    assert read_dit(tmp_path).config == tiny.dit  # the only checkpoint of its folder


@pytest.mark.parametrize("name", ["DIT.PTH", "dit", "dit.safetensors", "dit.pt"])
@pytest.mark.parametrize("newer", [True, False])
def test_so_do_those_of_pickles(name: str, newer: bool, tiny: TinyModels, tmp_path: Path):
    torch.save(tiny.experts[0], tmp_path / name, _use_new_zipfile_serialization=newer)
    dit = load_dit(tmp_path / name, dtype=torch.float32)
    assert all(torch.equal(value, tiny.experts[0][key]) for key, value in dit.state_dict().items())


def gguf_dit(file: Path, weights: dict[str, torch.Tensor]) -> Path:
    from tests.core.quant_files import write_gguf

    write_gguf(file, weights, lambda key, tensor: "F32")
    return file


@pytest.mark.parametrize("name", ["dit", "DIT.GGUF", "dit.safetensors"])
def test_so_do_those_of_gguf(name: str, tiny: TinyModels, tmp_path: Path):
    gguf_dit(tmp_path / "x.gguf", tiny.experts[0]).rename(tmp_path / name)
    assert read_dit(tmp_path / name).config.layers == SIZES.layers
    assert read_dit(tmp_path).config.layers == SIZES.layers


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>secret", "web page"),
        (b"\n <HTML>secret", "web page"),
        (b"<?xml secret?>", "XML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:secret", "Git LFS pointer"),
        (b'{"secret": 1}' * 9, "JSON"),
        (b"root:x:0:0:secret:/root:/bin/sh\n", "a text"),
        (b"\x89PNG\r\n\x1a\nsecret", "picture"),
        (b"\x1f\x8bsecret12345", "packed archive"),
        (b"\x00\x01secret\xff\xff", "unknown kind"),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".gguf", ""])
def test_other_files_are_named_without_quoting_them(content: bytes, said: str, ending: str, tmp_path: Path):
    (tmp_path / f"x{ending}").write_bytes(content)
    message = refused(tmp_path / f"x{ending}", f"is neither safetensors.*{said}")
    assert "secret" not in message and "root:" not in message


def test_paths_are_shown_on_one_line(tmp_path: Path):
    for name in ("a\nb\x1b[31m.safetensors", "gone\u202e\n"):
        path = tmp_path / name
        if "gone" not in name:
            path.write_bytes(b"x")
        message = refused(path, "truncated or corrupt|No such file")
        assert r"\n" in message
    assert shown("\udcff\x00é") == r"\udcff\x00é"
    refused(Path("a\0b"), r"No such file or folder: a\\x00b")


def test_what_is_no_regular_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no regular file")
    refused(Path("/dev/zero"), "is no regular file")


def test_what_nobody_thought_of_is_a_readable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    for error in (
        RecursionError(),
        MemoryError(),
        KeyError("secret"),
        AttributeError(),
        AssertionError(),
        OSError(5, "I/O"),
    ):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("wan_core.files.checkpoint.understand", fail)
        with pytest.raises(WanError, match=r"x\.safetensors.*(cannot be understood|cannot be read)") as caught:
            open_checkpoint(tmp_path / "x.safetensors")
        assert "secret" not in str(caught.value)


# Indexes ---------------------------------------------------------------------------


def sharded(folder: Path, names: tuple[str, ...] = ("a.safetensors", "b.safetensors")) -> dict[str, str]:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        save_file({f"t{number}": torch.full((2,), float(number))}, folder / name)
    return {f"t{number}": name for number, name in enumerate(names)}


def write_index(file: Path, weight_map: object, encoding: str = "utf-8") -> Path:
    file.write_bytes(json.dumps({"metadata": {}, "weight_map": weight_map}).encode(encoding))
    return file


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_indexes_as_windows_writes_them(encoding: str, tmp_path: Path):
    found = sharded(tmp_path, ("parts/a.safetensors", "parts/b.safetensors"))
    write_index(
        tmp_path / "x.safetensors.index.json", {key: name.replace("/", "\\") for key, name in found.items()}, encoding
    )
    assert open_checkpoint(tmp_path).tensor("t1").tolist() == [1, 1]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../a.safetensors",
        "..\\a.safetensors",
        "x/../../a.safetensors",
        "C:\\a.safetensors",
        "C:a",
        "\\\\host\\a",
        "//host/a",
        ".",
    ],
)
def test_an_index_stays_inside_its_folder(name: str, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    sharded(tmp_path)
    write_index(folder / "x.index.json", {"t0": name})
    message = refused(folder, "names shards outside its own folder")
    assert "passwd" not in message


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 1}}',
        b"hunter2",
        b"\xff\xfe\xff",
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": ' + b"[" * 300_000,
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "\\u0000"}}',
        b'{"weight_map": {"a": ""}}',
    ],
)
def test_damaged_indexes(content: bytes, tmp_path: Path):
    (tmp_path / "x.index.json").write_bytes(content)
    assert "hunter" not in refused(tmp_path, "is not a checkpoint index").replace(str(tmp_path), "")


def test_of_several_indexes_the_complete_one_is_chosen_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = sharded(tmp_path)
    write_index(tmp_path / "a.safetensors.index.json", {"t0": "gone.safetensors"})
    (tmp_path / "b.safetensors.index.json").write_text("broken")
    write_index(tmp_path / "c.safetensors.index.json", found)
    with caplog.at_level(logging.WARNING):
        assert set(open_checkpoint(tmp_path).tensors) == set(found)
    assert "c.safetensors.index.json is used, the one that is complete" in caplog.text
    (tmp_path / "c.safetensors.index.json").unlink()
    refused(tmp_path, "lacks 1 of 1 shards: gone.safetensors")


def test_a_tensor_comes_from_the_shard_that_the_index_names(tmp_path: Path):
    save_file({"t": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"t": torch.ones(1), "b": torch.zeros(1)}, tmp_path / "b.safetensors")
    write_index(tmp_path / "x.index.json", {"t": "a.safetensors", "b": "b.safetensors"})
    assert open_checkpoint(tmp_path).tensor("t").item() == 0


# Pickles ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile_pickles())
def test_hostile_pickles_cost_nothing_and_run_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch_zip(tmp_path / "x.pth", b"\x80\x02" + hostile_pickles()[name] + b".", {"data/0": bytes(16)})
    try:
        refused(tmp_path / "x.pth", "refused|truncated or corrupt|no tensors by name")
    except pytest.fail.Exception:
        assert name in HARMLESS
    assert not (tmp_path / "ran-code").exists()


HARMLESS = {"wrapped deeply", "block far away", "holds itself", "key a number", "allocates: builtins.complex"}


@pytest.mark.parametrize("packed", [True, False])
def test_a_bomb_in_an_archive_is_not_unpacked(packed: bool, tmp_path: Path):
    count = 100_000_000 if packed else 1_000_000
    torch_zip(
        tmp_path / "x.pth",
        b"\x80\x02" + b"}" + b"q\x00" * count + p_dict(weight=p_tensor()) + b".",
        {"data/0": bytes(16)},
        packed=packed,
    )
    refused(tmp_path / "x.pth", "was refused.*(compressed archive|instructions)")


@pytest.mark.parametrize(
    ("order", "said"), [(b"big", "big-endian"), (b"", "order of its bytes"), (bytes(10**6), "order")]
)
def test_the_order_of_bytes_in_an_archive(order: bytes, said: str, tmp_path: Path):
    """PyTorch's reader ends the process on the first of these."""
    torch_zip(
        tmp_path / "x.pth", b"\x80\x02" + p_dict(weight=p_tensor()) + b".", {"data/0": bytes(16), "byteorder": order}
    )
    refused(tmp_path / "x.pth", said)


@pytest.mark.parametrize("wrapper", ["ema", "module", "model_state", "model", "state_dict", "anything at all"])
@pytest.mark.parametrize("beside", [False, True])
def test_one_level_of_wrapping(wrapper: str, beside: bool, tiny: TinyModels, tmp_path: Path):
    layer = torch.nn.Linear(2, 2)
    optimiser = torch.optim.Adam(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimiser.step()
    extra = {"optimizer": optimiser.state_dict(), "step": torch.tensor(7), "epoch": 3, "best": 0.5} if beside else {}
    torch.save({wrapper: OrderedDict(tiny.experts[0]), **extra}, tmp_path / "x.pt")
    assert read_dit(tmp_path / "x.pt").config == tiny.dit
    assert set(open_checkpoint(tmp_path / "x.pt").tensors) == set(tiny.experts[0])


def test_of_several_sets_of_weights_one_is_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    torch.save({"ema": {"a": torch.ones(1)}, "model": {"a": torch.zeros(1)}}, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").tensor("a").item() == 0
    assert "several sets of weights; model is used. Others: ema" in caplog.text


# GGUF ------------------------------------------------------------------------------------


def gguf_file(file: Path, **parts: object) -> Path:
    made = GGUF(pairs=[_string("general.architecture") + _value("wan")], entries=[gguf_entry("a", [8], 0, 0)], size=32)
    for name, value in parts.items():
        setattr(made, name, [*getattr(made, name), *value] if isinstance(value, list) else value)
    made.write(file)
    return file


GGUFS = {
    **{f"{name} {count}": {name: count} for name in ("tensors", "fields")
       for count in (10, 2**31, 2**62, 2**63, 2**64 - 1)},
    **{f"alignment {value}": {"pairs": [_string("general.alignment") + data]} for value, data in {
        "0": _value(0), "3": _value(3), "text": _value("32"), "yes": _value(True), "fraction": _value(32.0),
        "negative": struct.pack("<Ii", 5, -32), "2^63": struct.pack("<IQ", 10, 2**63), "array": _value([32])}.items()},
    **{f"{count} dimensions": {"entries": [gguf_entry("x", [8], 0, 32, count)]} for count in (17, 2**20, 2**32 - 1)},
    **{f"shape {shape}": {"entries": [gguf_entry("x", shape, 0, 0)]}
       for shape in ([2**63], [2**62, 2**62], [0, 2**62], [2**40])},
    **{f"place {place}": {"entries": [gguf_entry("x", [8], 0, place)]} for place in (0, 16, 2**40, 2**64 - 1)},
    **{f"text of {length}": {"pairs": [struct.pack("<Q", length) + b"x"]} for length in (100, 2**31, 2**63, 2**64 - 1)},
    **{f"array of {count} of kind {kind}": {"pairs": [_string("x") + struct.pack("<IIQ", 9, kind, count)]}
       for count in (2**31, 2**62, 2**64 - 1) for kind in (0, 8, 9, 12, 13, 2**32 - 1)},
    "arrays without end": {"pairs": [_string("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000]},
    "unknown kind": {"pairs": [_string("x") + struct.pack("<I", 99)]},
    "a name twice": {"entries": [gguf_entry("a", [0], 0, 32)]},
    "a field twice": {"pairs": [_string("general.architecture") + _value("wan")]},
    "name not UTF-8": {"entries": [gguf_entry(b"\xff", [0], 0, 32)]},
    "name with control characters": {"entries": [gguf_entry("a\x1b", [0], 0, 32)]},
    "name too long": {"entries": [gguf_entry("a" * 10_000, [0], 0, 32)]},
    "text not UTF-8": {"pairs": [_string("x") + _value(b"\xff")]},
    "rows that are no blocks": {"entries": [gguf_entry("x", [33], 8, 0)]},
    "a shape of other numbers": {"pairs": [_string("comfy.gguf.orig_shape.a") + _value([3, 3])]},
    "a shape of texts": {"pairs": [_string("comfy.gguf.orig_shape.a") + _value(["8"])]},
    "a shape negative": {"pairs": [_string("comfy.gguf.orig_shape.a") + _value([-2, -4])]},
}  # fmt: skip


@pytest.mark.parametrize("damage", GGUFS)
def test_damaged_gguf_headers(damage: str, tmp_path: Path):
    refused(gguf_file(tmp_path / "x.gguf", **GGUFS[damage]), "truncated or corrupt")


def test_gguf_versions_and_types_are_named(tmp_path: Path):
    refused(gguf_file(tmp_path / "x.gguf", version=3 << 24), "big-endian file.; expected 2 or 3")
    refused(gguf_file(tmp_path / "x.gguf", entries=[gguf_entry("x", [256], 16, 32)]), "quantisation type IQ2_XXS")
    assert open_checkpoint(gguf_file(tmp_path / "x.gguf")).shapes == {"a": (8,)}


# Numbers in keys -----------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["99999999", "3000000000", "9" * 900, "7"])
def test_a_keys_number_does_not_decide_the_layers(number: str, tiny: TinyModels, tmp_path: Path):
    one = torch.zeros(1)
    save_file(tiny.experts[0] | {f"blocks.{number}.norm3.weight": one}, tmp_path / "dit.safetensors")
    refused(tmp_path / "dit.safetensors", r"blocks\.3|norm3", load_dit)
    save_file(tiny.text_weights | {f"blocks.{number}.norm1.weight": one}, tmp_path / "text.safetensors")
    with pytest.raises(WanError):
        read_text_encoder(tmp_path / "text.safetensors", tiny.spiece)
    lora = {
        f"diffusion_model.blocks.{n}.self_attn.q.lora_{side}.weight": torch.zeros(shape)
        for n in ("0", number)
        for side, shape in (("down", (4, 128)), ("up", (128, 4)))
    }
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(tiny.experts[0], tmp_path / "base.safetensors")
    found = read_lora(tmp_path / "lora.safetensors", read_dit(tmp_path / "base.safetensors"))
    assert list(found.parts) == ["blocks.0.self_attn.q.weight"] and len(found.unmatched) == 2


@pytest.mark.parametrize("number", [5, 98, 77_777_777])
def test_nor_those_of_a_vae(number: int, tiny: TinyModels, tmp_path: Path):
    weights = dict(tiny.vae_weights)
    for key in [key for key in weights if key.startswith("encoder.downsamples.2.")]:
        weights[key.replace(".2.", f".{number + 100}.", 1)] = weights.pop(key)
    save_file(weights, tmp_path / "vae.safetensors")
    refused(tmp_path / "vae.safetensors", "dimensions cannot be read", read_vae)


def test_block_numbers_are_plain_and_without_gaps():
    numbers = ("0", "12", "01", "٣", "-1", "", "1e3", "9" * 2000)
    assert [block_of(f"blocks.{n}.x") for n in numbers] == [0, 12, *[None] * 6]
    assert count_blocks(["blocks.1.x", "blocks.0.y", "other.7.z"]) == 2 and count_blocks([]) == 0
    with pytest.raises(ValueError, match=r"blocks\.1 .the file goes on with blocks\.2"):
        count_blocks(["blocks.0.x", "blocks.2.x"])
    with pytest.raises(ValueError, match="600 of them"):
        count_blocks(f"blocks.{n}.x" for n in range(600))


@pytest.mark.parametrize("reader", [read_dit, read_vae, read_text_encoder])
def test_dimensions_of_zero_are_refused(reader, tiny: TinyModels, tmp_path: Path):
    weights = {read_dit: tiny.experts[0], read_vae: tiny.vae_weights, read_text_encoder: tiny.text_weights}[reader]
    for key in list(weights)[:40]:
        save_file(
            weights | {key: weights[key][:0].contiguous() if weights[key].ndim else weights[key]},
            tmp_path / "x.safetensors",
        )
        with pytest.raises(WanError):
            reader(tmp_path / "x.safetensors")


# Tables of clips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["video", "start_image", "end_image"])
@pytest.mark.parametrize("name", ["/etc/passwd", "../x.png", "a/../../x.png", "a\0.png"])
def test_a_table_of_clips_stays_inside_its_folder(column: str, name: str, tmp_path: Path):
    folder = tmp_path / "clips"
    folder.mkdir()
    row = {"video": "a.mp4", "prompt": "p", "start_image": "", "end_image": "", column: name}
    (folder / "metadata.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    with pytest.raises(WanError, match="not inside|cannot be read"):
        read_folder(folder, Frame(32, 32, 5))
    with pytest.raises(WanError, match="not inside|cannot be read"):
        files_of(folder)
    if "\0" not in name:
        assert len(read_folder(folder, Frame(32, 32, 5), root=Path(folder.anchor))) == 1


def test_paths_inside_the_folder_may_be_written_in_any_way(tmp_path: Path):
    lines = [f"{name},p" for name in ("a.mp4", "./b/../a.mp4", "b/a.mp4", tmp_path / "a.mp4")]
    (tmp_path / "metadata.csv").write_text("\n".join(["video,prompt", *lines]))
    assert len(read_folder(tmp_path, Frame(32, 32, 5))) == 4


def test_load_file_agrees_with_the_reader(tiny: TinyModels, tmp_path: Path):
    """What the library writes is what we read, to the bit."""
    save_file(tiny.vae_weights, tmp_path / "x.safetensors", metadata={"a": "b"})
    ours = open_checkpoint(tmp_path / "x.safetensors")
    assert ours.metadata == {"a": "b"}
    assert all(torch.equal(ours.tensor(key), value) for key, value in load_file(tmp_path / "x.safetensors").items())
