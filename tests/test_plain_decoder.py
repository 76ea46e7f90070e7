"""Decode steps in few operations: which models take them, and that they are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lit_opd.rollout import DecodeSampler, TransformersSampler, decode
from lit_opd.rollout.plain_decoder import FEW_ROWS, LARGE_WEIGHT, is_plain_decoder
from lit_opd.scoring import ScoringModel
from lit_opd.types import exp_
from tests import tiny
from tests.test_decode import gpt2, prompts, qwen3, require_same, settings

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ours, reference = DecodeSampler(max_new_tokens=12), TransformersSampler(max_new_tokens=12)


def qwen2() -> Any:
    """With biases at query, key and value, made large enough to be seen."""
    torch.manual_seed(2)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.5 if "bias" in name else 0.0))
    return model.double()


def granite() -> Any:
    """Named like Llama, and scales embeddings, attention and residuals."""
    torch.manual_seed(3)
    return GraniteForCausalLM(
        GraniteConfig(**SMALL, residual_multiplier=0.3, embedding_multiplier=3.0, attention_multiplier=0.9)
    ).double()


def yarn() -> Any:
    """Rotary embeddings with a factor on cosine and sine."""
    model = tiny.llama(seed=4)
    model.config.rope_parameters = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                    "original_max_position_embeddings": 16}  # fmt: skip
    built = type(model)(model.config)
    built.load_state_dict(model.state_dict())
    return built.double()


@pytest.mark.parametrize("build", [qwen3, qwen2, yarn, lambda: tiny.llama(seed=1).double()])
def test_llama_and_qwen_take_plain_steps_and_sample_as_generate_does(build):
    policy = ScoringModel(build(), vocabulary=64)
    assert decode._runs_plain(policy, CPU)
    require_same(ours.sample(policy, prompts(16), settings()), reference.sample(policy, prompts(16), settings()))


def test_other_architectures_keep_their_own_forward():
    for model in (gpt2(), tiny.qwen3(seed=1)):
        if type(model).__name__ == "Qwen3ForCausalLM":
            model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
        assert not is_plain_decoder(model)
        require_same(
            ours.sample(ScoringModel(model, vocabulary=64), prompts(8), settings()),
            reference.sample(ScoringModel(model, vocabulary=64), prompts(8), settings()),
        )


def test_a_look_alike_is_found_out_by_the_probe():
    """Granite's modules have Llama's names; its multipliers show in the numbers only."""
    policy = ScoringModel(granite(), vocabulary=64)
    assert is_plain_decoder(policy.causal_lm)
    with pytest.warns(UserWarning, match="GraniteForCausalLM's own forward, which is slower"):
        found = ours.sample(policy, prompts(16), settings())
    require_same(found, reference.sample(policy, prompts(16), settings()))


def test_autocast_keeps_the_models_own_forward():
    policy = ScoringModel(tiny.qwen3(seed=1), vocabulary=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not decode._runs_plain(policy, CPU)
    assert decode._runs_plain(policy, CPU)


@pytest.mark.parametrize("rows", [FEW_ROWS - 1, FEW_ROWS + 9])
def test_packed_weights_give_the_scorers_log_probs(monkeypatch, rows):
    """Weights above the bound, rows below it from the start or once some have left."""
    monkeypatch.setattr(decode, "ENDED_SHARE", 1e-6)
    model = tiny.qwen3(seed=1, hidden=512, layers=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)
    assert model.model.layers[0].mlp.down_proj.weight.numel() >= LARGE_WEIGHT
    policy = ScoringModel(model, vocabulary=64)
    rollout = ours.sample(policy, prompts(rows), settings(stop_ids=tuple(range(8))))
    assert len(set(rollout.lengths.tolist())) > 3
    scored = policy(rollout).logprobs.detach()
    torch.testing.assert_close(rollout.sampler_logprobs.where(rollout.mask, scored), scored, rtol=0, atol=1e-5)


def test_what_is_sampled_can_meet_a_gradient():
    policy = ScoringModel(qwen3(), vocabulary=64)
    rollout = ours.sample(policy, prompts(4), settings())
    assert not rollout.response_ids.is_inference()
    (rollout.sampler_logprobs * policy(rollout).logprobs).sum().backward()
    assert next(policy.parameters()).grad is not None


def test_changed_weights_are_seen_at_the_next_rollout():
    """Nothing taken out of the model outlives a call."""
    policy = ScoringModel(tiny.qwen3(seed=1, hidden=512), vocabulary=64)
    ours.sample(policy, prompts(4), settings())
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "norm" not in name:
                weight.copy_(torch.randn_like(weight) * 0.02)
    rollout = ours.sample(policy, prompts(4), settings())
    scored = policy(rollout).logprobs.detach()
    torch.testing.assert_close(rollout.sampler_logprobs.where(rollout.mask, scored), scored, rtol=0, atol=1e-5)


def test_powers_of_two_are_exponentials():
    values = torch.linspace(-80, 10, 1001, dtype=torch.float64)
    torch.testing.assert_close(exp_(values.clone()), values.exp(), rtol=1e-13, atol=0)
    torch.testing.assert_close(exp_(values.float()).double(), values.float().double().exp(), rtol=1e-5, atol=0)
    special = torch.tensor([-torch.inf, torch.nan, torch.inf, 0.0])
    torch.testing.assert_close(exp_(special.clone()), special.exp(), equal_nan=True)
