"""Divergence objectives: values and gradients against plain softmax tables, and whole steps against a slow script."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from lit_opd.advantage import Clip, ValueBaseline
from lit_opd.errors import InputError
from lit_opd.objective import Divergence
from lit_opd.scoring import model as scoring
from lit_opd.scoring import tiles
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head
from lit_opd.teacher import LocalTeacher
from lit_opd.types import TokenSignal
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.combinators import BatchMeanOne
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.uniform import Uniform
from tests.helpers import fixed, poisoned, tiny

TOKENS, VOCABULARY, HIDDEN = 23, 31, 5
SPECS = {
    "reverse_kl": Divergence("reverse_kl"),
    "forward_kl": Divergence("forward_kl"),
    "jsd": Divergence("jsd"),
    "jsd 0.2": Divergence("jsd", beta=0.2),
}
TOP_K = {
    "reverse_kl top 4": Divergence("reverse_kl", top_k=4),
    "forward_kl top 4": Divergence("forward_kl", top_k=4),
    "jsd 0.2 top 4": Divergence("jsd", top_k=4, beta=0.2),
    "reverse_kl top 1": Divergence("reverse_kl", top_k=1),
}


def head(seed: int, *, bias: bool = False, tokens: int = TOKENS, dtype: torch.dtype = torch.float64) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return Head(draw(tokens, HIDDEN), draw(VOCABULARY, HIDDEN), draw(VOCABULARY) if bias else None)


def probabilities(of: Head, temperature: float) -> torch.Tensor:
    logits = of.hidden @ of.weight.T + (0 if of.bias is None else of.bias)
    return torch.softmax(logits / temperature, -1)


def formula(kind: str, p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """p the student's, q the teacher's probabilities, [n, anything]."""
    if kind == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    m = beta * q + (1 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


def naive(spec: Divergence, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """One token at a time, from probabilities; the tail bucket is 1 minus what was picked."""
    out = []
    for row_p, row_q in zip(p, q, strict=True):
        if spec.top_k is not None:
            over = {"reverse_kl": row_p, "forward_kl": row_q, "jsd": spec.beta * row_q + (1 - spec.beta) * row_p}
            best = sorted(range(len(row_p)), key=lambda v, over=over[spec.kind]: -over[v].item())[: spec.top_k]
            row_p, row_q = (torch.cat([row[best], 1 - row[best].sum().view(1)]) for row in (row_p, row_q))
        out.append(formula(spec.kind, row_p, row_q, spec.beta))
    return torch.stack(out)


def value(spec: Divergence, student: Head, teacher: Head, temperature: float = 1.0) -> torch.Tensor:
    return spec.token_divergence(student, teacher, temperature=temperature)


@pytest.fixture(params=[1, 5, 1000])
def tile(request, monkeypatch):
    """Logits a tile: a row's, a number that divides nothing, and all."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", VOCABULARY * request.param)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", VOCABULARY * request.param)


@pytest.mark.parametrize(
    "spec", [SPECS[name] for name in SPECS] + [TOP_K[name] for name in TOP_K], ids=[*SPECS, *TOP_K]
)
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7)])
def test_tiled_values_and_gradients_equal_the_plain_ones(tile, spec, bias, temperature):
    student, teacher = head(0, bias=bias), head(1)
    inputs = [part for part in (student.hidden, student.weight, student.bias) if part is not None]
    upstream = torch.linspace(-1, 2, TOKENS, dtype=torch.float64)
    ours = value(spec, student, teacher, temperature)
    plain = naive(spec, probabilities(student, temperature), probabilities(teacher, temperature).detach())
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
    gradients = torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(plain, inputs, upstream)
    for mine, theirs in zip(*gradients, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-10


@pytest.mark.parametrize("spec", [*SPECS.values(), *TOP_K.values()], ids=[*SPECS, *TOP_K])
def test_logits_in_place_of_a_linear_head_give_the_same(spec):
    """A head that is no plain linear map hands over its logits."""
    student, teacher = head(0), head(1)
    logits = (student.hidden @ student.weight.T).detach().requires_grad_()
    plain = Head(logits, None)
    ours, theirs = value(spec, plain, teacher, 0.7), value(spec, student, teacher, 0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (d_logits,) = torch.autograd.grad(ours.sum(), logits)
    (d_hidden,) = torch.autograd.grad(theirs.sum(), student.hidden)
    torch.testing.assert_close(d_logits @ student.weight, d_hidden, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spec", [*SPECS.values(), *TOP_K.values()], ids=[*SPECS, *TOP_K])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_student_equal_to_teacher_gives_zero_and_no_gradient(spec, dtype):
    student = head(0, dtype=dtype)
    teacher = Head(student.hidden.detach(), student.weight.detach())
    out = value(spec, student, teacher)
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(out.sum(), [student.hidden, student.weight])])
    rounding = 20 * torch.finfo(dtype).eps if spec.kind == "jsd" else 0.0  # the mixture of equals rounds
    assert float(out.detach().abs().max()) <= rounding
    assert float(gradient.abs().max()) <= rounding


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_the_top_k_divergence_rises_with_k_to_the_full_one(kind):
    """Merging tokens into a bucket never raises a divergence (data processing), and a bucket of one token is no merge."""
    student, teacher = head(0), head(1)
    full = value(Divergence(kind), student, teacher)
    rising = [value(Divergence(kind, top_k=k), student, teacher) for k in (1, 2, 4, 8, 16, VOCABULARY - 1)]
    for lower, higher in zip(rising, rising[1:], strict=False):
        assert bool((lower <= higher + 1e-13).all())
    assert float((full - rising[0]).detach().min()) > 1e-3  # so the chain above is not one number
    torch.testing.assert_close(rising[-1], full, rtol=1e-12, atol=1e-13)
    for beyond in (VOCABULARY, VOCABULARY + 5):
        assert torch.equal(value(Divergence(kind, top_k=beyond), student, teacher), full)


def test_a_tail_far_below_rounding_stays_finite_and_counts():
    """Logits (0, -200, -200): 1 - p would be 0. Tail: log p = log 2 - 200 (student), log 2 - 100 (teacher)."""
    student = Head(torch.tensor([[0.0, -200.0, -200.0]], dtype=torch.float64, requires_grad=True), None)
    teacher = Head(torch.tensor([[0.0, -100.0, -100.0]], dtype=torch.float64), None)
    out = value(Divergence("forward_kl", top_k=1), student, teacher)
    expected = 2 * math.exp(-100) * 100 - 2 * math.exp(-100)  # tail q log(q/p), and log q - log p of the rest
    assert float(out.detach()) == pytest.approx(expected, rel=1e-9)
    (gradient,) = torch.autograd.grad(out.sum(), student.hidden)
    assert bool(torch.isfinite(gradient).all())


def test_symmetric_jsd_is_bounded_by_log_2_and_symmetric():
    student, teacher = head(0), head(1)
    far = Head(30 * student.hidden.detach(), student.weight.detach())
    for one, other in ((student, teacher), (far, teacher)):
        out = value(Divergence("jsd"), one, other).detach()
        assert float(out.min()) >= 0 and float(out.max()) <= math.log(2)
        torch.testing.assert_close(out, value(Divergence("jsd"), other, one).detach())
    assert float(value(Divergence("jsd"), far, teacher).detach().max()) > 0.6  # near its bound somewhere


def test_jsd_over_beta_ends_in_the_two_kls():
    small = 1e-7
    student, teacher = (Head(part.hidden.detach() / 4, part.weight.detach()) for part in (head(0), head(1)))
    at_zero = value(Divergence("jsd", beta=small), student, teacher) / small
    at_one = value(Divergence("jsd", beta=1 - small), student, teacher) / small
    torch.testing.assert_close(at_zero, value(Divergence("forward_kl"), student, teacher), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(at_one, value(Divergence("reverse_kl"), student, teacher), rtol=1e-4, atol=1e-5)


def test_reverse_kl_is_the_token_kl_of_the_signal():
    student, teacher = head(0), head(1)
    theirs = scoring.token_kl(student, teacher, temperature=0.7)
    torch.testing.assert_close(value(Divergence("reverse_kl"), student, teacher, 0.7), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "kl"}, "`Divergence.kind` must be one of reverse_kl, forward_kl, jsd, got 'kl'"),
        ({"kind": "jsd", "top_k": 0}, "`Divergence.top_k` must be an integer >= 1 or null, got 0"),
        ({"kind": "jsd", "top_k": 2.5}, "`Divergence.top_k` must be an integer >= 1 or null, got 2.5"),
        ({"kind": "jsd", "beta": 1.0}, r"`Divergence.beta` must be in \(0, 1\), got 1.0"),
        ({"kind": "jsd", "beta": float("nan")}, "`Divergence.beta` must be in"),
        ({"kind": "forward_kl", "beta": 0.3}, "`Divergence.beta` must be left out unless kind is jsd, got 0.3"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Divergence(**settings)


# -- memory ------------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return out


@pytest.mark.parametrize("spec", [*SPECS.values(), *TOP_K.values()], ids=[*SPECS, *TOP_K])
def test_no_tensor_of_the_whole_batch_and_vocabulary_is_made(spec, monkeypatch):
    """Forward and backward stay within one tile, the hidden states and the head."""
    tokens = 400
    student, teacher = head(0, bias=True, tokens=tokens), head(1, tokens=tokens)
    tile = VOCABULARY * 60
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", tile)
    with LargestTensor() as largest:
        value(spec, student, teacher).sum().backward()
        scoring.token_kl(student, teacher)
        scoring.token_entropy(student)
        scoring.token_topk(student, k=4)
    assert 0 < largest.elements <= max(tile, tokens * HIDDEN, VOCABULARY * HIDDEN) < tokens * VOCABULARY
    with LargestTensor() as plain:
        naive(Divergence(spec.kind, beta=spec.beta), probabilities(student, 1.0), probabilities(teacher, 1.0))
    assert plain.elements >= tokens * VOCABULARY  # the counter sees such tensors


# -- rows --------------------------------------------------------------------------------------------------------------


def lone_row(rollout, row: int):
    return rollout.rows(torch.tensor([row])).trimmed()


@pytest.mark.parametrize("spec", [SPECS["reverse_kl"], TOP_K["jsd 0.2 top 4"]], ids=["reverse_kl", "jsd top 4"])
def test_ragged_rows_equal_lone_rows_and_masked_rows_count_nothing(spec):
    student, teacher = (ScoringModel(tiny.qwen3(seed=seed).double(), vocabulary=60) for seed in (1, 2))
    rollout = fixed.rollout(lengths=[3, 6, 1], prompt_lengths=[4, 2, 5], truncated={1})
    rollout = replace(rollout, mask=rollout.mask & torch.tensor([[True], [True], [False]]))

    def scores(part):
        with torch.no_grad():
            against = teacher.head(part)
        return student(part, temperature=0.8, against=against, divergence=spec.token_divergence).divergence

    whole = scores(rollout)
    assert whole.shape == rollout.mask.shape and not whole[~rollout.mask].any()
    for row in (0, 1):
        alone = scores(lone_row(rollout, row))[0]
        # transformers computes some norms in float32 whatever the weights are
        torch.testing.assert_close(whole[row, : len(alone)], alone, rtol=1e-6, atol=1e-7)
    assert float(whole[0, 0].detach()) > 0
    student.zero_grad()
    scores(rollout.rows(torch.tensor([2]))).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_weights_multiply_each_token_and_nothing_is_clipped():
    mask = torch.tensor([[True, True, False]])
    signal = TokenSignal(student_logprobs=torch.zeros(1, 3), teacher_logprobs=torch.ones(1, 3), mask=mask)
    divergence = torch.tensor([[0.5, 2.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[3.0, 0.25, 0.0]])
    loss = Divergence("reverse_kl").token_loss(torch.zeros(1, 3), signal, weights, divergence=divergence)
    assert loss.values.tolist() == [[1.5, 0.5, 0.0]]
    assert not loss.clipped.any()
    (gradient,) = torch.autograd.grad(loss.values.sum(), divergence)
    assert torch.equal(gradient, weights)


# -- whole steps -------------------------------------------------------------------------------------------------------

LENGTHS = [5, 1, 9, 7, 3, 9, 2]
PROMPTS = [4, 6, 3, 8, 5, 2, 7]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tiny.pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rollout():
    return fixed.rollout(lengths=LENGTHS, prompt_lengths=PROMPTS, truncated={2, 5})


def slow_step(folders, rollout, spec, *, temperature, weigh, aggregation):
    """Loss and gradient of Agg[w D], row by row, without padding, from full tables."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in folders)
    rows = []
    for row in range(len(rollout)):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        ids = torch.cat([prompt, response]).unsqueeze(0)
        slots = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        p = torch.softmax(student(ids).logits[0, slots] / temperature, -1)
        with torch.no_grad():
            q = torch.softmax(teacher(ids).logits[0, slots] / temperature, -1)
        picked = torch.arange(len(response)), response
        disagreement = (q[picked].log() - p[picked].log()).abs().detach()
        rows.append(naive(spec, p, q) * weigh(disagreement))
    tokens = sum(map(len, rows))
    divide = {"sequence-mean": lambda row: len(row) * len(rows), "token-mean": lambda row: tokens}[aggregation]
    loss = sum((row / divide(row)).sum() for row in rows)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in student.named_parameters()}


def importance(disagreement: torch.Tensor) -> torch.Tensor:
    behind = disagreement.cumsum(0) - disagreement
    return 1 + 0.5 * (1 - behind / (disagreement.sum() + 1e-8)).clamp(0, 1)


OBJECTIVES = SPECS | {"forward_kl top 4": TOP_K["forward_kl top 4"]}
STEPS = [(None, "sequence-mean", 1.0), (20, "sequence-mean", 0.7), (20, "token-mean", 1.0)]
# each objective in micro-batches at a temperature, and one of them otherwise too: aggregation and cutting know no objective
COMBINED = [
    pytest.param(spec, *step, id=f"{name}-{step}", marks=() if step == STEPS[1] or place == 0 else pytest.mark.slow)
    for place, (name, spec) in enumerate(OBJECTIVES.items())
    for step in STEPS
]


@pytest.mark.parametrize(("spec", "budget", "aggregation", "temperature"), COMBINED)
def test_a_step_equals_the_slow_script(folders, rollout, spec, budget, aggregation, temperature):
    sampler = fixed.FixedSampler(rollout, max_new_tokens=9, temperature=temperature)
    trained = fixed.module(
        folders,
        rollout,
        objective=spec,
        sampler=sampler,
        weighting=ImportanceWeighting(),
        token_budget=budget,
        aggregation=aggregation,
    )
    loss, ours = fixed.gradient(trained, rollout.prompts)
    expected, theirs = slow_step(
        folders, rollout, spec, temperature=temperature, weigh=importance, aggregation=aggregation
    )
    assert loss == pytest.approx(expected, rel=1e-9)
    assert fixed.relative_gap(ours, theirs) < 1e-9


@pytest.mark.parametrize("weighting", [Uniform, lambda: BatchMeanOne(ImportanceWeighting())], ids=["inside", "before"])
def test_cutting_the_batch_changes_no_gradient(folders, rollout, weighting):
    losses, gradients = [], []
    for budget in (None, 40, 20):
        trained = fixed.module(
            folders, rollout, objective=Divergence("jsd", top_k=6), weighting=weighting(), token_budget=budget
        )
        loss, gradient = fixed.gradient(trained, rollout.prompts)
        losses.append(loss)
        gradients.append(gradient)
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-10)
        assert fixed.relative_gap(gradient, gradients[0]) < 1e-10


def test_the_teachers_body_runs_once_a_micro_batch(folders, rollout):
    """The states that scoring returns make the head again, for as many epochs as read it; the teacher remembers nothing."""
    teacher, fresh = (LocalTeacher(folders[1], dtype="float64") for _ in range(2))
    teacher.load(vocabulary=64)
    fresh.load(vocabulary=64)
    seen: list[int] = []
    teacher.policy.causal_lm.get_decoder().register_forward_hook(lambda *_: seen.append(1))
    requires = frozenset({"teacher_distribution"})
    parts = [rollout.take(rows).trimmed() for rows in ([0], [1, 2])]
    scores = [teacher.score(part, requires=requires) for part in parts]
    heads = [teacher.full_head(part, states=score.states) for part, score in zip(parts * 2, scores * 2, strict=True)]
    assert len(seen) == len(parts)
    for part, score, head in zip(parts * 2, scores * 2, heads, strict=True):
        expected = fresh.full_head(part)
        torch.testing.assert_close(head.hidden, expected.hidden, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(score.logprobs[part.mask], table_logprobs(expected, part), rtol=1e-10, atol=1e-12)
    assert teacher.score(rollout).states is None  # nothing will read the head
    teacher.full_head(rollout)
    assert len(seen) == len(parts) + 2


class Holding(LocalTeacher):
    """Notes (tokens of the micro-batch, tokens of the states it is handed) whenever the student's side asks for its head."""

    def __init__(self, path: str) -> None:
        super().__init__(path, dtype="float64")
        self.held: list[tuple[int, int]] = []

    def full_head(self, rollout, *, states=None):
        """As ever, and the states are those of these tokens."""
        self.held.append((int(rollout.mask.sum()), 0 if states is None else len(states)))
        anew = super().full_head(rollout)
        if states is not None:
            torch.testing.assert_close(states, anew.hidden, rtol=1e-10, atol=1e-12)
        return super().full_head(rollout, states=states)


@pytest.mark.parametrize("reads_kl", [False, True])
def test_hidden_states_are_kept_only_where_they_are_read_again(folders, rollout, reads_kl):
    """Mini-batches are cut otherwise than the batch that was scored: kept states serve the student's scoring pass only."""
    advantage = [ValueBaseline()] if reads_kl else []
    held, tokens = {}, sum(LENGTHS)
    for mini_batches in (1, 2):
        teacher = Holding(folders[1])
        run = {
            "objective": Divergence("reverse_kl"),
            "weighting": Uniform(),
            "advantage": advantage,
            "teacher": teacher,
        }
        trained = fixed.module(folders, rollout, mini_batches=mini_batches, **run)
        fixed.fit(trained, rollout.prompts, steps=mini_batches)
        held[mini_batches] = [states for _, states in teacher.held]
    assert held[1] == [tokens]
    assert held[2] == ([tokens] if reads_kl else []) + [0, 0]


def test_a_scoring_pass_made_again_keeps_nothing_of_the_first(folders, rollout):
    """Memory runs out on the teacher's third micro-batch: the states handed on are those of the smaller micro-batches."""
    teacher = Holding(folders[1])
    trained = fixed.module(folders, rollout, objective=Divergence("reverse_kl"), token_budget=40, teacher=teacher)
    with pytest.warns(UserWarning, match="out of memory at optimizer step 1"):
        fixed.fit(trained, rollout.prompts, watch=poisoned.Starved("teacher", {2}, training=False))
    assert all(states == tokens for tokens, states in teacher.held)
    assert sum(tokens for tokens, _ in teacher.held) == sum(LENGTHS)


def table_logprobs(head: Head, part) -> torch.Tensor:
    table = torch.log_softmax(head.hidden @ head.weight.T, -1)
    return table.gather(-1, part.response_ids[part.mask].unsqueeze(-1)).squeeze(-1)


def test_the_record_holds_the_weighted_divergence(folders, rollout):
    plain = fixed.module(folders, rollout, advantage=[ValueBaseline()], weighting=Uniform())
    kl = fixed.fit(plain, rollout.prompts).records[0].signal.token_kl
    trained = fixed.module(folders, rollout, objective=Divergence("reverse_kl"), weighting=ImportanceWeighting())
    record = fixed.fit(trained, rollout.prompts).records[0]
    torch.testing.assert_close(record.loss, record.weights * kl, rtol=1e-10, atol=1e-12)
    assert not record.clipped.any() and record.signal.token_kl is None


class NeverSample(fixed.FixedSampler):
    """A rollout would be wasted."""

    def sample(self, *arguments):
        raise AssertionError("sampled before the check")


class LogprobsOnly(LocalTeacher):
    """As a server that returns log-probs of the sampled tokens."""

    @property
    def provides(self):
        return frozenset()


def test_a_teacher_without_the_full_distribution_fails_before_the_first_rollout(folders, rollout):
    trained = fixed.module(
        folders, rollout, objective=Divergence("reverse_kl"), sampler=NeverSample(rollout, max_new_tokens=9)
    )
    trained.teacher = LogprobsOnly(folders[1])
    with pytest.raises(
        InputError, match=r"`Divergence` must have \['teacher_distribution'\], which `LogprobsOnly` cannot give"
    ):
        fixed.fit(trained, rollout.prompts)


def test_transforms_that_no_one_reads_are_warned_about(folders, rollout):
    trained = fixed.module(folders, rollout, objective=Divergence("reverse_kl"), advantage=[Clip()])
    with pytest.warns(UserWarning, match="`model.advantage` has no effect: `Divergence` reads no advantage"):
        fixed.fit(trained, rollout.prompts)


# -- what strategies may require of the distributions --------------------------------------------------------------------


class TeacherMass(WeightingStrategy):
    """Reads both top-k lists: the teacher's mass on the student's three likeliest tokens, from its own list."""

    @property
    def requires(self):
        return frozenset({"student_topk", "student_at_teacher_topk"})  # which the teacher's list comes with

    def weights(self, signal, progress):
        ours, theirs = signal.student_topk, signal.teacher_topk
        same = ours.ids[..., :3, None] == theirs.ids[..., None, :]
        return (same * theirs.logprobs.exp()[..., None, :]).sum((-1, -2))


@pytest.mark.parametrize("k", [32, 7])
@pytest.mark.parametrize("early", [False, True], ids=["inside", "before"])
def test_top_k_lists_are_those_of_the_models_tables(folders, rollout, early, k, monkeypatch):
    monkeypatch.setattr(scoring, "LIST_LENGTH", k)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", 64 * 3)
    strategy = BatchMeanOne(TeacherMass()) if early else TeacherMass()
    trained = fixed.module(folders, rollout, weighting=strategy, token_budget=20)
    record = fixed.fit(trained, rollout.prompts).records[0]
    for name, folder in zip(("student_topk", "teacher_topk"), folders, strict=True):
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), getattr(record.signal, name)
        assert found.ids.shape == found.logprobs.shape == (*rollout.mask.shape, k)
        for row in range(len(rollout)):
            prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
            response = rollout.response_ids[row][rollout.mask[row]]
            with torch.no_grad():
                logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
            best = torch.softmax(logits, -1).sort(-1, descending=True)
            assert torch.equal(found.ids[row, : len(response)], best.indices[:, :k])
            torch.testing.assert_close(
                found.logprobs[row, : len(response)], best.values[:, :k].log(), rtol=1e-6, atol=1e-6
            )
    assert float(record.weights[rollout.mask].std()) > 0.01
    student = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    for row in range(len(rollout)):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        with torch.no_grad():
            logits = student(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        asked = record.signal.teacher_topk.ids[row, : len(response)]
        want, got = (
            logits.log_softmax(-1).gather(-1, asked),
            record.signal.student_at_teacher_topk[row, : len(response)],
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert torch.equal(record.signal.token_ids, rollout.response_ids)


def test_nothing_is_computed_that_nothing_requires(folders, rollout, monkeypatch):
    def never(*arguments, **settings):
        raise AssertionError("not required")

    for name in ("token_entropy", "token_kl", "token_topk", "token_listed"):
        monkeypatch.setattr(scoring, name, never)
    for objective in (None, Divergence("forward_kl")):
        fixed.fit(fixed.module(folders, rollout, objective=objective), rollout.prompts)
    monkeypatch.setattr(LocalTeacher, "full_head", never)
    fixed.fit(fixed.module(folders, rollout), rollout.prompts)
    with pytest.raises(AssertionError, match="not required"):
        fixed.fit(fixed.module(folders, rollout, objective=Divergence("forward_kl")), rollout.prompts)
