"""ComfyUI as plain functions and callbacks: its folders, devices, progress bar, interrupt button and memory manager."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import comfy.model_management as management
import folder_paths
import torch
from comfy.cli_args import args
from comfy.utils import ProgressBar
from comfy_api.latest import ui
from torch import nn

from ..wan_core.errors import WanError
from ..wan_core.memory import devices
from ..wan_core.models.dit.attention import find_backend
from ..wan_core.quant.registry import MADE_ON_LOAD
from ..wan_core.safe_text import safe_text as safe_text  # the nodes take it from here

if TYPE_CHECKING:
    from ..wan_core.memory.engine import Engine

log = logging.getLogger(__name__)

TEXT_EVENT = "wan_core.text"
DTYPES = ["auto", "bfloat16", "float16", "float32"]
WEIGHT_DTYPES = [*DTYPES, *MADE_ON_LOAD]  # of models whose matrices may be quantised while they are loaded
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|bin)$", re.IGNORECASE)

File = TypeVar("File")


@cache
def engine() -> Engine:
    """The process's one engine, known to ComfyUI's memory manager."""
    from ..wan_core.memory.engine import Engine
    from .memory import Residency

    engine = Engine(free_bytes=free_bytes)
    engine.make_room = Residency(engine, management.get_torch_device()).make_room
    return engine


def model_names(folder: str) -> list[str]:
    """What a loader offers: the files of one of ComfyUI's model folders, with sharded checkpoints as one entry each.

    Files of whole models in ``checkpoints`` follow, as each loader finds its part in them.
    """
    own = _names_in(folder)
    if folder not in _PARTS:
        return own
    return [*own, *(name for name in _names_in(_WHOLE) if name not in set(own))]


def _names_in(folder: str) -> list[str]:
    files = {name for part in _with_gguf(folder) for name in folder_paths.get_filename_list(part)}
    files |= set(_without_ending(folder))
    shards = [name for name in files if _SHARD.search(name)]
    sharded = {os.path.dirname(name) for name in shards} - {""}
    whole = [name for name in files if name not in shards]
    return sorted([*whole, *(name for name in sharded if _has_index(folder, name))])


_WHOLE = "checkpoints"  # ComfyUI's folder of files that hold a model, its text encoder and its VAE
_PARTS = ("diffusion_models", "text_encoders", "vae")
_GGUF_FOLDERS = {"diffusion_models": "unet_gguf", "text_encoders": "clip_gguf"}
_ANY_FOLDERS = {folder: f"wan_core_{folder}" for folder in (*_PARTS, _WHOLE)}
# Endings of what lies beside models and is none, or not yet.
_OTHER_FILES = """
    .txt .md .json .jsonl .yaml .yml .toml .ini .cfg .csv .png .jpg .jpeg .webp .gif .mp4 .webm .html .htm .pdf .zip .7z
    .rar .gz .tar .py .sh .bat .url .lnk .sha256 .md5 .log .lock .metadata .incomplete .part .partial .tmp .crdownload
    .download .aria2 .!qb .onnx .model
"""
_NO_MODELS = frozenset(_OTHER_FILES.split())


def _with_gguf(folder: str) -> list[str]:
    """A folder's name, and the name under which its .gguf files are listed.

    ComfyUI lists no .gguf files in its own folders. The names are those that the GGUF pack registers, with the same
    places, so that both packs show the same files whichever is there.
    """
    name = _GGUF_FOLDERS.get(folder)
    if name is None:
        return [folder]
    known = folder_paths.folder_names_and_paths
    known.setdefault(name, (known[folder][0], {".gguf"}))
    return [folder, name]


def _without_ending(folder: str) -> list[str]:
    """Files that ComfyUI does not list because their ending is missing or odd, but that begin as checkpoints do.

    They are listed under a name of our own with ComfyUI's own search, which it repeats only when a folder changes.
    """
    name = _ANY_FOLDERS.get(folder)
    if name is None:
        return []
    known = folder_paths.folder_names_and_paths
    places, endings = known[folder]
    known[name] = (places, set())  # no endings: every file
    return [
        file
        for file in folder_paths.get_filename_list(name)
        if _may_be_model(file, endings) and any(_begins_as_model(Path(base, file)) for base in places)
    ]


def _may_be_model(file: str, listed: Collection[str]) -> bool:
    ending = os.path.splitext(file)[1].lower()
    hidden = any(part.startswith(".") for part in Path(file).parts)
    return not hidden and ending not in listed and ending not in _NO_MODELS and ending != ".gguf"


def _begins_as_model(path: Path) -> bool:
    """Whether a file begins as safetensors, GGUF or a zipped or plain pickle does."""
    try:
        with path.open("rb") as stream:
            first = stream.read(9)
    except OSError:
        return False
    return first[:4] in (b"GGUF", b"PK\x03\x04") or first[:2] in (b"\x80\x02", b"\x80\x04") or first[8:] == b"{"


def _places(folder: str) -> list[str]:
    return list(dict.fromkeys(place for part in _with_gguf(folder) for place in folder_paths.get_folder_paths(part)))


def _has_index(folder: str, name: str) -> bool:
    return any(
        file.name.lower().endswith(".index.json")
        for base in folder_paths.get_folder_paths(folder)
        if Path(base, name).is_dir()
        for file in Path(base, name).iterdir()
    )


def model_path(folder: str, name: str) -> Path:
    """Where a loader's entry lies.

    Raises:
        WanError: the list does not offer it.
    """
    if name in model_names(folder):
        for base in (*_places(folder), *(_places(_WHOLE) if folder in _PARTS else ())):
            if Path(base, name).exists():
                return Path(base, name)
    places = " or ".join(folder_paths.get_folder_paths(folder))
    raise WanError(f"There is no {name!r} in {places}. Put the file there and press R in ComfyUI to refresh the lists.")


def read_header(read: Callable[[Path], File], folder: str, name: str) -> File:
    """What ``read`` makes of a checkpoint; read again only when it was changed, or what it was understood by.

    That is a config, an index or a tokenizer beside the file: one that appears, changes or goes counts.

    Raises:
        WanError: as ``read``.
    """
    path = model_path(folder, name)
    now, known = stamp(path), _headers.get((read, path))
    if known is None or known[0] != now or known[1] != _looked_at(known[2]):
        found = read(path)
        known = _headers[read, path] = now, _looked_at(found), found
    return cast(File, known[2])


_headers: dict[tuple[Callable, Path], tuple[tuple, tuple, object]] = {}


def _looked_at(file: object) -> tuple:
    """The state of everything that a header was read from; () for what knows no such thing."""
    checkpoint = getattr(file, "checkpoint", file)
    try:
        return getattr(checkpoint, "fingerprint", ())
    except OSError as error:
        return (str(error),)


def fingerprint(folder: str, name: str, read: Callable[[Path], object] | None = None) -> tuple:
    """Changes when the file is replaced on disk, so that ComfyUI runs the loader again.

    With ``read``, also when something appears, changes or goes by which it understands the file.
    """
    try:
        beside = _looked_at(read_header(read, folder, name)) if read else ()
        return (*stamp(model_path(folder, name)), *beside)
    except (WanError, OSError) as error:
        return (str(error),)


def stamp(path: Path) -> tuple:
    """Changes when a file, or a file of a folder, is replaced on disk."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def check_file(read: Callable[[Path], object], folder: str, name: str | None) -> None:
    """A loader's ``check_inputs``: reads the header, unless the name comes through a link.

    Raises:
        WanError: there is no such file, or what is wrong with it.
    """
    if name is not None:
        read_header(read, folder, name)


def free_bytes(device: torch.device) -> int:
    """What a device has for us, as ComfyUI sees it: weights that newer versions give up on demand count as free."""
    loaded = [entry for entry in getattr(management, "current_loaded_models", ()) if entry.device == device]
    models = [entry.model for entry in loaded if entry.model is not None]
    lent = sum(model.loaded_size() for model in models if getattr(model, "is_dynamic", bool)())
    return int(management.get_free_memory(device)) + lent


def total_bytes(device: torch.device) -> int:
    """All the memory of a device, as ComfyUI counts it; of the host with what it can swap out."""
    return devices.total_bytes(device) if device.type == "cpu" else int(management.get_total_memory(device))


@contextmanager
def cancellable(*modules: object) -> Iterator[None]:
    """Let the user cancel before each layer of these modules: one call of a VAE may take minutes."""
    layers = [layer for module in modules if isinstance(module, nn.Module) for layer in module.modules()]
    hooks = [layer.register_forward_pre_hook(check_cancelled) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def device() -> torch.device:
    """Where the transformer runs."""
    return management.get_torch_device()


# ComfyUI's options that choose an attention, and what does the same here.
_ATTENTION_OPTIONS = {"use_sage_attention": "sage", "use_flash_attention": "flash2", "use_ck_attention": "kitchen"}


def attention_asked(asked: str, dtype: torch.dtype) -> tuple[str, str | None]:
    """A node's choice of attention and what to say of it: auto follows what ComfyUI was started with, if that runs."""
    option = next((option for option in _ATTENTION_OPTIONS if getattr(args, option, False)), None)
    if asked != "auto" or option is None:
        return asked, None
    name, flag = _ATTENTION_OPTIONS[option], "--" + option.replace("_", "-")
    try:
        find_backend(name, device(), dtype)
    except WanError as error:
        return asked, f"ComfyUI was started with {flag}, but sdpa is used: {error}"
    return name, f"Attention: {name}, for ComfyUI was started with {flag}."


def vae_device() -> torch.device:
    return management.vae_device()


def text_device(choice: str) -> torch.device:
    """ "cpu", or ComfyUI's own choice for "default"."""
    return torch.device("cpu") if choice == "cpu" else management.text_encoder_device()


def storage_device() -> torch.device:
    """Where what travels between nodes is kept."""
    return management.intermediate_device()


def check_cancelled(*_: object) -> None:
    """A callback that raises ComfyUI's own exception once the user has pressed cancel; takes and ignores anything."""
    management.throw_exception_if_processing_interrupted()


def show_text(node_id: str | None, text: str) -> None:
    """A text on a node in the editor of whoever queued the prompt; it replaces the node's text before.

    Every text for the editor passes through here or ``text_output``, as ``safe_text``; ``web/says.js`` shows it as
    text. Not ComfyUI's own ``send_progress_text``: some frontends read that as HTML, and two of four places show none.
    """
    from server import PromptServer

    server: Any = getattr(PromptServer, "instance", None)
    client = getattr(server, "client_id", None)
    if node_id is not None and client is not None:
        server.send_sync(TEXT_EVENT, {"node": shown_as(node_id), "text": safe_text(text)}, client)


def text_output(text: str) -> ui.PreviewText | None:
    """A text as the node's ``ui`` output, which ComfyUI's history keeps for programs and for a page loaded anew."""
    return ui.PreviewText(safe_text(text)) if text else None


def told(text: str) -> ui.PreviewText | None:
    """Shows a text at once on the node that runs, and returns it as its ``ui`` output; None if there is none."""
    if text:
        show_text(current_node(), text)
    return text_output(text)


def current_node() -> str | None:
    """The id of the node that runs. Not taken from a hidden input, which would tie what ComfyUI caches to the id."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return None if context is None else context.node_id


def shown_as(node_id: str) -> str:
    """The node that stands on the canvas, where the one that runs was put into the graph by another node."""
    from comfy_execution.progress import get_progress_state

    return get_progress_state().dynprompt.get_display_node_id(node_id)


class Chunks:
    """A progress bar over the pieces of several videos, and a place to cancel after each piece."""

    def __init__(self, total: int) -> None:
        self.bar = ProgressBar(total)

    def __call__(self, done: int, total: int) -> None:
        check_cancelled()
        self.bar.update(1)
