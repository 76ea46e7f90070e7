"""The exact-gradient oracles of method.md section 5: every response of a tabular policy, float64, to 1e-12.

What is shown for a weight w and the immediate advantage: E[gradient] = sum over prefixes h of P(h) w(h) grad KL_h, with P and
w held fixed, if and only if w is a function of the prefix. The trees: two symbols and two tokens (every response has
two), and two symbols with an end symbol and up to three tokens (lengths 1, 2, 3; three are cut off, not ended).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lit_opd import advantage as adv
from lit_opd.advantage import AdvantageTransform, DiscountedReturn, ValueBaseline
from lit_opd.objective import Divergence, PolicyLoss
from lit_opd.rollout.decoding.drawing import sampled_distribution
from lit_opd.step.recipe import apply_truncated
from lit_opd.types import FinishReason, PromptBatch, Provenance, Rollout
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.annealed import AnnealedPrefixMask, AnnealedPrefixWeight
from lit_opd.weighting.combinators import Reversed, SequenceMeanOne
from lit_opd.weighting.dash import DASH
from lit_opd.weighting.decay import LinearDecay
from lit_opd.weighting.fire import FiRe
from lit_opd.weighting.fractions import FirstFraction, LastFraction
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.late_rising import LateRising
from lit_opd.weighting.least_likely import LeastLikely
from lit_opd.weighting.tilt import PrefixRatioTilt
from lit_opd.weighting.trust_region import TrustRegion
from lit_opd.weighting.uniform import Uniform
from lit_opd.weighting.windowed_ratio import WindowedPrefixRatio
from tests.helpers.enumerated import Prefix, Tree, entropy, expected_gradient, gradient_of, kl, signal_of
from tests.helpers.signals import all_examples

EXACT = 1e-12
BIASED = 1e-3  # a difference that no rounding explains

FIXED_LENGTH = Tree(symbols=2, steps=2)
WITH_END = Tree(symbols=3, steps=3, can_end=True)

both_trees = pytest.mark.parametrize("tree", [FIXED_LENGTH, WITH_END], ids=["two tokens", "with an end symbol"])
ON_PREFIX = [(name, example) for name, example in all_examples() if example.depends_on == "prefix"]
prefix_strategies = pytest.mark.parametrize("strategy", [e for _, e in ON_PREFIX], ids=[name for name, _ in ON_PREFIX])


def policies(tree: Tree) -> tuple[Tensor, Tensor]:
    return tree.random_logits(1), tree.random_logits(2, scale=2.0)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())


def weighted_kl_gradient(tree: Tree, student: Tensor, teacher: Tensor, weight: Tensor, reach: Tensor) -> Tensor:
    """d sum_h reach_h weight_h KL_h(student || teacher), reach [N] and weight [N] held fixed."""
    fixed = (reach * weight).detach()
    return gradient_of(lambda logits: (fixed * kl(logits, teacher)).sum(), student)


def prefix_kl_gradient(tree: Tree, student: Tensor, teacher: Tensor) -> Tensor:
    """d sum_t E[KL_t], the distribution of prefixes held fixed."""
    reach = tree.reach(student)
    return weighted_kl_gradient(tree, student, teacher, torch.ones_like(reach), reach)


def weights_by_prefix(
    tree: Tree, strategy: WeightingStrategy, student: Tensor, teacher: Tensor
) -> tuple[Tensor, float]:
    """The mean weight of each prefix over its continuations [N], and the widest spread around it."""
    signal = signal_of(tree, student, teacher)
    weights = torch.cat([strategy(signal.rows(torch.tensor([row]))) for row in range(len(signal))])
    probability = signal.student_logprobs.sum(-1).exp()
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in tree.prefixes]
    for row, response in enumerate(tree.responses):
        for place in range(len(response)):
            seen[tree.rows[response[:place]]].append((weights[row, place], probability[row]))
    means, spread = [], 0.0
    for pairs in seen:
        values, chances = (torch.stack(column) for column in zip(*pairs, strict=True))
        means.append((values * chances).sum() / chances.sum())
        spread = max(spread, float(values.max() - values.min()))
    return torch.stack(means), spread


# -- what is estimated -------------------------------------------------------------------------------------------------


@both_trees
def test_the_listing_holds_every_response_once(tree):
    student, _ = policies(tree)
    probability = tree.picked(student.log_softmax(-1)).sum(-1).exp()
    assert len(set(tree.responses)) == len(tree.responses) == {2: 4, 3: 1 + 2 + 4 * 3}[tree.symbols]
    assert gap(probability.sum(), torch.ones(())) < EXACT


@both_trees
def test_the_immediate_advantage_gives_the_gradient_of_the_token_kls_at_fixed_prefixes(tree):
    student, teacher = policies(tree)
    want = prefix_kl_gradient(tree, student, teacher)
    assert gap(expected_gradient(tree, student, teacher), want) < EXACT
    assert gap(expected_gradient(tree, student, teacher, advantage=[DiscountedReturn(0.0)]), want) < EXACT
    assert float(want.abs().max()) > BIASED


@both_trees
def test_the_return_to_go_gives_the_gradient_of_the_sequence_kl(tree):
    student, teacher = policies(tree)

    def sequence_kl(logits: Tensor) -> Tensor:
        ours, theirs = (tree.picked(table.log_softmax(-1)).sum(-1) for table in (logits, teacher))
        return (ours.exp() * (ours - theirs)).sum()

    want = gradient_of(sequence_kl, student)
    assert gap(expected_gradient(tree, student, teacher, advantage=[DiscountedReturn(1.0)]), want) < EXACT
    assert gap(want, prefix_kl_gradient(tree, student, teacher)) > BIASED  # the two objectives differ


@both_trees
@pytest.mark.parametrize("discount", [0.0, 0.3, 0.9, 1.0])
def test_a_discount_gives_the_policy_gradient_of_the_discounted_values(tree, discount):
    """sum_h P(h) sum_y pi(y | h) grad log pi(y | h) Q(h, y), with Q = (s - q) + discount * E[Q of the next token]."""
    student, teacher = policies(tree)
    cost = student.log_softmax(-1) - teacher.log_softmax(-1)
    worth, reach = tree.values(student, cost, discount), tree.reach(student)
    want = gradient_of(lambda logits: (reach.unsqueeze(-1) * logits.softmax(-1) * worth).sum(), student)
    assert gap(expected_gradient(tree, student, teacher, advantage=[DiscountedReturn(discount)]), want) < EXACT


@both_trees
def test_a_student_that_is_the_teacher_gets_no_gradient(tree):
    student, _ = policies(tree)
    assert gap(expected_gradient(tree, student, student), torch.zeros_like(student)) < EXACT


@both_trees
def test_a_null_advantage_on_every_token_trains_nothing_but_noise(tree):
    """E[grad log p] is 0 at each prefix. On the least likely tokens, as its source has it, it makes the student surer."""
    student, teacher = policies(tree)
    null = [adv.NullAdvantage()]
    assert gap(expected_gradient(tree, student, teacher, advantage=null), torch.zeros_like(student)) < EXACT
    chosen = expected_gradient(tree, student, teacher, advantage=null, strategy=LeastLikely(0.2))
    assert gap(chosen, torch.zeros_like(student)) > BIASED
    reach, step = tree.reach(student), 1e-4
    before, after = (float((reach * entropy(logits)).sum()) for logits in (student, student - step * chosen))
    assert after < before


# -- weights -----------------------------------------------------------------------------------------------------------


@both_trees
@prefix_strategies
def test_weights_that_depend_on_the_prefix_give_the_weighted_kl_gradient(tree, strategy):
    student, teacher = policies(tree)
    weight, spread = weights_by_prefix(tree, strategy, student, teacher)
    assert spread < EXACT  # the same weight whatever follows the prefix
    want = weighted_kl_gradient(tree, student, teacher, weight, tree.reach(student))
    assert gap(expected_gradient(tree, student, teacher, strategy=strategy), want) < EXACT


READS_MORE = [ImportanceWeighting(), TrustRegion(), DASH(), FiRe(), SequenceMeanOne(TrustRegion()), Reversed(DASH())]


@both_trees
@pytest.mark.parametrize("strategy", READS_MORE, ids=lambda strategy: type(strategy).__name__)
def test_weights_that_read_the_token_or_the_sequence_do_not(tree, strategy):
    student, teacher = policies(tree)
    weight, spread = weights_by_prefix(tree, strategy, student, teacher)
    assert strategy.depends_on != "prefix" and spread > BIASED
    ours = expected_gradient(tree, student, teacher, strategy=strategy)
    assert gap(ours, weighted_kl_gradient(tree, student, teacher, weight, tree.reach(student))) > BIASED


@pytest.mark.parametrize("strategy", [ImportanceWeighting(), TrustRegion()], ids=["ImportanceWeighting", "TrustRegion"])
def test_no_weight_of_the_prefix_at_all_would_explain_them(strategy):
    """Their gradient at a prefix does not even point along that prefix's KL gradient, whatever its length."""
    student, teacher = policies(WITH_END)
    ours = expected_gradient(WITH_END, student, teacher, strategy=strategy)
    direction = prefix_kl_gradient(WITH_END, student, teacher)
    length = (ours * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True)
    assert gap(ours, length * direction) > BIASED


READS_LENGTH = [
    LinearDecay(0.5),
    FirstFraction(0.5),
    LastFraction(0.5),
    AnnealedPrefixWeight(start=0.5),
    AnnealedPrefixMask(start=0.5),
    LateRising(),
]


@pytest.mark.parametrize("strategy", READS_LENGTH, ids=lambda strategy: type(strategy).__name__)
def test_weights_that_read_the_length_do_so_only_while_all_lengths_are_equal(strategy):
    for tree in (FIXED_LENGTH, WITH_END):
        student, teacher = policies(tree)
        weight, _ = weights_by_prefix(tree, strategy, student, teacher)
        want = weighted_kl_gradient(tree, student, teacher, weight, tree.reach(student))
        error = gap(expected_gradient(tree, student, teacher, strategy=strategy), want)
        assert error > BIASED if tree.can_end else error < EXACT


# -- value baseline ----------------------------------------------------------------------------------------------------


@both_trees
@prefix_strategies
def test_a_value_baseline_leaves_prefix_weighted_gradients_alone(tree, strategy):
    student, teacher = policies(tree)
    plain = expected_gradient(tree, student, teacher, strategy=strategy)
    assert gap(expected_gradient(tree, student, teacher, strategy=strategy, advantage=[ValueBaseline()]), plain) < EXACT


@both_trees
@pytest.mark.parametrize("strategy", READS_MORE, ids=lambda strategy: type(strategy).__name__)
def test_a_value_baseline_changes_the_gradient_under_the_other_strategies(tree, strategy):
    student, teacher = policies(tree)
    plain = expected_gradient(tree, student, teacher, strategy=strategy)
    assert (
        gap(expected_gradient(tree, student, teacher, strategy=strategy, advantage=[ValueBaseline()]), plain) > BIASED
    )


WINDOW = WindowedPrefixRatio(window=1, floor=0.3)
each_aggregation = pytest.mark.parametrize("aggregation", ["sequence-sum", "constant", "sequence-mean", "token-mean"])


def change_by_baseline(tree: Tree, *, baseline: AdvantageTransform | None = None, **settings: object) -> Tensor:
    """What a value baseline adds to the expected gradient under ``WINDOW``, [N, V], by the package."""
    student, teacher = policies(tree)
    plain, with_it = (
        expected_gradient(tree, student, teacher, strategy=WINDOW, advantage=transforms, **settings)
        for transforms in ([], [baseline or ValueBaseline()])
    )
    return with_it - plain


def expected_after(tree: Tree, student: Tensor, worth: Callable[[Prefix], float]) -> Tensor:
    """E[worth(response)] once each symbol follows each prefix: [N, V], backwards over the prefixes."""
    table, found = student.softmax(-1), torch.zeros_like(student)
    for prefix in reversed(tree.prefixes):
        for symbol in range(tree.symbols):
            longer = (*prefix, symbol)
            child = tree.rows.get(longer)
            value = worth(longer) if child is None else float((table[child] * found[child]).sum())
            found[tree.rows[prefix], symbol] = value
    return found


def added(tree: Tree, factor: Tensor, reach: Tensor | None = None) -> Tensor:
    """- sum_h P(h) w(h) KL_h sum_y factor(h, y) grad p(y | h): what is added where more than the weight multiplies KL_h."""
    student, teacher = policies(tree)
    weight, _ = weights_by_prefix(tree, WINDOW, student, teacher)
    reach = tree.reach(student) if reach is None else reach
    fixed = (reach * weight * kl(student, teacher)).unsqueeze(-1) * factor
    return gradient_of(lambda logits: -(fixed * logits.softmax(-1)).sum(), student)


def chance_of_lengths(tree: Tree, student: Tensor) -> list[float]:
    """P(n = 0), P(n = 1), ..."""
    reach, table = tree.reach(student), student.softmax(-1)
    chances = [0.0] * (tree.steps + 1)
    for prefix in tree.prefixes:
        for symbol in range(tree.symbols):
            if tree.is_whole((*prefix, symbol)):
                chances[len(prefix) + 1] += float(reach[tree.rows[prefix]] * table[tree.rows[prefix], symbol])
    return chances


@each_aggregation
def test_a_value_baseline_changes_nothing_where_all_responses_have_one_length(aggregation):
    assert float(change_by_baseline(FIXED_LENGTH, aggregation=aggregation, rows=2).abs().max()) < EXACT


@pytest.mark.parametrize("aggregation", ["sequence-sum", "constant"])
def test_a_value_baseline_changes_nothing_where_no_length_divides(aggregation):
    assert float(change_by_baseline(WITH_END, aggregation=aggregation, rows=2).abs().max()) < EXACT


@pytest.mark.parametrize("rows", [1, 2])
def test_a_value_baseline_under_the_sequence_mean_adds_the_gradient_towards_short_responses(rows):
    """- w KL_t E[(1/n) grad log p_t]: a number of rows does not make it smaller."""
    student, _ = policies(WITH_END)
    change = change_by_baseline(WITH_END, aggregation="sequence-mean", rows=rows)
    shares = expected_after(WITH_END, student, lambda response: 1.0 / len(response))
    assert gap(change, added(WITH_END, shares)) < EXACT
    assert float(change.abs().max()) > BIASED
    early = torch.tensor([len(prefix) < WITH_END.steps - 1 for prefix in WITH_END.prefixes])
    assert bool((change[early, -1] < 0).all())  # descent raises the end symbol wherever it makes a response shorter
    assert gap(change[~early], torch.zeros(())) < EXACT


@pytest.mark.parametrize("rows", [1, 2])
def test_a_value_baseline_under_the_token_mean_adds_less_with_more_rows(rows):
    """- rows w KL_t E[(1 / all tokens) grad log p_t], of which one row alone is the sequence mean."""
    student, _ = policies(WITH_END)
    change = change_by_baseline(WITH_END, aggregation="token-mean", rows=rows)
    others = dict(enumerate(chance_of_lengths(WITH_END, student))) if rows == 2 else {0: 1.0}
    assert sum(others.values()) == pytest.approx(1.0, abs=EXACT)

    def share(response: Prefix) -> float:
        return rows * sum(chance / (len(response) + other) for other, chance in others.items())

    assert gap(change, added(WITH_END, expected_after(WITH_END, student, share))) < EXACT
    alone = float(change_by_baseline(WITH_END, aggregation="sequence-mean").norm())
    assert float(change.norm()) / alone == pytest.approx(1.0 / rows, rel=0.3)


def rollout_of(tree: Tree) -> Rollout:
    """Every response, as a sampler gives them: those without the end symbol were cut."""
    ended = torch.tensor([response[-1] == tree.symbols - 1 for response in tree.responses])
    count = len(tree.responses)
    prompts = PromptBatch(
        torch.zeros(count, 1, dtype=torch.int64),
        torch.ones(count, 1, dtype=torch.bool),
        torch.arange(count),
        tuple(map(str, range(count))),
    )
    reasons = torch.where(ended, int(FinishReason.STOP), int(FinishReason.LENGTH)).to(torch.int8)
    return Rollout(prompts, tree.ids, tree.mask, torch.zeros(tree.mask.shape), reasons, Provenance("listed"))


def test_a_value_baseline_adds_a_gradient_where_rows_leave_for_how_they_ended():
    student, _ = policies(WITH_END)
    masked = apply_truncated(rollout_of(WITH_END), "mask").mask
    change = change_by_baseline(WITH_END, mask=masked)
    ended = expected_after(WITH_END, student, lambda response: float(response[-1] == WITH_END.symbols - 1))
    assert gap(change, added(WITH_END, ended)) < EXACT and float(change.abs().max()) > BIASED


def test_a_value_baseline_adds_a_gradient_where_a_gate_drops_rows():
    student, teacher = policies(WITH_END)
    reward = torch.arange(len(WITH_END.responses)) % 2 * 1.0
    signal = signal_of(WITH_END, student, teacher)
    kept = adv.RewardGate("drop").kept(replace(signal, reward=reward))
    passing = dict(zip(WITH_END.responses, kept.any(-1).tolist(), strict=True))
    change = change_by_baseline(WITH_END, mask=kept)
    factor = expected_after(WITH_END, student, lambda response: float(passing[response]))
    assert gap(change, added(WITH_END, factor)) < EXACT and float(change.abs().max()) > BIASED


@both_trees
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (1.0, 1)])
def test_a_value_baseline_adds_the_gradient_of_the_sampled_tokens_mass(tree, top_p, top_k):
    """- w KL_t grad p(S), S the tokens that can be drawn: importance weights give them p back, and no more."""
    student, _ = policies(tree)
    sampler = sampled_distribution(student, temperature=1.0, top_p=top_p, top_k=top_k)
    inside = sampler.isfinite()
    assert not bool(inside.all())
    change = change_by_baseline(tree, sampler=sampler)
    assert gap(change, added(tree, inside.double(), tree.reach(sampler))) < EXACT
    assert float(change.abs().max()) > BIASED


@both_trees
def test_a_value_baseline_on_text_that_counts_as_the_students_is_fine_tuning_on_it(tree):
    """- w KL_t E_b[grad log p]: its length is KL_t, not what the teacher thinks of the token."""
    student, teacher = policies(tree)
    sampler = tree.random_logits(3, scale=2.0)
    change = change_by_baseline(tree, sampler=sampler, objective=PolicyLoss(importance_cap=None))
    weight, _ = weights_by_prefix(tree, WINDOW, student, teacher)
    fixed = (tree.reach(sampler) * weight * kl(student, teacher)).unsqueeze(-1) * sampler.softmax(-1)
    assert gap(change, gradient_of(lambda logits: -(fixed * logits.log_softmax(-1)).sum(), student)) < EXACT
    assert float(change.abs().max()) > BIASED


BESIDE = [
    adv.Identity(),
    adv.RewardExtrapolation(1.5),
    adv.GroupReward(teacher=0.5),
    DiscountedReturn(0.0),
    DiscountedReturn(0.9),
    ValueBaseline(),
    adv.Clip(0.5),
    adv.SoftLog(),
    adv.Sign(),
    adv.RewardFloor(),
    adv.InfluenceShrinkage(),
    adv.RewardGate("keep"),
    adv.RewardGate("scale"),
]


def test_every_transform_that_reads_the_advantage_is_among_them():
    """The others ignore a baseline before them, and a warning says so."""
    found = {kind for kind in vars(adv).values() if isinstance(kind, type) and issubclass(kind, AdvantageTransform)}
    starting = {adv.Power, adv.NullAdvantage, adv.EntropyNull, adv.ResidualReward}
    assert {kind for kind in found if not inspect.isabstract(kind)} == {type(part) for part in BESIDE} | starting


@pytest.mark.parametrize("transform", BESIDE, ids=lambda transform: type(transform).__name__)
def test_a_value_baseline_changes_nothing_after_any_transform_and_before_those_that_keep_it(transform):
    worst = {"before": 0.0, "after": 0.0}
    for seed in range(3):
        student, teacher = WITH_END.random_logits(seed), WITH_END.random_logits(10 + seed, scale=2.0)
        rows = len(WITH_END.responses)
        fields = {
            "reward": (torch.arange(rows) + seed) % 2 * 1.0,
            "group": torch.zeros(rows, dtype=torch.int64),
            "reference_logprobs": WITH_END.picked(WITH_END.random_logits(20 + seed).log_softmax(-1)),
        }
        alone, last, first = (
            expected_gradient(WITH_END, student, teacher, strategy=WINDOW, advantage=order, **fields)
            for order in ([transform], [transform, ValueBaseline()], [ValueBaseline(), transform])
        )
        worst = {"before": max(worst["before"], gap(first, alone)), "after": max(worst["after"], gap(last, alone))}
    assert worst["after"] < EXACT
    assert worst["before"] < EXACT if transform.keeps_baseline else worst["before"] > BIASED


def test_a_return_of_advantages_without_their_mean_is_no_return():
    """The other way round it is one: see above."""
    student, teacher = policies(WITH_END)
    ours = expected_gradient(WITH_END, student, teacher, advantage=[ValueBaseline(), DiscountedReturn(1.0)])
    assert gap(ours, expected_gradient(WITH_END, student, teacher)) < EXACT


# -- truncated importance sampling -------------------------------------------------------------------------------------


def other_sampler(tree: Tree, student: Tensor) -> tuple[Tensor, float]:
    """A policy near the student, and the largest ratio student / sampler of a token."""
    sampler = student + tree.random_logits(3, scale=0.5)
    return sampler, float((student.log_softmax(-1) - sampler.log_softmax(-1)).exp().max())


@both_trees
@prefix_strategies
def test_importance_sampling_below_its_cap_is_unbiased_at_the_prefixes_the_sampler_visits(tree, strategy):
    """Only the token is corrected: the prefixes keep the sampler's distribution. Of the first token nothing is missing."""
    student, teacher = policies(tree)
    sampler, largest = other_sampler(tree, student)
    settings = {"sampler": sampler, "strategy": strategy, "objective": PolicyLoss(importance_cap=largest + 0.1)}
    ours = expected_gradient(tree, student, teacher, **settings)
    weight, _ = weights_by_prefix(tree, strategy, student, teacher)
    want = weighted_kl_gradient(tree, student, teacher, weight, tree.reach(sampler))
    assert gap(ours, want) < EXACT
    assert gap(ours[0], expected_gradient(tree, student, teacher, strategy=strategy)[0]) < EXACT


@both_trees
def test_importance_sampling_does_not_correct_the_prefixes(tree):
    student, teacher = policies(tree)
    sampler, largest = other_sampler(tree, student)
    ours = expected_gradient(
        tree, student, teacher, sampler=sampler, objective=PolicyLoss(importance_cap=largest + 0.1)
    )
    assert gap(ours, prefix_kl_gradient(tree, student, teacher)) > BIASED


@both_trees
@pytest.mark.parametrize("cap", [1.0, None], ids=["above the cap", "left out"])
def test_importance_sampling_above_its_cap_or_left_out_is_biased(tree, cap):
    student, teacher = policies(tree)
    sampler, largest = other_sampler(tree, student)
    assert largest > 1.1  # the cap of 1 cuts something
    ours = expected_gradient(tree, student, teacher, sampler=sampler, objective=PolicyLoss(importance_cap=cap))
    reach = tree.reach(sampler)
    assert gap(ours, weighted_kl_gradient(tree, student, teacher, torch.ones_like(reach), reach)) > BIASED


@both_trees
def test_importance_sampling_from_the_student_itself_changes_nothing(tree):
    student, teacher = policies(tree)
    same = expected_gradient(tree, student, teacher, sampler=student)
    assert gap(same, expected_gradient(tree, student, teacher)) < EXACT


# -- differentiable divergences ----------------------------------------------------------------------------------------


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p: [N] nats."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    m = beta * q + (1.0 - beta) * p
    return beta * (q * (q / m).log()).sum(-1) + (1.0 - beta) * (p * (p / m).log()).sum(-1)


def two_buckets(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) where only the student's likeliest symbol and all the others are told apart: [N] nats."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    best = p.argmax(-1, keepdim=True)
    top, other = p.gather(-1, best).squeeze(-1), q.gather(-1, best).squeeze(-1)
    return top * (top / other).log() + (1 - top) * ((1 - top) / (1 - other)).log()


DIVERGENCES = {
    "reverse": (Divergence("reverse_kl"), kl),
    "forward": (Divergence("forward_kl"), lambda student, teacher: kl(teacher, student)),
    "jsd": (Divergence("jsd"), lambda student, teacher: jsd(student, teacher, 0.5)),
    "jsd 0.2": (Divergence("jsd", beta=0.2), lambda student, teacher: jsd(student, teacher, 0.2)),
    "top 1": (Divergence("reverse_kl", top_k=1), two_buckets),
    "all of the vocabulary in the top": (Divergence("reverse_kl", top_k=2), kl),
}
ANY_STRATEGY = [Uniform(), PrefixRatioTilt(), *READS_MORE]


@both_trees
@pytest.mark.parametrize("strategy", ANY_STRATEGY, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("case", DIVERGENCES)
def test_a_divergence_gives_its_own_gradient_under_the_mean_weight_of_the_prefix(tree, case, strategy):
    """Of whatever strategy: its gradient at a prefix does not depend on the token drawn there."""
    objective, exact = DIVERGENCES[case]
    student, teacher = policies(tree)
    weight, _ = weights_by_prefix(tree, strategy, student, teacher)
    fixed = (tree.reach(student) * weight).detach()
    want = gradient_of(lambda logits: (fixed * exact(logits, teacher)).sum(), student)
    assert gap(expected_gradient(tree, student, teacher, strategy=strategy, objective=objective), want) < EXACT
    assert float(want.abs().max()) > BIASED


@both_trees
@prefix_strategies
def test_reverse_kl_is_what_the_policy_loss_estimates_under_prefix_strategies(tree, strategy):
    student, teacher = policies(tree)
    settings = {"strategy": strategy, "objective": Divergence("reverse_kl")}
    sampled = expected_gradient(tree, student, teacher, strategy=strategy)
    assert gap(expected_gradient(tree, student, teacher, **settings), sampled) < EXACT


# -- aggregation -------------------------------------------------------------------------------------------------------


def test_at_one_length_the_sequence_mean_is_the_sequence_sum_over_that_length():
    student, teacher = policies(FIXED_LENGTH)
    total = expected_gradient(FIXED_LENGTH, student, teacher)
    for aggregation in ("sequence-mean", "constant", "token-mean"):
        ours = expected_gradient(FIXED_LENGTH, student, teacher, aggregation=aggregation)
        assert gap(ours, total / FIXED_LENGTH.steps) < EXACT


def test_with_an_end_symbol_the_sequence_mean_is_no_multiple_of_the_sequence_sum():
    student, teacher = policies(WITH_END)
    total = expected_gradient(WITH_END, student, teacher)
    mean = expected_gradient(WITH_END, student, teacher, aggregation="sequence-mean")
    nearest = (mean * total).sum() / total.square().sum()
    assert gap(mean, nearest * total) > BIASED
    constant = expected_gradient(WITH_END, student, teacher, aggregation="constant")
    assert gap(constant, total / WITH_END.steps) < EXACT  # dividing by the slots is not biased


class OneOverLength(WeightingStrategy):
    """w_t = 1 / n."""

    def weights(self, signal, progress):
        return 1.0 / signal.mask.sum(-1, keepdim=True).double().expand(signal.mask.shape)


@both_trees
def test_the_sequence_mean_is_the_sequence_sum_under_the_weight_one_over_n(tree):
    student, teacher = policies(tree)
    mean = expected_gradient(tree, student, teacher, aggregation="sequence-mean")
    assert gap(mean, expected_gradient(tree, student, teacher, strategy=OneOverLength())) < EXACT


def test_uniform_is_among_the_prefix_strategies():
    assert any(isinstance(example, Uniform) for _, example in ON_PREFIX)
