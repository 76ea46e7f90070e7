"""Divergences from lists of the teacher's tokens: values and gradients against the whole tables, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.objective import Divergence
from lit_opd.scoring.listed import Listed
from lit_opd.scoring.tiles import Head
from tests.objective.test_divergence import TOKENS, VOCABULARY, formula, head, probabilities, value

KINDS = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.5), ("jsd", 0.2)]


def listed(q: torch.Tensor, over: torch.Tensor, k: int) -> Listed:
    """The ``k`` likeliest tokens under ``over``, as the teacher ``q`` [n, V] scores them."""
    ids = over.topk(k).indices
    return Listed(ids, q.log().gather(-1, ids).detach())


def enumerated(spec: Divergence, p: torch.Tensor, q: torch.Tensor, over: torch.Tensor) -> torch.Tensor:
    """Token by token: the probabilities of the k likeliest under ``over``, and of everything else by name."""
    out = []
    for row_p, row_q, row in zip(p, q, over, strict=True):
        best = sorted(range(len(row)), key=lambda v, row=row: -float(row[v].detach()))[: spec.top_k]
        rest = [v for v in range(len(row)) if v not in best]
        row_p, row_q = (torch.cat([of[best], of[rest].sum().view(1)]) for of in (row_p, row_q))
        out.append(formula(spec.kind, row_p, row_q, spec.beta))
    return torch.stack(out)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("k", [1, 4, VOCABULARY - 1])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_lists_and_heads_equal_the_enumeration_in_value_and_gradient(kind, beta, k, whose):
    spec = Divergence(kind, top_k=k, beta=beta, top_k_of=whose)
    student, teacher = head(0, bias=True), head(1)
    p, q = probabilities(student, 1.0), probabilities(teacher, 1.0).detach()
    over = p if whose == "student" else q
    inputs, upstream = [student.hidden, student.weight, student.bias], torch.linspace(-1, 2, TOKENS).double()
    plain = enumerated(spec, p, q, over)
    for against in (listed(q, over, k), teacher):
        ours = value(spec, student, against)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
        gradients = (torch.autograd.grad(out, inputs, upstream, retain_graph=True) for out in (ours, plain))
        for mine, theirs in zip(*gradients, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < 1e-8


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_tokens_the_student_does_not_have_are_mass_of_the_rest(kind, beta):
    """Every second entry of the list is foreign; the teacher's table is that of the known tokens and one more entry."""
    spec = Divergence(kind, top_k=6, beta=beta, top_k_of="teacher")
    student = head(0)
    p, q = probabilities(student, 1.0), probabilities(head(1), 1.0).detach()
    full = listed(q, q, 6)
    foreign = torch.arange(6) % 2 == 1
    ids, logprobs = full.ids.masked_fill(foreign, 0), full.logprobs.masked_fill(foreign, -torch.inf)
    ours = value(spec, student, Listed(ids, logprobs))
    kept = full.ids[:, ~foreign]
    buckets = [torch.cat([of.gather(-1, kept), 1 - of.gather(-1, kept).sum(-1, keepdim=True)], -1) for of in (p, q)]
    plain = formula(kind, *buckets, beta)
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)
    mine, theirs = (torch.autograd.grad(out.sum(), student.hidden, retain_graph=True)[0] for out in (ours, plain))
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_rest_below_rounding_is_bounded_and_has_a_finite_gradient(kind, beta):
    """A server's float32 log-probs of nearly all mass may sum to more than 1."""
    student = Head(torch.tensor([[2.0, 0.0, -1.0, -3.0]], dtype=torch.float64, requires_grad=True), None)
    lists = Listed(torch.tensor([[0, 1]]), torch.tensor([[math.log(0.75), math.log(0.25) + 1e-7]]))
    out = value(Divergence(kind, top_k=2, beta=beta, top_k_of="teacher"), student, lists)
    p = torch.softmax(student.hidden[0], -1)
    buckets = torch.stack([p[0], p[1], p[2] + p[3]])
    expected = formula(kind, buckets, torch.tensor([0.75, 0.25, 2.0**-23]).double(), beta)
    assert float(out.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    (gradient,) = torch.autograd.grad(out.sum(), student.hidden)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("k", [1, 3, 8])
def test_entropy_bounds_hold_and_are_reached(k):
    """By hand: H >= that with the rest on one token; H <= that with the rest spread over the V - k others."""
    q = probabilities(head(1), 1.0).detach()
    exact = -(q * q.log()).sum(-1)
    lower, upper = listed(q, q, k).entropy_bounds(VOCABULARY)
    assert bool((lower <= exact + 1e-12).all()) and bool((exact <= upper + 1e-12).all())
    assert bool((lower < upper).all())
    flat = torch.full((1, 8), 0.05, dtype=torch.float64)
    flat[0, 0] = 0.65
    bounds = listed(flat, flat, 1).entropy_bounds(8)
    assert float(bounds[0]) == pytest.approx(-0.65 * math.log(0.65) - 0.35 * math.log(0.35))
    assert float(bounds[1]) == pytest.approx(float(-(flat * flat.log()).sum()))  # the rest is flat


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 3, "top_k_of": "both"}, "`Divergence.top_k_of` must be student, teacher or null, got 'both'"),
        ({"top_k_of": "teacher"}, "`Divergence.top_k_of` must be null unless top_k is set, got 'teacher'"),
    ],
)
def test_whose_tokens_are_kept_is_checked(settings, message):
    with pytest.raises(InputError, match=message):
        Divergence("reverse_kl", **settings)


def test_whose_list_is_read_by_default():
    assert Divergence("reverse_kl", top_k=3).whose_list(asked=True) == "student"
    assert Divergence("reverse_kl", top_k=3).whose_list(asked=False) == "teacher"
    for kind in ("forward_kl", "jsd"):
        assert Divergence(kind, top_k=3).whose_list(asked=True) == "teacher"
        assert Divergence(kind, top_k=3, top_k_of="student").whose_list(asked=False) == "student"
