"""Tiled scoring against the model's own full logits."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from lit_opd.models.export import export_folder
from lit_opd.models.student import LoraSettings, StudentSettings, build_student
from lit_opd.objective import Divergence
from lit_opd.scoring import tiles
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head, token_entropy, token_kl, token_logprobs, token_topk
from tests.helpers import fixed, tiny

TOKEN_FIELDS = ("logprobs", "entropy", "token_kl", "divergence")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def random_head(dtype: torch.dtype, *, bias: bool, tokens: int = 37, vocabulary: int = 101, hidden: int = 8) -> Head:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return Head(draw(tokens, hidden), draw(vocabulary, hidden), draw(vocabulary) if bias else None)


def full_logprobs(head: Head, temperature: float) -> torch.Tensor:
    logits = head.hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    return torch.log(torch.softmax(logits / temperature, -1))


@pytest.fixture(params=[1, 7, 1000])
def tile(request, monkeypatch):
    """Logits a tile: a row's, a number that divides nothing, and all."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 101 * request.param)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", 101 * request.param)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiled_logprobs_and_gradients_equal_the_plain_ones(tile, dtype, bias, temperature):
    head = random_head(dtype, bias=bias)
    targets = torch.arange(37) * 5 % 101
    upstream = torch.linspace(-1, 2, 37, dtype=dtype)
    inputs = [value for value in (head.hidden, head.weight, head.bias) if value is not None]
    ours = token_logprobs(head, targets, temperature=temperature)
    plain = full_logprobs(head, temperature)[torch.arange(37), targets]
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream), strict=True
    ):
        assert float((mine - theirs).norm() / theirs.norm()) < 10 * TOLERANCE[dtype]


def test_tiled_entropy_and_divergence_equal_the_plain_ones(tile):
    student, teacher = random_head(torch.float64, bias=True), random_head(torch.float64, bias=False)
    p, q = full_logprobs(student, 0.7), full_logprobs(teacher, 0.7)
    torch.testing.assert_close(token_entropy(student, temperature=0.7), -(p.exp() * p).sum(-1))
    torch.testing.assert_close(token_kl(student, teacher, temperature=0.7), (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize("k", [1, 6, 101, 200])
def test_tiled_top_k_lists_equal_the_sorted_table(tile, k):
    """No more than V entries; likeliest first."""
    head = random_head(torch.float64, bias=True)
    ids, logprobs = token_topk(head, k=k, temperature=0.7)
    best = full_logprobs(head, 0.7).sort(-1, descending=True)
    assert torch.equal(ids, best.indices[:, :k])
    torch.testing.assert_close(logprobs, best.values[:, :k])


def test_no_token_gives_no_score_and_zero_gradient():
    head = random_head(torch.float32, bias=False, tokens=0)
    out = token_logprobs(head, torch.zeros(0, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(out.sum(), [head.weight])
    assert out.shape == (0,) and float(gradient.abs().sum()) == 0.0


def gemma(rows: int = 64) -> Gemma2ForCausalLM:
    """Caps its logits softly, as its configuration says."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        max_position_embeddings=64,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20.0)
    return model.eval()


def granite() -> GraniteForCausalLM:
    """Divides its logits, so its head is not a plain linear map."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=0.2, **sizes, **heads)).eval()


@pytest.mark.parametrize(
    ("build", "plain"),
    [(lambda: tiny.qwen3(seed=1), False), (lambda: tiny.llama(seed=1), False), (gemma, False), (granite, True)],
)
def test_scores_are_those_of_the_models_own_logits(build, plain):
    """Row by row without padding; logits at slot t - 1 score token t. A soft cap is the head's; a scaled head takes the plain
    path, loudly."""
    model = build().double().eval()
    policy = ScoringModel(model, vocabulary=60)
    if plain:
        with pytest.warns(UserWarning, match="student: scoring uses the model's own full logits"):
            policy.choose_path("student")
    else:
        policy.choose_path("student")
    assert policy.full_logits is plain
    rollout = fixed.rollout(lengths=[3, 6, 1], prompt_lengths=[4, 2, 5], truncated={1})
    scores = policy(rollout, temperature=0.8, wants=frozenset({"entropy"}))
    for row in range(3):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, :, :60] / 0.8
        table = torch.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
        expected = table.gather(-1, response.unsqueeze(-1)).squeeze(-1)
        # transformers computes some norms in float32 whatever the weights are
        torch.testing.assert_close(scores.logprobs[row, : len(response)], expected, rtol=1e-6, atol=1e-6)
        entropy = -(table.exp() * table).sum(-1)
        torch.testing.assert_close(scores.entropy[row, : len(response)], entropy, rtol=1e-6, atol=1e-6)
        assert not scores.logprobs[row, len(response) :].any()


def gradients(policy: ScoringModel, rollout) -> dict[str, torch.Tensor]:
    policy.train()
    policy(rollout).logprobs.sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "student")
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    plain, checkpointed = (
        gradients(
            ScoringModel(
                build_student(StudentSettings(folder, dtype="float64", gradient_checkpointing=on)), vocabulary=64
            ),
            rollout,
        )
        for on in (False, True)
    )
    assert fixed.relative_gap(checkpointed, plain) < 1e-12


def test_lora_trains_adapters_only_and_exports_the_merged_model(tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny.save(tiny.qwen3(seed=1), tmp_path / "student")
    model = build_student(StudentSettings(folder, lora=LoraSettings(rank=2)))
    policy = ScoringModel(model, vocabulary=64)
    policy.choose_path("student")
    trainable = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    rollout = fixed.rollout(lengths=[3, 6], prompt_lengths=[4, 2], truncated=set())
    with torch.no_grad():
        ours = policy(rollout).logprobs
        export_folder(model, tiny.tokenizer(), tmp_path / "out", state=None)
        merged = ScoringModel(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), vocabulary=64)
        base = ScoringModel(AutoModelForCausalLM.from_pretrained(folder), vocabulary=64)
        torch.testing.assert_close(merged(rollout).logprobs, ours, rtol=1e-4, atol=1e-4)
        assert float((base(rollout).logprobs - ours).abs().max()) > 0.01
    assert any(p.requires_grad for p in policy.parameters())  # the export left the adapters in place


@pytest.mark.parametrize("plain", [False, True], ids=["tiled", "full logits"])
def test_every_gradient_leaves_the_wrapper_in_a_plain_output_and_no_view(plain):
    """FSDP2's hooks for the backward pass are on what torch's pytree finds there, up to torch 2.12 nothing else."""
    fixture = fixed.rollout(lengths=[3, 5], prompt_lengths=[4, 2], truncated=set())
    student, teacher = (ScoringModel(tiny.qwen3(seed=seed), vocabulary=64) for seed in (1, 2))
    student.full_logits = plain
    outputs = []
    student.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        against = teacher.head(fixture)
    wants = frozenset({"entropy", "topk", "token_kl"})
    scores = student(fixture, wants=wants, against=against, divergence=Divergence("reverse_kl").token_divergence)
    leaving = {name for name in TOKEN_FIELDS if getattr(scores, name).requires_grad}
    assert leaving == {"logprobs", "divergence"}
    found = [leaf for leaf in tree_leaves(outputs) if torch.is_tensor(leaf)]
    for name in leaving:
        value = getattr(scores, name)
        assert any(value is leaf for leaf in found)
        assert value._base is None  # a change of a view in place would drop the hook
    assert torch.equal(scores.topk.logprobs[..., 0], scores.topk.logprobs.amax(-1))
