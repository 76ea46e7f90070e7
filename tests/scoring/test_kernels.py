"""Triton's kernels against the tiles and whole tables, on a CPU by Triton's interpreter; compiled for a GPU without one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from lit_opd.errors import InputError
from lit_opd.objective import Divergence
from lit_opd.preflight.memory import LOGPROB_TILES, STATISTIC_TILES, Held, Rank, Workload
from lit_opd.preflight.plan import Plan
from lit_opd.scoring import heads, tiles
from lit_opd.scoring.model import ScoringModel
from lit_opd.scoring.tiles import NEVER, Head
from tests.helpers import fixed, tiny
from tests.scoring.test_tiles import LiveBytes

pytest.importorskip("triton", reason="Triton is not installed: make test installs it from requirements-test.lock")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels run on a CPU with TRITON_INTERPRET=1 only", allow_module_level=True)

from lit_opd.scoring.kernels import head as fused
from lit_opd.scoring.kernels import products
from lit_opd.scoring.kernels.products import Cut, Tiles

VOCABULARY, HIDDEN = 101, 6  # neither is a multiple of anything
KINDS = ("reverse_kl", "forward_kl", "jsd")
WHAT = ("logprobs", *KINDS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """2 tokens and 64 entries a tile, or 1 and 128 in two blocks; scoring asks for the kernels. The interpreter is slow."""
    monkeypatch.setattr(products, "BLOCK", 64)
    monkeypatch.setattr(products, "TILE_TOKENS", 2)
    monkeypatch.setattr(products, "ALIGNED_TOKENS", 1)
    monkeypatch.setattr(products, "TILE_ELEMENTS", 2 * 64)
    monkeypatch.setattr(products, "SLOPE_ELEMENTS", 2 * 64)
    monkeypatch.setenv(heads.VARIABLE, "triton")


def made(
    seed: int,
    *,
    tokens: int = 3,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scale: float = 1.0,
    vocabulary: int = VOCABULARY,
    **form,
) -> Head:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    return Head(draw(tokens, HIDDEN), draw(vocabulary, HIDDEN), draw(vocabulary) if bias else None, **form)


FORMS = {
    "plain": {},
    "one token": {"tokens": 1, "bias": True},
    "one block": {"vocabulary": 23},
    "a whole block unused": {"unused": torch.arange(64)},
    "all": {"bias": True, "limit": 99, "unused": torch.tensor([3, 70]), "soft_cap": 3.0},
}


def table(head: Head, temperature: float) -> torch.Tensor:
    """log softmax of all logits, [N, V], in float64 with autograd, from the definition of a ``Head``."""
    logits = head.hidden.double() @ head.weight.double().T
    logits = logits if head.bias is None else logits + head.bias.double()
    logits = logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)
    logits = logits[:, : head.limit] / temperature
    if head.unused is not None:
        logits = logits.index_fill(-1, head.unused, NEVER)
    return torch.log_softmax(logits, -1)


def plain(what: str, p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor, beta: float) -> torch.Tensor:
    """From log-probs [N, V]."""
    if what == "logprobs":
        return p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    q = q.detach()

    def kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first.exp() * (first - second)).sum(-1)

    if what == "jsd":
        mixture = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
        return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)
    return kl(p, q) if what == "reverse_kl" else kl(q, p)


def asked(what: str, student: Head, teacher: Head, temperature: float, beta: float) -> torch.Tensor:
    """As scoring and the objective ask, whatever the environment says."""
    if what == "logprobs":
        return heads.token_logprobs(student, targets_of(student), temperature=temperature)
    objective = Divergence(what, beta=beta if what == "jsd" else 0.5)
    return objective.token_divergence(student, teacher, temperature=temperature)


def targets_of(head: Head) -> torch.Tensor:
    """Of all tiles, and of entries that name a token."""
    named = torch.arange(head.vocabulary)
    named = named if head.unused is None else named[~torch.isin(named, head.unused)]
    return named[torch.arange(len(head.hidden)) * 37 % len(named)]


def trained(head: Head) -> list[torch.Tensor]:
    return [part for part in (head.hidden, head.weight, head.bias) if part is not None]


def gap(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("what", WHAT)
def test_values_and_gradients_equal_those_of_the_whole_table(what, form):
    student, teacher = made(0, **form), made(1, **form)
    beta = 0.3
    mine = asked(what, student, teacher, 0.7, beta)
    assert heads.code(student, teacher) == "triton" and type(mine.grad_fn).__name__ != "_PerTokenBackward"
    theirs = plain(what, table(student, 0.7), table(teacher, 0.7), targets_of(student), beta)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(-1, 2, len(student.hidden))
    ours = torch.autograd.grad(mine, trained(student), upstream)
    for one, other in zip(ours, torch.autograd.grad(theirs, trained(student), upstream.double()), strict=True):
        assert one.shape == other.shape and gap(one, other) < 2e-5  # of float32: log p - log m cancels


@pytest.mark.parametrize("what", WHAT)
def test_bf16_heads_are_no_worse_than_in_tiles(what, monkeypatch):
    """Values are those of the tiles; both gradients' distances from float64 without rounding are compared. The interpreter
    cuts the last bits of a slope off; a GPU rounds them (below)."""
    form = {"dtype": torch.bfloat16, "bias": True, "tokens": 5, "unused": torch.tensor([5])}
    student, teacher = made(0, **form), made(1, **form)
    exact = plain(what, table(student, 1.0), table(teacher, 1.0), targets_of(student), 0.5)
    expected = torch.autograd.grad(exact.sum(), trained(student))
    found = []
    for choice in ("triton", "tiles"):
        monkeypatch.setenv(heads.VARIABLE, choice)
        out = asked(what, student, teacher, 1.0, 0.5)
        found.append((out.detach(), torch.autograd.grad(out.sum(), trained(student))))
    (mine, ours), (theirs, tiled) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for one, other, best in zip(ours, tiled, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert gap(one, best) < gap(other, best) + 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [FORMS["all"]], ids=["all"])
def test_entropy_top_k_and_kl_equal_those_of_the_tiles(form, dtype):
    student, teacher = made(0, dtype=dtype, **form), made(1, dtype=dtype, **form)
    for mine, theirs in (
        (fused.token_entropy(student, temperature=0.7), tiles.token_entropy(student, temperature=0.7)),
        (fused.token_kl(student, teacher, temperature=0.7), tiles.token_kl(student, teacher, temperature=0.7)),
    ):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for k in (1, 40, 200):
        ids, logprobs = fused.token_topk(student, k=k, temperature=0.7)
        _, expected = tiles.token_topk(student, k=k, temperature=0.7)
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
        of_ids = student.logits(slice(None), 0.7).log_softmax(-1).gather(-1, ids)
        torch.testing.assert_close(of_ids, logprobs, rtol=1e-5, atol=1e-5)  # of equal logits any may come first
        assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("what", WHAT)
def test_far_apart_logits_keep_their_precision(what):
    """Logits of several hundred: a sum of plain exponentials would be inf."""
    student, teacher = made(0, scale=8.0), made(1, scale=8.0)
    mine = asked(what, student, teacher, 1.0, 0.5)
    theirs = plain(what, table(student, 1.0), table(teacher, 1.0), targets_of(student), 0.5)
    assert float(theirs.detach().abs().max()) > (0.69 if what == "jsd" else 50.0)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", WHAT)
def test_what_stands_behind_the_vocabulary_has_no_mass(what):
    """All logits far below 0: anything counted as 0 would be all the mass."""
    student, teacher = made(0, bias=True), made(1, bias=True)
    low = [Head(part.hidden, part.weight, part.bias.detach() - 300.0) for part in (student, teacher)]
    torch.testing.assert_close(
        asked(what, *low, 1.0, 0.5), asked(what, student, teacher, 1.0, 0.5), rtol=1e-3, atol=1e-3
    )


def test_a_trained_bias_on_given_logits_gets_its_gradient():
    logits, bias = made(0).logits(slice(None), 1.0).detach(), torch.zeros(VOCABULARY, requires_grad=True)
    before, targets = logits.clone(), torch.tensor([3, 64, 100])
    (mine,) = torch.autograd.grad(fused.token_logprobs(Head(logits, None, bias), targets).sum(), bias)
    (theirs,) = torch.autograd.grad((logits + bias).log_softmax(-1)[torch.arange(3), targets].sum(), bias)
    assert torch.equal(logits, before) and gap(mine, theirs) < 1e-5


def test_an_entry_of_minus_infinity_has_no_mass_and_a_nan_stays():
    logits = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(0))
    logits[0, :64] = -math.inf  # a whole block
    logits[1, 7] = math.nan
    head, targets = Head(logits.clone().requires_grad_(), None), torch.tensor([70, 4, 5])
    mine = fused.token_logprobs(head, targets)
    expected = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(mine, expected, equal_nan=True)
    assert mine[1].isnan() and mine[[0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(mine[0], head.hidden)
    assert not gradient[0, :64].any() and float(gradient[0].sum().abs()) < 1e-6


@pytest.mark.parametrize("what", ["logprobs", "reverse_kl"])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden",)], ids=["trained", "frozen head", "head only"])
def test_what_needs_no_gradient_gets_none_and_the_rest_is_unchanged(what, frozen):
    whole, teacher = made(0), made(1)
    parts = {
        name: getattr(whole, name).detach().clone().requires_grad_(name not in frozen) for name in ("hidden", "weight")
    }
    asked(what, Head(**parts), teacher, 0.7, 0.5).sum().backward()
    exact = plain(what, table(whole, 0.7), table(teacher, 0.7), targets_of(whole), 0.5).sum()
    for (name, part), expected in zip(
        parts.items(), torch.autograd.grad(exact, [whole.hidden, whole.weight]), strict=True
    ):
        assert (part.grad is None) == (name in frozen)
        assert part.grad is None or gap(part.grad, expected) < 1e-5


@pytest.mark.parametrize("what", WHAT)
def test_no_token_gives_no_number_and_a_zero_gradient(what):
    student, teacher = made(0, tokens=0), made(1, tokens=0)
    out = asked(what, student, teacher, 1.0, 0.5)
    (gradient,) = torch.autograd.grad(out.sum(), [student.weight])
    assert out.shape == (0,) and gradient.shape == student.weight.shape and not gradient.any()
    assert fused.token_entropy(student).shape == fused.token_kl(student, teacher).shape == (0,)
    assert fused.token_topk(student, k=3)[0].shape == (0, 3)


@pytest.mark.parametrize("what", ["logprobs", "reverse_kl"])
def test_logits_that_came_from_elsewhere_are_not_overwritten(what):
    given, teacher = made(0), made(1)
    logits = (given.weight @ given.hidden.T).detach().T.requires_grad_()  # neighbours in memory along the tokens
    before, student = logits.detach().clone(), Head(logits, None)
    asked(what, student, teacher, 1.0, 0.5).sum().backward()
    fused.token_entropy(student), fused.token_kl(student, teacher), fused.token_topk(student, k=3)
    assert torch.equal(logits.detach(), before)
    expected = torch.autograd.grad(asked(what, given, teacher, 1.0, 0.5).sum(), [given.hidden])[0]
    assert gap(logits.grad @ given.weight.detach(), expected) < 1e-5


def test_the_same_inputs_give_the_same_bits():
    """No sum has an order of chance; the order of the tiles is the same each time."""
    student, teacher = made(0, dtype=torch.bfloat16, bias=True, tokens=3), made(1, dtype=torch.bfloat16, tokens=3)
    found = []
    for _ in range(2):
        out = asked("reverse_kl", student, teacher, 1.0, 0.5)
        found.append([out.detach(), *torch.autograd.grad(out.sum(), trained(student))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_tiles_cover_every_token_and_entry_once_and_never_grow():
    for count, vocabulary in ((1, 101), (2, 64), (9, 65), (10, 7), (300, 1000)):
        cut = Cut.of(made(0, tokens=count, vocabulary=vocabulary))
        seen = torch.zeros(count, vocabulary)
        for rows, columns in cut:
            seen[rows, columns] += 1
            assert (columns.stop - columns.start) % cut.block == 0 or columns.stop == vocabulary
        assert bool((seen == 1).all())
        assert cut.elements <= max(
            products.TILE_ELEMENTS, products.ALIGNED * max(len(range(*r.indices(count))) for r in cut.rows)
        )


def test_a_large_batch_holds_tiles_and_never_its_logits(monkeypatch):
    """At the shape that is shipped, by the sizes of all buffers: 16,384 tokens x 151,936 entries are 4.6 GiB in bf16."""
    monkeypatch.undo()
    head = Head(*(torch.empty(size, 1024, dtype=torch.bfloat16, device="meta") for size in (16_384, 151_936)))
    assert Tiles(head, Cut.of(head), 1.0).buffer.nbytes == 2**26  # forward
    cut = Cut.of(head, backward=True)
    assert (len(cut.rows), len(cut.columns), cut.block) == (4, 38, 4096)
    assert Tiles(head, cut, 1.0).buffer.nbytes == 2**25
    sums = products.Gradients(head, cut, (True, True, False))
    held = sums.hidden.nbytes + sums.weight.nbytes + sums.slice.nbytes + 2**25
    assert held / 2**20 < 410  # of it 361 are both gradients, the hidden states' in float32
    gpu = Plan("gpu", 1, 1, 1, "auto", "bf16-mixed", None, "")
    size = SimpleNamespace(vocabulary=151_936, hidden=1024, num_trainable=0)
    rank = Rank(Held(size, 4), Workload(rows=1, prompt=1, response=1), gpu)
    wide = SimpleNamespace(vocabulary=151_936, hidden=8192)
    assert rank._tiles(size, 16_384, LOGPROB_TILES) == 2**26
    assert rank._tiles(wide, 16_384, LOGPROB_TILES) == 2**25 + 8 * sums.slice.nbytes
    assert rank._tiles(wide, 4096, STATISTIC_TILES) == 2 * 2**26  # two heads; one row of tiles sums in place
    monkeypatch.setenv(heads.VARIABLE, "tiles")
    assert rank._tiles(size, 16_384, LOGPROB_TILES) == 2 * 2**27


def test_a_step_allocates_nothing_as_large_as_its_logits(monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 512)
    student = made(0, tokens=8, vocabulary=4000)
    with LiveBytes() as count:
        torch.autograd.grad(fused.token_logprobs(student, targets_of(student)).sum(), trained(student))
    assert 0 < count.peak and count.peak - student.weight.nbytes < 8 * 4000 * 4 / 2


# -- which code it is --------------------------------------------------------------------------------------------------


def test_a_model_is_scored_by_the_kernels_and_says_so():
    """Values and gradients of a whole model, padding, a masked row and a vocabulary cut included."""
    rollout = fixed.rollout(lengths=[3, 6, 2], prompt_lengths=[4, 2, 5], truncated={1})
    rollout.mask[2] = False
    found, codes = [], []
    for choice in ("triton", "tiles"):
        os.environ[heads.VARIABLE] = choice  # the fixture's; it is put back
        model = tiny.qwen3(seed=1)
        policy = ScoringModel(model, vocabulary=60)
        scores = policy(rollout, wants=frozenset({"entropy", "topk"}))
        scores.logprobs.sum().backward()
        codes.append(policy.head_code)
        found.append({name: p.grad for name, p in model.named_parameters()} | {"scores": scores.logprobs.detach()})
    assert codes == ["triton", "tiles"]
    assert fixed.relative_gap(*found) < 1e-5


def test_kernels_that_are_wrong_or_do_not_run_are_found_before_their_first_use(monkeypatch):
    """The warning comes once and says why; who asked for the kernels is refused."""
    head = made(0)
    monkeypatch.setattr(heads, "_foreign", lambda device: None)
    for replaced, told in (
        (lambda *a, **k: 1 / 0, "do not run on cpu .ZeroDivisionError"),
        (_off_by_one_part, "differ"),
    ):
        for cache in (heads._unusable, heads._warn_once):
            cache.cache_clear()
        monkeypatch.setenv(heads.VARIABLE, "auto")
        with monkeypatch.context() as patch:
            patch.setattr(fused.kernels, "slope_one", replaced)
            with pytest.warns(UserWarning, match=f"head: tiles.*{told}"):
                assert heads.code(head) == "tiles"
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert heads.code(head) == "tiles"
            monkeypatch.setenv(heads.VARIABLE, "triton")
            with pytest.raises(InputError, match=f"`LIT_OPD_HEAD` must be auto or tiles here, got 'triton': .*{told}"):
                heads.code(head)
        heads._unusable.cache_clear()
    assert heads.code(head) == "triton"


def _off_by_one_part(tile, block, out, targets, log_normaliser, factor, first):
    out.copy_(tile.logits)


def test_what_the_kernels_are_not_for_stays_with_the_tiles(monkeypatch):
    doubles, halves = made(0, dtype=torch.float64), made(0, dtype=torch.float16)
    for head, said in ((doubles, "float64"), (halves, "float16")):
        with pytest.raises(InputError, match=f"got 'triton': the head is {said}"):
            heads.code(head)
    monkeypatch.setenv(heads.VARIABLE, "auto")
    assert [heads.code(head) for head in (doubles, halves, made(0))] == ["tiles"] * 3
    monkeypatch.setenv(heads.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="the head is on the device cpu, and the kernels are for cuda"):
        heads.check_choice("cpu")
    heads.check_choice("cuda")


@pytest.mark.parametrize("given", ["Triton", "cuda", "0"])
def test_an_unknown_choice_is_refused_before_a_run(given, monkeypatch):
    monkeypatch.setenv(heads.VARIABLE, given)
    with pytest.raises(InputError, match=f"`LIT_OPD_HEAD` must be one of auto, triton, tiles, got '{given}'"):
        ScoringModel(tiny.qwen3(seed=1), vocabulary=60)


# -- for a GPU ---------------------------------------------------------------------------------------------------------

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lit_opd.scoring.kernels import rows

POINTERS = {"tile": "*bf16", "tile2": "*bf16", "out": "*bf16", "dead": "*u8", "dead2": "*u8", "targets": "*i64"}
WHOLE = ("stride", "stride2", "width", "table", "first", "out_stride")
NUMBERS = ("temperature", "cap", "cap2", "log_beta", "log_rest")
VALUES = {"BLOCK": 1024, "KIND": rows.JSD}
for name, kernel in vars(rows).items():
    if name.startswith(("_sum", "_slope")):
        kinds = {}
        for part in kernel.arg_names:
            kinds[part] = POINTERS.get(part, "i32" if part in WHOLE else "fp32" if part in NUMBERS else "*fp32")
        fixed = {part: VALUES.get(part, True) for part in kernel.arg_names if part.upper() == part}
        kinds |= dict.fromkeys(fixed, "constexpr")
        places = {(kernel.arg_names.index(part),): value for part, value in fixed.items()}
        made = triton.compile(ASTSource(kernel, kinds, constexprs=places), target=GPUTarget("cuda", 90, 32))
        print(name, len(made.asm["cubin"]) > 0, "cvt.rn.bf16" in made.asm["ptx"])
"""


def test_every_kernel_compiles_for_an_h100_without_one(tmp_path):
    """By Triton's own compiler and assembler: what the interpreter runs is also what a GPU takes, and rounds to the nearest."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, timeout=120)
    names = ("_sum_one", "_sum_two", "_sum_mixed", "_slope_one", "_slope_two")
    assert ran.stdout.splitlines() == [f"{name} True {'slope' in name}" for name in names], ran.stderr
