"""The steps of a run, whatever is trained: optimiser, average, log, saving, and going on after a kill.

Nothing of a step depends on what ran before it in the same process: batches and noise are functions of the seed and
the step's number. So a run that is killed and started again ends with the same weights, to the last bit, as one that
was not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import WanError
from ..files.atomic import unfinished
from .folder import LOG, PLOT, STATE, check_folder, forget, read_state
from .optim import cosine, make_optimiser
from .parallel import Losses, Processes
from .report import Log, plot_loss, read_log
from .sharded import fill, gathered, is_sharded, shared_out, total_norm

__all__ = ["LOG", "PLOT", "STATE", "Plan", "StepReport", "Task", "check_resumable", "forget", "save_atomically",
           "train"]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How a run walks.

    Attributes:
        accumulate: batches whose gradients are averaged into one step.
        ema: decay of the averaged weights, which are what is saved at the end; 0 keeps no average.
        save_every: steps between saved states; 0 leaves it to ``save_seconds`` alone.
        sample_every: steps between sample grids; 0 makes none.
    """

    steps: int
    learning_rate: float
    seed: int = 0
    optimiser: str = "adamw"
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    save_every: int = 0
    save_seconds: float = 120.0
    sample_every: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise WanError(f"{self.steps} steps of {self.accumulate} batches: at least 1 of each is needed.")
        if not 0 <= self.ema < 1:
            raise WanError(f"The EMA decay is {self.ema}: expected 0 (none) up to, but not, 1.")

    def decides(self) -> dict[str, object]:
        """What a run that is gone on with must not change: the rest does not touch the weights."""
        free = ("save_every", "save_seconds", "sample_every")
        return {key: value for key, value in asdict(self).items() if key not in free}


class Task(Protocol):
    """What is trained."""

    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The loss of batch number ``batch``, and figures for the log. All chance comes from the generator."""

    def sample(self, step: int, folder: Path) -> None: ...

    def describe(self) -> dict[str, object]:
        """What the data and the model are, to refuse going on with another run's state."""


@dataclass(frozen=True)
class StepReport:
    step: int  # steps done
    steps: int
    loss: float


@dataclass(eq=False)
class _State:
    step: int
    optimiser: torch.optim.Optimizer
    average: dict[str, Tensor] | None
    whole: bool = True  # not in the midst of a step, whose parts must not be saved apart


def train(
    task: Task,
    plan: Plan,
    folder: Path,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    seconds: float | None = None,
) -> bool:
    """Walk to the end of the plan, from where ``folder`` says an earlier run stopped.

    Args:
        on_step: called after each step; what it raises ends the run, which saves its state first (a sharded one's last
            state stays).
        seconds: stop, saved, after so long; the next call goes on.

    Returns:
        whether the plan is done; then the parameters hold the averaged weights, if there is an average.

    Raises:
        WanError: the folder holds a run of another plan, model or data, a damaged state, or files that are not ours;
            a loss that is not finite; a disk that is full, which leaves the state before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_folder(folder)
    processes = Processes.current()
    parameters = {name: p for name, p in task.parameters().items() if p.requires_grad}
    state = _start(task, plan, parameters, folder / STATE)
    losses, sharded = processes.together(task.loss, parameters.values()), is_sharded(parameters)
    log = Log(folder / LOG, state.step) if processes.first else None
    begun = saved = time.monotonic()
    try:
        while state.step < plan.steps:
            row = _step(losses, plan, state, parameters, processes)
            if log:
                log.write(row)
            if (processes.first or sharded) and plan.sample_every and state.step % plan.sample_every == 0:
                with averaged(parameters, state.average):
                    task.sample(state.step, folder)
            if processes.any(_due(plan, state.step, saved)):
                _save(task, plan, state, parameters, folder, processes)
                saved = time.monotonic()
            if on_step:
                on_step(StepReport(state.step, plan.steps, row["loss"]))
            if seconds is not None and processes.any(time.monotonic() - begun > seconds):
                break
    except BaseException as error:
        # Parts of a state come together only where all processes stop at the same place.
        if state.whole and (not sharded or isinstance(error, _Diverged)):
            _save(task, plan, state, parameters, folder, processes)
        raise
    _save(task, plan, state, parameters, folder, processes)
    if state.step < plan.steps:
        return False
    if state.average:
        _copy(parameters, state.average)
    return True


def _due(plan: Plan, step: int, saved: float) -> bool:
    if plan.save_every:
        return step % plan.save_every == 0
    return time.monotonic() - saved > plan.save_seconds


class _Diverged(WanError):
    """A loss that is no number: all processes find it at the same step."""


def _step(
    losses: Losses, plan: Plan, state: _State, parameters: Mapping[str, nn.Parameter], processes: Processes
) -> dict[str, float]:
    began = time.monotonic()
    rate = plan.learning_rate * cosine(state.step, plan.steps, plan.warmup)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.zero_grad(set_to_none=True)
    total, figures = 0.0, dict[str, float]()
    for part in range(plan.accumulate):
        batch = (state.step * plan.accumulate + part) * processes.count + processes.rank
        chance, last = step_generator(plan.seed, batch), part + 1 == plan.accumulate
        loss, figures = losses.backward(batch, chance, of=plan.accumulate, last=last)
        total += loss / plan.accumulate
    total = processes.mean(total)
    norm = total_norm(list(parameters.values()), plan.clip or float("inf"))
    if not (total == total and norm < float("inf")):
        raise _Diverged(
            f"Step {state.step + 1}: the loss is {total} and its gradient {norm}. Lower the learning rate "
            f"(now {rate:g}), or train in fp32; the state before this step is kept."
        )
    state.whole = False
    state.optimiser.step()
    state.step += 1
    _average(state.average, parameters, plan.ema, state.step)
    state.whole = True
    spent = time.monotonic() - began
    return {"step": state.step, "loss": total, "learning_rate": rate, "gradient": norm, "seconds": spent, **figures}


def step_generator(seed: int, batch: int) -> torch.Generator:
    """Chance for one batch, the same in every run of this seed."""
    return torch.Generator().manual_seed((seed * 1_000_003 + batch) % (2**63 - 1))


def _average(average: dict[str, Tensor] | None, parameters: Mapping[str, Tensor], decay: float, step: int) -> None:
    """The average forgets its random start: early on its decay is smaller."""
    if average is None:
        return
    with torch.no_grad():
        for name, parameter in parameters.items():
            average[name].lerp_(parameter, 1 - min(decay, (1 + step) / (10 + step)))


@contextmanager
def averaged(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor] | None) -> Iterator[None]:
    """The averaged weights in place of the trained ones, for samples and for saving."""
    if average is None:
        yield
        return
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _copy(parameters, average)
        yield
    finally:
        _copy(parameters, own)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        fill(parameter, values[name])


def _start(task: Task, plan: Plan, parameters: Mapping[str, nn.Parameter], file: Path) -> _State:
    optimiser = make_optimiser(plan.optimiser, parameters.values(), plan.learning_rate, plan.weight_decay)
    if not file.exists():
        average = {name: p.detach().clone() for name, p in parameters.items()} if plan.ema else None
        return _State(0, optimiser, average)
    saved = read_state(file, mmap=is_sharded(parameters))
    _check_same(file, saved["describes"], _describe(task, plan))
    try:
        _copy(parameters, saved["weights"])
        optimiser.load_state_dict(_shared_out(saved["optimiser"], list(parameters.values())))
        average = (
            {name: _held(t, parameters[name]) for name, t in saved["average"].items()} if saved["average"] else None
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WanError(
            f"{file} is damaged: what it holds is not the state of these weights ({type(error).__name__}). "
            "It is left as it is. To begin anew, move it away or choose another output folder."
        ) from error
    return _State(saved["step"], optimiser, average)


def _held(values: Tensor, parameter: Tensor) -> Tensor:
    return shared_out(values, parameter).to(parameter.device)


def _shared_out(saved: dict, parameters: Sequence[Tensor]) -> dict:
    """An optimiser's state, whose tensors are as long as the parameters with these numbers."""
    states = {
        i: {name: shared_out(value, parameters[i]) for name, value in state.items()}
        for i, state in saved["state"].items()
    }
    return saved | {"state": states}


def _save(
    task: Task, plan: Plan, state: _State, parameters: Mapping[str, Tensor], folder: Path, processes: Processes
) -> None:
    content = {
        "step": state.step,
        "weights": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimiser": state.optimiser.state_dict(),
        "average": state.average,
        "describes": _describe(task, plan),
    }
    content = gathered(content, keep=processes.first)
    if not processes.first:
        return
    save_atomically(folder / STATE, content)
    plot_loss([float(row["loss"]) for row in read_log(folder / LOG)], folder / PLOT)


def save_atomically(file: Path, content: dict) -> None:
    """A kill at any moment leaves the old file or the new one, never half of one."""
    with unfinished(file) as partial, partial.open("wb") as out:
        torch.save(content, out)
        out.flush()
        os.fsync(out.fileno())


def _describe(task: Task, plan: Plan) -> dict[str, str]:
    return {key: str(value) for key, value in {**_walk(plan), **task.describe()}.items()}


def _walk(plan: Plan) -> dict[str, object]:
    """Two processes walk as one that accumulates two batches: either may go on with the other's state."""
    return plan.decides() | {"accumulate": plan.accumulate * Processes.current().count}


def check_resumable(file: Path, plan: Plan, *, steps: bool = True) -> None:
    """Find out before the work whether a run can be gone on with, as far as its plan tells.

    Args:
        steps: whether the plan's number of steps is known yet.

    Raises:
        WanError: ``file`` is damaged, or the state of a run with another plan.
    """
    if not file.exists():
        return
    saved = read_state(file, mmap=True)["describes"]
    now = {key: str(value) for key, value in _walk(plan).items() if steps or key != "steps"}
    _check_same(file, {key: saved.get(key) for key in now}, now)


def _check_same(file: Path, saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    changed = [
        _DIGESTS.get(key) or f"{key} was {saved.get(key)}, now {now.get(key)}"
        for key in sorted({*saved, *now})
        if saved.get(key) != now.get(key)
    ]
    if changed:
        raise WanError(
            f"{file} is the state of another run: {'; '.join(changed)}. Give a new output folder, or "
            "the old options to go on."
        )


_DIGESTS = {"data": "the clips, their prompts, size or number are others", "base": "the model's weights are others"}
