"""One model over all processes: each keeps an equal part of every tensor, by torch's FSDP2.

Weights, gradients, the optimiser's figures and the average are float32 and a process's own part of them; one block at a
time is put together, in float32, and rounded within each product as in a single process. So what is learnt is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..loading.build import check_fit
from ..loading.dit import DiTFile
from .model import TrainedDiT
from .parallel import Processes, is_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def load_sharded(file: DiTFile, processes: Processes, device: torch.device) -> TrainedDiT:
    """A checkpoint's model in float32, of which this process reads and holds its part alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = TrainedDiT(file.config)
    check_fit(model, file.checkpoint, file.names)
    mesh = init_device_mesh(device.type, (processes.count,))
    for block in model.blocks:
        for name, layer in block.get_submodule("cross_attn").named_children():
            if name.startswith(("k", "v", "norm_k")):  # what a block hears is computed before the block is called
                fully_shard(layer, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # all that lies outside of the blocks
    model.to_empty(device=device)
    with torch.no_grad(), file.checkpoint.reading():
        for name, parameter in model.named_parameters():
            fill(parameter, file.checkpoint.tensor(file.names[name]))
    return model.requires_grad_(True)


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    return any(map(is_part, parameters.values()))


@torch.no_grad()
def fill(parameter: Tensor, values: Tensor) -> None:
    """Write values, whole or in parts already, into a parameter or this process's part of one."""
    if is_part(parameter) and not is_part(values):
        parameter.to_local().copy_(_part(values, parameter))
    else:
        parameter.copy_(values)


def shared_out(values: Any, like: Tensor) -> Any:
    """A tensor of a parameter's shape as that one is held; everything else as it is."""
    if not is_part(like) or not isinstance(values, Tensor) or values.shape != like.shape:
        return values
    from torch.distributed.tensor import DTensor

    part = _part(values, like).to(like.to_local().device, copy=True)
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(values: Any, *, keep: bool) -> Any:
    """Nested dictionaries and lists with whole tensors in the place of parts, on the CPU.

    All processes must call this together; where ``keep`` is false the tensors are dropped as they come.
    """
    if is_part(values):
        whole = values.full_tensor().detach()
        return whole.cpu() if keep else None
    if isinstance(values, Mapping):
        return {key: gathered(value, keep=keep) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(gathered(value, keep=keep) for value in values)
    return values


def total_norm(parameters: list[nn.Parameter], clip: float) -> float:
    """The length of all gradients together, which are scaled down to ``clip`` if it is greater."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    return (norm.full_tensor() if is_part(norm) else norm).item()


def _part(values: Tensor, like: DTensor) -> Tensor:
    """This process's rows of a whole tensor."""
    parts, rank = values.chunk(like.device_mesh.size()), like.device_mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else values[:0]
