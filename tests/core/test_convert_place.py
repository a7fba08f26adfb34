"""What a conversion may replace or remove: what is provably its own, and nothing else."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wan_core
from wan_core.__main__ import main
from wan_core.errors import WanError
from wan_core.files import place
from wan_core.files.place import read_mark
from wan_core.tools.convert import convert
from wan_core.tools.tiny import TinySizes, write_tiny

ROOT = Path(__file__).resolve().parents[2]
SIZES = TinySizes(dim=128, ffn_dim=256, layers=2, text_dim=64, text_layers=1, text_attention=64, text_ffn=96)
NAMES = {"bf16": "x.safetensors", "gguf:Q8_0": "x.gguf", "official": "x", "diffusers": "x"}


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    write_tiny(folder, "t2v-A14B", layout="comfyui", sizes=SIZES)
    return folder


@pytest.fixture(scope="module")
def dit(comfyui: Path) -> Path:
    return next((comfyui / "diffusion_models").glob("*high*"))


@pytest.fixture(scope="module")
def text(comfyui: Path) -> Path:
    return next((comfyui / "text_encoders").iterdir())


def contents(folder: Path) -> dict[str, str]:
    """Every entry below a folder: what links point to, and digests of files."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def foreign_file(target: Path, ours: Path) -> None:
    target.write_text("precious")


def foreign_safetensors(target: Path, ours: Path) -> None:
    save_file({"a": torch.zeros(3)}, target, metadata={"format": "pt"})


def foreign_folder(target: Path, ours: Path) -> None:
    (target / "deep").mkdir(parents=True)
    (target / "deep/thesis.txt").write_text("precious")


def folder_of_single_files(target: Path, ours: Path) -> None:
    """Each was converted, but nobody said that they are one folder."""
    target.mkdir()
    convert(ours, target / "one.safetensors", "bf16")


def folder_with_a_note(target: Path, ours: Path) -> None:
    convert(ours, target, "official")
    (target / "notes.txt").write_text("precious")


def folder_with_an_edited_config(target: Path, ours: Path) -> None:
    convert(ours, target, "official")
    (target / "config.json").write_text((target / "config.json").read_text().replace("{", "{\n", 1))


def folder_with_a_link(target: Path, ours: Path) -> None:
    convert(ours, target, "diffusers")
    (target / "config.json").rename(target.parent / "config.json")
    (target / "config.json").symlink_to(target.parent / "config.json")


def link_to_a_file(target: Path, ours: Path) -> None:
    (target.parent / "real").write_text("precious")
    target.symlink_to(target.parent / "real")


def link_to_ours(target: Path, ours: Path) -> None:
    convert(ours, target.parent / "real.safetensors", "bf16")
    target.symlink_to(target.parent / "real.safetensors")


def dangling_link(target: Path, ours: Path) -> None:
    target.symlink_to(target.parent / "nowhere")


def pipe(target: Path, ours: Path) -> None:
    os.mkfifo(target)


FOREIGN = (foreign_file, foreign_safetensors, foreign_folder, folder_of_single_files, folder_with_a_note,
           folder_with_an_edited_config, folder_with_a_link, link_to_a_file, link_to_ours, dangling_link,
           pipe)  # fmt: skip


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
def test_what_is_not_ours_is_never_replaced(dit: Path, tmp_path: Path, to: str, make, capsys: pytest.CaptureFixture):
    target = tmp_path / NAMES[to]
    make(target, dit)
    before = contents(tmp_path)
    for flags in ([], ["--overwrite"]):
        assert main(["convert", str(dit), str(target), "--to", to, "--quiet", *flags]) == 2
        assert "is there already" in capsys.readouterr().err
        assert contents(tmp_path) == before


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("first", NAMES)
def test_ours_is_replaced_when_asked(dit: Path, tmp_path: Path, first: str, to: str):
    """Also a folder by a file and a file by a folder."""
    target = tmp_path / "x"
    convert(dit, target, first)
    with pytest.raises(WanError, match="is there already"):
        convert(dit, target, to)
    convert(dit, target, to, overwrite=True)
    fresh = tmp_path / "fresh"
    convert(dit, fresh, to)
    made = contents(target) if target.is_dir() else contents(tmp_path)["x"]
    assert made == (contents(fresh) if fresh.is_dir() else contents(tmp_path)["fresh"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "x"]


def test_an_empty_folder_is_nobodys(dit: Path, tmp_path: Path):
    (tmp_path / "x").mkdir()
    with pytest.raises(WanError, match="is there already"):
        convert(dit, tmp_path / "x", "official")
    convert(dit, tmp_path / "x", "official", overwrite=True)
    wan_core.load_dit(tmp_path / "x")


def test_a_pth_is_ours_too_and_torch_reads_it(text: Path, tmp_path: Path):
    target = tmp_path / "umt5.pth"
    convert(text, target, "official")
    assert read_mark(target) == {"to": "official"}
    plain = torch.load(target, weights_only=True)
    mapped = torch.load(target, weights_only=True, mmap=True)
    assert plain.keys() == mapped.keys() and all(torch.equal(plain[key], mapped[key]) for key in plain)
    assert not any("wan_core" in key for key in plain)
    convert(text, target, "official", overwrite=True)
    torch.save(plain, target)  # by somebody else
    with pytest.raises(WanError, match="is not replaced"):
        convert(text, target, "official", overwrite=True)


# The source and the target -------------------------------------------------------


def test_the_source_is_no_target(dit: Path, tmp_path: Path):
    source = tmp_path / "source.safetensors"
    convert(dit, source, "bf16")
    convert(dit, tmp_path / "folder", "official")
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "linked").symlink_to(tmp_path / "folder")
    index = tmp_path / "folder/diffusion_pytorch_model.safetensors.index.json"
    shard = next((tmp_path / "folder").glob("*.safetensors"))
    before = contents(tmp_path)
    pairs = [
        (source, source),
        (source, tmp_path / "hard.safetensors"),
        (source, tmp_path / "." / "source.safetensors"),
        (tmp_path / "folder", tmp_path / "folder"),
        (tmp_path / "folder", shard),
        (index, tmp_path / "folder"),
        (index, tmp_path / "folder/made.safetensors"),
        (shard, tmp_path / "folder"),
        (tmp_path / "folder", tmp_path / "folder/deep/made"),
        (tmp_path / "linked", tmp_path / "folder/made"),
        (tmp_path / "folder", tmp_path / "linked/made"),
        (source, tmp_path),
        (source, Path(tmp_path.anchor)),
    ]
    for given, target in pairs:
        with pytest.raises(WanError):
            convert(given, target, "bf16", overwrite=True)
        assert contents(tmp_path) == before, (given, target)


def test_shards_that_are_links_are_the_source_too(dit: Path, tmp_path: Path):
    """As in a download cache: names that point to blobs elsewhere."""
    convert(dit, tmp_path / "blob.safetensors", "bf16")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").symlink_to(tmp_path / "blob.safetensors")
    before = contents(tmp_path)
    with pytest.raises(WanError, match="is what is to be converted"):
        convert(tmp_path / "model", tmp_path / "blob.safetensors", "fp32", overwrite=True)
    assert contents(tmp_path) == before


# Unfinished files ----------------------------------------------------------------


@pytest.mark.parametrize("to", NAMES)
def test_foreign_part_files_stay(dit: Path, tmp_path: Path, to: str):
    target = tmp_path / NAMES[to]
    part = target.with_name(target.name + ".part")
    second = target.with_name(target.name + ".2.part")
    part.write_text("chapter one")
    (second / "deep").mkdir(parents=True)
    (second / "thesis.txt").write_text("chapter two")
    before = contents(tmp_path)
    convert(dit, target, to)
    assert {
        key: value
        for key, value in contents(tmp_path).items()
        if not key.startswith(target.name + "/") and key != target.name
    } == before


KILLED = """
import os, signal, sys
from wan_core.tools.convert import convert
def kill(name, error):
    if name.startswith("blocks.1"):
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], sys.argv[3], on_tensor=kill)
"""


@pytest.mark.parametrize("to", ["bf16", "gguf:Q8_0", "official", "diffusers", "official text"])
def test_what_a_killed_run_left_goes(dit: Path, text: Path, tmp_path: Path, to: str):
    source, to, target = (text, "official", tmp_path / "x.pth") if "text" in to else (dit, to, tmp_path / NAMES[to])
    code = KILLED if source == dit else KILLED.replace("blocks.1", "blocks.0.ffn")
    ran = subprocess.run([sys.executable, "-c", code, source, target, to], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{target.name}.part"]
    convert(source, target, to)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("to", ["bf16", "official"])
def test_an_unfinished_folder_with_something_else_in_it_stays(dit: Path, tmp_path: Path, to: str):
    target = tmp_path / "x"
    part = tmp_path / "x.part"
    ran = subprocess.run([sys.executable, "-c", KILLED, dit, target, "official"], cwd=ROOT, capture_output=True)
    assert ran.returncode == -signal.SIGKILL
    (part / "notes.txt").write_text("precious")
    before = contents(part)
    convert(dit, target, to)
    assert contents(part) == before


def test_two_runs_do_not_take_each_others_files(dit: Path, tmp_path: Path):
    target, go = tmp_path / "x.safetensors", tmp_path / "go"
    waiting = """
import pathlib, sys, time
from wan_core.tools.convert import convert
def wait(name, error):
    if not pathlib.Path(sys.argv[3]).exists():
        print(flush=True)
    while not pathlib.Path(sys.argv[3]).exists():
        time.sleep(0.01)
convert(sys.argv[1], sys.argv[2], "bf16", on_tensor=wait)
"""
    with subprocess.Popen([sys.executable, "-c", waiting, dit, target, go], cwd=ROOT, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(WanError, match="is being written by another run"):
            convert(dit, target, "bf16")
        go.touch()
    assert other.returncode == 0
    wan_core.load_dit(target)


# Failures ------------------------------------------------------------------------


def fail(number: int):
    def on_tensor(name: str, error: float | None) -> None:
        raise OSError(number, os.strerror(number))

    return on_tensor


@pytest.mark.parametrize("to", NAMES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_leaves_the_old_and_nothing_new(dit: Path, tmp_path: Path, to: str, number: int):
    target = tmp_path / "x"
    convert(dit, target, "official")
    before = contents(tmp_path)
    with pytest.raises(WanError, match=r"The disk is full|cannot be written \(Input/output"):
        convert(dit, target, to, overwrite=True, on_tensor=fail(number))
    assert contents(tmp_path) == before
    with pytest.raises(WanError):
        convert(dit, tmp_path / "new/deep/x", to, on_tensor=fail(number))
    assert contents(tmp_path) == before  # the folders made for it are gone too


@pytest.mark.parametrize("to", NAMES)
def test_a_failed_swap_leaves_the_old(dit: Path, tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "x"
    convert(dit, target, "official")
    before, rename = contents(tmp_path), os.rename

    def refuse(source: Path, place: Path) -> None:
        if str(source).endswith(".part"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, place)

    monkeypatch.setattr(place.os, "rename", refuse)
    with pytest.raises(WanError, match="Permission denied"):
        convert(dit, target, to, overwrite=True)
    assert contents(tmp_path) == before


def test_what_appears_meanwhile_stays(dit: Path, tmp_path: Path):
    target = tmp_path / "x.safetensors"

    def appear(name: str, error: float | None) -> None:
        target.write_text("precious")

    for overwrite in (False, True):
        with pytest.raises(WanError, match="is there already"):
            convert(dit, target, "bf16", overwrite=overwrite, on_tensor=appear)
        assert contents(tmp_path).keys() == {target.name} and target.read_text() == "precious"
        target.unlink()


@pytest.mark.parametrize("to", ["bf16", "official"])
def test_places_that_cannot_be_written_to(dit: Path, tmp_path: Path, to: str):
    (tmp_path / "file").write_text("precious")
    before = contents(tmp_path)
    for target in (tmp_path / "file/x", tmp_path / ("n" * 300), Path("/proc/x"), tmp_path / "new" / ("n" * 300)):
        with pytest.raises(WanError):
            convert(dit, target, to)
        assert contents(tmp_path) == before


def test_a_full_disk_while_a_pth_is_written(text: Path, tmp_path: Path):
    """The system itself refuses to write on: files of this process may not grow past 100 kB."""
    code = f"""
import resource
from wan_core.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
assert main(["convert", {str(text)!r}, {str(tmp_path / "x.pth")!r}, "--to", "official", "--quiet"]) == 2
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and "The disk is full" in ran.stderr, ran.stderr
    assert list(tmp_path.iterdir()) == []


NO_JSON = b"\x30" + bytes(7) + b'{"__metadata__": {"wan_core.convert": "no json"}}  '


@pytest.mark.parametrize(
    "damage", [b"", b"GGUF", b"PK\x03\x04", b"\xff" * 8, b"\x08" + bytes(7) + b"[1, 2, 3", NO_JSON]
)
def test_damaged_files_are_not_ours(tmp_path: Path, damage: bytes):
    (tmp_path / "x").write_bytes(damage)
    assert read_mark(tmp_path / "x") is None
