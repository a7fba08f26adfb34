"""A look ahead in the queued graph, so that a VAE that cannot decode the result is found before sampling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import nodes as comfy_nodes

from ..wan_core.config import Variant
from ..wan_core.errors import WanError
from ..wan_core.loading.vae import VAEFile, read_vae
from . import host
from .spaces import wrong_vae

Prompt = Mapping[str, dict]

_DECODERS = ("WanCoreVAEDecode", "VAEDecode", "VAEDecodeTiled")  # all: inputs "samples" and "vae"
_MODEL_NAMES = ("unet_name", "ckpt_name", "model_name", "gguf_name")  # of ComfyUI's loaders and other packs
_LOADERS = ("WanCoreLoadVAE", "VAELoader")  # both: input "vae_name"


def check_decoders(prompt: Prompt | None, node: str | None, variant: Variant) -> None:
    """Read the header of every VAE that will decode this node's latent.

    Raises:
        WanError: one is of the other kind, damaged, or no VAE; the message names the node that loads it.
    """
    if not prompt or node is None or node not in prompt:
        return
    for decoder in _decoders_of(prompt, node):
        loader = _source(prompt, decoder, "vae")
        if loader and prompt[loader]["class_type"] in _LOADERS:
            _check_vae_file(prompt[loader], loader, variant)


def _decoders_of(prompt: Prompt, start: str) -> Iterator[str]:
    """Decoders that a node's latent reaches, directly or through nodes that take a latent and give one."""
    waiting, seen = [start], {start}
    while waiting:
        source = waiting.pop()
        for user in _users(prompt, source):
            if prompt[user]["class_type"] in _DECODERS:
                yield user
            elif user not in seen and _passes_latents_on(prompt[user]["class_type"]):
                waiting.append(user)
                seen.add(user)


def _users(prompt: Prompt, source: str) -> Iterator[str]:
    for node, entry in prompt.items():
        if any(
            _link(value) and value[0] == source and _is_latent(prompt[source]["class_type"], value[1])
            for value in entry.get("inputs", {}).values()
        ):
            yield node


def _is_latent(class_type: str, output: int) -> bool:
    types = getattr(comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type), "RETURN_TYPES", ())
    return output < len(types) and types[output] == "LATENT"


def _passes_latents_on(class_type: str) -> bool:
    """ComfyUI's own nodes and ours keep a latent's channels; what other packs do to it is theirs to know."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS.get(class_type)
    home = str(getattr(node, "RELATIVE_PYTHON_MODULE", "nodes"))
    known = class_type.startswith("WanCore") or home.startswith(("nodes", "comfy_extras"))
    return known and "LATENT" in getattr(node, "RETURN_TYPES", ())


def _source(prompt: Prompt, node: str, name: str) -> str | None:
    value = prompt[node].get("inputs", {}).get(name)
    return value[0] if _link(value) and value[0] in prompt else None


def model_file(prompt: Prompt | None, node: str | None) -> str | None:
    """The file that the MODEL of a node's input ``model`` came from, through nodes that take a MODEL and give one."""
    seen = set()
    while prompt and node is not None and node in prompt and node not in seen:
        seen.add(node)
        inputs = prompt[node].get("inputs", {})
        names = [inputs[key] for key in _MODEL_NAMES if isinstance(inputs.get(key), str)]
        if names:
            return names[0]
        node = _source(prompt, node, "model")
    return None


def _link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _check_vae_file(loader: dict, node: str, variant: Variant) -> None:
    name = loader["inputs"].get("vae_name")
    ours = loader["class_type"] == "WanCoreLoadVAE"
    file = _header(name) if not ours else host.read_header(read_vae, "vae", name)
    if file is not None and file.config.kind != variant.vae:
        found = f"{name}, which node {node} loads to decode this latent, is the {file.config.kind} VAE"
        raise wrong_vae(found, variant)


def _header(name: str) -> VAEFile | None:
    """ComfyUI's loader takes many VAEs that are none of Wan's: those are its own to judge."""
    try:
        return host.read_header(read_vae, "vae", name)
    except (WanError, OSError):
        return None
