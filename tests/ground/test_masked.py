"""Masked sums against slow loops, with holes, empty rows and rubbish off the mask."""

from __future__ import annotations

import math

import pytest
import torch

from lit_opd.masked import exclusive_cumsum, masked_mean, masked_sum, positions, return_to_go, segment_sums


@pytest.fixture(scope="module")
def ragged():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 9, generator=generator) < 0.6
    mask[2] = False
    values[~mask] = float("nan")
    return values, mask


def rows(values, mask):
    return [[float(v) for v, m in zip(row, valid, strict=True) if m] for row, valid in zip(values, mask, strict=True)]


def spread(per_row, mask):
    out = torch.zeros(mask.shape, dtype=torch.float64)
    for row, found in enumerate(per_row):
        out[row, mask[row]] = torch.tensor(found, dtype=torch.float64)
    return out


def test_sums_and_means(ragged):
    values, mask = ragged
    wanted = rows(values, mask)
    torch.testing.assert_close(masked_sum(values, mask), torch.tensor([sum(r) for r in wanted], dtype=torch.float64))
    means = [sum(r) / len(r) if r else 0.0 for r in wanted]
    torch.testing.assert_close(masked_mean(values, mask), torch.tensor(means, dtype=torch.float64))


def test_exclusive_sums_count_valid_tokens_before(ragged):
    values, mask = ragged
    wanted = [[sum(r[:place]) for place in range(len(r))] for r in rows(values, mask)]
    ours = torch.where(mask, exclusive_cumsum(values, mask), 0.0)
    torch.testing.assert_close(ours, spread(wanted, mask))


@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
def test_returns_discount_by_position_and_not_by_column(ragged, discount):
    values, mask = ragged
    wanted = [
        [sum(discount ** (k - place) * r[k] for k in range(place, len(r))) for place in range(len(r))]
        for r in rows(values, mask)
    ]
    torch.testing.assert_close(return_to_go(values, mask, discount=discount), spread(wanted, mask))


def test_positions_count_inside_the_mask():
    mask = torch.tensor([[False, True, False, True, True]])
    assert positions(mask).tolist() == [[0, 1, 0, 2, 3]]


def test_the_first_valid_token_sees_exactly_nothing_behind_it():
    """A sum minus its own term would leave rounding: 1e8 + 1e-3 - 1e-3 is not 1e8 in float32."""
    values = torch.tensor([[1e8, 1e-3, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert exclusive_cumsum(values, mask)[0, :2].tolist() == [0.0, 1e8]


def test_sums_over_runs_stand_where_they_end():
    """By hand: runs of 2, 1 and 3 with a hole between; the gradient of a sum is that of its entries, NaN outside is not read."""
    values = torch.tensor([[1.0, 2.0, 4.0, math.nan, 8.0, 16.0, 32.0]], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([[0, 2, 1, 0, 0, 0, 3]])
    found = segment_sums(values, lengths, longest=3)
    assert found.tolist() == [[0.0, 3.0, 4.0, 0.0, 0.0, 0.0, 56.0]]
    (found * torch.tensor([[1.0, 10.0, 100.0, 1.0, 1.0, 1.0, 1000.0]])).sum().backward()
    assert values.grad.tolist() == [[10.0, 10.0, 100.0, 0.0, 1000.0, 1000.0, 1000.0]]
    assert torch.equal(segment_sums(values[:, :1], lengths[:, 1:2].clamp(max=1), longest=9), values[:, :1])
