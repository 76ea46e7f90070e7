"""What every weighting strategy must keep, run over the ``examples()`` of each: a new class is tested by existing."""

from __future__ import annotations

import functools
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from lit_opd import advantage
from lit_opd.advantage import AdvantageTransform
from lit_opd.errors import InputError
from lit_opd.types import TokenSignal
from lit_opd.weighting.base import WeightingStrategy
from lit_opd.weighting.cdd import CDD
from lit_opd.weighting.combinators import BatchMeanOne, Product, Reversed, SequenceMeanOne, Shuffled
from lit_opd.weighting.fire_rows import FiReRows
from lit_opd.weighting.fractions import FirstFraction
from lit_opd.weighting.ier_opd import IEROPD
from lit_opd.weighting.importance import ImportanceWeighting
from lit_opd.weighting.least_likely import LeastLikely
from lit_opd.weighting.matched_curve import MatchedCurve
from lit_opd.weighting.pgt import PGT
from lit_opd.weighting.reopold import REOPOLD
from lit_opd.weighting.ta_opd import TAOPD
from lit_opd.weighting.tip import TIP
from lit_opd.weighting.trust_region import TrustRegion
from lit_opd.weighting.uniform import Uniform
from tests.helpers.signals import (
    FLOAT_FIELDS,
    LIST_FIELDS,
    LISTED,
    STATE_FIELDS,
    TOKEN_FIELDS,
    all_examples,
    along,
    changed_columns,
    holey_mask,
    mapped,
    mask_of,
    padded,
    random_signal,
    strategy_classes,
)

REPO = Path(__file__).resolve().parents[2]
PROGRESS = 0.4
SAME = 1e-12  # float64: only the order of a sum may differ
LONG = 16384
LONG_SECONDS = 2.0
FLOAT32_ERROR = 2e-5  # of abs(got - want) / max(1, abs(want)), the golden tolerance

EXAMPLES = all_examples()
every_strategy = pytest.mark.parametrize("strategy", [e for _, e in EXAMPLES], ids=[name for name, _ in EXAMPLES])


def assert_close(got: Tensor, want: Tensor, tolerance: float = SAME) -> None:
    error = (got.double() - want.double()).abs() / want.double().abs().clamp(min=1.0)
    assert got.shape == want.shape
    assert not error.numel() or float(error.max()) <= tolerance


def outputs(strategy: WeightingStrategy, signal: TokenSignal) -> tuple[Tensor, Tensor]:
    return strategy(signal, PROGRESS), strategy.kept(signal, PROGRESS)


def only_required(strategy: WeightingStrategy, signal: TokenSignal) -> TokenSignal:
    optional = {name for name in FLOAT_FIELDS if name not in ("student_logprobs", "teacher_logprobs")}
    optional |= {"token_ids", LISTED, *LIST_FIELDS}
    return replace(signal, **dict.fromkeys(optional - strategy.requires))


@every_strategy
def test_weights_are_finite_nonnegative_and_exactly_zero_where_nothing_counts(strategy):
    signal = random_signal(holey_mask(8, 23))
    for progress in (0.0, 0.37, 1.0):
        weights, kept = strategy(signal, progress), strategy.kept(signal, progress)
        assert weights.shape == kept.shape == signal.mask.shape
        assert torch.isfinite(weights).all() and (weights >= 0).all(), progress
        assert (weights[~signal.mask] == 0).all() and (weights[~kept] == 0).all(), progress
        assert not (kept & ~signal.mask).any()


@every_strategy
def test_drops_tokens_says_whether_keep_can_drop(strategy):
    signal = random_signal(holey_mask(8, 23))
    if not strategy.drops_tokens:
        assert strategy.keep(signal, PROGRESS) is None
        assert torch.equal(strategy.kept(signal, PROGRESS), signal.mask)


PRECISIONS = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}


@every_strategy
def test_weights_have_the_precision_of_the_signal_and_at_least_float32(strategy):
    mask = holey_mask(6, 11)
    found = {given: strategy(random_signal(mask, dtype=given), PROGRESS).dtype for given in PRECISIONS}
    assert found == PRECISIONS


@every_strategy
def test_autocast_changes_no_weight(strategy):
    signal = random_signal(holey_mask(6, 11), dtype=torch.float32)
    plain = outputs(strategy, signal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, outputs(strategy, signal), plain))


@every_strategy
def test_weights_carry_no_gradient(strategy):
    signal = random_signal(holey_mask(6, 11))
    leaf = signal.student_logprobs.clone().requires_grad_()
    attached = replace(signal, student_logprobs=leaf)
    object.__setattr__(attached, "student_logprobs", leaf)  # the record detaches; the strategy must not rely on it
    assert not strategy(attached, PROGRESS).requires_grad


@every_strategy
def test_weights_ignore_padding_content(strategy):
    signal = random_signal(holey_mask(8, 23))
    want_weights, want_kept = outputs(strategy, signal)
    for content in (float("nan"), float("inf"), -1e30):

        def dirtied(name: str, value: Tensor, content: float = content) -> Tensor:
            fill = content if value.is_floating_point() else value.flip(0)
            return value if name == "mask" else torch.where(along(signal.mask, value), value, fill)

        weights, kept = outputs(strategy, mapped(signal, dirtied))
        assert torch.equal(weights, want_weights) and torch.equal(kept, want_kept), content


@every_strategy
def test_weights_ignore_extra_padding(strategy):
    signal = random_signal(holey_mask(8, 23))
    weights, kept = outputs(strategy, padded(signal, 3, 40, float("nan")))
    want_weights, want_kept = outputs(strategy, signal)
    inner = slice(3, 3 + signal.mask.shape[1])
    assert_close(weights[:, inner], want_weights)
    assert torch.equal(kept[:, inner], want_kept)
    assert weights[:, :3].abs().sum() == 0 and weights[:, inner.stop :].abs().sum() == 0


@every_strategy
def test_holes_in_the_mask_count_for_nothing(strategy):
    signal = random_signal(holey_mask(8, 23))
    order = signal.mask.int().argsort(dim=-1, descending=True, stable=True)
    squeezed = mapped(signal, lambda _, value: value.gather(1, along(order, value).expand(value.shape)))
    weights, kept = outputs(strategy, signal)
    squeezed_weights, squeezed_kept = outputs(strategy, squeezed)
    assert_close(weights.gather(1, order), squeezed_weights)
    assert torch.equal(kept.gather(1, order), squeezed_kept)


@every_strategy
def test_rows_are_independent_unless_the_scope_is_the_batch(strategy):
    signal = random_signal(holey_mask(8, 23))
    weights, kept = outputs(strategy, signal)
    order = torch.tensor([5, 0, 7, 2, 1, 6, 4, 3])
    shuffled_weights, shuffled_kept = outputs(strategy, signal.rows(order))
    assert_close(shuffled_weights, weights[order])
    assert torch.equal(shuffled_kept, kept[order])
    if strategy.scope == "sequence":
        for row in range(len(signal)):
            alone_weights, alone_kept = outputs(strategy, signal.rows(torch.tensor([row])))
            assert_close(alone_weights[0], weights[row])
            assert torch.equal(alone_kept[0], kept[row])


@every_strategy
def test_weights_read_no_more_than_depends_on_says(strategy):
    """Token fields from t on ("prefix") or after t ("token") are replaced; state fields and the mask after t."""
    signal = random_signal(holey_mask(8, 17))
    if strategy.depends_on == "sequence":
        return
    weights, kept = outputs(strategy, signal)
    columns = torch.arange(signal.mask.shape[1])
    for t in range(signal.mask.shape[1]):
        tokens = columns >= t if strategy.depends_on == "prefix" else columns > t
        other = changed_columns(signal, TOKEN_FIELDS, tokens, seed=t + 1)
        other = changed_columns(other, STATE_FIELDS, columns > t, seed=t + 50)
        for later_mask in (signal.mask, signal.mask & (columns <= t), signal.mask | (columns > t)):
            changed = replace(other, mask=later_mask)
            other_weights, other_kept = outputs(strategy, changed)
            assert torch.equal(other_weights[:, : t + 1], weights[:, : t + 1])
            assert torch.equal(other_kept[:, : t + 1], kept[:, : t + 1])


@every_strategy
def test_weights_never_read_the_transformed_advantage_or_fields_they_do_not_require(strategy):
    signal = replace(random_signal(holey_mask(8, 23)), token_kl=None)  # TIP may use token KL without requiring it
    weights, kept = outputs(strategy, signal)
    bare_weights, bare_kept = outputs(strategy, only_required(strategy, signal))
    assert torch.equal(weights, bare_weights) and torch.equal(kept, bare_kept)


@every_strategy
def test_a_missing_required_field_is_an_error_naming_class_and_field(strategy):
    signal = random_signal(holey_mask(6, 11))
    for name in sorted(strategy.requires):
        for call in (strategy, strategy.kept):
            with pytest.raises(InputError, match=rf"`{type(strategy).__name__}` requires `TokenSignal\.{name}`"):
                call(replace(signal, **{name: None}), PROGRESS)


@every_strategy
def test_batches_without_rows_or_columns_give_empty_weights(strategy):
    for shape in ((0, 5), (3, 0), (0, 0)):
        weights, kept = outputs(strategy, random_signal(torch.zeros(shape, dtype=torch.bool)))
        assert weights.shape == kept.shape == shape


@every_strategy
def test_empty_rows_get_zeros_and_one_token_rows_one_finite_weight(strategy):
    signal = random_signal(mask_of([0, 1, 0, 1], 6))
    weights, kept = outputs(strategy, signal)
    assert (weights[[0, 2]] == 0).all() and not kept[[0, 2]].any()
    assert torch.isfinite(weights).all() and (weights[[1, 3], 1:] == 0).all()
    all_masked = random_signal(torch.zeros(2, 6, dtype=torch.bool))
    assert (strategy(all_masked, PROGRESS) == 0).all()


@every_strategy
def test_equal_and_zero_disagreement_give_finite_weights(strategy):
    signal = random_signal(holey_mask(8, 23))
    flat = torch.full_like(signal.student_logprobs, -1.0)
    for gap in (0.0, 0.7, -0.7):
        states = {name: torch.full_like(flat, abs(gap)) for name in STATE_FIELDS}
        level = replace(signal, student_logprobs=flat, teacher_logprobs=flat + gap, **states)
        weights, kept = outputs(strategy, level)
        assert torch.isfinite(weights).all() and (weights >= 0).all() and (weights[~kept] == 0).all(), gap


@functools.cache
def long_signals() -> tuple[TokenSignal, TokenSignal]:
    """The same content in both precisions; strategies change neither."""
    mask = mask_of([LONG, LONG - 1000], LONG)
    mask[1, ::7] = False
    single = random_signal(mask, dtype=torch.float32)
    return single, mapped(single, lambda _, value: value.double() if value.is_floating_point() else value)


@every_strategy
def test_rows_of_16k_tokens_agree_with_float64_and_take_under_two_seconds(strategy):
    single, double = long_signals()
    start = time.perf_counter()
    weights = strategy(single, PROGRESS)
    assert time.perf_counter() - start < LONG_SECONDS
    assert_close(weights, strategy(double, PROGRESS), FLOAT32_ERROR)


@every_strategy
def test_random_strategies_repeat_and_draw_anew_each_step(strategy):
    signal = random_signal(holey_mask(8, 23))
    assert torch.equal(strategy(signal, PROGRESS), strategy(signal, PROGRESS))
    draws = hasattr(strategy, "seed") and getattr(strategy, "sample", True)
    if draws and len(strategy(signal, PROGRESS)[2].unique()) > 1:
        assert not torch.equal(strategy(signal, PROGRESS), strategy(replace(signal, step=4), PROGRESS))


def test_random_strategies_follow_the_row_key_and_not_the_row():
    one = random_signal(torch.ones(1, 23, dtype=torch.bool))
    twins = replace(one.rows(torch.tensor([0, 0, 0])), row_keys=torch.tensor([7, 8, 7]))
    for strategy in (Shuffled(ImportanceWeighting(), seed=1), TrustRegion(sample=True)):
        weights = strategy(twins)
        assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])


@every_strategy
def test_progress_outside_the_unit_interval_is_an_error(strategy):
    signal = random_signal(holey_mask(6, 11))
    for progress in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="progress"):
            strategy(signal, progress)


def test_combinators_combine_the_properties_of_their_children():
    inner = [TIP(), TrustRegion()]
    product = Product(inner)
    assert product.requires == {"student_entropy"} and product.scope == "batch" and product.drops_tokens
    assert product.depends_on == "sequence" and Product([Uniform(), TrustRegion()]).depends_on == "token"
    assert Product([Uniform(), Uniform()]).depends_on == "prefix" and not Product([Uniform()]).drops_tokens
    assert BatchMeanOne(Uniform()).scope == "batch" and SequenceMeanOne(Uniform()).scope == "sequence"
    assert Reversed(TIP()).scope == "batch" and Reversed(TIP()).requires == {"student_entropy"}
    assert Shuffled(FirstFraction(0.5)).drops_tokens and not Shuffled(Uniform()).drops_tokens
    assert len(list(product.children())) == 1 and set(inner) <= set(product.modules())


class WrongShape(WeightingStrategy):
    def weights(self, signal, progress):
        return torch.ones(3)


class Negative(WeightingStrategy):
    def weights(self, signal, progress):
        return -torch.ones_like(signal.log_ratio)


class Infinite(WeightingStrategy):
    def weights(self, signal, progress):
        return torch.full_like(signal.log_ratio, float("inf"))


class WrongKeep(Uniform):
    def keep(self, signal, progress):
        return signal.mask[0]


class KeepEverything(Uniform):
    def keep(self, signal, progress):
        return torch.ones_like(signal.mask)


def test_a_subclass_cannot_keep_or_weigh_masked_tokens():
    signal = random_signal(holey_mask(6, 11))
    weights, kept = outputs(KeepEverything(), signal)
    assert torch.equal(kept, signal.mask) and torch.equal(weights, signal.mask.double())


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (WrongShape(), r"`WrongShape\.weights` must return a tensor \[B, T\] = \(6, 11\), got \(3,\)"),
        (Negative(), r"`Negative\.weights` must be finite and >= 0.* got -1"),
        (Infinite(), r"`Infinite\.weights` must be finite and >= 0.* got inf"),
        (WrongKeep(), r"`WrongKeep\.keep` must return a tensor \[B, T\] = \(6, 11\), got \(11,\)"),
    ],
)
def test_a_subclass_that_breaks_the_contract_is_named(strategy, message):
    with pytest.raises(InputError, match=message):
        strategy(random_signal(holey_mask(6, 11)))


def test_every_strategy_has_an_overlay_that_starts_with_its_command():
    named = set()
    for path in sorted((REPO / "configs" / "weighting").glob("*.yaml")):
        first, text = path.read_text().split("\n", 1)
        overlay = path.relative_to(REPO)
        assert first == f"# python train.py fit --config configs/quickstart.yaml --config {overlay}"
        named.add(yaml.safe_load(text)["model"]["weighting"]["class_path"])
    assert named == {f"lit_opd.weighting.{cls.__name__}" for cls in strategy_classes()}


def test_every_overlay_builds_its_strategy_with_the_command_line_parser():
    jsonargparse = pytest.importorskip("jsonargparse")
    for path in sorted((REPO / "configs" / "weighting").glob("*.yaml")):
        parser = jsonargparse.ArgumentParser()
        parser.add_argument("--weighting", type=WeightingStrategy)
        section = yaml.safe_load(path.read_text())["model"]["weighting"]
        parsed = parser.parse_object({"weighting": section})
        built = getattr(parser, "instantiate", parser.instantiate_classes)(parsed).weighting  # renamed in 4.49
        assert type(built).__name__ == section["class_path"].rpartition(".")[2]
        strategy_signal = random_signal(holey_mask(6, 11))
        assert built(strategy_signal, PROGRESS).shape == strategy_signal.mask.shape


def _batch_strategies() -> list[WeightingStrategy]:
    inner = Product([ImportanceWeighting(), FirstFraction(0.5)])
    lists = [CDD(0.3, 0.1), TAOPD(0.3), PGT(0.2), IEROPD(0.2, fuse="or"), IEROPD(0.01, fuse="and")]
    curves = [
        MatchedCurve(inner),
        MatchedCurve(inner, by="absolute"),
        FiReRows(0.4),
        LeastLikely(),
        REOPOLD(switch=0.0),
    ]
    return [BatchMeanOne(inner), TIP(), TIP(0.1), TIP(1.0), *lists, *curves]


def _batch_signals() -> list[TokenSignal]:
    signal = random_signal(holey_mask(8, 23))
    tied = torch.full_like(signal.student_logprobs, -1.0)
    same = dict.fromkeys(LIST_FIELDS, signal.teacher_topk)
    level = replace(
        signal, student_logprobs=tied, teacher_logprobs=tied, student_entropy=tied * 0, token_kl=None, **same
    )
    return [signal, level, random_signal(torch.zeros(8, 23, dtype=torch.bool))]


def _weigh_share(rank: int, rendezvous: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    rows = torch.arange(8)[3:] if rank else torch.arange(8)[:3]
    results = [outputs(strategy, signal.rows(rows)) for signal in _batch_signals() for strategy in _batch_strategies()]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_batch_scope_weights_of_one_batch(tmp_path):
    given = (str(tmp_path / "rendezvous"), str(tmp_path))  # forked: importing the stack twice is what takes time
    torch.multiprocessing.start_processes(_weigh_share, args=given, nprocs=2, start_method="fork")
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = [outputs(strategy, signal) for signal in _batch_signals() for strategy in _batch_strategies()]
    for (weights, kept), first, second in zip(whole, *shares, strict=True):
        assert_close(torch.cat([first[0], second[0]]), weights)
        assert torch.equal(torch.cat([first[1], second[1]]), kept)


def test_docstrings_name_source_and_range():
    for cls in strategy_classes():
        assert re.search(r"Source: ", cls.__doc__ or "") and re.search(r"mean\s+weight", cls.__doc__ or ""), (
            cls.__name__
        )


def test_what_comes_from_a_paper_says_when_it_fails():
    """Its source is a number of arXiv; docs/strategies.md promises the sentence. Controls of ours need none."""
    transforms = [
        cls for cls in vars(advantage).values() if isinstance(cls, type) and issubclass(cls, AdvantageTransform)
    ]
    read = [cls for cls in (*strategy_classes(), *transforms) if re.search(r"\b2\d{3}\.\d{5}\b", cls.__doc__ or "")]
    assert len(read) > 30
    silent = {cls.__name__ for cls in read if not re.search(r"^ +Fails ", cls.__doc__, flags=re.M)}
    assert silent == {"LinearDecay", "RandomFraction"}  # controls, which name the paper that lacks them
