"""The loop from noise to a latent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import Hint, WanError
from ..lookup import look_up
from .experts import Expert, Experts
from .finite import Call, Verdict
from .guidance import OnBlock, Side, entries
from .guidance_rules import PLAIN, Guidance, Kept
from .guidance_run import Guided
from .schedules import Schedule
from .solvers import RENOISES, SOLVERS, Fresh, History, Solver
from .step_cache import CachedSteps, Memory, StepCache

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class KnownLatent:
    """Parts of the video that are known.

    The model sees them at the noise level of the step (or clean), and its clean estimate is replaced by them there, so
    that the flow leads to them; a mask between 0 and 1 blends. This is how ComfyUI's samplers read a noise_mask.

    Attributes:
        latent: [B,C,T,h,w] clean and normalised.
        mask: five dimensions that broadcast to the latent; 1 = denoise, 0 = keep, between = a blend.
        noise: what kept places are noised with; the noise that the run started from. Not used when ``clean``.
        clean: True for TI2V, which was trained on clean frames beside noisy ones: kept places stay clean throughout,
            and the model is told of each latent frame the timestep times the part of it that is noisy, hence 0 for one
            wholly kept.
    """

    latent: Tensor
    mask: Tensor
    noise: Tensor | None = None
    clean: bool = False

    def __post_init__(self) -> None:
        if not self.clean and self.noise is None:
            raise ValueError("kept places need noise unless they are clean")

    def put_back(self, x: Tensor) -> Tensor:
        """x with the wholly kept places exactly as given."""
        return torch.where(self.mask == 0, self.latent, x)

    def seen(self, x: Tensor, sigma: float) -> Tensor:
        """x as the model must see it at a noise level."""
        known = self.latent if self.noise is None or self.clean else noised(self.latent, self.noise, sigma)
        return (1 - self.mask) * known + self.mask * x

    def flow(self, v: Tensor, x: Tensor, seen: Tensor, sigma: float) -> Tensor:
        """The velocity at the solver's x that leads to the blend of the model's clean estimate and the known latent.

        Equal to v, to the last bit, where all is denoised.
        """
        return self.mask * (v + (x - seen) / sigma) + (1 - self.mask) * (x - self.latent) / sigma

    def frame_timesteps(self, t: Tensor) -> Tensor:
        """[B] -> [B,T] for a clean model, else t as it is; on the CPU."""
        return t[:, None] * self._noisy.to(t) if self.clean else t

    @cached_property
    def _noisy(self) -> Tensor:
        """The part of each latent frame that is denoised, [B,T]: the device is waited for once, not at each step."""
        one_channel = self.latent[:, :1].shape
        return self.mask.mean(dim=1, keepdim=True).expand(one_channel).mean(dim=(1, 3, 4)).cpu()

    def to(self, device: torch.device) -> KnownLatent:
        noise = None if self.noise is None else self.noise.to(device, torch.float32)
        latent, mask = (part.to(device, torch.float32) for part in (self.latent, self.mask))
        return KnownLatent(latent, mask, noise, self.clean)


@dataclass(frozen=True, eq=False)
class Run:
    """One walk down a schedule, without the model that walks.

    Attributes:
        positive, negative: a condition, or several entries with ranges and weights; the negative side may be left out
            where all guidance is 1.
        known: what is known of the latent.
        start, end: the steps to do, ``end`` excluded; None, or past the last, means the last.
        fresh: the noise of each step, for solvers that noise anew.
    """

    schedule: Schedule
    solver: str
    positive: Side
    negative: Side | None = None
    known: KnownLatent | None = None
    start: int = 0
    end: int | None = None
    cache: StepCache | None = None
    guidance: Guidance = PLAIN
    fresh: Fresh | None = None

    @property
    def last(self) -> int:
        """The step before which the run ends."""
        return self.schedule.steps if self.end is None else min(self.end, self.schedule.steps)

    def prompts(self, guided: bool) -> int:
        """How many conditions there are, hence calls of the model at a step at most; without guidance one side's."""
        sides = [self.positive] if self.negative is None or not guided else [self.positive, self.negative]
        return sum(len(entries(side)) for side in sides)


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run is: enough to stop it, save it, and go on to the identical result.

    Attributes:
        x: the sample [B,C,T,h,w].
        step: the step that comes next.
        history: the solver's.
        expert: who worked at the step before.
        kept: what guidance ("guidance.…") and step caches ("cache.…") keep from one step to the next. It belongs to the
            expert at work and is dropped when the other takes over; the solver's history is not.
    """

    x: Tensor
    step: int
    history: History = field(default_factory=History)
    expert: str | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def under(self, expert: str) -> RunState:
        """As the expert of the coming step finds it."""
        return self if self.expert in (None, expert) else RunState(self.x, self.step, self.history, expert)

    def to_tensors(self) -> dict[str, Tensor]:
        """As named tensors, ready for a safetensors file."""
        saved = {"sample": self.x.contiguous(), "step": torch.tensor(self.step)}
        saved |= {f"solver.{name}": tensor for name, tensor in self.history.to_tensors().items()}
        saved |= {f"kept.{name}": tensor.contiguous() for name, tensor in self.kept.items()}
        if self.expert is not None:
            saved["expert"] = torch.tensor(list(self.expert.encode()), dtype=torch.uint8)
        return _each_its_own(saved)

    @classmethod
    def from_tensors(cls, saved: Mapping[str, Tensor]) -> RunState:
        expert = bytes(saved["expert"].tolist()).decode() if "expert" in saved else None
        history = History.from_tensors(_below("solver.", saved))
        return cls(saved["sample"], int(saved["step"]), history, expert, _below("kept.", saved))


def _each_its_own(saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies where two names are one tensor: solver and cache may keep the same sample, which no file takes twice."""
    seen: set[int] = set()
    for name, tensor in saved.items():
        if tensor.data_ptr() in seen:
            saved[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return saved


def _below(prefix: str, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


@dataclass(frozen=True, eq=False)
class StepReport:
    """A step that has just been done.

    Attributes:
        index: the step in the schedule, from 0.
        done: steps done of this run's ``total``.
        sigma: the noise level that is left in ``x``.
        expert: "high", "low" or "only".
        x0: the clean estimate that the step was made with.
        state: all that is needed to go on from here.
        computed: whether the model was asked; a step cache may have extrapolated its answer.
        calls: how often it was asked.
    """

    index: int
    done: int
    total: int
    sigma: float
    expert: str
    x0: Tensor
    state: RunState
    computed: bool = True
    calls: int = 1

    @property
    def x(self) -> Tensor:
        """The sample after the step."""
        return self.state.x


@dataclass(frozen=True)
class Callbacks:
    """What is told of a run while it goes; the first two may raise to cancel it.

    Attributes:
        on_step: called after each step, in their order, once its numbers are known to be finite: where the device
            works by itself, that is while it computes the next one.
        on_block: called by the model at each block.
        on_plan: called with each layout in memory, before its weights are loaded.
        on_note: called with what the user should know.
        on_progress: called with what is under way and takes long, such as compiling.
    """

    on_step: Callable[[StepReport], None] | None = None
    on_block: OnBlock | None = None
    on_plan: Callable[[Any], None] | None = None
    on_note: Callable[[str], None] = log.warning
    on_progress: Callable[[str], None] = log.info


SILENT = Callbacks()


def noised(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A clean latent at a noise level: where a video-to-video run starts."""
    return sigma * noise + (1 - sigma) * latent


@torch.no_grad()
def denoise(begin: Tensor | RunState, experts: Experts, run: Run, callbacks: Callbacks = SILENT) -> RunState:
    """Walk a sample down the schedule.

    Args:
        begin: [B,C,T,h,w] at the noise level of ``run.start``: pure noise for a full run, `noised` for video-to-video,
            what an earlier run left; the solver then begins at order 1. Or the state of an earlier run, which is gone
            on with to the identical result.

    Returns:
        The state before ``run.end``; its sample is float32.

    Raises:
        WanError: an unknown solver, a start past the end, a state of another step, or values that are not finite.
    """
    solver = _solver(run)
    state = begin if isinstance(begin, RunState) else RunState(begin, run.start)
    _check_range(run, state)
    cached = _cached(run, experts)
    _check_guidance(run, experts)
    x = _checked_finite(state.x.float())
    known = run.known.to(x.device) if run.known else None
    if known and known.clean:
        x = known.put_back(x)
    state = RunState(x, state.step, state.history.to(x.device), state.expert, state.kept)
    state = _Walk(solver, experts, run, known, callbacks, cached).from_here(state)
    if cached:
        callbacks.on_note(cached.report())
    return state


def _solver(run: Run) -> Solver:
    solver: Callable[..., tuple[Tensor, History]] = look_up(SOLVERS, run.solver, "solver")
    return partial(solver, fresh=run.fresh) if run.solver in RENOISES else solver


def _cached(run: Run, experts: Experts) -> CachedSteps | None:
    """The run's step cache, if it has one.

    Raises:
        WanError: see ``StepCache.check``.
    """
    if run.cache is None:
        return None
    names = experts.names(run.schedule)
    run.cache.check(run.schedule, run.solver, names)
    return CachedSteps(run.cache, run.schedule, names, run.start, run.last)


def _check_guidance(run: Run, experts: Experts) -> None:
    """
    Raises:
        WanError: see ``Guidance.check`` and ``check_sides``; or steps that rest under a solver that noises anew.
    """
    if run.solver in RENOISES and run.guidance.rests(0):
        raise WanError(
            f"cfg_zero_star leaves the first steps as they are, but the solver {run.solver} noises anew at each: set "
            "zero_steps to 0, or choose another solver."
        )
    scales = {expert.name: expert.guidance for expert in (experts.high, experts.low)}
    run.guidance.check(run.schedule, experts.names(run.schedule), scales, run.start, run.last)
    run.guidance.check_sides(run.positive, run.negative, run.schedule.sigmas[run.start : run.last].tolist())


@dataclass(frozen=True, eq=False)
class _Taken:
    """A step that was taken, whether or not its numbers are numbers.

    Attributes:
        before: the state to go back to if they are not. All that a step changes is in the state, but ``counts``.
        counts: the step cache's, before it.
    """

    before: RunState
    report: StepReport
    verdict: Verdict
    counts: Mapping[bool, int]

    @property
    def after(self) -> RunState:
        return self.report.state


class _NotFinite(Exception):
    """A step was taken with an answer that is not finite; ends whatever was begun with it."""

    def __init__(self, taken: _Taken, call: Call):
        super().__init__()
        self.taken, self.call = taken, call


class _Walk:
    """A run under way.

    Whether a step's numbers are finite is known when the device has computed it, and the host does not wait: it gives
    the device the next step meanwhile. A step is reported when its numbers are known to be good; where they are not,
    the run goes back to before it. At most one step is open.
    """

    def __init__(
        self,
        solver: Solver,
        experts: Experts,
        run: Run,
        known: KnownLatent | None,
        callbacks: Callbacks,
        cached: CachedSteps | None,
    ):
        self.solver, self.experts, self.run, self.schedule = solver, experts, run, run.schedule
        self.known, self.callbacks, self.cached = known, callbacks, cached
        self._velocity = _Velocity(experts, run, known, replace(callbacks, on_block=self._on_block), cached)
        self._turns = run.guidance.turns(run.schedule)  # a step cache does not extrapolate over them
        self._open: _Taken | None = None

    def from_here(self, state: RunState) -> RunState:
        """The state after the last step."""
        try:
            while state.step < self.run.last or self._open:
                try:
                    if state.step == self.run.last or self._changes_hands(state):
                        self._close()
                    if state.step < self.run.last:
                        state = self._on(state)
                except _NotFinite as failed:
                    state = self._mended(failed.taken, failed.call)
            return state
        finally:
            del self._velocity  # which calls back here: tensors and models go with the run, not with a collection

    def _on(self, state: RunState) -> RunState:
        """One step further."""
        try:
            taken = self._taken(state)
        except RuntimeError:  # of memory, say: who goes on need not take the step before this one again
            with suppress(_NotFinite):
                self._close()
            raise
        self._close()
        self._open = taken
        if taken.verdict.is_known():
            self._close()
        return taken.after

    def _taken(self, state: RunState) -> _Taken:
        i, velocity, cached = state.step, self._velocity, self.cached
        self.experts.announce(i, self.schedule)
        expert = self.experts.at(i, self.schedule).name
        before = state.under(expert)
        counts = dict(cached.steps) if cached else {}
        velocity.begin(i, _below("guidance.", before.kept))
        if cached:
            known_steps = {} if i in self._turns else _below("cache.", before.kept)
            cached.memory = Memory.from_tensors(known_steps, before.x.device)
        x, history = self.solver(before.x, i, self.schedule, velocity, before.history)
        sigma = self.schedule.sigmas[i + 1].item()
        if self.known and (self.known.clean or sigma == 0):
            x = self.known.put_back(x)
        kept = dict(before.kept) if cached is None else _under("cache.", cached.memory.to_tensors())
        after = RunState(x, i + 1, history, expert, kept | _under("guidance.", velocity.kept))
        assert velocity.x0 is not None  # every solver has called it
        done, total, calls = i + 1 - self.run.start, self.run.last - self.run.start, velocity.guided.calls
        report = StepReport(i, done, total, sigma, expert, velocity.x0, after, calls > 0, calls)
        return _Taken(before, report, Verdict(velocity.calls), counts)

    def _changes_hands(self, state: RunState) -> bool:
        """Whether the other expert takes over: it has to be loaded, and going back would load the first one again."""
        return state.expert not in (None, self.experts.at(state.step, self.schedule).name)

    def _on_block(self, index: int) -> None:
        if self._open and self._open.verdict.is_known():
            self._close()
        if self.callbacks.on_block:
            self.callbacks.on_block(index)

    def _close(self) -> None:
        """Report the open step, if there is one.

        Raises:
            _NotFinite: its numbers are not finite.
        """
        taken, self._open = self._open, None
        if taken is None:
            return
        if call := taken.verdict.failed():
            raise _NotFinite(taken, call)
        if self.callbacks.on_step:
            self.callbacks.on_step(taken.report)

    def _mended(self, taken: _Taken, call: Call) -> RunState:
        """The state from which to go on after a step whose numbers are not finite.

        Raises:
            WanError: nothing can be computed more exactly.
        """
        self._open = None
        expert = call.expert
        expert.begin(call.step, self.schedule.steps)
        self._velocity.begin(taken.report.index, _below("guidance.", taken.before.kept))
        where = expert.first_not_finite(lambda: self._velocity.asked(expert, call.x, call.t, call.step))
        rounded = expert.be_exact()
        if rounded is None:
            raise WanError(_not_finite(call.step, self.schedule, expert, where))
        self.callbacks.on_note(
            f"Step {call.step + 1} of {self.schedule.steps}: with the attention {rounded!r} {_who(expert)} answered "
            f"with NaN or infinity{_first(where)}. The step is done again with 'sdpa', and so are its next ones."
        )
        if self.cached:
            self.cached.steps = dict(taken.counts)
        return taken.before


class _Velocity:
    """What a solver calls: the guided model at a step, with what is known in place. Keeps its last clean estimate, what
    guidance keeps for the next step, and the step's calls."""

    def __init__(
        self, experts: Experts, run: Run, known: KnownLatent | None, callbacks: Callbacks, cached: CachedSteps | None
    ):
        self.experts, self.run, self.schedule = experts, run, run.schedule
        self.known, self.cached = known, cached
        self.guided = Guided(run.guidance, run.positive, run.negative, callbacks.on_block, callbacks.on_note)
        self.kept: Kept = {}
        self.x0: Tensor | None = None
        self.calls: list[Call] = []

    def begin(self, i: int, kept: Kept) -> None:
        """Step i comes; its calls find what guidance kept from the one before, however often they are made."""
        self._step, self._before, self.kept = i, kept, kept
        self.guided.calls, self.calls = 0, []

    def __call__(self, x: Tensor, i: int) -> Tensor:
        sigma = self.schedule.sigmas[i].item()
        t = torch.full((x.shape[0],), self.schedule.timesteps[i].item())  # on the CPU, where models compare them
        if self.known is None:
            v = self._guided(x, t, i)
        else:
            seen = self.known.seen(x, sigma)
            v = self.known.flow(self._guided(seen, self.known.frame_timesteps(t), i), x, seen, sigma)
        self.x0 = x - sigma * v
        return v

    def _guided(self, x: Tensor, t: Tensor, i: int) -> Tensor:
        if self.run.guidance.rests(i):
            return torch.zeros_like(x)
        if self.cached:
            return self.cached.answer(i, x, lambda: self._computed(x, t, i))
        return self._computed(x, t, i)

    def _computed(self, x: Tensor, t: Tensor, i: int) -> Tensor:
        expert = self.experts.at(i, self.schedule)
        expert.begin(i, self.schedule.steps)
        v = self.asked(expert, x, t, i)
        self.calls.append(Call(expert, x, t, i, torch.isfinite(v).all()))
        return v

    def asked(self, expert: Expert, x: Tensor, t: Tensor, i: int) -> Tensor:
        """The guided answer of an expert for a step."""
        sigma = self.schedule.sigmas[i].item()
        if i == self._step:
            v, self.kept = self.guided.velocity(expert, x, t, sigma, self._before)
            return v
        # A solver that looks ahead: the next step begins with what this one keeps, and asks again.
        same = expert.name == self.experts.at(self._step, self.schedule).name
        return self.guided.velocity(expert, x, t, sigma, self.kept if same else {})[0]


def _who(expert: Expert) -> str:
    return "the model" if expert.name == "only" else f"the {expert.name}-noise expert"


def _first(where: str | None) -> str:
    return f", first in {where}" if where else ""


def _not_finite(i: int, schedule: Schedule, expert: Expert, where: str | None) -> str:
    return (
        f"Step {i + 1} of {schedule.steps}: {_who(expert)} answered with NaN or infinity at timestep "
        f"{schedule.timesteps[i].item():g}{_first(where)}. Load it in bfloat16 or float32 instead of float16, choose "
        "the attention 'sdpa', lower the LoRA strengths, and check that the file is complete."
    )


def _checked_finite(x: Tensor) -> Tensor:
    if not torch.isfinite(x).all():
        raise WanError("The latent to start from holds NaN or infinity.", Hint.BAD_LATENT)
    return x


def _check_range(run: Run, state: RunState) -> None:
    steps, start, end = run.schedule.steps, run.start, run.last
    if not 0 <= start < steps:
        raise WanError(f"The start step is {start}, but the schedule has {steps} steps: expected 0 to {steps - 1}.")
    if end <= start:
        raise WanError(f"The end step {end} is not after the start step {start}: nothing would be done.")
    if not start <= state.step <= end:
        raise WanError(
            f"The saved run goes on at step {state.step}, but the start step is {start} and the end step {end}: "
            f"start at {state.step}, or with its sample alone."
        )
