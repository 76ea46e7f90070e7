"""Policies so small that every response can be listed: tabular logits on a tree of prefixes, in float64.

Two computations meet in the oracles and share only the tables. ``expected_gradient`` sums p(y) * gradient of the package's
own loss over all responses y. The others walk the prefixes and never see a response, a mask, an advantage or a sampled
token: reach probabilities, exact divergences, backward values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from lit_opd.advantage import AdvantageTransform, apply_transforms
from lit_opd.objective import Aggregation, Objective, PolicyLoss, aggregate, denominator
from lit_opd.scoring.tiles import Head
from lit_opd.types import TokenSignal, TopK
from lit_opd.weighting import WeightingStrategy
from lit_opd.weighting.uniform import Uniform

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """All responses of at most ``steps`` tokens over ``symbols`` symbols; the last symbol ends one where ``can_end``.

    Args:
        symbols: vocabulary size V, the end symbol included.
        steps: longest response T.
        can_end: a response stops behind symbol V - 1.
    """

    symbols: int
    steps: int
    can_end: bool = False

    @cached_property
    def prefixes(self) -> list[Prefix]:
        """Every state a token is drawn in, parents first; the table's row N of each."""
        found: list[Prefix] = [()]
        for prefix in found:
            if len(prefix) + 1 < self.steps:
                found += [(*prefix, s) for s in range(self.symbols) if not self.is_whole((*prefix, s))]
        return found

    @cached_property
    def rows(self) -> dict[Prefix, int]:
        """The table's row of each prefix."""
        return {prefix: row for row, prefix in enumerate(self.prefixes)}

    @cached_property
    def responses(self) -> list[Prefix]:
        """Every whole response."""
        extended = [(*prefix, s) for prefix in self.prefixes for s in range(self.symbols)]
        return [response for response in extended if self.is_whole(response)]

    def is_whole(self, symbols: Prefix) -> bool:
        """Whether nothing follows."""
        return len(symbols) == self.steps or (self.can_end and symbols[-1] == self.symbols - 1)

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, T], one row a response."""
        return torch.arange(self.steps) < torch.tensor([[len(response)] for response in self.responses])

    @cached_property
    def ids(self) -> Tensor:
        """int64 [B, T], 0 where masked."""
        return torch.tensor([(*response, *[0] * (self.steps - len(response))) for response in self.responses])

    @cached_property
    def states(self) -> Tensor:
        """int64 [B, T], the table's row a token is drawn from, 0 where masked."""
        return torch.tensor(
            [
                [self.rows[response[:t]] if t < len(response) else 0 for t in range(self.steps)]
                for response in self.responses
            ]
        )

    def picked(self, table: Tensor) -> Tensor:
        """Entries of a [N, V] table at the tokens of each response, or of an [N] one at their states: [B, T], 0 masked."""
        entries = table[self.states, self.ids] if table.ndim == 2 else table[self.states]
        return torch.where(self.mask, entries, 0.0)

    def random_logits(self, seed: int, scale: float = 1.0) -> Tensor:
        """float64 [N, V]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(self.prefixes), self.symbols)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    # -- exact, by prefixes ----------------------------------------------------------------------------------------------

    def reach(self, logits: Tensor) -> Tensor:
        """Probability of each prefix under the policy: [N]."""
        table = logits.softmax(-1)
        reached = [table.new_ones(())]
        for prefix in self.prefixes[1:]:
            parent = self.rows[prefix[:-1]]
            reached.append(reached[parent] * table[parent, prefix[-1]])
        return torch.stack(reached)

    def values(self, logits: Tensor, cost: Tensor, discount: float) -> Tensor:
        """What each token costs with all that follows: Q = cost + discount * E[Q of the next token], [N, V]."""
        table, worth = logits.softmax(-1), cost.clone()
        for prefix in reversed(self.prefixes):
            for symbol in range(self.symbols):
                child = self.rows.get((*prefix, symbol))
                if child is not None:
                    worth[self.rows[prefix], symbol] += discount * (table[child] * worth[child]).sum()
        return worth


def kl(left: Tensor, right: Tensor) -> Tensor:
    """KL(left || right) of each row of logits: [N, V] twice -> [N] nats."""
    p, q = left.softmax(-1), right.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of logits: [N, V] -> [N] nats."""
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def gradient_of(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """d objective / d logits: [N, V]."""
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(leaf), leaf)
    return gradient


def signal_of(tree: Tree, student: Tensor, teacher: Tensor, sampler: Tensor | None = None) -> TokenSignal:
    """What the package is told of every response: log-probs, the state fields by their definition, and whole lists."""
    drawn = None
    if sampler is not None:
        drawn = tree.picked(sampler.log_softmax(-1)).nan_to_num(neginf=0.0)  # such a row is never drawn
    lists = [logits[tree.states].log_softmax(-1).sort(-1, descending=True) for logits in (student, teacher)]
    ours, theirs = (TopK(ids=found.indices, logprobs=found.values) for found in lists)
    return TokenSignal(
        student_topk=ours,
        teacher_topk=theirs,
        student_at_teacher_topk=student[tree.states].log_softmax(-1).gather(-1, theirs.ids),
        token_ids=tree.ids,
        student_logprobs=tree.picked(student.log_softmax(-1)),
        teacher_logprobs=tree.picked(teacher.log_softmax(-1)),
        sampler_logprobs=drawn,
        student_entropy=tree.picked(entropy(student)),
        teacher_entropy=tree.picked(entropy(teacher)),
        token_kl=tree.picked(kl(student, teacher)),
        mask=tree.mask,
    )


def expected_gradient(
    tree: Tree,
    student: Tensor,
    teacher: Tensor,
    *,
    strategy: WeightingStrategy | None = None,
    advantage: Sequence[AdvantageTransform] = (),
    objective: Objective | None = None,
    aggregation: Aggregation = "sequence-sum",
    sampler: Tensor | None = None,
    rows: int = 1,
    **fields: Tensor,
) -> Tensor:
    """sum over batches of p(batch) * d loss(batch) / d logits, [N, V]; p is the sampler's where there is one.

    A batch is ``rows`` responses drawn independently. It goes through transforms, weights, objective and aggregation of the
    package. ``fields`` of the signal are replaced: a mask, rewards.
    """
    strategy, objective = strategy or Uniform(), objective or PolicyLoss()
    told = replace(signal_of(tree, student, teacher, sampler), **fields)
    whole = apply_transforms(advantage, told)
    probability = tree.picked((student if sampler is None else sampler).log_softmax(-1)).sum(-1).exp()
    leaf = student.clone().requires_grad_()
    logprobs, divergence = tree.picked(leaf.log_softmax(-1)), _divergence(tree, leaf, teacher, objective)
    loss = leaf.new_zeros(())
    for batch in product(range(len(whole)), repeat=rows):
        index = torch.tensor(batch)
        signal = whole.rows(index)
        weights, kept = strategy(signal), strategy.kept(signal)
        exact = None if divergence is None else divergence[index]
        values = objective.token_loss(logprobs[index], signal, weights, divergence=exact).values
        total = denominator(aggregation, kept=kept, max_new_tokens=tree.steps)
        share = aggregate(values, kept=kept, aggregation=aggregation, denominator=total)
        loss = loss + probability[index].prod().detach() * share
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def _divergence(tree: Tree, student: Tensor, teacher: Tensor, objective: Objective) -> Tensor | None:
    """What the objective makes of both distributions at every token, [B, T]; None for one that reads sampled tokens."""
    if "teacher_distribution" not in objective.requires:
        return None
    states = tree.states[tree.mask]
    heads = Head(student[states], weight=None), Head(teacher[states], weight=None)
    values = objective.token_divergence(*heads, temperature=1.0)
    return values.new_zeros(tree.mask.shape).masked_scatter(tree.mask, values)
