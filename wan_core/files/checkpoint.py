"""Checkpoint files without loading them: headers first, tensors memory-mapped on request.

Four containers: one safetensors file, a folder of shards with an index json, GGUF, and ``.pth`` (weights only: a pickle
that wants to run code is refused). Every header is checked as a whole by its reader; what no check expected is caught
in ``open_checkpoint``.
"""

from __future__ import annotations

import copy
import logging
import math
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import WanError
from ..mapped import MappedFile, changed
from ..quant.base import Packed
from . import gguf as read_gguf
from . import safetensors_header
from .door import MOST_TENSORS, Damage, check_name, check_shape, damaged, shown
from .door import some as _some
from .index import ENDING, Index, choose_index, read_index
from .kind import ENDINGS, kind_of
from .marks import TensorInfo, understand
from .pickle_guard import check_pickle
from .pickled import over_own_mapping
from .storage import DTYPES as _DTYPES
from .storage import NAMES as _NAMES

log = logging.getLogger(__name__)

__all__ = ["_DTYPES", "Checkpoint", "_some", "open_checkpoint"]

_GLOBAL = re.compile(r"GLOBAL ([A-Za-z_][\w.]{0,120}) ", re.ASCII)


class Checkpoint:
    """The tensors of one model, wherever they lie.

    Only headers are read when this is made. ``tensor`` returns memory-mapped data that costs no RAM of its own
    until it is touched, and then only clean pages that the system may drop again. A checkpoint outlives its model in
    every recipe, so it holds no file itself: a file is mapped while one of its tensors lives, or inside ``reading``.
    """

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.metadata = dict(metadata)
        self._stored = dict(stored)  # the tensors as they lie in the file, the pieces of packed matrices among them
        self._open = _OpenFiles()  # one for all that ``only`` makes of this
        with self.reading():
            self.tensors = understand(path, self._stored, self.metadata, self._piece)
        self.beside: tuple[Path, ...] = ()  # files that reading the model looked for or at, there or not

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def fingerprint(self) -> tuple[Any, ...]:
        """Changes when any of the files does, and when what lies beside them appears, changes or goes.

        (path, size, modification time) of each; of a file that is not there, the path alone.
        """
        beside = sorted(self.path.glob("*.json")) if self.path.is_dir() else []
        return (*self.state_of_files, *map(_state_beside, (*beside, *self.beside)))

    @property
    def state_of_files(self) -> tuple[Any, ...]:
        """The part of the fingerprint that is about the files which hold the tensors."""
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files)

    def only(self, keys: Iterable[str]) -> Checkpoint:
        """The same checkpoint with some of its tensors: one model of a file that holds several."""
        part = copy.copy(self)
        part.tensors = {key: self.tensors[key] for key in keys}
        return part

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While many tensors are read: each file is opened once, and let go at the end. Outside, each call opens it."""
        self._open.readers += 1
        try:
            yield
        finally:
            self._open.readers -= 1
            if not self._open.readers:
                self._open.files.clear()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that most of the numbers are stored in; packed matrices count as what they are packed in."""
        totals: Counter[torch.dtype] = Counter()
        for info in self.tensors.values():
            if info.dtype.is_floating_point or info.format:
                totals[info.dtype] += math.prod(info.shape)
        return totals.most_common(1)[0][0] if totals else None

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, memory-mapped from its file, in the file's dtype and shape; a packed matrix in float32."""
        info = self.tensors[key]
        return (self.packed(key).dequantise() if info.format else self._piece(key)).view(info.shape)

    def packed(self, key: str) -> Packed:
        """A matrix in its quantised format, memory-mapped; only for keys whose ``TensorInfo`` names one."""
        info = self.tensors[key]
        assert info.format, key
        with self.reading():
            return Packed(info.format, info.format.prepared({name: self._piece(piece) for name, piece in info.parts}))

    def stored_bytes(self, key: str) -> int:
        """What a tensor takes in its file; a packed matrix with its scales."""
        pieces = [self._stored[piece] for _, piece in self.tensors[key].parts] or [self.tensors[key]]
        return sum(piece.bytes for piece in pieces)

    def scale_bytes(self, key: str) -> int:
        """What the scales of a packed matrix take in their file."""
        return sum(self._stored[piece].bytes for role, piece in self.tensors[key].parts if role != "data")

    def _piece(self, key: str) -> torch.Tensor:
        info = self._stored[key]
        if info.unread:
            raise WanError(
                f"{shown(self.path)} holds {shown(key)} as {info.unread}, which this version does not read. "
                "Use a bf16, fp16, fp8 or GGUF file of the same model."
            )
        try:
            return self._mapped(info.file)[key]
        except KeyError as error:
            raise changed(info.file) from error

    def _mapped(self, file: Path) -> Mapping[str, torch.Tensor]:
        with self.reading():
            if file not in self._open.files:
                self._open.files[file] = _open_file(file)
            return self._open.files[file]


@dataclass
class _OpenFiles:
    """The files that are mapped while somebody reads, by the names of their tensors."""

    readers: int = 0
    files: dict[Path, Mapping[str, torch.Tensor]] = field(default_factory=dict)


def _state_beside(file: Path) -> tuple[Any, ...]:
    try:
        state = file.stat()
    except OSError:
        return (str(file),)
    return str(file), state.st_size, state.st_mtime_ns


def _open_file(file: Path) -> Mapping[str, torch.Tensor]:
    match kind_of(file):
        case "gguf":
            return read_gguf.GGUFFile(file)
        case "safetensors":
            return _SafetensorsFile(file)
        case _:
            return _load_pickle(file, "cpu")


class _SafetensorsFile(Mapping[str, torch.Tensor]):
    """A mapping of names to tensors over one safetensors file.

    safetensors' own reader maps privately, which Linux counts as memory that might be written: it refuses a file that
    is larger than the machine's RAM.
    """

    def __init__(self, file: Path) -> None:
        self.entries = safetensors_header.read_header(file).entries
        self.data = MappedFile(file)

    def __getitem__(self, key: str) -> torch.Tensor:
        entry = self.entries[key]
        assert entry.storage.dtype is not None, key  # others are refused before: TensorInfo.unread
        return self.data.tensor(entry.begin, entry.shape, entry.storage.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a safetensors, GGUF or PyTorch file, told by its first bytes whatever its name; an index json; or a
            folder that holds one such file or shards with an index json.

    Raises:
        WanError: nothing there, an empty, truncated or corrupt file, missing shards, or a pickle that wants code run.
            Whatever a file holds, nothing else leaves this function.
    """
    path = Path(path)
    try:
        return _open(path)
    except WanError:
        raise
    except OSError as error:
        raise WanError(
            f"{shown(path)} cannot be read ({error.strerror or type(error).__name__}). Check the path, who "
            "may read it, and the disk or network share it lies on."
        ) from error
    except Exception as error:
        log.debug("A checkpoint that no check expected", exc_info=True)
        raise damaged(path, f"it cannot be understood: {type(error).__name__}") from error


def _open(path: Path) -> Checkpoint:
    if "\0" in str(path) or not path.exists():
        raise WanError(f"No such file or folder: {shown(path)}. Check the path, or download the checkpoint there.")
    if path.is_dir():
        return _open_folder(path)
    if path.suffix.lower() == ".json":
        return _open_index(read_index(path))
    tensors, metadata = _read_header(path)
    return Checkpoint(path, tensors, metadata)


def _open_folder(folder: Path) -> Checkpoint:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if indexes := [file for file in files if file.name.lower().endswith(ENDING)]:
        return _open_index(choose_index(indexes))
    for endings in (ENDINGS[:2], ENDINGS[2:3], ENDINGS[3:4], ENDINGS[4:]):
        candidates = [file for file in files if file.suffix.lower() in endings]
        if candidates:
            break
    else:
        candidates = [file for file in files if _is_checkpoint(file)]
    if len(candidates) == 1:
        tensors, metadata = _read_header(candidates[0])
        return Checkpoint(folder, tensors, metadata)
    found = _some(sorted(p.name for p in folder.iterdir()), 10) or "nothing"
    raise WanError(
        f"{shown(folder)} is not a checkpoint folder: expected one safetensors file, or shards with an .index.json; "
        f"found {found}. Name the file itself if there are several."
    )


def _is_checkpoint(file: Path) -> bool:
    """Whether a file without a telling name is one, by its first bytes."""
    try:
        return bool(kind_of(file))
    except (WanError, OSError):
        return False


def _open_index(index: Index) -> Checkpoint:
    index.refuse_missing()
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in index.files:
        shard, shard_metadata = _read_header(file)
        tensors |= {key: info for key, info in shard.items() if index.shards.get(key, file) == file}
        metadata.update(shard_metadata)
    absent = sorted(set(index.shards) - set(tensors))
    if absent:
        raise WanError(
            f"{shown(index.file)} promises tensors that its shards do not hold: {_some(absent)}. Download it again."
        )
    return Checkpoint(index.file.parent, tensors, metadata)


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    match kind_of(file):
        case "gguf":
            return read_gguf.tensor_infos(file, read_gguf.read_header(file))
        case "safetensors":
            header = safetensors_header.read_header(file)
            return {key: _safetensors_info(file, entry) for key, entry in header.entries.items()}, header.metadata
        case _:
            tensors = _load_pickle(file, "meta")
            return {key: _pickle_info(file, tensor) for key, tensor in tensors.items()}, {}


def _safetensors_info(file: Path, entry: safetensors_header.Entry) -> TensorInfo:
    if entry.storage.dtype is not None:
        return TensorInfo(entry.shape, entry.storage.dtype, file)
    size = entry.end - entry.begin
    return TensorInfo(entry.shape, torch.uint8, file, size=size, unread=entry.storage.described)


def _pickle_info(file: Path, tensor: torch.Tensor) -> TensorInfo:
    unread = None if tensor.dtype in _NAMES and tensor.layout is torch.strided else str(tensor.dtype)
    return TensorInfo(tuple(tensor.shape), tensor.dtype, file, unread=unread)


def _load_pickle(file: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pth``; ``device="meta"`` reads no tensor data."""
    check_pickle(file)
    try:
        mapped = _is_zip(file)
        loaded = torch.load(str(file), map_location=device, weights_only=True, mmap=mapped or None)
        tensors = _by_name(loaded, file)
        return over_own_mapping(file, tensors) if mapped and device == "cpu" else tensors
    except pickle.UnpicklingError as error:
        raise WanError(
            f"{shown(file)} was refused: it is a pickle that wants to run code, or no plain state dict "
            f"({_wanted(error)}). Use a safetensors version of it."
        ) from error
    except Damage as error:
        raise damaged(file, error) from error
    except (WanError, OSError):
        raise
    except Exception as error:  # whatever PyTorch's reader says of what it meets
        raise damaged(file, f"PyTorch cannot read it: {type(error).__name__}") from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"


def _wanted(error: Exception) -> str:
    """What a pickle asked for, if it can be named."""
    found = _GLOBAL.search(str(error))
    return f"it asks for {found[1]}" if found else "PyTorch does not load it"


# The names under which trainers keep a model's weights, likeliest first; averaged weights come last.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "module", "generator", "transformer", "dit",
             "weights", "params", "ema", "ema_model", "model_ema", "generator_ema", "params_ema")  # fmt: skip
_DEEPEST = 3


def _by_name(loaded: object, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of what was saved: a state dict, or a wrapper of one.

    Raises:
        WanError: there are none.
        Damage: names that are none.
    """
    for _ in range(_DEEPEST):
        inner = _inside(loaded, file)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, dict) or not _tensors(loaded):
        raise WanError(f"{shown(file)} holds a {type(loaded).__name__} and no tensors by name: expected a state dict.")
    if len(loaded) > MOST_TENSORS:
        raise Damage(f"it holds {len(loaded)} tensors, expected at most {MOST_TENSORS}")
    return {check_name(key): _checked(key, value) for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def _checked(key: str, tensor: torch.Tensor) -> torch.Tensor:
    check_shape(key, tuple(tensor.shape))
    return tensor


def _inside(loaded: object, file: Path) -> dict[Any, Any] | None:
    """The state dict inside a wrapper, by its name or as the one with the most tensors; None where there is none."""
    if not isinstance(loaded, dict):
        return None
    found = {key: value for key, value in loaded.items() if isinstance(value, dict) and _holds_tensors(value)}
    most = max((_weight(value) for value in found.values()), default=0)
    if not most or most < _tensors(loaded):  # a state dict, beside which something else was saved
        return None
    chosen = next((name for name in _WRAPPERS if name in found), None)
    if chosen is None:
        chosen = max(found, key=lambda key: _weight(found[key]))
    if len(found) > 1:
        others = _some(str(key) for key in found if key != chosen)
        log.warning("%s holds several sets of weights; %s is used. Others: %s.", shown(file), shown(chosen), others)
    return found[chosen]


def _tensors(value: object) -> int:
    """How many tensors a dict holds."""
    return sum(isinstance(one, torch.Tensor) for one in value.values()) if isinstance(value, dict) else 0


def _weight(value: dict[Any, Any]) -> int:
    """How many tensors with names a dict holds, or the dicts in it."""
    below = (_tensors(one) for key, one in value.items() if isinstance(key, str) and isinstance(one, dict))
    return max(_tensors(value), max(below, default=0))


def _holds_tensors(value: dict[Any, Any]) -> bool:
    """With names: an optimiser's state has numbers in their place."""
    return _weight(value) > 0
