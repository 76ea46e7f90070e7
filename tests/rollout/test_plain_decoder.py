"""Decode steps in few operations: which models take them, and that they are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lit_opd.masked import exp_
from lit_opd.rollout import DecodeSampler, TransformersSampler
from lit_opd.rollout.decoding import plain_decoder
from lit_opd.rollout.decoding import sampler as decode
from lit_opd.rollout.decoding.layers import FEW_ROWS, LARGE_WEIGHT
from lit_opd.rollout.decoding.plain_decoder import is_plain_decoder
from lit_opd.scoring.model import ScoringModel
from tests.helpers import tiny
from tests.rollout.test_decode import gpt2, prompts, qwen3, require_same, settings

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


def mistral() -> Any:
    torch.manual_seed(5)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)).double()


def ministral3() -> Any:
    """Named like Llama; from position 8 on queries grow with the logarithm of the position."""
    torch.manual_seed(6)
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 8}
    config = Ministral3Config(**SMALL, head_dim=4, rope_parameters=rope | {"llama_4_scaling_beta": 0.5})
    return spread(Ministral3ForCausalLM(config))


def gemma() -> Any:
    """Named like Llama; its norms multiply by one plus the weight and call their epsilon otherwise."""
    torch.manual_seed(7)
    return GemmaForCausalLM(GemmaConfig(**SMALL, head_dim=4)).double()


def gemma3(**changes: Any) -> Any:
    """Norms in front of each part and behind it, layers with short rotary periods, a window that holds all rows."""
    torch.manual_seed(9)
    ropes = {"full_attention": 1000.0, "sliding_attention": 10.0}
    config = Gemma3TextConfig(
        **SMALL,
        head_dim=4,
        query_pre_attn_scalar=4,
        sliding_window=18,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={kind: {"rope_type": "default", "rope_theta": base} for kind, base in ropes.items()},
        **changes,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(5.0) if weight.ndim > 1 else weight.normal_(std=0.3)
        model.lm_head.weight.mul_(0.1)
    return model


def olmo() -> Any:
    """Named like Llama; its norms have no weight."""
    torch.manual_seed(8)
    return OlmoForCausalLM(OlmoConfig(**SMALL, eos_token_id=1)).double()


def spread(model: Any) -> Any:
    """With weights large enough that attention differs between positions."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10.0 if weight.ndim > 1 else 1.0)
    return model.double()


@pytest.mark.parametrize("build", [qwen3, qwen2, yarn, mistral, lambda: tiny.llama(seed=1).double()])
def test_llama_mistral_and_qwen_take_plain_steps_and_sample_as_generate_does(build):
    policy = ScoringModel(build(), vocabulary=64)
    assert decode._runs_plain(policy, CPU)
    require_same(ours.sample(policy, prompts(16), settings()), reference.sample(policy, prompts(16), settings()))


def test_gemma_3_takes_plain_steps_and_samples_as_generate_does():
    """In float32, since its norms are computed in that."""
    policy = ScoringModel(gemma3(), vocabulary=64)
    assert decode._runs_plain(policy, CPU)
    found, expected = (sampler.sample(policy, prompts(16), settings(stop_ids=())) for sampler in (ours, reference))
    assert torch.equal(found.response_ids, expected.response_ids) and len(found.response_ids.unique()) > 20
    torch.testing.assert_close(found.sampler_logprobs, expected.sampler_logprobs, rtol=0, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(found.sampler_logprobs, policy(found).logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gemma_3_takes_plain_steps_in_16_bits(dtype):
    """By autocast, or with such weights: the same kinds at the same places as its own forward."""
    policy = ScoringModel(gemma3() if dtype is None else gemma3().to(dtype), vocabulary=64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is None), torch.no_grad():
        assert decode._runs_plain(policy, CPU)
        found = ours.sample(policy, prompts(4), settings(stop_ids=()))
        assert float((found.sampler_logprobs - policy(found).logprobs).abs().max()) < 0.1


@pytest.mark.parametrize("name", ["final_logit_softcapping", "attn_logit_softcapping"])
def test_gemma_3_with_bent_logits_keeps_its_own_forward(name):
    assert is_plain_decoder(gemma3()) and not is_plain_decoder(gemma3(**{name: 5.0}))


def test_other_architectures_keep_their_own_forward():
    for model in (gpt2(), tiny.qwen3(seed=1)):
        if type(model).__name__ == "Qwen3ForCausalLM":
            model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
        assert not is_plain_decoder(model)
        require_same(
            ours.sample(ScoringModel(model, vocabulary=64), prompts(8), settings()),
            reference.sample(ScoringModel(model, vocabulary=64), prompts(8), settings()),
        )


@pytest.mark.parametrize("build", [granite, ministral3, gemma, olmo])
def test_look_alikes_keep_their_own_forward(build):
    """Modules with Llama's names, other arithmetic: the sampler's log-probs are the scorer's at every position."""
    policy = ScoringModel(build(), vocabulary=64)
    found = ours.sample(policy, prompts(16), settings(stop_ids=()))
    require_same(found, reference.sample(policy, prompts(16), settings(stop_ids=())))
    with torch.no_grad():
        torch.testing.assert_close(found.sampler_logprobs, policy(found).logprobs, rtol=1e-9, atol=1e-9)


def test_a_position_dependent_factor_would_show_behind_the_original_window(monkeypatch):
    """No short probe sees it, and the test above would: Ministral 3 run as if it were Llama."""
    name = "transformers.models.ministral3.modeling_ministral3.Ministral3Model"
    monkeypatch.setattr(plain_decoder, "_DECODERS", {name})
    policy = ScoringModel(ministral3(), vocabulary=64)
    assert decode._runs_plain(policy, CPU)
    found = ours.sample(policy, prompts(16, ragged=False), settings(stop_ids=()))
    with torch.no_grad():
        gap = (found.sampler_logprobs - policy(found).logprobs).abs().amax(0)
    assert gap[:2].max() < 1e-6 and gap[4:].max() > 0.05  # prompts have 6 tokens


def test_a_subclass_of_a_known_decoder_keeps_its_own_forward():
    class Mine(LlamaModel):
        """May do anything."""

    model = LlamaForCausalLM(tiny.llama(seed=1).config)
    assert is_plain_decoder(model)
    model.model = Mine(model.config)
    assert not is_plain_decoder(model)


def test_other_norms_keep_their_own_forward():
    model = tiny.llama(seed=1)
    model.model.norm = torch.nn.RMSNorm(16)
    assert not is_plain_decoder(model)


def test_a_known_class_with_other_numbers_is_found_out_by_the_probe():
    """A layer that scales its scores otherwise."""
    model = tiny.llama(seed=1).double()
    model.model.layers[1].self_attn.scaling *= 3
    policy = ScoringModel(model, vocabulary=64)
    assert is_plain_decoder(policy.causal_lm)
    with pytest.warns(UserWarning, match="LlamaForCausalLM's own forward, which is slower"):
        found = ours.sample(policy, prompts(16), settings())
    require_same(found, reference.sample(policy, prompts(16), settings()))


def test_rounding_of_large_logits_is_no_other_arithmetic():
    """In float32 it grows with them, beyond any bound in nats."""
    model = tiny.llama(seed=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    policy = ScoringModel(model, vocabulary=64)
    assert decode._runs_plain(policy, CPU)
    rollout = ours.sample(policy, prompts(4), settings())
    own, step = (
        decode._probed(kind, policy, prompts(2), settings()) for kind in (decode.OwnWriter, decode._PlainWriter)
    )
    assert 1e-4 < float((own - step).abs().max().detach()) < 1e-5 * float(own.abs().max().detach())
    assert rollout.mask.any()


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
