"""The index of a sharded checkpoint: which shard holds which tensor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import WanError
from .door import HEADER_LIMIT, MOST_TENSORS, Damage, check_name, read_json, shown, some

log = logging.getLogger(__name__)

ENDING = ".index.json"


@dataclass(frozen=True)
class Index:
    """``shards``: each tensor's file, below the index's folder."""

    file: Path
    shards: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        return sorted(set(self.shards.values()))

    @property
    def missing(self) -> list[Path]:
        return [file for file in self.files if not file.is_file()]

    def refuse_missing(self) -> None:
        """
        Raises:
            WanError: shards are not there.
        """
        if missing := self.missing:
            names = [file.relative_to(self.file.parent).as_posix() for file in missing]
            raise WanError(
                f"{shown(self.file.parent)} lacks {len(names)} of {len(self.files)} shards: {some(names)}. "
                "The download is incomplete; fetch the missing files."
            )


def read_index(file: Path) -> Index:
    """
    Raises:
        WanError: no index, or one that names files outside its folder.
    """
    try:
        size = file.stat().st_size
        if size > HEADER_LIMIT:
            raise Damage(f"it has {size} bytes")
        with file.open("rb") as stream:
            content = read_json(stream.read(HEADER_LIMIT))
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found or len(found) > MOST_TENSORS:
            raise Damage("there is none")
        places = {name: _inside(file, name) for name in {check_shard(shard) for shard in found.values()}}
        return Index(file, {check_name(key): places[shard] for key, shard in found.items()})
    except Damage as error:
        raise WanError(
            f"{shown(file)} is not a checkpoint index: expected a json with a weight_map ({error}). Download it again."
        ) from error


def check_shard(name: object) -> str:
    """
    Raises:
        Damage: no name of a file.
    """
    if not isinstance(name, str) or not name.strip() or len(name) > 1024 or "\0" in name:
        raise Damage("it names a shard by something that is no file's name")
    return name


def _inside(index: Path, name: str) -> Path:
    """Where a shard lies; Windows' separators count as such.

    Raises:
        WanError: outside the folder of the index.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    parts = relative.parts
    if not parts or relative.is_absolute() or ".." in parts or ":" in parts[0]:
        raise WanError(
            f"{shown(index)} names shards outside its own folder. Expected file names beside it: an index "
            "that points elsewhere is not followed. Download it again, or put the shards beside it."
        )
    return index.parent / relative


def choose_index(candidates: list[Path]) -> Index:
    """Of several indexes the one whose shards are all there; safetensors before pickles, then by name.

    Raises:
        WanError: none is an index, or none is complete; speaks of the first.
    """
    ordered = sorted(candidates, key=lambda file: (not file.name.lower().endswith(f".safetensors{ENDING}"), file.name))
    problems, whole = [], []
    for file in ordered:
        try:
            index = read_index(file)
            index.refuse_missing()
            whole.append(index)
        except WanError as error:
            problems.append(error)
    if not whole:
        raise problems[0]
    if len(ordered) > 1:
        others = some(file.name for file in ordered if file != whole[0].file)
        log.warning(
            "%s has %d indexes; %s is used%s. Others: %s.",
            shown(ordered[0].parent),
            len(ordered),
            shown(whole[0].file.name),
            "" if len(whole) > 1 else ", the one that is complete",
            others,
        )
    return whole[0]
