"""What guidance does within the network: blocks left out, and a text heard against another; and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from tests.core.test_compile import Notes, both, near
from tests.core.test_dit import CLIP, I2V, T2V, TI2V, as_diffusers, assert_close, inputs, make
from tests.core.test_plan import A14B, I2V_14B, TI2V_5B, counted_by_hand, recipe
from wan_core.config import Architecture
from wan_core.memory.activations import dit_activations
from wan_core.memory.engine import _identity
from wan_core.memory.plan import plan
from wan_core.models.dit import dit as dit_module
from wan_core.models.dit import nag as nag_module
from wan_core.models.dit.features.clip_tokens import ClipTokens
from wan_core.models.dit.nag import Nag
from wan_core.sampling.guidance_rules import Guidance, Interval, Merge, NormalisedAttention, SkipLayers

NAG = Nag(scale=7.0, tau=1.45, alpha=0.4)

_COMFYUI = """
from comfy.ldm.wan.model import WanModel
import comfy.ops
model = WanModel(model_type="t2v", in_dim=16, out_dim=16, dim=256, ffn_dim=512, freq_dim=256, text_dim=96, num_heads=2,
                 num_layers=2, operations=comfy.ops.manual_cast)
model.load_state_dict(inputs["weights"])
replaced = {("double_block", index): lambda given, extra: given for index in inputs["skip"]}
with torch.no_grad():
    outputs["velocity"] = model(inputs["x"], inputs["t"], inputs["context"],
                                transformer_options={"patches_replace": {"dit": replaced}})
"""


@pytest.mark.parametrize("skip", [(), (0,), (1,)], ids=str)
def test_skipped_blocks_are_comfyuis(in_comfyui: Callable[..., dict], skip: tuple[int, ...]):
    """Against its own network with the patch of SkipLayerGuidanceDiT."""
    model = make(T2V)
    x, t, context = inputs(T2V, 1, 3, 6, 10)
    reference = in_comfyui(_COMFYUI, weights=model.state_dict(), x=x, t=t, context=context, skip=skip)["velocity"]
    seen: list[int] = []
    assert_close(model(x, t, context, skip=frozenset(skip), on_block=seen.append), reference.float())
    assert seen == [0, 1]  # progress and cancel hear of it


@dataclass
class NagProcessor:
    """For diffusers' text attention: the paper's formula as it stands there, in float64."""

    negative: Tensor
    nag: Nag

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: object) -> Tensor:
        images = encoder_hidden_states.shape[1] - 512 if attn.add_k_proj is not None else 0
        text, image = encoder_hidden_states[:, images:], encoder_hidden_states[:, :images]
        heads = lambda x: x.unflatten(2, (attn.heads, -1)).transpose(1, 2).double()  # noqa: E731
        queries = heads(attn.norm_q(attn.to_q(hidden_states)))

        def answer(keys: Tensor, values: Tensor) -> Tensor:
            weights = (queries @ heads(keys).mT / queries.shape[-1] ** 0.5).softmax(-1)
            return (weights @ heads(values)).transpose(1, 2).flatten(2)

        plus, minus = (answer(attn.norm_k(attn.to_k(one)), attn.to_v(one)) for one in (text, self.negative))
        guided = plus * self.nag.scale - minus * (self.nag.scale - 1)
        ratio = guided.norm(p=1, dim=-1, keepdim=True) / plus.norm(p=1, dim=-1, keepdim=True)
        assert 0.02 < (ratio > self.nag.tau).double().mean() < 0.98  # both sides of the threshold are seen
        guided = guided * ratio.clamp(max=self.nag.tau) / ratio
        heard = guided * self.nag.alpha + plus * (1 - self.nag.alpha)
        if images:
            heard = heard + answer(attn.norm_added_k(attn.add_k_proj(image)), attn.add_v_proj(image))
        return attn.to_out[0](heard.to(hidden_states))


@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("config", [T2V, I2V, TI2V, CLIP], ids=["t2v", "i2v", "ti2v", "i2v-clip"])
def test_nag_is_the_papers(config: Architecture, pieces: bool, monkeypatch: pytest.MonkeyPatch):
    """In every block of diffusers' network, two videos of two prompts; of pictures nothing is changed."""
    if pieces:
        monkeypatch.setattr(dit_module, "TOKENS_AT_ONCE", 8)
        monkeypatch.setattr(nag_module, "SLICE", 5)
    model = make(config)
    x, t, positive = inputs(config, 2, 3, 4, 6, text=512)
    negative = torch.randn(2, 512, 96)
    features = torch.randn(2, 257, 64)
    given = (ClipTokens(features),) if config is CLIP else ()
    reference = as_diffusers(model)
    for block in reference.blocks:
        block.attn2.processor = NagProcessor(reference.condition_embedder.text_embedder(negative).detach(), NAG)
    images = {"encoder_hidden_states_image": features} if given else {}
    with torch.no_grad():
        theirs = reference(x, t, positive, **images).sample
    states, other = (model.text_states(text, inputs=given) for text in (positive, negative))
    with torch.no_grad():
        plain, ours = model(x, t, states), model(x, t, states.against(other, NAG))
    assert_close(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max()
    assert torch.equal(model(x, t, states), plain)  # nothing of it stays


def test_nag_with_gradients_takes_the_same_path():
    model = make(T2V)
    x, t, positive = inputs(T2V, 1, 2, 4, 4)
    states, other = model.text_states(positive), model.text_states(torch.randn(1, 30, 96))
    expected = model(x, t, states.against(other, NAG))
    x.requires_grad_(True)
    out = model(x, t, states.against(other, NAG))
    assert_close(out.detach(), expected)
    out.square().mean().backward()
    assert x.grad.abs().max() > 0


def test_what_two_prompts_are_told_is_computed_once():
    model = make(T2V)
    x, t, positive = inputs(T2V, 1, 2, 4, 4)
    calls = []
    for block in model.blocks:
        block.cross_attn.k.register_forward_hook(lambda *_: calls.append(1))
    states, other = model.text_states(positive), model.text_states(torch.randn(1, 30, 96))
    for _ in range(2):
        model(x, t, states.against(other, NAG))
        model(x, t, other)
    assert len(calls) == 2 * T2V.layers


def test_compiled_blocks_answer_the_same():
    """One graph for the prompt that is heard against the other, whatever the step, and one for the other by itself."""
    model, runner = make(T2V), Notes()
    x, t, positive = inputs(T2V, 1, 3, 8, 8, text=512)
    states, other = model.text_states(positive), model.text_states(torch.randn(1, 512, 96))
    for step in (937.0, 400.0):
        t = torch.tensor([step])
        near(*both(model, runner, x, t, states.against(other, NAG)))
        near(*both(model, runner, x, t, other, skip=(0,)))
    assert runner.graphs == 2 and len(runner.told) == 2, runner.told


def test_half_precision_stays_near_float32():
    plus, minus = torch.randn(2, 40, 4, 32), torch.randn(2, 40, 4, 32)
    exact = NAG.steered(plus.clone(), minus)
    rounded = NAG.steered(plus.bfloat16(), minus.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.03
    zero = torch.zeros(1, 3, 2, 8)
    assert torch.equal(NAG.steered(zero.clone(), zero), zero)  # no division by nothing


# --- what it takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [A14B, TI2V_5B, I2V_14B], ids=["A14B", "5B", "I2V-14B"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 75600), (1, 32760), (2, 27280), (1, 6000), (1, 1560)])
def test_the_plan_of_a_text_heard_against_another(config: Architecture, batch: int, tokens: int, dtype: torch.dtype):
    by_hand = counted_by_hand(config, batch, tokens, dtype, against=True)
    assert dit_activations(config, batch, tokens, dtype, against=True) == pytest.approx(by_hand, rel=0.05)


def test_the_plan_knows_batches_calls_and_prompts():
    shape, streams = (1, 16, 21, 90, 160), {"swap_blocks": 40, "prefetch": 1}
    plain, merged = (
        plan(recipe(A14B, guidance=Guidance(rules), **streams), shape, "cuda:0") for rules in ((), (Merge(),))
    )
    two = plan(recipe(A14B, **streams), (2, *shape[1:]), "cuda:0", prompts=1)
    assert merged.moved == plain.moved / 2  # one pass over the blocks
    assert merged.needs.working == pytest.approx(two.needs.working, rel=0.03)
    alone = [
        plan(recipe(A14B, guidance=Guidance(rules)), shape, "cuda:0", prompts=1).needs.working
        for rules in ((), (NormalisedAttention(),))
    ]
    text = 2 * 40 * 512 * 5120 * 2
    assert alone[1] - alone[0] >= text  # a second prompt's keys and values
    both = plan(recipe(A14B), shape, "cuda:0").needs.working
    with_nag = plan(recipe(A14B, guidance=Guidance((NormalisedAttention(),))), shape, "cuda:0").needs.working
    assert with_nag - both < 0.5 * text  # those of the negative prompt are there


def test_runs_with_other_rules_are_other_runs():
    """What a plan came to is kept by everything that decides it."""
    made = recipe(A14B)
    rules = [(), (Merge(),), (NormalisedAttention(),), (SkipLayers(),), (Interval(),), (Interval(0.9, 0.1),)]
    assert len({_identity(replace(made, guidance=Guidance(each))) for each in rules}) == len(rules)
