"""``TransformersSampler`` goes on from its keys and values; ``generate`` that reads everything again is the reference."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
)

from lit_opd.rollout import DecodeSampler, TransformersSampler
from tests.helpers import tiny
from tests.helpers.talking import WINDOW, Again, Counting, scored, student, talked

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-6}  # nats; ``generate`` gives float32 logits
EXACT = 1e-12
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": WINDOW, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
EVERY_LETTER_ENDS = {"stop_ids": tuple(range(4, 64))}


def both(policy: Any, **options: Any) -> list[Any]:
    """Rollouts of the sampler and of its reference."""
    return [talked(kind(max_new_tokens=60), Counting(), policy, **options) for kind in (TransformersSampler, Again)]


class Read:
    """Counts the tokens that a model reads."""

    def __init__(self, policy: Any) -> None:
        self.columns: list[int] = []
        self.handle = policy.causal_lm.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: self.columns.append(inputs[0].shape[1])
        )

    def __enter__(self) -> Read:
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def assert_same(ours: Any, reference: Any, rounding: float) -> None:
    """Tokens, ends and log-probs of three turns, of which some rows have fewer or turns of other lengths."""
    assert int(ours.num_turns.max()) == 3 and len(set(map(tuple, ours.turn_lengths.tolist()))) > 2
    assert torch.equal(ours.response_ids, reference.response_ids) and torch.equal(ours.mask, reference.mask)
    assert torch.equal(ours.finish_reason, reference.finish_reason)
    assert float((ours.sampler_logprobs - reference.sampler_logprobs).abs().max()) < rounding
    assert float(ours.sampler_logprobs[ours.mask].max()) < 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "how"), [(4, {}), (3, {"greedy": True, "stop_ids": tuple(range(4, 64, 3))})])
def test_tokens_and_log_probs_are_those_of_reading_everything_again(dtype, seed, how):
    assert_same(*both(student(seed=seed, dtype=dtype), settings=how), ROUNDING[dtype])


def test_so_are_those_of_a_model_without_positions():
    """Bloom adds distances to the scores, which it takes from the mask."""
    torch.manual_seed(1)
    policy = scored(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, reference = both(policy)
    assert_same(ours, reference, ROUNDING[torch.float32])


def test_a_model_of_float64_throughout_says_what_one_forward_says():
    """GPT-2's norms keep the dtype, so nothing but the order of sums is left."""
    torch.manual_seed(0)
    policy = scored(
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=WINDOW)).double()
    )
    ours = talked(TransformersSampler(max_new_tokens=60), Counting(), policy)
    assert ours.provenance.engine == "transformers" and int(ours.num_turns.max()) == 3
    one = policy(ours).logprobs.detach()
    assert ours.sampler_logprobs.dtype == torch.float64
    assert float((ours.sampler_logprobs - one).abs().max()) < EXACT


def test_each_token_is_read_once():
    """After the prompt, all rows read an answer in one forward, and a turn's tokens one by one."""
    policy = student()
    talked(TransformersSampler(max_new_tokens=60), Counting(), policy)  # the probe is over
    with Read(policy) as ours:
        rollout = talked(TransformersSampler(max_new_tokens=60), Counting(), policy)
    with Read(policy) as reference:
        talked(Again(max_new_tokens=60), Counting(), policy)
    long = [columns for columns in ours.columns if columns > 1]
    assert len(long) == 3 and long[0] == rollout.prompts.ids.shape[1]
    answers = (
        int((rollout.observed & (rollout.turn == 1)).sum(-1).max()),
        int((rollout.observed & (rollout.turn == 2)).sum(-1).max()),
    )
    assert long[1:] == [1 + count for count in answers]  # with the token that nothing has read yet
    assert sum(reference.columns) > sum(ours.columns) + rollout.prompts.ids.shape[1]


@pytest.mark.parametrize("kind", [TransformersSampler, DecodeSampler])
def test_no_turn_records_a_graph(kind):
    """A model that neither sampler decodes by ``PlainDecoder``: a graph of all turns would stay in the key-value cache."""
    torch.manual_seed(1)
    policy = scored(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)))
    with tiny.grad_modes(policy.causal_lm) as modes:
        rollout = talked(kind(max_new_tokens=60), Counting(), policy)
    assert int(rollout.num_turns.max()) == 3 and len(modes) > 3 and not any(modes)


# -- models that cannot go on ------------------------------------------------------------------------------------------


def sliding() -> Any:
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    )


def hybrid() -> Any:
    return Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))


def forgetful() -> Any:
    """Its configuration does not say that it is another model behind a cache."""
    model = student(dtype=torch.float32).causal_lm

    def changed(module: Any, inputs: Any, options: Any, output: Any) -> Any:
        cache = options.get("past_key_values")
        if cache is not None and cache.get_seq_length() > options["input_ids"].shape[1] > 1:
            output.last_hidden_state = output.last_hidden_state.flip(-1)
        return output

    model.model.register_forward_hook(changed, with_kwargs=True)
    return model


@pytest.mark.parametrize(
    ("build", "why"),
    [(sliding, "layers of kind sliding_attention"), (hybrid, "layers of kind conv"), (forgetful, "differ by")],
)  # fmt: skip
def test_a_model_that_cannot_go_on_reads_everything_again_and_says_so_once(build, why):
    torch.manual_seed(1)
    policy = scored(build())
    engine = TransformersSampler(max_new_tokens=60)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ours, again = (talked(engine, Counting(), policy, settings=EVERY_LETTER_ENDS) for _ in range(2))
    told = [str(line.message) for line in said if "reads a conversation again" in str(line.message)]
    assert len(told) == 1 and why in told[0] and type(policy.causal_lm).__name__ in told[0]
    reference = talked(Again(max_new_tokens=60), Counting(), policy, settings=EVERY_LETTER_ENDS)
    assert torch.equal(ours.response_ids, reference.response_ids) and torch.equal(ours.response_ids, again.response_ids)
    assert torch.equal(ours.sampler_logprobs, reference.sampler_logprobs) and int(ours.num_turns.max()) == 3
