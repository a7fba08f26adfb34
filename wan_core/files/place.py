"""Where what is written comes to lie: complete or not at all, and in the place of nothing that is not ours.

Ours is a file whose header (GGUF: a field; ``.pth``: a record of the zip) holds ``MARK``, and a folder in which such
files vouch for every entry, by name and, for small texts, by digest. Anything else is a user's and is never replaced
or removed, whatever was asked.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..errors import Hint, WanError
from .checkpoint import Checkpoint
from .kind import GGUF_MAGIC

MARK = "wan_core.convert"  # the header's entry; its value is JSON
_UNFINISHED = "wan_core.unfinished.json"  # in a folder that is being written
_HEADER_LIMIT = 100 * 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def mark(to: str, folder: Sequence[str] = (), texts: Mapping[str, str] | None = None) -> str:
    """The value of ``MARK``.

    Args:
        to: the format written.
        folder: the names of all files of the folder that the file is a part of.
        texts: of those that cannot carry a mark, name -> content.
    """
    digests = {name: _digest(text.encode("utf-8")) for name, text in (texts or {}).items()}
    return json.dumps({"to": to, **({"folder": sorted(folder), "texts": digests} if folder else {})})


def check_target(checkpoint: Checkpoint, source: Path, target: Path, *, overwrite: bool) -> None:
    """
    Raises:
        WanError: the target is the source, lies inside it or holds it, is a link, is there already, or, where it may
            be overwritten, is not ours.
    """
    try:
        _check_target(checkpoint, source, target, overwrite)
    except OSError as error:  # a name that the system refuses
        raise _refused(target, error) from error


def _check_target(checkpoint: Checkpoint, source: Path, target: Path, overwrite: bool) -> None:
    if not target.name:
        raise WanError(f"{target} names no file. Name one that is not there yet.")
    if target.is_symlink():
        raise WanError(
            f"{target} is there already, as a link to {os.readlink(target)}. Links are not replaced: name "
            "the place itself."
        )
    place = target.parent.resolve() / target.name
    read = {path.resolve() for path in (source, *checkpoint.files)}
    if place in read or any(_same(target, path) for path in read):
        raise WanError(
            f"{target} is there already and is what is to be converted: it cannot take its own place while "
            "it is read. Name another place."
        )
    if any(place in path.parents for path in read):
        raise WanError(f"{target} is there already and holds {source}, which is to be converted. Name another place.")
    folder = source if source.is_dir() else source.parent if source.suffix == ".json" else None
    if folder is not None and folder.resolve() in place.parents:
        raise WanError(f"{target} lies inside {folder}, which is to be converted. Name a place outside it.")
    _check_free(target, overwrite=overwrite)


def _check_free(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise WanError(f"{target} is there already.", Hint.OVERWRITE)
    if found := _foreign(target):
        raise WanError(
            f"{target} is there already and is not replaced: {found}. Only what this program converted is "
            "overwritten. Name another place, or remove it yourself."
        )


@contextmanager
def complete_or_nothing(target: Path, names: Sequence[str] = (), *, overwrite: bool) -> Iterator[Path]:
    """A place to write to, which becomes ``target`` when all went well, and vanishes when it did not.

    Args:
        names: of the files to be written where it is a folder, which exists when this yields; a file is empty.

    Raises:
        WanError: the disk is full, the place cannot be written to, or something has appeared at the target meanwhile.
            What was there before is there still.
    """
    with ExitStack() as undo:
        try:
            _make_parents(target.parent, undo)
            unfinished, lock = _claim(target, names, undo)
            yield unfinished
            _check_free(target, overwrite=overwrite)
            lock.close()
            if names:
                (unfinished / _UNFINISHED).unlink()
            _replace(unfinished, target)
            undo.pop_all()
        except BrokenPipeError:  # of who reads the report, not of the place
            raise
        except OSError as error:
            undo.close()
            raise _refused(target, error) from error


def _refused(target: Path, error: OSError) -> WanError:
    if error.errno in _FULL:
        return WanError(
            f"The disk is full ({error.strerror}): nothing is left of {target}. Make room, or name a "
            "place on another disk."
        )
    return WanError(
        f"{target} cannot be written ({error.strerror or error}): nothing is left of it. Name a place that "
        "can be written to."
    )


def _make_parents(folder: Path, undo: ExitStack) -> None:
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir()
        undo.callback(_remove_empty, one)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody has put something there
        folder.rmdir()


def _claim(target: Path, names: Sequence[str], undo: ExitStack) -> tuple[Path, IO[bytes]]:
    """A name beside the target that nobody has, made and locked; what a killed run of ours left goes first."""
    for number in range(1, 100):
        place = target.with_name(f"{target.name}{'' if number == 1 else f'.{number}'}.part")
        if os.path.lexists(place) and not _remove_leftover(place, target):
            continue
        try:
            place.mkdir() if names else place.touch(exist_ok=False)
        except FileExistsError:
            continue
        undo.callback(_remove_unfinished, place, names)
        note = place / _UNFINISHED if names else place
        if names:
            note.write_text(json.dumps({MARK: sorted(names)}), encoding="utf-8")
        stream = undo.enter_context(note.open("r+b"))
        _lock(stream)
        return place, stream
    raise WanError(
        f"{target.parent} has too many unfinished files named {target.name}.*.part that are not this "
        "program's. Remove them, or name another place."
    )


def _remove_leftover(place: Path, target: Path) -> bool:
    """Remove what a run of ours left that was killed; False where it is not provably that.

    Raises:
        WanError: the run goes on.
    """
    names = _unfinished_names(place)
    if names is None:
        return False
    with (place / _UNFINISHED if names else place).open("r+b") as stream:
        if not _lock(stream):
            raise WanError(
                f"{target} is being written by another run ({place.name}). Wait for it, or name another place."
            )
    _remove_unfinished(place, names)
    return True


def _unfinished_names(place: Path) -> list[str] | None:
    """The files that an unfinished folder of ours was to have, [] for a file of ours, None for what is foreign."""
    if place.is_symlink():
        return None
    if place.is_file():
        return None if read_mark(place) is None else []
    try:
        names = json.loads((place / _UNFINISHED).read_text(encoding="utf-8"))[MARK]
        ours = {*names, _UNFINISHED}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return list(names) if all(one.name in ours and _is_plain(one) for one in place.iterdir()) else None


def _remove_unfinished(place: Path, names: Sequence[str]) -> None:
    for one in [place / name for name in (*names, _UNFINISHED)] if names else [place]:
        with suppress(OSError):  # it may never have been made
            one.unlink()
    if names:
        _remove_empty(place)


def _lock(stream: IO[bytes]) -> bool:
    """Whether nobody else writes this file; where the system has no such locks, an open file cannot be removed."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _replace(made: Path, target: Path) -> None:
    """Put what is complete in the target's place, and then remove what was there: it has been shown to be ours."""
    if not target.is_dir() and not (made.is_dir() and target.exists()):
        os.replace(made, target)
        return
    old = next(name for number in itertools.count() if not os.path.lexists(name := _aside(target, number)))
    os.rename(target, old)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(old, target)
        raise
    _remove_ours(old)


def _aside(target: Path, number: int) -> Path:
    return target.with_name(f"{target.name}.old{number or ''}")


def _remove_ours(path: Path) -> None:
    if path.is_dir():
        for one in list(path.iterdir()):
            one.unlink()
        path.rmdir()
    else:
        path.unlink()


def _foreign(path: Path) -> str | None:
    """Why something is not provably ours, in words, or None where it is (an empty folder is as good)."""
    if path.is_dir():
        return _foreign_entries(path)
    return None if _is_plain(path) and read_mark(path) is not None else "it is not a file that this program converted"


def _foreign_entries(folder: Path) -> str | None:
    entries = sorted(folder.iterdir())
    marks = {one.name: read_mark(one) or {} for one in entries if _is_plain(one)}
    members = {name for name, said in marks.items() if name in _listed(said, "folder")}
    texts = {name: digest for name in members for name, digest in dict(_listed(marks[name], "texts")).items()}
    foreign = [one.name for one in entries if one.name not in members and not _is_text(one, texts.get(one.name))]
    if not foreign:
        return None
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    return f"it holds what this program did not write there ({', '.join(foreign[:3])}{more})"


def _listed(said: Mapping[str, Any], part: str) -> Any:
    found = said.get(part)
    if part == "texts":
        return found if isinstance(found, dict) else {}
    return found if isinstance(found, list) else []


def _is_text(path: Path, digest: object) -> bool:
    return digest is not None and _is_plain(path) and _digest(path.read_bytes()) == digest


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def read_mark(file: Path) -> dict[str, Any] | None:
    """What ``MARK`` says in a file's header, or None where it has none or cannot be read."""
    try:
        with file.open("rb") as stream:
            first = stream.read(8)
            text = _marked_in(file, stream, first)
        said = None if text is None else json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile, WanError):
        return None
    return said if isinstance(said, dict) else None


def _marked_in(file: Path, stream: IO[bytes], first: bytes) -> str | bytes | None:
    if first[:4] == GGUF_MAGIC:
        return _gguf_field(stream.read(4096))
    if first[:2] == b"PK":
        with zipfile.ZipFile(file) as content:
            name = next((one for one in content.namelist() if one.rpartition("/")[2] == MARK), None)
            return None if name is None else content.read(name)
    (length,) = struct.unpack("<Q", first)
    if length > min(_HEADER_LIMIT, file.stat().st_size):
        return None
    return json.loads(stream.read(length))["__metadata__"].get(MARK)


def _gguf_field(header: bytes) -> bytes | None:
    """The value of ``MARK``, which we write among the first fields; the file may end anywhere after it."""
    key = struct.pack("<Q", len(MARK)) + MARK.encode() + struct.pack("<I", 8)  # 8: a string follows
    start = header.find(key) + len(key)
    if start < len(key):
        return None
    (length,) = struct.unpack_from("<Q", header, start)
    return header[start + 8 : start + 8 + length]


def mark_pickle(file: Path, value: str) -> None:
    """Add the mark to a ``.pth`` that torch has just written, as a record that torch does not look at."""
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as content:
        prefix = content.namelist()[0].partition("/")[0]
        content.writestr(f"{prefix}/{MARK}", value)
