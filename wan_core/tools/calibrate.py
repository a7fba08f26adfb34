"""How the residual of a model's blocks grows from step to step, measured on one run: for the step cache magnitude."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WanError
from ..external import only_own
from ..loading.dit import DiTFile
from ..loading.file import ModelFile
from ..loading.step_caches import curve_file, write_curve
from ..memory.engine import Engine, LazyDiT
from ..models.dit.dit import WanDiT
from ..pipeline import Models, Request, generate
from ..recipe import ModelRecipe, Network
from ..sampling.denoise import SILENT, Callbacks, StepReport
from ..sampling.experts import Model
from ..sampling.guidance import Condition
from ..sampling.guidance_rules import PLAIN

_AT_ONCE = 8192  # tokens whose residual becomes float32 at once


@dataclass(frozen=True)
class Measured:
    """One expert's curve: noise levels, and how the residual grew between each two."""

    model: DiTFile
    sigmas: tuple[float, ...]
    ratios: tuple[float, ...]


def calibrate(
    models: Models,
    request: Request,
    *,
    device: torch.device,
    text_device: torch.device | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[Measured]:
    """Generate once, every step computed, and measure each expert on the way; with the positive prompt, as MagCache.

    Raises:
        WanError: see ``generate``; an expert that did fewer than two steps.
    """
    only_own(models.dit.files, "Measuring")
    models = replace(models, dit=replace(models.dit, step_cache=None, guidance=PLAIN))
    timetable = request.completed(models.dit.variant).timetable()
    engine = _Engine()
    sizes: dict[str, list[tuple[float, Tensor]]] = {}

    def step(report: StepReport) -> None:
        size = engine.meters[_file(models.dit, report.expert)].take()
        sizes.setdefault(report.expert, []).append((timetable.sigmas[report.index].item(), size))
        if on_step:
            on_step(report)

    generate(models, request, engine, device=device, text_device=text_device, on_step=step)
    return [_measured(_file(models.dit, expert), expert, found) for expert, found in sizes.items()]


def save(measured: list[Measured], how: dict[str, object], *, overwrite: bool) -> list[Path]:
    """Write each curve beside its model.

    Raises:
        WanError: one is there already and ``overwrite`` is off; a folder that cannot be written to.
    """
    files = [curve_file(one.model.path) for one in measured]
    check_free(files, overwrite=overwrite)
    for file, one in zip(files, measured, strict=True):
        try:
            write_curve(file, one.model, list(one.sigmas), list(one.ratios), how)
        except OSError as error:
            raise WanError(f"Cannot write {file}: {error.strerror or error}.") from error
    return files


def check_free(files: list[Path], *, overwrite: bool) -> None:
    """
    Raises:
        WanError: a file is there already and ``overwrite`` is off.
    """
    taken = [str(file) for file in files if file.exists()]
    if taken and not overwrite:
        raise WanError(f"There is a curve already: {', '.join(taken)}. It is replaced where that is asked for.")


def _file(recipe: ModelRecipe, expert: str) -> DiTFile:
    found = recipe.low if expert == "low" else recipe.high
    assert isinstance(found, ModelFile)  # see ``only_own``
    return found


def _measured(model: DiTFile, expert: str, found: list[tuple[float, Tensor]]) -> Measured:
    if len(found) < 2:
        raise WanError(f"The {expert}-noise expert did {len(found)} step: at least two are needed. Use more steps.")
    sizes = [size for _, size in found]
    ratios = tuple((now / before).mean().item() for before, now in zip(sizes, sizes[1:], strict=False))
    return Measured(model, tuple(sigma for sigma, _ in found), ratios)


@dataclass(eq=False)
class _Meter:
    """The size of each token's residual [B, L] in the last call with the positive prompt."""

    key: int | None = None  # of the first condition asked for, which is the positive one
    size: Tensor | None = None

    def take(self) -> Tensor:
        assert self.size is not None  # the model was asked at this step
        size, self.size = self.size, None
        return size


class _Engine(Engine):
    """An engine whose experts are measured."""

    def __init__(self) -> None:
        super().__init__(keep_one=True)
        self.meters: dict[DiTFile, _Meter] = {}

    def _network(
        self, file: Network, recipe: ModelRecipe, device: torch.device, callbacks: Callbacks = SILENT
    ) -> Model:
        assert isinstance(file, ModelFile)  # see ``only_own``
        return _MeasuredDiT(self, file, recipe, device, self.meters.setdefault(file, _Meter()))


class _MeasuredDiT(LazyDiT):
    """An expert beside which a meter stands."""

    def __init__(self, engine: Engine, file: DiTFile, recipe: ModelRecipe, device: torch.device, meter: _Meter):
        super().__init__(engine, file, recipe, device)
        self.meter = meter

    def __call__(
        self, x: Tensor, t: Tensor, condition: Condition, on_block: Callable[[int], None] | None = None
    ) -> Tensor:
        if self.meter.key is None:
            self.meter.key = condition.key
        if condition.key != self.meter.key:
            return super().__call__(x, t, condition, on_block)
        with _metered(self.engine.dit(self.file, self.recipe, self.device), self.meter):
            return super().__call__(x, t, condition, on_block)


@contextmanager
def _metered(dit: WanDiT, meter: _Meter) -> Iterator[None]:
    """Between what goes into the first block and what comes out of the last: that is the residual."""
    entered: list[Tensor] = []
    first = dit.blocks[0].register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    last = dit.blocks[-1].register_forward_hook(lambda _, args, out: _note(meter, entered.pop(), out))
    try:
        yield
    finally:
        first.remove()
        last.remove()


def _note(meter: _Meter, before: Tensor, after: Tensor) -> None:
    parts = zip(before.split(_AT_ONCE, dim=1), after.split(_AT_ONCE, dim=1), strict=True)
    meter.size = torch.cat([(b.float() - a.float()).norm(dim=-1) for a, b in parts], dim=1).cpu()
