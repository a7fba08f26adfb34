"""Files as they should not be: every way to damage a checkpoint that we know of, drawn at random from a seed.

Each container has its sound files, and damages of three depths: of its bytes, of its structure (a header that was
written again with one value or more replaced by what does not belong there), and whole files that somebody made on
purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.core.damaged_gguf import damaged_gguf
from tests.core.damaged_pickles import damaged_pickle
from tests.core.damaged_safetensors import damaged_safetensors, safetensors_header, write_safetensors
from tests.core.damaged_values import Random, Sound, damage_bytes, nasty_name, replace_somewhere, to_json


@dataclass(frozen=True)
class Case:
    """A damaged file or folder, and in which way it is damaged."""

    container: str
    damage: str
    path: Path


def damaged_index(rng: Random, folder: Path, sound: Sound) -> str:
    folder.mkdir()
    header, size = safetensors_header(sound.specs["dit"], {})
    write_safetensors(folder / "a.safetensors", header, size, {})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(sound.specs["dit"], "a.safetensors")}
    key = rng.choice(list(index["weight_map"]))
    damage = rng.choice(["bytes", "value", "value", "outside", "outside", "names", "several", "lost"])
    if damage == "value":
        index = replace_somewhere(index, rng)
    elif damage == "outside":
        index["weight_map"][key] = rng.choice(
            [
                "/etc/passwd",
                "../a.safetensors",
                "..\\a.safetensors",
                "x/../../a",
                "C:\\a",
                "//host/a",
                "a.safetensors/../../x",
                "\0",
                "a\0.safetensors",
                "",
                ".",
                "a" * 5000,
                "/dev/zero",
                "a.safetensors\n",
                "~/x",
            ]
        )
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
        (folder / "other.safetensors.index.json").write_bytes(
            to_json(replace_somewhere(index, rng)).encode("utf-8", "replace")
        )
    return f"index: {damage}"


def something_else(rng: Random, file: Path, sound: Sound) -> str:
    name, data = rng.choice(
        [
            ("a web page", b"<!DOCTYPE html><html><body>secret"),
            ("a pointer", b"version https://git-lfs.github.com/spec/v1\noid"),
            ("JSON", b'{"secret": 1}'),
            ("a password file", b"root:x:0:0:secret:/root:/bin/sh\n" * 20),
            ("zeros", bytes(10_000)),
            ("nothing", b""),
            ("one byte", b"\x80"),
            ("magic alone", rng.choice([b"GGUF", b"PK\x03\x04", b"\x80\x02", b"PK"])),
            ("an empty archive", b"PK\x05\x06" + bytes(18)),
            ("noise", rng.randbytes(3000)),
            ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(50)),
        ]
    )
    file.write_bytes(data)
    return f"instead: {name}"


CONTAINERS: dict[str, tuple[float, Callable[[Random, Path, Sound], str]]] = {
    "safetensors": (0.42, damaged_safetensors),
    "gguf": (0.23, damaged_gguf),
    "pickle": (0.22, damaged_pickle),
    "index": (0.1, damaged_index),
    "other": (0.03, something_else),
}
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
