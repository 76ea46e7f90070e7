"""Tiles over tokens and vocabulary against whole tables with autograd, and the bytes they hold."""

from __future__ import annotations

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_opd.objective import Divergence
from lit_opd.scoring import tiles
from lit_opd.scoring.listed import Listed
from lit_opd.scoring.mixed import MixedHead, Mixing, log_sums
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import Head, token_entropy, token_kl, token_listed, token_logprobs, token_topk
from tests.helpers import fixed, tiny

VOCABULARY, HIDDEN = 101, 8
KINDS = ("reverse_kl", "forward_kl", "jsd")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """7 tokens and 13 entries a tile: the vocabulary of 101 ends in a tile of 10."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 7 * 13)
    monkeypatch.setattr(tiles, "TILE_TOKENS", 7)
    monkeypatch.setattr(tiles, "WHOLE_ELEMENTS", 7 * VOCABULARY)


def random_head(
    seed: int, *, tokens: int = 24, dtype: torch.dtype = torch.float64, bias: bool = False, scale: float = 1.0
) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    return Head(draw(tokens, HIDDEN), draw(VOCABULARY, HIDDEN), draw(VOCABULARY) if bias else None)


def table(head: Head, temperature: float, hidden: torch.Tensor | None = None) -> torch.Tensor:
    """log softmax of all logits, [N, V], in float64."""
    states = (head.hidden if hidden is None else hidden).double()
    logits = states @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double())
    return torch.log_softmax(logits / temperature, -1)


def plain_divergence(kind: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """From log-probs [N, V]."""
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2.0)
    return ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2


def evaluate(what: str, student: Head, teacher: Head, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiled and plain, [N] each."""
    targets = torch.arange(len(student.hidden)) * 5 % VOCABULARY
    p, q = table(student, temperature), table(teacher, temperature).detach()
    if what == "logprobs":
        plain = p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return token_logprobs(student, targets, temperature=temperature), plain
    tiled = Divergence(what).token_divergence(student, teacher, temperature=temperature)  # type: ignore[arg-type]
    return tiled, plain_divergence(what, p, q)


def relative_gap(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
@pytest.mark.parametrize(("dtype", "value", "gradient"), [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4)])
@pytest.mark.parametrize(("bias", "temperature"), [(False, 1.0), (True, 0.7)])
@pytest.mark.parametrize("tokens", [1, 24])
def test_values_and_gradients_equal_those_of_the_whole_table(what, dtype, value, gradient, bias, temperature, tokens):
    student = random_head(0, tokens=tokens, dtype=dtype, bias=bias)
    teacher = random_head(1, tokens=tokens, dtype=dtype, bias=bias)
    mine, theirs = evaluate(what, student, teacher, temperature)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), theirs, rtol=value, atol=value)
    inputs = [part for part in (student.hidden, student.weight, student.bias) if part is not None]
    upstream = torch.linspace(-1, 2, tokens, dtype=torch.float64)
    ours = torch.autograd.grad(mine, inputs, upstream.to(dtype))
    for name, one, other in zip(
        ("hidden", "weight", "bias"), ours, torch.autograd.grad(theirs, inputs, upstream), strict=False
    ):
        assert relative_gap(one, other) < gradient, name


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
def test_a_soft_cap_bends_logits_before_the_temperature_and_gradients_with_them(what):
    student, teacher = (
        Head(part.hidden, part.weight, part.bias, unused=torch.tensor([100]), soft_cap=2.0)
        for part in (random_head(0, bias=True), random_head(1, bias=True))
    )
    tables = []
    for head in (student, teacher):
        bent = 2.0 * torch.tanh((head.hidden @ head.weight.T + head.bias) / 2.0)
        tables.append(torch.log_softmax(bent[:, :100] / 0.7, -1))
    targets = torch.arange(24) * 5 % 100
    p, q = tables[0], tables[1].detach()
    if what == "logprobs":
        mine = token_logprobs(student, targets, temperature=0.7)
        theirs = p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    else:
        mine, theirs = evaluate(what, student, teacher, 0.7)[0], plain_divergence(what, p, q)
    torch.testing.assert_close(mine, theirs)
    inputs = [student.hidden, student.weight, student.bias]
    for one, other in zip(
        torch.autograd.grad(mine.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True
    ):
        assert relative_gap(one, other) < 1e-10


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
def test_far_apart_logits_keep_their_precision(what):
    """Logits of several hundred: a sum of plain exponentials would be inf."""
    student, teacher = random_head(0, dtype=torch.float32, scale=8.0), random_head(1, dtype=torch.float32, scale=8.0)
    mine, theirs = evaluate(what, student, teacher, 1.0)
    assert float(theirs.detach().abs().max()) > (0.69 if what == "jsd" else 100.0)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
def test_bf16_heads_round_logits_and_nothing_else(what):
    """Values are those of the bf16 logits; gradients keep the 8 bits of their dtype."""
    student, teacher = random_head(0, dtype=torch.bfloat16, scale=0.5), random_head(1, dtype=torch.bfloat16, scale=0.5)
    mine, _ = evaluate(what, student, teacher, 1.0)
    rounded = [
        Head((head.hidden @ head.weight.T).detach().double(), torch.eye(VOCABULARY, dtype=torch.float64))
        for head in (student, teacher)
    ]
    _, expected = evaluate(what, *rounded, 1.0)
    torch.testing.assert_close(mine.double(), expected, rtol=1e-5, atol=1e-5)
    _, smooth = evaluate(what, student, teacher, 1.0)
    for one, other in zip(
        torch.autograd.grad(mine.sum(), [student.hidden, student.weight]),
        torch.autograd.grad(smooth.sum(), [student.hidden, student.weight]),
        strict=True,
    ):
        assert one.dtype == torch.bfloat16
        assert relative_gap(one, other) < 0.02


def sure_heads(dtype: torch.dtype) -> tuple[Head, Head]:
    """Logits of up to 30, and a teacher that nearly agrees."""
    student = random_head(0, dtype=dtype, scale=1.7)
    weight = student.weight.detach() * 1.01
    return student, Head(student.hidden.detach(), weight)


MADE_OF_HEADS = {
    "logprobs": lambda student, teacher: token_logprobs(student, torch.arange(24)),
    "entropy": lambda student, teacher: token_entropy(student),
    "kl": token_kl,
    "top-k": lambda student, teacher: torch.cat(token_topk(student, k=5), -1),
    "listed": lambda student, teacher: token_listed(student, torch.arange(48).view(24, 2)),
    "log-sums": lambda student, teacher: log_sums(student, 0.7),
    "entropy of a mixture": lambda student, teacher: token_entropy(of_both(student, teacher, "mixture")),
    "entropy of a product": lambda student, teacher: token_entropy(of_both(student, teacher, "product")),
    "kl to a mixture": lambda student, teacher: token_kl(student, of_both(student, teacher, "mixture")),
    "lists": lambda student, teacher: Divergence("reverse_kl", top_k=2, top_k_of="teacher").token_divergence(
        student, Listed(*token_topk(teacher, k=2)), temperature=1.0
    ),
    **{
        kind: lambda student, teacher, kind=kind: Divergence(kind).token_divergence(student, teacher, temperature=1.0)
        for kind in KINDS
    },
}


def of_both(student: Head, teacher: Head, how: Mixing) -> MixedHead:
    return MixedHead.of((student, teacher), (0.5, 0.5), how)


@pytest.mark.parametrize("what", MADE_OF_HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_rounds_nothing_that_is_made_of_a_head(what, dtype):
    """Where a token is nearly certain an entropy and a KL are small differences of large numbers."""
    student, teacher = sure_heads(dtype)
    plain = MADE_OF_HEADS[what](student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = MADE_OF_HEADS[what](student, teacher)
    assert torch.equal(mixed, plain)


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)], ids=["trained", "frozen head", "head only"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_unchanged(what, frozen):
    whole, teacher = random_head(0), random_head(1)
    parts = {
        name: getattr(whole, name).detach().clone().requires_grad_(name not in frozen) for name in ("hidden", "weight")
    }
    out = evaluate(what, Head(**parts), teacher, 0.7)[0].sum()
    out.backward()
    expected = torch.autograd.grad(evaluate(what, whole, teacher, 0.7)[1].sum(), [whole.hidden, whole.weight])
    for (name, part), gradient in zip(parts.items(), expected, strict=True):
        assert (part.grad is None) == (name in frozen)
        assert part.grad is None or relative_gap(part.grad, gradient) < 1e-10


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
def test_no_token_gives_no_number_and_a_zero_gradient(what):
    student = random_head(0, tokens=0)
    out, _ = evaluate(what, student, random_head(1, tokens=0), 1.0)
    (gradient,) = torch.autograd.grad(out.sum(), [student.weight])
    assert out.shape == (0,) and gradient.shape == student.weight.shape and not gradient.any()
    for empty in (token_entropy(student), token_kl(student, student)):
        assert empty.shape == (0,)
    assert token_topk(student, k=3)[0].shape == (0, 3)


@pytest.mark.parametrize("what", ["logprobs", *KINDS])
def test_logits_that_came_from_elsewhere_are_not_overwritten(what):
    """A head without a weight hands over the model's own logits, which the model's backward pass may read."""
    given = random_head(0)
    logits = (given.hidden @ given.weight.T).detach().requires_grad_()
    before, teacher = logits.detach().clone(), random_head(1)
    targets = torch.arange(24) * 5 % VOCABULARY
    student = Head(logits, None)
    if what == "logprobs":
        token_logprobs(student, targets).sum().backward()
    else:
        Divergence(what).token_divergence(student, teacher, temperature=1.0).sum().backward()
    token_entropy(student), token_kl(student, teacher), token_topk(student, k=3)
    assert torch.equal(logits.detach(), before)
    assert float(logits.grad.sum(-1).abs().max()) < 1e-10  # a shift of all logits changes nothing


@pytest.mark.parametrize("vocabulary", [60, 64])
def test_tied_embeddings_get_both_shares_of_their_gradient(vocabulary):
    """Against transformers' own logits and autograd, padded prompts and a masked row included, with the vocabulary cut
    and uncut."""
    rollout = fixed.rollout(lengths=[3, 6, 2], prompt_lengths=[4, 2, 5], truncated={1})
    rollout.mask[2] = False
    found = []
    for tiled in (True, False):
        model = tiny.qwen3(seed=1).double()
        model.lm_head.weight = model.model.embed_tokens.weight
        policy = ScoringModel(model, vocabulary=vocabulary)
        if tiled:
            out = policy(rollout).logprobs
        else:
            out = row_by_row(model, rollout, vocabulary)
        out.sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert fixed.relative_gap(*found) < 1e-6  # transformers computes some norms in float32 whatever the weights are


def row_by_row(model, rollout, vocabulary: int) -> torch.Tensor:
    """Log-probs of the valid tokens from the model's own logits without padding."""
    parts = []
    for row in range(len(rollout)):
        prompt = rollout.prompts.ids[row][rollout.prompts.mask[row]]
        response = rollout.response_ids[row][rollout.mask[row]]
        if len(response):
            logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1, :vocabulary]
            parts.append(logits.log_softmax(-1).gather(-1, response.unsqueeze(-1)))
    return torch.cat(parts)


class Operations(TorchDispatchMode):
    """Names of the operations that ran, alone and with the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.shapes: set[tuple[str, tuple[torch.Size, ...]]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        self.shapes.add((str(func), tuple(leaf.shape for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("hidden", "tokens"), [(16, 600), (128, 512)])
def test_onednn_products_equal_those_of_the_plain_path(hidden, tokens, inference, monkeypatch):
    """At the tile shape that is shipped, values and gradients."""
    monkeypatch.undo()
    head, found, ran = wide_head(tokens=tokens, vocabulary=1500, hidden=hidden), [], []
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
        with torch.inference_mode(inference), Operations() as operations:
            logprobs = logprobs_of(head)
            gradients = [] if inference else torch.autograd.grad(logprobs.sum(), [head.hidden, head.weight])
        found.append([logprobs, *gradients])
        ran.append(any("mkldnn" in name for name in operations.names))
    assert ran == [True, False]
    for fast, plain in zip(*found, strict=True):
        assert relative_gap(fast.detach(), plain.detach()) < 1e-6


def test_batches_of_ever_other_sizes_leave_nothing_behind_in_onednn(monkeypatch):
    """Its cache holds 1024 compiled products, which a run of 2000 steps filled with 30 MiB."""
    monkeypatch.undo()
    shapes = set()
    for tokens in (*range(600, 620), 1100):
        head = wide_head(tokens=tokens, vocabulary=1500, hidden=16)
        with Operations() as operations:
            torch.autograd.grad(logprobs_of(head).sum(), [head.hidden, head.weight])
        shapes |= {shape for name, shape in operations.shapes if "mkldnn" in name}
    assert 1 <= len(shapes) <= 4  # a full or the last tile of entries, forward and backward


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_the_plain_product(dtype):
    head = random_head(0, dtype=dtype)
    with Operations() as operations:
        torch.autograd.grad(logprobs_of(head).sum(), [head.hidden, head.weight])
    assert not any("mkldnn" in name for name in operations.names)


def test_logits_that_are_recorded_keep_their_gradient():
    head = random_head(0, dtype=torch.float32)
    ours = torch.autograd.grad(head.logits(slice(None), 1.0).sum(), [head.hidden, head.weight])
    for mine, theirs in zip(
        ours, torch.autograd.grad((head.hidden @ head.weight.T).sum(), [head.hidden, head.weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


# -- memory ------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Peak of the storages that operations returned and that are still alive, in bytes.

    Buffers inside one operation (a packed operand of a matrix product) are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        self.live = {key: held for key, held in self.live.items() if not held[0].expired()}
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def wide_head(*, tokens: int, vocabulary: int, hidden: int = 128) -> Head:
    generator = torch.Generator().manual_seed(0)
    return Head(
        torch.randn(tokens, hidden, generator=generator).requires_grad_(),
        torch.randn(vocabulary, hidden, generator=generator).mul_(0.02).requires_grad_(),
    )


def bytes_beside_the_head(function, *, tokens: int, vocabulary: int) -> int:
    """Peak of a forward and backward pass less the gradient of the head's weight."""
    head = wide_head(tokens=tokens, vocabulary=vocabulary)
    with LiveBytes() as count:
        gradients = torch.autograd.grad(function(head).sum(), [head.hidden, head.weight])
    assert all(bool(gradient.any()) for gradient in gradients)
    return count.peak - head.weight.numel() * 4


def logprobs_of(head: Head) -> torch.Tensor:
    return token_logprobs(head, torch.arange(len(head.hidden)))


def test_scoring_a_large_vocabulary_holds_less_than_a_quarter_of_its_logits(monkeypatch):
    """At the tile shape that is shipped; and no more for 15 times the vocabulary."""
    monkeypatch.undo()
    tokens, vocabulary = 1024, 37984
    quarter = tokens * vocabulary * 4 / 4
    wide = bytes_beside_the_head(logprobs_of, tokens=tokens, vocabulary=vocabulary)
    narrow = bytes_beside_the_head(logprobs_of, tokens=tokens, vocabulary=vocabulary // 15)
    assert 2**20 < wide < min(quarter, narrow + 2**20)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_of_a_large_vocabulary_holds_less_than_a_quarter_of_its_logits(kind, monkeypatch):
    """Both models' logits are made and neither is held."""
    monkeypatch.undo()
    tokens, vocabulary = 256, 60000

    def divergence(student: Head) -> torch.Tensor:
        teacher = Head(student.hidden.detach().flip(0), student.weight.detach())
        return Divergence(kind).token_divergence(student, teacher, temperature=1.0)

    assert 2**20 < bytes_beside_the_head(divergence, tokens=tokens, vocabulary=vocabulary) < tokens * vocabulary * 4 / 4


def test_the_count_sees_logits_that_are_held():
    tokens, vocabulary = 512, 5000

    def plain(head: Head) -> torch.Tensor:
        return (head.hidden @ head.weight.T).log_softmax(-1)[:, 0]

    assert bytes_beside_the_head(plain, tokens=tokens, vocabulary=vocabulary) >= 1.5 * tokens * vocabulary * 4
