"""The transformers engine: right distribution, streams that belong to rows, right log-probs, right ends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from lit_opd.errors import InputError
from lit_opd.models.student import StudentSettings, build_student
from lit_opd.rollout import SamplingSettings, TransformersSampler
from lit_opd.rollout.base import finish
from lit_opd.rollout.decoding.drawing import draw, sampled_distribution
from lit_opd.scoring.model import ScoringModel
from lit_opd.types import FinishReason, PromptBatch
from tests.helpers import tiny

CHI_SQUARE_99_99 = 118.0  # 99.99 % point for at most 63 degrees of freedom


def settings(**changes) -> SamplingSettings:
    return SamplingSettings(**({"max_new_tokens": 12, "stop_ids": (1,), "pad_id": 0, "vocabulary": 64} | changes))


def prompts(rows: int, *, ragged: bool = True) -> PromptBatch:
    ids = torch.arange(rows * 6).reshape(rows, 6) % 30 + 4
    start = torch.arange(rows) % 4 if ragged else torch.zeros(rows, dtype=torch.int64)
    mask = torch.arange(6) >= start.unsqueeze(-1)
    return PromptBatch(ids, mask, torch.arange(rows) + 1000, tuple(str(row) for row in range(rows)))


@pytest.fixture(scope="module")
def policy() -> ScoringModel:
    model = tiny.qwen3(seed=4).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.15)  # flat enough that rows end at different places
    return ScoringModel(model, vocabulary=64).train()


sampler = TransformersSampler(max_new_tokens=12)


def test_a_rows_sample_does_not_depend_on_its_batch(policy):
    """Row, batch and padding: three rows alone equal the same three of sixteen (float64)."""
    batch = prompts(16)
    whole = sampler.sample(policy, batch, settings())
    for index in (torch.tensor([3, 7, 11]), torch.tensor([11])):
        alone = sampler.sample(policy, batch.rows(index), settings())
        columns = alone.mask.shape[1]
        assert torch.equal(alone.mask, whole.mask[index][:, :columns])
        assert torch.equal(alone.response_ids[alone.mask], whole.response_ids[index][whole.mask[index]])


def test_columns_that_were_not_written_are_no_end_though_the_padding_is_a_stop_id():
    """As where a server was asked for fewer tokens of one row than of another."""
    batch, asked = prompts(3), settings(pad_id=1, max_new_tokens=4)
    ids = torch.tensor([[5, 6, 1, 1], [5, 1, 1, 1], [5, 6, 7, 8]])
    found = finish(batch, ids, torch.zeros(3, 4), asked, engine="x", lengths=torch.tensor([2, 2, 4]))
    assert found.lengths.tolist() == [2, 2, 4]
    assert found.finish_reason.tolist() == [int(FinishReason.LENGTH), int(FinishReason.STOP), int(FinishReason.LENGTH)]


def test_seed_step_domain_and_key_each_change_the_sample(policy):
    batch = prompts(8)
    base = sampler.sample(policy, batch, settings()).response_ids
    for change in ({"seed": 1}, {"step": 1}, {"domain": 1}):
        other = sampler.sample(policy, batch, settings(**change)).response_ids
        assert other.shape != base.shape or not torch.equal(other, base)
    other = sampler.sample(policy, replace(batch, row_keys=batch.row_keys + 1), settings()).response_ids
    assert other.shape != base.shape or not torch.equal(other, base)
    assert torch.equal(sampler.sample(policy, batch, settings()).response_ids, base)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_scorer_agree(policy, temperature):
    rollout = sampler.sample(policy, prompts(16), settings(temperature=temperature))  # generate's logits are float32
    scores = policy(rollout, temperature=temperature)
    torch.testing.assert_close(rollout.sampler_logprobs, scores.logprobs.detach(), rtol=0, atol=1e-5, check_dtype=False)


def slow_nucleus(probabilities: list[float], top_k: int, top_p: float) -> dict[int, float]:
    """Sort, cut to k, renormalise, take tokens until the mass reaches p, renormalise."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[: top_k or None]
    total, mass, kept = sum(probabilities[token] for token in order), 0.0, []
    for token in order:
        if mass >= top_p:
            break
        kept.append(token)
        mass += probabilities[token] / total
    share = sum(probabilities[token] for token in kept)
    return {token: probabilities[token] / share for token in kept}


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (6, 0.8)])
def test_draws_follow_the_processed_distribution(top_k, top_p):
    """200 000 draws by inversion against a slow top-k, top-p; nothing excluded is ever drawn."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 20, generator=generator, dtype=torch.float64) * 1.5
    expected = slow_nucleus(torch.softmax(logits[0] / 0.9, -1).tolist(), top_k, top_p)
    logprobs = sampled_distribution(logits, temperature=0.9, top_p=top_p, top_k=top_k)
    for token in range(20):
        assert float(logprobs[0, token].exp()) == pytest.approx(expected.get(token, 0.0), abs=1e-12)
    count = 200_000
    drawn, _ = draw(logprobs.expand(count, -1), torch.rand(count, generator=generator, dtype=torch.float64))
    observed = torch.bincount(drawn, minlength=20).double()
    assert all(observed[token] == 0 for token in range(20) if token not in expected)
    wanted = torch.tensor([expected.get(token, 0.0) for token in range(20)], dtype=torch.float64) * count
    kept = wanted > 0
    assert float(((observed - wanted)[kept].square() / wanted[kept]).sum()) < CHI_SQUARE_99_99


def test_the_last_uniform_number_never_draws_an_excluded_token():
    logprobs = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log()
    nearly_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert int(draw(logprobs, nearly_one)[0]) == 1
    assert int(draw(torch.tensor([[0.0, 0.5, 0.5]]).double().log(), torch.zeros(1).double())[0]) == 1


def test_first_tokens_follow_the_model(policy):
    """8000 rows of one prompt: the first sampled token against softmax of the model's own logits (chi-square)."""
    rows = 8000
    one = prompts(1, ragged=False)
    batch = PromptBatch(one.ids.expand(rows, -1), one.mask.expand(rows, -1), torch.arange(rows), ("p",) * rows)
    drawn = sampler.sample(policy, batch, settings(max_new_tokens=1)).response_ids[:, 0]
    with torch.no_grad():
        expected = torch.softmax(policy.causal_lm(one.ids).logits[0, -1], -1) * rows
    observed = torch.bincount(drawn, minlength=64).double()
    big = expected > 5
    rest_seen, rest_wanted = observed[~big].sum(), expected[~big].sum()
    statistic = ((observed - expected)[big].square() / expected[big]).sum()
    statistic += (rest_seen - rest_wanted).square() / rest_wanted.clamp(min=1)
    assert float(statistic) < CHI_SQUARE_99_99


def test_ends_masks_and_finish_reasons(policy):
    """Several stop ids; the end symbol is inside the mask, nothing behind it is; rows at the limit are truncated."""
    stops = (1, 9, 20)
    rollout = sampler.sample(policy, prompts(64), settings(stop_ids=stops))
    for ids, mask, reason in zip(rollout.response_ids, rollout.mask, rollout.finish_reason, strict=True):
        valid = ids[mask].tolist()
        assert mask.tolist() == [True] * len(valid) + [False] * (len(mask) - len(valid))
        assert not any(token in stops for token in valid[:-1])
        ended = valid[-1] in stops
        assert int(reason) == (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert ended or len(valid) == 12
        assert set(ids[~mask].tolist()) <= {0}
    assert set(rollout.finish_reason.tolist()) == {int(FinishReason.STOP), int(FinishReason.LENGTH)}
    assert bool((rollout.sampler_logprobs[~rollout.mask] == 0).all())


def test_pad_may_be_a_stop_id(policy):
    rollout = sampler.sample(policy, prompts(64), settings(stop_ids=(1, 0), pad_id=0))
    lengths = rollout.lengths
    assert int(lengths.min()) >= 1
    last = rollout.response_ids[torch.arange(64), lengths - 1]
    assert bool(((last == 0) | (last == 1))[rollout.finished].all())


def test_greedy_equals_plain_generate(policy):
    batch = prompts(8)
    rollout = sampler.sample(policy, batch, settings(greedy=True))
    policy.causal_lm.generation_config = GenerationConfig()
    for row in range(8):
        ids = batch.ids[row][batch.mask[row]].unsqueeze(0)
        own = policy.causal_lm.eval().generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=1, pad_token_id=0)
        assert rollout.response_ids[row][rollout.mask[row]].tolist() == own[0, ids.shape[1] :].tolist()
    assert rollout.provenance.temperature == 0.0


def test_cut_vocabulary_rows_are_never_sampled(policy):
    rollout = sampler.sample(policy, prompts(64), settings(vocabulary=30))
    assert int(rollout.response_ids[rollout.mask].max()) < 30


def test_a_checkpoints_generation_defaults_do_not_bend_the_distribution(tmp_path):
    """A folder that asks for top-k 1 and a repetition penalty is still sampled from its own softmax."""
    folder = tiny.save(tiny.qwen3(seed=4), tmp_path / "student")
    GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, eos_token_id=1, pad_token_id=0).save_pretrained(
        folder
    )
    policy = ScoringModel(build_student(StudentSettings(folder, dtype="float64")), vocabulary=64)
    rollout = sampler.sample(policy, prompts(16), settings(temperature=2.0))
    scores = policy(rollout, temperature=2.0)
    torch.testing.assert_close(rollout.sampler_logprobs, scores.logprobs.detach(), rtol=0, atol=1e-5, check_dtype=False)


def test_the_policy_stays_in_evaluation_mode_whatever_it_is_asked(policy):
    torch.nn.ModuleList([policy]).train()
    sampler.sample(policy, prompts(2), settings())
    assert not any(module.training for module in policy.modules())
    with pytest.raises(InputError, match="max_new_tokens.*window of 64"):
        sampler.sample(policy, prompts(2), settings(max_new_tokens=60))
