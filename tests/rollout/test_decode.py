"""The decode loop against transformers' ``generate``, the model's own softmax, and counts of what it runs and holds."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lit_opd.errors import InputError
from lit_opd.models.student import LoraSettings, StudentSettings, build_student
from lit_opd.rollout import DecodeSampler, SamplingSettings, TransformersSampler
from lit_opd.rollout.decoding import drawing
from lit_opd.rollout.decoding import sampler as decode
from lit_opd.rollout.decoding.drawing import draw
from lit_opd.rollout.decoding.fixed_rows import FixedRows
from lit_opd.scoring.model import FEW_ROWS, LARGE_HEAD, ScoringModel
from lit_opd.types import PromptBatch
from tests.helpers import tiny

CHI_SQUARE_99_99 = 118.0  # 99.99 % point for at most 63 degrees of freedom
ours, reference = DecodeSampler(max_new_tokens=12), TransformersSampler(max_new_tokens=12)


def settings(**changes: Any) -> SamplingSettings:
    return SamplingSettings(**({"max_new_tokens": 12, "stop_ids": (1, 9), "pad_id": 0, "vocabulary": 64} | changes))


def prompts(rows: int, *, ragged: bool = True, repeat: int = 1) -> PromptBatch:
    """``rows`` prompts, each ``repeat`` times in adjacent rows; row keys all differ."""
    ids = torch.arange(rows * 6).reshape(rows, 6) % 30 + 4
    start = torch.arange(rows) % 4 if ragged else torch.zeros(rows, dtype=torch.int64)
    mask = torch.arange(6) >= start.unsqueeze(-1)
    index = torch.arange(rows).repeat_interleave(repeat)
    names = tuple(str(int(row)) for row in index)
    return PromptBatch(ids[index], mask[index], torch.arange(rows * repeat) + 1000, names)


def flat(model: Any) -> Any:
    """Float64, and flat enough that rows end at different places."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.15)
    return model.double()


def qwen3() -> Any:
    return flat(tiny.qwen3(seed=4))


def eager() -> Any:
    """In float32: transformers' eager attention gives NaN for padded rows in float64."""
    model = qwen3().float()
    model.set_attn_implementation("eager")
    return model


def with_bias() -> Any:
    model = qwen3()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64, dtype=torch.float64))
    return model


def soft_capped() -> Any:
    """Gemma 2 caps its logits; eager attention, so float32."""
    torch.manual_seed(3)
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=1.0,
        max_position_embeddings=64,
        layer_types=["full_attention"] * 2,
        attn_implementation="eager",
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def scaled() -> Any:
    """Granite divides its logits, so scoring takes the plain path."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=0.2, **sizes, **heads)).double()


def gpt2() -> Any:
    """Learned absolute positions."""
    torch.manual_seed(5)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=1)
    ).double()


MODELS = {
    "qwen3": qwen3,
    "llama, tied": lambda: tiny.llama(seed=4).double(),
    "eager attention": eager,
    "head with bias": with_bias,
    "soft-capped": soft_capped,
    "scaled": scaled,
    "learned positions": gpt2,
}


def policy_of(model: Any) -> ScoringModel:
    policy = ScoringModel(model, vocabulary=64)
    policy.choose_path("student")
    return policy.train()


@pytest.fixture(scope="module")
def policy() -> ScoringModel:
    return policy_of(qwen3())


@pytest.fixture(scope="module", params=sorted(MODELS))
def any_policy(request) -> ScoringModel:
    with pytest.warns(match="full logits") if request.param == "scaled" else nullcontext():
        built = policy_of(MODELS[request.param]())
    assert built.full_logits == (request.param == "scaled")
    return built


def require_same(first: Any, second: Any) -> None:
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.response_ids, second.response_ids)
    assert torch.equal(first.finish_reason, second.finish_reason)
    torch.testing.assert_close(
        first.sampler_logprobs, second.sampler_logprobs, rtol=0, atol=1e-5, check_dtype=False
    )  # generate hands out float32 logits


VARIANTS = {
    "sampled": {},
    "sampled, cool nucleus": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "greedy": {"greedy": True, "stop_ids": (1,)},
    "one token": {"max_new_tokens": 1},
    "no stop": {"stop_ids": ()},
    "pad stops": {"stop_ids": (1, 0)},
    "cut vocabulary": {"vocabulary": 30},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_tokens_are_those_of_generate(any_policy, variant):
    """Ragged prompts, every architecture: tokens, masks, reasons equal."""
    wanted = settings(**VARIANTS[variant])
    require_same(ours.sample(any_policy, prompts(16), wanted), reference.sample(any_policy, prompts(16), wanted))


def test_rows_of_these_tests_end_at_different_places(policy):
    """Otherwise the comparisons around it would say little."""
    assert len(set(ours.sample(policy, prompts(16), settings()).lengths.tolist())) > 4


@pytest.fixture
def lora(tmp_path) -> ScoringModel:
    folder = tiny.save(tiny.qwen3(seed=4), tmp_path / "student")
    model = build_student(StudentSettings(folder, dtype="float64", lora=LoraSettings(rank=2)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.3 if "lora_B" in name else 0.0)
    return ScoringModel(model, vocabulary=64)


def test_lora_student_samples_as_generate_does(lora):
    base = ScoringModel(tiny.qwen3(seed=4).double(), vocabulary=64)
    found = ours.sample(lora, prompts(8), settings(temperature=4.0))
    require_same(found, reference.sample(lora, prompts(8), settings(temperature=4.0)))
    other = ours.sample(base, prompts(8), settings(temperature=4.0))
    assert other.response_ids.shape != found.response_ids.shape or not torch.equal(
        other.response_ids, found.response_ids
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_samples_are_scored_alike(autocast):
    """bf16 weights, or float32 ones under autocast: log-probs are float32 and those of the scorer up to bf16."""
    model = flat(tiny.qwen3(seed=4))
    model = ScoringModel(model.float() if autocast else model.bfloat16(), vocabulary=64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        rollout = ours.sample(model, prompts(4), settings())
        scores = model(rollout).logprobs.detach()
    assert rollout.sampler_logprobs.dtype == torch.float32
    torch.testing.assert_close(rollout.sampler_logprobs, scores, rtol=0, atol=0.05)


@pytest.mark.parametrize("bias", [False, True])
def test_large_head_at_few_rows_gives_the_models_logits(bias):
    """The other order of the product, against the head itself in float64."""
    torch.manual_seed(0)
    hidden = 64
    rows = LARGE_HEAD // hidden
    model = tiny.qwen3(seed=1, hidden=hidden, layers=1, rows=rows)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(rows))
    policy = ScoringModel(model, vocabulary=rows - 7)
    for count in (1, FEW_ROWS, FEW_ROWS + 1):
        states = torch.randn(count, hidden)
        expected = states.double() @ model.lm_head.weight.double().T + (model.lm_head.bias.double() if bias else 0.0)
        found = policy.next_logits(states)
        torch.testing.assert_close(found.double(), expected[:, : rows - 7], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("share", [0.01, 0.25, 1.0])
def test_no_rows_tokens_depend_on_who_else_is_in_the_batch(policy, monkeypatch, share):
    """Rows alone, in reverse order, and in a batch that is compacted at every end, seldom or never (float64)."""
    whole = ours.sample(policy, prompts(16), settings())
    monkeypatch.setattr(decode, "ENDED_SHARE", share)
    batch = prompts(16)
    for index in (torch.arange(16), torch.arange(15, -1, -1), torch.tensor([3, 7, 11]), torch.tensor([11])):
        part = ours.sample(policy, batch.rows(index), settings())
        columns = part.mask.shape[1]
        assert torch.equal(part.mask, whole.mask[index][:, :columns])
        assert torch.equal(part.response_ids, whole.response_ids[index][:, :columns])
        assert not bool(whole.mask[index][:, columns:].any())


def test_looks_at_ends_may_be_rare(policy, monkeypatch):
    """Where looking costs a wait for the device, rows run on past their end; nothing they write stays."""
    whole = ours.sample(policy, prompts(16), settings())
    monkeypatch.setattr(decode, "CHECK_EVERY_ON_CPU", 5)
    seldom = ours.sample(policy, prompts(16), settings())
    columns = whole.mask.shape[1]
    assert torch.equal(seldom.response_ids[:, :columns], whole.response_ids)
    assert torch.equal(seldom.finish_reason, whole.finish_reason)
    assert not bool(seldom.mask[:, columns:].any())


class Watched:
    """Shapes [rows, columns] of what the decoder is run on."""

    def __init__(self, policy: ScoringModel) -> None:
        self.policy, self.shapes = policy, []

    def __enter__(self) -> list[tuple[int, int]]:
        def note(module: Any, args: Any, kwargs: Any) -> None:
            self.shapes.append(tuple(kwargs["input_ids"].shape))

        self.hook = self.policy.causal_lm.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        return self.shapes

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


def test_samples_of_one_prompt_share_its_prefill(policy):
    """4 prompts x 6 samples: 4 rows are prefilled, 24 decoded, and the tokens are those of ``generate``."""
    batch = prompts(4, repeat=6)
    with Watched(policy) as shapes:
        rollout = ours.sample(policy, batch, settings(stop_ids=()))
    assert shapes == [(4, 6), *[(24, 1)] * 11]
    require_same(rollout, reference.sample(policy, batch, settings(stop_ids=())))
    assert len({tuple(row.tolist()) for row in rollout.response_ids}) > 20  # samples of a prompt differ


def test_ended_rows_leave(policy, monkeypatch):
    """With every end acted upon, the rows run are exactly those not yet ended, counted from the lengths."""
    monkeypatch.setattr(decode, "ENDED_SHARE", 1e-6)
    with Watched(policy) as shapes:
        rollout = ours.sample(policy, prompts(16), settings())
    lengths, last = rollout.lengths, rollout.mask.shape[1]
    alive = [int((lengths > step).sum()) for step in range(1, last)]
    assert [rows for rows, _ in shapes[1:]] == alive
    assert alive[-1] < alive[0]


def test_padding_that_all_remaining_rows_share_is_dropped(policy, monkeypatch):
    """The only unpadded prompt ends first: the cache then loses its columns, and tokens stay those of ``generate``."""
    monkeypatch.setattr(decode, "ENDED_SHARE", 1e-6)
    batch = prompts(4)
    firsts = reference.sample(policy, batch, settings(max_new_tokens=1, stop_ids=())).response_ids[:, 0].tolist()
    assert firsts.count(firsts[0]) == 1
    wanted = settings(stop_ids=(firsts[0],))
    held: list[int] = []
    step = FixedRows.step

    def note(self: Any) -> Any:
        held.append(self.columns)
        return step(self)

    monkeypatch.setattr(FixedRows, "step", note)
    found = ours.sample(policy, batch, wanted)
    assert held[0] == 6  # of the prompts and the next token, 7, less the one that was real in the ended row only
    require_same(found, reference.sample(policy, batch, wanted))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage made, and of all storages alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(t)}
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if _is(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before | self.seen:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.largest, self.alive = max(self.largest, size), self.alive + size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._drop, size, key)

    def _drop(self, size: int, key: int) -> None:
        self.alive -= size
        self.seen.discard(key)


def _is(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_mkldnn  # a packed weight, as large as the weight, has no storage


def test_no_history_of_logits_and_a_bounded_buffer():
    """4 rows, 200 steps, V = 8192: no tensor above a few [B, V]; key-value buffers end at prompt + steps columns."""
    rows, steps, vocabulary = 4, 200, 8192
    policy = ScoringModel(tiny.qwen3(seed=1, rows=vocabulary, window=256, layers=1), vocabulary=vocabulary)
    wanted = settings(max_new_tokens=steps, stop_ids=(), vocabulary=vocabulary)
    columns: list[int] = []

    reserve = FixedRows.reserve

    def note(self: Any) -> None:
        reserve(self)
        columns.append(self.shape[1])

    with pytest.MonkeyPatch.context() as patch, LargestTensor() as watch:
        patch.setattr(FixedRows, "reserve", note)
        ours.sample(policy, prompts(rows), wanted)
    assert watch.largest <= rows * vocabulary * 8  # one [B, V], at most in float64
    assert max(columns) == 6 + steps - 1
    assert len(set(columns)) <= 4  # it grew by doubling


@pytest.mark.parametrize("kind", ["tokens of the model", "small", "large", "large, with -inf"])
def test_draws_follow_the_softmax(policy, kind):
    """Draws, 50 000 of a large vocabulary, against probabilities computed apart, in float64 (chi-square over bins)."""
    count = 50_000 if kind.startswith("large") else 200_000
    generator = torch.Generator().manual_seed(7)
    uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
    if kind == "tokens of the model":
        one = prompts(1, ragged=False)
        with torch.no_grad():
            logits = policy.causal_lm(one.ids).logits[0, -1]
    else:
        vocabulary = 50 if kind == "small" else drawing.SMALL + 77  # not a multiple of the block
        logits = torch.randn(vocabulary, generator=generator) * 2
        if "inf" in kind:
            logits[::3] = -torch.inf
            logits[2 * drawing.BLOCK : 4 * drawing.BLOCK] = -torch.inf  # whole blocks
            logits[-1] = -torch.inf
    if kind == "tokens of the model":
        batch = PromptBatch(one.ids.expand(count, -1), one.mask.expand(count, -1), torch.arange(count), ("p",) * count)
        drawn = ours.sample(policy, batch, settings(max_new_tokens=1)).response_ids[:, 0]
    else:
        drawn = torch.cat([draw(logits.expand(len(part), -1), part)[0] for part in uniforms.split(2000)])
    probabilities = torch.softmax(logits.double(), -1)
    assert float(probabilities[drawn].min()) > 0
    bins = torch.arange(len(logits)) % 61 if len(logits) > 64 else torch.arange(len(logits))
    expected = torch.zeros(64, dtype=torch.float64).index_add(0, bins, probabilities * count)
    observed = torch.zeros(64, dtype=torch.float64).index_add(0, bins[drawn], torch.ones(count, dtype=torch.float64))
    big = expected > 5
    statistic = ((observed - expected)[big].square() / expected[big]).sum()
    rest = expected[~big].sum()
    statistic += (observed[~big].sum() - rest).square() / rest.clamp(min=1)
    assert float(statistic) < CHI_SQUARE_99_99


@pytest.mark.parametrize("vocabulary", [5, 300, drawing.SMALL + 1, drawing.SMALL + drawing.BLOCK])
def test_a_draw_is_where_the_cumulative_mass_passes_the_uniform(vocabulary):
    """Against a plain float64 search over the whole row; the extremes draw the first and the last possible token."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = 200 if vocabulary < drawing.SMALL else 40  # the search is a loop over every entry
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, 0] = logits[:, -1] = logits[3:6, 2] = -torch.inf
    uniforms = torch.rand(rows, generator=generator, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-53
    tokens, logprobs = draw(logits, uniforms)
    assert int(tokens[0]) == 1
    assert int(tokens[1]) == vocabulary - 2
    expected = logits.log_softmax(-1)
    for row in range(2, rows):
        mass, token = 0.0, -1
        while mass <= float(uniforms[row]):
            token += 1
            mass += float(expected[row, token].exp())
        assert int(tokens[row]) == token
    torch.testing.assert_close(logprobs, expected.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), rtol=0, atol=1e-12)


def test_the_end_of_a_block_never_draws_an_excluded_token():
    """A float32 block sum may exceed the float64 sum of its entries; what follows the last one stays excluded."""
    logits = torch.full((500, drawing.SMALL + 1), -torch.inf)
    logits[:, :100] = torch.randn(500, 100, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    assert set(tokens.tolist()) == {99}


@pytest.mark.parametrize("vocabulary", [20, drawing.SMALL + 1])
def test_a_row_with_nan_gets_a_nan_log_prob_and_harms_no_other(vocabulary):
    logits = torch.zeros(2, vocabulary)
    logits[0, 3] = torch.nan
    tokens, logprobs = draw(logits, torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert bool(logprobs[0].isnan())
    assert 0 <= int(tokens[0]) < vocabulary
    assert int(tokens[1]) == 0


def test_chunks_of_rows_change_nothing(monkeypatch):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = draw(logits, uniforms)
    monkeypatch.setattr(drawing, "CHUNK_ELEMENTS", 7 * 300)
    for found, expected in zip(draw(logits, uniforms), whole, strict=True):
        assert torch.equal(found, expected)


def windowed(window: int) -> ScoringModel:
    torch.manual_seed(9)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        sliding_window=window,
    )
    return ScoringModel(MistralForCausalLM(config).double(), vocabulary=64)


@pytest.mark.parametrize("window", [8, 17])
def test_sliding_windows_are_refused(window):
    with pytest.raises(InputError, match=r"`model.sampler` must be TransformersSampler .* sliding_attention"):
        ours.sample(windowed(window), prompts(2), settings())


def test_a_window_that_holds_the_longest_row_cuts_nothing():
    """Prompts of 6 columns and 12 new tokens."""
    policy = windowed(18)
    require_same(ours.sample(policy, prompts(16), settings()), reference.sample(policy, prompts(16), settings()))


def test_a_model_that_leaves_the_cache_empty_is_refused(policy, monkeypatch):
    """A decoder that does not write the cache would sample as if it had read nothing."""
    monkeypatch.setattr(policy.causal_lm.config, "num_hidden_layers", 3)
    with pytest.raises(InputError, match="TransformersSampler .* do not write the key-value cache"):
        ours.sample(policy, prompts(2), settings())


@pytest.mark.parametrize("grad", [True, False])
def test_no_step_of_a_model_with_its_own_forward_records_a_graph(lora, grad):
    """A graph of the whole response would stay in the key-value cache until the last token."""
    with torch.set_grad_enabled(grad), tiny.grad_modes(lora.causal_lm) as modes:
        rollout = ours.sample(lora, prompts(8), settings())
        assert torch.is_grad_enabled() == grad
    assert len(modes) >= rollout.mask.shape[1] > 1 and not any(modes)


def test_no_gradient_is_kept_and_a_long_response_is_refused(policy):
    rollout = ours.sample(policy, prompts(2), settings())
    assert not rollout.sampler_logprobs.requires_grad
    with pytest.raises(InputError, match=r"max_new_tokens.*window of 64"):
        ours.sample(policy, prompts(2), settings(max_new_tokens=60))
