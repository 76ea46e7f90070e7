"""Advantage transforms against hand arithmetic and slow loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lit_opd import advantage as adv
from lit_opd.errors import InputError
from lit_opd.objective import PolicyLoss
from lit_opd.step.recipe import Recipe
from lit_opd.types import TopK
from lit_opd.weighting.combinators import Product
from lit_opd.weighting.entropy_gate import EntropyGate
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.least_likely import LeastLikely
from lit_opd.weighting.sparse import SparseTokens
from lit_opd.weighting.tilt import PrefixRatioTilt
from lit_opd.weighting.trust_region import TrustRegion
from lit_opd.weighting.uniform import Uniform
from tests.helpers.signals import (
    FLOAT_FIELDS,
    LIST_FIELDS,
    LISTED,
    along,
    holey_mask,
    mapped,
    padded,
    random_signal,
    small_signal,
)

LOG2 = math.log(2)
TRANSFORMS = [
    adv.Identity(),
    adv.Clip(),
    adv.Clip(0.5),
    adv.SoftLog(),
    adv.Sign(),
    adv.Power(0.5),
    adv.RewardExtrapolation(1.5),
    adv.DiscountedReturn(0.0),
    adv.DiscountedReturn(0.9),
    adv.DiscountedReturn(1.0),
    adv.ValueBaseline(),
    adv.RewardFloor(),
    adv.RewardFloor(0.9),
    adv.InfluenceShrinkage(),
    adv.NullAdvantage(),
    adv.NullAdvantage(0.3),
]
every_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: f"{type(t).__name__}{vars(t) or ''}")


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def slow_row(transform: adv.AdvantageTransform, row: dict[str, list[float]]) -> list[float]:
    """A' of one row's valid tokens; ``row`` holds the lists a (advantage), q, s, reference, kl."""
    a, n = row["a"], len(row["a"])
    formulas = {
        adv.Identity: lambda t: a[t],
        adv.Clip: lambda t: min(max(a[t], -transform.c), transform.c),
        adv.SoftLog: lambda t: sign(a[t]) * math.log(1 + abs(a[t])),
        adv.Sign: lambda t: sign(a[t]),
        adv.Power: lambda t: math.exp(transform.alpha * row["q"][t]) - math.exp(transform.alpha * row["s"][t]),
        adv.RewardExtrapolation: lambda t: a[t] + (transform.strength - 1) * (row["q"][t] - row["reference"][t]),
        adv.DiscountedReturn: lambda t: sum(transform.discount ** (k - t) * a[k] for k in range(t, n)),
        adv.ValueBaseline: lambda t: a[t] + row["kl"][t],
        adv.RewardFloor: lambda t: max(a[t], math.log(transform.strength) / (1 - transform.strength)),
        adv.NullAdvantage: lambda t: transform.value,
        adv.InfluenceShrinkage: lambda t: slow_influence(row, t),
    }
    return [formulas[type(transform)](t) for t in range(n)]


def slow_influence(row: dict[str, list[float]], t: int) -> float:
    """A, times |q - p| / (q + p) where a step along it would lower the entropy."""
    p, q, h = math.exp(row["s"][t]), math.exp(row["q"][t]), row["entropy"][t]
    direction = sum(math.exp(x) ** 2 * (x + h) for x in row["list"][t]) - p * (math.log(p) + h)
    return row["a"][t] * (1.0 if row["a"][t] * direction >= 0 else abs(q - p) / (q + p))


@every_transform
def test_transforms_equal_a_slow_loop_written_from_the_formula(transform):
    signal = random_signal(holey_mask(8, 23))
    given = torch.linspace(-9, 9, signal.mask.numel(), dtype=torch.float64).reshape(signal.mask.shape)
    got = transform(given, signal)
    names = {"q": "teacher_logprobs", "s": "student_logprobs", "reference": "reference_logprobs", "kl": "token_kl"}
    names["entropy"] = "student_entropy"
    for r, valid in enumerate(signal.mask):
        row = {short: getattr(signal, name)[r][valid].tolist() for short, name in names.items()}
        row["list"] = signal.student_topk.logprobs[r][valid].tolist()
        want = slow_row(transform, row | {"a": given[r][valid].tolist()})
        torch.testing.assert_close(got[r][valid], torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (got[~signal.mask] == 0).all()


@pytest.mark.parametrize(
    ("transform", "want"),
    [
        (adv.Identity(), [LOG2, -2 * LOG2, 0.0]),
        (adv.Clip(1.0), [LOG2, -1.0, 0.0]),
        (adv.SoftLog(), [math.log(1 + LOG2), -math.log(1 + 2 * LOG2), 0.0]),
        (adv.Sign(), [1.0, -1.0, 0.0]),
        (adv.Power(1.0), [0.25, -0.75 / 2, 0.0]),  # 1/2 - 1/4, 1/8 - 1/2, 1/2 - 1/2
        (adv.RewardExtrapolation(1.5), [1.5 * LOG2, -2.5 * LOG2, 0.0]),  # q - ref = (1, -1, 0) log 2
        (adv.RewardExtrapolation(0.0), [0.0, -LOG2, 0.0]),  # ref - s
        (adv.DiscountedReturn(1.0), [-LOG2, -2 * LOG2, 0.0]),
        (adv.DiscountedReturn(0.5), [0.0, -2 * LOG2, 0.0]),
        (adv.ValueBaseline(), [LOG2 + 0.1, -2 * LOG2 + 0.2, 0.3]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, adv.AdvantageTransform) else "",
)
def test_hand_computed_row(transform, want):
    # s = log (1/4, 1/2, 1/2), q = log (1/2, 1/8, 1/2), reference = log (1/4, 1/4, 1/2)
    signal = small_signal([-2 * LOG2, -LOG2, -LOG2], [-LOG2, -3 * LOG2, -LOG2])
    reference = torch.tensor([[-2 * LOG2, -2 * LOG2, -LOG2]], dtype=torch.float64)
    token_kl = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)
    signal = replace(signal, reference_logprobs=reference, token_kl=token_kl)
    got = transform(signal.log_ratio, signal)
    torch.testing.assert_close(got, torch.tensor([want], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@every_transform
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32, torch.float64])
def test_transforms_keep_precision_and_carry_no_gradient(transform, given):
    signal = random_signal(holey_mask(6, 11), dtype=given)
    attached = signal.log_ratio.clone().requires_grad_()
    got = transform(attached, signal)
    assert got.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    assert not got.requires_grad and torch.isfinite(got).all()


@every_transform
def test_autocast_changes_no_advantage(transform):
    signal = random_signal(holey_mask(6, 11), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = transform(signal.log_ratio, signal)
    assert torch.equal(mixed, transform(signal.log_ratio, signal))


@every_transform
def test_transforms_ignore_padding_content_and_extra_padding(transform):
    signal = random_signal(holey_mask(8, 23))
    given = torch.where(signal.mask, signal.log_ratio, math.nan)

    def dirtied(name, value):
        fill = math.nan if value.is_floating_point() else value.flip(0)
        return value if name == "mask" else torch.where(along(signal.mask, value), value, fill)

    want = transform(signal.log_ratio, signal)
    assert torch.equal(transform(given, mapped(signal, dirtied)), want)
    wide = padded(signal, 2, 5, math.nan)
    got = transform(torch.nn.functional.pad(given, (2, 5), value=math.nan), wide)
    torch.testing.assert_close(got[:, 2:-5], want, rtol=1e-12, atol=1e-12)
    assert not got[:, :2].any() and not got[:, -5:].any()


@every_transform
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty_batches_pass(transform, shape):
    signal = random_signal(torch.zeros(shape, dtype=torch.bool))
    assert transform(signal.log_ratio, signal).shape == shape


@every_transform
def test_a_missing_required_field_is_an_error_naming_class_and_field(transform):
    signal = random_signal(holey_mask(6, 11))
    for name in transform.requires:
        with pytest.raises(InputError, match=rf"`{type(transform).__name__}` requires `TokenSignal\.{name}`"):
            transform(signal.log_ratio, replace(signal, **{name: None}))


@every_transform
def test_transforms_read_no_field_they_do_not_require(transform):
    signal = random_signal(holey_mask(6, 11))
    optional = {*FLOAT_FIELDS, *LIST_FIELDS, LISTED, "token_ids"} - {"student_logprobs", "teacher_logprobs"}
    optional -= transform.requires
    bare = replace(signal, **dict.fromkeys(optional))
    assert torch.equal(transform(signal.log_ratio, bare), transform(signal.log_ratio, signal))


def test_transforms_apply_in_order_and_leave_the_strategies_signal_alone():
    signal = replace(random_signal(holey_mask(8, 23)), advantage=None)
    clipped_first = adv.apply_transforms([adv.Clip(1.0), adv.DiscountedReturn(1.0)], signal)
    clipped_last = adv.apply_transforms([adv.DiscountedReturn(1.0), adv.Clip(1.0)], signal)
    assert float(clipped_last.advantage.abs().max()) == 1.0 < float(clipped_first.advantage.abs().max())
    assert torch.equal(clipped_first.log_ratio, signal.log_ratio)
    assert torch.equal(ImportanceWeighting()(clipped_first), ImportanceWeighting()(signal))


def test_no_transform_leaves_the_log_ratio_and_twice_is_once():
    signal = random_signal(holey_mask(8, 23))
    assert torch.equal(adv.apply_transforms([], signal).advantage, signal.log_ratio)
    once = adv.apply_transforms([adv.SoftLog()], signal)
    assert torch.equal(adv.apply_transforms([adv.SoftLog()], once).advantage, once.advantage)


@pytest.mark.parametrize(
    "transform",
    [adv.Clip(1e9), adv.RewardExtrapolation(1.0), adv.DiscountedReturn(0.0)],
    ids=lambda t: type(t).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neutral_parameters_are_the_identity_bitwise(transform, dtype):
    signal = random_signal(holey_mask(8, 23), dtype=dtype)
    assert torch.equal(transform(signal.log_ratio, signal), signal.log_ratio)


def test_value_baseline_centres_the_advantage_on_the_students_own_distribution():
    """E over y ~ student of A(y) + KL is 0, enumerated over three symbols."""
    student = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    teacher = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64)
    signal = small_signal(student.log().tolist(), teacher.log().tolist())
    kl = (student * (student / teacher).log()).sum()
    signal = replace(signal, token_kl=kl.expand(1, 3))
    centred = adv.ValueBaseline()(signal.log_ratio, signal)
    assert abs(float((student * centred).sum())) < 1e-15


def test_a_value_baseline_warns_with_strategies_that_read_more_than_the_prefix():
    baseline = [adv.Clip(), adv.ValueBaseline()]
    for strategy in (TrustRegion(), ImportanceWeighting(), Product([Uniform(), TrustRegion()])):
        message = adv.baseline_warning(baseline, strategy)
        assert type(strategy).__name__ in message and strategy.depends_on in message and "ValueBaseline" in message
        assert adv.baseline_warning([adv.Clip()], strategy) is None
    for strategy in (Uniform(), PrefixRatioTilt(), EntropyGate()):
        assert adv.baseline_warning(baseline, strategy) is None


def test_transforms_before_one_that_starts_anew_are_named():
    assert adv.order_warning([]) is None and adv.order_warning([adv.Power(0.5), adv.Clip()]) is None
    message = adv.order_warning([adv.Clip(), adv.Sign(), adv.Power(0.5), adv.SoftLog()])
    assert "`Clip`, `Sign` have no effect" in message and "`Power`" in message and "SoftLog" not in message


# -- controls and shrinkage --------------------------------------------------------------------------------------------


def test_the_entropy_null_equals_a_slow_loop_over_the_batch():
    signal = random_signal(holey_mask(8, 23))
    for fraction in (1e-6, 0.2, 0.5, 1.0):
        got = adv.EntropyNull(low=-2.0, high=-0.5, fraction=fraction)(signal.log_ratio, signal)
        tokens = [(float(signal.student_logprobs[r, t]), r, t) for r, t in signal.mask.nonzero().tolist()]
        chosen = sorted(tokens)[: max(1, math.floor(fraction * len(tokens)))]
        entropies = [float(signal.student_entropy[r, t]) for _, r, t in chosen]
        low, high = min(entropies), max(entropies)
        want = torch.zeros_like(got)
        for (_, r, t), entropy in zip(chosen, entropies, strict=True):
            share = (entropy - low) / (high - low) if high > low else 1.0
            want[r, t] = -0.5 - 1.5 * share
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert torch.equal(got != 0, LeastLikely(fraction).kept(signal))


def test_the_controls_without_a_teacher_ignore_the_teacher():
    signal = random_signal(holey_mask(8, 23))
    other = replace(signal, teacher_logprobs=signal.teacher_logprobs - 1.0, teacher_topk=None, teacher_entropy=None)
    for control in (adv.NullAdvantage(), adv.EntropyNull()):
        assert torch.equal(control(signal.log_ratio, signal), control(other.log_ratio, other))
        assert control.replaces and adv.order_warning([adv.Clip(), control]) is not None
    for kept in (LeastLikely(), SparseTokens("random")):
        assert torch.equal(kept(signal), kept(other))


def test_the_shrunk_advantage_is_the_one_that_lowers_the_entropy():
    """The sign is that of the entropy's derivative along A (onehot - p) in the logits, by finite differences over six symbols."""
    logits = torch.tensor([1.0, 0.2, -0.4, 0.5, -2.0, 0.0], dtype=torch.float64)
    p, logp = logits.softmax(-1), logits.log_softmax(-1)
    entropy = -(p * logp).sum()
    for a in (0.7, -0.7):
        signal = small_signal(logp.tolist(), (logp + a).tolist())
        lists = TopK(torch.arange(6).expand(1, 6, 6), logp.expand(1, 6, 6))
        signal = replace(signal, student_topk=lists, student_entropy=entropy.expand(1, 6))
        got = adv.InfluenceShrinkage()(signal.log_ratio, signal)[0]
        for y in range(6):
            step = 1e-6 * a * (torch.eye(6, dtype=torch.float64)[y] - p)
            there = (logits + step).softmax(-1)
            contracts = -(there * there.log()).sum() < entropy
            assert math.isclose(float(got[y]), a * (math.tanh(abs(a) / 2) if contracts else 1.0), rel_tol=1e-12)
        assert len(got.round(decimals=9).unique()) == 2


def test_transforms_of_the_whole_batch_ask_for_one_scoring_pass():
    parts = {"weighting": Uniform(), "objective": PolicyLoss(), "max_new_tokens": 4}
    assert not Recipe(**parts, advantage=(adv.NullAdvantage(), adv.RewardFloor())).needs_scoring_pass
    assert Recipe(**parts, advantage=(adv.RewardFloor(), adv.EntropyNull())).needs_scoring_pass


class Shifted(adv.AdvantageTransform):
    def transform(self, advantage, signal):
        return advantage + advantage.sum(-1, keepdim=True) + 1.0


def test_a_subclass_sees_and_leaves_zeros_where_masked():
    signal = random_signal(holey_mask(8, 23))
    got = Shifted()(torch.where(signal.mask, 2.0, math.nan).double(), signal)
    want = torch.where(signal.mask, 3.0 + 2.0 * signal.mask.sum(-1, keepdim=True), 0.0).double()
    assert torch.equal(got, want)


class WrongShape(adv.AdvantageTransform):
    def transform(self, advantage, signal):
        return advantage[0]


class NotFinite(adv.AdvantageTransform):
    def transform(self, advantage, signal):
        return advantage / 0.0


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (WrongShape(), r"`WrongShape\.transform` must return a tensor \[B, T\] = \(6, 11\), got \(11,\)"),
        (NotFinite(), r"`NotFinite\.transform` must be finite on valid tokens"),
    ],
)
def test_a_subclass_that_breaks_the_contract_is_named(transform, message):
    signal = random_signal(holey_mask(6, 11))
    with pytest.raises(InputError, match=message):
        transform(signal.log_ratio, signal)


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        *((adv.Clip, {"c": value}) for value in (0.0, -1.0, math.nan, math.inf)),
        *((adv.Power, {"alpha": value}) for value in (0.0, -1.0, math.nan, math.inf)),
        *((adv.RewardExtrapolation, {"strength": value}) for value in (-0.1, math.nan, math.inf)),
        *((adv.DiscountedReturn, {"discount": value}) for value in (-0.1, 1.1, math.nan)),
        *((adv.RewardFloor, {"strength": value}) for value in (0.0, 1.0, math.nan)),
        *((adv.NullAdvantage, {"value": value}) for value in (0.0, math.nan, math.inf)),
        *((adv.EntropyNull, {"high": value}) for value in (0.0, math.nan)),
        *((adv.EntropyNull, {"low": value}) for value in (-0.5, -math.inf)),
        *((adv.EntropyNull, {"fraction": value}) for value in (0.0, 1.1, math.nan)),
    ],
)
def test_parameters_out_of_range_name_class_field_value_and_range(cls, arguments):
    (field, value), *_ = arguments.items()
    with pytest.raises(InputError) as error:
        cls(**arguments)
    assert f"`{cls.__name__}.{field}` must be " in str(error.value) and str(error.value).endswith(f"got {value!r}")
