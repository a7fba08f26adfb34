"""Steps whose numbers are no numbers: found a step late where the device works by itself, gone back from, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.core.test_denoise import Cancelled, Toy, normal, pair, run, walk
from tests.core.test_dit import CLIP, T2V, inputs, make
from wan_core.config import PerExpert
from wan_core.errors import WanError
from wan_core.memory.engine import Engine
from wan_core.models.dit import attention
from wan_core.models.dit.attention import sdpa
from wan_core.models.dit.dit import SelfAttention, WanDiT
from wan_core.models.dit.features.clip_tokens import ClipTokens
from wan_core.models.dit.probe import NotFinite, watched
from wan_core.pipeline import Request, generate, read_models
from wan_core.sampling import denoise as denoising
from wan_core.sampling.denoise import Callbacks, RunState, StepReport, denoise
from wan_core.sampling.experts import Experts, Switch
from wan_core.sampling.finite import Verdict
from wan_core.sampling.schedules import schedule
from wan_core.sampling.solvers import SOLVERS
from wan_core.sampling.step_cache import StepCache
from wan_core.tools.tiny import TinySizes, write_tiny

NAN = float("nan")


class Late(Verdict):
    """As on a device that works by itself: known only when waited for, or after so many questions."""

    questions = 10**9

    def __init__(self, calls):
        super().__init__(calls)
        self.asked = 0

    def is_known(self) -> bool:
        self.asked += 1
        return self.asked > self.questions


@pytest.fixture(params=["waited for", "known at a block", "known soon"])
def late(request, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = {"waited for": 10**9, "known at a block": 2, "known soon": 1}[request.param]
    monkeypatch.setattr(Late, "questions", questions)
    monkeypatch.setattr(denoising, "Verdict", Late)


class Failing(Toy):
    """Answers with NaN in some of its calls until it is told to be exact."""

    def __init__(self, *calls: int, bend: float = 1.0, mends: bool = True):
        super().__init__(bend)
        self.failing, self.mends, self.exact, self.asked = calls, mends, False, 0

    def be_exact(self) -> str | None:
        told, self.exact = self.exact, True
        return None if told else "sage"

    def __call__(self, x: Tensor, *rest, **options) -> Tensor:
        answer = super().__call__(x, *rest, **options)
        self.asked += 1
        fails = self.asked - 1 in self.failing and not (self.exact and self.mends)
        return answer * NAN if fails else answer


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("step", [0, 1, 3, 5])
def test_a_step_is_gone_back_from_whenever_it_is_found(late, solver: str, step: int):
    """The first, one before a switch, one after it, the last; both prompts are asked, by Heun twice a step."""
    switch, said, reports = Switch("step", 2), [], []
    expected = run(pair(Toy(), Toy(0.5), switch=switch), solver)
    calls = 4 if solver == "heun" else 2
    high, low = (
        (Failing(calls * step), Failing(bend=0.5)) if step < 2 else (Failing(), Failing(calls * (step - 2), bend=0.5))
    )
    ours = run(pair(high, low, switch=switch), solver, Callbacks(reports.append, on_note=said.append))
    assert torch.equal(ours, expected)
    assert [report.index for report in reports] == list(range(6)) and all(r.x.isfinite().all() for r in reports)
    assert len(said) == 1 and f"Step {step + 1} of 6: with the attention 'sage'" in said[0]


@pytest.mark.parametrize("policy", [StepCache("every", 2), StepCache("easy", 0.2)], ids=lambda cache: cache.policy)
@pytest.mark.parametrize("call", [0, 4, 6, 8])
def test_what_a_cache_keeps_goes_back_too(late, policy: StepCache, call: int):
    def sampled(toy: Toy) -> tuple[Tensor, str]:
        said: list[str] = []
        along = schedule("unipc", 20, 5)
        state = denoise(
            normal(0), Experts.dense(toy, 1.0), walk(along=along, cache=policy), Callbacks(on_note=said.append)
        )
        return state.x, said[-1]

    (expected, counted), (ours, counted_too) = sampled(Toy()), sampled(Failing(call))
    assert torch.equal(ours, expected) and counted_too == counted


def test_steps_are_reported_in_order_each_once_and_finite(late):
    events: list[tuple[str, int]] = []
    reports: list[StepReport] = []

    def on_step(report: StepReport) -> None:
        events.append(("step", report.index))
        reports.append(report)

    plain: list[StepReport] = []
    experts = Experts.dense(Toy(), 1.0)
    denoise(normal(0), experts, walk(), Callbacks(on_step, lambda index: events.append(("block", index))))
    denoise(normal(0), experts, walk(end=4), Callbacks(plain.append))
    assert [report.index for report in reports] == list(range(6))
    for late_one, one in zip(reports, plain, strict=False):
        assert torch.equal(late_one.x, one.x) and torch.equal(late_one.x0, one.x0) and late_one.done == one.done


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_reported_state_goes_on_to_the_identical_result(late, stop: int):
    reports: list[StepReport] = []
    experts = pair(Toy(), Toy(0.5))
    whole = denoise(normal(0), experts, walk(), Callbacks(reports.append)).x
    state = RunState.from_tensors(reports[stop - 1].state.to_tensors())
    assert torch.equal(denoise(state, experts, walk()).x, whole)


def test_a_cancel_ends_the_run_at_once(late):
    def cancel(report: StepReport) -> None:
        raise Cancelled

    toy = Toy()
    with pytest.raises(Cancelled):
        run(Experts.dense(toy, 3.0), callbacks=Callbacks(on_block=lambda _: cancel(None)))
    assert len(toy.calls) == 1
    with pytest.raises(Cancelled):
        run(Experts.dense(toy, 3.0), callbacks=Callbacks(cancel))
    assert len(toy.calls) <= 1 + 4  # the step after the first had been begun


def test_who_runs_out_of_memory_is_told_first_of_what_was_done(late):
    """An open step is reported before the error comes out."""
    reports: list[StepReport] = []

    class Full(Toy):
        def __call__(self, *args, **options) -> Tensor:
            if len(self.calls) == 6:  # in the midst of the fourth step
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(*args, **options)

    experts = Experts.dense(Full(), 3.0)
    with pytest.raises(torch.OutOfMemoryError):
        denoise(normal(0), experts, walk(), Callbacks(reports.append))
    assert [report.index for report in reports] == [0, 1, 2]
    went_on = denoise(reports[-1].state, Experts.dense(Toy(), 3.0), walk()).x
    assert torch.equal(went_on, run(Experts.dense(Toy(), 3.0)))


def test_what_stays_not_finite_ends_the_run_though_it_is_found_late(late):
    model = Failing(*range(3, 99), mends=False)
    with pytest.raises(WanError, match="Step 4 of 6: the model answered with NaN"):
        denoise(normal(0), Experts.dense(model, 1.0), walk(), Callbacks(on_note=lambda _: None))


def test_across_the_switch_nothing_is_left_open(late):
    """Going back there would load the first expert again."""
    order: list[str] = []
    high, low = Toy(), Toy(0.5)
    low_call = low.__call__

    class Noted(Toy):
        def __call__(self, *args, **options) -> Tensor:
            order.append("low")
            return low_call(*args, **options)

    experts = pair(high, Noted(), (1.0, 1.0), Switch("step", 2))
    denoise(normal(0), experts, walk(), Callbacks(lambda report: order.append(str(report.index))))
    assert order.index("1") < order.index("low")


# --- the layer


def poisoned(model: WanDiT, key: str) -> WanDiT:
    model.get_parameter(key).data.view(-1)[0] = NAN
    return model


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ("blocks.1.ffn.0.weight", "blocks.1.ffn"),
        ("blocks.0.self_attn.v.bias", "blocks.0.self_attn.v"),
        ("blocks.1.cross_attn.v.weight", "blocks.1.cross_attn.v"),
        ("blocks.1.norm3.weight", "blocks.1.norm3"),
        ("blocks.0.modulation", "what goes into blocks.0.self_attn.q"),
        ("text_embedding.2.bias", "text_embedding.2"),
        ("patch_embedding.weight", "what goes into blocks.0"),
        ("head.head.weight", "head"),
    ],
)
def test_the_first_part_that_is_not_finite_is_named(key: str, where: str):
    model, (x, t, text) = poisoned(make(T2V), key), inputs(T2V, 1, 2, 4, 4)
    assert not model(x, t, text).isfinite().all()
    with torch.no_grad(), pytest.raises(NotFinite) as found, watched(model):
        model(x, t, text)
    assert found.value.where.startswith(where)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_attention_is_named_by_what_holds_it():
    def breaks(q: Tensor, k: Tensor, v: Tensor, *, kind: str) -> Tensor:
        answer = sdpa(q, k, v)
        return answer * NAN if kind == "image" else answer

    model, (x, t, text) = make(CLIP), inputs(CLIP, 1, 2, 4, 4)
    seen = (ClipTokens(torch.randn(1, 257, 64)),)
    with torch.no_grad(), watched(model):
        assert model(x, t, text, inputs=seen).isfinite().all()
    model.attend = breaks
    with torch.no_grad(), pytest.raises(NotFinite, match=r"^blocks\.0\.cross_attn$"), watched(model):
        model(x, t, text, inputs=seen)


@pytest.fixture
def unsound(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``unsound(block=2, call=1)``: the attention 'flash2' can be chosen, and answers with infinity in this block from
    this call of the model on; both are counted from 0."""

    def arrange(*, block: int, call: int) -> None:
        prepare, seen, passes, now = SelfAttention.queries_keys_values, [], [], []

        def prepared(self: SelfAttention, *args):
            if id(self) not in seen:
                seen.append(id(self))
            now[:] = [seen.index(id(self))]
            passes.extend([1] if now == [0] else [])
            return prepare(self, *args)

        def attend(q: Tensor, k: Tensor, v: Tensor, *, kind: str = "self") -> Tensor:
            answer = sdpa(q, k, v)
            if kind == "self" and now == [block] and len(passes) > call:
                answer = answer.clone()
                answer.view(-1)[5] = float("inf")
            return answer

        monkeypatch.setattr(SelfAttention, "queries_keys_values", prepared)
        backends = attention.BACKENDS | {"flash2": attention.Backend("flash2", attend)}
        monkeypatch.setattr(attention, "BACKENDS", backends)

    return arrange


@pytest.mark.parametrize("swap", [0, 3])
def test_a_run_says_which_block(late, unsound, tmp_path: Path, caplog: pytest.LogCaptureFixture, swap: int):
    """Through engine and streaming: the third of 4 blocks in the second step, whose step is done again with SDPA."""
    write_tiny(tmp_path / "model", "t2v-1.3B", layout="official", sizes=TinySizes(256, 256, layers=4, text_dim=64))
    request = Request("a cat", "", size=(64, 32), frames=5, steps=4, seed=3, guidance=PerExpert(1.0, 1.0))

    def made(attention: str, swap: int) -> Tensor:
        models = read_models(tmp_path / "model", "t2v-1.3B", dtype="float32", attention=attention)
        models = replace(models, dit=replace(models.dit, swap_blocks=swap))
        return generate(models, request, Engine(), device=torch.device("cpu")).latent

    expected = made("sdpa", 0)
    unsound(block=2, call=1)
    assert torch.equal(made("flash2", swap), expected)
    (said,) = [message for message in caplog.messages if "NaN" in message]
    assert "Step 2 of 4: with the attention 'flash2' the model" in said and "first in blocks.2.self_attn. The" in said
