"""Files that appear whole or not at all, and names that nobody has taken yet."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import WanError

ROOM = 200 * 1024**2  # free bytes below which no run is started
_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # what only writing runs into
_LONGEST_ENDING = 16


class WriteFailed(WanError):
    """A file could not be written to its end; nothing of it is left."""


@contextmanager
def unfinished(file: Path) -> Iterator[Path]:
    """A temporary name beside a file, renamed to it on success and removed on failure.

    The name is nobody else's: no file of that name exists before, whoever else writes to the folder.

    Raises:
        WriteFailed: the disk is full, say; whatever else the body raises passes.
    """
    ending = file.suffix if len(file.suffix) <= _LONGEST_ENDING else ""
    partial = file.with_name(f".wan_core-{secrets.token_hex(6)}.partial{ending}")
    try:
        yield partial
        os.replace(partial, file)
    except Exception as error:
        if problem := write_problem(error):
            raise WriteFailed(f"Cannot write {file}: {problem}. Nothing of it is left. {_free(file)}") from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_problem(error: BaseException) -> str | None:
    """In words, where an exception says that a file could not be written; libraries say so in ways of their own."""
    number, text = getattr(error, "errno", None), str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # safetensors
        number = int(found[1])
    if number in _WRITING:
        return os.strerror(number)
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "the disk is full, or the file too large for it"
    return None


def _free(file: Path) -> str:
    try:
        return f"{shutil.disk_usage(file.parent).free // 2**20} MB are free there: make room, or choose another folder."
    except OSError:
        return "Make room, or choose another folder."


def check_writable(file: str | Path, room: int = ROOM) -> None:
    """Find out before the work whether its result can be saved.

    Args:
        room: bytes that the result may take.

    Raises:
        WanError: the folder is missing or not writable, its disk is nearly full, the name is too long, or something
            else than a file has it.
    """
    file = Path(file)
    folder = file.absolute().parent
    if not folder.is_dir():
        raise WanError(f"Cannot save {file}: there is no folder {folder}. Create it first.")
    _check_name(file)
    free, room = shutil.disk_usage(folder).free, max(room, ROOM)
    if free < room:
        raise WanError(
            f"Cannot save {file}: {folder} has {free // 2**20} MB free, expected at least {room // 2**20}. "
            "Free some space, or save elsewhere."
        )
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WanError(f"Cannot save {file}: {folder} is not writable ({error.strerror}).") from error


def _check_name(file: Path) -> None:
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        if file.is_symlink():
            raise WanError(f"Cannot save {file}: it is a link to nothing. Remove it, or choose another name.") from None
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WanError(f"Cannot save {file}: this name cannot be ({reason}). Choose another.") from error
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise WanError(f"Cannot save {file}: it is {what}. Choose the name of a file.")


def free_name(file: Path) -> Path:
    """The file's own name, or with the first number that no file has: ``cat.mp4``, ``cat_2.mp4``, …"""
    name, number = file, 1
    while os.path.lexists(name):
        number += 1
        name = file.with_name(f"{file.stem}_{number}{file.suffix}")
    return name


def beside(file: Path, ending: str) -> Path:
    """A new name in the file's folder: its stem, shortened to what names may be long, and an ending."""
    stem = os.fsencode(file.stem)[: 200 - len(ending)].decode("utf-8", "ignore") or "video"
    return free_name(file.with_name(stem + ending))
