"""Every weighting strategy against the golden vectors, hand arithmetic and slow loops written from method.md.

The loops know nothing of masks or tensors: they see a batch of rows, each the list of its valid tokens, and give a
weight per token, or None for a token that leaves the denominator.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_opd import weighting as w
from lit_opd.advantage import ValueBaseline
from lit_opd.errors import InputError
from lit_opd.objective import PolicyLoss
from lit_opd.step.recipe import Recipe
from lit_opd.streams import row_uniforms, stream_seed, token_uniforms
from lit_opd.types import TokenSignal, TopK
from lit_opd.weighting.ier_opd import signal_to_noise
from tests.helpers.signals import all_examples, holey_mask, mask_of, random_signal, small_signal, strategy_classes

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "weights.json"
FLOAT64_ERROR, FLOAT32_ERROR = 1e-9, 2e-5  # of abs(got - want) / max(1, abs(want))
INF = float("inf")


def assert_close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double() - want.double()).abs() / want.double().abs().clamp(min=1.0)
    assert got.shape == want.shape
    assert float(error.max()) <= tolerance


# ---------------------------------------------------------------------------------------------- golden vectors

GOLDEN_STRATEGIES: dict[str, w.WeightingStrategy] = {
    "importance": w.ImportanceWeighting(),
    "importance_w_max_3": w.ImportanceWeighting(w_max=3.0),
    "importance_signed": w.ImportanceWeighting(signed=True),
    "importance_exclude_last": w.ImportanceWeighting(denominator="exclude_last"),
    "prefix_ratio_alpha_0.5_clip_5": w.PrefixRatioTilt(alpha=0.5, low=-5.0, high=5.0),
    "truncated_prefix_ratio": w.PrefixRatioTilt(alpha=1.0, low=-INF, high=0.0),
    "first_0.3": w.FirstFraction(0.3),
    "last_0.3": w.LastFraction(0.3),
    "linear_decay_0.5": w.LinearDecay(0.5),
    "late_rising": w.LateRising(),
    "annealed_prefix_weight_cosine": w.AnnealedPrefixWeight(),
    "annealed_prefix_mask_linear": w.AnnealedPrefixMask(schedule="linear"),
    "teacher_confidence": w.TeacherConfidence(),
    "teacher_confidence_window_4_quantile_0.5": w.TeacherConfidence(window=4, quantile=0.5),
    "trust_region": w.TrustRegion(),
    "dash": w.DASH(),
}
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="golden vectors live outside the repository")
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FLOAT64_ERROR), (torch.float32, FLOAT32_ERROR)]
)


def golden_signal(cases: list[dict], dtype: torch.dtype) -> TokenSignal:
    """All cases as one batch, right-padded with NaN."""
    columns = max(len(case["mask"]) for case in cases)

    def field(name: str, fill: float) -> Tensor:
        return torch.tensor([case[name] + [fill] * (columns - len(case[name])) for case in cases], dtype=dtype)

    return TokenSignal(
        student_logprobs=field("student_logprobs", math.nan),
        teacher_logprobs=field("teacher_logprobs", math.nan),
        mask=field("mask", 0).bool(),
    )


@needs_golden
def test_every_golden_key_has_a_strategy():
    assert {key for case in json.loads(GOLDEN.read_text()) for key in case["weights"]} == set(GOLDEN_STRATEGIES)


@needs_golden
@pytest.mark.parametrize("key", GOLDEN_STRATEGIES)
@precisions
def test_golden_vectors_row_by_row(key, dtype, tolerance):
    for case in json.loads(GOLDEN.read_text()):
        got = GOLDEN_STRATEGIES[key](golden_signal([case], dtype), case["progress"])
        assert got.dtype == dtype
        assert_close(got, torch.tensor([case["weights"][key]], dtype=torch.float64), tolerance)


@needs_golden
@pytest.mark.parametrize("key", GOLDEN_STRATEGIES)
@precisions
def test_golden_vectors_in_one_padded_batch(key, dtype, tolerance):
    cases = json.loads(GOLDEN.read_text())
    signal = golden_signal(cases, dtype)
    for progress in sorted({case["progress"] for case in cases}):
        got = GOLDEN_STRATEGIES[key](signal, progress)
        for row, case in enumerate(cases):
            want = torch.tensor(case["weights"][key], dtype=torch.float64)
            if case["progress"] == progress:
                assert_close(got[row, : len(want)], want, tolerance)
            assert not got[row, len(want) :].any()


# ---------------------------------------------------------------------------------------------- slow loops


@dataclass
class Row:
    """The valid tokens of one row, lists of equal length."""

    key: int
    step: int
    student: list[float]
    teacher: list[float]
    student_entropy: list[float]
    teacher_entropy: list[float]
    token_kl: list[float]
    tokens: list[int]
    turn: list[int]
    student_list: list[dict[int, float]]  # of each token: log-probs by id, likeliest first
    teacher_list: list[dict[int, float]]
    student_at_teacher: list[dict[int, float]]

    def __len__(self) -> int:
        return len(self.student)

    @property
    def gaps(self) -> list[float]:
        return [q - s for q, s in zip(self.teacher, self.student, strict=True)]


Weights = list[list[float | None]]
Reference = Callable[[w.WeightingStrategy, list[Row], float], Weights]
ROW_REFERENCES: dict[type, Callable[..., list[float | None]]] = {}
BATCH_REFERENCES: dict[type, Reference] = {}


def of_row(cls: type) -> Callable:
    return lambda function: ROW_REFERENCES.setdefault(cls, function)


def of_batch(cls: type) -> Callable:
    return lambda function: BATCH_REFERENCES.setdefault(cls, function)


def slow_weights(strategy: w.WeightingStrategy, batch: list[Row], progress: float) -> Weights:
    if type(strategy) in BATCH_REFERENCES:
        return BATCH_REFERENCES[type(strategy)](strategy, batch, progress)
    return [ROW_REFERENCES[type(strategy)](strategy, row, progress) for row in batch]


def slow_mix(value: int) -> int:
    value %= 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def slow_draw(*, seed: int, key: int, step: int, domain: int, i: int) -> float:
    """Draw i = 1, 2, ... of a row's stream."""
    state = 0
    for part in (seed, step, domain, key):
        state = slow_mix(state + part + 0x9E3779B97F4A7C15)
    return (slow_mix(state + i * 0x9E3779B97F4A7C15) >> 11) / 2**53


def slow_draws(strategy: w.WeightingStrategy, row: Row) -> list[float]:
    domain = stream_seed(*type(strategy).__name__.encode())
    return [slow_draw(seed=strategy.seed, key=row.key, step=row.step, domain=domain, i=i + 1) for i in range(len(row))]


def slow_ceil(fraction: float, n: int) -> int:
    return math.ceil(fraction * n - 1e-9)


@of_row(w.Uniform)
def _(strategy, row, progress):
    return [1.0] * len(row)


@of_row(w.Constant)
def _(strategy, row, progress):
    return [strategy.value] * len(row)


@of_row(w.ImportanceWeighting)
def _(strategy, row, progress):
    drift = row.gaps if strategy.signed else [abs(gap) for gap in row.gaps]
    total = sum(drift[:-1] if strategy.denominator == "exclude_last" else drift) + 1e-8
    shares = [sum(drift[:t]) / total for t in range(len(row))]
    return [1 + (strategy.w_max - 1) * min(max(1 - share, 0.0), 1.0) for share in shares]


@of_row(w.PrefixRatioTilt)
def _(strategy, row, progress):
    exponents = [strategy.alpha * sum(row.gaps[:t]) for t in range(len(row))]
    return [math.exp(min(max(x, strategy.low), strategy.high)) for x in exponents]


@of_row(w.FirstFraction)
def _(strategy, row, progress):
    count = slow_ceil(strategy.fraction, len(row))
    return [1.0 if i < count else None for i in range(len(row))]


@of_row(w.LastFraction)
def _(strategy, row, progress):
    count = slow_ceil(strategy.fraction, len(row))
    return [1.0 if i >= len(row) - count else None for i in range(len(row))]


@of_row(w.RandomFraction)
def _(strategy, row, progress):
    draws = slow_draws(strategy, row)
    chosen = sorted(range(len(row)), key=draws.__getitem__)[: slow_ceil(strategy.fraction, len(row))]
    return [1.0 if i in chosen else None for i in range(len(row))]


@of_row(w.FirstTokens)
def _(strategy, row, progress):
    return [1.0 if i < strategy.count else None for i in range(len(row))]


@of_row(w.LinearDecay)
def _(strategy, row, progress):
    return [1 + strategy.gamma * (1 - (i - 1) / len(row)) for i in range(1, len(row) + 1)]


@of_row(w.Geometric)
def _(strategy, row, progress):
    weights = [1.0]
    while len(weights) < len(row):
        weights.append(weights[-1] * strategy.gamma)
    return weights[: len(row)]


def slow_prefix(strategy, n: int, progress: float) -> int:
    if strategy.schedule == "cosine":  # from start, along half a cosine, to end
        ratio = strategy.end + (strategy.start - strategy.end) * (1 + math.cos(math.pi * progress)) / 2
    else:
        ratio = (1 - progress) * strategy.start + progress * strategy.end
    return max(slow_ceil(ratio, n), strategy.min_tokens)


@of_row(w.AnnealedPrefixWeight)
def _(strategy, row, progress):
    count = slow_prefix(strategy, len(row), progress)
    return [strategy.weight if i < count else 1.0 for i in range(len(row))]


@of_row(w.AnnealedPrefixMask)
def _(strategy, row, progress):
    count = slow_prefix(strategy, len(row), progress)
    return [1.0 if i < count else None if strategy.shrink_denominator else 0.0 for i in range(len(row))]


@of_row(w.LateRising)
def _(strategy, row, progress):
    relative = [(i - 0.5) / len(row) for i in range(1, len(row) + 1)]
    rise = [1 / (1 + math.exp(-(f - strategy.tau) / strategy.scale)) for f in relative]
    return [strategy.w_min + (1 - strategy.w_min) * r for r in rise]


@of_row(w.TeacherConfidence)
def _(strategy, row, progress):
    weights = []
    for t in range(len(row)):
        window = sorted((-q for q in row.teacher[max(0, t - strategy.window) : t]), reverse=True)
        count = max(1, math.floor((1 - strategy.quantile) * len(window) + 1e-9))
        worst = sum(window[:count]) / count if window else 0.0
        weights.append(max(math.exp(-strategy.alpha * worst), strategy.floor))
    return weights


@of_row(w.WindowedPrefixRatio)
def _(strategy, row, progress):
    ratios = [math.exp(sum(row.gaps[max(0, t - strategy.window) : t])) for t in range(len(row))]
    return [max(min(ratio, 1.0), strategy.floor) for ratio in ratios]


@of_row(w.TrustRegion)
def _(strategy, row, progress):
    trust = [min(math.exp(gap), 1.0) for gap in row.gaps]
    if strategy.sample:
        return [float(u < p) for u, p in zip(slow_draws(strategy, row), trust, strict=True)]
    return trust


@of_row(w.DASH)
def _(strategy, row, progress):
    gaps = [abs(gap) for gap in row.gaps]
    mean = sum(gaps) / max(len(gaps), 1)
    weights = [1.0]
    for gap in gaps[:-1]:
        weights.append(1 + weights[-1] / (1 + math.exp(strategy.kappa * (gap - mean))))
    return weights[: len(row)]


@of_row(w.FiRe)
def _(strategy, row, progress):
    top_teacher, top_student = max(row.teacher_entropy, default=0.0), max(row.student_entropy, default=0.0)
    sure = [1 - h / top_teacher if top_teacher else 1.0 for h in row.teacher_entropy]
    unsure = [h / top_student if top_student else 0.0 for h in row.student_entropy]
    raw = [(1 + strategy.alpha * a) * (1 + strategy.beta * b) for a, b in zip(sure, unsure, strict=True)]
    return [v * len(raw) / sum(raw) for v in raw]


@of_row(w.EntropyGate)
def _(strategy, row, progress):
    return [1.0 if h <= strategy.threshold else strategy.beta for h in row.teacher_entropy]


def slow_normalised(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    low, high = min(values.values()), max(values.values())
    return {at: (value - low) / (high - low) if high > low else 0.0 for at, value in values.items()}


@of_batch(w.TIP)
def _(strategy, batch, progress):
    tokens = [(r, i) for r, row in enumerate(batch) for i in range(len(row))]
    if not tokens:
        return [[] for _ in batch]
    h = slow_normalised({(r, i): batch[r].student_entropy[i] for r, i in tokens})
    e = slow_normalised({(r, i): batch[r].token_kl[i] for r, i in tokens})
    score = {at: h[at] + e[at] - h[at] * e[at] for at in tokens}
    ranked = sorted(tokens, key=lambda at: (-score[at], at[1], batch[at[0]].key))
    chosen = set(ranked[: slow_ceil(strategy.keep_fraction, len(tokens))])
    return [[1.0 if (r, i) in chosen else None for i in range(len(row))] for r, row in enumerate(batch)]


# -- two lists ---------------------------------------------------------------------------------------------------------


def first(table: dict[int, float], k: int) -> dict[int, float]:
    return dict(list(table.items())[:k])


@of_batch(w.CDD)
def _(strategy, batch, progress):
    raw = []
    for row in batch:
        divergences = []
        for theirs, ours in zip(row.teacher_list, row.student_at_teacher, strict=True):
            terms = [math.exp(q) * (q - ours[v]) for v, q in first(theirs, strategy.k).items()]
            divergences.append(max(sum(terms), 0.0))
        raw.append([max(strategy.floor, math.exp(-strategy.rate * sum(divergences[:t]))) for t in range(len(row))])
    return slow_scaled(raw, [value for values in raw for value in values])


@of_row(w.PruneOPD)
def _(strategy, row, progress):
    weights, bad = [], 0
    for ours, theirs in zip(row.student_list, row.teacher_list, strict=True):
        common = len(set(first(ours, strategy.k)) & set(first(theirs, strategy.k)))
        bad += common / len(first(ours, strategy.k)) < strategy.threshold
        weights.append(min(max(1 - strategy.drop * bad, 0.0), 1.0) + strategy.base)
    return weights


@of_row(w.SelecTKD)
def _(strategy, row, progress):
    pairs = zip(row.student_list, row.teacher_list, strict=True)
    return [1.0 if next(iter(ours)) in first(theirs, strategy.k) else strategy.low for ours, theirs in pairs]


def tokens_of(batch: list[Row]) -> list[tuple[int, int]]:
    return [(r, i) for r, row in enumerate(batch) for i in range(len(row))]


def slow_best(batch: list[Row], score: dict[tuple[int, int], float], count: int) -> set[tuple[int, int]]:
    return set(sorted(score, key=lambda at: (-score[at], at[1], batch[at[0]].key))[:count])


def slow_kept(batch: list[Row], chosen: set[tuple[int, int]]) -> Weights:
    return [[1.0 if (r, i) in chosen else None for i in range(len(row))] for r, row in enumerate(batch)]


def slow_quantile(values: list[float], share: float) -> float:
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def slow_robust(values: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    low, high = (slow_quantile(list(values.values()), share) for share in (0.05, 0.95))
    return {at: min(max((x - low) / (high - low), 0.0), 1.0) if high > low else 0.0 for at, x in values.items()}


def slow_teachability(batch: list[Row], k: int) -> dict[tuple[int, int], float]:
    contested, reach = {}, {}
    for r, i in tokens_of(batch):
        ours = {v: math.exp(x) for v, x in first(batch[r].student_list[i], k).items()}
        theirs = {v: math.exp(x) for v, x in first(batch[r].teacher_list[i], k).items()}
        contested[r, i] = 0.0
        for v in set(ours) | set(theirs):
            p, q = (max(table.get(v, 0.0) / sum(table.values()), 1e-12) for table in (ours, theirs))
            contested[r, i] += q * (math.log(q) - math.log(p))
        reach[r, i] = sum(q for v, q in theirs.items() if v in ours)
    if not contested:
        return {}
    contested, reach = slow_robust(contested), slow_robust(reach)
    return {at: contested[at] * reach[at] for at in contested}


@of_batch(w.TAOPD)
def _(strategy, batch, progress):
    score = slow_teachability(batch, strategy.k)
    return slow_kept(batch, slow_best(batch, score, slow_ceil(strategy.keep_fraction, len(score))))


def slow_union(row: Row, i: int, k: int, *, sampled: bool) -> tuple[list[float], list[float]]:
    """Probabilities of both models over the union of the lists, renormalised; -12 nats where a model says nothing."""
    ours, theirs = row.student_list[i], row.teacher_list[i]
    ids = set(first(ours, k)) | set(first(theirs, k)) | ({row.tokens[i]} if sampled else set())
    found = []
    for table, own in ((ours, row.student[i]), (theirs, row.teacher[i])):
        nats = {v: table[v] if v in table else own if sampled and v == row.tokens[i] else -12.0 for v in ids}
        total = sum(math.exp(x) for x in nats.values())
        found.append([math.exp(nats[v]) / total for v in sorted(ids)])
    return found[0], found[1]


@of_batch(w.PGT)
def _(strategy, batch, progress):
    score = {}
    for r, i in tokens_of(batch):
        p, q = slow_union(batch[r], i, strategy.k, sampled=False)
        ratio = [math.log(b) - math.log(a) for a, b in zip(p, q, strict=True)]
        mean = sum(a * x for a, x in zip(p, ratio, strict=True))
        score[r, i] = sum(a * (x - mean) ** 2 for a, x in zip(p, ratio, strict=True))
    return slow_kept(batch, slow_best(batch, score, slow_ceil(strategy.keep_fraction, len(score))))


def slow_ier(p: list[float], q: list[float]) -> float:
    rho = [min(max(math.log(a) - math.log(b), -30.0), 30.0) for a, b in zip(p, q, strict=True)]
    mean = sum(a * x for a, x in zip(p, rho, strict=True))
    signal = sum(a * (x - mean) ** 2 for a, x in zip(p, rho, strict=True))
    odds = [1 / a - 1 for a in p]
    best = sum(a * x * o for a, x, o in zip(p, rho, odds, strict=True)) / sum(
        a * o for a, o in zip(p, odds, strict=True)
    )
    second = sum(a * (x - best) ** 2 * o for a, x, o in zip(p, rho, odds, strict=True))
    return signal / max(second - signal, 1e-8)


@of_batch(w.IEROPD)
def _(strategy, batch, progress):
    score = {(r, i): slow_ier(*slow_union(batch[r], i, strategy.k, sampled=True)) for r, i in tokens_of(batch)}
    if strategy.fuse != "none":
        useful, ordered = slow_teachability(batch, strategy.k), sorted(score.values())
        rank = {
            at: ordered.index(x) / max(len(ordered) - 1, 1) for at, x in score.items()
        }  # no ties among random values
        joined = {"or": lambda u, r: u + r - u * r, "and": lambda u, r: u * r}[strategy.fuse]
        score = {at: joined(useful[at], rank[at]) for at in score}
    chosen = slow_best(batch, score, slow_ceil(strategy.keep_fraction, len(score)))
    for r, row in enumerate(batch):
        if len(row) and not any((r, i) in chosen for i in range(len(row))):
            chosen.add(max(((r, i) for i in range(len(row))), key=score.__getitem__))
    return slow_kept(batch, chosen)


# -- selections by the sampled token -----------------------------------------------------------------------------------


def slow_best_of_row(row: Row, score: list[float], count: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda i: -score[i])[:count])


@of_row(w.DIALOPD)
def _(strategy, row, progress):
    score = []
    for s, q in zip(row.student, row.teacher, strict=True):
        mean = (math.exp(q) - math.exp(s)) / (q - s) if q != s else math.exp(s)
        score.append(mean**strategy.beta * abs(q - s))
    chosen = slow_best_of_row(row, score, max(1, round(strategy.keep_fraction * len(row))))
    return [1.0 if i in chosen else None for i in range(len(row))]


@of_row(w.SparseTokens)
def _(strategy, row, progress):
    count = 1 if strategy.fraction is None else max(1, round(strategy.fraction * len(row)))
    low = slow_best_of_row(row, [-gap for gap in row.gaps], count)
    high = slow_best_of_row(row, row.gaps, count)
    drawn = sorted(range(len(row)), key=slow_draws(strategy, row).__getitem__)[:count]
    chosen = {"random": set(drawn), "largest": high, "smallest": low, "tails": low | high}[strategy.which]
    return [float(i in chosen) for i in range(len(row))]


@of_batch(w.FiReRows)
def _(strategy, batch, progress):
    means = {r: sum(row.teacher) / len(row) for r, row in enumerate(batch) if len(row)}
    least = slow_quantile(list(means.values()), strategy.fraction) if means else 0.0
    return [[1.0 if means[r] >= least else None] * len(row) if len(row) else [] for r, row in enumerate(batch)]


@of_batch(w.REOPOLD)
def _(strategy, batch, progress):
    if progress < strategy.switch:
        floor = math.log(strategy.strength) / (1 - strategy.strength)
        return [[1.0 if gap > floor else None for gap in row.gaps] for row in batch]
    score = {(r, i): batch[r].student_entropy[i] for r, i in tokens_of(batch)}
    return slow_kept(batch, slow_best(batch, score, slow_ceil(strategy.keep_fraction, len(score))))


@of_batch(w.LeastLikely)
def _(strategy, batch, progress):
    score = {(r, i): -batch[r].student[i] for r, i in tokens_of(batch)}
    return slow_kept(batch, slow_best(batch, score, max(1, math.floor(strategy.fraction * len(score) + 1e-9))))


def slow_turns(row: Row) -> list[tuple[int, list[int]]]:
    """(turn, places) in order."""
    return [(turn, [i for i, own in enumerate(row.turn) if own == turn]) for turn in sorted(set(row.turn))]


@of_batch(w.PerTurn)
def _(strategy, batch, progress):
    parts, places = [], []
    for r, row in enumerate(batch):
        for turn, own in slow_turns(row):
            key = row.key if turn == 0 else stream_seed(row.key, turn)
            values = {n: [v[i] for i in own] for n, v in vars(row).items() if isinstance(v, list)}
            parts.append(replace(row, key=key, **values))
            places.append((r, own))
    weights: Weights = [[None] * len(row) for row in batch]
    for (r, own), found in zip(places, slow_weights(strategy.strategy, parts, progress), strict=True):
        for i, value in zip(own, found, strict=True):
            weights[r][i] = value
    return weights


@of_batch(w.TurnBalanced)
def _(strategy, batch, progress):
    weights = slow_weights(strategy.strategy, batch, progress)
    for row, found in zip(batch, weights, strict=True):
        sums = {turn: sum(found[i] or 0.0 for i in own) for turn, own in slow_turns(row)}
        counted = [value for value in sums.values() if value > 0]
        for i, value in enumerate(found):
            if value:
                found[i] = value * sum(counted) / len(counted) / sums[row.turn[i]]
    return weights


@of_row(w.AfterObservation)
def _(strategy, row, progress):
    near = {i for turn, own in slow_turns(row) if turn > 0 for i in own[: strategy.count]}
    return [strategy.weight if i in near else 1.0 for i in range(len(row))]


@of_batch(w.MatchedCurve)
def _(strategy, batch, progress):
    inner = slow_weights(strategy.strategy, batch, progress)

    def place(i, n):
        return i if strategy.by == "absolute" else (2 * i + 1) * strategy.bins // (2 * n)

    cells: dict[int, list[float]] = {}
    for row in inner:
        for i, value in enumerate(row):
            cells.setdefault(place(i, len(row)), []).append(value or 0.0)
    tokens = [value for row in inner for value in row]
    scale = len(tokens) / max(sum(value is not None for value in tokens), 1)
    means = {cell: sum(values) / len(values) * scale for cell, values in cells.items()}
    return [[means[place(i, len(row))] for i in range(len(row))] for row in inner]


@of_batch(w.Product)
def _(strategy, batch, progress):
    factors = [slow_weights(child, batch, progress) for child in strategy.strategies]

    def product(values):
        return None if None in values else math.prod(values)

    return [[product(values) for values in zip(*rows, strict=True)] for rows in zip(*factors, strict=True)]


def slow_scaled(rows: Weights, counted: list[float]) -> Weights:
    mean = sum(counted) / len(counted) if counted else 0.0
    return [[value / mean if value and mean else value for value in row] for row in rows]


@of_batch(w.SequenceMeanOne)
def _(strategy, batch, progress):
    inner = slow_weights(strategy.strategy, batch, progress)
    return [slow_scaled([row], [value for value in row if value is not None])[0] for row in inner]


@of_batch(w.BatchMeanOne)
def _(strategy, batch, progress):
    inner = slow_weights(strategy.strategy, batch, progress)
    return slow_scaled(inner, [value for row in inner for value in row if value is not None])


@of_batch(w.Reversed)
def _(strategy, batch, progress):
    return [row[::-1] for row in slow_weights(strategy.strategy, batch, progress)]


@of_batch(w.Shuffled)
def _(strategy, batch, progress):
    inner = slow_weights(strategy.strategy, batch, progress)
    draws = [slow_draws(strategy, row) for row in batch]
    orders = [sorted(range(len(d)), key=d.__getitem__) for d in draws]
    return [[row[i] for i in order] for row, order in zip(inner, orders, strict=True)]


def rows_of(signal: TokenSignal) -> list[Row]:
    names = (
        "student_logprobs",
        "teacher_logprobs",
        "student_entropy",
        "teacher_entropy",
        "token_kl",
        "token_ids",
        "turn",
    )
    ours, theirs = signal.student_topk, signal.teacher_topk
    tables = ((ours.ids, ours.logprobs), (theirs.ids, theirs.logprobs), (theirs.ids, signal.student_at_teacher_topk))
    rows = []
    for r, valid in enumerate(signal.mask):
        plain = (getattr(signal, n)[r][valid].tolist() for n in names)
        lists = [
            [
                dict(zip(*pair, strict=True))
                for pair in zip(ids[r][valid].tolist(), values[r][valid].tolist(), strict=True)
            ]
            for ids, values in tables
        ]
        rows.append(Row(int(signal.row_keys[r]), signal.step, *plain, *lists))
    return rows


def as_tensors(slow: Weights, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights, kept = torch.zeros(mask.shape, dtype=torch.float64), mask.clone()
    for r, row in enumerate(slow):
        weights[r][mask[r]] = torch.tensor([value or 0.0 for value in row], dtype=torch.float64)
        kept[r][mask[r]] = torch.tensor([value is not None for value in row], dtype=torch.bool)
    return weights, kept


EXTRA = [
    w.TeacherConfidence(window=5, quantile=0.0),
    w.TeacherConfidence(window=10, quantile=0.7, alpha=0.3),
    w.PrefixRatioTilt(alpha=1.0, low=-2.0, high=80.0),
    w.WindowedPrefixRatio(window=2, floor=0.05),
    w.ImportanceWeighting(signed=True, denominator="exclude_last", w_max=4.0),
    w.RandomFraction(0.1, seed=-5),
    w.FirstFraction(1e-6),
    w.SequenceMeanOne(w.Product([w.TIP(0.3), w.DASH()])),
    w.BatchMeanOne(w.FiRe()),
    w.BatchMeanOne(w.Constant(0.0)),
    w.AnnealedPrefixMask(start=0.1, min_tokens=9),
    w.AnnealedPrefixWeight(start=0.1, schedule="linear", min_tokens=9),
    w.Reversed(w.AnnealedPrefixMask(shrink_denominator=True)),
    w.Product([w.LastFraction(0.6), w.FirstFraction(0.7)]),
    w.Shuffled(w.Product([w.FirstFraction(0.5), w.LinearDecay(1.0)]), seed=9),
    w.Product([w.TrustRegion(), w.EntropyGate(), w.SequenceMeanOne(w.ImportanceWeighting())]),
    w.Product([w.FiRe(), w.FiReRows()]),
    w.MatchedCurve(w.PrefixRatioTilt(), bins=1),
    w.MatchedCurve(w.Product([w.TIP(0.3), w.DASH()]), bins=7),
    w.IEROPD(0.5, k=2, fuse="or"),
    w.Shuffled(w.TAOPD(0.2), seed=4),
    w.PerTurn(w.RandomFraction(0.4, seed=3)),
    w.PerTurn(w.TAOPD(0.2)),
    w.TurnBalanced(w.PerTurn(w.ImportanceWeighting(w_max=4.0))),
]
CASES = all_examples() + [(f"extra-{i}-{type(extra).__name__}", extra) for i, extra in enumerate(EXTRA)]


@functools.cache
def short_and_long() -> tuple[tuple[TokenSignal, list[Row]], ...]:
    """Two signals and their rows; strategies change neither."""
    sizes = enumerate([(8, 23), (6, 90)])
    signals = [random_signal(holey_mask(*size, seed=seed), seed=seed) for seed, size in sizes]
    return tuple((signal, rows_of(signal)) for signal in signals)


@pytest.mark.parametrize("strategy", [example for _, example in CASES], ids=[name for name, _ in CASES])
def test_strategies_equal_a_slow_loop_written_from_the_formula(strategy):
    short, long = short_and_long()
    for (signal, rows), progress in ((short, 0.0), (short, 0.55), (long, 0.55), (short, 1.0)):
        weights, kept = as_tensors(slow_weights(strategy, rows, progress), signal.mask)
        assert_close(strategy(signal, progress), weights, FLOAT64_ERROR)
        assert torch.equal(strategy.kept(signal, progress), kept), progress


def test_every_strategy_has_a_slow_loop():
    assert set(strategy_classes()) == set(ROW_REFERENCES) | set(BATCH_REFERENCES)


def test_tip_uses_disagreement_where_token_kl_was_not_computed():
    signal = replace(random_signal(holey_mask(8, 23)), token_kl=None)
    as_if = replace(signal, token_kl=signal.disagreement)
    assert torch.equal(w.TIP()(signal), w.TIP()(as_if))


class LooksOn:
    """A callback that asks for the token KL."""

    requires = frozenset({"token_kl"})


def test_who_looks_on_does_not_change_what_tip_keeps():
    signal = random_signal(holey_mask(8, 23))
    by_disagreement, by_kl = w.TIP(0.3)(replace(signal, token_kl=None)), w.TIP(0.3)(signal)
    assert not torch.equal(by_disagreement, by_kl)
    recipe = Recipe(w.TIP(0.3), PolicyLoss(), max_new_tokens=23)
    assert torch.equal(replace(recipe, observers=(LooksOn(),)).weighted(signal, 0.5)[0], by_disagreement)
    assert torch.equal(replace(recipe, advantage=(ValueBaseline(),)).weighted(signal, 0.5)[0], by_kl)


def test_tip_breaks_ties_by_position_and_then_by_row_key():
    flat = torch.zeros(2, 3)
    signal = TokenSignal(
        student_logprobs=flat,
        teacher_logprobs=flat,
        student_entropy=flat,
        mask=torch.tensor([[False, True, True], [True, True, True]]),
        row_keys=torch.tensor([9, 4]),
    )
    # five tied tokens, ceil(0.5 * 5) = 3 stay: both first positions (columns 1 and 0), then the second of key 4
    assert w.TIP(0.5)(signal).tolist() == [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    # ceil(0.2 * 5) = 1: the first position of the smaller key
    assert w.TIP(0.2)(signal).tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]


def test_tip_gives_ties_only_the_seats_that_higher_scores_left():
    entropy = torch.tensor([[0.0, 0.5, 1.0, 0.5, 0.5, 0.9]])  # the divergence is constant: score = entropy
    signal = replace(small_signal([-1.0] * 6, [-1.0] * 6), student_entropy=entropy)
    # ceil(0.5 * 6) = 3: 1.0 and 0.9, then the first of three tied at 0.5
    assert w.TIP(0.5)(signal).tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize(("constant", "varied"), [("token_kl", "student_entropy"), ("student_entropy", "token_kl")])
def test_tip_ignores_a_statistic_that_is_constant_on_valid_tokens(constant, varied):
    """With the masked 0 in the range it would be 1 on every token, and so would every score."""
    signal = TokenSignal(
        student_logprobs=torch.zeros(1, 4),
        teacher_logprobs=torch.zeros(1, 4),
        mask=torch.tensor([[True, True, True, False]]),
        **{constant: torch.full((1, 4), 9.0), varied: torch.tensor([[1.0, 3.0, 2.0, 5.0]])},
    )
    assert w.TIP(0.3)(signal).tolist() == [[0.0, 1.0, 0.0, 0.0]]


# ---------------------------------------------------------------------------------------------- neutral parameters

NEUTRAL = [
    w.Constant(1.0),
    w.ImportanceWeighting(w_max=1.0),
    w.ImportanceWeighting(w_max=1.0, signed=True, denominator="exclude_last"),
    w.PrefixRatioTilt(low=0.0, high=0.0),
    w.FirstFraction(1.0),
    w.LastFraction(1.0),
    w.RandomFraction(1.0, seed=2),
    w.FirstTokens(23),
    w.LinearDecay(0.0),
    w.Geometric(1.0),
    w.AnnealedPrefixWeight(weight=1.0),
    w.AnnealedPrefixMask(start=1.0),
    w.AnnealedPrefixMask(start=1.0, shrink_denominator=True),
    w.LateRising(w_min=1.0),
    w.TeacherConfidence(alpha=0.0),
    w.TeacherConfidence(floor=1.0),
    w.FiRe(alpha=0.0, beta=0.0),
    w.TIP(1.0),
    w.EntropyGate(beta=1.0),
    w.EntropyGate(threshold=1e9),
    w.Product([w.Uniform(), w.Uniform()]),
    w.SequenceMeanOne(w.Uniform()),
    w.BatchMeanOne(w.Uniform()),
    w.Reversed(w.Uniform()),
    w.Shuffled(w.Uniform(), seed=1),
    w.CDD(0.0, 0.0),
    w.CDD(1.0, 1.0),
    w.PruneOPD(drop=0.0, base=0.0),
    w.TAOPD(1.0),
    w.PGT(1.0),
    w.IEROPD(1.0),
    w.SelecTKD(low=1.0),
    w.DIALOPD(keep_fraction=1.0),
    w.FiReRows(0.0),
    w.LeastLikely(1.0),
    w.MatchedCurve(w.Uniform()),
    w.MatchedCurve(w.FirstFraction(0.3), bins=1),
]


@pytest.mark.parametrize("strategy", NEUTRAL, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neutral_parameters_equal_uniform_bitwise(strategy, dtype):
    signal = random_signal(holey_mask(8, 23), dtype=dtype)
    assert torch.equal(strategy(signal, 0.4), w.Uniform()(signal, 0.4))
    assert torch.equal(strategy.kept(signal, 0.4), signal.mask)


def test_a_student_that_equals_its_teacher_gives_the_ratio_strategies_weight_one():
    signal = random_signal(holey_mask(8, 23))
    twin = replace(signal, teacher_logprobs=signal.student_logprobs)
    for strategy in (w.TrustRegion(), w.TrustRegion(sample=True), w.PrefixRatioTilt()):
        assert torch.equal(strategy(twin), w.Uniform()(twin))


# ---------------------------------------------------------------------------------------------- facts of section 1


@pytest.mark.parametrize("w_max", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("denominator", ["all", "exclude_last"])
@pytest.mark.parametrize("signed", [False, True])
def test_importance_gives_the_first_valid_token_w_max_and_stays_in_its_range(w_max, denominator, signed):
    signal = random_signal(holey_mask(12, 40))
    weights = w.ImportanceWeighting(w_max=w_max, signed=signed, denominator=denominator)(signal)
    first = signal.mask & (signal.mask.cumsum(-1) == 1)
    assert torch.equal(weights[first], torch.full_like(weights[first], w_max))
    assert (weights[signal.mask] >= 1).all() and (weights <= w_max).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_importance_never_rises_along_the_row(dtype):
    signal = random_signal(mask_of([500, 300, 7], 500), dtype=dtype)
    weights = w.ImportanceWeighting(w_max=3.0)(signal)
    for row, length in enumerate((500, 300, 7)):
        assert (weights[row, :length].diff() <= 1e-6).all()


@pytest.mark.parametrize("denominator", ["all", "exclude_last"])
def test_importance_is_w_max_without_disagreement_and_on_a_single_token(denominator):
    strategy = w.ImportanceWeighting(w_max=2.0, denominator=denominator)
    assert strategy(small_signal([-1.0] * 4, [-1.0] * 4)).tolist() == [[2.0] * 4]
    assert strategy(small_signal([-1.0], [-3.0])).tolist() == [[2.0]]


@pytest.mark.parametrize("n", [1, 2, 10, 333])
def test_importance_of_even_disagreement_is_linear_decay_with_the_known_mean(n):
    even = small_signal([-1.0] * n, [-1.5] * n)
    weights, gamma = w.ImportanceWeighting(w_max=1.5)(even), 0.5
    assert math.isclose(float(weights.mean()), 1 + gamma * (n + 1) / (2 * n), abs_tol=1e-7)  # the 1e-8 in F
    assert_close(weights, w.LinearDecay(gamma)(even), 1e-7)


# ---------------------------------------------------------------------------------------------- hand arithmetic

LOG2, LOG4 = math.log(2), math.log(4)
# s = -1, -1, -1, -1; A = +log 2, -log 4, +log 2, -log 2 (d in units of log 2: 1, 2, 1, 1)
HAND = small_signal([-1.0] * 4, [-1 + LOG2, -1 - LOG4, -1 + LOG2, -1 - LOG2])


@pytest.mark.parametrize(
    ("strategy", "want"),
    [
        (w.ImportanceWeighting(w_max=2.0), [2.0, 1.8, 1.4, 1.2]),  # F = 0, 1/5, 3/5, 4/5
        (w.ImportanceWeighting(w_max=2.0, denominator="exclude_last"), [2.0, 1.75, 1.25, 1.0]),  # of 4
        (w.ImportanceWeighting(w_max=2.0, signed=True), [2.0, 2.0, 1.0, 2.0]),  # F = 0, -1, 1, 0
        (w.PrefixRatioTilt(alpha=1.0), [1.0, 2.0, 0.5, 1.0]),  # 2^0, 2^1, 2^-1, 2^0
        (w.PrefixRatioTilt(alpha=0.5, low=-INF, high=0.0), [1.0, 1.0, 2**-0.5, 1.0]),
        (w.TrustRegion(), [1.0, 0.25, 1.0, 0.5]),
        (w.LinearDecay(0.4), [1.4, 1.3, 1.2, 1.1]),
        (w.Geometric(0.5), [1.0, 0.5, 0.25, 0.125]),
        (w.FirstFraction(0.3), [1.0, 1.0, 0.0, 0.0]),  # ceil(1.2) = 2
        (w.LastFraction(0.25), [0.0, 0.0, 0.0, 1.0]),
        (w.FirstTokens(3), [1.0, 1.0, 1.0, 0.0]),
        (w.DASH(kappa=0.0), [1.0, 1.5, 1.75, 1.875]),  # W = 1 + W / 2
        (w.AnnealedPrefixMask(start=0.25), [1.0, 0.0, 0.0, 0.0]),
        (w.Reversed(w.Geometric(0.5)), [0.125, 0.25, 0.5, 1.0]),
        (w.SequenceMeanOne(w.LinearDecay(0.4)), [1.12, 1.04, 0.96, 0.88]),  # over 1.25
        (w.SequenceMeanOne(w.Product([w.FirstTokens(2), w.Geometric(0.5)])), [4 / 3, 2 / 3, 0.0, 0.0]),  # over 0.75
        # windows of -q: [], [1 - l], [1 - l, 1 + 2 l], [1 + 2 l, 1 - l]; the larger one counts
        (w.TeacherConfidence(window=2, quantile=0.5), [1.0, 2 / math.e, 0.25 / math.e, 0.25 / math.e]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, w.WeightingStrategy) else "",
)
def test_hand_computed_rows(strategy, want):
    assert_close(strategy(HAND), torch.tensor([want], dtype=torch.float64), 1e-7)  # the 1e-8 in F


def listed_signal(
    student: list[list[tuple[int, float]]], teacher: list[list[tuple[int, float]]], **fields
) -> TokenSignal:
    """One row of tokens with lists of (id, probability)."""
    n = len(student)

    def topk(lists):
        ids = torch.tensor([[[v for v, _ in pairs] for pairs in lists]])
        return TopK(
            ids=ids, logprobs=torch.tensor([[[p for _, p in pairs] for pairs in lists]], dtype=torch.float64).log()
        )

    content = {
        "student_logprobs": torch.zeros(1, n, dtype=torch.float64),
        "teacher_logprobs": torch.zeros(1, n, dtype=torch.float64),
    }
    signal = {"mask": torch.ones(1, n, dtype=torch.bool), "student_topk": topk(student), "teacher_topk": topk(teacher)}
    return TokenSignal(**(content | signal | fields))


def test_prune_opd_gives_the_published_row():
    """B = 0, 1, 0, 1, 1 gives 1.5, 1.49, 1.49, 1.48, 1.47."""
    same, other = [(1, 0.6), (2, 0.4)], [(1, 0.6), (3, 0.4)]
    signal = listed_signal([same] * 5, [same, other, same, other, other])
    assert_close(w.PruneOPD(k=2)(signal), torch.tensor([[1.5, 1.49, 1.49, 1.48, 1.47]]), 1e-7)


def test_cdd_discounts_by_what_lies_before_and_divides_by_the_mean():
    half = [(1, 0.5), (2, 0.5)]
    listed = torch.tensor([[[0.25, 0.5], [0.5, 0.5], [0.5, 0.5]]], dtype=torch.float64).log()
    signal = listed_signal([half] * 3, [half] * 3, student_at_teacher_topk=listed)
    raw = [1.0, 2**-0.5, 2**-0.5]  # the divergence of the first token is log(2) / 2
    want = torch.tensor([[3 * value / sum(raw) for value in raw]], dtype=torch.float64)
    assert_close(w.CDD(1.0, 0.0)(signal), want, 1e-12)
    impossible = replace(signal, student_at_teacher_topk=listed.index_fill(-1, torch.tensor([0]), -INF))
    assert_close(w.CDD(1.0, 0.1)(impossible), torch.tensor([[3 / 1.2, 0.3 / 1.2, 0.3 / 1.2]]), 1e-12)


def test_selectkd_accepts_the_students_choice_in_the_teachers_leading_entries():
    signal = listed_signal([[(7, 0.9), (1, 0.1)]] * 2, [[(1, 0.9), (7, 0.1)], [(1, 0.9), (2, 0.1)]])
    assert w.SelecTKD(k=2)(signal).tolist() == [[1.0, 0.01]]
    assert w.SelecTKD(k=1)(signal).tolist() == [[0.01, 0.01]]


def test_ier_of_two_candidates_is_what_the_formula_says_by_hand():
    """p = (1/2, 1/2), q = (1/4, 3/4): L = 1 everywhere, so b is the mean, the noise the same as the signal, less the signal."""
    p, q = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    ratio = (p / q).log()
    variance = (math.log(3) / 2) ** 2
    assert math.isclose(float(signal_to_noise(p, ratio)), variance / 1e-8, rel_tol=1e-6)
    p = torch.tensor([[0.8, 0.2]], dtype=torch.float64)
    rho = (math.log(0.8 / 0.25), math.log(0.2 / 0.75))
    signal = 0.16 * (rho[0] - rho[1]) ** 2
    # p L = 0.2, 0.8: the variance under these weights is the same 0.16 (rho_1 - rho_2)^2
    assert math.isclose(float(signal_to_noise(p, (p / q).log())), signal / 1e-8, rel_tol=1e-5)


def test_the_mean_weight_of_a_matched_curve_is_that_of_its_strategy():
    signal = random_signal(holey_mask(8, 23))
    for inner in (w.ImportanceWeighting(w_max=4.0), w.Product([w.TIP(0.3), w.DASH()]), w.LastFraction(0.3)):
        for curve in (w.MatchedCurve(inner), w.MatchedCurve(inner, by="absolute"), w.MatchedCurve(inner, bins=1)):
            ours, theirs = curve(signal).sum() / signal.mask.sum(), inner(signal).sum() / inner.kept(signal).sum()
            assert math.isclose(float(ours), float(theirs), rel_tol=1e-12)


def test_a_matched_curve_knows_the_position_only():
    """Rows of one length get one curve, and a strategy of the position alone gets itself back."""
    signal = random_signal(mask_of([20] * 6, 20))
    curve = w.MatchedCurve(w.ImportanceWeighting(w_max=4.0))(signal)
    assert torch.equal(curve, curve[:1].expand_as(curve)) and len(curve[0].unique()) == 20
    assert not torch.equal(curve, w.ImportanceWeighting(w_max=4.0)(signal))
    assert_close(w.MatchedCurve(w.LinearDecay(0.7))(signal), w.LinearDecay(0.7)(signal), 1e-12)


def test_dial_between_the_log_ratio_and_the_gap_of_probabilities():
    """(p, q) = (.08, .8) and (.0001, .001) have one log ratio; (.4, .6) has a smaller one and a gap between theirs."""
    signal = small_signal([math.log(x) for x in (0.0001, 0.08, 0.4)], [math.log(x) for x in (0.0012, 0.8, 0.6)])
    assert w.DIALOPD(beta=0.0, keep_fraction=0.3).kept(signal).tolist() == [[True, False, False]]
    assert w.DIALOPD(beta=1.0, keep_fraction=0.6).kept(signal).tolist() == [[False, True, True]]


def test_counts_forgive_the_rounding_of_whole_products():
    """In floats 0.14 * 50 is just above 7, (1 - 0.9) * 20 just below 2, and 0.28 * 25 just above 7."""
    row = random_signal(torch.ones(1, 50, dtype=torch.bool))
    for n, fraction, count in ((50, 0.3, 15), (50, 0.14, 7), (25, 0.28, 7), (3, 0.1, 1)):
        part = replace(row, mask=torch.arange(50).unsqueeze(0) < n)
        for cls in (w.FirstFraction, w.LastFraction, w.RandomFraction):
            assert int(cls(fraction).kept(part).sum()) == count
    teacher = -torch.arange(1.0, 51.0, dtype=torch.float64).unsqueeze(0)
    weights = w.TeacherConfidence(window=20, alpha=0.01)(replace(row, teacher_logprobs=teacher))
    assert math.isclose(float(weights[0, 20]), math.exp(-0.01 * 19.5))  # the largest two of 1..20
    rows = small_signal([-1.0], [-1.0])
    spread = replace(
        rows.rows(torch.zeros(26, dtype=torch.int64)), teacher_logprobs=-torch.arange(26.0).square()[:, None]
    )
    assert int((~w.FiReRows(0.28).kept(spread)).sum()) == 7  # of 26, at most 0.28 * 26


def test_dial_counts_in_float64():
    """0.14 * 75 is above 10.5, and 10.5 in float32, which is rounded to 10."""
    assert int(w.DIALOPD(keep_fraction=0.14).kept(random_signal(torch.ones(1, 75, dtype=torch.bool))).sum()) == 11


def test_dash_adds_no_error_where_agreement_is_long():
    """lambda within 1e-7 of 1 on 5000 tokens: in float32 arithmetic W would drift by far more than its input."""
    student = torch.full((1, 5000), -1.0)
    teacher = student.clone()
    teacher[0, -50:] = -400.0
    signal = TokenSignal(student_logprobs=student, teacher_logprobs=teacher, mask=torch.ones(1, 5000).bool())
    share = 1 / (1 + math.exp(-5 * 399 * 50 / 5000))
    weight = 1.0
    for _ in range(4900):
        weight = 1 + share * weight
    assert math.isclose(float(w.DASH()(signal)[0, 4900]), weight, rel_tol=1e-6)


def test_normalisers_leave_all_zero_rows_at_zero():
    zeros = w.Constant(0.0)
    for strategy in (w.SequenceMeanOne(zeros), w.BatchMeanOne(zeros)):
        assert not strategy(HAND).any()
        assert torch.equal(strategy.kept(HAND), HAND.mask)


def test_normalisers_average_over_kept_tokens_only():
    signal = random_signal(holey_mask(8, 23))
    half = w.Product([w.ImportanceWeighting(w_max=4.0), w.RandomFraction(0.5, seed=0)])
    by_row, by_batch = w.SequenceMeanOne(half), w.BatchMeanOne(half)
    kept = half.kept(signal)
    counted = kept.any(-1)
    means = by_row(signal).sum(-1)[counted] / kept.sum(-1)[counted]
    assert_close(means, torch.ones_like(means), 1e-12)
    assert math.isclose(float(by_batch(signal).sum() / kept.sum()), 1.0, rel_tol=1e-12)


def test_rearrangements_move_drops_with_their_weights():
    signal = random_signal(holey_mask(8, 23))
    first, last = w.FirstFraction(0.3), w.LastFraction(0.3)
    assert torch.equal(w.Reversed(first)(signal), last(signal))
    assert torch.equal(w.Reversed(first).kept(signal), last.kept(signal))
    assert torch.equal(w.Reversed(w.Reversed(w.ImportanceWeighting()))(signal), w.ImportanceWeighting()(signal))
    inner = w.Product([w.ImportanceWeighting(), first])
    shuffled = w.Shuffled(inner, seed=5)
    assert torch.equal(shuffled(signal).sort(-1).values, inner(signal).sort(-1).values)
    assert torch.equal(shuffled.kept(signal).sum(-1), inner.kept(signal).sum(-1))
    assert torch.equal(shuffled(signal) > 0, shuffled.kept(signal))


# ---------------------------------------------------------------------------------------------- random draws


def test_row_streams_equal_splitmix64_on_python_integers():
    keys = torch.tensor([0, 1, 2**62, -7])
    draws = row_uniforms(11, keys, 5, 6, domain=3)
    for r, key in enumerate(keys.tolist()):
        want = [slow_draw(seed=11, key=key, step=5, domain=3, i=i) for i in range(1, 7)]
        assert draws[r].tolist() == want
    assert slow_mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the first output of the published generator at seed 0


def test_row_streams_do_not_depend_on_the_request():
    keys = torch.arange(100)
    draws = row_uniforms(0, keys, 1, 50)
    assert torch.equal(row_uniforms(0, keys[40:60], 1, 20), draws[40:60, :20])
    assert draws.dtype == torch.float64 and (draws >= 0).all() and (draws < 1).all()
    assert row_uniforms(0, keys[:0], 1, 5).shape == (0, 5) and row_uniforms(0, keys, 1, 0).shape == (100, 0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 2}, {"domain": 1}])
def test_row_streams_are_uniform_and_unrelated(change):
    keys = torch.arange(400)
    arguments = {"seed": 0, "row_keys": keys, "step": 1, "count": 400, "domain": 0}
    draws, other = row_uniforms(**arguments), row_uniforms(**(arguments | change))
    sigma = (1 / 12 / draws.numel()) ** 0.5
    assert abs(float(draws.mean()) - 0.5) < 5 * sigma
    histogram = draws.histc(bins=20, min=0, max=1) / draws.numel()
    assert float((histogram - 0.05).abs().max()) < 5 * (0.05 * 0.95 / draws.numel()) ** 0.5
    pairs = ((draws, other), (draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]))
    for left, right in pairs:
        correlation = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1]
        assert abs(float(correlation)) < 5 / left.numel() ** 0.5


def test_stream_seeds_fit_in_63_bits_and_depend_on_order_and_number():
    seeds = {stream_seed(*parts) for parts in [(), (0,), (0, 0), (1, 2), (2, 1), (-1,), (2**63,)]}
    assert len(seeds) == 7 and all(0 <= seed < 2**63 for seed in seeds)


def test_token_draws_count_inside_the_mask():
    mask = torch.tensor([[False, True, False, True], [True, True, False, False]])
    draws = token_uniforms(0, torch.tensor([5, 5]), 0, mask)
    assert draws[0, [1, 3]].tolist() == draws[1, :2].tolist() and draws[0, [0, 2]].tolist() == [1.0, 1.0]


def test_random_strategies_of_one_seed_draw_apart():
    signal = random_signal(mask_of([400], 400))
    kept = w.RandomFraction(0.5, seed=0)(signal)
    even = replace(signal, teacher_logprobs=signal.student_logprobs - LOG2)
    drawn = w.TrustRegion(sample=True, seed=0)(even)
    assert 60 < int((kept * drawn).sum()) < 140  # 100 expected; 200 or 0 if the draws were shared


def test_sampled_trust_region_averages_to_the_weight():
    signal = random_signal(mask_of([20] * 4000, 20)).rows(torch.zeros(4000, dtype=torch.int64))
    signal = replace(signal, row_keys=torch.arange(4000))
    error = (w.TrustRegion(sample=True)(signal).mean(0) - w.TrustRegion()(signal)[0]).abs().max()
    assert float(error) < 5 * 0.5 / 4000**0.5


# ---------------------------------------------------------------------------------------------- bad parameters

NAN = math.nan
U = w.Uniform()
OUT_OF_RANGE = [
    (w.Constant, {"value": -0.1}, "value"),
    (w.Constant, {"value": NAN}, "value"),
    (w.Constant, {"value": INF}, "value"),
    (w.ImportanceWeighting, {"w_max": 0.99}, "w_max"),
    (w.ImportanceWeighting, {"w_max": NAN}, "w_max"),
    (w.ImportanceWeighting, {"w_max": INF}, "w_max"),
    (w.ImportanceWeighting, {"w_max": None}, "w_max"),
    (w.ImportanceWeighting, {"denominator": "some"}, "denominator"),
    (w.PrefixRatioTilt, {"alpha": 0.0}, "alpha"),
    (w.PrefixRatioTilt, {"alpha": 1.1}, "alpha"),
    (w.PrefixRatioTilt, {"alpha": NAN}, "alpha"),
    (w.PrefixRatioTilt, {"low": 6.0}, "low"),
    (w.PrefixRatioTilt, {"low": NAN}, "low"),
    (w.PrefixRatioTilt, {"high": INF}, "high"),
    (w.PrefixRatioTilt, {"high": NAN}, "high"),
    (w.PrefixRatioTilt, {"high": 81.0}, "high"),
    *((cls, {"fraction": f}, "fraction") for cls in (w.FirstFraction, w.LastFraction) for f in (0.0, 1.01, -1, NAN)),
    (w.RandomFraction, {"fraction": 0.0, "seed": 0}, "fraction"),
    (w.RandomFraction, {"fraction": 0.5, "seed": 0.5}, "seed"),
    (w.FirstTokens, {"count": 0}, "count"),
    (w.FirstTokens, {"count": 2.5}, "count"),
    (w.FirstTokens, {"count": True}, "count"),
    (w.LinearDecay, {"gamma": -0.1}, "gamma"),
    (w.LinearDecay, {"gamma": NAN}, "gamma"),
    (w.LinearDecay, {"gamma": INF}, "gamma"),
    (w.Geometric, {"gamma": -0.1}, "gamma"),
    (w.Geometric, {"gamma": 1.01}, "gamma"),
    (w.Geometric, {"gamma": NAN}, "gamma"),
    (w.AnnealedPrefixWeight, {"weight": -1.0}, "weight"),
    (w.AnnealedPrefixWeight, {"weight": INF}, "weight"),
    *(
        (cls, bad, next(iter(bad)))
        for cls in (w.AnnealedPrefixWeight, w.AnnealedPrefixMask)
        for bad in ({"start": 0.0}, {"end": 1.2}, {"start": NAN}, {"schedule": "step"}, {"min_tokens": 0})
    ),
    (w.LateRising, {"w_min": -0.1}, "w_min"),
    (w.LateRising, {"w_min": 1.1}, "w_min"),
    (w.LateRising, {"tau": NAN}, "tau"),
    (w.LateRising, {"scale": 0.0}, "scale"),
    (w.LateRising, {"scale": INF}, "scale"),
    (w.WindowedPrefixRatio, {"window": 0}, "window"),
    (w.WindowedPrefixRatio, {"window": 8.0}, "window"),
    (w.WindowedPrefixRatio, {"floor": 1.1}, "floor"),
    (w.WindowedPrefixRatio, {"floor": NAN}, "floor"),
    (w.TeacherConfidence, {"window": 0}, "window"),
    (w.TeacherConfidence, {"window": 1.5}, "window"),
    (w.TeacherConfidence, {"quantile": 1.1}, "quantile"),
    (w.TeacherConfidence, {"quantile": NAN}, "quantile"),
    (w.TeacherConfidence, {"alpha": -1.0}, "alpha"),
    (w.TeacherConfidence, {"alpha": INF}, "alpha"),
    (w.TeacherConfidence, {"floor": 1.5}, "floor"),
    (w.TrustRegion, {"seed": "a"}, "seed"),
    (w.DASH, {"kappa": -1.0}, "kappa"),
    (w.DASH, {"kappa": INF}, "kappa"),
    (w.FiRe, {"alpha": -1.0}, "alpha"),
    (w.FiRe, {"beta": NAN}, "beta"),
    (w.TIP, {"keep_fraction": 0.0}, "keep_fraction"),
    (w.TIP, {"keep_fraction": 1.1}, "keep_fraction"),
    (w.EntropyGate, {"threshold": -0.1}, "threshold"),
    (w.EntropyGate, {"threshold": INF}, "threshold"),
    (w.EntropyGate, {"beta": -1.0}, "beta"),
    (w.CDD, {"rate": -0.1, "floor": 0.1}, "rate"),
    (w.CDD, {"rate": NAN, "floor": 0.1}, "rate"),
    (w.CDD, {"rate": 0.1, "floor": 1.1}, "floor"),
    *(
        (cls, {**more, "k": k}, "k")
        for cls, more in (
            (w.CDD, {"rate": 0.1, "floor": 0.1}),
            (w.PruneOPD, {}),
            (w.TAOPD, {}),
            (w.SelecTKD, {}),
            (w.IEROPD, {}),
            (w.PGT, {"keep_fraction": 0.5}),
        )
        for k in (0, 33, 2.0, True)
    ),
    (w.PruneOPD, {"threshold": 0.0}, "threshold"),
    (w.PruneOPD, {"drop": -0.1}, "drop"),
    (w.PruneOPD, {"base": INF}, "base"),
    *(
        (cls, {"keep_fraction": f}, "keep_fraction")
        for cls in (w.TAOPD, w.PGT, w.IEROPD, w.DIALOPD, w.REOPOLD)
        for f in (0.0, NAN)
    ),
    (w.IEROPD, {"fuse": "xor"}, "fuse"),
    (w.SelecTKD, {"low": -0.1}, "low"),
    (w.DIALOPD, {"beta": -1.0}, "beta"),
    (w.SparseTokens, {"which": "biggest"}, "which"),
    (w.SparseTokens, {"fraction": 0.0}, "fraction"),
    (w.SparseTokens, {"seed": None}, "seed"),
    (w.FiReRows, {"fraction": 1.1}, "fraction"),
    (w.FiReRows, {"fraction": NAN}, "fraction"),
    (w.REOPOLD, {"strength": 1.0}, "strength"),
    (w.REOPOLD, {"strength": 0}, "strength"),
    (w.REOPOLD, {"switch": 1.5}, "switch"),
    (w.LeastLikely, {"fraction": 0.0}, "fraction"),
    (w.MatchedCurve, {"strategy": 3}, "strategy"),
    (w.MatchedCurve, {"strategy": U, "by": "token"}, "by"),
    (w.MatchedCurve, {"strategy": U, "bins": 0}, "bins"),
    (w.Product, {"strategies": []}, "strategies"),
    (w.Product, {"strategies": [U, 3]}, "strategies[1]"),
    (w.SequenceMeanOne, {"strategy": None}, "strategy"),
    (w.BatchMeanOne, {"strategy": "Uniform"}, "strategy"),
    (w.Reversed, {"strategy": None}, "strategy"),
    (w.Shuffled, {"strategy": U, "seed": 1.5}, "seed"),
    (w.PerTurn, {"strategy": 3}, "strategy"),
    (w.TurnBalanced, {"strategy": 3}, "strategy"),
    (w.AfterObservation, {"count": 0}, "count"),
    (w.AfterObservation, {"count": 1.5}, "count"),
    (w.AfterObservation, {"weight": -1.0}, "weight"),
    (w.AfterObservation, {"weight": INF}, "weight"),
    (w.AfterObservation, {"weight": "2"}, "weight"),
]


@pytest.mark.parametrize(("cls", "arguments", "field"), OUT_OF_RANGE)
def test_parameters_out_of_range_name_class_field_value_and_range(cls, arguments, field):
    with pytest.raises(InputError) as error:
        cls(**arguments)
    value = arguments[field.partition("[")[0]]
    shown = repr(value[1]) if field.endswith("]") else repr(value)
    assert f"`{cls.__name__}.{field}` must be " in str(error.value)
    assert str(error.value).endswith(f"got {shown}")


def test_every_strategy_with_parameters_appears_in_the_table_of_bad_ones():
    assert set(strategy_classes()) - {cls for cls, _, _ in OUT_OF_RANGE} == {w.Uniform}
