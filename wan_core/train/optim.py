"""Optimisers by name, and the cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..errors import WanError
from .precision import resolve_precision


def cosine(step: int, steps: int, warmup: int) -> float:
    """The factor of the learning rate: a linear rise over ``warmup`` steps, then half a cosine down to a hundredth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), for matrices
    and convolutions; all else goes the way of Adam, as the paper advises.

    ``lr`` is on Adam's scale: an orthogonal step is sized like an Adam step (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict) -> None:
        direction = self._matrix if is_matrix(parameter) else self._adam
        parameter.mul_(1 - group["lr"] * group["weight_decay"] * (parameter.ndim > 1))
        parameter.sub_(direction(parameter, gradient, group), alpha=group["lr"])

    def _matrix(self, parameter: Tensor, gradient: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1)
        return orthogonal(ahead).mul_(0.2 * math.sqrt(max(ahead.shape))).view_as(parameter)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict) -> Tensor:
        state = self.state[parameter]
        first = state.setdefault("first", torch.zeros_like(parameter))
        second = state.setdefault("second", torch.zeros_like(parameter))
        count = state["count"] = state.get("count", 0) + 1
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        return (first / (1 - 0.9**count)) / ((second / (1 - 0.95**count)).sqrt_().add_(1e-8))


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter maps channels to channels: matrices and kernels, not norms, biases and modulations."""
    return parameter.ndim >= 2 and parameter.shape[0] > 1 and parameter[0].numel() > 1


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iterations towards the nearest matrix whose singular values are all 1; half precision is enough."""
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / (x.norm() + 1e-7)
    if resolve_precision("auto", matrix.device) == "bf16":
        x = x.bfloat16()
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x if wide else x.T).to(matrix.dtype)


def _adamw(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw, "muon": Muon}


def make_optimiser(name: str, parameters: Iterable[nn.Parameter], lr: float, decay: float) -> torch.optim.Optimizer:
    """An optimiser from the registry.

    Raises:
        WanError: an unknown name.
    """
    if name not in OPTIMISERS:
        raise WanError(f"Unknown optimiser {name!r}: expected one of {', '.join(OPTIMISERS)}.")
    return OPTIMISERS[name](list(parameters), lr=lr, weight_decay=decay)
