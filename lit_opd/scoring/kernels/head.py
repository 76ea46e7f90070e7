"""Log-probs, entropy, top-k, token KL and divergences of a head, by tiles of cuBLAS and kernels of Triton.

The same functions as ``lit_opd.scoring.tiles`` and ``lit_opd.objective.Divergence``, and their meaning: exact, a 16-bit head
rounds its logits and nothing else, what is summed over the vocabulary is joined in float64. Every sum has a fixed order, so
the same inputs give the same bits.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_opd.scoring.kernels import rows as kernels
from lit_opd.scoring.kernels.products import Cut, Gradients, Partials, Tiles
from lit_opd.scoring.tiles import Form, Head, softly_capped


class Rule(ABC):
    """One number a token, and the kernel that gives its slope; ``values`` runs first and may keep [N] numbers."""

    @abstractmethod
    def values(self, head: Head, temperature: float) -> Tensor:
        """float32 [N], without gradient."""

    @abstractmethod
    def slopes(self, head: Head, cut: Cut, temperature: float) -> Callable[..., None]:
        """What writes d value/d logits times a factor: (tile, out, factor [n], rows, columns)."""


class _Fused(torch.autograd.Function):
    """A ``Rule`` of every token, recomputed tile by tile in the backward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        form: Form,
        rule: Rule,
        temperature: float,
    ) -> Tensor:
        """The rule's numbers, float32 [N], of hidden states [N, H], weight [V, H] and bias [V]; see ``Head``."""
        with _on(hidden):
            out = rule.values(Head(hidden, weight, bias, *form), temperature)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.form, ctx.rule, ctx.temperature = form, rule, temperature
        return out

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of hidden states [N, H], weight [V, H] and bias [V] from ``upstream`` [N], None where none is wanted."""
        head = Head(*ctx.saved_tensors, *ctx.form)
        with _on(head.hidden):
            factor = (upstream.float() / ctx.temperature).contiguous()
            sums = _gradients(head, ctx.rule, ctx.temperature, factor, ctx.needs_input_grad[:3])
            return (*sums.result(), None, None, None)


def _gradients(head: Head, rule: Rule, temperature: float, factor: Tensor, wanted: tuple[bool, ...]) -> Gradients:
    """All tiles added up; the buffers are free again when it returns."""
    cut = Cut.of(head, backward=True)
    sums, tiles = Gradients(head, cut, wanted), Tiles(head, cut, temperature)
    write = rule.slopes(head, cut, temperature)
    for rows, columns in cut:
        tile = tiles.at(rows, columns)
        out = sums.out(tile, rows, columns)
        write(tile, out, factor[rows], rows, columns)
        sums.add(out, rows, columns)
    return sums


@contextlib.contextmanager
def _on(hidden: Tensor) -> Any:
    """No autocast, and kernels go to the device of ``hidden``."""
    device = torch.cuda.device(hidden.device) if hidden.is_cuda else contextlib.nullcontext()
    with torch.autocast(hidden.device.type, enabled=False), device:
        yield


def _apply(head: Head, rule: Rule, temperature: float) -> Tensor:
    return _Fused.apply(head.hidden, head.weight, head.bias, head.form, rule, temperature)  # type: ignore[no-any-return]


# -- log-probs ---------------------------------------------------------------------------------------------------------


class _Surprisal(Rule):
    """-log softmax(logits)[target]."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets.contiguous()

    def values(self, head: Head, temperature: float) -> Tensor:
        """[N] nats."""
        cut = Cut.of(head)
        tiles, partials = Tiles(head, cut, temperature), Partials(cut, head.hidden, 2)
        picked = head.hidden.new_zeros(len(head.hidden), dtype=torch.float32)
        for rows, columns in cut:
            tops, masses = partials.at(rows, columns)
            kernels.sum_one(
                tiles.at(rows, columns),
                cut.block,
                (tops, masses, None),
                targets=self.targets[rows],
                picked=picked[rows],
                first=columns.start,
            )
        log_normaliser, _ = partials.normaliser()
        self.log_normaliser = log_normaliser.float()
        return (log_normaliser - picked).float()

    def slopes(self, head: Head, cut: Cut, temperature: float) -> Callable[..., None]:
        """softmax - onehot(target)."""

        def write(tile: kernels.Tile, out: Tensor, factor: Tensor, rows: slice, columns: slice) -> None:
            targets, log_normaliser = self.targets[rows], self.log_normaliser[rows]
            kernels.slope_one(tile, cut.block, out, targets, log_normaliser, factor, columns.start)

        return write


def token_logprobs(head: Head, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """As ``lit_opd.scoring.tiles.token_logprobs``: float32 [N] nats, differentiable."""
    return -_apply(head, _Surprisal(targets), temperature)


# -- without gradient --------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_entropy(head: Head, *, temperature: float = 1.0) -> Tensor:
    """As ``lit_opd.scoring.tiles.token_entropy``: float32 [N] nats."""
    with _on(head.hidden):
        cut = Cut.of(head)
        tiles, partials = Tiles(head, cut, temperature), Partials(cut, head.hidden, 3)
        for rows, columns in cut:
            tops, masses, averages = partials.at(rows, columns)
            kernels.sum_one(tiles.at(rows, columns), cut.block, (tops, masses, averages))
        log_normaliser, average = partials.summed()
        return (log_normaliser - average).float()


@torch.no_grad()
def token_topk(head: Head, *, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """As ``lit_opd.scoring.tiles.token_topk``: ids int64 [N, K] and log-probs float32 [N, K]."""
    k = min(k, head.num_tokens)
    with _on(head.hidden):
        cut = Cut.of(head)
        tiles, partials = Tiles(head, cut, temperature), Partials(cut, head.hidden, 2)
        values = head.hidden.new_full((len(head.hidden), k), -torch.inf, dtype=torch.float32)
        ids = torch.zeros_like(values, dtype=torch.int64)
        for rows, columns in cut:
            tile = tiles.at(rows, columns)
            tops, masses = partials.at(rows, columns)
            kernels.sum_one(tile, cut.block, (tops, masses, None))
            best = _scaled(tile).topk(min(k, columns.stop - columns.start))
            found = (values[rows], best.values.float()), (ids[rows], best.indices + columns.start)
            values[rows], ids[rows] = _joined(*found)
        return ids, (values / temperature - partials.normaliser()[0].unsqueeze(-1)).float()


def _scaled(tile: kernels.Tile) -> Tensor:
    """Logits [n, v] before the temperature, as the product left them where nothing bends them."""
    logits = tile.logits
    if tile.bias is not None:
        logits = logits.float() + tile.bias.float()
    if tile.soft_cap is not None:
        logits = softly_capped(logits.float(), tile.soft_cap)
    if tile.dead is not None:
        logits = logits.float().masked_fill(tile.dead.bool(), kernels.NEVER)
    return logits


def _joined(values: tuple[Tensor, Tensor], ids: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The k highest of a list [n, k] and another, highest first, with their ids."""
    best = torch.cat(values, -1).topk(values[0].shape[-1])
    return best.values, torch.cat(ids, -1).gather(-1, best.indices)


# -- two heads ---------------------------------------------------------------------------------------------------------


class _Pair:
    """Sums of student and teacher over one vocabulary: both log-sum-exps and the average gap under each, float64 [N]."""

    def __init__(self, student: Head, teacher: Head, temperature: float) -> None:
        cut = Cut.of(student)
        mine, theirs = Tiles(student, cut, temperature), Tiles(teacher, cut, temperature)
        partials = Partials(cut, student.hidden, 6)
        for rows, columns in cut:
            kernels.sum_two(mine.at(rows, columns), theirs.at(rows, columns), cut.block, partials.at(rows, columns))
        self.student, self.under_student = partials.summed()
        self.teacher, self.under_teacher = partials.summed(3)

    @property
    def reverse_kl(self) -> Tensor:
        """KL(p || q), [N] nats."""
        return self.under_student - self.student + self.teacher

    @property
    def forward_kl(self) -> Tensor:
        """KL(q || p), [N] nats."""
        return self.student - self.teacher - self.under_teacher


@torch.no_grad()
def token_kl(student: Head, teacher: Head, *, temperature: float = 1.0) -> Tensor:
    """As ``lit_opd.scoring.tiles.token_kl``: KL(student || teacher), float32 [N] nats."""
    with _on(student.hidden):
        return _Pair(student, teacher, temperature).reverse_kl.float()


class _Divergence(Rule):
    """KL(p || q), KL(q || p) or the generalised JSD over the whole vocabulary."""

    def __init__(self, kind: str, teacher: Head, beta: float) -> None:
        self.kind, self.teacher, self.beta = kind, teacher, beta
        self.mix = (math.log(beta), math.log1p(-beta))

    def values(self, head: Head, temperature: float) -> Tensor:
        """[N] nats; keeps both log-sum-exps and what the slope is centred with."""
        sums = _Pair(head, self.teacher, temperature)
        self.logs = (sums.student.float(), sums.teacher.float())
        if self.kind == "jsd":
            values, centre = self._mixed(head, temperature)
        else:
            values = centre = sums.reverse_kl if self.kind == "reverse_kl" else sums.forward_kl
        self.centre = centre.float()
        return values.float()

    def _mixed(self, head: Head, temperature: float) -> tuple[Tensor, Tensor]:
        """A second pass, because the mixture needs both log-sum-exps: the JSD and KL(p || m), float64 [N]."""
        cut = Cut.of(head)
        mine, theirs = Tiles(head, cut, temperature), Tiles(self.teacher, cut, temperature)
        partials = Partials(cut, head.hidden, 2)
        for rows, columns in cut:
            logs = (self.logs[0][rows], self.logs[1][rows])
            tables = partials.at(rows, columns)
            kernels.sum_mixed(mine.at(rows, columns), theirs.at(rows, columns), cut.block, logs, self.mix, tables)
        of_student, of_teacher = partials.total(0), partials.total(1)
        return self.beta * of_teacher + (1.0 - self.beta) * of_student, of_student

    def slopes(self, head: Head, cut: Cut, temperature: float) -> Callable[..., None]:
        """p dD/dp, centred."""
        theirs, kind = Tiles(self.teacher, cut, temperature), kernels.KINDS[self.kind]
        share = 1.0 - self.beta if self.kind == "jsd" else 1.0

        def write(tile: kernels.Tile, out: Tensor, factor: Tensor, rows: slice, columns: slice) -> None:
            numbers = tuple(value[rows] for value in (*self.logs, self.centre))
            teacher = theirs.at(rows, columns)
            kernels.slope_two(tile, teacher, cut.block, out, (*numbers, factor * share), self.mix, kind)

        return write


def token_divergence(student: Head, teacher: Head, *, kind: str, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """A divergence over the whole vocabulary, float32 [N] nats, differentiable in the student.

    Args:
        student: N hidden states and the head.
        teacher: of the same tokens and entries; without gradient.
        kind: "reverse_kl", "forward_kl" or "jsd", as ``lit_opd.objective.Divergence`` defines them.
        beta: the teacher's share of the mixture, in (0, 1).
        temperature: > 0, divides both logits.
    """
    return _apply(student, _Divergence(kind, teacher, beta), temperature)
