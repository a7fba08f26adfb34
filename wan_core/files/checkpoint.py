"""Checkpoint files without loading them: headers first, tensors memory-mapped on request.

Four containers: one safetensors file, a folder of shards with an index json, GGUF, and ``.pth`` (weights only: a pickle
that wants to run code is refused).
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch

from ..errors import WanError
from ..quant.base import Packed
from . import gguf as read_gguf
from .mapped import MappedFile
from .marks import TensorInfo, understand

_HEADER_LIMIT = 100 * 1024 * 1024  # safetensors' own limit
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class Checkpoint:
    """The tensors of one model, wherever they lie.

    Only headers are read when this is made. ``tensor`` returns memory-mapped data that costs no RAM of its own
    until it is touched, and then only clean pages that the system may drop again.
    """

    def __init__(self, path: Path, stored: Mapping[str, TensorInfo], metadata: Mapping[str, str]):
        self.path = path
        self.metadata = dict(metadata)
        self._stored = dict(stored)  # the tensors as they lie in the file, the pieces of packed matrices among them
        self.tensors = understand(path, self._stored, self.metadata, self._piece)
        self.beside: tuple[Path, ...] = ()  # files that reading the model looked for or at, there or not
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: info.shape for key, info in self.tensors.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def fingerprint(self) -> tuple:
        """Changes when any of the files does, and when what lies beside them appears, changes or goes.

        (path, size, modification time) of each; of a file that is not there, the path alone.
        """
        beside = sorted(self.path.glob("*.json")) if self.path.is_dir() else []
        return (*self.state_of_files, *map(_state_beside, (*beside, *self.beside)))

    @property
    def state_of_files(self) -> tuple:
        """The part of the fingerprint that is about the files which hold the tensors."""
        return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files)

    def only(self, keys: Iterable[str]) -> Checkpoint:
        """The same checkpoint with some of its tensors: one model of a file that holds several."""
        part = copy.copy(self)
        part.tensors = {key: self.tensors[key] for key in keys}
        return part

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that most of the numbers are stored in; packed matrices count as what they are packed in."""
        totals = Counter()
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
        return Packed(info.format, info.format.prepared({name: self._piece(piece) for name, piece in info.parts}))

    def stored_bytes(self, key: str) -> int:
        """What a tensor takes in its file; a packed matrix with its scales."""
        pieces = [self._stored[piece] for _, piece in self.tensors[key].parts] or [self.tensors[key]]
        return sum(piece.bytes for piece in pieces)

    def _piece(self, key: str) -> torch.Tensor:
        return self._mapped(self._stored[key].file)[key]

    def close(self) -> None:
        """Let go of the mapped files; tensors handed out keep theirs alive."""
        self._open.clear()

    def _mapped(self, file: Path) -> Mapping[str, torch.Tensor]:
        if file not in self._open:
            self._open[file] = _open_file(file)
        return self._open[file]

    @cached_property
    def _open(self) -> dict[Path, Mapping[str, torch.Tensor]]:
        return {}


def _state_beside(file: Path) -> tuple:
    try:
        state = file.stat()
    except OSError:
        return (str(file),)
    return str(file), state.st_size, state.st_mtime_ns


def _open_file(file: Path) -> Mapping[str, torch.Tensor]:
    if _is_gguf(file):
        return read_gguf.GGUFFile(file)
    return _SafetensorsFile(file) if _is_safetensors(file) else _load_pickle(file, "cpu")


class _SafetensorsFile(Mapping):
    """A mapping of names to tensors over one safetensors file.

    safetensors' own reader maps privately, which Linux counts as memory that might be written: it refuses a file that
    is larger than the machine's RAM.
    """

    def __init__(self, file: Path):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            self.entries = json.loads(stream.read(length))
        self.entries.pop("__metadata__", None)
        self.begin = 8 + length
        self.data = MappedFile(file)

    def __getitem__(self, key: str) -> torch.Tensor:
        entry = self.entries[key]
        return self.data.tensor(self.begin + entry["data_offsets"][0], entry["shape"], _dtype(entry["dtype"]))

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers of a checkpoint.

    Args:
        path: a ``.safetensors`` / ``.gguf`` / ``.pth`` / ``.pt`` / ``.bin`` file, an index json, or a folder that holds
            one safetensors file, shards with an index json, or one ``.pth``.

    Raises:
        WanError: nothing there, an empty, truncated or corrupt file, missing shards, or a pickle that wants code run.
    """
    path = Path(path)
    if not path.exists():
        raise WanError(f"No such file or folder: {path}. Check the path, or download the checkpoint there.")
    if path.is_dir():
        return _open_folder(path)
    if path.name.endswith(".index.json"):
        return _open_index(path)
    tensors, metadata = _read_header(path)
    return Checkpoint(path, tensors, metadata)


def _open_folder(folder: Path) -> Checkpoint:
    indexes = sorted(folder.glob("*.index.json"))
    if indexes:
        preferred = [i for i in indexes if i.name.endswith(".safetensors.index.json")] or indexes
        return _open_index(preferred[0])
    candidates = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pth")) or sorted(folder.glob("*.bin"))
    if len(candidates) == 1:
        tensors, metadata = _read_header(candidates[0])
        return Checkpoint(folder, tensors, metadata)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    raise WanError(
        f"{folder} is not a checkpoint folder: expected one safetensors file, or shards with an .index.json; "
        f"found {found}. Name the file itself if there are several."
    )


def _open_index(index: Path) -> Checkpoint:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise WanError(f"{index} is not a checkpoint index: expected a json with a weight_map ({error}).") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise WanError(f"{index.parent} lacks {len(missing)} of {len(names)} shards: {', '.join(missing)}. "
                       "The download is incomplete; fetch the missing files.")
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in names:
        shard, shard_metadata = _read_header(index.parent / name)
        tensors.update(shard)
        metadata.update(shard_metadata)
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise WanError(f"{index} promises tensors that its shards do not hold: {_some(absent)}. Download it again.")
    return Checkpoint(index.parent, tensors, metadata)


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = file.stat().st_size
    if size == 0:
        raise WanError(f"{file} is empty (0 bytes): the download failed; fetch it again.")
    if _is_gguf(file):
        return read_gguf.tensor_infos(file, read_gguf.read_header(file))
    if _is_safetensors(file):
        return _safetensors_header(file, size)
    if _looks_like_pickle(file):
        tensors = _load_pickle(file, "meta")
        return {k: TensorInfo(tuple(v.shape), v.dtype, file) for k, v in tensors.items()}, {}
    raise WanError(f"{file} is neither safetensors nor a PyTorch checkpoint nor GGUF: it begins with "
                   f"{_first_bytes(file)!r}. If it is a web page or a Git LFS pointer, download the real file.")


def _is_gguf(file: Path) -> bool:
    return _first_bytes(file, 4) == read_gguf.MAGIC


def _is_safetensors(file: Path) -> bool:
    if file.suffix == ".safetensors":
        return True
    return _first_bytes(file, 9)[8:9] == b"{"


def _looks_like_pickle(file: Path) -> bool:
    first = _first_bytes(file, 2)
    return first == b"PK" or first[:1] == b"\x80"


def _first_bytes(file: Path, count: int = 16) -> bytes:
    with file.open("rb") as stream:
        return stream.read(count)


def _safetensors_header(file: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _HEADER_LIMIT):
                raise ValueError(f"its header claims {length} bytes of {size}")
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"expected {8 + length + end} bytes, found {size}")
        tensors = {k: TensorInfo(tuple(e["shape"]), _dtype(e["dtype"]), file) for k, e in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WanError(f"{file} is truncated or corrupt ({error}). Download it again.") from error
    return tensors, metadata


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"unknown tensor type {name}")
    return _DTYPES[name]


def _load_pickle(file: Path, device: str) -> dict[str, torch.Tensor]:
    """The tensors of a ``.pth``; ``device="meta"`` reads no tensor data."""
    try:
        mapped = _is_zip(file)
        loaded = torch.load(str(file), map_location=device, weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise WanError(f"{file} was refused: it is a pickle that wants to run code, or no plain state dict "
                       f"({_first_line(error)}). Use a safetensors version of it.") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WanError(f"{file} is truncated or corrupt ({_first_line(error)}). Download it again.") from error
    return _tensors_only(loaded, file)


def _is_zip(file: Path) -> bool:
    return _first_bytes(file, 2) == b"PK"


def _tensors_only(loaded: object, file: Path) -> dict[str, torch.Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not any(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise WanError(f"{file} holds a {type(loaded).__name__} and no tensors by name: expected a state dict.")
    return {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
