"""Rows one behind the other give what padded rows give: values, gradients, micro-batches; and a model that mixes them pads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from lit_opd.errors import InputError
from lit_opd.preflight.module_checks import check_attention
from lit_opd.scoring.model import ScoringModel
from lit_opd.step.micro_batches import micro_batches
from tests.helpers import fixed, tiny
from tests.step.test_host_reads import CPU_ONLY, reads_of

LENGTHS, PROMPTS = [9, 3, 0, 1, 8, 4], [4, 6, 2, 5, 3, 6]
VARLEN = "varlen_flash_of_the_tests"
SEEN: list[tuple[list[int], int]] = []


def varlen(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """Causal attention within each row, as FlashAttention's function for sequences of any length has it."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    ends = told.get("cu_seq_lens_q")
    if ends is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None
    assert (
        query.shape[0] == 1 and mask is None and torch.equal(ends, told["cu_seq_lens_k"]) and ends.dtype == torch.int32
    )
    SEEN.append((ends.tolist(), told["max_length_q"]))
    rows = [slice(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)]
    parts = [F.scaled_dot_product_attention(query[:, :, r], key[:, :, r], value[:, :, r], is_causal=True) for r in rows]
    return torch.cat(parts, 2).transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen)


@pytest.fixture
def padded_and_packed() -> tuple[ScoringModel, ScoringModel]:
    """One model, scored either way, in float64."""
    pair = []
    for packed in (False, True):
        model = tiny.qwen3(seed=0).double().eval()
        if packed:
            model.config._attn_implementation = VARLEN
        policy = ScoringModel(model, vocabulary=64)
        policy.choose_path("student")
        pair.append(policy)
    return pair[0], pair[1]


@pytest.fixture
def rollout() -> Any:
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated=set())


@pytest.fixture(autouse=True)
def as_wide_as_its_weights(monkeypatch):
    """The kernels of FlashAttention know 16 bits only, these know float64."""
    monkeypatch.setattr(ScoringModel, "_as_it_runs", lambda self: torch.no_grad())


def test_only_attention_over_sequences_of_any_length_packs(padded_and_packed):
    assert [policy.packs for policy in padded_and_packed] == [False, True]


def test_packed_rows_have_the_log_probs_and_gradients_of_padded_ones(padded_and_packed, rollout):
    found = []
    for policy in padded_and_packed:
        SEEN.clear()
        scores = policy(rollout, wants=frozenset({"entropy", "topk"}))
        (scores.logprobs * torch.arange(scores.logprobs.numel()).view_as(scores.logprobs)).sum().backward()
        found.append((scores, {name: value.grad for name, value in policy.named_parameters()}))
    (plain, plain_gradient), (packed, gradient) = found
    expected = [max(1, p + r - 1) for p, r in zip(PROMPTS, LENGTHS, strict=True)]
    assert SEEN[0][1] == max(expected) and torch.tensor(SEEN[0][0]).diff().tolist() == expected
    for name in ("logprobs", "entropy"):
        assert torch.allclose(getattr(packed, name), getattr(plain, name), rtol=0, atol=1e-10)
    assert torch.equal(packed.topk.ids, plain.topk.ids)
    assert fixed.relative_gap(gradient, plain_gradient) < 1e-10


def test_the_head_s_states_and_plain_logits_agree_too(padded_and_packed, rollout):
    padded, packed = padded_and_packed
    assert torch.allclose(packed.head(rollout).hidden, padded.head(rollout).hidden, rtol=0, atol=1e-10)
    packed.full_logits = True
    assert torch.allclose(packed(rollout).logprobs, padded(rollout).logprobs, rtol=0, atol=1e-10)


def test_a_row_does_not_see_its_neighbours(padded_and_packed, rollout):
    packed = padded_and_packed[1]
    whole = packed(rollout).logprobs
    alone = packed(rollout.take([4])).logprobs
    assert torch.allclose(whole[4, : LENGTHS[4]], alone[0, : LENGTHS[4]], rtol=0, atol=1e-10)


def test_rows_without_any_token_score_nothing(padded_and_packed):
    empty = fixed.rollout(lengths=[0, 0], prompt_lengths=[1, 2], truncated={0, 1})
    assert [float(policy(empty).logprobs.abs().sum()) for policy in padded_and_packed] == [0.0, 0.0]


def test_a_model_whose_rows_see_each_other_pads_and_says_so():
    model = tiny.qwen3(seed=0).double().eval()
    name = "blind_flash_of_the_tests"

    def blind(*args: Any, **told: Any) -> tuple[Tensor, None]:
        return varlen(*args, **{key: value for key, value in told.items() if key != "cu_seq_lens_q"})

    AttentionInterface.register(name, blind)
    model.config._attn_implementation = name
    policy = ScoringModel(model, vocabulary=64)
    with pytest.warns(UserWarning, match=r"teacher: rows are padded for scoring.* log-probs of packed rows differ by"):
        policy.choose_path("teacher")
    assert not policy.packs


def test_a_model_that_cannot_be_called_so_pads_and_says_why(monkeypatch):
    model = tiny.qwen3(seed=0).double().eval()
    model.config._attn_implementation = VARLEN
    policy = ScoringModel(model, vocabulary=64)
    monkeypatch.setattr(policy, "_probed_logprobs", lambda ids, **told: 1 / 0)
    with pytest.warns(UserWarning, match="because ZeroDivisionError"):
        policy.choose_path("student")
    assert not policy.packs


def pair_that_packs(tmp_path: Any, monkeypatch: Any) -> tuple[str, str]:
    """Folders of models that are scored packed wherever they are loaded."""
    own = ScoringModel.choose_path

    def choose(self: ScoringModel, name: str) -> None:
        self.causal_lm.config._attn_implementation = VARLEN
        own(self, name)

    monkeypatch.setattr(ScoringModel, "choose_path", choose)
    return tiny.pair(tmp_path)


@pytest.mark.parametrize("budget", [None, 20, 40])
def test_a_step_has_the_same_gradient_and_fewer_micro_batches(tmp_path, monkeypatch, budget):
    whole = fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={0})
    expected = fixed.gradient(fixed.module(tiny.pair(tmp_path / "plain"), whole, token_budget=budget), whole.prompts)
    trained = fixed.module(pair_that_packs(tmp_path / "packed", monkeypatch), whole, token_budget=budget)
    found = fixed.gradient(trained, whole.prompts)
    assert trained.student is not None and trained.student.packs and trained._packed
    assert found[0] == pytest.approx(expected[0], rel=1e-9) and fixed.relative_gap(found[1], expected[1]) < 1e-9


def test_packing_reads_nothing_more_off_the_device(tmp_path, monkeypatch):
    whole = fixed.rollout(lengths=[9, 3, 6, 1, 8, 4], prompt_lengths=PROMPTS, truncated={2})
    trained = fixed.module(pair_that_packs(tmp_path, monkeypatch), whole, token_budget=40)
    found = reads_of(trained, whole)
    ours = {where: count for where, count in found.items() if where not in CPU_ONLY | {"elsewhere", "model.py:_head"}}
    assert ours == {"types.py:layout": 1, "update.py:_not_finite": 1, "scalars.py:logged": 1}


@pytest.mark.parametrize(
    ("lengths", "budget", "packed", "groups"),
    [
        ([9, 3, 5, 2], 12, False, [[0], [2, 1], [3]]),
        ([9, 3, 5, 2], 12, True, [[0], [2, 1, 3]]),
        ([4, 4, 4], 8, True, [[0, 1], [2]]),
        ([4, 4, 4], None, True, [[0, 1, 2]]),
        ([5, 1, 1], 10, True, [[0, 1, 2]]),
        ([5, 1, 1], 10, False, [[0, 1], [2]]),
    ],
)
def test_a_budget_counts_padding_only_where_there_is_some(lengths, budget, packed, groups):
    assert micro_batches(lengths, token_budget=budget, packed=packed) == groups


def test_a_packed_row_over_the_budget_is_refused_too():
    with pytest.raises(InputError, match="token_budget"):
        micro_batches([9], token_budget=8, packed=True)


def test_flash_attention_in_float32_is_refused_before_the_run(tmp_path):
    whole = fixed.rollout(lengths=[2], prompt_lengths=[2], truncated=set())
    trained = fixed.module(tiny.pair(tmp_path), whole, dtype="float32")
    trained.trainer = type("Run", (), {"precision": "32-true"})()
    check_attention(trained)
    trained.student_settings.attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match=r"`trainer.precision` must be bf16-mixed .* got 32-true"):
        check_attention(trained)
    trained.trainer.precision = "bf16-mixed"
    check_attention(trained)
