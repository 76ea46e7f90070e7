"""``trainer.deterministic`` on CUDA: torch raises on operations that have no fixed order, and a step has none of them.

The list is that of ``torch.use_deterministic_algorithms``. On a CPU nothing raises, so the operations are looked at.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd import masked
from lit_opd.masked import doubled_sums, running_sum
from lit_opd.objective import Divergence
from lit_opd.rollout import DecodeSampler, SamplingSettings
from lit_opd.rollout.decoding import drawing
from lit_opd.scoring.model import ScoringModel
from tests.helpers import fixed, tiny
from tests.helpers.signals import all_examples, holey_mask, random_signal

LENGTHS, PROMPTS = [9, 3, 6, 1, 8, 4], [4, 6, 2, 5, 3, 6]
REFUSED = {
    "cumsum",
    "cumsum_",
    "logcumsumexp",
    "cumprod",
    "histc",
    "put",
    "put_",
    "nll_loss_forward",
    "kthvalue",
    "median",
}


class Refusing(TorchDispatchMode):
    """Raises where CUDA would."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the name, then run it."""
        name = func._schema.name.removeprefix("aten::")
        kwargs = kwargs or {}
        if name in REFUSED and (args[0].is_floating_point() or "cum" not in name):
            raise RuntimeError(f"{name} has no deterministic implementation on CUDA")
        if name == "bincount" and (len(args) > 1 and args[1] is not None or kwargs.get("weights") is not None):
            raise RuntimeError("bincount with weights has no deterministic implementation on CUDA")
        return func(*args, **kwargs)


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(masked, "_cumsum_is_refused", lambda values: values.is_floating_point())
    return Refusing()


def test_the_mode_sees_what_cuda_refuses():
    with Refusing():
        torch.ones(3, dtype=torch.int64).cumsum(0)
        for refused in (lambda: torch.ones(3).cumsum(0), lambda: torch.ones(3).histc()):
            with pytest.raises(RuntimeError, match="deterministic"):
                refused()


@pytest.mark.parametrize("length", [0, 1, 2, 3, 17, 64, 1000])
def test_doubled_sums_are_the_running_sums(length):
    values = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    assert torch.allclose(doubled_sums(values), values.cumsum(-1), rtol=0, atol=1e-12)
    assert running_sum(values.float(), dtype=torch.float64).dtype == torch.float64


def test_doubled_sums_have_the_gradient_of_running_sums():
    values = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(doubled_sums, (values,))


@pytest.mark.parametrize(
    ("name", "strategy"), all_examples(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_no_strategy_runs_an_operation_without_a_fixed_order(name, strategy, as_on_cuda):
    signal = random_signal(holey_mask(4, 9))
    expected = strategy(signal, 0.5), strategy.kept(signal, 0.5)
    with as_on_cuda:
        found = strategy(signal, 0.5), strategy.kept(signal, 0.5)
    assert torch.allclose(found[0], expected[0], rtol=1e-9, atol=1e-12) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    "objective", [None, Divergence("reverse_kl"), Divergence("jsd", top_k=3)], ids=["policy", "kl", "jsd"]
)
def test_a_step_with_its_backward_pass_runs_none(tmp_path, objective, as_on_cuda):
    rollout = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2})
    trained = fixed.module(tiny.pair(tmp_path), rollout, token_budget=20, objective=objective)
    step = trained.training_step

    def watched(prompts: Any, batch_idx: int) -> Any:
        with as_on_cuda:
            return step(prompts, batch_idx)

    trained.training_step = watched
    fixed.fit(trained, rollout.prompts, steps=1)


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 0.7}], ids=str)
@pytest.mark.parametrize("vocabulary", [60, drawing.SMALL + 100])
def test_a_draw_runs_none_and_draws_the_same(settings, vocabulary, as_on_cuda, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    logits, uniforms = torch.randn(5, vocabulary, generator=draw), torch.rand(5, dtype=torch.float64, generator=draw)
    asked = SamplingSettings(max_new_tokens=1, stop_ids=(), pad_id=0, vocabulary=vocabulary, **settings)
    with as_on_cuda:
        found = drawing.choose(logits.clone(), uniforms, asked)
    monkeypatch.setattr(masked, "_cumsum_is_refused", lambda values: False)
    expected = drawing.choose(logits, uniforms, asked)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], rtol=0, atol=1e-6)


def test_sampling_runs_none(as_on_cuda):
    policy = ScoringModel(tiny.qwen3(seed=0).eval(), vocabulary=64)
    rollout = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=set())
    asked = SamplingSettings(max_new_tokens=4, stop_ids=(3,), pad_id=0, vocabulary=64)
    with as_on_cuda:
        DecodeSampler(max_new_tokens=4).sample(policy, rollout.prompts, asked)
